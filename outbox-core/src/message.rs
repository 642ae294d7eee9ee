//! The message: what a producer enqueues and a consumer receives.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::headers::Headers;

/// The longest key, in bytes.
///
/// ```
/// use outbox_core::{MAX_KEY_BYTES, Message};
///
/// assert!(Message::builder("orders").key(vec![0; MAX_KEY_BYTES]).build().is_ok());
/// assert!(Message::builder("orders").key(vec![0; MAX_KEY_BYTES + 1]).build().is_err());
/// ```
pub const MAX_KEY_BYTES: usize = 1024;
/// The longest topic name, in characters, as in Kafka.
///
/// ```
/// use outbox_core::{MAX_TOPIC_LENGTH, check_topic};
///
/// assert!(check_topic(&"t".repeat(MAX_TOPIC_LENGTH)).is_ok());
/// assert!(check_topic(&"t".repeat(MAX_TOPIC_LENGTH + 1)).is_err());
/// ```
pub const MAX_TOPIC_LENGTH: usize = 249;
/// Header names with this prefix belong to the framework.
///
/// ```
/// use outbox_core::{Message, RESERVED_HEADER_PREFIX};
///
/// assert!(Message::builder("orders").header(format!("{RESERVED_HEADER_PREFIX}mine"), "x").build().is_err());
/// ```
pub const RESERVED_HEADER_PREFIX: &str = "outbox-";

/// Names a message: a UUID, version 7 unless the producer brings another. Consumers drop duplicates by it.
///
/// ```
/// use outbox_core::MessageId;
///
/// let id: MessageId = "018f3f2e-7c1a-7000-8000-000000000001".parse().unwrap();
/// assert_eq!(id.to_string(), "018f3f2e-7c1a-7000-8000-000000000001");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MessageId(Uuid);

impl MessageId {
    /// A fresh id, version 7: time-ordered, random.
    #[must_use]
    #[expect(
        clippy::new_without_default,
        reason = "a default that differs each time surprises"
    )]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// The id with these 16 bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    /// The 16 bytes, in network order.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The id as a UUID.
    #[must_use]
    pub const fn as_uuid(&self) -> Uuid {
        self.0
    }
}

impl From<Uuid> for MessageId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl FromStr for MessageId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        text.parse().map(Self).map_err(|error| {
            Error::new(ErrorKind::Invalid, "parse message id", "expected a UUID")
                .with("id", text)
                .with_source(error)
        })
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The ordering domain: messages of one topic **and** key are delivered in order.
///
/// ```
/// use outbox_core::Message;
///
/// let of = |topic: &str| Message::builder(topic).key("42").build().unwrap().order_key().unwrap();
/// assert_eq!(of("orders"), of("orders")); // in order
/// assert_ne!(of("orders"), of("films")); // the same key of another topic: no order
/// assert_eq!(of("orders").to_string(), "orders/42");
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OrderKey {
    /// The topic.
    pub topic: Arc<str>,
    /// The key; may be empty, which is a key like any other.
    pub key: Bytes,
}

impl fmt::Debug for OrderKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.key.escape_ascii())
    }
}

impl fmt::Display for OrderKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What a producer enqueues: immutable, and checked when it is built.
///
/// ```
/// use outbox_core::Message;
///
/// let message = Message::builder("orders")
///     .key("42")
///     .payload(r#"{"total": 12}"#)
///     .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
///     .build()?;
/// assert_eq!(message.topic(), "orders");
///
/// // A topic name that Kafka would refuse is refused here, in the producer's transaction.
/// assert!(Message::builder("no spaces").build().is_err());
/// # Ok::<(), outbox_core::Error>(())
/// ```
#[derive(Clone, PartialEq)]
pub struct Message(Parts);

/// The fields of a [`Message`], for stores that read one back.
///
/// Nothing is checked: what is stored is what is delivered. Producers use [`Message::builder`].
///
/// ```
/// use std::time::SystemTime;
/// use outbox_core::{Message, Parts};
///
/// let message = Message::builder("orders").key("42").build()?;
/// let parts = Parts { created_at: Some(SystemTime::UNIX_EPOCH), ..message.into_parts() };
/// assert_eq!(Message::from_stored(parts).created_at(), Some(SystemTime::UNIX_EPOCH));
/// # Ok::<(), outbox_core::Error>(())
/// ```
#[derive(Clone, PartialEq)]
pub struct Parts {
    /// Names the message.
    pub id: MessageId,
    /// Where it goes.
    pub topic: Arc<str>,
    /// The ordering key; none means no order.
    pub key: Option<Bytes>,
    /// The content; none is a tombstone.
    pub payload: Option<Bytes>,
    /// Ordered headers.
    pub headers: Headers,
    /// The payload's media type.
    pub content_type: Option<Arc<str>>,
    /// When it was enqueued, by the database's clock; none before that.
    pub created_at: Option<SystemTime>,
    /// Not to be delivered before; none is at once.
    pub deliver_at: Option<SystemTime>,
}

