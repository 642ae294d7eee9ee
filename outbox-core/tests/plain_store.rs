//! A store that can do next to nothing passes the suite: no scenario assumes what a store does not claim.

#![cfg(feature = "conformance")]
#![allow(clippy::unwrap_used, reason = "a panic in a test is a failure with a place")]

use std::sync::Arc;

use async_trait::async_trait;
use outbox_core::conformance::{CONTENT, StoreHarness, report_store};
use outbox_core::{
    Capabilities, DeadLetters, Error, ErrorKind, FetchRequest, Fetched, Hold, Inspection, LeaseRequest,
    Leases, Membership, MemoryConfig, MemoryStore, MemoryTransaction, Message, MessageId, OutboxStore,
    OwnedShard, Parking, Position, Reader, RelayId, Result, Retention, Scheduled, Settled, Settlement, Stats,
    WakeUp,
};

/// One topic, no keys or those in the payload, no headers, JSON only, whose text it writes anew, ids made of positions, no
/// power at all: an events table of old.
#[derive(Debug)]
struct PlainStore(MemoryStore, Keys);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keys {
    None,
    InPayload,
}

/// The member of the payload that is the key.
const KEY: &str = "order_id";

#[async_trait]
impl OutboxStore for PlainStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "plain",
            keys: self.1 == Keys::InPayload,
            fixed_topic: Some("events".into()),
            headers: false,
            content_types: false,
            tombstones: false,
            any_bytes: false,
            message_ids: false,
            ..self.0.capabilities()
        }
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        self.0.lease(request).await
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        self.0.release(relay, shards, membership).await
    }

    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>> {
        self.0.holds(shards).await
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        Ok(Box::new(PlainReader(self.0.reader().await?, self.1)))
    }

    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        let mut settlement = settlement.clone();
        let rows = self.0.pending();
        for part in &mut settlement.shards {
            let deaths = part.dead.iter_mut().map(|death| &mut death.record);
            for record in part.delivered.iter_mut().chain(deaths) {
                let row = rows.iter().find(|row| row.position == record.position);
                if let Some(row) = row.filter(|row| derived(row.position) == record.id) {
                    record.id = row.message.id();
                }
            }
        }
        self.0.settle(&settlement).await
    }

    async fn stats(&self) -> Result<Stats> {
        self.0.stats().await
    }

    fn dead_letters(&self) -> Option<&dyn DeadLetters> {
        None
    }

    fn scheduled(&self) -> Option<&dyn Scheduled> {
        None
    }

    fn retention(&self) -> Option<&dyn Retention> {
        None
    }

    fn parking(&self) -> Option<&dyn Parking> {
        None
    }

    fn inspection(&self) -> Option<&dyn Inspection> {
        None
    }

    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        None
    }
}

#[derive(Debug)]
struct PlainReader(Box<dyn Reader>, Keys);

#[async_trait]
impl Reader for PlainReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        let mut fetched = self.0.fetch(request).await?;
        if let Fetched::Batch { records, .. } = &mut fetched {
            for record in records {
                let mut parts = record.message.clone().into_parts();
                parts.id = derived(record.position);
                let value: serde_json::Value =
                    serde_json::from_slice(&parts.payload.unwrap_or_default()).unwrap();
                parts.key = key(&value, self.1).map(|key| key.to_owned().into());
                parts.payload = Some(serde_json::to_vec_pretty(&value).unwrap().into());
                record.message = Message::from_stored(parts);
            }
        }
        Ok(fetched)
    }
}

/// The id that stands for a position.
fn derived(position: Position) -> MessageId {
    let mut bytes = [0; 16];
    bytes[8..].copy_from_slice(&position.0.to_be_bytes());
    MessageId::from_bytes(bytes)
}

fn key(payload: &serde_json::Value, keys: Keys) -> Option<&str> {
    match keys {
        Keys::None => None,
        Keys::InPayload => payload.get(KEY)?.as_str(),
    }
}

