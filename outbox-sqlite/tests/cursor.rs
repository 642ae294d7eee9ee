//! The cursor against the simple reader, by random schedules and by the cases that random ones seldom meet.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Place, fetch, in_flight, message, request};
use outbox_core::{
    FetchRequest, Fetched, Held, Message, OrderKey, OutboxStore, OwnedShard, Position, Reader, Record,
    Reread, RereadScope, Shard,
};
use outbox_sqlite::{FetchMode, SqliteStore};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    Enqueue {
        topic: u8,
        key: Option<u8>,
        bytes: usize,
    },
    Fetch {
        max_rows: usize,
        max_bytes: usize,
    },
    Deliver(usize),
    Fail(usize),
    /// With or without a word that it is wanted again, if a fetch has shown the reader that it was held.
    Release(usize, bool),
    BlockTopic(usize),
    FreeTopic(usize, bool),
    /// An outage: everything in flight is wanted again.
    Lose,
    /// Another relay had the shard for a while.
    NewEpoch,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..2u8, proptest::option::weighted(0.8, 0..4u8), 0..40usize)
            .prop_map(|(topic, key, bytes)| Step::Enqueue { topic, key, bytes }),
        6 => (1..9usize, 1..400usize).prop_map(|(max_rows, max_bytes)| Step::Fetch { max_rows, max_bytes }),
        5 => any::<usize>().prop_map(Step::Deliver),
        3 => any::<usize>().prop_map(Step::Fail),
        3 => any::<(usize, bool)>().prop_map(|(index, told)| Step::Release(index, told)),
        1 => any::<usize>().prop_map(Step::BlockTopic),
        2 => any::<(usize, bool)>().prop_map(|(index, told)| Step::FreeTopic(index, told)),
        1 => Just(Step::Lose),
        1 => Just(Step::NewEpoch),
    ]
}

/// What a relay knows: in flight, held, wanted again. Nothing else.
struct Model {
    place: Place,
    simple: SqliteStore,
    owned: OwnedShard,
    reader: Box<dyn Reader>,
    in_flight: Vec<Record>,
    held: Held,
    /// As the reader knows it.
    shown: Held,
    /// From where a hold's scope is to be read again.
    heads: BTreeMap<String, Reread>,
    reread: Vec<Reread>,
    enqueued: usize,
    delivered: BTreeMap<Option<OrderKey>, Vec<Position>>,
    fetches: usize,
}

impl Model {
    async fn new() -> Self {
        let place = Place::with(|config| config.sweep_interval = Duration::from_secs(3600));
        let simple = SqliteStore::open(outbox_sqlite::SqliteConfig {
            fetch: FetchMode::Rescan,
            ..place.config.clone()
        })
        .unwrap();
        Self {
            owned: place.lease().await,
            reader: place.store.reader().await.unwrap(),
            simple,
            place,
            in_flight: Vec::new(),
            held: Held::default(),
            shown: Held::default(),
            heads: BTreeMap::new(),
            reread: Vec::new(),
            enqueued: 0,
            delivered: BTreeMap::new(),
            fetches: 0,
        }
    }

