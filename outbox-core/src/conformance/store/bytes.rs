//! Bytes in, bytes out: whatever a message holds comes back as it was.

use bytes::Bytes;

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, LONG, json, of_key, retrying, sorted, text};
use super::dead::{expect_same, rich_messages};
use crate::fetch::Record;
use crate::lease::Membership;
use crate::message::{MAX_KEY_BYTES, Message, MessageBuilder};

/// Bytes that were mangled somewhere before: NUL, invalid UTF-8, quotes, escapes, SQL, templates, JSON, BOM, newlines.
const HOSTILE: [&[u8]; 12] = [
    b"\0",
    b"a\0b\0",
    b"\xff\xfe\x00\x80",
    b"\xed\xa0\x80",
    b"'; DROP TABLE outbox; --",
    b"\\000\\x41\\",
    b"\"%s{}${x}{{y}}",
    b"{\"a\":\"\\u0000\"}",
    b"\xef\xbb\xbfbom\r\n\t",
    "ünïcödé \u{1f980} \u{202e}".as_bytes(),
    b" trailing ",
    b"",
];

/// Payloads and keys are kept byte for byte, whatever they are.
pub async fn bytes_survive<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut messages = Vec::new();
    for (index, bytes) in HOSTILE.into_iter().enumerate() {
        // A tombstone and an empty payload may be one for some stores: asked elsewhere.
        if !bytes.is_empty() || bench.can.tombstones {
            messages.push(build(Message::builder(bench.topic(0)).payload(bytes)));
        }
        if bench.can.keys {
            let payload = format!("\"key {index}\"");
            messages.push(build(
                Message::builder(bench.topic(0)).payload(payload).key(bytes),
            ));
        }
    }
    survive(&bench, messages).await;
}

/// Ordinary messages of all kinds that the store can hold come back whole, with their ids.
pub async fn messages_survive<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut messages = rich_messages(&bench);
    if bench.can.fixed_topic.is_none() {
        let long = "t".repeat(crate::message::MAX_TOPIC_LENGTH);
        for topic in [long.as_str(), "a.b-c_D9", "drop.table.outbox"] {
            messages.push(bench.build(Message::builder(topic).payload("\"topic\"")));
        }
    }
    survive(&bench, messages).await;
}

/// A message without a key is not one with an empty key.
pub async fn no_key_is_not_an_empty_key<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench
        .commit(&[
            bench.message(0, Some(""), "1"),
            bench.keyless("keyless"),
            bench.message(0, Some(""), "2"),
        ])
        .await;
    let records = owner.drain_without_settling().await;
    assert_eq!(
        of_key(&records, ""),
        ["1", "2"],
        "the empty key is a key like any other, in order"
    );
    let keyless: Vec<_> = records
        .iter()
        .filter(|record| record.message.key().is_none())
        .collect();
    assert_eq!(
        keyless.len(),
        1,
        "a message without a key must come back without one"
    );
    // Holding the empty key holds up nothing keyless.
    let head = records
        .iter()
        .find(|record| text(&record.message) == "1")
        .unwrap_or_else(|| panic!("the first message of the empty key is missing"));
    owner.hold(retrying(head, 1)).await;
    owner.in_flight.clear();
    owner.reader = owner.store.reader().await.unwrap();
    assert_eq!(
        sorted(&owner.drain().await),
        ["keyless"],
        "the empty key is held, the keyless message is not"
    );
}

/// A tombstone is not a message with an empty payload.
pub async fn tombstone_is_not_empty<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut messages = vec![build(Message::builder(bench.topic(0)))];
    if bench.can.any_bytes {
        messages.push(build(Message::builder(bench.topic(0)).payload("")));
    }
    survive(&bench, messages).await;
}

/// Headers keep names, values, order and repetitions, a thousand of them.
pub async fn headers_survive<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let start = || Message::builder(bench.topic(0)).payload("\"headers\"");
    let mut messages = vec![
        bench.build(start()),
        bench.build(
            start()
                .header("b", "1")
                .header("a", "2")
                .header("b", "3")
                .header("B", "4"),
        ),
        bench.build(
            start()
                .header("empty", "")
                .header("ü \"'\\;--", "x")
                .header("$a.b{}[]", "y"),
        ),
    ];
    let many = (0..1_000).fold(start(), |builder, number| {
        builder.header(format!("name-{}", number % 10), format!("{number}"))
    });
    messages.push(bench.build(many));
    if bench.can.any_bytes {
        let hostile = HOSTILE
            .iter()
            .fold(start(), |builder, bytes| builder.header("hostile", *bytes));
        messages.push(bench.build(hostile));
    }
    survive(&bench, messages).await;
}

/// Content types are kept.
pub async fn content_type_survives<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let start = || Message::builder(bench.topic(0)).payload("\"typed\"");
    survive(
        &bench,
        vec![
            bench.build(start()),
            bench.build(start().content_type("application/json; charset=\"utf-8\"")),
            bench.build(start().content_type("application/vnd.ü+json")),
        ],
    )
    .await;
}

