//! The conformance suite on real servers, one named test a scenario, in each configuration.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::sync::Arc;

use common::{Place, Server};
use outbox_core::conformance::StoreHarness;
use outbox_core::{Message, Ordering, OutboxStore, Result};
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

harness!(Mysql, Server::Mysql, |_| {});
harness!(MysqlSequenced, Server::Mysql, |config| config.ordering =
    Ordering::Sequenced);
harness!(MysqlArchive, Server::Mysql, |config| config.archive = true);
harness!(Mariadb, Server::Mariadb, |_| {});
harness!(MariadbSequenced, Server::Mariadb, |config| config.ordering =
    Ordering::Sequenced);
harness!(MariadbOneShard, Server::Mariadb, |config| config.shards = 1);

outbox_core::store_conformance!(Mysql, mysql);
outbox_core::store_conformance!(MysqlSequenced, mysql_sequenced);
outbox_core::store_conformance!(MysqlArchive, mysql_archive);
outbox_core::store_conformance!(Mariadb, mariadb);
outbox_core::store_conformance!(MariadbSequenced, mariadb_sequenced);
outbox_core::store_conformance!(MariadbOneShard, mariadb_one_shard);
