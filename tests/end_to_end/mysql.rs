//! The application's side in MySQL or MariaDB: producers whose transactions overlap, and a consumer that sums.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::path::Path;
use std::time::{Duration, Instant};

use outbox::mysql::sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlPool, MySqlPoolOptions};
use outbox::mysql::sqlx::{self, AssertSqlSafe, Connection, Executor};
use outbox::mysql::{MysqlConfig, MysqlInbox, MysqlOutbox, MysqlStore};
use outbox::{Message, MessageId, Ordering, OutboxStore, Receive};
use tokio::runtime::{Handle, Runtime};

use crate::proof::oracle::Arrived;
use crate::proof::writer::{End, Producer};
use crate::stage::database::{Database, Killable, interrupted};
use crate::stage::sampler::{Idle, Sampler, Sight};
use crate::stage::services::OwnServer;
use crate::stage::{KEYS, from_environment, say, until};

/// A database of its own, which goes with it.
#[derive(Debug)]
pub(crate) struct Mysql<K> {
    config: MysqlConfig,
    /// How the application connects.
    options: MySqlConnectOptions,
    /// The account by which the relays are told from the application and the test.
    relays: String,
    /// To look, and to consume.
    pool: MySqlPool,
    sampler: Sampler,
    server: Option<OwnServer>,
    runtime: Handle,
    kind: PhantomData<K>,
}

/// Which server, and which outbox.
pub(crate) trait Kind: Send + Sync {
    /// As `scripts/services` calls it.
    const SERVER: &str;
    /// Whether it is one of the test's own, which may be killed.
    const OWN_SERVER: bool = false;
    const ORDERING: Ordering = Ordering::Insert;
}

macro_rules! kinds {
    ($($name:ident: $($constant:ident = $value:expr),+;)+) => {$(
        #[derive(Debug)]
        pub(crate) struct $name;

        impl Kind for $name {
            $(kinds!(@ $constant = $value);)+
        }
    )+};
    (@ SERVER = $value:expr) => { const SERVER: &str = $value; };
    (@ OWN_SERVER = $value:expr) => { const OWN_SERVER: bool = $value; };
    (@ ORDERING = $value:expr) => { const ORDERING: Ordering = $value; };
}

kinds! {
    Shared: SERVER = "mysql";
    Sequenced: SERVER = "mysql", ORDERING = Ordering::Sequenced;
    Own: SERVER = "mysql", OWN_SERVER = true;
    SharedMariadb: SERVER = "mariadb";
    SequencedMariadb: SERVER = "mariadb", ORDERING = Ordering::Sequenced;
    OwnMariadb: SERVER = "mariadb", OWN_SERVER = true;
}

impl<K: Kind> Database for Mysql<K> {
    type Producer = MysqlProducer;

    const HOLD_EACH: usize = 50;

    /// As `max_connections`, and the reader's.
    const CONNECTIONS: usize = 7;

