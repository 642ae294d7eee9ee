//! Messages as stores have them, which anybody may have written.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use crate::headers::Headers;
use crate::message::{MessageId, Parts};

/// What a store has of a message, column by column.
///
/// ```
/// use outbox_core::{MessageId, StoredMessage, StoredMessages};
///
/// let stored = StoredMessage { id: Some(MessageId::new()), topic: "orders", ..StoredMessage::default() };
/// let (parts, defect) = StoredMessages::default().parts(stored);
/// assert_eq!((&*parts.topic, defect), ("orders", None));
///
/// let nameless = StoredMessage { topic: "orders", ..StoredMessage::default() };
/// assert!(StoredMessages::default().parts(nameless).1.is_some());
/// ```
#[derive(Debug, Default)]
pub struct StoredMessage<'r> {
    /// As [`Parts::id`]; none where there is none that can be read, which is a defect.
    pub id: Option<MessageId>,
    /// As [`Parts::topic`].
    pub topic: &'r str,
    /// As [`Parts::key`].
    pub key: Option<Bytes>,
    /// As [`Parts::payload`].
    pub payload: Option<Bytes>,
    /// As [`Headers::encode`] gives them.
    pub headers: Option<&'r [u8]>,
    /// As [`Parts::content_type`].
    pub content_type: Option<&'r str>,
    /// As [`Parts::created_at`].
    pub created_at: Option<SystemTime>,
    /// What the store already knows to be wrong with it.
    pub defect: Option<String>,
}

/// Makes messages of what is stored; neighbours of one topic share its name.
///
/// ```
/// use outbox_core::{MessageId, StoredMessage, StoredMessages};
///
/// let mut messages = StoredMessages::default();
/// let stored = StoredMessage { id: Some(MessageId::new()), topic: "no topic", ..StoredMessage::default() };
/// let (_, defect) = messages.parts(stored);
/// assert!(defect.is_some_and(|defect| defect.contains("topic")));
/// ```
#[derive(Debug, Default)]
pub struct StoredMessages {
    topic: Option<Arc<str>>,
}

impl StoredMessages {
    /// The message, and why nobody could have enqueued it, if so: it is a message all the same, which dies alone.
    pub fn parts(&mut self, stored: StoredMessage<'_>) -> (Parts, Option<String>) {
        let topic = match &self.topic {
            Some(known) if **known == *stored.topic => Arc::clone(known),
            _ => Arc::clone(self.topic.insert(stored.topic.into())),
        };
        let mut defect = stored.defect;
        if stored.id.is_none() {
            defect.get_or_insert_with(|| "it has no message id that can be read".to_owned());
        }
        let headers = stored.headers.map_or_else(Headers::new, |headers| {
            Headers::decode(headers).unwrap_or_else(|error| {
                defect.get_or_insert_with(|| error.to_string());
                Headers::new()
            })
        });
        let parts = Parts {
            id: stored.id.unwrap_or(MessageId::from_bytes([0; 16])),
            topic,
            key: stored.key,
            payload: stored.payload,
            headers,
            content_type: stored.content_type.map(Arc::from),
            created_at: stored.created_at,
            deliver_at: None,
        };
        let defect = defect.or_else(|| parts.check().err().map(|error| error.to_string()));
        (parts, defect)
    }
}
