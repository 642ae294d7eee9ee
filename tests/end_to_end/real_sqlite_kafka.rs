//! The promise on SQLite, end to end. Needs Kafka (`OUTBOX_TEST_KAFKA`).

#[path = "../grant/mod.rs"]
mod grant;
#[path = "../proof/mod.rs"]
mod proof;
#[path = "../proxy/mod.rs"]
mod proxy;
#[path = "../proof/reader.rs"]
mod reader;
#[macro_use]
mod scenarios;
mod sqlite;
mod stage;

end_to_end!(sqlite::Sqlite);