    fn make(folder: &Path, runtime: &Runtime) -> Self {
        let server = K::OWN_SERVER.then(|| OwnServer::start(K::SERVER, folder));
        let url = server
            .as_ref()
            .map_or_else(|| shared_server(K::SERVER), |server| server.variable(""));
        let database = format!("proof_{}_{:08x}", std::process::id(), fastrand::u32(..));
        let relays = format!("r_{:08x}", fastrand::u32(..));
        let (server_url, _) = url.rsplit_once('/').unwrap();
        let url = format!("{server_url}/{database}");
        let config = MysqlConfig {
            ordering: K::ORDERING,
            ..MysqlConfig::new(&url)
        };
        let options = url.parse::<MySqlConnectOptions>().unwrap();
        let pool = runtime.block_on(async {
            let mut admin = MySqlConnection::connect(&format!("{server_url}/mysql"))
                .await
                .unwrap();
            let making = format!(
                "CREATE DATABASE `{database}`; CREATE USER '{relays}'@'%' IDENTIFIED BY ''; \
                 GRANT ALL ON `{database}`.* TO '{relays}'@'%'"
            );
            admin.execute(AssertSqlSafe(making)).await.unwrap();
            outbox::mysql::migrate(&config).await.unwrap();
            let pool = MySqlPoolOptions::new()
                .connect_with(options.clone())
                .await
                .unwrap();
            pool.execute(
                "CREATE TABLE number (`key` VARCHAR(64) PRIMARY KEY, last BIGINT NOT NULL); \
                 CREATE TABLE written (n BIGINT AUTO_INCREMENT PRIMARY KEY, id BINARY(16) NOT NULL); \
                 CREATE TABLE effect (`key` VARCHAR(64) PRIMARY KEY, sum BIGINT NOT NULL)",
            )
            .await
            .unwrap();
            // Two that insert new keys beside each other may be in a deadlock by themselves, which would be the relay's
            // fault by all appearances.
            let keys = from_environment("OUTBOX_PROOF_KEYS", KEYS);
            let numbers: Vec<String> = (0..keys).map(|key| format!("('k{key}', 0)")).collect();
            let numbers = format!("INSERT INTO number VALUES {}", numbers.join(","));
            pool.execute(AssertSqlSafe(numbers)).await.unwrap();
            pool
        });
        Self {
            sampler: watch(options.clone(), relays.clone()),
            config,
            options,
            relays,
            pool,
            server,
            runtime: runtime.handle().clone(),
            kind: PhantomData,
        }
    }

    fn configuration(&self) -> String {
        use outbox::mysql::secrecy::ExposeSecret;
        let ordering = match K::ORDERING {
            Ordering::Insert => "insert",
            Ordering::Sequenced => "sequenced",
        };
        let url = self.config.url.expose_secret();
        let (_, place) = url.rsplit_once('@').unwrap();
        format!(
            "type = \"mysql\"\nurl = \"mysql://{}@{place}\"\nordering = \"{ordering}\"",
            self.relays
        )
    }

    fn configuration_by(&self, server: &str, place: &str) -> String {
        let configuration = self.configuration().replace(server, place);
        configuration.replace("\"\nordering", "?ssl-mode=DISABLED\"\nordering")
    }

    fn store(&self) -> Box<dyn OutboxStore> {
        Box::new(
            self.runtime
                .block_on(MysqlStore::connect(self.config.clone()))
                .unwrap(),
        )
    }

    fn producer(&self) -> MysqlProducer {
        MysqlProducer {
            connection: None,
            options: self.options.clone(),
            outbox: MysqlOutbox::new(&self.config).unwrap(),
            faults: K::OWN_SERVER,
            runtime: self.runtime.clone(),
        }
    }

    fn backlog(&self) -> u64 {
        self.number("SELECT count(*) FROM outbox").unsigned_abs()
    }

    fn committed(&self, unknown: &[MessageId]) -> BTreeSet<MessageId> {
        self.runtime.block_on(async {
            let mut committed = BTreeSet::new();
            for id in unknown {
                let query = sqlx::query_scalar("SELECT COUNT(*) FROM written WHERE id = ?");
                let found: i64 = query
                    .bind(&id.as_bytes()[..])
                    .fetch_one(&self.pool)
                    .await
                    .unwrap();
                if found > 0 {
                    committed.insert(*id);
                }
            }
            committed
        })
    }

    fn connections(&self) -> usize {
        self.sampler.connections()
    }

    fn idle_in_transaction(&self) -> (Duration, String) {
        self.sampler.longest_idle()
    }

    /// Whoever asks for a lease has to wait, and looks at its end afterwards.
    fn hold_settlements(&self, work: impl FnOnce()) {
        let mut tx = self.runtime.block_on(self.pool.begin()).unwrap();
        self.runtime
            .block_on(tx.execute("SELECT shard FROM outbox_lease ORDER BY shard FOR UPDATE"))
            .unwrap();
        work();
        self.runtime.block_on(tx.commit()).unwrap();
    }

