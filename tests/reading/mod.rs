//! Readers that are told or shown only a part of what there is at a time, on real servers: part of the tests of the stores
//! that have such readers.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::collections::BTreeSet;
use std::sync::Arc;

use outbox_core::{
    Epoch, FetchRequest, Fetched, Held, Message, OrderKey, OwnedShard, Position, Reader, Record, Reread,
    RereadScope, Shard,
};

const TOPICS: [&str; 3] = ["a", "a-b", "b"];

/// A relay that settles nothing: what it has read stays in flight.
pub(crate) struct Reading {
    pub(crate) reader: Box<dyn Reader>,
    pub(crate) request: FetchRequest,
    pub(crate) read: Vec<Record>,
}

impl Reading {
    pub(crate) fn new(reader: impl Reader + 'static, owned: &[OwnedShard]) -> Self {
        Self {
            reader: Box::new(reader),
            request: FetchRequest {
                shards: owned.to_vec(),
                max_bytes: 1 << 30,
                ..FetchRequest::default()
            },
            read: Vec::new(),
        }
    }

    /// Reads to the end, in batches of so many; nothing of it is what was read before.
    pub(crate) async fn read_all(&mut self, max_rows: usize) {
        for fetches in 0.. {
            assert!(fetches < 1_000, "reading comes to no end");
            if let (0, false) = self.batch(max_rows).await {
                break;
            }
        }
        let all: BTreeSet<_> = self.request.in_flight.iter().collect();
        assert_eq!(all.len(), self.request.in_flight.len(), "something came twice");
    }

    /// Reads a batch; says how many came, and whether there may be more.
    pub(crate) async fn batch(&mut self, max_rows: usize) -> (usize, bool) {
        self.request.max_rows = max_rows;
        let fetched = self.reader.fetch(&self.request).await.unwrap();
        let Fetched::Batch { records, more } = fetched else {
            panic!("reset")
        };
        self.request.reread.clear();
        let places = records.iter().map(|record| (record.shard, record.position));
        self.request.in_flight.extend(places);
        let came = records.len();
        self.read.extend(records);
        (came, more)
    }

    pub(crate) fn texts(&self) -> Vec<String> {
        self.read.iter().map(text).collect()
    }
}

/// All of so many shards.
#[allow(dead_code, reason = "not every store needs it")]
pub(crate) fn owning(shards: u16) -> Vec<OwnedShard> {
    let owned = |shard| OwnedShard {
        shard: Shard(shard),
        epoch: Epoch(1),
    };
    (0..shards).map(owned).collect()
}

fn text(record: &Record) -> String {
    String::from_utf8_lossy(record.message.payload().unwrap()).into_owned()
}

fn sorted(texts: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut texts: Vec<String> = texts.into_iter().collect();
    texts.sort_unstable();
    texts
}

fn message(random: &mut fastrand::Rng, number: usize) -> Message {
    let topic = random.choice(TOPICS).unwrap();
    let builder = Message::builder(topic).payload(format!("{number:03}"));
    let key = random.u8(0..30);
    match key < 25 {
        true => builder.key(format!("key-{key}")).build().unwrap(),
        false => builder.build().unwrap(),
    }
}

/// Some keys, keyless messages and topics of these.
fn some(random: &mut fastrand::Rng, records: &[Record]) -> Held {
    let mut held = Held::default();
    for record in records {
        match record.message.order_key() {
            Some(key) if random.u8(..) < 60 => drop(held.keys.insert((record.shard, key))),
            None if random.bool() => drop(held.messages.insert((record.shard, record.position))),
            _ => {}
        }
    }
    for topic in TOPICS {
        if random.u8(..) < 50 {
            held.topics.insert(topic.into());
        }
    }
    held
}

/// However little a reader sees at a time: all that is free comes once and in order, nothing else does, reading comes to an
/// end, and what is held comes when it is not held any more.
///
/// Of an empty outbox. `whole` sees all at once, `parts` does not.
pub(crate) async fn loses_and_repeats_nothing(
    seed: u64,
    owned: &[OwnedShard],
    enqueue: impl AsyncFn(&[Message]),
    whole: impl Reader + 'static,
    parts: impl Reader + 'static,
) {
    let mut random = fastrand::Rng::with_seed(seed);
    let messages: Vec<Message> = (0..100).map(|number| message(&mut random, number)).collect();
    for some in messages.chunks(30) {
        enqueue(some).await;
    }
    // What there is, in the order in which it is to come.
    let mut all = Reading::new(whole, owned);
    all.read_all(1_000).await;
    assert_eq!(all.read.len(), 100);
    all.read.sort_unstable_by_key(|record| record.position);

    let held = some(&mut random, &all.read);
    let is_free = |record: &&Record| {
        let (topic, key) = (record.message.topic().into(), record.message.order_key());
        !held.holds(record.shard, record.position, &topic, key.as_ref())
    };
    let mut reading = Reading::new(parts, owned);
    reading.request.held = Arc::new(held.clone());
    let max_rows = *random.choice(&[1, 3, 20, 1_000]).unwrap();
    reading.read_all(max_rows).await;
    let free = all.read.iter().filter(is_free).map(text);
    assert_eq!(sorted(reading.texts()), sorted(free), "seed {seed}");

    // What is committed later belongs to the next turn.
    let later: Vec<Message> = (0..20)
        .map(|_| Message::builder("c").payload("later").build().unwrap())
        .collect();
    enqueue(&later).await;
    let before = reading.read.len();
    reading.read_all(max_rows).await;
    assert_eq!(reading.read.len(), before + later.len(), "seed {seed}");

    // What has no key was not delivered and is wanted again, with what was held.
    reading.request.held = Arc::default();
    let again: BTreeSet<(Shard, Position)> = reading
        .read
        .iter()
        .filter(|record| record.message.key().is_none())
        .map(|record| (record.shard, record.position))
        .collect();
    reading.request.in_flight.retain(|place| !again.contains(place));
    reading.read.retain(|record| record.message.key().is_some());
    reading.request.reread = again
        .into_iter()
        .map(|(shard, from)| Reread {
            shard,
            scope: RereadScope::Message,
            from,
        })
        .collect();
    reading.read_all(max_rows).await;
    assert_eq!(reading.read.len(), 120, "seed {seed}");
    let mut keys: Vec<(OrderKey, Position)> = Vec::new();
    for record in &reading.read {
        let Some(key) = record.message.order_key() else {
            continue;
        };
        let mut before = keys.iter().filter(|(own, _)| *own == key);
        assert!(
            before.all(|(_, position)| *position < record.position),
            "seed {seed}: a key came out of order"
        );
        keys.push((key, record.position));
    }
}

/// Of all that is held, a fetch goes past a part. Of an outbox after [`loses_and_repeats_nothing`].
#[allow(dead_code, reason = "not every store goes past anything")]
pub(crate) async fn goes_past_a_part(owned: &[OwnedShard], parts: impl Reader + 'static) {
    let mut reading = Reading::new(parts, owned);
    let topics = TOPICS.iter().chain(&["c"]).map(|topic| (*topic).into());
    reading.request.held = Arc::new(Held {
        topics: topics.collect(),
        ..Held::default()
    });
    assert_eq!(reading.batch(1).await, (0, true));
    reading.read_all(1).await;
    assert!(reading.read.is_empty());
}
