//! Dead letters: messages taken out of the flow, kept whole.

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;

use crate::error::Result;
use crate::fetch::RecordRef;
use crate::message::{Message, MessageId};

/// A message taken out of the flow, whole, with its reason.
///
/// ```
/// use outbox_core::DeadLetter;
///
/// fn line(letter: &DeadLetter) -> String {
///     format!("{} to {}: {}", letter.record.id, letter.message.topic(), letter.reason)
/// }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct DeadLetter {
    /// Names it: its id and the position it had.
    pub record: RecordRef,
    /// The message.
    pub message: Message,
    /// Its number within its key, under [`crate::Ordering::Sequenced`]. Its place stays a hole.
    pub key_seq: Option<i64>,
    /// How often it was tried.
    pub attempts: u32,
    /// What the sink said last.
    pub reason: String,
    /// When it was given up, by the database's clock.
    pub died_at: SystemTime,
}

/// Which dead letters to list.
///
/// ```
/// use outbox_core::{DeadLetter, DeadLetterQuery};
///
/// let first = DeadLetterQuery { topic: Some("orders".into()), ..DeadLetterQuery::default() };
/// let next = |page: &[DeadLetter]| DeadLetterQuery {
///     after: page.last().map(|letter| letter.record),
///     ..first.clone()
/// };
/// assert_eq!(next(&[]), first);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterQuery {
    /// Only of this topic. Default: all.
    pub topic: Option<Arc<str>>,
    /// Only those with one of these ids; several may share one. Default: all.
    pub ids: Option<Vec<MessageId>>,
    /// Only after this one, for the next page. Default: from the start.
    pub after: Option<RecordRef>,
    /// At most so many. Default: 100.
    pub limit: usize,
}

impl Default for DeadLetterQuery {
    fn default() -> Self {
        Self {
            topic: None,
            ids: None,
            after: None,
            limit: 100,
        }
    }
}

/// Dead letters as operators see them. All of it is safe beside running relays and beside itself.
///
/// # Contract
/// - Of two concurrent calls for one dead letter exactly one **MUST** count it (`dead_letter_requeue_once`,
///   `dead_letter_discard`).
/// - A message that is given up **MUST** be here, whole, or still in the outbox: it is never in neither
///   (`dead_letter_keeps_whole`, `nothing_is_stranded`). It is named by position and id
///   (`dead_letters_may_share_an_id`), is found by both, by id
///   and by topic (`dead_letter_list_pages`, `dead_letter_list_by_id`, `dead_letter_list_by_topic`).
/// - A requeued message **MUST** keep its id, topic, key, payload and headers and gets a new position behind all
///   others: it is delivered out of its first order, which consumers must be told (`dead_letter_requeue_whole`).
///
/// # Example
/// ```
/// # use std::sync::Arc;
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// use outbox_core::{DeadLetterQuery, MemorySink, MemoryStore, Message, OutboxStore, Outcome, Relay};
///
/// let (store, sink) = (MemoryStore::default(), MemorySink::new());
/// let mut tx = store.begin();
/// store.enqueue(&mut tx, &Message::builder("orders").build()?).await?;
/// tx.commit();
/// sink.fail_next(Outcome::Poison("too large".into()));
/// Relay::new(Arc::new(store.clone()), Box::new(sink)).drain(std::future::pending()).await?;
///
/// let dead = store.dead_letters().expect("this store keeps them");
/// let letters = dead.list(&DeadLetterQuery::default()).await?;
/// assert_eq!(letters[0].reason, "too large");
/// assert_eq!(dead.requeue(&[letters[0].record]).await?, 1);
/// # Ok(()) }
/// ```
#[async_trait]
pub trait DeadLetters: Send + Sync {
    /// Dead letters in the order of (position, id).
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>>;

    /// Puts them back at the end of the outbox; says how many were still there.
    async fn requeue(&self, records: &[RecordRef]) -> Result<usize>;

    /// Deletes them for good; says how many were still there.
    async fn discard(&self, records: &[RecordRef]) -> Result<usize>;
}
