//! The application's side in PostgreSQL: producers whose transactions overlap, and a consumer that sums.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::path::Path;
use std::time::Duration;

use outbox::postgres::sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use outbox::postgres::sqlx::types::Uuid;
use outbox::postgres::sqlx::{self, AssertSqlSafe, Connection, Executor};
use outbox::postgres::{PostgresConfig, PostgresInbox, PostgresOutbox, PostgresStore};
use outbox::{Identifier, Message, MessageId, Ordering, OutboxStore, Receive};
use tokio::runtime::{Handle, Runtime};

use crate::proof::oracle::Arrived;
use crate::proof::writer::{End, Producer};
use crate::stage::database::{Database, Killable, interrupted};
use crate::stage::sampler::{Idle, Sampler, Sight};
use crate::stage::services::OwnServer;
use crate::stage::{say, until};

/// A schema of its own, which goes with it.
#[derive(Debug)]
pub(crate) struct Postgres<K> {
    config: PostgresConfig,
    /// How the application connects: its tables are found without their schema.
    options: PgConnectOptions,
    /// To look, and to consume.
    pool: PgPool,
    sampler: Sampler,
    server: Option<OwnServer>,
    runtime: Handle,
    kind: PhantomData<K>,
}

/// Which server, and which outbox.
pub(crate) trait Kind: Send + Sync {
    const OWN_SERVER: bool = false;
    const ORDERING: Ordering = Ordering::Insert;
}

/// On the server that all tests share.
#[derive(Debug)]
pub(crate) struct Shared;

impl Kind for Shared {}

/// The same, with messages that are numbered.
#[derive(Debug)]
pub(crate) struct Sequenced;

impl Kind for Sequenced {
    const ORDERING: Ordering = Ordering::Sequenced;
}

/// On a server of its own, which may be killed.
#[derive(Debug)]
pub(crate) struct Own;

impl Kind for Own {
    const OWN_SERVER: bool = true;
}

impl<K: Kind> Database for Postgres<K> {
    type Producer = PostgresProducer;

    const HOLD_EACH: usize = 50;

