//! Random schedules against a model: a list of what is committed for each key.

use std::collections::BTreeMap;

use fastrand::Rng;
use uuid::Uuid;

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, LONG, Relay, retrying, text};
use crate::error::ErrorKind;
use crate::fetch::{Record, Reread, RereadScope};
use crate::hold::Hold;
use crate::lease::Membership;
use crate::message::Message;

const SCHEDULES: u64 = 12;
const STEPS: usize = 150;

/// Random schedules of producers and one relay lose nothing, repeat nothing and keep each key's order.
///
/// Producers of one key follow each other, as those do that lock their aggregate. `OUTBOX_SEED=<seed>` runs one
/// schedule again; the seed stands in the output.
pub async fn random_schedules<H: StoreHarness>() {
    let replayed = std::env::var("OUTBOX_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seeds = match replayed {
        Some(seed) => vec![seed],
        None => (0..SCHEDULES).collect(),
    };
    for seed in seeds {
        println!("to replay this schedule: OUTBOX_SEED={seed}");
        Schedule::<H>::new(seed).await.run().await;
    }
}

/// What a stream is: a key, or the place of one keyless message after the other, which have no order.
type Stream = usize;

/// What a transaction enqueued, for which streams.
type Enqueued = BTreeMap<Stream, Vec<String>>;

struct Schedule<H: StoreHarness> {
    rng: Rng,
    bench: Bench<H>,
    relay: Relay,
    /// The streams `0` to `keys - 1` have a key; the one after them has none.
    keys: usize,
    /// What is committed and not settled, in order.
    model: Vec<Vec<String>>,
    /// Open transactions.
    open: Vec<(H::Tx, Enqueued)>,
    /// How far each stream has been numbered, rollbacks included.
    numbered: Vec<usize>,
    /// Streams whose head is held, with the hold.
    held: BTreeMap<Stream, Hold>,
}

impl<H: StoreHarness> Schedule<H> {
    async fn new(seed: u64) -> Self {
        let bench = Bench::<H>::fresh().await;
        let relay = bench.owner("relay").await;
        let keys = if bench.can.keys { 4 } else { 0 };
        Self {
            rng: Rng::with_seed(seed),
            relay,
            keys,
            model: vec![Vec::new(); keys + 1],
            open: Vec::new(),
            numbered: vec![0; keys + 1],
            held: BTreeMap::new(),
            bench,
        }
    }

    async fn run(mut self) {
        for _ in 0..STEPS {
            match self.rng.u32(0..100) {
                0..25 => self.enqueue().await,
                25..40 => self.end_transaction(false).await,
                40..65 => self.fetch().await,
                65..80 => self.settle().await,
                80..85 => self.hold().await,
                85..90 => self.let_go().await,
                90..94 => self.reread(),
                94..97 => self.lose_and_regain().await,
                _ => self.replace_reader().await,
            }
        }
        while !self.open.is_empty() {
            self.end_transaction(true).await;
        }
        while !self.held.is_empty() {
            self.let_go().await;
        }
        let in_flight = self.relay.in_flight.clone();
        self.deliver(&in_flight).await;
        loop {
            let records = self.relay.next(7).await;
            if records.is_empty() {
                break;
            }
            self.check(&records);
            self.deliver(&records).await;
        }
        assert!(
            self.model.iter().all(Vec::is_empty),
            "committed, never delivered: {:?}",
            self.model
        );
    }

