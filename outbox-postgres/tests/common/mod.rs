//! What several tests need: an outbox of its own on the real server.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use outbox_core::{
    FetchRequest, Fetched, Held, LeaseRequest, Message, OutboxStore, OwnedShard, Position, Reader, Record,
    RelayId, Settlement, Shard, ShardSettlement,
};
use outbox_postgres::sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};
use outbox_postgres::sqlx::{self, AssertSqlSafe, Connection, Executor};
use outbox_postgres::{Identifier, PostgresConfig, PostgresOutbox, PostgresStore, migrate};

/// The server that the environment names.
pub(crate) fn url() -> String {
    variable("OUTBOX_TEST_POSTGRES")
}

/// What the environment says of the servers.
pub(crate) fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run scripts/services start, then eval \"$(scripts/services env)\"")
    })
}

/// A name that no other test has.
pub(crate) fn unique(prefix: &str) -> String {
    format!("{prefix}_{}_{:08x}", std::process::id(), fastrand::u32(..))
}

/// A fresh outbox in a schema of its own, which goes with it.
pub(crate) struct Place {
    pub(crate) config: PostgresConfig,
    pub(crate) store: PostgresStore,
    pub(crate) outbox: PostgresOutbox,
    /// For producers and for looking.
    pub(crate) pool: PgPool,
    pub(crate) relay: RelayId,
    /// Where the administrator is served, without pooler or proxy.
    pub(crate) direct: String,
}

impl Place {
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(adjust: impl FnOnce(&mut PostgresConfig)) -> Self {
        Self::at(url(), adjust).await
    }

    /// The same on another server.
    pub(crate) async fn at(url: String, adjust: impl FnOnce(&mut PostgresConfig)) -> Self {
        let mut config = PostgresConfig {
            schema: Identifier::new(&unique("t")).unwrap(),
            ..PostgresConfig::new(&url)
        };
        adjust(&mut config);
        // The schema is always made without the pooler that may be under test.
        let direct = PostgresConfig {
            pooler: false,
            url: url.clone().into(),
            ..config.clone()
        };
        migrate(&direct).await.unwrap();
        Self {
            store: PostgresStore::connect(config.clone()).await.unwrap(),
            outbox: PostgresOutbox::new(&direct).unwrap(),
            pool: PgPoolOptions::new()
                .max_connections(20)
                .connect(&url)
                .await
                .unwrap(),
            relay: RelayId::new("relay"),
            config,
            direct: url,
        }
    }

    pub(crate) async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.direct).await.unwrap()
    }

    /// The quoted name of one of the outbox's tables.
    pub(crate) fn table(&self, suffix: &str) -> String {
        format!("\"{}\".\"{}{suffix}\"", self.config.schema, self.config.prefix)
    }

    /// Runs SQL in which `{}` is the outbox table.
    pub(crate) async fn sql(&self, text: &str) {
        self.pool.execute(AssertSqlSafe(self.named(text))).await.unwrap();
    }

    /// `text` with `{}` as the outbox table, and `{_x}` as the table with that suffix.
    pub(crate) fn named(&self, text: &str) -> String {
        let mut text = text.replace("{}", &self.table(""));
        for suffix in [
            "_hold",
            "_dead",
            "_scheduled",
            "_processed",
            "_lease",
            "_relay",
            "_sequence",
            "_inbox",
            "_meta",
            "_status",
            "_id_seq",
            "_enqueue_bytes",
            "_enqueue",
        ] {
            text = text.replace(&format!("{{{suffix}}}"), &self.table(suffix));
        }
        text
    }

    /// A number that SQL tells.
    pub(crate) async fn number(&self, text: &str) -> i64 {
        sqlx::query_scalar(AssertSqlSafe(self.named(text)))
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    pub(crate) async fn enqueue(&self, messages: &[Message]) {
        let mut connection = self.pool.acquire().await.unwrap();
        self.outbox.enqueue_many(&mut connection, messages).await.unwrap();
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

    /// Settles records as delivered.
    pub(crate) async fn deliver(&self, owned: &[OwnedShard], records: &[Record]) {
        let parts = delivered(owned, records);
        let settled = self.store.settle(&self.settlement(parts)).await.unwrap();
        assert!(settled.lost.is_empty());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let (schema, url) = (self.config.schema.clone(), self.direct.clone());
        // The test's own runtime may be at its end.
        let cleaning = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async move {
                let mut connection = PgConnection::connect(&url).await?;
                connection
                    .execute(AssertSqlSafe(format!(
                        "DROP SCHEMA IF EXISTS \"{schema}\" CASCADE"
                    )))
                    .await?;
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
            })
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

/// Runs SQL in the server's own shell.
pub(crate) fn psql(url: &str, sql: impl AsRef<[u8]>) -> Output {
    let mut shell = Command::new(format!("{}/psql", variable("OUTBOX_TEST_POSTGRES_BIN")))
        .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", "-", url])
        .env("PGCLIENTENCODING", "UTF8")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A shell that gave up reads no further.
    let _ = shell.stdin.take().unwrap().write_all(sql.as_ref());
    shell.wait_with_output().unwrap()
}

/// The same, which must succeed; what it printed.
pub(crate) fn done(url: &str, sql: &str) -> String {
    let output = psql(url, sql);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{sql}: {said}");
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
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