/// The largest message and the largest key that the limits allow are kept.
pub async fn largest_survive<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut messages =
        vec![bench.build(Message::builder(bench.topic(0)).payload(format!("\"{}\"", "x".repeat(998_000))))];
    if bench.can.keys {
        let key = "k".repeat(MAX_KEY_BYTES);
        messages.push(
            bench.build(
                Message::builder(bench.topic(0))
                    .payload("\"long key\"")
                    .key(key.clone()),
            ),
        );
        // Told apart in its last byte: no prefix stands for a key.
        let mut other = key;
        other.replace_range(MAX_KEY_BYTES - 1.., "l");
        messages.push(
            bench.build(
                Message::builder(bench.topic(0))
                    .payload("\"other key\"")
                    .key(other),
            ),
        );
    }
    survive(&bench, messages).await;
}

/// Holds of keys of any bytes are kept and heeded.
pub async fn hostile_keys_are_held<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let long = vec![0xff; MAX_KEY_BYTES];
    let keys: Vec<&[u8]> = HOSTILE.into_iter().chain([long.as_slice()]).collect();
    let messages: Vec<_> = keys
        .iter()
        .map(|key| {
            build(
                Message::builder(bench.topic(0))
                    .payload("\"x\"")
                    .key(key.to_vec()),
            )
        })
        .collect();
    bench.commit(&messages).await;
    let records: Vec<Record> = owner.drain_without_settling().await;
    assert_eq!(records.len(), keys.len(), "each key is a key of its own");
    let expected: Vec<_> = records.iter().map(|record| retrying(record, 1)).collect();
    for hold in &expected {
        owner.hold(hold.clone()).await;
    }
    assert!(
        owner.next(10).await.is_empty(),
        "every key is held, whatever its bytes"
    );
    owner.release_all(Membership::Leaves).await;
    let mut next = bench.owner("next").await;
    let found = next.holds().await;
    for hold in &expected {
        assert!(
            found
                .iter()
                .any(|own| own.scope == hold.scope && own.head == hold.head),
            "the hold of {:?} is lost or mangled",
            hold.scope
        );
        next.heed(hold);
    }
    assert!(next.next(10).await.is_empty());
    for hold in &expected {
        next.unhold(hold).await;
    }
    assert_eq!(next.drain().await.len(), keys.len());
    assert!(
        next.holds().await.is_empty(),
        "every hold can be cleared, whatever its bytes"
    );
}

/// An id may come twice; both messages are delivered and settled apart.
pub async fn ids_need_not_be_unique<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let message = bench.keyed("a", "twin");
    bench.commit(&[message.clone(), message.clone()]).await;
    bench.commit(std::slice::from_ref(&message)).await;
    let records = owner.drain_without_settling().await;
    assert_eq!(
        records.len(),
        3,
        "uniqueness of ids is not promised, so it must not be required"
    );
    owner.deliver(&records[..1]).await;
    owner.in_flight.clear();
    owner.reader = owner.store.reader().await.unwrap();
    let left = owner.drain().await;
    assert_eq!(left.len(), 2, "settled by position and id, not by id alone");
    assert!(left.iter().all(|record| record.message.id() == message.id()));
}

/// The time of enqueueing comes from the database, the number of attempts from nobody.
pub async fn records_are_fresh<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let first = bench.database_now(&mut owner).await;
    tokio::time::sleep(std::time::Duration::from_millis(1_100)).await;
    let mut forged = bench.keyed("a", "forged").into_parts();
    forged.created_at = Some(first - LONG);
    bench.commit(&[Message::from_stored(forged)]).await;
    let record = owner.next(10).await.swap_remove(0);
    assert_eq!((record.attempts, record.defect.as_ref()), (0, None));
    let created = record.message.created_at();
    assert!(
        created.is_some_and(|created| created > first),
        "the time of enqueueing is the database's, not the producer's: {created:?}"
    );
    owner.deliver(&[record]).await;
}

/// Enqueues messages and compares what comes back.
async fn survive<H: StoreHarness>(bench: &Bench<H>, messages: Vec<Message>) {
    let mut owner = bench.owner("owner").await;
    for message in messages {
        bench.commit(std::slice::from_ref(&message)).await;
        let mut records = owner.next(10).await;
        assert_eq!(records.len(), 1, "one message was enqueued: {message:?}");
        let record = records.swap_remove(0);
        assert_eq!(
            record.defect, None,
            "a message that was enqueued must be understood"
        );
        let mut expected = message.into_parts();
        if !bench.can.message_ids {
            expected.id = record.message.id();
        }
        // JSON is kept as a value: its text may have been written anew.
        let value = |payload: Option<&Bytes>| json(payload?);
        let found = value(record.message.payload());
        if !bench.can.any_bytes && found.is_some() && found == value(expected.payload.as_ref()) {
            expected.payload = record.message.payload().cloned();
        }
        expect_same(&record.message, &Message::from_stored(expected));
        owner.deliver(&[record]).await;
    }
    owner.reader = owner.store.reader().await.unwrap();
    assert!(owner.next(10).await.is_empty(), "each of them must be settled");
}

fn build(builder: MessageBuilder) -> Message {
    builder.build().unwrap()
}
