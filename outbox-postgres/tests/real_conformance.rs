//! The conformance suite on a real server, one named test a scenario, in each configuration.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::sync::Arc;

use common::{Place, variable};
use outbox_core::conformance::StoreHarness;
use outbox_core::{Message, Ordering, OutboxStore, Result};
use outbox_postgres::FetchMode;
use outbox_postgres::sqlx::{Postgres, Transaction};

/// Makes a harness of a configuration.
macro_rules! harness {
    ($name:ident, $adjust:expr) => {
        struct $name(Place);

        #[async_trait::async_trait]
        impl StoreHarness for $name {
            type Tx = Transaction<'static, Postgres>;

            async fn fresh() -> Self {
                Self(Place::with($adjust).await)
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

harness!(Insert, |_| {});
harness!(RescanOneShard, |config| {
    config.fetch = FetchMode::Rescan;
    config.shards = 1;
});
harness!(SequencedArchive, |config| {
    config.ordering = Ordering::Sequenced;
    config.archive = true;
});
// Through a real PgBouncer in transaction mode.
harness!(Pooled, |config| {
    config.url = variable("OUTBOX_TEST_PGBOUNCER").into();
    config.pooler = true;
});

outbox_core::store_conformance!(Insert, insert);
outbox_core::store_conformance!(RescanOneShard, rescan_one_shard);
outbox_core::store_conformance!(SequencedArchive, sequenced_archive);
outbox_core::store_conformance!(Pooled, pooled);
