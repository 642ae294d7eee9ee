//! `[store]`: which store, how it is opened and made. A store is one variant here, and nothing elsewhere.

use std::sync::Arc;

use outbox::OutboxStore;
use outbox::sqlite::{self, SqliteConfig, SqliteStore};

use super::de::{self, Problem};
use super::tree::Node;
use super::{complain, take_type, unknown_type};
use crate::exit::Result;

/// `[store]`
#[derive(Debug)]
pub(crate) enum StoreSettings {
    Sqlite(SqliteConfig),
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
        match take_type("store", &mut node, "sqlite")?.as_str() {
            "sqlite" => Ok(Self::Sqlite(section(node)?)),
            other => Err(unknown_type("store", other, "sqlite")),
        }
    }

    /// Opens the outbox, which must be there.
    pub(crate) async fn open(&self) -> Result<Arc<dyn OutboxStore>> {
        match self {
            Self::Sqlite(config) => Ok(Arc::new(SqliteStore::open(config.clone())?)),
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
        }
    }

    /// The statements that make the outbox.
    pub(crate) fn migration_sql(&self) -> String {
        match self {
            Self::Sqlite(config) => sqlite::migration_sql(config),
        }
    }

    /// What it is, for people: no secret is in it.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Sqlite(config) => format!("sqlite {}", config.path.display()),
        }
    }
}

/// Reads the settings of one store. A `url` may hold a password: its text is in no complaint, wherever it got into.
fn section<T: serde::de::DeserializeOwned>(node: Node) -> Result<T> {
    let url = node.get("url").cloned().unwrap_or_else(Node::empty);
    de::read(node).map_err(|mut problem: Problem| {
        problem.text = url.without_values(problem.text);
        complain(problem.within("store"))
    })
}