    async fn apply(&mut self, step: &Step) {
        match step {
            Step::Enqueue { topic, key, bytes } => {
                let mut builder = Message::builder(format!("topic-{topic}")).payload(vec![b'x'; *bytes]);
                if let Some(key) = key {
                    builder = builder.key(format!("key-{key}"));
                }
                self.place.enqueue(&builder.build().unwrap());
                self.enqueued += 1;
            }
            Step::Fetch { max_rows, max_bytes } => {
                self.fetch(*max_rows, *max_bytes).await;
            }
            Step::Deliver(index) => {
                let Some(chosen) = self.choose(*index) else { return };
                let ready: Vec<Record> = self.take(|record| match chosen.message.order_key() {
                    Some(key) => {
                        record.message.order_key() == Some(key) && record.position <= chosen.position
                    }
                    None => record.position == chosen.position,
                });
                self.deliver(&ready).await;
            }
            Step::Fail(index) => {
                let Some(chosen) = self.choose(*index) else { return };
                match chosen.message.order_key() {
                    Some(key) => {
                        let dropped = self.take(|record| record.message.order_key() == Some(key.clone()));
                        self.hold(RereadScope::Key(key.clone()), &dropped);
                        self.held.keys.insert((Shard(0), key));
                    }
                    None => {
                        let dropped = self.take(|record| record.position == chosen.position);
                        self.hold(RereadScope::Message, &dropped);
                        self.held.messages.insert((Shard(0), chosen.position));
                    }
                }
            }
            Step::Release(index, told) => {
                let keys = self
                    .held
                    .keys
                    .iter()
                    .cloned()
                    .map(|(_, key)| RereadScope::Key(key));
                let mut all: Vec<(RereadScope, Position)> = keys.map(|key| (key, Position::MIN)).collect();
                all.extend(
                    self.held
                        .messages
                        .iter()
                        .map(|(_, position)| (RereadScope::Message, *position)),
                );
                if all.is_empty() {
                    return;
                }
                let (scope, position) = all.swap_remove(index % all.len());
                let shown = match &scope {
                    RereadScope::Key(key) => self.shown.keys.contains(&(Shard(0), key.clone())),
                    _ => self.shown.messages.contains(&(Shard(0), position)),
                };
                let name = match &scope {
                    RereadScope::Key(key) => {
                        self.held.keys.remove(&(Shard(0), key.clone()));
                        format!("{key:?}")
                    }
                    _ => {
                        self.held.messages.remove(&(Shard(0), position));
                        position.to_string()
                    }
                };
                self.reread
                    .extend(self.heads.remove(&name).filter(|_| *told || !shown));
            }
            Step::BlockTopic(index) => {
                let Some(chosen) = self.choose(*index) else { return };
                let topic: Arc<str> = chosen.message.topic().into();
                let dropped = self.take(|record| record.message.topic() == &*topic);
                self.held.topics.insert(topic.clone());
                self.note(format!("topic {topic}"), RereadScope::Shard, &dropped);
            }
            Step::FreeTopic(index, told) => {
                let topics: Vec<_> = self.held.topics.iter().cloned().collect();
                if topics.is_empty() {
                    return;
                }
                let topic = &topics[index % topics.len()];
                self.held.topics.remove(topic);
                let head = self.heads.remove(&format!("topic {topic}"));
                self.reread
                    .extend(head.filter(|_| *told || !self.shown.topics.contains(topic)));
            }
            Step::Lose => {
                let dropped = self.take(|_| true);
                if let Some(from) = dropped.iter().map(|record| record.position).min() {
                    self.reread.push(Reread {
                        shard: Shard(0),
                        scope: RereadScope::Shard,
                        from,
                    });
                }
            }
            Step::NewEpoch => {
                self.take(|_| true);
                self.reread.clear();
                self.owned.epoch.0 += 1;
            }
        }
    }

    fn choose(&self, index: usize) -> Option<Record> {
        (!self.in_flight.is_empty()).then(|| self.in_flight[index % self.in_flight.len()].clone())
    }

    fn take(&mut self, which: impl Fn(&Record) -> bool) -> Vec<Record> {
        let (taken, kept) = std::mem::take(&mut self.in_flight).into_iter().partition(which);
        self.in_flight = kept;
        taken
    }

    fn hold(&mut self, scope: RereadScope, dropped: &[Record]) {
        let name = match &scope {
            RereadScope::Key(key) => format!("{key:?}"),
            _ => dropped[0].position.to_string(),
        };
        self.note(name, scope, dropped);
    }

    fn note(&mut self, name: String, scope: RereadScope, dropped: &[Record]) {
        let from = dropped.iter().map(|record| record.position).min().unwrap();
        let reread = self.heads.entry(name).or_insert(Reread {
            shard: Shard(0),
            scope,
            from,
        });
        reread.from = reread.from.min(from);
    }

    async fn fetch(&mut self, max_rows: usize, max_bytes: usize) -> (usize, bool) {
        self.fetches += 1;
        self.shown = self.held.clone();
        let asked = FetchRequest {
            in_flight: in_flight(&self.in_flight),
            held: Arc::new(self.held.clone()),
            reread: std::mem::take(&mut self.reread),
            max_bytes,
            ..request(self.owned, max_rows)
        };
        let (records, more) = fetch(&mut self.reader, &asked).await;

        let all = FetchRequest {
            max_rows: 100_000,
            max_bytes: usize::MAX,
            ..asked
        };
        let mut oracle = self.simple.reader().await.unwrap();
        let (eligible, rest) = fetch(&mut oracle, &all).await;
        assert!(!rest);
        assert!(records.len() <= max_rows);
        let bytes: usize = records.iter().map(|record| record.message.size()).sum();
        assert!(bytes <= max_bytes || records.len() == 1);
        assert!(more || !records.is_empty() || eligible.is_empty(), "C4");
        let keys: BTreeSet<_> = records.iter().map(|record| record.message.order_key()).collect();
        for key in keys {
            let of = |from: &[Record]| -> Vec<Record> {
                from.iter()
                    .filter(|record| record.message.order_key() == key)
                    .cloned()
                    .collect()
            };
            let (got, lowest) = (of(&records), of(&eligible));
            match &key {
                Some(_) => assert_eq!(got, lowest[..got.len()], "C1"),
                None => assert!(got.iter().all(|record| lowest.contains(record)), "C2"),
            }
        }
        self.in_flight.extend(records.iter().cloned());
        (records.len(), more)
    }

