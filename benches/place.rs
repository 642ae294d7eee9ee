//! Where messages wait: a fresh outbox for each measurement, and the baselines' table beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use outbox::mongo::mongodb::{Client, Database as MongoDatabase};
use outbox::mongo::{MongoConfig, MongoStore};
use outbox::mysql::{MysqlConfig, MysqlStore};
use outbox::postgres::sqlx::mysql::{MySqlConnection, MySqlPool, MySqlPoolOptions};
use outbox::postgres::sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};
use outbox::postgres::sqlx::{AssertSqlSafe, Row, query, raw_sql};
use outbox::postgres::{PostgresConfig, PostgresStore};
use outbox::sqlite::rusqlite::{self, Connection, params};
use outbox::sqlite::{SqliteConfig, SqliteStore};
use outbox::{Identifier, MemoryStore, Message, OutboxStore};
use serde::{Deserialize, Serialize};

use crate::ledger::{DIGITS, Flow};
use crate::mongo;
use crate::mysql;
use crate::queue::{self, QUEUE};
use crate::results::{self, Outcome};

/// The kinds of stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Store {
    Postgres,
    Mysql,
    Mariadb,
    Mongo,
    Sqlite,
    Memory,
}

impl Store {
    /// How many messages a drain is of. The servers of MongoDB's protocol that can be had here are slow with more.
    pub(crate) const fn drained(self) -> u64 {
        match self {
            Self::Mongo => 20_000,
            _ => 200_000,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Mysql => "mysql",
            Self::Mariadb => "mariadb",
            Self::Mongo => "mongo",
            Self::Sqlite => "sqlite",
            Self::Memory => "memory",
        }
    }

    /// Whether it is a server's, to which many connect: for these there are baselines that claim.
    pub(crate) const fn is_server(self) -> bool {
        match self {
            Self::Postgres | Self::Mysql | Self::Mariadb | Self::Mongo => true,
            Self::Sqlite | Self::Memory => false,
        }
    }
}

/// Connections to a server.
#[derive(Clone)]
enum Pool {
    Postgres(PgPool),
    Mysql(MySqlPool),
    Mongo(Client),
}

impl Pool {
    async fn connect(store: Store, url: &str, most: u32) -> Outcome<Self> {
        Ok(match store {
            Store::Postgres => Self::Postgres(PgPoolOptions::new().max_connections(most).connect(url).await?),
            Store::Mongo => Self::Mongo(Client::with_uri_str(url).await?),
            _ => Self::Mysql(MySqlPoolOptions::new().max_connections(most).connect(url).await?),
        })
    }

    /// Runs text of our own.
    async fn run(&self, text: String) -> Outcome<()> {
        let text = raw_sql(AssertSqlSafe(text));
        match self {
            Self::Postgres(pool) => text.execute(pool).await.map(drop)?,
            Self::Mysql(pool) => text.execute(pool).await.map(drop)?,
            Self::Mongo(_) => return Err("MongoDB knows no SQL".into()),
        }
        Ok(())
    }

    async fn close(&self) {
        match self {
            Self::Postgres(pool) => pool.close().await,
            Self::Mysql(pool) => pool.close().await,
            Self::Mongo(_) => {}
        }
    }
}

/// What the run has on a server.
struct Database {
    /// As the administrator, who is elsewhere.
    admin: Pool,
    /// In the run's database.
    pool: Pool,
    /// Of that database, with which the names of all others of the run begin: a schema of MySQL's is a database.
    name: String,
    url: String,
}

/// A database of the run's own, or a folder, which goes with it.
pub(crate) struct Server {
    pub(crate) store: Store,
    database: Option<Database>,
    folder: tempfile::TempDir,
}

