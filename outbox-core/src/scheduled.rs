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
#[async_trait]
pub trait Scheduled: Send + Sync {
    /// Promotes at most `limit` due messages of these shards.
    async fn promote(&self, relay: &RelayId, shards: &[OwnedShard], limit: usize) -> Result<Promotion>;
}

/// What a promotion did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Promotion {
    /// How many messages it moved. As many as the limit: there may be more.
    pub promoted: usize,
    /// When the next one of these shards is due; zero is now, none is never.
    pub next_in: Option<Duration>,
    /// Shards whose epoch is no longer held; nothing was changed for them.
    pub lost: Vec<Shard>,
}
