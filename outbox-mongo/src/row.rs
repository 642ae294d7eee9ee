//! Stored messages, which here are documents. One that nobody could have enqueued becomes a record with a defect, never an
//! error.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{Binary, Bson, DateTime, Document, RawBsonRef, RawDocument, Timestamp, doc};
use outbox_core::{
    Message, MessageId, Parts, Position, Record, RecordRef, Shard, StoredMessage, StoredMessages, shard_of,
};

/// Positions are the server's timestamps, counted from this second on, so that they are positive for 68 years.
const ORIGIN: i64 = 1_500_000_000;

/// A server's timestamp as a position.
pub(crate) fn position(ts: Timestamp) -> Position {
    Position(((i64::from(ts.time) - ORIGIN) << 32) | i64::from(ts.increment))
}

/// A position as the server's timestamp; one that no server gave becomes one that is nowhere.
pub(crate) fn timestamp(position: Position) -> Timestamp {
    let seconds = (position.0 >> 32).saturating_add(ORIGIN);
    Timestamp {
        time: u32::try_from(seconds).unwrap_or(u32::MAX),
        increment: u32::try_from(position.0 & 0xffff_ffff).unwrap_or(u32::MAX),
    }
}

/// What the server fills in itself, at the insert: its next timestamp.
const NOW: Timestamp = Timestamp {
    time: 0,
    increment: 0,
};

/// What is read one after the other, as text: topic and key, or of a keyless message its topic and id. Text, because bytes
/// are ordered by their length first, and the flows of one topic are to be neighbours: no topic has a slash.
pub(crate) fn flow(topic: &str, key: Option<&[u8]>, id: MessageId) -> String {
    match key.map(|key| (key, std::str::from_utf8(key))) {
        None => format!("{topic}/-{id}"),
        Some((_, Ok(key))) => format!("{topic}/={key}"),
        Some((key, Err(_))) => {
            let mut flow = format!("{topic}/#");
            for byte in key {
                flow.push_str(&format!("{byte:02x}"));
            }
            flow
        }
    }
}

/// The first that a flow of a topic could be, and the first behind them all.
pub(crate) fn flows_of(topic: &str) -> (String, String) {
    (format!("{topic}/"), format!("{topic}0"))
}

/// The key in a flow; none in that of a keyless message.
fn key_in(flow: &str) -> Option<Option<Vec<u8>>> {
    let (_, name) = flow.split_once('/')?;
    match name.split_at_checked(1)? {
        ("=", key) => Some(Some(key.as_bytes().to_vec())),
        ("-", _) => Some(None),
        ("#", hex) => {
            let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
            let key = hex.as_bytes().chunks(2).map(byte).collect::<Option<_>>()?;
            Some(Some(key))
        }
        _ => None,
    }
}

pub(crate) const fn binary(bytes: Vec<u8>) -> Binary {
    Binary {
        subtype: BinarySubtype::Generic,
        bytes,
    }
}

pub(crate) fn uuid(id: MessageId) -> Binary {
    Binary {
        subtype: BinarySubtype::Uuid,
        bytes: id.as_bytes().to_vec(),
    }
}

/// A message as the outbox has it, with its number.
pub(crate) fn waiting(message: &Message, shards: u16, number: Option<i64>) -> Document {
    let mut document = whole(message, shards, number);
    document.insert("ts", NOW);
    document.insert("clock", DateTime::now());
    document
}

/// A document that was stored before, whole, with a new position, a number of its own and the time that it had.
pub(crate) fn again(raw: &RawDocument, row: &Row, shards: u16, number: Option<i64>) -> Document {
    let mut document = raw.to_raw_document_buf().to_document().unwrap_or_default();
    for field in ["_id", "dead", "processed", "due", "clock", "seq"] {
        document.remove(field);
    }
    let shard = shard_of(row.parts.key.as_deref(), row.parts.id, shards);
    document.insert("shard", i32::from(shard.0));
    document.insert("ts", NOW);
    if let Some(created) = row.parts.created_at {
        document.insert("created_at", date(created));
    }
    if let Some(number) = number {
        document.insert("seq", number);
    }
    document
}

/// When it was stored: the server's clock knows the second, within which the producer's may tell more.
fn stored_at(ts: Timestamp, clock: Option<DateTime>) -> SystemTime {
    let second = UNIX_EPOCH + Duration::from_secs(u64::from(ts.time));
    let last = second + Duration::from_millis(999);
    clock
        .and_then(time)
        .map_or(second, |told| told.clamp(second, last))
}

/// A message that waits for its time, as the scheduled ones have it.
pub(crate) fn scheduled(message: &Message, shards: u16, due: SystemTime, now: DateTime) -> Document {
    let mut document = whole(message, shards, None);
    document.insert("due", date(due));
    document.insert("created_at", now);
    document
}

