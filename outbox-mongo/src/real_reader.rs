//! Reading where no find can be told all that it is to leave out, on a real server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::collections::BTreeSet;
use std::sync::Arc;

use outbox_core::{
    FetchRequest, Fetched, Held, Message, OrderKey, OwnedShard, Position, Reader, Record, Reread,
    RereadScope, Shard,
};

use crate::reader::{MongoReader, Most};
use crate::real_commands::{Heard, names};

const TOPICS: [&str; 3] = ["a", "a-b", "b"];

/// A relay that settles nothing: what it has read stays in flight.
struct Reading {
    reader: MongoReader,
    request: FetchRequest,
    read: Vec<Record>,
}

impl Reading {
    fn new(heard: &Heard, owned: &[OwnedShard], most: Most) -> Self {
        let mut reader = MongoReader::new(&heard.store, None);
        reader.most = most;
        Self {
            reader,
            request: FetchRequest {
                shards: owned.to_vec(),
                max_bytes: 1 << 30,
                ..FetchRequest::default()
            },
            read: Vec::new(),
        }
    }

    /// Reads to the end, in batches of so many; nothing of it is what was read before.
    async fn read_all(&mut self, max_rows: usize) {
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
    async fn batch(&mut self, max_rows: usize) -> (usize, bool) {
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

    fn texts(&self) -> Vec<String> {
        let text = |record: &Record| String::from_utf8_lossy(record.message.payload().unwrap()).into_owned();
        self.read.iter().map(text).collect()
    }
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

/// However little a find is told of what is held and in flight: all that is free comes once and in order, nothing else does,
/// reading comes to an end, and what is held comes when it is not held any more.
#[tokio::test(flavor = "multi_thread")]
async fn finds_that_are_told_a_part_of_what_is_left_out_lose_and_repeat_nothing() {
    for seed in 0..8 {
        let mut random = fastrand::Rng::with_seed(seed);
        let heard = Heard::new(false).await;
        let messages: Vec<Message> = (0..100).map(|number| message(&mut random, number)).collect();
        for some in messages.chunks(30) {
            heard.enqueue(some).await;
        }
        let owned = heard.lease().await;
        let most = Most {
            held: *random.choice(&[0, 50, 200, 1 << 20]).unwrap(),
            places: *random.choice(&[1, 7, 40, 400_000]).unwrap(),
        };
        // What there is, in the order in which it is to come.
        let mut all = Reading::new(
            &heard,
            &owned,
            Most {
                held: 1 << 20,
                places: 400_000,
            },
        );
        all.read_all(1_000).await;
        assert_eq!(all.read.len(), 100);
        all.read.sort_unstable_by_key(|record| record.position);

        let held = some(&mut random, &all.read);
        let is_free = |record: &Record| {
            let (topic, key) = (record.message.topic().into(), record.message.order_key());
            !held.holds(record.shard, record.position, &topic, key.as_ref())
        };
        let mut reading = Reading::new(&heard, &owned, most);
        reading.request.held = Arc::new(held.clone());
        let max_rows = *random.choice(&[1, 3, 20, 1_000]).unwrap();
        reading.read_all(max_rows).await;
        let mut came = reading.texts();
        came.sort_unstable();
        let free: Vec<&Record> = all.read.iter().filter(|record| is_free(record)).collect();
        let expected: Vec<_> = free
            .iter()
            .map(|record| String::from_utf8_lossy(record.message.payload().unwrap()).into_owned())
            .collect();
        let sorted = |mut texts: Vec<String>| {
            texts.sort_unstable();
            texts
        };
        assert_eq!(came, sorted(expected), "seed {seed}");

        // What is committed later belongs to the next turn.
        let later: Vec<Message> = (0..20)
            .map(|_| Message::builder("c").payload("later").build().unwrap())
            .collect();
        heard.enqueue(&later).await;
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
            let before = keys.iter().filter(|(own, _)| *own == key);
            assert!(
                before
                    .into_iter()
                    .all(|(_, position)| *position < record.position),
                "seed {seed}: a key came out of order"
            );
            keys.push((key, record.position));
        }
        heard.remove().await;
    }
}

/// A key of which there is more than a page is read on beside the others, unless it is held by then.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_meanwhile_is_not_read_on() {
    let heard = Heard::new(false).await;
    let messages: Vec<Message> = (0..9)
        .map(|number| {
            let builder = Message::builder("a").key("hot");
            builder.payload(number.to_string()).build().unwrap()
        })
        .collect();
    heard.enqueue(&messages).await;
    let owned = heard.lease().await;
    // What is hot is read before the ring and behind it in turns.
    for (told, pages, topic) in [
        (0, 1, true),
        (0, 2, false),
        (0, 2, true),
        (1 << 20, 1, false),
        (1 << 20, 2, false),
        (1 << 20, 2, true),
    ] {
        let most = Most {
            held: told,
            places: 400_000,
        };
        let mut reading = Reading::new(&heard, &owned, most);
        for _ in 0..pages {
            assert_eq!(reading.batch(3).await, (3, true));
        }
        let mut held = Held::default();
        let hot = reading.read[0].message.order_key().unwrap();
        match topic {
            true => drop(held.topics.insert("a".into())),
            false => drop(held.keys.insert((reading.read[0].shard, hot))),
        }
        reading.request.held = Arc::new(held);
        assert_eq!(reading.batch(3).await.0, 0);
        reading.request.held = Arc::default();
        reading.read_all(3).await;
        let all: Vec<String> = (0..9).map(|number| number.to_string()).collect();
        assert_eq!(reading.texts(), all);
    }
    heard.remove().await;
}

/// More is held than a command takes, which has at most 16 MiB.
#[tokio::test(flavor = "multi_thread")]
async fn more_keys_can_be_held_than_fit_into_a_command() {
    let heard = Heard::new(false).await;
    let keyed = |key: String| Message::builder("a").key(key).payload("free").build().unwrap();
    let owned = heard.lease().await;
    let mut held = Held::default();
    // Nobody asks whether they are there.
    for number in 0..17_000_u16 {
        let key = OrderKey {
            topic: "a".into(),
            key: format!("{number:01024}").into(),
        };
        held.keys.insert((Shard(number % 64), key));
    }
    let mut reading = Reading::new(&heard, &owned, MongoReader::new(&heard.store, None).most);
    reading.request.held = Arc::new(held);
    heard
        .enqueue(&[keyed("1".to_owned()), keyed("2".to_owned())])
        .await;
    reading.read_all(100).await;
    assert_eq!(reading.read.len(), 2);
    // That nothing waits is known after one turn, in one snapshot.
    let (fetched, said) = heard.during(reading.reader.fetch(&reading.request)).await;
    assert!(matches!(fetched.unwrap(), Fetched::Batch { records, more: false } if records.is_empty()));
    let said = names(&said);
    assert!((18..60).contains(&said.len()), "{said:?}");
    assert_eq!(
        said.iter().filter(|name| **name == "commitTransaction").count(),
        1
    );
    heard.remove().await;
}
