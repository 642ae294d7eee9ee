#![doc = include_str!("../README.md")]

mod commands;
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
mod real_commands;
#[cfg(test)]
mod real_plans;
#[cfg(test)]
mod real_reader;
mod ring;
mod row;
mod schema;
mod session;
mod store;
mod wake;

pub use config::MongoConfig;
pub use enqueue::MongoOutbox;
pub use error::driver_error;
pub use inbox::MongoInbox;
/// The driver, whose types are part of this crate's API.
pub use mongodb;
pub use outbox_core::{Error, ErrorKind, Identifier, Migrated, Result, Role};
pub use schema::{grant_script, migrate, migration_script};
/// How secrets are wrapped, a type of which is part of this crate's API.
pub use secrecy;
pub use store::MongoStore;
