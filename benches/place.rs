//! Where messages wait: a fresh outbox for each measurement, and the baselines' table beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use outbox::postgres::sqlx::postgres::{PgPool, PgPoolOptions};
use outbox::postgres::sqlx::{AssertSqlSafe, Row};
use outbox::postgres::{PostgresConfig, PostgresStore};
use outbox::sqlite::rusqlite::{self, Connection, params};
use outbox::sqlite::{SqliteConfig, SqliteStore};
use outbox::{Identifier, MemoryStore, Message, OutboxStore};
use serde::{Deserialize, Serialize};

use crate::ledger::{DIGITS, Flow};
use crate::results::{Outcome, Postgres};

/// The kinds of stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Store {
    Postgres,
    Sqlite,
    Memory,
}

impl Store {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Sqlite => "sqlite",
            Self::Memory => "memory",
        }
    }
}

/// A database of the run's own, or a folder, which goes with it.
pub(crate) struct Server {
    pub(crate) store: Store,
    /// PostgreSQL as its administrator, and the run's database there.
    postgres: Option<(PgPool, String, PgPool, String)>,
    folder: tempfile::TempDir,
}

impl Server {
    pub(crate) async fn start(store: Store, url: Option<&str>) -> Outcome<Self> {
        let postgres = match (store, url) {
            (Store::Postgres, Some(url)) => {
                let admin = PgPoolOptions::new().max_connections(1).connect(url).await?;
                let database = format!("outbox_bench_{}", std::process::id());
                run(&admin, format!("CREATE DATABASE {database}")).await?;
                let url = in_database(url, &database)?;
                let pool = PgPoolOptions::new().max_connections(48).connect(&url).await?;
                Some((admin, database, pool, url))
            }
            (Store::Postgres, None) => {
                return Err("OUTBOX_TEST_POSTGRES is not set: see scripts/services".into());
            }
            _ => None,
        };
        Ok(Self {
            store,
            postgres,
            folder: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?,
        })
    }

    /// A fresh outbox.
    pub(crate) async fn place(&self) -> Outcome<Place> {
        let name = format!("m{}", outbox::MessageId::new().as_uuid().simple());
        Ok(match (self.store, &self.postgres) {
            (Store::Postgres, Some((_, _, pool, url))) => {
                let (pool, url) = (pool.clone(), url.clone());
                let spec = Spec::Postgres { url, schema: name };
                outbox::postgres::migrate(&spec.postgres()?).await?;
                Place {
                    spec,
                    pool: Some(pool),
                }
            }
            (Store::Sqlite, _) => {
                let spec = Spec::Sqlite {
                    path: self.folder.path().join(name),
                };
                outbox::sqlite::migrate(&spec.sqlite()?)?;
                Place { spec, pool: None }
            }
            _ => Place {
                spec: Spec::Memory { filled: None },
                pool: None,
            },
        })
    }

    /// What the server says of itself.
    pub(crate) async fn describe(&self) -> Outcome<Option<Postgres>> {
        let Some((_, _, pool, _)) = &self.postgres else {
            return Ok(None);
        };
        let names = ["server_version", "fsync", "synchronous_commit", "shared_buffers"];
        let mut values = Vec::new();
        for name in names {
            let row = outbox::postgres::sqlx::query("SELECT current_setting($1)")
                .bind(name)
                .fetch_one(pool)
                .await?;
            values.push(row.try_get::<String, _>(0)?);
        }
        let mut values = values.into_iter();
        let mut next = || values.next().unwrap_or_default();
        Ok(Some(Postgres {
            version: next(),
            fsync: next(),
            synchronous_commit: next(),
            shared_buffers: next(),
        }))
    }

    /// Nothing of the run stays.
    pub(crate) async fn remove(self) -> Outcome<()> {
        if let Some((admin, database, pool, _)) = self.postgres {
            // Connections of a measurement that was cut short would keep it.
            let closing = tokio::time::timeout(Duration::from_secs(2), pool.close());
            let _ = closing.await;
            run(&admin, format!("DROP DATABASE {database} WITH (FORCE)")).await?;
        }
        Ok(())
    }
}

/// The same server's URL with another database.
fn in_database(url: &str, database: &str) -> Outcome<String> {
    let (base, query) = url
        .split_once('?')
        .map_or((url, String::new()), |(base, query)| (base, format!("?{query}")));
    let (server, _) = base
        .rsplit_once('/')
        .ok_or("the URL of PostgreSQL names no database")?;
    Ok(format!("{server}/{database}{query}"))
}

/// Runs text of our own.
async fn run(pool: &PgPool, text: String) -> Outcome<()> {
    outbox::postgres::sqlx::raw_sql(AssertSqlSafe(text))
        .execute(pool)
        .await?;
    Ok(())
}

