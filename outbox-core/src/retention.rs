//! Retention: how long the archive of delivered messages is kept.

use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;

/// The archive of delivered messages, in stores that are configured to keep them.
///
/// # Contract
/// - A delivered message **MUST** be archived in the transaction that settles it (`retention_archives`).
/// - A purge **MUST NOT** remove anything younger, nor more than `limit` at once (`retention_purges_old_only`).
///
/// # Example
/// ```
/// # use std::{sync::Arc, time::Duration};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// use outbox_core::{MemoryConfig, MemoryStore, OutboxStore};
///
/// let store = MemoryStore::new(MemoryConfig { archive: true, ..MemoryConfig::default() });
/// let archive = store.retention().expect("it was asked for");
/// // A relay does so by itself, see RelayConfig::retention.
/// assert_eq!(archive.purge(Duration::from_secs(7 * 24 * 3600), 1_000).await?, 0);
/// # Ok(()) }
/// ```
#[async_trait]
pub trait Retention: Send + Sync {
    /// Deletes at most `limit` archived messages that were delivered longer ago than `age`; says how many.
    async fn purge(&self, age: Duration, limit: usize) -> Result<usize>;
}
