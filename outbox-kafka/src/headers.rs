//! The headers of a record in Kafka.

use std::io::Write;

use outbox_core::{MessageId, Parts};
use rdkafka::message::{Header, OwnedHeaders};

/// The header with the message's id: a UUID as lower-case text with hyphens, 36 bytes.
///
/// Text and not 16 bytes, because consumers in any language, and people with a console consumer, read it as it is.
///
/// ```
/// use outbox_kafka::OUTBOX_ID;
/// use outbox_kafka::rdkafka::message::{Headers, Message};
///
/// /// The id as text, of a record that may be from elsewhere.
/// fn id(record: &impl Message) -> Option<&str> {
///     let header = record.headers()?.iter().find(|header| header.key == OUTBOX_ID)?;
///     str::from_utf8(header.value?).ok()
/// }
/// ```
pub const OUTBOX_ID: &str = "outbox-id";

/// The header with the message's number within its key, in decimal; only under `Ordering::Sequenced`.
///
/// ```
/// assert!(outbox_core::is_reserved_header(outbox_kafka::OUTBOX_KEY_SEQ)); // no producer can set it
/// ```
pub const OUTBOX_KEY_SEQ: &str = "outbox-key-seq";

/// The header with the payload's media type; absent when the message has none.
///
/// ```
/// assert_eq!(outbox_kafka::CONTENT_TYPE, "content-type");
/// ```
pub const CONTENT_TYPE: &str = "content-type";

/// The framework's headers, then the user's own in their order. Trace context is among the latter.
pub(crate) fn outgoing(parts: &Parts, key_seq: Option<i64>) -> OwnedHeaders {
    let mut headers = OwnedHeaders::new_with_capacity(3 + parts.headers.len());
    headers = insert(headers, OUTBOX_ID, id_text(parts.id, &mut [0; 36]));
    if let Some(number) = key_seq {
        // The longest is i64::MIN with 20 characters.
        let mut text = [0; 20];
        let mut rest = &mut text[..];
        // Writing to a slice that is long enough does not fail.
        let _ = write!(rest, "{number}");
        let length = 20 - rest.len();
        headers = insert(headers, OUTBOX_KEY_SEQ, &text[..length]);
    }
    if let Some(content_type) = &parts.content_type {
        headers = insert(headers, CONTENT_TYPE, content_type.as_bytes());
    }
    parts
        .headers
        .iter()
        .fold(headers, |headers, (name, value)| insert(headers, name, value))
}

fn insert(headers: OwnedHeaders, name: &str, value: &[u8]) -> OwnedHeaders {
    headers.insert(Header {
        key: name,
        value: Some(value),
    })
}

fn id_text(id: MessageId, buffer: &mut [u8; 36]) -> &[u8] {
    id.as_uuid().hyphenated().encode_lower(buffer).as_bytes()
}

#[cfg(test)]
mod tests {
    use outbox_core::Message;
    use rdkafka::message::Headers;

    use super::*;

    #[test]
    fn the_frameworks_come_first_and_the_users_keep_their_order_and_bytes() {
        let parts = Message::builder("t")
            .id("018F3F2E-7C1A-7000-8000-00000000000A"
                .parse::<MessageId>()
                .unwrap())
            .content_type("text/plain")
            .header("b", vec![0xff, 0x00])
            .header("a", "")
            .header("b", "again")
            .build()
            .unwrap()
            .into_parts();
        let headers = outgoing(&parts, Some(i64::MIN));
        let found: Vec<(&str, Option<&[u8]>)> =
            headers.iter().map(|header| (header.key, header.value)).collect();
        assert_eq!(
            found,
            [
                (OUTBOX_ID, Some(&b"018f3f2e-7c1a-7000-8000-00000000000a"[..])),
                (OUTBOX_KEY_SEQ, Some(b"-9223372036854775808")),
                (CONTENT_TYPE, Some(b"text/plain")),
                ("b", Some(b"\xff\x00")),
                ("a", Some(b"")),
                ("b", Some(b"again")),
            ]
        );
    }

    #[test]
    fn without_number_and_content_type_there_is_the_id_alone() {
        let parts = Message::builder("t").build().unwrap().into_parts();
        assert_eq!(outgoing(&parts, None).count(), 1);
    }
}