/// All but what the server gives, and times.
fn whole(message: &Message, shards: u16, number: Option<i64>) -> Document {
    let key = message.key().map(AsRef::as_ref);
    let shard = shard_of(key, message.id(), shards);
    let mut document = doc! {
        "shard": i32::from(shard.0),
        "flow": flow(message.topic(), key, message.id()),
        "id": uuid(message.id()),
        "topic": message.topic(),
    };
    let mut put = |name: &str, value: Option<Bson>| {
        if let Some(value) = value {
            document.insert(name, value);
        }
    };
    put("seq", number.map(Bson::Int64));
    let payload = message.payload().map(|payload| binary(payload.to_vec()));
    put("payload", payload.map(Bson::Binary));
    put("headers", message.headers().encode().map(Bson::String));
    put(
        "content_type",
        message.content_type().map(|text| Bson::String(text.to_owned())),
    );
    document
}

/// A time in milliseconds as the server takes it, rounded up: never before it.
pub(crate) fn date(time: SystemTime) -> DateTime {
    /// The year 9999.
    const FAR: i64 = 253_370_764_800_000;
    let millis = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos().div_ceil(1_000_000))
            .unwrap_or(FAR)
            .min(FAR),
        // Long over, whenever that was.
        Err(_) => 0,
    };
    DateTime::from_millis(millis)
}

/// A time that the server told, if this system knows it.
pub(crate) fn time(date: DateTime) -> Option<SystemTime> {
    let millis = date.timestamp_millis();
    let span = Duration::from_millis(millis.unsigned_abs());
    if millis < 0 {
        UNIX_EPOCH.checked_sub(span)
    } else {
        UNIX_EPOCH.checked_add(span)
    }
}

/// How long it is from the one to the other; nothing if it is over.
pub(crate) fn span(from: DateTime, to: DateTime) -> Duration {
    let millis = to.timestamp_millis().saturating_sub(from.timestamp_millis());
    Duration::from_millis(millis.max(0).unsigned_abs())
}

/// Reads documents of messages.
#[derive(Debug)]
pub(crate) struct Rows {
    messages: StoredMessages,
    /// How many shards there are.
    shards: u16,
}

/// A document of a message, read.
pub(crate) struct Row {
    /// The shard of what waits; what is dead or archived has none.
    pub(crate) shard: Option<Shard>,
    pub(crate) position: Position,
    pub(crate) seq: Option<i64>,
    pub(crate) parts: Parts,
    pub(crate) defect: Option<String>,
}

impl Row {
    pub(crate) fn record(self) -> Record {
        Record {
            shard: self.shard.unwrap_or(Shard(0)),
            position: self.position,
            key_seq: self.seq,
            attempts: 0,
            message: Message::from_stored(self.parts),
            defect: self.defect,
        }
    }

    pub(crate) fn reference(&self) -> RecordRef {
        RecordRef {
            position: self.position,
            id: self.parts.id,
        }
    }
}

impl Rows {
    pub(crate) fn new(shards: u16) -> Self {
        Self {
            messages: StoredMessages::default(),
            shards,
        }
    }

    /// The message in a document, and where it stands.
    pub(crate) fn read(&mut self, document: &RawDocument) -> Row {
        let mut stored = StoredMessage::default();
        let (mut shard, mut ts, mut seq, mut name, mut clock) = (None, None, None, None, None);
        for field in document {
            let Ok((field, value)) = field else {
                stored.defect = Some("its document cannot be read to its end".to_owned());
                break;
            };
            let mut understood = true;
            match (field, value) {
                ("shard", value) => shard = number(value).and_then(|shard| u16::try_from(shard).ok()),
                ("ts", RawBsonRef::Timestamp(value)) => ts = Some(value),
                ("seq", value) => seq = number(value),
                ("flow", RawBsonRef::String(value)) => name = Some(value),
                ("id", RawBsonRef::Binary(value)) if value.subtype == BinarySubtype::Uuid => {
                    stored.id = value.bytes.try_into().ok().map(MessageId::from_bytes);
                }
                ("topic", RawBsonRef::String(value)) => stored.topic = value,
                ("payload", RawBsonRef::Binary(value)) => {
                    stored.payload = Some(Bytes::copy_from_slice(value.bytes));
                }
                ("payload" | "headers" | "content_type", RawBsonRef::Null) => {}
                ("headers", RawBsonRef::String(value)) => stored.headers = Some(value.as_bytes()),
                ("content_type", RawBsonRef::String(value)) => stored.content_type = Some(value),
                ("created_at", RawBsonRef::DateTime(value)) => stored.created_at = time(value),
                ("clock", RawBsonRef::DateTime(value)) => clock = Some(value),
                ("ts" | "flow" | "id" | "topic" | "payload" | "headers" | "content_type", _) => {
                    understood = false;
                }
                _ => {}
            }
            if !understood {
                let defect = format!("its field \"{field}\" is of a type that is not understood");
                stored.defect.get_or_insert(defect);
            }
        }
        stored.key = name.and_then(key_in).flatten().map(Bytes::from);
        // What is not as it is written here would stand apart from its own key.
        let id = stored.id.unwrap_or(MessageId::from_bytes([0; 16]));
        if name != Some(&flow(stored.topic, stored.key.as_deref(), id)) {
            let defect =
                "its flow is not topic, slash, and \"=\" with the key or \"-\" with the id".to_owned();
            stored.defect.get_or_insert(defect);
        }
        let ts = ts.unwrap_or(NOW);
        stored.created_at.get_or_insert_with(|| stored_at(ts, clock));
        // Whoever owns another shard would deliver it beside the others of its key.
        if shard.is_some_and(|shard| Shard(shard) != shard_of(stored.key.as_deref(), id, self.shards)) {
            let defect = "its shard is not that of its key, or of its id if it has none".to_owned();
            stored.defect.get_or_insert(defect);
        }
        let (parts, defect) = self.messages.parts(stored);
        Row {
            shard: shard.map(Shard),
            position: position(ts),
            seq,
            parts,
            defect,
        }
    }
}