    async fn deliver(&mut self, records: &[Record]) {
        for record in records {
            let key = record.message.order_key();
            self.delivered.entry(key).or_default().push(record.position);
        }
        // The store knows no epoch but its own.
        self.place.deliver(self.place.lease().await, records).await;
    }

    async fn finish(&mut self) {
        let topics = self.held.topics.len();
        let others = self.held.keys.len() + self.held.messages.len();
        for _ in 0..topics {
            self.apply(&Step::FreeTopic(0, true)).await;
        }
        for _ in 0..others {
            self.apply(&Step::Release(0, true)).await;
        }
        let bound = 40 + 4 * self.enqueued;
        for round in 0.. {
            assert!(round < bound, "it does not come to an end");
            let (found, more) = self.fetch(7, 1 << 20).await;
            let ready = self.take(|_| true);
            self.deliver(&ready).await;
            if found == 0 && !more {
                break;
            }
        }
        let delivered: usize = self.delivered.values().map(Vec::len).sum();
        assert_eq!(delivered, self.enqueued, "all of them, once");
        for (key, positions) in &self.delivered {
            assert!(key.is_none() || positions.is_sorted(), "{key:?}: {positions:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn the_cursor_reads_what_the_simple_reader_would(steps in proptest::collection::vec(step(), 1..120)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut model = Model::new().await;
            for step in &steps {
                model.apply(step).await;
            }
            model.finish().await;
        });
    }
}

/// Many rows in one transaction.
fn fill(place: &Place, topic: &str, key: Option<&str>, count: usize, bytes: usize) {
    let messages: Vec<Message> = (0..count)
        .map(|_| message(topic, key, &"x".repeat(bytes)))
        .collect();
    place.outbox.enqueue_many(&place.connect(), &messages).unwrap();
}

fn hold_key(held: &mut Held, topic: &str, key: &str) -> OrderKey {
    let key = OrderKey {
        topic: topic.into(),
        key: key.to_owned().into(),
    };
    held.keys.insert((Shard(0), key.clone()));
    key
}

#[tokio::test]
async fn a_held_key_with_a_long_tail_costs_others_little() {
    let place = Place::new();
    fill(&place, "t", Some("hot"), 50_000, 100);
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    let mut held = Held::default();
    let key = hold_key(&mut held, "t", "hot");
    let held = Arc::new(held);
    let mut asked = FetchRequest {
        held: held.clone(),
        ..request(owned, 100)
    };
    assert_eq!(fetch(&mut reader, &asked).await, (Vec::new(), false));

    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        fill(&place, "t", Some("other"), 1, 100);
        let start = Instant::now();
        let (records, _) = fetch(&mut reader, &asked).await;
        slowest = slowest.max(start.elapsed());
        assert_eq!(records.len(), 1);
        place.deliver(owned, &records).await;
    }
    assert!(slowest < Duration::from_millis(250), "{slowest:?}");

    // Released, it is read again from its head, and others pass meanwhile.
    asked.held = Arc::default();
    asked.reread = vec![Reread {
        shard: Shard(0),
        scope: RereadScope::Key(key),
        from: Position(1),
    }];
    let (records, more) = fetch(&mut reader, &asked).await;
    assert!(more);
    assert_eq!(records[0].position, Position(1));
    asked.reread.clear();
    let mut returned = records.len();
    place.deliver(owned, &records).await;
    for round in 0..10 {
        fill(&place, "t", Some("other"), 1, 100);
        let (records, _) = fetch(&mut reader, &asked).await;
        let others = records
            .iter()
            .filter(|record| record.message.key().is_some_and(|key| key == "other"))
            .count();
        assert_eq!(others, 1, "round {round}");
        assert!(records.len() > 1);
        returned += records.len() - 1;
        place.deliver(owned, &records).await;
    }
    assert!(returned > 100);
}

