//! Reading stored messages. A row that nobody could have enqueued becomes a record with a defect, never an error.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use outbox_core::{Message, MessageId, Parts, Position, Record, Shard, StoredMessage, StoredMessages};
use sqlx::Row;
use sqlx::postgres::PgRow;

/// Reads rows of messages.
#[derive(Debug, Default)]
pub(crate) struct Rows(StoredMessages);

impl Rows {
    /// The record in a row of `shard, id, message, key_seq`, from the column `first` on.
    pub(crate) fn record(&mut self, row: &PgRow, first: usize) -> sqlx::Result<Record> {
        let (parts, defect) = self.parts(row, first + 2)?;
        Ok(Record {
            shard: shard(row, first)?,
            position: Position(number(row, first + 1)?),
            key_seq: optional_number(row, first + 9)?,
            attempts: 0,
            message: Message::from_stored(parts),
            defect,
        })
    }

    /// The message that begins at column `first`, and what is wrong with it.
    pub(crate) fn parts(&mut self, row: &PgRow, first: usize) -> sqlx::Result<(Parts, Option<String>)> {
        Ok(self.0.parts(StoredMessage {
            id: Some(message_id(row, first)?),
            topic: text(row, first + 1)?.unwrap_or_default(),
            key: bytes(row, first + 2)?,
            payload: bytes(row, first + 3)?,
            headers: text(row, first + 4)?.map(str::as_bytes),
            content_type: text(row, first + 5)?,
            created_at: time(row, first + 6)?,
            defect: None,
        }))
    }
}

/// The bytes in a column, as the server's binary format has them.
fn raw(row: &PgRow, column: usize) -> sqlx::Result<Option<&[u8]>> {
    let value = row.try_get_raw(column)?;
    if sqlx::ValueRef::is_null(&value) {
        return Ok(None);
    }
    value.as_bytes().map(Some).map_err(sqlx::Error::Decode)
}

fn fixed<const N: usize>(row: &PgRow, column: usize) -> sqlx::Result<Option<[u8; N]>> {
    raw(row, column)?
        .map(|bytes| {
            bytes
                .try_into()
                .map_err(|_| sqlx::Error::Decode(format!("column {column} has {} bytes", bytes.len()).into()))
        })
        .transpose()
}

pub(crate) fn bytes(row: &PgRow, column: usize) -> sqlx::Result<Option<Bytes>> {
    Ok(raw(row, column)?.map(Bytes::copy_from_slice))
}

/// Text, which the server vouches for; ours has to be UTF-8 as well.
pub(crate) fn text(row: &PgRow, column: usize) -> sqlx::Result<Option<&str>> {
    raw(row, column)?
        .map(|bytes| std::str::from_utf8(bytes).map_err(|error| sqlx::Error::Decode(error.into())))
        .transpose()
}

pub(crate) fn optional_number(row: &PgRow, column: usize) -> sqlx::Result<Option<i64>> {
    Ok(fixed(row, column)?.map(i64::from_be_bytes))
}

/// A `bigint`; an absent one is 0.
pub(crate) fn number(row: &PgRow, column: usize) -> sqlx::Result<i64> {
    Ok(optional_number(row, column)?.unwrap_or_default())
}

pub(crate) fn count(row: &PgRow, column: usize) -> sqlx::Result<u64> {
    Ok(number(row, column)?.unsigned_abs())
}

pub(crate) fn shard(row: &PgRow, column: usize) -> sqlx::Result<Shard> {
    let number = fixed(row, column)?.map(i16::from_be_bytes).unwrap_or_default();
    Ok(Shard(number.unsigned_abs()))
}

pub(crate) fn flag(row: &PgRow, column: usize) -> sqlx::Result<bool> {
    Ok(fixed::<1>(row, column)?.is_some_and(|[byte]| byte != 0))
}

pub(crate) fn message_id(row: &PgRow, column: usize) -> sqlx::Result<MessageId> {
    Ok(MessageId::from_bytes(fixed(row, column)?.unwrap_or_default()))
}

/// Milliseconds as a span; what is over is nothing.
pub(crate) fn span(row: &PgRow, column: usize) -> sqlx::Result<Option<Duration>> {
    Ok(optional_number(row, column)?.map(|millis| Duration::from_millis(millis.max(0).unsigned_abs())))
}

/// A `timestamptz`, if it is a time that this system knows: the server counts microseconds from the year 2000.
pub(crate) fn time(row: &PgRow, column: usize) -> sqlx::Result<Option<SystemTime>> {
    const YEAR_2000: Duration = Duration::from_secs(946_684_800);
    let Some(micros) = optional_number(row, column)? else {
        return Ok(None);
    };
    let span = Duration::from_micros(micros.unsigned_abs());
    let base = UNIX_EPOCH + YEAR_2000;
    Ok(if micros < 0 {
        base.checked_sub(span)
    } else {
        base.checked_add(span)
    })
}

/// A time in microseconds since 1970 as the server takes it, rounded up: never before it.
pub(crate) fn micros(time: SystemTime) -> i64 {
    /// What the server can hold, with room: the year 10,000.
    const FAR: i64 = 253_402_300_800_000_000;
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos().div_ceil(1_000))
            .unwrap_or(FAR)
            .min(FAR),
        // Long over, whenever that was.
        Err(_) => 0,
    }
}

/// A shard as the server's `smallint`.
pub(crate) fn small(shard: Shard) -> i16 {
    i16::try_from(shard.0).unwrap_or(i16::MAX)
}

/// A limit as the server's `bigint`.
pub(crate) fn limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