/// A whole number of whatever width.
pub(crate) fn number(value: RawBsonRef<'_>) -> Option<i64> {
    match value {
        RawBsonRef::Int32(number) => Some(i64::from(number)),
        RawBsonRef::Int64(number) => Some(number),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use mongodb::bson::RawDocumentBuf;

    use super::*;

    fn read(document: &Document) -> Row {
        Rows::new(64).read(&RawDocumentBuf::from_document(document).unwrap())
    }

    #[test]
    fn positions_are_timestamps_in_their_order() {
        let stamp = |time, increment| Timestamp { time, increment };
        let all = [
            stamp(1_700_000_000, 1),
            stamp(1_700_000_000, u32::MAX),
            stamp(1_700_000_001, 0),
            stamp(3_647_483_647, 7),
        ];
        assert!(all.is_sorted_by_key(|ts| position(*ts)));
        for ts in all {
            assert!(position(ts).0 > 0);
            assert_eq!(timestamp(position(ts)), ts);
        }
        assert_eq!(timestamp(Position::MIN).time, u32::MAX, "it is nowhere");
    }

    #[test]
    fn what_was_written_is_read() {
        for key in [
            None,
            Some(&b""[..]),
            Some(b"42"),
            Some(b"\0/=#-"),
            Some(b"\xff\x00\x0a"),
        ] {
            let mut message = Message::builder("orders").payload("placed").header("a", "b");
            if let Some(key) = key {
                message = message.key(key.to_vec());
            }
            let message = message.build().unwrap();
            let row = read(&waiting(&message, 64, Some(3)));
            assert_eq!((row.defect.as_ref(), row.seq), (None, Some(3)));
            assert_eq!(row.parts.key, message.key().cloned());
            assert_eq!(
                row.shard,
                Some(shard_of(message.key().map(AsRef::as_ref), message.id(), 64))
            );
            assert_eq!(row.parts.headers, *message.headers());
        }
    }

    #[test]
    fn the_producers_clock_tells_no_more_than_the_servers_second() {
        let ts = Timestamp {
            time: 1_790_000_000,
            increment: 3,
        };
        let second = UNIX_EPOCH + Duration::from_secs(1_790_000_000);
        for (clock, expected) in [
            (None, 0),
            (Some(-5_000), 0),
            (Some(250), 250),
            (Some(3_600_000), 999),
        ] {
            let clock = clock.map(|millis| DateTime::from_millis(1_790_000_000_000 + millis));
            assert_eq!(stored_at(ts, clock), second + Duration::from_millis(expected));
        }
    }

    #[test]
    fn what_nobody_could_have_enqueued_has_a_defect() {
        let message = Message::builder("orders").key("42").build().unwrap();
        let good = waiting(&message, 64, None);
        for (field, value) in [
            ("flow", Bson::String("films/=42".to_owned())),
            ("flow", Bson::String("orders".to_owned())),
            ("flow", Bson::String("orders/#3432".to_owned())),
            ("id", Bson::Binary(binary(vec![1, 2, 3]))),
            ("id", Bson::Binary(binary(message.id().as_bytes().to_vec()))),
            (
                "shard",
                Bson::Int32(i32::from(shard_of(Some(b"42"), message.id(), 64).0) ^ 1),
            ),
            ("topic", Bson::Int32(1)),
            ("payload", Bson::String("text".to_owned())),
            ("headers", Bson::String("{\"a\": 1}".to_owned())),
        ] {
            let mut bad = good.clone();
            bad.insert(field, value);
            assert!(read(&bad).defect.is_some(), "{field}");
        }
        assert_eq!(read(&good).defect, None);
    }
}
