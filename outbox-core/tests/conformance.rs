//! The store in memory passes the suite, in several configurations.

#![cfg(feature = "conformance")]

use std::sync::Arc;

use async_trait::async_trait;
use outbox_core::conformance::StoreHarness;
use outbox_core::{MemoryConfig, MemoryStore, MemoryTransaction, Message, Ordering, OutboxStore, Result};

macro_rules! harness {
    ($name:ident, $config:expr) => {
        struct $name(MemoryStore);

        #[async_trait]
        impl StoreHarness for $name {
            type Tx = MemoryTransaction;

            async fn fresh() -> Self {
                Self(MemoryStore::new($config))
            }

            fn store(&self) -> Arc<dyn OutboxStore> {
                Arc::new(self.0.clone())
            }

            async fn begin(&self) -> MemoryTransaction {
                self.0.begin()
            }

            async fn enqueue(&self, tx: &mut MemoryTransaction, messages: &[Message]) -> Result<()> {
                self.0.enqueue_many(tx, messages).await
            }

            async fn commit(&self, tx: MemoryTransaction) {
                tx.commit();
            }

            async fn rollback(&self, tx: MemoryTransaction) {
                tx.rollback();
            }

            fn concurrent_transactions(&self) -> bool {
                true
            }
        }
    };
}

harness!(EightShards, MemoryConfig::default());
harness!(
    OneShard,
    MemoryConfig {
        shards: 1,
        ..MemoryConfig::default()
    }
);
harness!(
    Sequenced,
    MemoryConfig {
        ordering: Ordering::Sequenced,
        ..MemoryConfig::default()
    }
);
harness!(
    Archiving,
    MemoryConfig {
        archive: true,
        ..MemoryConfig::default()
    }
);
harness!(
    WithoutPowers,
    MemoryConfig {
        shards: 64,
        dead_letters: false,
        scheduled: false,
        parking: false,
        wake_up: false,
        ..MemoryConfig::default()
    }
);

outbox_core::store_conformance!(EightShards, eight_shards, start_paused = true);
outbox_core::store_conformance!(OneShard, one_shard, start_paused = true);
outbox_core::store_conformance!(Sequenced, sequenced, start_paused = true);
outbox_core::store_conformance!(Archiving, archiving, start_paused = true);
outbox_core::store_conformance!(WithoutPowers, without_powers, start_paused = true);
// Real time and threads, as users of the macro have them.
outbox_core::store_conformance!(EightShards, on_threads, flavor = "multi_thread");