impl Parts {
    /// Whether the fields are what [`MessageBuilder::build`] accepts, for stores that read rows written by hand.
    ///
    /// # Errors
    /// As [`MessageBuilder::build`].
    pub fn check(&self) -> Result<()> {
        let invalid =
            |message: String| Error::new(ErrorKind::Invalid, "build message", message).with("id", self.id);
        check_topic(&self.topic)?;
        if self.key.as_ref().is_some_and(|key| key.len() > MAX_KEY_BYTES) {
            return Err(
                invalid(format!("a key has at most {MAX_KEY_BYTES} bytes")).with("topic", &self.topic)
            );
        }
        for (name, _) in self.headers.iter() {
            if name.is_empty() || name.chars().any(char::is_control) {
                return Err(
                    invalid("a header name is not empty and has no control characters".into())
                        .with("header", name.escape_debug()),
                );
            }
            if is_reserved_header(name) {
                return Err(invalid(format!(
                    "header names beginning with {RESERVED_HEADER_PREFIX:?} are reserved"
                ))
                .with("header", name));
            }
        }
        if self
            .content_type
            .as_ref()
            .is_some_and(|text| text.is_empty() || text.chars().any(char::is_control))
        {
            return Err(invalid(
                "a content type is not empty and has no control characters".into(),
            ));
        }
        Ok(())
    }
}

impl Message {
    /// Begins a message for `topic`.
    pub fn builder(topic: impl Into<Arc<str>>) -> MessageBuilder {
        MessageBuilder {
            parts: Parts {
                id: MessageId::new(),
                topic: topic.into(),
                key: None,
                payload: None,
                headers: Headers::new(),
                content_type: None,
                created_at: None,
                deliver_at: None,
            },
            error: None,
        }
    }

    /// Begins a message whose payload is `value` as JSON, with the content type `application/json`.
    ///
    /// ```
    /// use outbox_core::Message;
    ///
    /// #[derive(serde::Serialize)]
    /// struct OrderPlaced { total: u32 }
    ///
    /// let message = Message::json("orders", &OrderPlaced { total: 12 }).key("42").build()?;
    /// assert_eq!(message.payload().unwrap().as_ref(), br#"{"total":12}"#);
    /// # Ok::<(), outbox_core::Error>(())
    /// ```
    pub fn json<T: Serialize + ?Sized>(topic: impl Into<Arc<str>>, value: &T) -> MessageBuilder {
        let mut builder = Self::builder(topic).content_type("application/json");
        match serde_json::to_vec(value) {
            Ok(payload) => builder.parts.payload = Some(payload.into()),
            Err(error) => {
                builder.error = Some(
                    Error::new(
                        ErrorKind::Invalid,
                        "build message",
                        "the value cannot be written as JSON",
                    )
                    .with("topic", &builder.parts.topic)
                    .with_source(error),
                );
            }
        }
        builder
    }

    /// A message as a store read it back, unchecked.
    #[must_use]
    pub const fn from_stored(parts: Parts) -> Self {
        Self(parts)
    }

    /// The fields, to be taken apart.
    #[must_use]
    pub fn into_parts(self) -> Parts {
        self.0
    }

    /// Names the message.
    #[must_use]
    pub const fn id(&self) -> MessageId {
        self.0.id
    }