impl Server {
    pub(crate) async fn start(store: Store, url: Option<&str>) -> Outcome<Self> {
        let database = match url {
            _ if !store.is_server() => None,
            Some(url) => {
                let admin = Pool::connect(store, url, 1).await?;
                if let Pool::Mysql(admin) = &admin {
                    mysql::check(admin, store).await?;
                }
                let name = format!("outbox_bench_{}", std::process::id());
                // One of MongoDB's is there as soon as something is in it.
                if store != Store::Mongo {
                    admin.run(format!("CREATE DATABASE {name}")).await?;
                }
                let url = in_database(url, &name)?;
                let pool = Pool::connect(store, &url, 48).await?;
                Some(Database {
                    admin,
                    pool,
                    name,
                    url,
                })
            }
            None => {
                let variable = store.name().to_uppercase();
                return Err(format!("OUTBOX_TEST_{variable} is not set: see scripts/services").into());
            }
        };
        Ok(Self {
            store,
            database,
            folder: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?,
        })
    }

    /// A fresh outbox.
    pub(crate) async fn place(&self) -> Outcome<Place> {
        let name = format!("m{}", outbox::MessageId::new().as_uuid().simple());
        let (spec, pool) = match (self.store, &self.database) {
            (Store::Postgres, Some(Database { pool, url, .. })) => {
                let url = url.clone();
                let spec = Spec::Postgres { url, schema: name };
                outbox::postgres::migrate(&spec.postgres()?).await?;
                (spec, Some(pool.clone()))
            }
            (
                Store::Mongo,
                Some(Database {
                    pool, url, name: run, ..
                }),
            ) => {
                let database = format!("{run}_{name}");
                let url = in_database(url, &database)?;
                let spec = Spec::Mongo { url, database };
                outbox::mongo::migrate(&spec.mongo()?).await?;
                (spec, Some(pool.clone()))
            }
            (
                _,
                Some(Database {
                    pool, url, name: run, ..
                }),
            ) => {
                let database = format!("{run}_{name}");
                pool.run(format!("CREATE DATABASE {database}")).await?;
                let spec = Spec::Mysql {
                    url: in_database(url, &database)?,
                    database,
                };
                outbox::mysql::migrate(&spec.mysql()?).await?;
                (spec, Some(pool.clone()))
            }
            (Store::Sqlite, None) => {
                let spec = Spec::Sqlite {
                    path: self.folder.path().join(name),
                };
                outbox::sqlite::migrate(&spec.sqlite()?)?;
                (spec, None)
            }
            (_, None) => (Spec::Memory { filled: None }, None),
        };
        Ok(Place { spec, pool })
    }

    /// What PostgreSQL says of itself.
    pub(crate) async fn postgres(&self) -> Outcome<Option<results::Postgres>> {
        let Some(Pool::Postgres(pool)) = self.database.as_ref().map(|database| &database.pool) else {
            return Ok(None);
        };
        let names = ["server_version", "fsync", "synchronous_commit", "shared_buffers"];
        let mut values = Vec::new();
        for name in names {
            let row = query("SELECT current_setting($1)")
                .bind(name)
                .fetch_one(pool)
                .await?;
            values.push(row.try_get::<String, _>(0)?);
        }
        let mut values = values.into_iter();
        let mut next = || values.next().unwrap_or_default();
        Ok(Some(results::Postgres {
            version: next(),
            fsync: next(),
            synchronous_commit: next(),
            shared_buffers: next(),
        }))
    }

    /// What MySQL or MariaDB says of itself.
    pub(crate) async fn mysql(&self) -> Outcome<Option<results::Mysql>> {
        match self.database.as_ref().map(|database| &database.pool) {
            Some(Pool::Mysql(pool)) => Ok(Some(mysql::describe(pool).await?)),
            _ => Ok(None),
        }
    }

    /// What MongoDB says of itself.
    pub(crate) async fn mongo(&self) -> Outcome<Option<results::Mongo>> {
        match self.database.as_ref().map(|database| &database.pool) {
            Some(Pool::Mongo(client)) => Ok(Some(mongo::describe(client).await?)),
            _ => Ok(None),
        }
    }

