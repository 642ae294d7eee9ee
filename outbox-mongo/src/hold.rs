//! Holds as documents.

use mongodb::bson::{Bson, DateTime, Document};
use outbox_core::{Hold, HoldScope, HoldState, MessageId, Position, RecordRef, Shard};

use crate::row::span;

/// A hold that was read with the server's time beside it.
pub(crate) fn read_hold(document: &Document) -> Hold {
    let name = document.get_document("_id").ok();
    let text = |field: &str| name.and_then(|name| name.get_str(field).ok()).unwrap_or_default();
    let key = name
        .and_then(|name| name.get_binary_generic("key").ok())
        .map_or(&[][..], Vec::as_slice);
    let left = match document.get_datetime("due") {
        Ok(due) => i64::try_from(span(now(document), *due).as_millis()).unwrap_or(i64::MAX),
        Err(_) => 0,
    };
    Hold {
        shard: Shard(u16::try_from(document.get_i32("shard").unwrap_or_default()).unwrap_or_default()),
        scope: HoldScope::named(text("scope"), text("topic"), key),
        head: RecordRef {
            position: Position(document.get_i64("head").unwrap_or_default()),
            id: message_id(document, "head_id"),
        },
        attempts: u32::try_from(document.get_i64("attempts").unwrap_or_default()).unwrap_or(u32::MAX),
        state: HoldState::read(document.get_bool("parked").unwrap_or_default(), left),
        reason: document.get_str("reason").unwrap_or_default().to_owned(),
    }
}

fn message_id(document: &Document, field: &str) -> MessageId {
    let bytes = match document.get(field) {
        Some(Bson::Binary(binary)) => binary.bytes.as_slice().try_into().ok(),
        _ => None,
    };
    MessageId::from_bytes(bytes.unwrap_or_default())
}

/// The server's time that was read beside something; the beginning of time if it was not.
pub(crate) fn now(document: &Document) -> DateTime {
    document
        .get_datetime("now")
        .copied()
        .unwrap_or(DateTime::from_millis(0))
}
