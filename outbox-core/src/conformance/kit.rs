//! What the scenarios of the store suite are written with: a bench with messages that every store can hold, and a
//! small relay that keeps the rules of the trait.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::harness::{CONTENT, StoreHarness, TOPICS};
use crate::fetch::{FetchRequest, Fetched, Held, Record, Reread, RereadScope};
use crate::hold::{Hold, HoldChange, HoldRef, HoldScope, HoldState};
use crate::lease::{LeaseRequest, Leases, Membership, RelayId};
use crate::message::{Message, MessageBuilder, MessageId, OrderKey};
use crate::settle::{Death, Settled, Settlement, ShardSettlement};
use crate::shard::{OwnedShard, Position, Shard, shard_of};
use crate::store::{Capabilities, OutboxStore, Reader};

/// Long enough for no lease to end while a scenario runs.
pub(super) const LONG: Duration = Duration::from_secs(3_600);
/// Short enough to wait for, long enough for a slow machine to do a few calls in.
pub(super) const SHORT: Duration = Duration::from_millis(1_500);
/// How long a condition may take to come true.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// More fetches than any scenario needs: a store that never comes to an end fails here.
const MAX_FETCHES: usize = 5_000;

/// Polls a condition until it is true; fails with the text when it does not become so.
macro_rules! eventually {
    ($condition:expr, $($what:tt)+) => {{
        let start = tokio::time::Instant::now();
        while !$condition {
            assert!(start.elapsed() < $crate::conformance::kit::PATIENCE, $($what)+);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }};
}
pub(super) use eventually;

/// A fresh store and messages that it can hold.
pub(super) struct Bench<H: StoreHarness> {
    pub(super) harness: H,
    pub(super) store: Arc<dyn OutboxStore>,
    pub(super) can: Capabilities,
}

impl<H: StoreHarness> Bench<H> {
    pub(super) async fn fresh() -> Self {
        let harness = H::fresh().await;
        let store = harness.store();
        let can = store.capabilities();
        Self { harness, store, can }
    }

    /// The topic that this store has, or one of the suite's.
    pub(super) fn topic(&self, number: usize) -> Arc<str> {
        self.can
            .fixed_topic
            .clone()
            .unwrap_or_else(|| TOPICS[number].into())
    }

    /// A message with this key, if the store has keys. Its payload is the text as JSON, which every store keeps.
    pub(super) fn keyed(&self, key: &str, text: &str) -> Message {
        self.message(0, self.can.keys.then_some(key), text)
    }

    /// A message without a key.
    pub(super) fn keyless(&self, text: &str) -> Message {
        self.message(0, None, text)
    }

    pub(super) fn message(&self, topic: usize, key: Option<&str>, text: &str) -> Message {
        let builder = Message::builder(self.topic(topic)).payload(format!("\"{text}\""));
        self.build(match key {
            Some(key) => builder.key(key.to_owned()),
            None => builder,
        })
    }

    /// A message of JSON as the store's producers write it.
    pub(super) fn build(&self, builder: MessageBuilder) -> Message {
        let message = builder.build().unwrap();
        let fitted = self.harness.fit(message.clone());
        let mut parts = fitted.clone().into_parts();
        parts.payload = message.payload().cloned();
        assert!(
            Message::from_stored(parts) == message && json(&content(&fitted)) == json(&content(&message)),
            "fit may change the payload, with what it was as its member {CONTENT:?}, and nothing else: {fitted:?}"
        );
        fitted
    }

    /// Messages `1` to `count` of a key.
    pub(super) fn series(&self, key: &str, count: usize) -> Vec<Message> {
        (1..=count)
            .map(|number| self.keyed(key, &format!("{key}{number}")))
            .collect()
    }

    /// Enqueues messages in one transaction and commits it.
    pub(super) async fn commit(&self, messages: &[Message]) {
        let tx = self.open(messages).await;
        self.harness.commit(tx).await;
    }

    /// Enqueues messages in a transaction that stays open.
    pub(super) async fn open(&self, messages: &[Message]) -> H::Tx {
        let mut tx = self.harness.begin().await;
        if let Err(error) = self.harness.enqueue(&mut tx, messages).await {
            panic!("a message within the limits and the capabilities must be enqueued: {error:?}");
        }
        tx
    }

    /// A relay through a handle of its own; it owns nothing yet.
    pub(super) async fn relay(&self, name: &str) -> Relay {
        Relay::new(self.harness.store(), name).await
    }

    /// A relay that owns everything.
    pub(super) async fn owner(&self, name: &str) -> Relay {
        let mut relay = self.relay(name).await;
        relay.lease_all(LONG).await;
        assert_eq!(
            relay.owned.len(),
            usize::from(self.can.shards),
            "a relay that wants all free shards must get them"
        );
        relay
    }

    /// Keys of the same shard as `key`, as [`crate::shard_of`] spreads them: so that a cursor of the shard passes by.
    pub(super) fn neighbours(&self, key: &str, count: usize) -> Vec<String> {
        let id = MessageId::from_bytes([0; 16]);
        let shard = |key: &str| shard_of(Some(key.as_bytes()), id, self.can.shards);
        (0..)
            .map(|number| format!("near-{number}"))
            .filter(|near| shard(near) == shard(key))
            .take(count)
            .collect()
    }

    /// Commits messages until two are on different shards, and fetches all; needs several shards.
    pub(super) async fn on_two_shards(&self, owner: &mut Relay) -> (Vec<Record>, Record, Record) {
        let messages: Vec<_> = (0..64)
            .map(|number| self.keyed(&format!("spread-{number}"), &format!("{number}")))
            .collect();
        self.commit(&messages).await;
        let records = owner.drain_without_settling().await;
        let one = records[0].clone();
        let other = records.iter().find(|record| record.shard != one.shard);
        let other = other.unwrap_or_else(|| {
            panic!(
                "64 keys are all on shard {}, though there are {} shards",
                one.shard, self.can.shards
            )
        });
        let other = other.clone();
        (records, one, other)
    }

    /// The time by the database's clock: that at which a message is enqueued.
    pub(super) async fn database_now(&self, owner: &mut Relay) -> SystemTime {
        self.commit(&[self.keyed("clock", "clock")]).await;
        let record = owner.drain().await.pop().unwrap();
        record
            .message
            .created_at()
            .unwrap_or_else(|| panic!("a reader must give each message the time at which it was enqueued"))
    }
}

/// A relay that keeps the rules: what is in flight is told, what is held is told, what is wanted again is told once.
pub(super) struct Relay {
    pub(super) id: RelayId,
    pub(super) store: Arc<dyn OutboxStore>,
    pub(super) reader: Box<dyn Reader>,
    pub(super) owned: Vec<OwnedShard>,
    pub(super) in_flight: Vec<Record>,
    pub(super) held: Held,
    pub(super) reread: Vec<Reread>,
    pub(super) max_bytes: usize,
}

impl Relay {
    pub(super) async fn new(store: Arc<dyn OutboxStore>, name: &str) -> Self {
        let reader = store.reader().await.unwrap();
        Self {
            id: RelayId::new(name),
            store,
            reader,
            owned: Vec::new(),
            in_flight: Vec::new(),
            held: Held::default(),
            reread: Vec::new(),
            max_bytes: usize::MAX >> 1,
        }
    }

    pub(super) async fn lease(&mut self, want: u16, ttl: Duration) -> Leases {
        let request = LeaseRequest {
            relay: self.id.clone(),
            want,
            ttl,
        };
        let leases = self.store.lease(&request).await.unwrap();
        self.owned.clone_from(&leases.held);
        // What was read under an epoch that is over is no longer this relay's business.
        self.in_flight
            .retain(|record| leases.held.iter().any(|owned| owned.shard == record.shard));
        leases
    }

    pub(super) async fn lease_all(&mut self, ttl: Duration) -> Leases {
        self.lease(self.store.capabilities().shards, ttl).await
    }

    /// Gives everything up; what was in flight is forgotten.
    pub(super) async fn release_all(&mut self, membership: Membership) {
        self.store
            .release(&self.id, &self.owned, membership)
            .await
            .unwrap();
        self.owned.clear();
        self.in_flight.clear();
    }

    pub(super) fn request(&mut self, rows: usize) -> FetchRequest {
        FetchRequest {
            shards: self.owned.clone(),
            in_flight: self.in_flight.iter().map(place).collect(),
            held: Arc::new(self.held.clone()),
            reread: std::mem::take(&mut self.reread),
            max_rows: rows,
            max_bytes: self.max_bytes,
        }
    }

    /// One fetch; what it returns is in flight from now on.
    pub(super) async fn fetch(&mut self, rows: usize) -> (Vec<Record>, bool) {
        let request = self.request(rows);
        match self.reader.fetch(&request).await.unwrap() {
            Fetched::Batch { records, more } => {
                self.in_flight.extend(records.iter().cloned());
                (records, more)
            }
            Fetched::Reset { reason } => panic!("nothing was reset, yet the reader says: {reason}"),
        }
    }

    /// Fetches until there is something, or nothing eligible.
    pub(super) async fn next(&mut self, rows: usize) -> Vec<Record> {
        for _ in 0..MAX_FETCHES {
            let (records, more) = self.fetch(rows).await;
            if !records.is_empty() || !more {
                return records;
            }
        }
        panic!("{MAX_FETCHES} empty fetches said that there is more")
    }

    /// Fetches and settles until nothing is eligible; gives what came, in order.
    pub(super) async fn drain(&mut self) -> Vec<Record> {
        self.drain_by(500).await
    }

    /// Fetches until nothing more comes; all of it stays in flight.
    pub(super) async fn drain_without_settling(&mut self) -> Vec<Record> {
        let mut all = Vec::new();
        loop {
            let records = self.next(1_000).await;
            if records.is_empty() {
                return all;
            }
            for record in records {
                assert!(
                    all.iter().all(|own: &Record| own.position != record.position),
                    "what is in flight must not be returned again"
                );
                all.push(record);
            }
        }
    }

    pub(super) async fn drain_by(&mut self, rows: usize) -> Vec<Record> {
        let mut drained = Vec::new();
        for _ in 0..MAX_FETCHES {
            let records = self.next(rows).await;
            if records.is_empty() {
                return drained;
            }
            let settled = self.deliver(&records).await;
            assert!(
                settled.lost.is_empty(),
                "nobody took a shard over, yet the settlement lost {:?}",
                settled.lost
            );
            drained.extend(records);
        }
        panic!(
            "the outbox is not empty after {MAX_FETCHES} batches: does a settlement remove what was delivered?"
        )
    }

    /// Settles records as delivered.
    pub(super) async fn deliver(&mut self, records: &[Record]) -> Settled {
        if records.is_empty() {
            return Settled::default();
        }
        let settlement = records
            .iter()
            .fold(self.plan(), |plan, record| plan.delivered(record));
        self.settle(settlement).await
    }

    pub(super) async fn settle(&mut self, plan: Plan) -> Settled {
        let settlement = plan.settlement();
        let settled = self.store.settle(&settlement).await.unwrap();
        for part in &settlement.shards {
            self.in_flight.retain(|record| {
                let reference = record.reference();
                record.shard != part.shard
                    || !part.delivered.contains(&reference)
                        && !part.dead.iter().any(|death| death.record == reference)
            });
        }
        settled
    }

    /// An empty settlement under this relay's epochs.
    pub(super) fn plan(&self) -> Plan {
        Plan {
            relay: self.id.clone(),
            owned: self.owned.clone(),
            parts: BTreeMap::new(),
        }
    }

    /// Notes a hold in the store and heeds it: what was read of it is dropped.
    pub(super) async fn hold(&mut self, hold: Hold) {
        self.heed(&hold);
        let settled = self.settle(self.plan().put(hold)).await;
        assert!(settled.lost.is_empty(), "a hold of an owned shard must be kept");
    }

    /// Heeds a hold without noting it.
    pub(super) fn heed(&mut self, hold: &Hold) {
        match &hold.scope {
            HoldScope::Topic(topic) => {
                self.held.topics.insert(topic.clone());
                self.in_flight
                    .retain(|record| record.message.topic() != topic.as_ref());
            }
            HoldScope::Key(key) => {
                self.held.keys.insert((hold.shard, key.clone()));
                self.in_flight
                    .retain(|record| record.message.order_key().as_ref() != Some(key));
            }
            HoldScope::Message => {
                self.held.messages.insert((hold.shard, hold.head.position));
                self.in_flight
                    .retain(|record| record.position != hold.head.position);
            }
        }
    }

    /// Lets what was held go on: removes the hold and asks for everything from its head on again.
    pub(super) async fn unhold(&mut self, hold: &Hold) {
        self.settle(self.plan().clear(hold.reference())).await;
        let mut again = |shard, scope, from| self.reread.push(Reread { shard, scope, from });
        match &hold.scope {
            HoldScope::Topic(topic) => {
                self.held.topics.remove(topic);
                for owned in &self.owned {
                    again(owned.shard, RereadScope::Shard, Position::MIN);
                }
            }
            HoldScope::Key(key) => {
                self.held.keys.remove(&(hold.shard, key.clone()));
                again(hold.shard, RereadScope::Key(key.clone()), hold.head.position);
            }
            HoldScope::Message => {
                self.held.messages.remove(&(hold.shard, hold.head.position));
                again(hold.shard, RereadScope::Message, hold.head.position);
            }
        }
    }

    /// What the store says is held in this relay's shards.
    pub(super) async fn holds(&mut self) -> Vec<Hold> {
        self.store.holds(&self.owned).await.unwrap()
    }
}

/// A settlement in the making.
#[derive(Clone)]
pub(super) struct Plan {
    relay: RelayId,
    owned: Vec<OwnedShard>,
    parts: BTreeMap<Shard, ShardSettlement>,
}

impl Plan {
    pub(super) fn delivered(mut self, record: &Record) -> Self {
        self.part(record.shard).delivered.push(record.reference());
        self
    }

    pub(super) fn dead(mut self, record: &Record, attempts: u32, reason: &str) -> Self {
        self.part(record.shard).dead.push(Death {
            record: record.reference(),
            attempts,
            reason: reason.to_owned(),
        });
        self
    }

    pub(super) fn put(mut self, hold: Hold) -> Self {
        self.part(hold.shard).holds.push(HoldChange::Put(hold));
        self
    }

    pub(super) fn clear(mut self, hold: HoldRef) -> Self {
        self.part(hold.shard).holds.push(HoldChange::Clear(hold));
        self
    }

    pub(super) fn settlement(self) -> Settlement {
        Settlement {
            relay: self.relay,
            shards: self.parts.into_values().collect(),
        }
    }

    fn part(&mut self, shard: Shard) -> &mut ShardSettlement {
        let owned = self.owned.iter().find(|owned| owned.shard == shard);
        let epoch = owned
            .unwrap_or_else(|| panic!("a record of shard {shard} came, which is not owned"))
            .epoch;
        self.parts
            .entry(shard)
            .or_insert_with(|| ShardSettlement::new(shard, epoch))
    }
}

pub(super) const fn place(record: &Record) -> (Shard, Position) {
    (record.shard, record.position)
}

/// A hold on a record's key, or on the record itself when it has none.
pub(super) fn hold(record: &Record, attempts: u32, state: HoldState) -> Hold {
    Hold {
        shard: record.shard,
        scope: record
            .message
            .order_key()
            .map_or(HoldScope::Message, HoldScope::Key),
        head: record.reference(),
        attempts,
        state,
        reason: "it hiccups".to_owned(),
    }
}

/// A hold that is due in a long time.
pub(super) fn retrying(record: &Record, attempts: u32) -> Hold {
    hold(record, attempts, HoldState::Retrying { due_in: LONG })
}

/// What a message says.
pub(super) fn text(message: &Message) -> String {
    String::from_utf8_lossy(&content(message))
        .trim()
        .trim_matches('"')
        .to_owned()
}

/// The payload, or what a harness had to wrap.
fn content(message: &Message) -> Bytes {
    let payload = message.payload().cloned().unwrap_or_default();
    match json(&payload).as_ref().and_then(|object| object.get(CONTENT)) {
        Some(content) => content.to_string().into(),
        None => payload,
    }
}

/// The value of a payload; none if it is no JSON.
pub(super) fn json(payload: &[u8]) -> Option<serde_json::Value> {
    serde_json::from_slice(payload).ok()
}

/// What records say, in their order.
pub(super) fn texts(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| text(&record.message)).collect()
}

/// What records say, sorted.
pub(super) fn sorted(records: &[Record]) -> Vec<String> {
    let mut texts = texts(records);
    texts.sort_unstable();
    texts
}

/// What the records of a key say, in their order.
pub(super) fn of_key(records: &[Record], key: &str) -> Vec<String> {
    let of = |record: &&Record| record.message.key().map(AsRef::as_ref) == Some(key.as_bytes());
    records
        .iter()
        .filter(of)
        .map(|record| text(&record.message))
        .collect()
}

/// Texts `key1` to `key<count>`, as [`Bench::series`] makes them.
pub(super) fn numbered(key: &str, count: usize) -> Vec<String> {
    (1..=count).map(|number| format!("{key}{number}")).collect()
}

/// The ordering domain of a record that has a key.
pub(super) fn order_key(record: &Record) -> OrderKey {
    record
        .message
        .order_key()
        .unwrap_or_else(|| panic!("a message that was enqueued with a key came back without one"))
}
