//! What several tests need.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::sync::Arc;
use std::time::Duration;

use outbox_core::{
    FetchRequest, Fetched, Held, LeaseRequest, Message, OutboxStore, OwnedShard, Position, Reader, Record,
    RelayId, Settlement, Shard, ShardSettlement,
};
use outbox_sqlite::rusqlite::Connection;
use outbox_sqlite::{SqliteConfig, SqliteOutbox, SqliteStore, migrate};
use tempfile::TempDir;

/// A fresh outbox with a relay that owns its shard.
pub(crate) struct Place {
    pub(crate) config: SqliteConfig,
    pub(crate) store: SqliteStore,
    pub(crate) outbox: SqliteOutbox,
    pub(crate) relay: RelayId,
    dir: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(adjust: impl FnOnce(&mut SqliteConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = SqliteConfig::new(dir.path().join("app.db"));
        adjust(&mut config);
        migrate(&config).unwrap();
        Self {
            store: SqliteStore::open(config.clone()).unwrap(),
            outbox: SqliteOutbox::new(&config).unwrap(),
            relay: RelayId::new("relay"),
            config,
            dir,
        }
    }

    pub(crate) fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    pub(crate) fn connect(&self) -> Connection {
        Connection::open(&self.config.path).unwrap()
    }

    pub(crate) fn enqueue(&self, message: &Message) {
        self.outbox.enqueue(&self.connect(), message).unwrap();
    }

    pub(crate) async fn lease(&self) -> OwnedShard {
        let request = LeaseRequest {
            relay: self.relay.clone(),
            want: 1,
            ttl: Duration::from_secs(60),
        };
        self.store.lease(&request).await.unwrap().held[0]
    }

    pub(crate) async fn fetch(&self, max_rows: usize) -> Vec<Record> {
        let owned = self.lease().await;
        let mut reader = self.store.reader().await.unwrap();
        records(reader.fetch(&request(owned, max_rows)).await.unwrap()).0
    }

    pub(crate) async fn deliver(&self, owned: OwnedShard, records: &[Record]) {
        let mut part = ShardSettlement::new(owned.shard, owned.epoch);
        part.delivered = records.iter().map(Record::reference).collect();
        let settled = self.store.settle(&self.settlement(part)).await.unwrap();
        assert!(settled.lost.is_empty());
    }

    pub(crate) fn settlement(&self, part: ShardSettlement) -> Settlement {
        Settlement {
            relay: self.relay.clone(),
            shards: vec![part],
        }
    }
}

pub(crate) fn request(owned: OwnedShard, max_rows: usize) -> FetchRequest {
    FetchRequest {
        shards: vec![owned],
        in_flight: Vec::new(),
        held: Arc::new(Held::default()),
        reread: Vec::new(),
        max_rows,
        max_bytes: 1 << 30,
    }
}

pub(crate) fn in_flight(records: &[Record]) -> Vec<(Shard, Position)> {
    records
        .iter()
        .map(|record| (record.shard, record.position))
        .collect()
}

pub(crate) fn records(fetched: Fetched) -> (Vec<Record>, bool) {
    match fetched {
        Fetched::Batch { records, more } => (records, more),
        Fetched::Reset { reason } => panic!("reset: {reason}"),
    }
}

pub(crate) async fn fetch(reader: &mut Box<dyn Reader>, request: &FetchRequest) -> (Vec<Record>, bool) {
    records(reader.fetch(request).await.unwrap())
}

pub(crate) fn message(topic: &str, key: Option<&str>, payload: &str) -> Message {
    let mut builder = Message::builder(topic).payload(payload.to_owned());
    if let Some(key) = key {
        builder = builder.key(key.to_owned());
    }
    builder.build().unwrap()
}
