//! The suites with which anyone can prove a store or a sink of their own.
//!
//! A store's author writes a [`StoreHarness`]: how to get a fresh, empty store, and how a producer enqueues in a
//! transaction. One line then makes one named test a scenario:
//!
//! ```
//! use std::sync::Arc;
//! use outbox_core::conformance::StoreHarness;
//! use outbox_core::{MemoryStore, MemoryTransaction, Message, OutboxStore, Result};
//!
//! struct Memory(MemoryStore);
//!
//! #[async_trait::async_trait]
//! impl StoreHarness for Memory {
//!     type Tx = MemoryTransaction;
//!     async fn fresh() -> Self { Self(MemoryStore::default()) }
//!     fn store(&self) -> Arc<dyn OutboxStore> { Arc::new(self.0.clone()) }
//!     async fn begin(&self) -> MemoryTransaction { self.0.begin() }
//!     async fn enqueue(&self, tx: &mut MemoryTransaction, messages: &[Message]) -> Result<()> {
//!         self.0.enqueue_many(tx, messages).await
//!     }
//!     async fn commit(&self, tx: MemoryTransaction) { tx.commit() }
//!     async fn rollback(&self, tx: MemoryTransaction) { tx.rollback() }
//!     fn concurrent_transactions(&self) -> bool { true }
//! }
//!
//! outbox_core::store_conformance!(Memory);
//! # fn main() {}
//! ```
//!
//! The same for sinks: [`SinkHarness`] and [`sink_conformance!`](crate::sink_conformance).
//!
//! What a store says it cannot do is not asked of it: its test prints `not applicable: <why>`, and the test `report`
//! lists all of those. What a store says it can do is asked: there are scenarios for honesty, too.
//!
//! [`broken`] holds stores and sinks with one deliberate flaw each, which the suites must reject: they prove that
//! the suites have teeth.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a scenario is a test: it fails by panicking and says on standard output what it did not run"
)]

pub mod broken;
mod harness;
mod kit;
mod list;
mod scenario;
pub mod sink;
pub mod store;

pub use harness::{CONTENT, SinkFault, SinkHarness, StoreHarness, TOPICS};
pub use scenario::{
    Scenario, SinkNeed, StoreNeed, prove_sink, prove_store, report_sink, report_store, sink_scenarios,
    store_scenarios,
};