/// An outbox, as another process can open it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Spec {
    Postgres {
        url: String,
        schema: String,
    },
    Sqlite {
        path: PathBuf,
    },
    /// Filled by who opens it: with so many messages, for a topic.
    Memory {
        filled: Option<(Flow, u64, String)>,
    },
}

impl Spec {
    pub(crate) fn postgres(&self) -> Outcome<PostgresConfig> {
        let Self::Postgres { url, schema } = self else {
            return Err("this needs PostgreSQL".into());
        };
        Ok(PostgresConfig {
            schema: Identifier::new(schema)?,
            ..PostgresConfig::new(url.clone())
        })
    }

    pub(crate) fn sqlite(&self) -> Outcome<SqliteConfig> {
        let Self::Sqlite { path } = self else {
            return Err("this needs SQLite".into());
        };
        Ok(SqliteConfig::new(path))
    }

    pub(crate) async fn open(&self) -> Outcome<Arc<dyn OutboxStore>> {
        Ok(match self {
            Self::Postgres { .. } => Arc::new(PostgresStore::connect(self.postgres()?).await?),
            Self::Sqlite { .. } => Arc::new(SqliteStore::open(self.sqlite()?)?),
            Self::Memory { filled } => {
                let store = MemoryStore::default();
                if let Some((flow, messages, topic)) = filled {
                    let all: Vec<Message> = (0..*messages)
                        .map(|n| {
                            Message::builder(topic.as_str())
                                .key(flow.key(n).to_string())
                                .payload(flow.payload(n))
                                .build()
                        })
                        .collect::<Result<_, _>>()?;
                    let mut tx = store.begin();
                    store.enqueue_many(&mut tx, &all).await?;
                    tx.commit();
                }
                Arc::new(store)
            }
        })
    }

    /// A table, quoted.
    pub(crate) fn table(&self, name: &str) -> String {
        match self {
            Self::Postgres { schema, .. } => format!("\"{schema}\".\"{name}\""),
            _ => format!("\"{name}\""),
        }
    }
}

/// An outbox, as the run fills it.
pub(crate) struct Place {
    pub(crate) spec: Spec,
    pool: Option<PgPool>,
}

/// The table of the baselines: what most people write first.
pub(crate) const QUEUE: &str = "queue";

impl Place {
    pub(crate) fn pool(&self) -> Outcome<&PgPool> {
        self.pool.as_ref().ok_or_else(|| "this needs PostgreSQL".into())
    }

    /// Makes the baselines' table, with the one index that their claims need.
    pub(crate) async fn make_queue(&self) -> Outcome<()> {
        let queue = self.spec.table(QUEUE);
        let text = format!(
            "CREATE TABLE {queue} (id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY, \
             message_id uuid NOT NULL DEFAULT gen_random_uuid(), topic text NOT NULL, key bytea, payload bytea, \
             created_at timestamptz NOT NULL DEFAULT clock_timestamp(), claimed_at timestamptz, processed_at timestamptz); \
             CREATE INDEX ON {queue} (id) WHERE processed_at IS NULL"
        );
        run(self.pool()?, text).await
    }

    /// Enqueues the messages `numbers`, in order, in one transaction.
    pub(crate) async fn fill(
        &mut self,
        table: &str,
        topic: &str,
        flow: Flow,
        numbers: std::ops::Range<u64>,
    ) -> Outcome<()> {
        let (from, to) = (i64::try_from(numbers.start)?, i64::try_from(numbers.end)? - 1);
        let (apart, keys) = (i64::try_from(flow.apart)?, i64::try_from(flow.keys)?);
        let rest = i64::try_from(flow.size - DIGITS)?;
        let name = self.spec.table(table);
        match &mut self.spec {
            Spec::Postgres { .. } => {
                let text = format!(
                    "INSERT INTO {name} (topic, key, payload) \
                     SELECT $1, convert_to((CASE WHEN n < $4 THEN $5 ELSE n % $5 END)::text, 'UTF8'), \
                            convert_to(lpad(n::text, {DIGITS}, '0') || repeat('x', $6::int), 'UTF8') \
                       FROM generate_series($2::bigint, $3::bigint) n"
                );
                outbox::postgres::sqlx::query(AssertSqlSafe(text))
                    .bind(topic)
                    .bind(from)
                    .bind(to)
                    .bind(apart)
                    .bind(keys)
                    .bind(rest)
                    .execute(self.pool()?)
                    .await?;
            }
            Spec::Sqlite { path } => {
                let text = format!(
                    "WITH RECURSIVE numbers(n) AS (SELECT ?2 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?3) \
                     INSERT INTO {name} (topic, key, payload) \
                     SELECT ?1, CAST(CASE WHEN n < ?4 THEN ?5 ELSE n % ?5 END AS BLOB), \
                            CAST(printf('%0{DIGITS}d', n) || ?6 AS BLOB) FROM numbers"
                );
                let padding = "x".repeat(flow.size - DIGITS);
                tokio::task::block_in_place(|| {
                    connect(path)?.execute(&text, params![topic, from, to, apart, keys, padding])
                })?;
            }
            Spec::Memory { filled } => *filled = Some((flow, numbers.end, topic.to_owned())),
        }
        Ok(())
    }