struct Plain(MemoryStore);

struct Keyed(Plain);

#[async_trait]
impl StoreHarness for Plain {
    type Tx = MemoryTransaction;

    async fn fresh() -> Self {
        Self(MemoryStore::new(MemoryConfig {
            shards: 1,
            dead_letters: false,
            scheduled: false,
            ..MemoryConfig::default()
        }))
    }

    fn store(&self) -> Arc<dyn OutboxStore> {
        Arc::new(PlainStore(self.0.clone(), Keys::None))
    }

    async fn begin(&self) -> MemoryTransaction {
        self.0.begin()
    }

    async fn enqueue(&self, tx: &mut MemoryTransaction, messages: &[Message]) -> Result<()> {
        check(messages, Keys::None)?;
        self.0.enqueue_many(tx, messages).await
    }

    async fn commit(&self, tx: MemoryTransaction) {
        tx.commit();
    }

    async fn rollback(&self, tx: MemoryTransaction) {
        tx.rollback();
    }

    fn concurrent_transactions(&self) -> bool {
        false
    }
}

#[async_trait]
impl StoreHarness for Keyed {
    type Tx = MemoryTransaction;

    async fn fresh() -> Self {
        Self(Plain::fresh().await)
    }

    fn store(&self) -> Arc<dyn OutboxStore> {
        Arc::new(PlainStore(self.0.0.clone(), Keys::InPayload))
    }

    async fn begin(&self) -> MemoryTransaction {
        self.0.begin().await
    }

    async fn enqueue(&self, tx: &mut MemoryTransaction, messages: &[Message]) -> Result<()> {
        check(messages, Keys::InPayload)?;
        self.0.0.enqueue_many(tx, messages).await
    }

    async fn commit(&self, tx: MemoryTransaction) {
        tx.commit();
    }

    async fn rollback(&self, tx: MemoryTransaction) {
        tx.rollback();
    }

    fn concurrent_transactions(&self) -> bool {
        false
    }

    fn fit(&self, message: Message) -> Message {
        let mut parts = message.into_parts();
        if let (Some(key), Some(payload)) = (&parts.key, &parts.payload) {
            let content: serde_json::Value = serde_json::from_slice(payload).unwrap();
            let payload = serde_json::json!({ KEY: String::from_utf8_lossy(key), CONTENT: content });
            parts.payload = Some(payload.to_string().into());
        }
        Message::from_stored(parts)
    }
}

/// Refuses what an event is not.
fn check(messages: &[Message], keys: Keys) -> Result<()> {
    let held = |message: &Message| {
        let value: serde_json::Value = serde_json::from_slice(message.payload()?).ok()?;
        let key = key(&value, keys).map(str::as_bytes);
        let plain = message.headers().is_empty() && message.content_type().is_none();
        Some(message.topic() == "events" && message.key().map(AsRef::as_ref) == key && plain)
    };
    match messages.iter().all(|message| held(message) == Some(true)) {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Unsupported,
            "enqueue",
            "an event is JSON and nothing else",
        )),
    }
}

outbox_core::store_conformance!(Plain, plain, start_paused = true);
outbox_core::store_conformance!(Keyed, keyed, start_paused = true);

#[tokio::test]
async fn what_does_not_apply_is_named() {
    let missing = report_store::<Plain>().await;
    let why = |name: &str| missing.iter().find(|(own, _)| *own == name).map(|(_, why)| *why);
    assert_eq!(why("hold_stops_key"), Some("its messages have no keys"));
    assert_eq!(
        why("late_commit_without_successor"),
        Some("it has one writer at a time")
    );
    assert_eq!(why("dead_letter_keeps_whole"), Some("it keeps no dead letters"));
    assert_eq!(why("commit_makes_visible"), None);
    assert_eq!(why("deaths_are_refused_without_dead_letters"), None);
}