    /// Nothing of the run stays.
    pub(crate) async fn remove(self) -> Outcome<()> {
        let Some(Database {
            admin, pool, name, ..
        }) = self.database
        else {
            return Ok(());
        };
        // Connections of a measurement that was cut short would keep it.
        let closing = tokio::time::timeout(Duration::from_secs(2), pool.close());
        let _ = closing.await;
        match &admin {
            Pool::Postgres(_) => admin.run(format!("DROP DATABASE {name} WITH (FORCE)")).await,
            Pool::Mysql(admin) => mysql::drop_all(admin, &name).await,
            // Each measurement has taken its own away.
            Pool::Mongo(_) => Ok(()),
        }
    }
}

/// The same server's URL with another database.
fn in_database(url: &str, database: &str) -> Outcome<String> {
    let (base, query) = url
        .split_once('?')
        .map_or((url, String::new()), |(base, query)| (base, format!("?{query}")));
    let (server, _) = base
        .rsplit_once('/')
        .ok_or("the server's URL names no database")?;
    Ok(format!("{server}/{database}{query}"))
}

/// An outbox, as another process can open it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Spec {
    Postgres {
        url: String,
        schema: String,
    },
    /// The URL names the database as well.
    Mysql {
        url: String,
        database: String,
    },
    /// The URL names the database as well.
    Mongo {
        url: String,
        database: String,
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

    pub(crate) fn mysql(&self) -> Outcome<MysqlConfig> {
        let Self::Mysql { url, .. } = self else {
            return Err("this needs MySQL or MariaDB".into());
        };
        Ok(MysqlConfig::new(url.clone()))
    }

    pub(crate) fn mongo(&self) -> Outcome<MongoConfig> {
        let Self::Mongo { url, .. } = self else {
            return Err("this needs MongoDB".into());
        };
        Ok(MongoConfig::new(url.clone()))
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
            Self::Mysql { .. } => Arc::new(MysqlStore::connect(self.mysql()?).await?),
            Self::Mongo { .. } => Arc::new(MongoStore::connect(self.mongo()?).await?),
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
            Self::Mysql { database, .. } => format!("`{database}`.`{name}`"),
            Self::Mongo { .. } => name.to_owned(),
            Self::Sqlite { .. } | Self::Memory { .. } => format!("\"{name}\""),
        }
    }
}

/// An outbox, as the run fills it.
pub(crate) struct Place {
    pub(crate) spec: Spec,
    pool: Option<Pool>,
}

impl Place {
    fn pool(&self) -> Outcome<&Pool> {
        self.pool.as_ref().ok_or_else(|| "this needs a server".into())
    }

    fn postgres(&self) -> Outcome<&PgPool> {
        match &self.pool {
            Some(Pool::Postgres(pool)) => Ok(pool),
            _ => Err("this needs PostgreSQL".into()),
        }
    }

    fn mysql(&self) -> Outcome<&MySqlPool> {
        match &self.pool {
            Some(Pool::Mysql(pool)) => Ok(pool),
            _ => Err("this needs MySQL or MariaDB".into()),
        }
    }

    fn mongo(&self) -> Outcome<MongoDatabase> {
        match (&self.pool, &self.spec) {
            (Some(Pool::Mongo(client)), Spec::Mongo { database, .. }) => Ok(client.database(database)),
            _ => Err("this needs MongoDB".into()),
        }
    }

    /// Of so many producers, how many can commit at once.
    pub(crate) const fn producers(&self, wanted: usize) -> usize {
        if self.pool.is_some() { wanted } else { 1 }
    }

    /// Makes the baselines' table.
    pub(crate) async fn make_queue(&self) -> Outcome<()> {
        match &self.spec {
            Spec::Mongo { .. } => mongo::make_queue(&self.mongo()?).await,
            _ => self.pool()?.run(queue::table(&self.spec)?).await,
        }
    }