    /// Enqueues for a stream that no open transaction has, in a new or an open transaction.
    async fn enqueue(&mut self) {
        let busy: Vec<Stream> = self
            .open
            .iter()
            .flat_map(|(_, texts)| texts.keys().copied())
            .collect();
        let free: Vec<Stream> = (0..=self.keys)
            .filter(|stream| *stream == self.keys || !busy.contains(stream))
            .collect();
        let stream = free[self.rng.usize(0..free.len())];
        let limit = if self.bench.harness.concurrent_transactions() {
            4
        } else {
            1
        };
        if self.open.len() < limit && (self.open.is_empty() || self.rng.bool()) {
            self.open
                .push((self.bench.harness.begin().await, BTreeMap::new()));
        }
        let count = self.rng.usize(1..4);
        let texts: Vec<String> = (0..count)
            .map(|_| {
                self.numbered[stream] += 1;
                format!("{stream}-{}", self.numbered[stream])
            })
            .collect();
        let messages: Vec<Message> = texts.iter().map(|text| self.message(stream, text)).collect();
        let index = self.rng.usize(0..self.open.len());
        let (tx, enqueued) = &mut self.open[index];
        if let Err(error) = self.bench.harness.enqueue(tx, &messages).await {
            // Its snapshot may be older than a number that another transaction has drawn meanwhile.
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error:?}");
            let (tx, _) = self.open.swap_remove(index);
            self.bench.harness.rollback(tx).await;
            return;
        }
        enqueued.entry(stream).or_default().extend(texts);
        if !self.bench.harness.concurrent_transactions() {
            // The one writer must not keep the relay from writing.
            self.end_transaction(false).await;
        }
    }

    /// The id is the seed's, too: it decides the shard of a message without key.
    fn message(&mut self, stream: Stream, text: &str) -> Message {
        let builder = Message::builder(self.bench.topic(0))
            .id(Uuid::from_u128(self.rng.u128(..)))
            .payload(format!("\"{text}\""));
        self.bench.build(if stream < self.keys {
            builder.key(format!("key-{stream}"))
        } else {
            builder
        })
    }

    async fn end_transaction(&mut self, commit: bool) {
        if self.open.is_empty() {
            return;
        }
        let (tx, enqueued) = self.open.swap_remove(self.rng.usize(0..self.open.len()));
        if commit || self.rng.u32(0..100) < 80 {
            self.bench.harness.commit(tx).await;
            for (stream, texts) in enqueued {
                self.model[stream].extend(texts);
            }
        } else {
            self.bench.harness.rollback(tx).await;
        }
    }

    async fn fetch(&mut self) {
        let in_flight: Vec<Stream> = self
            .relay
            .in_flight
            .iter()
            .map(|record| self.stream(record))
            .collect();
        let rows = self.rng.usize(1..8);
        let (records, more) = self.relay.fetch(rows).await;
        assert!(
            records.len() <= rows,
            "{} records came, {rows} were asked for",
            records.len()
        );
        self.check(&records);
        if records.is_empty() && !more {
            for stream in (0..=self.keys).filter(|stream| !in_flight.contains(stream)) {
                let waits = stream < self.keys && self.held.contains_key(&stream)
                    || stream == self.keys && self.model[stream].len() <= self.relay.held.messages.len();
                assert!(
                    waits || self.model[stream].is_empty(),
                    "an empty batch said that nothing is eligible, and {:?} was",
                    self.model[stream]
                );
            }
        }
    }

    /// Checks records that have just been fetched, and are in flight since, against the model.
    fn check(&self, records: &[Record]) {
        for record in records {
            let stream = self.stream(record);
            let text = text(&record.message);
            assert!(
                self.model[stream].contains(&text),
                "{text} was returned, which is not committed or was settled"
            );
            let copies = self
                .relay
                .in_flight
                .iter()
                .filter(|own| own.position == record.position);
            assert_eq!(copies.count(), 1, "{text} was returned while it was in flight");
            if let Some(hold) = self.held.get(&stream) {
                assert!(
                    stream == self.keys && hold.head.position != record.position,
                    "{text} was returned while it was held"
                );
            }
        }
        // What is in flight of a key, what has just come included, must be the beginning of what is undelivered.
        for stream in 0..self.keys {
            let in_flight: Vec<String> = self
                .relay
                .in_flight
                .iter()
                .filter(|record| self.stream(record) == stream)
                .map(|record| text(&record.message))
                .collect();
            let lowest: Vec<String> = self.model[stream].iter().take(in_flight.len()).cloned().collect();
            assert_eq!(
                in_flight, lowest,
                "of a key the lowest undelivered records must come first, in order"
            );
        }
    }

    fn stream(&self, record: &Record) -> Stream {
        let key = record.message.key().and_then(|key| std::str::from_utf8(key).ok());
        key.and_then(|key| key.strip_prefix("key-")?.parse().ok())
            .unwrap_or(self.keys)
    }

    /// Settles the first few records in flight of some streams; sometimes twice.
    async fn settle(&mut self) {
        let count = self.rng.usize(0..=self.relay.in_flight.len());
        let records: Vec<Record> = self.relay.in_flight.iter().take(count).cloned().collect();
        if self.rng.u32(0..4) == 0 && !records.is_empty() {
            let plan = records
                .iter()
                .fold(self.relay.plan(), |plan, record| plan.delivered(record));
            self.relay.store.settle(&plan.settlement()).await.unwrap();
        }
        self.deliver(&records).await;
    }

    async fn deliver(&mut self, records: &[Record]) {
        let settled = self.relay.deliver(records).await;
        assert!(settled.lost.is_empty(), "nobody took a shard over");
        for record in records {
            let stream = self.stream(record);
            let text = text(&record.message);
            self.model[stream].retain(|own| *own != text);
        }
    }

    /// The oldest record in flight of a stream fails.
    async fn hold(&mut self) {
        if let Some(record) = self.relay.in_flight.first().cloned() {
            let stream = self.stream(&record);
            if !self.held.contains_key(&stream) {
                let hold = retrying(&record, 1);
                self.relay.hold(hold.clone()).await;
                self.held.insert(stream, hold);
            }
        }
    }

    async fn let_go(&mut self) {
        let streams: Vec<Stream> = self.held.keys().copied().collect();
        if !streams.is_empty() {
            let stream = streams[self.rng.usize(0..streams.len())];
            if let Some(hold) = self.held.remove(&stream) {
                self.relay.unhold(&hold).await;
            }
        }
    }

    /// What is in flight of one stream is dropped and wanted again.
    fn reread(&mut self) {
        let Some(record) = self.relay.in_flight.first().cloned() else {
            return;
        };
        let scope = match record.message.order_key() {
            Some(key) => RereadScope::Key(key),
            None => RereadScope::Message,
        };
        let key = record.message.order_key();
        self.relay.in_flight.retain(|own| match &key {
            Some(key) => own.message.order_key().as_ref() != Some(key),
            None => own.position != record.position,
        });
        self.relay.reread.push(Reread {
            shard: record.shard,
            scope,
            from: record.position,
        });
    }

    async fn lose_and_regain(&mut self) {
        self.relay.release_all(Membership::Stays).await;
        self.relay.lease_all(LONG).await;
        // Under a new epoch nothing is wanted again: everything is.
        self.relay.reread.clear();
    }

    async fn replace_reader(&mut self) {
        self.relay.reader = self.relay.store.reader().await.unwrap();
        self.relay.reread.clear();
    }
}
