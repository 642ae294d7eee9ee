//! The conformance suite on real servers, one named test a scenario, in each configuration.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Place, Server};
use outbox_core::conformance::StoreHarness;
use outbox_core::{FetchMode, Message, Ordering, OutboxStore, Result};
use outbox_mysql::sqlx::{MySql, Transaction};

/// Makes a harness of a configuration.
macro_rules! harness {
    ($name:ident, $server:expr, $adjust:expr) => {
        struct $name(Place);

        #[async_trait::async_trait]
        impl StoreHarness for $name {
            type Tx = Transaction<'static, MySql>;

            async fn fresh() -> Self {
                Self(Place::with($server, $adjust).await)
            }

            fn store(&self) -> Arc<dyn OutboxStore> {
                Arc::new(self.0.store.clone())
            }

            async fn begin(&self) -> Self::Tx {
                self.0.pool.begin().await.unwrap()
            }

            async fn enqueue(&self, tx: &mut Self::Tx, messages: &[Message]) -> Result<()> {
                self.0.outbox.enqueue_many(tx, messages).await
            }

            async fn commit(&self, tx: Self::Tx) {
                tx.commit().await.unwrap();
            }

            async fn rollback(&self, tx: Self::Tx) {
                tx.rollback().await.unwrap();
            }

            fn concurrent_transactions(&self) -> bool {
                true
            }
        }
    };
}

// The newest part is read anew for a moment only, so that the cursor is seen at work; with the defaults it would not be,
// in so short a test.
harness!(Mysql, Server::Mysql, |config| config.lag = MOMENT);
harness!(MysqlSequencedArchive, Server::Mysql, |config| {
    config.ordering = Ordering::Sequenced;
    config.archive = true;
});
harness!(Mariadb, Server::Mariadb, |config| {
    config.lag = MOMENT;
    config.shards = 1;
});
harness!(MariadbSequencedRescan, Server::Mariadb, |config| {
    config.ordering = Ordering::Sequenced;
    config.fetch = FetchMode::Rescan;
});

const MOMENT: Duration = Duration::from_millis(300);

outbox_core::store_conformance!(Mysql, mysql);
outbox_core::store_conformance!(MysqlSequencedArchive, mysql_sequenced_archive);
outbox_core::store_conformance!(Mariadb, mariadb);
outbox_core::store_conformance!(MariadbSequencedRescan, mariadb_sequenced_rescan);
