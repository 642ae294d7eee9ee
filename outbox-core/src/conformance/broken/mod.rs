//! Stores and sinks with one deliberate flaw each, which the suites must reject: the proof that they have teeth.
//!
//! Each flaw is a mistake that was made somewhere: in another outbox, or in an earlier design of this one. They are
//! thin wrappers around the store and the sink in memory, so that the flaw is all that differs. The project's own
//! tests run every scenario against every flaw and compare what fails with a table.
//!
//! ```
//! use outbox_core::conformance::broken::{BrokenStore, StoreFlaw, with_store_flaw};
//! use outbox_core::conformance::prove_store;
//!
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
//! let verdict = std::panic::catch_unwind(|| {
//!     let proof = prove_store::<BrokenStore>("rollback_leaves_nothing");
//!     runtime.block_on(with_store_flaw(StoreFlaw::KeptOnRollback, proof));
//! });
//! assert!(verdict.is_err());
//! ```

mod flaw;
mod reader;
mod sink;
mod store;

pub use flaw::StoreFlaw;
pub use sink::{BrokenSink, SinkFlaw, with_sink_flaw};
pub use store::{BrokenStore, with_store_flaw};
