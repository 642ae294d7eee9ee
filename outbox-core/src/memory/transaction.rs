//! The producer's side: transactions whose messages become visible with their commit.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::OwnedMutexGuard;

use super::lock;
use super::state::Row;
use super::store::{Counters, MemoryStore};
use crate::enqueue::Enqueue;
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Message, MessageId};
use crate::shard::{Position, Shard, shard_of};
use crate::store::Ordering;

/// A transaction on a [`MemoryStore`]. Dropping it rolls it back.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// use outbox_core::{MemoryStore, Message};
///
/// let store = MemoryStore::default();
/// let message = Message::builder("orders").build()?;
/// let (mut early, mut late) = (store.begin(), store.begin());
/// store.enqueue(&mut early, &message).await?;
/// store.enqueue(&mut late, &message).await?;
/// late.commit();
/// assert_eq!(store.pending()[0].position.0, 2); // the first is still open
/// early.commit();
/// assert_eq!(store.pending()[0].position.0, 1);
/// # Ok(()) }
/// ```
pub struct MemoryTransaction {
    pub(super) store: MemoryStore,
    rows: Vec<(Position, Row)>,
    scheduled: Vec<(SystemTime, Shard, Message)>,
    /// Under [`Ordering::Sequenced`]: the keys' counters, locked until the end, and the numbers drawn so far.
    counters: Counters,
    drawn: BTreeMap<crate::message::OrderKey, i64>,
    /// What the inbox noted, each locked until the end.
    pub(super) received: BTreeMap<(Arc<str>, MessageId), OwnedMutexGuard<()>>,
}

impl MemoryTransaction {
    pub(super) fn new(store: MemoryStore) -> Self {
        Self {
            store,
            rows: Vec::new(),
            scheduled: Vec::new(),
            counters: Counters::new(),
            drawn: BTreeMap::new(),
            received: BTreeMap::new(),
        }
    }

    /// Makes everything visible at once, then lets waiting transactions go on.
    pub fn commit(mut self) {
        let now = self.store.now();
        {
            let mut state = lock(&self.store.inner.state);
            state.rows.extend(self.rows.drain(..));
            for (due, shard, message) in self.scheduled.drain(..) {
                state.schedule(due, shard, message);
            }
            for handled in self.received.keys() {
                state.handled.insert(handled.clone(), now);
            }
        }
        for (key, number) in &self.drawn {
            if let Some(counter) = self.counters.get_mut(key) {
                **counter = *number;
            }
        }
        self.store.inner.commits.tell();
    }

    /// What it has written and nobody sees.
    #[cfg(feature = "sim")]
    pub(crate) fn written(&self) -> impl Iterator<Item = crate::fetch::Record> {
        self.rows.iter().map(|(position, row)| row.record(*position))
    }

    /// Leaves nothing behind but the positions that were drawn.
    pub fn rollback(self) {}

    /// Writes messages in this order, all or none.
    async fn enqueue_many(&mut self, messages: &[Message]) -> Result<()> {
        let config = &self.store.inner.config;
        let (sequenced, shards) = (config.ordering == Ordering::Sequenced, config.shards);
        let now = self.store.now();
        for message in messages {
            config.limits.check(message)?;
            if message.deliver_at().is_some() && !config.scheduled {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "enqueue",
                    "this store has no scheduled delivery",
                )
                .with("id", message.id()));
            }
        }
        let ahead = |message: &Message| message.deliver_at().filter(|due| *due > now);
        if sequenced {
            // The counters come before the positions: so the order of commits is the order of positions.
            let keys: BTreeSet<_> = messages
                .iter()
                .filter(|message| ahead(message).is_none())
                .filter_map(Message::order_key)
                .filter(|key| !self.counters.contains_key(key))
                .collect();
            self.counters.extend(self.store.lock_counters(keys).await?);
        }
        let mut state = lock(&self.store.inner.state);
        for message in messages {
            let shard = shard_of(message.key().map(AsRef::as_ref), message.id(), shards);
            let mut parts = message.clone().into_parts();
            parts.created_at = Some(now);
            let message = Message::from_stored(parts);
            if let Some(due) = ahead(&message) {
                self.scheduled.push((due, shard, message));
                continue;
            }
            let key_seq = message.order_key().filter(|_| sequenced).map(|key| {
                let last = self.counters.get(&key).map_or(0, |counter| **counter);
                let number = self.drawn.entry(key).or_insert(last);
                *number += 1;
                *number
            });
            let row = Row {
                shard,
                key_seq,
                message,
            };
            self.rows.push((state.draw(), row));
        }
        Ok(())
    }
}

impl MemoryStore {
    /// Opens a transaction; any number may be open at once.
    #[must_use]
    pub fn begin(&self) -> MemoryTransaction {
        MemoryTransaction::new(self.clone())
    }

    /// Enqueues one message; see [`MemoryStore::enqueue_many`].
    ///
    /// # Errors
    /// As [`MemoryStore::enqueue_many`].
    pub async fn enqueue(&self, tx: &mut MemoryTransaction, message: &Message) -> Result<()> {
        self.enqueue_many(tx, std::slice::from_ref(message)).await
    }

    /// Enqueues messages in this order, all or none. Under [`Ordering::Sequenced`] it waits for other transactions
    /// that have enqueued messages of the same keys.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a message beyond the limits or a transaction of another store,
    /// [`ErrorKind::Unsupported`] for a scheduled message where there is no scheduled delivery,
    /// [`ErrorKind::Conflict`] when another transaction kept a key for longer than the configured wait.
    pub async fn enqueue_many(&self, tx: &mut MemoryTransaction, messages: &[Message]) -> Result<()> {
        if !Arc::ptr_eq(&self.inner, &tx.store.inner) {
            return Err(Error::new(
                ErrorKind::Invalid,
                "enqueue",
                "the transaction belongs to another store",
            ));
        }
        tx.enqueue_many(messages).await
    }
}

impl Enqueue<MemoryTransaction> for MemoryStore {
    async fn enqueue_many(&self, tx: &mut MemoryTransaction, messages: &[Message]) -> Result<()> {
        Self::enqueue_many(self, tx, messages).await
    }
}

impl fmt::Debug for MemoryTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryTransaction")
            .field("messages", &(self.rows.len() + self.scheduled.len()))
            .field("received", &self.received.len())
            .finish_non_exhaustive()
    }
}
