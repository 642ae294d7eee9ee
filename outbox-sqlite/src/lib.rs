#![doc = include_str!("../README.md")]

mod config;
mod cursor;
mod enqueue;
mod error;
mod hold;
mod inbox;
mod inspect;
mod operate;
mod reader;
mod row;
mod schema;
mod sql;
mod store;
mod wake;
mod worker;

pub use config::{SqliteConfig, Synchronous};
pub use enqueue::SqliteOutbox;
pub use inbox::SqliteInbox;
pub use outbox_core::{Error, ErrorKind, FetchMode, Identifier, Migrated, Result};
/// The driver, whose types are part of this crate's API.
pub use rusqlite;
pub use schema::{migrate, migration_sql};
pub use store::SqliteStore;
