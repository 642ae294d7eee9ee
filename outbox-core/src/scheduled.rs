//! Scheduled delivery: messages that are not to go before a time.

use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;
use crate::lease::RelayId;
use crate::shard::{OwnedShard, Shard};

/// Moves messages that have become due into the outbox.
///
/// # Contract
/// - A message whose `deliver_at` lies ahead **MUST NOT** be fetched before (`scheduled_waits`), one whose time has
///   passed goes like others (`scheduled_in_the_past_goes_at_once`), and a rollback leaves nothing planned
///   (`scheduled_rolls_back`).
/// - Position and number within the key are given at promotion; of messages due together those with the earlier
///   `deliver_at` come first (`scheduled_in_order`).
/// - Fenced like a settlement: shards whose epoch is no longer held stay as they are and are returned
///   (`scheduled_is_fenced`). The limit is kept, and when the next is due is told (`scheduled_keeps_limit`).
///
/// # Example
/// ```
/// # use std::time::{Duration, SystemTime};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> outbox_core::Result<()> {
/// use outbox_core::{LeaseRequest, MemoryStore, Message, OutboxStore, RelayId};
///
/// let store = MemoryStore::default();
/// let mut tx = store.begin();
/// let due = SystemTime::now() + Duration::from_secs(60);
/// store.enqueue(&mut tx, &Message::builder("reminders").deliver_at(due).build()?).await?;
/// tx.commit();
/// assert!(store.pending().is_empty());
///
/// # tokio::time::advance(Duration::from_secs(61)).await;
/// // a minute later, what a relay does:
/// let request = LeaseRequest { relay: RelayId::unique("relay"), want: 8, ttl: Duration::from_secs(10) };
/// let shards = store.lease(&request).await?.held;
/// let scheduled = store.scheduled().expect("this store has it");
/// assert_eq!(scheduled.promote(&request.relay, &shards, 100).await?.promoted, 1);
/// assert_eq!(store.pending().len(), 1);
/// # Ok(()) }
/// ```
#[async_trait]
pub trait Scheduled: Send + Sync {
    /// Promotes at most `limit` due messages of these shards.
    async fn promote(&self, relay: &RelayId, shards: &[OwnedShard], limit: usize) -> Result<Promotion>;
}

/// What a promotion did.
///
/// ```
/// use outbox_core::Promotion;
///
/// /// Whether to promote again at once.
/// fn again(promotion: &Promotion, limit: usize) -> bool {
///     promotion.promoted == limit
/// }
/// assert!(!again(&Promotion::default(), 100));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Promotion {
    /// How many messages it moved. As many as the limit: there may be more.
    pub promoted: usize,
    /// When the next one of these shards is due; zero is now, none is never.
    pub next_in: Option<Duration>,
    /// Shards whose epoch is no longer held; nothing was changed for them.
    pub lost: Vec<Shard>,
}
