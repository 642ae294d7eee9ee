//! What several tests need: an outbox of its own on a real server.
#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each test file uses a part of it"
)]
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
use outbox_mysql::sqlx::mysql::{MySqlConnection, MySqlPool, MySqlPoolOptions};
use outbox_mysql::sqlx::{self, AssertSqlSafe, Connection, Executor};
use outbox_mysql::{MysqlConfig, MysqlOutbox, MysqlStore, migrate};

/// The two servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Server {
    Mysql,
    Mariadb,
}

pub(crate) const SERVERS: [Server; 2] = [Server::Mysql, Server::Mariadb];

/// Makes a test for each server of functions that take one.
macro_rules! on_each_server {
    ($($name:ident),+ $(,)?) => {
        on_each_server!(@ mysql, Mysql, $($name),+);
        on_each_server!(@ mariadb, Mariadb, $($name),+);
    };
    (@ $server:ident, $variant:ident, $($name:ident),+) => {
        mod $server {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    super::$name(super::common::Server::$variant).await;
                }
            )+
        }
    };
}
pub(crate) use on_each_server;

impl Server {
    const fn name(self) -> &'static str {
        match self {
            Self::Mysql => "OUTBOX_TEST_MYSQL",
            Self::Mariadb => "OUTBOX_TEST_MARIADB",
        }
    }

    /// Where the environment says it is, for its administrator.
    pub(crate) fn url(self) -> String {
        variable(self.name())
    }

    /// The same, in another database.
    pub(crate) fn database(self, name: &str) -> String {
        database(&self.url(), name)
    }

    /// What else the environment says of it: `_CA`, `_USER`, `_PASSWORD`, `_PID`, `_BIN`.
    pub(crate) fn told(self, suffix: &str) -> String {
        variable(&format!("{}{suffix}", self.name()))
    }
}

/// A URL with another database.
fn database(url: &str, name: &str) -> String {
    let (server, _) = url.rsplit_once('/').unwrap();
    format!("{server}/{name}")
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

/// A fresh outbox in a database of its own, which goes with it.
pub(crate) struct Place {
    pub(crate) server: Server,
    pub(crate) config: MysqlConfig,
    pub(crate) store: MysqlStore,
    pub(crate) outbox: MysqlOutbox,
    /// For producers and for looking.
    pub(crate) pool: MySqlPool,
    pub(crate) relay: RelayId,
    pub(crate) database: String,
    /// Where its administrator is served, without proxy.
    pub(crate) direct: String,
}

impl Place {
    pub(crate) async fn new(server: Server) -> Self {
        Self::with(server, |_| {}).await
    }

    pub(crate) async fn with(server: Server, adjust: impl FnOnce(&mut MysqlConfig)) -> Self {
        Self::at(server, &server.url(), adjust).await
    }

    /// The same on another server of this kind.
    pub(crate) async fn at(
        server: Server,
        administrator: &str,
        adjust: impl FnOnce(&mut MysqlConfig),
    ) -> Self {
        let name = unique("t");
        let mut connection = MySqlConnection::connect(administrator).await.unwrap();
        let made = format!("CREATE DATABASE `{name}`");
        connection.execute(AssertSqlSafe(made)).await.unwrap();
        let url = database(administrator, &name);
        let mut config = MysqlConfig::new(&url);
        adjust(&mut config);
        migrate(&config).await.unwrap();
        Self {
            server,
            store: MysqlStore::connect(config.clone()).await.unwrap(),
            outbox: MysqlOutbox::new(&config).unwrap(),
            pool: MySqlPoolOptions::new()
                .max_connections(20)
                .connect(&url)
                .await
                .unwrap(),
            relay: RelayId::new("relay"),
            config,
            database: name,
            direct: url,
        }
    }

    pub(crate) async fn connect(&self) -> MySqlConnection {
        MySqlConnection::connect(&self.direct).await.unwrap()
    }

    /// The quoted name of one of the outbox's tables.
    pub(crate) fn table(&self, suffix: &str) -> String {
        format!("`{}{suffix}`", self.config.prefix)
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
        let (database, url) = (self.database.clone(), self.direct.clone());
        // The test's own runtime may be at its end.
        let cleaning = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async move {
                let mut connection = MySqlConnection::connect(&url).await?;
                connection
                    .execute(AssertSqlSafe(format!("DROP DATABASE IF EXISTS `{database}`")))
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
pub(crate) fn shell(server: Server, url: &str, sql: impl AsRef<[u8]>) -> Output {
    let program = match server {
        Server::Mysql => "mysql",
        Server::Mariadb => "mariadb",
    };
    let rest = url.strip_prefix("mysql://").unwrap();
    let (account, place) = rest.rsplit_once('@').unwrap();
    let (user, password) = account.split_once(':').unwrap_or((account, ""));
    let (address, database) = place.split_once('/').unwrap();
    let (host, port) = address.split_once(':').unwrap();
    let mut shell = Command::new(format!("{}/{program}", server.told("_BIN")))
        .args(["--no-defaults", "-N", "-B", "--default-character-set=utf8mb4"])
        .args(["-h", host, "-P", port, "-u", user, database])
        .env("MYSQL_PWD", password)
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
pub(crate) fn done(server: Server, url: &str, sql: &str) -> String {
    let output = shell(server, url, sql);
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