    /// One statement settles, and is a transaction by itself: it alone has an array of ids, as the protocol writes it.
    const COMMIT: &[u8] = &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x0b, 0x86];

    /// As `max_connections`, and the reader's.
    const CONNECTIONS: usize = 7;

    fn make(folder: &Path, runtime: &Runtime) -> Self {
        let server = K::OWN_SERVER.then(|| OwnServer::start("postgres", folder));
        let url = server
            .as_ref()
            .map_or_else(shared_server, |server| server.variable(""));
        let schema = format!("proof_{}_{:08x}", std::process::id(), fastrand::u32(..));
        // The relays are told from the application and the test by their application's name.
        let relays = format!("{schema}_relay");
        let mark = if url.contains('?') { '&' } else { '?' };
        let config = PostgresConfig {
            schema: Identifier::new(&schema).unwrap(),
            ordering: K::ORDERING,
            ..PostgresConfig::new(format!("{url}{mark}application_name={relays}"))
        };
        let options = url.parse::<PgConnectOptions>().unwrap();
        let options = options.options([("search_path", &schema)]);
        let pool = runtime.block_on(async {
            outbox::postgres::migrate(&config).await.unwrap();
            let pool = PgPoolOptions::new().connect_with(options.clone()).await.unwrap();
            pool.execute(
                "CREATE TABLE number (key text PRIMARY KEY, last bigint NOT NULL) WITH (fillfactor = 50); \
                 CREATE TABLE written (id uuid NOT NULL); \
                 CREATE TABLE effect (key text PRIMARY KEY, sum bigint NOT NULL)",
            )
            .await
            .unwrap();
            pool
        });
        Self {
            sampler: watch(options.clone(), relays),
            config,
            options,
            pool,
            server,
            runtime: runtime.handle().clone(),
            kind: PhantomData,
        }
    }

    fn configuration(&self) -> String {
        use outbox::postgres::secrecy::ExposeSecret;
        let ordering = match K::ORDERING {
            Ordering::Insert => "insert",
            Ordering::Sequenced => "sequenced",
        };
        format!(
            "type = \"postgres\"\nurl = {:?}\nschema = \"{}\"\nordering = \"{ordering}\"",
            self.config.url.expose_secret(),
            self.config.schema,
        )
    }

    fn configuration_by(&self, server: &str, place: &str) -> String {
        let configuration = self.configuration().replace(server, place);
        configuration.replace("application_name", "sslmode=disable&application_name")
    }

    fn store(&self) -> Box<dyn OutboxStore> {
        use outbox::postgres::secrecy::ExposeSecret;
        let url = self.config.url.expose_secret().replace("_relay", "_test");
        let config = PostgresConfig {
            url: url.into(),
            ..self.config.clone()
        };
        Box::new(self.runtime.block_on(PostgresStore::connect(config)).unwrap())
    }

    fn producer(&self) -> PostgresProducer {
        PostgresProducer {
            connection: None,
            options: self.options.clone(),
            outbox: PostgresOutbox::new(&self.config).unwrap(),
            faults: K::OWN_SERVER,
            runtime: self.runtime.clone(),
        }
    }

    fn backlog(&self) -> u64 {
        self.number("SELECT count(*) FROM outbox").unsigned_abs()
    }

    fn committed(&self, unknown: &[MessageId]) -> BTreeSet<MessageId> {
        let ids: Vec<Uuid> = unknown.iter().map(|id| id.as_uuid()).collect();
        let query = sqlx::query_scalar("SELECT id FROM written WHERE id = ANY ($1)").bind(ids);
        let committed: Vec<Uuid> = self.runtime.block_on(query.fetch_all(&self.pool)).unwrap();
        committed.into_iter().map(MessageId::from).collect()
    }

    fn connections(&self) -> usize {
        self.sampler.connections()
    }

    fn idle_in_transaction(&self) -> (Duration, String) {
        self.sampler.longest_idle()
    }

    /// Whoever asks for a lease has to wait, and looks at it again afterwards because it was written: what had only been
    /// locked would pass as it was before. A lease that ran out and that nobody took is safe to settle under.
    fn hold_settlements(&self, work: impl FnOnce()) {
        let mut tx = self.runtime.block_on(self.pool.begin()).unwrap();
        self.runtime.block_on(async {
            tx.execute("SELECT FROM outbox_lease ORDER BY shard FOR UPDATE")
                .await
                .unwrap();
            tx.execute("UPDATE outbox_lease SET until = until").await.unwrap();
        });
        work();
        self.runtime.block_on(tx.commit()).unwrap();
    }

    fn consume(&self, arrived: &[Arrived]) -> BTreeMap<String, u64> {
        let inbox = PostgresInbox::new(&self.config).unwrap();
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
                let (keys, sums): (Vec<String>, Vec<i64>) = fresh.into_iter().unzip();
                sqlx::query(
                    "INSERT INTO effect SELECT * FROM unnest($1::text[], $2::bigint[]) \
                     ON CONFLICT (key) DO UPDATE SET sum = effect.sum + excluded.sum",
                )
                .bind(keys)
                .bind(sums)
                .execute(&mut *tx)
                .await
                .unwrap();
                let ended = if batch.commit {
                    tx.commit().await
                } else {
                    tx.rollback().await
                };
                ended.unwrap();
            }
            let sums: Vec<(String, i64)> = sqlx::query_as("SELECT key, sum FROM effect")
                .fetch_all(&self.pool)
                .await
                .unwrap();
            sums.into_iter()
                .map(|(key, sum)| (key, sum.unsigned_abs()))
                .collect()
        })
    }
}

impl Killable for Postgres<Own> {
    /// As `pg_ctl stop -m immediate`: nothing is written down any more.
    fn kill(&self) {
        self.server.as_ref().unwrap().signal("QUIT");
    }

