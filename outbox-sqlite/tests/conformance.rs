//! The conformance suite, one named test a scenario, in each configuration.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

use std::sync::Arc;

use outbox_core::conformance::StoreHarness;
use outbox_core::{Message, Ordering, OutboxStore, Result};
use outbox_sqlite::rusqlite::Connection;
use outbox_sqlite::{FetchMode, SqliteConfig, SqliteOutbox, SqliteStore, migrate};
use tempfile::TempDir;

/// A store in a directory of its own.
struct Sqlite {
    config: SqliteConfig,
    outbox: SqliteOutbox,
    _dir: TempDir,
}

impl Sqlite {
    fn new(adjust: impl FnOnce(&mut SqliteConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = SqliteConfig::new(dir.path().join("app.db"));
        adjust(&mut config);
        migrate(&config).unwrap();
        Self {
            outbox: SqliteOutbox::new(&config).unwrap(),
            config,
            _dir: dir,
        }
    }
}

/// Makes a harness of a configuration. `rusqlite::Transaction` borrows its connection and cannot be sent; an open
/// transaction is a connection on which one was begun.
macro_rules! harness {
    ($name:ident, $adjust:expr) => {
        struct $name(Sqlite);

        #[async_trait::async_trait]
        impl StoreHarness for $name {
            type Tx = Connection;

            async fn fresh() -> Self {
                Self(Sqlite::new($adjust))
            }

            fn store(&self) -> Arc<dyn OutboxStore> {
                Arc::new(SqliteStore::open(self.0.config.clone()).unwrap())
            }

            async fn begin(&self) -> Connection {
                let connection = Connection::open(&self.0.config.path).unwrap();
                connection.execute_batch("BEGIN IMMEDIATE").unwrap();
                connection
            }

            async fn enqueue(&self, tx: &mut Connection, messages: &[Message]) -> Result<()> {
                self.0.outbox.enqueue_many(tx, messages)
            }

            async fn commit(&self, tx: Connection) {
                tx.execute_batch("COMMIT").unwrap();
            }

            async fn rollback(&self, tx: Connection) {
                tx.execute_batch("ROLLBACK").unwrap();
            }

            fn concurrent_transactions(&self) -> bool {
                false
            }
        }
    };
}

harness!(Insert, |_| {});
harness!(Rescan, |config| config.fetch = FetchMode::Rescan);
harness!(Sequenced, |config| config.ordering = Ordering::Sequenced);
harness!(Archive, |config| config.archive = true);

outbox_core::store_conformance!(Insert, insert);
outbox_core::store_conformance!(Rescan, rescan);
outbox_core::store_conformance!(Sequenced, sequenced);
outbox_core::store_conformance!(Archive, archive);