#[tokio::test]
async fn many_keys_released_at_once_all_come() {
    let place = Place::new();
    let owned = place.lease().await;
    let mut held = Held::default();
    let mut reread = Vec::new();
    for number in 0..100 {
        let key = format!("key-{number}");
        fill(&place, "t", Some(&key), 3, 10);
        reread.push(Reread {
            shard: Shard(0),
            scope: RereadScope::Key(hold_key(&mut held, "t", &key)),
            from: Position(1 + 3 * number),
        });
    }
    let mut reader = place.store.reader().await.unwrap();
    let asked = FetchRequest {
        held: held.into(),
        ..request(owned, 10)
    };
    assert_eq!(fetch(&mut reader, &asked).await, (Vec::new(), false));
    let mut asked = FetchRequest {
        reread,
        ..request(owned, 10)
    };
    let mut count = 0;
    for _ in 0..200 {
        let (records, more) = fetch(&mut reader, &asked).await;
        asked.reread.clear();
        count += records.len();
        place.deliver(owned, &records).await;
        if records.is_empty() && !more {
            break;
        }
    }
    assert_eq!(count, 300);
}

/// A reader that never saw the topic before it was held cannot be told from where to read: rows of a key that had
/// failed lie below the topic's head.
#[tokio::test]
async fn a_topic_released_after_a_restart_comes_whole() {
    let place = Place::new();
    fill(&place, "blocked", Some("k"), 20, 10);
    fill(&place, "free", None, 1, 10);
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    let mut held = Held::default();
    held.topics.insert("blocked".into());
    let asked = FetchRequest {
        held: held.into(),
        ..request(owned, 100)
    };
    assert_eq!(fetch(&mut reader, &asked).await.0.len(), 1);
    let asked = FetchRequest {
        reread: vec![Reread {
            shard: Shard(0),
            scope: RereadScope::Shard,
            from: Position(17),
        }],
        ..request(owned, 100)
    };
    let records = fetch(&mut reader, &asked).await.0;
    assert_eq!(records[0].position, Position(1));
}

#[tokio::test]
async fn the_sweep_finds_what_was_written_below_the_cursor() {
    let place = Place::with(|config| config.sweep_interval = Duration::ZERO);
    fill(&place, "t", None, 10, 10);
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    let asked = request(owned, 100);
    let (records, _) = fetch(&mut reader, &asked).await;
    place.deliver(owned, &records).await;
    place
        .connect()
        .execute_batch("INSERT INTO outbox (id, topic) VALUES (5, 'late')")
        .unwrap();
    let (records, _) = fetch(&mut reader, &asked).await;
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].message.topic(), "late");
}

#[tokio::test]
async fn positions_that_went_back_are_a_reset() {
    let place = Place::new();
    fill(&place, "t", None, 10, 10);
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    fetch(&mut reader, &request(owned, 5)).await;
    place
        .connect()
        .execute_batch(
            "DELETE FROM outbox WHERE id > 8; UPDATE sqlite_sequence SET seq = 8 WHERE name = 'outbox'",
        )
        .unwrap();
    let answer = reader.fetch(&request(owned, 5)).await.unwrap();
    assert!(matches!(answer, Fetched::Reset { .. }), "{answer:?}");
    assert_eq!(fetch(&mut reader, &request(owned, 100)).await.0.len(), 8);
}

#[tokio::test]
async fn a_replaced_file_is_a_reset_and_the_new_one_is_read() {
    let place = Place::new();
    fill(&place, "t", None, 3, 10);
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    fetch(&mut reader, &request(owned, 100)).await;

    let other = Place::new();
    fill(&other, "t", None, 7, 10);
    other
        .connect()
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        .unwrap();
    std::fs::copy(&other.config.path, place.dir().join("new")).unwrap();
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(place.dir().join(format!("app.db{suffix}")));
    }
    std::fs::rename(place.dir().join("new"), &place.config.path).unwrap();

    let answer = reader.fetch(&request(owned, 100)).await.unwrap();
    assert!(matches!(answer, Fetched::Reset { .. }), "{answer:?}");
    assert_eq!(fetch(&mut reader, &request(owned, 100)).await.0.len(), 7);
    // The store's other connections are of the new file, too.
    assert_eq!(place.store.stats().await.unwrap().backlog.value(), 7);
}

#[tokio::test]
async fn bytes_bound_a_batch_and_one_record_always_passes() {
    let place = Place::new();
    fill(&place, "t", None, 5, 1000);
    let owned = place.lease().await;
    for (max_bytes, expected) in [(1, 1), (1500, 1), (2500, 2), (100_000, 5)] {
        let mut reader = place.store.reader().await.unwrap();
        let asked = FetchRequest {
            max_bytes,
            ..request(owned, 100)
        };
        let (records, more) = fetch(&mut reader, &asked).await;
        assert_eq!((records.len(), more), (expected, expected < 5));
    }
}