    /// Where it goes.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.0.topic
    }

    /// The ordering key.
    #[must_use]
    pub fn key(&self) -> Option<&Bytes> {
        self.0.key.as_ref()
    }

    /// The ordering domain; none for a keyless message.
    #[must_use]
    pub fn order_key(&self) -> Option<OrderKey> {
        self.0.key.as_ref().map(|key| OrderKey {
            topic: self.0.topic.clone(),
            key: key.clone(),
        })
    }

    /// The content; none is a tombstone.
    #[must_use]
    pub fn payload(&self) -> Option<&Bytes> {
        self.0.payload.as_ref()
    }

    /// The headers in their order.
    #[must_use]
    pub fn headers(&self) -> &Headers {
        &self.0.headers
    }

    /// The payload's media type.
    #[must_use]
    pub fn content_type(&self) -> Option<&str> {
        self.0.content_type.as_deref()
    }

    /// When it was enqueued, by the database's clock; none before that.
    #[must_use]
    pub const fn created_at(&self) -> Option<SystemTime> {
        self.0.created_at
    }

    /// Not to be delivered before.
    #[must_use]
    pub const fn deliver_at(&self) -> Option<SystemTime> {
        self.0.deliver_at
    }

    /// Bytes of topic, key, payload and headers together.
    #[must_use]
    pub fn size(&self) -> usize {
        let Parts {
            topic,
            key,
            payload,
            headers,
            content_type,
            ..
        } = &self.0;
        topic.len()
            + key.as_ref().map_or(0, Bytes::len)
            + payload.as_ref().map_or(0, Bytes::len)
            + headers.size()
            + content_type.as_ref().map_or(0, |content_type| content_type.len())
    }
}

/// Payload, key and header values are data of the user's: only their sizes are shown.
impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("id", &self.0.id)
            .field("topic", &self.0.topic)
            .field("key_bytes", &self.0.key.as_ref().map(Bytes::len))
            .field("payload_bytes", &self.0.payload.as_ref().map(Bytes::len))
            .field("headers", &self.0.headers)
            .finish_non_exhaustive()
    }
}

/// Builds a [`Message`]; see [`Message::builder`].
///
/// ```
/// use std::time::{Duration, SystemTime};
/// use outbox_core::{Message, MessageId};
///
/// let reminder = Message::builder("reminders")
///     .id(MessageId::from_bytes([7; 16])) // the producer's own, instead of a fresh one
///     .key("42")
///     .content_type("text/plain")
///     .payload("your trial ends tomorrow")
///     .deliver_at(SystemTime::now() + Duration::from_secs(24 * 3600))
///     .build()?;
/// let tombstone = Message::builder("customers").key("42").build()?;
/// assert!(tombstone.payload().is_none());
/// # Ok::<(), outbox_core::Error>(())
/// ```
#[must_use = "a builder does nothing until build() is called"]
pub struct MessageBuilder {
    parts: Parts,
    error: Option<Error>,
}

impl MessageBuilder {
    /// The id instead of a fresh one, for producers that name their messages themselves.
    pub fn id(mut self, id: impl Into<MessageId>) -> Self {
        self.parts.id = id.into();
        self
    }

    /// The ordering key.
    pub fn key(mut self, key: impl Into<Bytes>) -> Self {
        self.parts.key = Some(key.into());
        self
    }

    /// The content. Without one the message is a tombstone.
    pub fn payload(mut self, payload: impl Into<Bytes>) -> Self {
        self.parts.payload = Some(payload.into());
        self
    }

    /// Adds a header; a name may stand more than once.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.parts.headers.push(name, value);
        self
    }

    /// The payload's media type.
    pub fn content_type(mut self, content_type: impl Into<Arc<str>>) -> Self {
        self.parts.content_type = Some(content_type.into());
        self
    }

    /// Not to be delivered before this time, by the database's clock.
    pub fn deliver_at(mut self, time: SystemTime) -> Self {
        self.parts.deliver_at = Some(time);
        self
    }

    /// The message, checked.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a topic that is empty, longer than 249 characters, `.`, `..` or not made of
    /// `[A-Za-z0-9._-]`; a key over 1 KiB; a header name that is empty, has control characters or begins with
    /// `outbox-`; a content type with control characters; a value that is no JSON. Sizes are checked at enqueue,
    /// against [`Limits`].
    pub fn build(self) -> Result<Message> {
        if let Some(error) = self.error {
            return Err(error);
        }
        self.parts.check()?;
        Ok(Message(self.parts))
    }
}

/// Whether a topic has a name that Kafka accepts.
///
/// # Errors
/// [`ErrorKind::Invalid`] for an empty name, `.`, `..`, more than 249 characters, or others than `[A-Za-z0-9._-]`.
///
/// # Example
/// ```
/// use outbox_core::check_topic;
///
/// assert!(check_topic("orders.v1").is_ok());
/// assert!(check_topic("orders/v1").is_err());
/// ```
pub fn check_topic(topic: &str) -> Result<()> {
    // Bytes, because this is asked of every message: no byte of a character beyond ASCII is legal either.
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if topic.is_empty()
        || topic.len() > MAX_TOPIC_LENGTH
        || topic == "."
        || topic == ".."
        || !topic.bytes().all(legal)
    {
        return Err(Error::new(
            ErrorKind::Invalid,
            "build message",
            format!(
                "a topic has 1 to {MAX_TOPIC_LENGTH} characters of [A-Za-z0-9._-] and is not \".\" or \"..\""
            ),
        )
        .with(
            "topic",
            topic
                .chars()
                .take(MAX_TOPIC_LENGTH)
                .collect::<String>()
                .escape_debug(),
        ));
    }
    Ok(())
}

