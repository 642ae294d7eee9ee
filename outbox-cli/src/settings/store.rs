//! `[store]`: which store, how it is opened and made. A store is one variant here, and nothing elsewhere.

use std::path::PathBuf;
use std::sync::Arc;

use outbox::OutboxStore;
use outbox::mongo::{self, MongoConfig, MongoStore};
use outbox::mysql::{self, MysqlConfig, MysqlStore};
use outbox::postgres::{self, PostgresConfig, PostgresStore};
use outbox::sqlite::{self, SqliteConfig, SqliteStore};

use super::de::{self, Problem};
use super::tree::{Node, Value};
use super::{complain, read_secret, take_type, unknown_type, wrong};
use crate::exit::{Code, Failure, Result};

/// What `type` may be.
const EXPECTED: &str = "sqlite, postgres, mysql or mongo";

/// `[store]`
#[derive(Debug)]
pub(crate) enum StoreSettings {
    Sqlite(SqliteConfig),
    Postgres(PostgresConfig),
    Mysql(MysqlConfig),
    Mongo(MongoConfig),
}

/// What a role is for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RoleKind {
    Produce,
    Relay,
}

/// What making the outbox, or bringing it up to date, did.
#[derive(Debug)]
pub(crate) struct Migration {
    pub(crate) store: &'static str,
    pub(crate) prefix: String,
    /// None: there was no outbox.
    pub(crate) from: Option<i64>,
    pub(crate) to: i64,
}

impl StoreSettings {
    pub(super) fn read(mut node: Node) -> Result<Self> {
        match take_type("store", &mut node, EXPECTED)?.as_str() {
            "sqlite" => Ok(Self::Sqlite(section(node)?)),
            "postgres" => Ok(Self::Postgres(section(with_url_from_file(node)?)?)),
            "mysql" => Ok(Self::Mysql(section(with_url_from_file(node)?)?)),
            "mongo" => Ok(Self::Mongo(section(with_url_from_file(node)?)?)),
            other => Err(unknown_type("store", other, EXPECTED)),
        }
    }

    /// Opens the outbox, which must be there.
    pub(crate) async fn open(&self) -> Result<Arc<dyn OutboxStore>> {
        match self {
            Self::Sqlite(config) => {
                let config = config.clone();
                // It may wait for a lock: on a thread of its own, so that a signal is heard meanwhile.
                let opened = tokio::task::spawn_blocking(|| SqliteStore::open(config)).await;
                let store = opened.map_err(|error| {
                    Failure::new(Code::Unexpected, format!("open the store: {error}")).because(&error)
                })?;
                Ok(Arc::new(store?))
            }
            Self::Postgres(config) => Ok(Arc::new(PostgresStore::connect(config.clone()).await?)),
            Self::Mysql(config) => Ok(Arc::new(MysqlStore::connect(config.clone()).await?)),
            Self::Mongo(config) => Ok(Arc::new(MongoStore::connect(config.clone()).await?)),
        }
    }

    /// Makes the outbox, or brings it to this version.
    pub(crate) async fn migrate(&self) -> Result<Migration> {
        match self {
            Self::Sqlite(config) => {
                let sqlite::Migrated { from, to } = sqlite::migrate(config)?;
                Ok(Migration {
                    store: "sqlite",
                    prefix: config.prefix.to_string(),
                    from,
                    to,
                })
            }
            Self::Postgres(config) => {
                let postgres::Migrated { from, to } = postgres::migrate(config).await?;
                Ok(Migration {
                    store: "postgres",
                    prefix: format!("{}.{}", config.schema, config.prefix),
                    from,
                    to,
                })
            }
            Self::Mysql(config) => {
                let mysql::Migrated { from, to } = mysql::migrate(config).await?;
                Ok(Migration {
                    store: "mysql",
                    prefix: config.prefix.to_string(),
                    from,
                    to,
                })
            }
            Self::Mongo(config) => {
                let mongo::Migrated { from, to } = mongo::migrate(config).await?;
                Ok(Migration {
                    store: "mongo",
                    prefix: config.prefix.to_string(),
                    from,
                    to,
                })
            }
        }
    }

    /// The statements, or the commands, that make the outbox.
    pub(crate) fn migration_script(&self) -> String {
        match self {
            Self::Sqlite(config) => sqlite::migration_sql(config),
            Self::Postgres(config) => postgres::migration_sql(config),
            Self::Mysql(config) => mysql::migration_sql(config),
            Self::Mongo(config) => mongo::migration_script(config),
        }
    }

    /// What a role needs, in stores that have roles.
    pub(crate) fn grant_script(&self, kind: RoleKind, role: &str) -> Result<String> {
        match self {
            Self::Sqlite(_) => Err(Failure::new(
                Code::Usage,
                "SQLite has no roles: the permissions of the file decide",
            )),
            Self::Postgres(config) => {
                let kind = match kind {
                    RoleKind::Produce => postgres::Role::Produce,
                    RoleKind::Relay => postgres::Role::Relay,
                };
                Ok(postgres::grant_sql(
                    config,
                    kind,
                    &postgres::Identifier::new(role)?,
                ))
            }
            Self::Mysql(config) => {
                let kind = match kind {
                    RoleKind::Produce => mysql::Role::Produce,
                    RoleKind::Relay => mysql::Role::Relay,
                };
                Ok(mysql::grant_sql(config, kind, &mysql::Identifier::new(role)?))
            }
            Self::Mongo(config) => {
                let kind = match kind {
                    RoleKind::Produce => mongo::Role::Produce,
                    RoleKind::Relay => mongo::Role::Relay,
                };
                Ok(mongo::grant_script(config, kind, &mongo::Identifier::new(role)?)?)
            }
        }
    }

    /// What it is, for people: no secret is in it.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Sqlite(config) => format!("sqlite {}", config.path.display()),
            Self::Postgres(config) => config.describe(),
            Self::Mysql(config) => config.describe(),
            Self::Mongo(config) => config.describe(),
        }
    }
}

/// Puts a URL in its place that stands in a file, because it holds a password.
fn with_url_from_file(mut node: Node) -> Result<Node> {
    const SETTING: &str = "store.url_from_file";
    let Some(file) = node.take("url_from_file") else {
        return Ok(node);
    };
    let origin = file.origin.clone();
    if node.get("url").is_some() {
        return Err(wrong(format!(
            "{origin}: {SETTING}: the URL is given twice, also as store.url"
        )));
    }
    let path: PathBuf =
        de::read(file).map_err(|problem| complain(problem.within("url_from_file").within("store")))?;
    let url = Node {
        value: Value::Text(read_secret(SETTING, &path)?),
        origin,
    };
    if let Some(entries) = node.entries() {
        entries.insert("url".to_owned(), url);
    }
    Ok(node)
}

/// Reads the settings of one store. A `url` may hold a password: its text is in no complaint, wherever it got into.
fn section<T: serde::de::DeserializeOwned>(node: Node) -> Result<T> {
    let url = node.get("url").cloned().unwrap_or_else(Node::empty);
    de::read(node).map_err(|mut problem: Problem| {
        problem.text = url.without_values(problem.text);
        complain(problem.within("store"))
    })
}
