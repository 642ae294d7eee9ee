//! What a store in memory is to be like.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::message::Limits;
use crate::store::Ordering;

/// What a [`MemoryStore`](crate::MemoryStore) is to be like: for tests that depend on it.
///
/// ```
/// use outbox_core::{MemoryConfig, MemoryStore, OutboxStore};
///
/// let store = MemoryStore::new(MemoryConfig { shards: 1, archive: true, ..MemoryConfig::default() });
/// assert!(store.retention().is_some());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryConfig {
    /// How many shards, at least 1 (0 counts as 1). Default: 8.
    pub shards: u16,
    /// The order within a key. Default: insert order.
    pub ordering: Ordering,
    /// What a message may weigh and must have. Default: the framework's limits.
    pub limits: Limits,
    /// Whether delivered messages are kept until they are purged. Default: false.
    pub archive: bool,
    /// Whether dead letters are kept. Default: true.
    pub dead_letters: bool,
    /// Whether messages can be scheduled. Default: true.
    pub scheduled: bool,
    /// Whether operators can see and resume parked keys. Default: true.
    pub parking: bool,
    /// Whether a commit wakes relays. Default: true.
    pub wake_up: bool,
    /// How long a transaction waits for another one's key or message id before it gives up with
    /// [`ErrorKind::Conflict`](crate::ErrorKind::Conflict); two that wait for each other end so. Default: 10 s.
    pub lock_wait: Duration,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            shards: 8,
            ordering: Ordering::Insert,
            limits: Limits::default(),
            archive: false,
            dead_letters: true,
            scheduled: true,
            parking: true,
            wake_up: true,
            lock_wait: Duration::from_secs(10),
        }
    }
}
