#![doc = include_str!("../README.md")]

mod config;
mod enqueue;
mod error;
mod hold;
mod inbox;
mod inspect;
mod operate;
mod reader;
#[cfg(test)]
#[path = "../../tests/reading/mod.rs"]
mod reading;
#[cfg(test)]
mod real_plans;
#[cfg(test)]
mod real_reader;
mod row;
mod schema;
mod session;
mod sql;
mod store;

pub use config::MysqlConfig;
pub use enqueue::{MysqlOutbox, begin};
pub use inbox::MysqlInbox;
pub use outbox_core::{Error, ErrorKind, FetchMode, Identifier, Migrated, Result, Role};
pub use schema::{grant_sql, migrate, migration_sql};
/// How secrets are wrapped, a type of which is part of this crate's API.
pub use secrecy;
/// The driver, whose types are part of this crate's API.
pub use sqlx;
pub use store::MysqlStore;
