//! A store, an inbox and a sink in memory: for tests, examples and the simulation.
//!
//! They behave as the real ones do where it matters. Positions are drawn when a message is enqueued and its row
//! becomes visible when the transaction commits, so a low position may appear late; several transactions are open
//! at once; leases run in the store's own clock, which is tokio's and can be paused; the sink keeps the order of a
//! key through scripted failures. Nothing survives the process.

mod changes;
mod config;
mod inbox;
mod inspect;
mod powers;
mod reader;
mod sink;
mod state;
mod store;
mod transaction;

pub use config::MemoryConfig;
pub use inbox::MemoryInbox;
pub use sink::{MemoryFault, MemorySink};
pub use store::MemoryStore;
pub use transaction::MemoryTransaction;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A lock whose state is sound even when a thread panicked while it held it: no critical section here calls out.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
