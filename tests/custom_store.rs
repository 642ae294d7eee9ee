//! The store of `examples/2_custom_store.rs`, proven by the conformance suite with the harness below.

#[path = "../examples/2_custom_store.rs"]
#[allow(dead_code, reason = "its main is not run here")]
mod custom_store;

use std::sync::Arc;

use custom_store::MyStore;
use outbox::conformance::StoreHarness;
use outbox::{Message, OutboxStore, Result};

struct Mine(MyStore);

#[rustfmt::skip]
#[async_trait::async_trait]
impl StoreHarness for Mine {
    type Tx = Vec<Message>;
    async fn fresh() -> Self { Self(MyStore::default()) }
    fn store(&self) -> Arc<dyn OutboxStore> { Arc::new(self.0.clone()) }
    async fn begin(&self) -> Self::Tx { Vec::new() }
    async fn enqueue(&self, tx: &mut Self::Tx, messages: &[Message]) -> Result<()> { MyStore::enqueue(tx, messages) }
    async fn commit(&self, tx: Self::Tx) { self.0.commit(tx); }
    async fn rollback(&self, _: Self::Tx) {}
    fn concurrent_transactions(&self) -> bool { false }
}

outbox::store_conformance!(Mine);