    fn consume(&self, arrived: &[Arrived]) -> BTreeMap<String, u64> {
        let inbox = MysqlInbox::new(&self.config).unwrap();
        self.runtime.block_on(async {
            for batch in interrupted(arrived) {
                let mut tx = self.pool.begin().await.unwrap();
                let mut fresh: BTreeMap<String, i64> = BTreeMap::new();
                for stamp in batch.records.iter().filter_map(Arrived::stamp) {
                    // First the note, then the effect.
                    if inbox.receive(&mut tx, "sums", stamp.id).await.unwrap() == Receive::Fresh {
                        *fresh.entry(stamp.key).or_default() += stamp.n.cast_signed();
                    }
                }
                for (key, sum) in fresh {
                    sqlx::query(
                        "INSERT INTO effect VALUES (?, ?) ON DUPLICATE KEY UPDATE sum = effect.sum + VALUES(sum)",
                    )
                    .bind(key)
                    .bind(sum)
                    .execute(&mut *tx)
                    .await
                    .unwrap();
                }
                let ended = if batch.commit {
                    tx.commit().await
                } else {
                    tx.rollback().await
                };
                ended.unwrap();
            }
            let sums: Vec<(String, i64)> = sqlx::query_as("SELECT `key`, sum FROM effect")
                .fetch_all(&self.pool)
                .await
                .unwrap();
            sums.into_iter()
                .map(|(key, sum)| (key, sum.unsigned_abs()))
                .collect()
        })
    }
}

macro_rules! killable {
    ($($kind:ty),+) => {$(
        impl Killable for Mysql<$kind> {
            fn kill(&self) {
                self.server.as_ref().unwrap().signal("KILL");
            }

            fn restart(&self) {
                self.server.as_ref().unwrap().restart();
            }
        }
    )+};
}

killable!(Own, OwnMariadb);

impl<K> Mysql<K> {
    fn number(&self, sql: &'static str) -> i64 {
        self.runtime
            .block_on(sqlx::query_scalar(sql).fetch_one(&self.pool))
            .unwrap()
    }
}

/// What a failed test leaves behind tells why.
impl<K> Drop for Mysql<K> {
    fn drop(&mut self) {
        let database = self.options.get_database().unwrap_or_default();
        if std::thread::panicking() {
            return say(&format!("the database {database} is kept"));
        }
        let drop = format!("DROP USER '{}'@'%'; DROP DATABASE `{database}`", self.relays);
        let _ = self.runtime.block_on(self.pool.execute(AssertSqlSafe(drop)));
    }
}

/// Watches the connections of this account. For how long a transaction has been idle the servers do not tell, but from
/// look to look it is the same one.
fn watch(options: MySqlConnectOptions, account: String) -> Sampler {
    let mut connection = None;
    let mut idle = BTreeMap::<(u64, String), Instant>::new();
    Sampler::start(async move || {
        if connection.is_none() {
            connection = MySqlConnection::connect_with(&options).await.ok();
        }
        match look(connection.as_mut()?, &account).await {
            Ok((connections, now)) => {
                idle.retain(|transaction, _| now.contains(transaction));
                for transaction in now {
                    idle.entry(transaction).or_insert_with(Instant::now);
                }
                let oldest = idle.iter().min_by_key(|(_, since)| **since);
                Some(Sight {
                    connections,
                    idle: oldest.map_or_else(Idle::default, |((_, transaction), since)| Idle {
                        time: since.elapsed(),
                        after: transaction.clone(),
                    }),
                })
            }
            Err(_) => {
                connection = None;
                None
            }
        }
    })
}

