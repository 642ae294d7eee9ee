//! Retention: how long the archive of delivered messages is kept.

use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;

/// The archive of delivered messages, in stores that are configured to keep them.
///
/// # Contract
/// - A delivered message **MUST** be archived in the transaction that settles it (`retention_archives`).
/// - A purge **MUST NOT** remove anything younger, nor more than `limit` at once (`retention_purges_old_only`).
#[async_trait]
pub trait Retention: Send + Sync {
    /// Deletes at most `limit` archived messages that were delivered longer ago than `age`; says how many.
    async fn purge(&self, age: Duration, limit: usize) -> Result<usize>;
}