    fn restart(&self) {
        self.server.as_ref().unwrap().restart();
    }
}

impl<K> Postgres<K> {
    fn number(&self, sql: &'static str) -> i64 {
        self.runtime
            .block_on(sqlx::query_scalar(sql).fetch_one(&self.pool))
            .unwrap()
    }
}

/// What a failed test leaves behind tells why.
impl<K> Drop for Postgres<K> {
    fn drop(&mut self) {
        let schema = &self.config.schema;
        if std::thread::panicking() {
            return say(&format!("the schema {schema} is kept"));
        }
        let drop = format!("DROP SCHEMA \"{schema}\" CASCADE");
        let _ = self.runtime.block_on(self.pool.execute(AssertSqlSafe(drop)));
    }
}

/// Watches the connections of this application.
fn watch(options: PgConnectOptions, application: String) -> Sampler {
    let mut connection = None;
    Sampler::start(async move || {
        if connection.is_none() {
            connection = PgConnection::connect_with(&options).await.ok();
        }
        let sight = look(connection.as_mut()?, &application).await.ok();
        if sight.is_none() {
            connection = None;
        }
        sight
    })
}

async fn look(connection: &mut PgConnection, application: &str) -> sqlx::Result<Sight> {
    let (connections, idle, after): (i64, f64, String) = sqlx::query_as(
        "SELECT count(*) OVER (), \
                CASE WHEN state LIKE 'idle in transaction%' THEN extract(epoch FROM clock_timestamp() - state_change) \
                ELSE 0 END::float8 AS idle, query \
           FROM pg_stat_activity WHERE application_name = $1 \
         UNION ALL SELECT 0, 0, '' ORDER BY idle DESC, 1 DESC LIMIT 1",
    )
    .bind(application)
    .fetch_one(connection)
    .await?;
    Ok(Sight {
        connections: usize::try_from(connections).unwrap(),
        idle: Idle {
            time: Duration::from_secs_f64(idle.max(0.0)),
            after,
        },
    })
}

/// The server that all tests share.
fn shared_server() -> String {
    std::env::var("OUTBOX_TEST_POSTGRES").unwrap_or_else(|_| {
        panic!(
            "OUTBOX_TEST_POSTGRES is not set: run scripts/services start postgres; eval \"$(scripts/services env postgres)\""
        )
    })
}

/// One producer and its connection.
#[derive(Debug)]
pub(crate) struct PostgresProducer {
    /// None before the first transaction, and after a fault.
    connection: Option<PgConnection>,
    options: PgConnectOptions,
    outbox: PostgresOutbox,
    /// Whether faults are expected.
    faults: bool,
    runtime: Handle,
}

impl Producer for PostgresProducer {
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

impl PostgresProducer {
    async fn attempt(
        &self,
        connection: &mut PgConnection,
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
            let last: i64 = sqlx::query_scalar(
                "INSERT INTO number VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET last = number.last + 1 RETURNING last",
            )
            .bind(key)
            .fetch_one(&mut *tx)
            .await?;
            let message = message(key, last.unsigned_abs());
            ids.push(message.id().as_uuid());
            self.outbox.enqueue(&mut tx, &message).await?;
        }
        sqlx::query("INSERT INTO written SELECT unnest($1::uuid[])")
            .bind(ids)
            .execute(&mut *tx)
            .await?;
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
    fn connect(&self) -> PgConnection {
        // One that stands still at its start is started once more after a minute.
        let connected = until(Duration::from_secs(180), || {
            let connecting = PgConnection::connect_with(&self.options);
            match self.runtime.block_on(connecting) {
                Ok(connection) => Some(connection),
                Err(error) if !self.faults => panic!("a producer cannot connect: {error}"),
                Err(_) => None,
            }
        });
        connected.unwrap_or_else(|| panic!("the server does not come back"))
    }
}
