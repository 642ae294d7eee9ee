//! Reading stored messages. A row that nobody could have enqueued becomes a record with a defect, never an error.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use outbox_core::{Message, MessageId, Parts, Position, Record, Shard, StoredMessage, StoredMessages};
use rusqlite::Row;
use rusqlite::types::ValueRef;

/// The only shard.
pub(crate) const SHARD: Shard = Shard(0);

/// Reads rows of `id, message, key_seq`.
#[derive(Debug)]
pub(crate) struct Rows {
    messages: StoredMessages,
    /// Whether numbers are of ours and not written by hand.
    sequenced: bool,
}

impl Rows {
    pub(crate) fn new(sequenced: bool) -> Self {
        Self {
            messages: StoredMessages::default(),
            sequenced,
        }
    }

    /// The record in `row`.
    pub(crate) fn record(&mut self, row: &Row<'_>) -> rusqlite::Result<Record> {
        let (parts, defect) = self.parts(row, 1)?;
        Ok(Record {
            shard: SHARD,
            position: Position(row.get(0)?),
            key_seq: self.key_seq(row, 8),
            attempts: 0,
            message: Message::from_stored(parts),
            defect,
        })
    }

    /// The number at `column`, where messages are numbered.
    pub(crate) fn key_seq(&self, row: &Row<'_>, column: usize) -> Option<i64> {
        match row.get_ref(column) {
            Ok(ValueRef::Integer(number)) if self.sequenced => Some(number),
            _ => None,
        }
    }

    /// The message that begins at column `first`, and what is wrong with it.
    pub(crate) fn parts(&mut self, row: &Row<'_>, first: usize) -> rusqlite::Result<(Parts, Option<String>)> {
        let mut defect = None;
        let mut wrong = |text: &str| {
            defect.get_or_insert_with(|| text.to_owned());
        };

        let id = message_id(row.get_ref(first)?);
        if id.is_none() {
            wrong("the message id is not a BLOB of 16 bytes");
        }
        let topic = text(row.get_ref(first + 1)?).unwrap_or_else(|| {
            wrong("the topic is not text");
            ""
        });
        let content_type = match row.get_ref(first + 5)? {
            ValueRef::Null => None,
            value => Some(text(value).unwrap_or_else(|| {
                wrong("the content type is not text");
                "application/octet-stream"
            })),
        };
        let created_at = match row.get_ref(first + 6)? {
            ValueRef::Integer(millis) => time(millis),
            _ => None,
        };
        Ok(self.messages.parts(StoredMessage {
            id,
            topic,
            key: bytes(row.get_ref(first + 2)?),
            payload: bytes(row.get_ref(first + 3)?),
            headers: raw(row.get_ref(first + 4)?),
            content_type,
            created_at,
            defect,
        }))
    }
}

/// The bytes of a text or a BLOB, where they are.
const fn raw(value: ValueRef<'_>) -> Option<&[u8]> {
    match value {
        ValueRef::Blob(bytes) | ValueRef::Text(bytes) => Some(bytes),
        _ => None,
    }
}

/// Bytes that were cast to a BLOB.
pub(crate) fn bytes(value: ValueRef<'_>) -> Option<Bytes> {
    raw(value).map(Bytes::copy_from_slice)
}

/// A message id, if that is what the value is.
pub(crate) fn message_id(value: ValueRef<'_>) -> Option<MessageId> {
    match value {
        ValueRef::Blob(bytes) => bytes.try_into().ok().map(MessageId::from_bytes),
        _ => None,
    }
}

/// Text, if that is what the value is.
pub(crate) fn text(value: ValueRef<'_>) -> Option<&str> {
    match value {
        ValueRef::Text(bytes) => std::str::from_utf8(bytes).ok(),
        _ => None,
    }
}

/// Milliseconds since 1970 as a time, if there is such a time.
pub(crate) fn time(millis: i64) -> Option<SystemTime> {
    let span = Duration::from_millis(millis.unsigned_abs());
    if millis < 0 {
        UNIX_EPOCH.checked_sub(span)
    } else {
        UNIX_EPOCH.checked_add(span)
    }
}
