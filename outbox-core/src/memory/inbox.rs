//! The consumer's side: which messages were handled.

use std::sync::Arc;
use std::time::Duration;

use super::lock;
use super::transaction::MemoryTransaction;
use crate::error::Result;
use crate::inbox::{Inbox, Receive, check_age};
use crate::message::MessageId;

/// The inbox of a [`MemoryStore`](crate::MemoryStore), for the consumer's unit tests.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// use outbox_core::{Inbox, MemoryInbox, MemoryStore, MessageId, Receive};
///
/// let (store, inbox, id) = (MemoryStore::default(), MemoryInbox, MessageId::new());
/// let mut tx = store.begin();
/// assert_eq!(inbox.receive(&mut tx, "billing", id).await?, Receive::Fresh);
/// tx.commit();
/// assert_eq!(inbox.receive(&mut store.begin(), "billing", id).await?, Receive::Duplicate);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct MemoryInbox;

impl Inbox<MemoryTransaction> for MemoryInbox {
    async fn receive(&self, tx: &mut MemoryTransaction, consumer: &str, id: MessageId) -> Result<Receive> {
        let name = (Arc::from(consumer), id);
        if tx.received.contains_key(&name) {
            return Ok(Receive::Duplicate);
        }
        let claim = tx.store.claim(&name).await?;
        if lock(&tx.store.inner.state).handled.contains_key(&name) {
            return Ok(Receive::Duplicate);
        }
        tx.received.insert(name, claim);
        Ok(Receive::Fresh)
    }

    /// Forgets at once: a rollback does not bring back what was purged.
    async fn purge(&self, tx: &mut MemoryTransaction, age: Duration, limit: usize) -> Result<usize> {
        check_age(age)?;
        let Some(oldest) = tx.store.now().checked_sub(age) else {
            return Ok(0);
        };
        let mut state = lock(&tx.store.inner.state);
        let old: Vec<_> = state
            .handled
            .iter()
            .filter(|(_, handled)| **handled < oldest)
            .map(|(name, _)| name.clone())
            .take(limit)
            .collect();
        for name in &old {
            state.handled.remove(name);
        }
        Ok(old.len())
    }
}