    /// As it would be found after a while: counted, clean, and nothing left to be written.
    pub(crate) async fn calm(&self) -> Outcome<()> {
        match &self.spec {
            Spec::Postgres { schema, .. } => {
                let pool = self.pool()?;
                let tables = outbox::postgres::sqlx::query(
                    "SELECT tablename::text FROM pg_tables WHERE schemaname = $1",
                )
                .bind(schema)
                .fetch_all(pool)
                .await?;
                for table in tables {
                    let table = self.spec.table(&table.try_get::<String, _>(0)?);
                    run(pool, format!("VACUUM ANALYZE {table}")).await?;
                }
                run(pool, "CHECKPOINT".to_owned()).await
            }
            Spec::Sqlite { path } => {
                let checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)";
                tokio::task::block_in_place(|| connect(path)?.query_row(checkpoint, [], |_| Ok(())))?;
                Ok(())
            }
            Spec::Memory { .. } => Ok(()),
        }
    }

    /// How many messages are left that were not settled. Counted one by one: statistics of the store's stop early.
    pub(crate) async fn left(&self, table: &str) -> Outcome<u64> {
        let condition = if table == QUEUE {
            "WHERE processed_at IS NULL"
        } else {
            ""
        };
        let text = format!("SELECT count(*) FROM {} {condition}", self.spec.table(table));
        let left: i64 = match &self.spec {
            Spec::Postgres { .. } => {
                let row = outbox::postgres::sqlx::query(AssertSqlSafe(text))
                    .fetch_one(self.pool()?)
                    .await?;
                row.try_get(0)?
            }
            Spec::Sqlite { path } => {
                tokio::task::block_in_place(|| connect(path)?.query_row(&text, [], |row| row.get(0)))?
            }
            // The memory of another process is out of sight.
            Spec::Memory { .. } => 0,
        };
        Ok(left.unsigned_abs())
    }

    /// A connection that commits messages one by one.
    pub(crate) async fn producer(&self, table: &str, topic: &str, flow: Flow) -> Outcome<Producer> {
        let insert = format!(
            "INSERT INTO {} (topic, key, payload) VALUES ",
            self.spec.table(table)
        );
        let link = match &self.spec {
            Spec::Postgres { .. } => Link::Postgres(self.pool()?.acquire().await?, insert + "($1, $2, $3)"),
            Spec::Sqlite { path } => Link::Sqlite(connect(path)?, insert + "(?1, ?2, ?3)"),
            Spec::Memory { .. } => return Err("another process cannot produce into this one's memory".into()),
        };
        Ok(Producer {
            link,
            topic: topic.to_owned(),
            flow,
        })
    }

    pub(crate) async fn remove(self) -> Outcome<()> {
        match &self.spec {
            Spec::Postgres { schema, .. } => {
                run(self.pool()?, format!("DROP SCHEMA \"{schema}\" CASCADE")).await
            }
            Spec::Sqlite { path } => {
                for suffix in ["", "-wal", "-shm"] {
                    let mut name = path.clone().into_os_string();
                    name.push(suffix);
                    let _ = std::fs::remove_file(name);
                }
                Ok(())
            }
            Spec::Memory { .. } => Ok(()),
        }
    }
}

/// Commits messages, each in a transaction of its own.
pub(crate) struct Producer {
    link: Link,
    topic: String,
    flow: Flow,
}

enum Link {
    Postgres(
        outbox::postgres::sqlx::pool::PoolConnection<outbox::postgres::sqlx::Postgres>,
        String,
    ),
    Sqlite(Connection, String),
}

impl Producer {
    /// Returns when the message is committed.
    pub(crate) async fn commit(&mut self, number: u64) -> Outcome<()> {
        let (key, payload) = (self.flow.key(number).to_string(), self.flow.payload(number));
        match &mut self.link {
            Link::Postgres(connection, text) => {
                outbox::postgres::sqlx::query(AssertSqlSafe(text.clone()))
                    .bind(&self.topic)
                    .bind(key.as_bytes())
                    .bind(&payload)
                    .execute(&mut **connection)
                    .await?;
            }
            Link::Sqlite(connection, text) => {
                tokio::task::block_in_place(|| {
                    connection
                        .prepare_cached(text)?
                        .execute(params![self.topic, key.as_bytes(), payload])
                })?;
            }
        }
        Ok(())
    }
}

/// As an application that keeps its commits would open it.
pub(crate) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_secs(10))?;
    connection.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL")?;
    Ok(connection)
}
