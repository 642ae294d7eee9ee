//! The inbox: the consumer's side, which makes the effect of each message happen once.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::message::MessageId;

/// Whether a message was handled before.
///
/// ```
/// use outbox_core::Receive;
///
/// fn handle(receive: Receive, effects: impl FnOnce()) {
///     if receive == Receive::Fresh {
///         effects();
///     }
/// }
/// handle(Receive::Duplicate, || unreachable!());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receive {
    /// It is new: apply its effects in this transaction, then commit.
    Fresh,
    /// It was handled before: do nothing.
    Duplicate,
}

/// Notes handled messages within a transaction `Tx` of the consumer's.
///
/// The order is what makes it exact: **insert the id first**, where the unique key decides; then the effects; commit;
/// then the offset. Look before you leap (`SELECT`, then `INSERT`) lets two copies through.
///
/// A consumer is named, because each has its own effects.
///
/// # Cancel safety
/// Dropping a future leaves the transaction in an unknown state: roll it back.
///
/// # Example
/// ```
/// use outbox_core::{Inbox, MemoryInbox, MemoryStore, MessageId, Receive, Result};
///
/// /// Works with every inbox; `total` stands for the consumer's tables.
/// async fn bill<Tx>(inbox: &impl Inbox<Tx>, tx: &mut Tx, id: MessageId, total: &mut u32) -> Result<()> {
///     if inbox.receive(tx, "billing", id).await? == Receive::Fresh {
///         *total += 12;
///     }
///     Ok(())
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<()> {
/// let (store, id, mut total) = (MemoryStore::default(), MessageId::new(), 0);
/// for _ in 0..2 {
///     let mut tx = store.begin();
///     bill(&MemoryInbox, &mut tx, id, &mut total).await?;
///     tx.commit();
/// }
/// assert_eq!(total, 12);
/// # Ok(()) }
/// ```
pub trait Inbox<Tx: ?Sized> {
    /// Notes that `consumer` handles `id` in this transaction; waits for a concurrent copy to decide.
    fn receive(&self, tx: &mut Tx, consumer: &str, id: MessageId) -> impl Future<Output = Result<Receive>>;

    /// Forgets at most `limit` messages handled longer ago than `age`; says how many.
    ///
    /// What is forgotten and comes again takes effect again: `age` must exceed the longest time after which a copy
    /// may still arrive, the topic's retention included when consumers rewind. [`check_age`] refuses what is
    /// certainly too short.
    fn purge(&self, tx: &mut Tx, age: Duration, limit: usize) -> impl Future<Output = Result<usize>>;
}

/// The shortest age at which handled messages may be forgotten.
///
/// ```
/// assert!(outbox_core::check_age(outbox_core::MIN_INBOX_AGE).is_ok());
/// ```
pub const MIN_INBOX_AGE: Duration = Duration::from_secs(60 * 60);

/// Whether an age for a purge of the inbox is at least [`MIN_INBOX_AGE`].
///
/// # Errors
/// [`ErrorKind::Invalid`] when it is shorter.
///
/// # Example
/// ```
/// use std::time::Duration;
/// use outbox_core::check_age;
///
/// assert!(check_age(Duration::from_secs(7 * 24 * 3600)).is_ok());
/// assert!(check_age(Duration::from_secs(60)).is_err());
/// ```
pub fn check_age(age: Duration) -> Result<()> {
    if age < MIN_INBOX_AGE {
        return Err(Error::new(
            ErrorKind::Invalid,
            "purge inbox",
            "a copy of a message may arrive later than that and would take effect again; the least age is one hour",
        )
        .with("age", format!("{age:?}")));
    }
    Ok(())
}