/// How many connections the account has, and which of them idle in which transaction. Not from `innodb_trx`: that is a
/// copy, which grows older for as long as somebody looks at it every few milliseconds.
async fn look(
    connection: &mut MySqlConnection,
    account: &str,
) -> sqlx::Result<(usize, BTreeSet<(u64, String)>)> {
    let rows: Vec<(u64, Option<String>)> = sqlx::query_as(
        "SELECT t.thread_id, CAST(IF(t.processlist_command = 'Sleep', CONCAT(e.event_id, ' of thread ', t.thread_id), NULL) \
             AS CHAR) \
         FROM performance_schema.threads t LEFT JOIN performance_schema.events_transactions_current e \
             ON e.thread_id = t.thread_id AND e.state = 'ACTIVE' AND e.autocommit = 'NO' \
         WHERE t.processlist_user = ?",
    )
    .bind(account)
    .fetch_all(connection)
    .await?;
    let idle = rows
        .iter()
        .filter_map(|(thread, transaction)| Some((*thread, transaction.clone()?)))
        .collect();
    Ok((rows.len(), idle))
}

/// The server that all tests share.
fn shared_server(name: &str) -> String {
    let variable = format!("OUTBOX_TEST_{}", name.to_uppercase());
    std::env::var(&variable).unwrap_or_else(|_| {
        panic!("{variable} is not set: run scripts/services start {name}; eval \"$(scripts/services env {name})\"")
    })
}

/// One producer and its connection.
#[derive(Debug)]
pub(crate) struct MysqlProducer {
    /// None before the first transaction, and after a fault.
    connection: Option<MySqlConnection>,
    options: MySqlConnectOptions,
    outbox: MysqlOutbox,
    /// Whether faults are expected.
    faults: bool,
    runtime: Handle,
}

impl Producer for MysqlProducer {
    fn transact(
        &mut self,
        keys: &[String],
        message: &mut dyn FnMut(&str, u64) -> Message,
        wait: Duration,
        commit: bool,
    ) -> End {
        let mut connection = self.connection.take().unwrap_or_else(|| self.connect());
        let mut committing = false;
        let attempt = self.attempt(&mut connection, keys, message, wait, commit, &mut committing);
        match self.runtime.clone().block_on(attempt) {
            Ok(end) => {
                self.connection = Some(connection);
                end
            }
            Err(error) if !self.faults => panic!("a producer failed: {error}"),
            // Only a commit that has no answer can have succeeded.
            Err(_) if committing => End::Unknown,
            Err(_) => End::RolledBack,
        }
    }
}

impl MysqlProducer {
    async fn attempt(
        &self,
        connection: &mut MySqlConnection,
        keys: &[String],
        message: &mut dyn FnMut(&str, u64) -> Message,
        wait: Duration,
        commit: bool,
        committing: &mut bool,
    ) -> Result<End, Box<dyn std::error::Error>> {
        let mut tx = connection.begin().await?;
        let mut ids = Vec::with_capacity(keys.len());
        for key in keys {
            // Locked until the end, and before the message gets its place.
            let drawn = sqlx::query(
                "INSERT INTO number VALUES (?, LAST_INSERT_ID(1)) ON DUPLICATE KEY UPDATE last = LAST_INSERT_ID(last + 1)",
            )
            .bind(key)
            .execute(&mut *tx)
            .await?;
            let message = message(key, drawn.last_insert_id());
            ids.push(message.id());
            self.outbox.enqueue(&mut tx, &message).await?;
        }
        for id in ids {
            let query = sqlx::query("INSERT INTO written (id) VALUES (?)");
            query.bind(&id.as_bytes()[..]).execute(&mut *tx).await?;
        }
        tokio::time::sleep(wait).await;
        if !commit {
            tx.rollback().await?;
            return Ok(End::RolledBack);
        }
        *committing = true;
        tx.commit().await?;
        Ok(End::Committed)
    }

    /// Connects, as soon as the server lets it.
    fn connect(&self) -> MySqlConnection {
        // One that stands still at its start is started once more after a minute.
        let connected = until(Duration::from_secs(180), || {
            let connecting = MySqlConnection::connect_with(&self.options);
            match self.runtime.block_on(connecting) {
                Ok(connection) => Some(connection),
                Err(error) if !self.faults => panic!("a producer cannot connect: {error}"),
                Err(_) => None,
            }
        });
        connected.unwrap_or_else(|| panic!("the server does not come back"))
    }
}
