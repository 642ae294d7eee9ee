//! What several tests need: an outbox of its own on a real server.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::sync::Arc;
use std::time::Duration;

use outbox_core::{
    FetchRequest, Fetched, Held, LeaseRequest, Message, OutboxStore, OwnedShard, Position, Record, RelayId,
    Settlement, Shard, ShardSettlement,
};
use outbox_mongo::mongodb::bson::{Document, doc};
use outbox_mongo::mongodb::options::{ReadConcern, WriteConcern};
use outbox_mongo::mongodb::{Client, ClientSession, Collection, Database};
use outbox_mongo::{MongoConfig, MongoOutbox, MongoStore, migrate};

/// Where the environment says the server is.
pub(crate) fn url() -> String {
    variable("OUTBOX_TEST_MONGO")
}

/// What the environment says of the server.
pub(crate) fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run scripts/services start, then eval \"$(scripts/services env)\"")
    })
}

/// The URL with another database.
pub(crate) fn database(url: &str, name: &str) -> String {
    let (server, rest) = url.rsplit_once('/').unwrap();
    match rest.split_once('?') {
        Some((_, options)) => format!("{server}/{name}?{options}"),
        None => format!("{server}/{name}"),
    }
}

/// A name that no other test has.
pub(crate) fn unique(prefix: &str) -> String {
    format!("{prefix}_{}_{:08x}", std::process::id(), fastrand::u32(..))
}

/// A fresh outbox in a database of its own, which goes with it.
pub(crate) struct Place {
    pub(crate) config: MongoConfig,
    pub(crate) store: MongoStore,
    pub(crate) outbox: MongoOutbox,
    /// For producers and for looking.
    pub(crate) client: Client,
    pub(crate) relay: RelayId,
    pub(crate) database: String,
    /// Where the server is, without proxy.
    pub(crate) direct: String,
}

impl Place {
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(adjust: impl FnOnce(&mut MongoConfig)) -> Self {
        Self::at(&url(), adjust).await
    }

    /// The same on another server.
    pub(crate) async fn at(server: &str, adjust: impl FnOnce(&mut MongoConfig)) -> Self {
        let name = unique("t");
        let url = database(server, &name);
        let mut config = MongoConfig::new(&url);
        adjust(&mut config);
        migrate(&config).await.unwrap();
        Self {
            store: MongoStore::connect(config.clone()).await.unwrap(),
            outbox: MongoOutbox::new(&config).unwrap(),
            client: client(&url).await,
            relay: RelayId::new("relay"),
            config,
            database: name,
            direct: url,
        }
    }

    pub(crate) fn db(&self) -> Database {
        self.client.database(&self.database)
    }

    /// One of the outbox's collections.
    pub(crate) fn collection(&self, suffix: &str) -> Collection<Document> {
        self.db().collection(&format!("{}{suffix}", self.config.prefix))
    }

    pub(crate) async fn begin(&self) -> ClientSession {
        let mut session = self.client.start_session().await.unwrap();
        session
            .start_transaction()
            .read_concern(ReadConcern::snapshot())
            .write_concern(WriteConcern::majority())
            .await
            .unwrap();
        session
    }

    pub(crate) async fn enqueue(&self, messages: &[Message]) {
        let mut session = self.begin().await;
        self.outbox.enqueue_many(&mut session, messages).await.unwrap();
        session.commit_transaction().await.unwrap();
    }

    pub(crate) async fn lease(&self) -> Vec<OwnedShard> {
        let request = LeaseRequest {
            relay: self.relay.clone(),
            want: self.store.capabilities().shards,
            ttl: Duration::from_secs(60),
        };
        self.store.lease(&request).await.unwrap().held
    }

    pub(crate) async fn fetch(&self, max_rows: usize) -> Vec<Record> {
        let owned = self.lease().await;
        let mut reader = self.store.reader().await.unwrap();
        records(reader.fetch(&request(&owned, max_rows)).await.unwrap()).0
    }

    pub(crate) fn settlement(&self, parts: Vec<ShardSettlement>) -> Settlement {
        Settlement {
            relay: self.relay.clone(),
            shards: parts,
        }
    }
}

/// A client as a producer has one.
pub(crate) async fn client(url: &str) -> Client {
    Client::with_uri_str(url).await.unwrap()
}

impl Drop for Place {
    fn drop(&mut self) {
        let (database, url) = (self.database.clone(), self.direct.clone());
        // The test's own runtime may be at its end.
        let cleaning = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(
                async move { Client::with_uri_str(&url).await?.database(&database).drop().await },
            )?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
        });
        let _ = cleaning.join();
    }
}

pub(crate) fn request(owned: &[OwnedShard], max_rows: usize) -> FetchRequest {
    FetchRequest {
        shards: owned.to_vec(),
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

pub(crate) fn delivered(owned: &[OwnedShard], records: &[Record]) -> Vec<ShardSettlement> {
    let epoch = |shard: Shard| owned.iter().find(|own| own.shard == shard).unwrap().epoch;
    let mut parts: Vec<ShardSettlement> = Vec::new();
    for record in records {
        let index = match parts.iter().position(|part| part.shard == record.shard) {
            Some(index) => index,
            None => {
                parts.push(ShardSettlement::new(record.shard, epoch(record.shard)));
                parts.len() - 1
            }
        };
        parts[index].delivered.push(record.reference());
    }
    parts
}

pub(crate) fn records(fetched: Fetched) -> (Vec<Record>, bool) {
    match fetched {
        Fetched::Batch { records, more } => (records, more),
        Fetched::Reset { reason } => panic!("reset: {reason}"),
    }
}

pub(crate) fn message(topic: &str, key: Option<&str>, payload: &str) -> Message {
    let mut builder = Message::builder(topic).payload(payload.to_owned());
    if let Some(key) = key {
        builder = builder.key(key.to_owned());
    }
    builder.build().unwrap()
}

/// The texts of records, in their order.
pub(crate) fn texts(records: &[Record]) -> Vec<String> {
    let text = |record: &Record| String::from_utf8_lossy(record.message.payload().unwrap()).into_owned();
    records.iter().map(text).collect()
}

/// Everything of a collection.
pub(crate) fn all() -> Document {
    doc! {}
}

/// Asks until there is an answer, for so long at most.
pub(crate) async fn until<T>(limit: Duration, mut ask: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let end = tokio::time::Instant::now() + limit;
    loop {
        let answer = ask().await;
        if answer.is_some() || tokio::time::Instant::now() > end {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
