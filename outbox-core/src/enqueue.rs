//! Enqueueing: the producer's side, in the producer's own transaction.

use crate::error::Result;
use crate::message::Message;

/// Writes messages within a transaction `Tx` of the caller's, who commits it or rolls it back.
///
/// The type of the transaction is the driver's own (`rusqlite::Transaction`, `sqlx::Transaction`); nothing wraps it.
/// Stores also have inherent functions of the same names, which need no trait in scope.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] for a message beyond the limits: nothing of the call was written, the transaction
/// is still usable. Others as the database gives them: roll back.
///
/// # Cancel safety
/// Dropping the future leaves the transaction in an unknown state: roll it back.
///
/// # Example
/// ```
/// use outbox_core::{Enqueue, Message, Result};
///
/// /// Works with every store and its transaction.
/// async fn place<Tx>(outbox: &impl Enqueue<Tx>, tx: &mut Tx) -> Result<()> {
///     let message = Message::builder("orders").key("42").payload("placed").build()?;
///     outbox.enqueue(tx, &message).await
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<()> {
/// let store = outbox_core::MemoryStore::default();
/// let mut tx = store.begin();
/// place(&store, &mut tx).await?;
/// tx.commit();
/// # Ok(()) }
/// ```
pub trait Enqueue<Tx: ?Sized> {
    /// Enqueues one message.
    fn enqueue(&self, tx: &mut Tx, message: &Message) -> impl Future<Output = Result<()>> {
        self.enqueue_many(tx, std::slice::from_ref(message))
    }

    /// Enqueues messages in this order, all or none.
    fn enqueue_many(&self, tx: &mut Tx, messages: &[Message]) -> impl Future<Output = Result<()>>;
}