    /// Enqueues the messages `numbers`, in order, in one transaction.
    pub(crate) async fn fill(
        &mut self,
        table: &str,
        topic: &str,
        flow: Flow,
        numbers: std::ops::Range<u64>,
    ) -> Outcome<()> {
        if let Spec::Mongo { .. } = &self.spec {
            return mongo::fill(&self.mongo()?, table, topic, flow, numbers).await;
        }
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
                query(AssertSqlSafe(text))
                    .bind(topic)
                    .bind(from)
                    .bind(to)
                    .bind(apart)
                    .bind(keys)
                    .bind(rest)
                    .execute(self.postgres()?)
                    .await?;
            }
            Spec::Mysql { .. } => mysql::fill(self.mysql()?, &name, topic, flow, from..=to).await?,
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
            Spec::Mongo { .. } => {}
        }
        Ok(())
    }

    /// As it would be found after a while: counted, clean, and nothing left to be written.
    pub(crate) async fn calm(&self) -> Outcome<()> {
        match &self.spec {
            Spec::Postgres { schema, .. } => {
                let tables = query("SELECT tablename::text FROM pg_tables WHERE schemaname = $1")
                    .bind(schema)
                    .fetch_all(self.postgres()?)
                    .await?;
                let pool = self.pool()?;
                for table in tables {
                    let table = self.spec.table(&table.try_get::<String, _>(0)?);
                    pool.run(format!("VACUUM ANALYZE {table}")).await?;
                }
                pool.run("CHECKPOINT".to_owned()).await
            }
            Spec::Mysql { database, .. } => mysql::calm(self.mysql()?, database).await,
            Spec::Sqlite { path } => {
                let checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)";
                tokio::task::block_in_place(|| connect(path)?.query_row(checkpoint, [], |_| Ok(())))?;
                Ok(())
            }
            Spec::Mongo { .. } | Spec::Memory { .. } => Ok(()),
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
                let row = query(AssertSqlSafe(text)).fetch_one(self.postgres()?).await?;
                row.try_get(0)?
            }
            Spec::Mysql { .. } => {
                let row = query(AssertSqlSafe(text)).fetch_one(self.mysql()?).await?;
                row.try_get(0)?
            }
            Spec::Sqlite { path } => {
                tokio::task::block_in_place(|| connect(path)?.query_row(&text, [], |row| row.get(0)))?
            }
            Spec::Mongo { .. } => return mongo::left(&self.mongo()?, table).await,
            // The memory of another process is out of sight.
            Spec::Memory { .. } => 0,
        };
        Ok(left.unsigned_abs())
    }

    /// A connection of its own.
    async fn link(&self) -> Outcome<Link> {
        Ok(match &self.spec {
            Spec::Postgres { .. } => Link::Postgres(self.postgres()?.acquire().await?.detach()),
            Spec::Mysql { .. } => Link::Mysql(self.mysql()?.acquire().await?.detach()),
            Spec::Mongo { .. } => Link::Mongo(Box::new(mongo::Link::new(self.mongo()?))),
            Spec::Sqlite { path } => Link::Sqlite(connect(path)?),
            Spec::Memory { .. } => return Err("another process cannot write into this one's memory".into()),
        })
    }

    /// A connection that commits messages one by one.
    pub(crate) async fn producer(&self, table: &str, topic: &str, flow: Flow) -> Outcome<Producer> {
        let link = self.link().await?;
        let table = self.spec.table(table);
        let insert = match &link {
            Link::Postgres(_) => format!("INSERT INTO {table} (topic, key, payload) VALUES ($1, $2, $3)"),
            Link::Mysql(_) => format!("INSERT INTO {table} (topic, `key`, payload) VALUES (?, ?, ?)"),
            Link::Mongo(_) => table,
            Link::Sqlite(_) => format!("INSERT INTO {table} (topic, key, payload) VALUES (?1, ?2, ?3)"),
        };
        Ok(Producer {
            link,
            insert,
            topic: topic.to_owned(),
            flow,
        })
    }

    /// A transaction that has enqueued a message and does not end.
    pub(crate) async fn writer(&self, topic: &str, flow: Flow, number: u64) -> Outcome<Held> {
        let mut producer = self.producer("outbox", topic, flow).await?;
        match &mut producer.link {
            Link::Mongo(link) => link.begin().await?,
            link => link.run("BEGIN").await?,
        }
        producer.commit(number).await?;
        Ok(Held(producer.link))
    }

    /// A transaction that sees what is committed now, for as long as it lasts.
    pub(crate) async fn snapshot(&self) -> Outcome<Held> {
        let mut link = self.link().await?;
        if let Link::Mongo(mongo) = &mut link {
            mongo.look().await?;
            return Ok(Held(link));
        }
        link.run(match link {
            Link::Postgres(_) => {
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT count(*) FROM pg_class"
            }
            Link::Mysql(_) => {
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; \
                 START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY"
            }
            Link::Mongo(_) | Link::Sqlite(_) => return Err("this needs a server of SQL".into()),
        })
        .await?;
        Ok(Held(link))
    }

    pub(crate) async fn remove(self) -> Outcome<()> {
        match &self.spec {
            Spec::Postgres { schema, .. } => {
                self.pool()?
                    .run(format!("DROP SCHEMA \"{schema}\" CASCADE"))
                    .await
            }
            Spec::Mysql { database, .. } => self.pool()?.run(format!("DROP DATABASE {database}")).await,
            Spec::Mongo { .. } => Ok(self.mongo()?.drop().await?),
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

enum Link {
    Postgres(PgConnection),
    Mysql(MySqlConnection),
    Mongo(Box<mongo::Link>),
    Sqlite(Connection),
}

impl Link {
    /// Runs text of our own.
    async fn run(&mut self, text: &'static str) -> Outcome<()> {
        match self {
            Self::Postgres(connection) => raw_sql(text).execute(connection).await.map(drop)?,
            Self::Mysql(connection) => raw_sql(text).execute(connection).await.map(drop)?,
            Self::Mongo(_) => return Err("MongoDB knows no SQL".into()),
            Self::Sqlite(connection) => connection.execute_batch(text)?,
        }
        Ok(())
    }
}

/// A transaction that does not end before it is told to.
pub(crate) struct Held(Link);

impl Held {
    pub(crate) async fn end(mut self) -> Outcome<()> {
        match &mut self.0 {
            Link::Mongo(link) => link.commit().await,
            link => link.run("COMMIT").await,
        }
    }
}

/// Commits messages, each in a transaction of its own.
pub(crate) struct Producer {
    link: Link,
    insert: String,
    topic: String,
    flow: Flow,
}

impl Producer {
    /// Returns when the message is committed.
    pub(crate) async fn commit(&mut self, number: u64) -> Outcome<()> {
        let (key, payload) = (self.flow.key(number).to_string(), self.flow.payload(number));
        let text = AssertSqlSafe(self.insert.clone());
        match &mut self.link {
            Link::Postgres(connection) => {
                let insert = query(text).bind(&self.topic).bind(key.as_bytes()).bind(&payload);
                insert.execute(connection).await?;
            }
            Link::Mysql(connection) => {
                let insert = query(text).bind(&self.topic).bind(key.as_bytes()).bind(&payload);
                insert.execute(connection).await?;
            }
            Link::Mongo(link) => {
                let document = mongo::document(&self.insert, &self.topic, self.flow, number);
                link.insert(&self.insert, document).await?;
            }
            Link::Sqlite(connection) => {
                tokio::task::block_in_place(|| {
                    let mut insert = connection.prepare_cached(&self.insert)?;
                    insert.execute(params![self.topic, key.as_bytes(), payload])
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
