//! The conformance suite on a real server, one named test a scenario, in each configuration.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::sync::Arc;

use common::Place;
use outbox_core::conformance::StoreHarness;
use outbox_core::{Message, Ordering, OutboxStore, Result};
use outbox_mongo::mongodb::ClientSession;

/// Makes a harness of a configuration.
macro_rules! harness {
    ($name:ident, $adjust:expr) => {
        struct $name(Place);

        #[async_trait::async_trait]
        impl StoreHarness for $name {
            type Tx = ClientSession;

            async fn fresh() -> Self {
                Self(Place::with($adjust).await)
            }

            fn store(&self) -> Arc<dyn OutboxStore> {
                Arc::new(self.0.store.clone())
            }

            async fn begin(&self) -> Self::Tx {
                self.0.begin().await
            }

            async fn enqueue(&self, tx: &mut Self::Tx, messages: &[Message]) -> Result<()> {
                self.0.outbox.enqueue_many(tx, messages).await
            }

            async fn commit(&self, mut tx: Self::Tx) {
                tx.commit_transaction().await.unwrap();
            }

            async fn rollback(&self, mut tx: Self::Tx) {
                tx.abort_transaction().await.unwrap();
            }

            fn concurrent_transactions(&self) -> bool {
                true
            }
        }
    };
}

harness!(Insert, |config| config.change_stream = true);
harness!(SequencedArchive, |config| {
    config.ordering = Ordering::Sequenced;
    config.archive = true;
});
harness!(OneShard, |config| config.shards = 1);

outbox_core::store_conformance!(Insert, insert);
outbox_core::store_conformance!(SequencedArchive, sequenced_archive);
outbox_core::store_conformance!(OneShard, one_shard);