/// Whether a header's name belongs to the framework, whatever its case.
///
/// ```
/// use outbox_core::is_reserved_header;
///
/// assert!(is_reserved_header("Outbox-Id"));
/// assert!(!is_reserved_header("traceparent"));
/// ```
#[must_use]
pub fn is_reserved_header(name: &str) -> bool {
    name.get(..RESERVED_HEADER_PREFIX.len())
        .is_some_and(|prefix| prefix.eq_ignore_ascii_case(RESERVED_HEADER_PREFIX))
}

/// What a message may weigh and must have, checked at enqueue, where the producer can still react.
///
/// ```
/// use outbox_core::{Limits, Message};
///
/// let limits = Limits { max_message_bytes: 1000, ..Limits::default() };
/// let message = Message::builder("orders").payload(vec![0; 2000]).build()?;
/// assert!(limits.check(&message).is_err());
/// # Ok::<(), outbox_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of topic, key, payload and headers together. Default: 998,976, which is librdkafka's default
    /// `message.max.bytes` less room for the framework's own headers.
    pub max_message_bytes: usize,
    /// How many headers. Default: 1,000.
    pub max_headers: usize,
    /// Whether a message without a key is refused. Default: false.
    pub require_key: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_message_bytes: 1_000_000 - FRAMEWORK_BYTES,
            max_headers: 1_000,
            require_key: false,
        }
    }
}

/// Room for the framework's own headers and the record's frame within the broker's limit.
const FRAMEWORK_BYTES: usize = 1_024;

impl Limits {
    /// Whether `message` keeps the limits.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the message, its size and the limit.
    pub fn check(&self, message: &Message) -> Result<()> {
        let invalid = |text: String| {
            Error::new(ErrorKind::Invalid, "enqueue", text)
                .with("id", message.id())
                .with("topic", message.topic())
        };
        if message.size() > self.max_message_bytes {
            return Err(invalid(format!(
                "the message has {} bytes, the limit is {}",
                message.size(),
                self.max_message_bytes
            )));
        }
        if message.headers().len() > self.max_headers {
            return Err(invalid(format!(
                "the message has {} headers, the limit is {}",
                message.headers().len(),
                self.max_headers
            )));
        }
        if self.require_key && message.key().is_none() {
            return Err(invalid(
                "this outbox requires a key, and the message has none".into(),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_sent_is_refused_when_built() {
        let topic = |name: &str| Message::builder(name).build();
        for name in ["", ".", "..", "a b", "a/b", "ü", "a\0", &"x".repeat(250)] {
            assert_eq!(topic(name).unwrap_err().kind(), ErrorKind::Invalid, "{name:?}");
        }
        assert!(topic(&"x".repeat(249)).is_ok());

        let key = |bytes: usize| Message::builder("t").key(vec![0; bytes]).build();
        assert!(key(MAX_KEY_BYTES).is_ok() && key(0).is_ok());
        assert!(key(MAX_KEY_BYTES + 1).is_err());

        for name in ["", "a\r\nb", "a\0", "outbox-id", "Outbox-Anything"] {
            assert!(
                Message::builder("t").header(name, "x").build().is_err(),
                "{name:?}"
            );
        }
        assert!(
            Message::builder("t")
                .header("outbox", "x")
                .header("é", "x")
                .build()
                .is_ok()
        );
    }

    #[test]
    fn limits_name_size_and_limit() {
        let message = Message::builder("t").payload(vec![0; 1_000_000]).build().unwrap();
        let error = Limits::default().check(&message).unwrap_err();
        assert!(
            error.to_string().contains("1000001 bytes, the limit is 998976"),
            "{error}"
        );
        let keyless = Limits {
            require_key: true,
            ..Limits::default()
        };
        assert!(keyless.check(&Message::builder("t").build().unwrap()).is_err());
    }

    #[test]
    fn debug_shows_no_content() {
        let message = Message::builder("t")
            .key("canary")
            .payload("canary")
            .header("h", "canary")
            .build()
            .unwrap();
        assert!(!format!("{message:?}").contains("canary"));
    }
}
