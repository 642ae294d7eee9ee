//! What a consumer gets out of a record.

use bytes::Bytes;
use outbox_core::{Error, ErrorKind, Headers, MessageId, Result};
use rdkafka::message::{Headers as _, Message as KafkaMessage};

use crate::headers::{CONTENT_TYPE, OUTBOX_ID, OUTBOX_KEY_SEQ};

/// A message as a consumer receives it: what the producer enqueued, and where Kafka put it.
///
/// ```
/// use outbox_core::MessageId;
/// use outbox_kafka::ReceivedMessage;
///
/// /// Whether something of this key was lost or repeated since `last`; under `Ordering::Sequenced`.
/// fn is_next(last: i64, message: &ReceivedMessage) -> bool {
///     message.key_seq == Some(last + 1)
/// }
/// ```
#[derive(Clone, PartialEq)]
pub struct ReceivedMessage {
    /// Names the message; duplicates have the same. What an [`Inbox`](outbox_core::Inbox) is asked with.
    pub id: MessageId,
    /// Its number within its key, without gaps; only under `Ordering::Sequenced`.
    pub key_seq: Option<i64>,
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The offset; the next to read is one more.
    pub offset: i64,
    /// The ordering key; none is not the empty one.
    pub key: Option<Bytes>,
    /// The content; none is a tombstone.
    pub payload: Option<Bytes>,
    /// The payload's media type.
    pub content_type: Option<String>,
    /// The producer's own headers in their order; a null value is empty here.
    pub headers: Headers,
}

impl ReceivedMessage {
    /// Reads a record that a [`KafkaSink`](crate::KafkaSink) wrote.
    ///
    /// # Errors
    /// [`Corrupt`](ErrorKind::Corrupt), with topic, partition and offset, when the id is missing or no UUID, or the
    /// number is none. Such a record is not from an outbox: skip it or put it aside, it will not get better.
    ///
    /// # Example
    /// ```
    /// use outbox_kafka::ReceivedMessage;
    /// use outbox_kafka::rdkafka::message::{Header, OwnedHeaders, OwnedMessage, Timestamp};
    ///
    /// # let headers = OwnedHeaders::new()
    /// #     .insert(Header { key: "outbox-id", value: Some("018f3f2e-7c1a-7000-8000-000000000001") });
    /// # let record = OwnedMessage::new(
    /// #     Some(b"{}".to_vec()), Some(b"42".to_vec()), "orders".into(), Timestamp::NotAvailable, 0, 7, Some(headers));
    /// // `record` is what consumer.recv() returned.
    /// let message = ReceivedMessage::read(&record)?;
    /// assert_eq!(message.id.to_string(), "018f3f2e-7c1a-7000-8000-000000000001");
    /// # Ok::<(), outbox_core::Error>(())
    /// ```
    pub fn read<M: KafkaMessage>(record: &M) -> Result<Self> {
        let mut id = None;
        let mut key_seq = None;
        let mut content_type = None;
        let mut headers = Headers::new();
        for header in record.headers().iter().flat_map(|headers| headers.iter()) {
            let value = header.value.unwrap_or_default();
            match header.key {
                OUTBOX_ID if id.is_none() => id = Some(parse_id(record, value)?),
                OUTBOX_KEY_SEQ if key_seq.is_none() => key_seq = Some(parse_number(record, value)?),
                // The sink puts it before the producer's own headers; one that is no text is a producer's.
                CONTENT_TYPE if content_type.is_none() && str::from_utf8(value).is_ok() => {
                    content_type = Some(String::from_utf8_lossy(value).into_owned());
                }
                name => headers.push(name, value.to_vec()),
            }
        }
        Ok(Self {
            id: id.ok_or_else(|| no_id(record))?,
            key_seq,
            topic: record.topic().to_owned(),
            partition: record.partition(),
            offset: record.offset(),
            key: record.key().map(Bytes::copy_from_slice),
            payload: record.payload().map(Bytes::copy_from_slice),
            content_type,
            headers,
        })
    }
}

/// Keys, payloads and header values are data of the user's: only their sizes are shown.
impl std::fmt::Debug for ReceivedMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReceivedMessage")
            .field("id", &self.id)
            .field("key_seq", &self.key_seq)
            .field("topic", &self.topic)
            .field("partition", &self.partition)
            .field("offset", &self.offset)
            .field("key_bytes", &self.key.as_ref().map(Bytes::len))
            .field("payload_bytes", &self.payload.as_ref().map(Bytes::len))
            .field("content_type", &self.content_type)
            .field("headers", &self.headers)
            .finish()
    }
}

/// The id alone, without copying the record: enough to ask an inbox whether it is a duplicate.
///
/// # Errors
/// As [`ReceivedMessage::read`].
///
/// # Example
/// ```
/// use outbox_kafka::message_id;
/// use outbox_kafka::rdkafka::message::{Header, OwnedHeaders, OwnedMessage, Timestamp};
///
/// # let headers = OwnedHeaders::new()
/// #     .insert(Header { key: "outbox-id", value: Some("018f3f2e-7c1a-7000-8000-000000000001") });
/// # let record = OwnedMessage::new(None, None, "orders".into(), Timestamp::NotAvailable, 0, 7, Some(headers));
/// // `record` is what consumer.recv() returned.
/// assert_eq!(message_id(&record)?.to_string(), "018f3f2e-7c1a-7000-8000-000000000001");
/// # Ok::<(), outbox_core::Error>(())
/// ```
pub fn message_id<M: KafkaMessage>(record: &M) -> Result<MessageId> {
    record
        .headers()
        .iter()
        .flat_map(|headers| headers.iter())
        .find(|header| header.key == OUTBOX_ID)
        .map_or_else(
            || Err(no_id(record)),
            |header| parse_id(record, header.value.unwrap_or_default()),
        )
}

fn parse_id<M: KafkaMessage>(record: &M, value: &[u8]) -> Result<MessageId> {
    str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| corrupt(record, "the header outbox-id is no UUID"))
}

fn parse_number<M: KafkaMessage>(record: &M, value: &[u8]) -> Result<i64> {
    str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| corrupt(record, "the header outbox-key-seq is no number"))
}

fn no_id<M: KafkaMessage>(record: &M) -> Error {
    corrupt(record, "there is no header outbox-id")
}

fn corrupt<M: KafkaMessage>(record: &M, text: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, "read kafka record", text)
        .with("topic", record.topic())
        .with("partition", record.partition())
        .with("offset", record.offset())
}
