//! Reading stored messages. A row that nobody could have enqueued becomes a record with a defect, never an error.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use outbox_core::{Message, MessageId, Parts, Position, Record, Shard, StoredMessage, StoredMessages};
use sqlx::Row;
use sqlx::mysql::MySqlRow;

/// Reads rows of messages.
#[derive(Debug, Default)]
pub(crate) struct Rows(StoredMessages);

impl Rows {
    /// The record in a row of `shard, id, message, key_seq`, from the column `first` on.
    pub(crate) fn record(&mut self, row: &MySqlRow, first: usize) -> sqlx::Result<Record> {
        let (parts, defect) = self.parts(row, first + 2)?;
        Ok(Record {
            shard: shard(row, first)?,
            position: Position(number(row, first + 1)?),
            key_seq: optional_number(row, first + 10)?,
            attempts: 0,
            message: Message::from_stored(parts),
            defect,
        })
    }

    /// The message that begins at column `first`, and what is wrong with it.
    pub(crate) fn parts(&mut self, row: &MySqlRow, first: usize) -> sqlx::Result<(Parts, Option<String>)> {
        Ok(self.0.parts(StoredMessage {
            id: Some(message_id(row, first)?),
            topic: text(row, first + 1)?.unwrap_or_default(),
            key: bytes(row, first + 2)?,
            payload: bytes(row, first + 3)?,
            headers: text(row, first + 4)?.map(str::as_bytes),
            content_type: text(row, first + 5)?,
            created_at: time(row, first + 6)?,
            // What the server would not send was left behind.
            defect: optional_number(row, first + 7)?.map(|bytes| {
                format!(
                    "the message has {bytes} bytes, more than the server's max_allowed_packet lets it send"
                )
            }),
        }))
    }
}

fn raw(row: &MySqlRow, column: usize) -> sqlx::Result<Option<&[u8]>> {
    row.try_get_unchecked(column)
}

pub(crate) fn bytes(row: &MySqlRow, column: usize) -> sqlx::Result<Option<Bytes>> {
    Ok(raw(row, column)?.map(Bytes::copy_from_slice))
}

pub(crate) fn text(row: &MySqlRow, column: usize) -> sqlx::Result<Option<&str>> {
    row.try_get_unchecked(column)
}

pub(crate) fn optional_number(row: &MySqlRow, column: usize) -> sqlx::Result<Option<i64>> {
    row.try_get_unchecked(column)
}

/// A number; an absent one is 0.
pub(crate) fn number(row: &MySqlRow, column: usize) -> sqlx::Result<i64> {
    Ok(optional_number(row, column)?.unwrap_or_default())
}

pub(crate) fn count(row: &MySqlRow, column: usize) -> sqlx::Result<u64> {
    Ok(number(row, column)?.unsigned_abs())
}

pub(crate) fn shard(row: &MySqlRow, column: usize) -> sqlx::Result<Shard> {
    Ok(Shard(u16::try_from(number(row, column)?).unwrap_or_default()))
}

pub(crate) fn flag(row: &MySqlRow, column: usize) -> sqlx::Result<bool> {
    Ok(number(row, column)? != 0)
}

pub(crate) fn message_id(row: &MySqlRow, column: usize) -> sqlx::Result<MessageId> {
    let bytes = raw(row, column)?.unwrap_or_default();
    let bytes = bytes
        .try_into()
        .map_err(|_| sqlx::Error::Decode(format!("column {column} has {} bytes", bytes.len()).into()))?;
    Ok(MessageId::from_bytes(bytes))
}

/// Milliseconds as a span; what is over is nothing.
pub(crate) fn span(row: &MySqlRow, column: usize) -> sqlx::Result<Option<Duration>> {
    Ok(optional_number(row, column)?.map(|millis| Duration::from_millis(millis.max(0).unsigned_abs())))
}

/// Microseconds since 1970 as a time, if it is one that this system knows.
pub(crate) fn time(row: &MySqlRow, column: usize) -> sqlx::Result<Option<SystemTime>> {
    let Some(micros) = optional_number(row, column)? else {
        return Ok(None);
    };
    let span = Duration::from_micros(micros.unsigned_abs());
    Ok(if micros < 0 {
        UNIX_EPOCH.checked_sub(span)
    } else {
        UNIX_EPOCH.checked_add(span)
    })
}

/// A time in microseconds since 1970 as the server takes it, rounded up: never before it.
pub(crate) fn micros(time: SystemTime) -> i64 {
    /// What the server can hold, with room: the year 9999.
    const FAR: i64 = 253_370_764_800_000_000;
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos().div_ceil(1_000))
            .unwrap_or(FAR)
            .min(FAR),
        // Long over, whenever that was.
        Err(_) => 0,
    }
}
