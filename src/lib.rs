#![doc = include_str!("../README.md")]

pub use outbox_core::*;

/// The Kafka sink and helpers for consumers.
#[cfg(feature = "kafka")]
pub use outbox_kafka as kafka;
/// The MongoDB store, enqueue and inbox.
#[cfg(feature = "mongo")]
pub use outbox_mongo as mongo;
/// The store, enqueue and inbox for MySQL and MariaDB.
#[cfg(feature = "mysql")]
pub use outbox_mysql as mysql;
/// The PostgreSQL store, enqueue and inbox.
#[cfg(feature = "postgres")]
pub use outbox_postgres as postgres;
/// The SQLite store, enqueue and inbox.
#[cfg(feature = "sqlite")]
pub use outbox_sqlite as sqlite;
