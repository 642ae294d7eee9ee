//! Holds: the durable notes that a key, a keyless message or a topic waits.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;
use crate::fetch::RecordRef;
use crate::message::OrderKey;
use crate::shard::Shard;

/// The durable note that something waits, so that a relay that takes over neither forgets attempts nor hurries.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::{Hold, HoldScope, HoldState, MessageId, Position, RecordRef, Shard};
///
/// let hold = Hold {
///     shard: Shard(3),
///     scope: HoldScope::Topic("orders".into()),
///     head: RecordRef { position: Position(7), id: MessageId::new() },
///     attempts: 0,
///     state: HoldState::Retrying { due_in: Duration::from_secs(1) },
///     reason: "unknown topic".into(),
/// };
/// assert_eq!(hold.reference().head, hold.head);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// The shard it belongs to.
    pub shard: Shard,
    /// What waits.
    pub scope: HoldScope,
    /// The message that failed: the head of the key, the keyless message itself, or the one a topic is probed with.
    pub head: RecordRef,
    /// How often it failed, as an absolute number.
    pub attempts: u32,
    /// How it goes on.
    pub state: HoldState,
    /// What the sink said, for people.
    pub reason: String,
}

/// What waits.
///
/// ```
/// use outbox_core::{HoldScope, OrderKey};
///
/// let scope = HoldScope::Key(OrderKey { topic: "orders".into(), key: "42".into() });
/// assert_eq!(scope.to_string(), "key orders/42");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HoldScope {
    /// All messages of a topic.
    Topic(Arc<str>),
    /// All messages of a key.
    Key(OrderKey),
    /// The one keyless message that is the hold's head.
    Message,
}

/// How a hold goes on.
///
/// ```
/// use outbox_core::HoldState;
///
/// fn says(state: HoldState) -> String {
///     match state {
///         HoldState::Retrying { due_in } => format!("tried again in {due_in:?}"),
///         HoldState::Parked => "waits for you".into(),
///     }
/// }
/// assert_eq!(says(HoldState::Parked), "waits for you");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HoldState {
    /// It is tried again after this time, by the database's clock; zero is now.
    Retrying {
        /// Time from now.
        due_in: Duration,
    },
    /// It waits for an operator.
    Parked,
}

/// Names a hold within its store: the shard, what waits, and for a keyless message its position.
///
/// ```
/// use outbox_core::{HoldRef, HoldScope, MessageId, Position, RecordRef, Shard};
///
/// let head = RecordRef { position: Position(7), id: MessageId::new() };
/// let hold = HoldRef { shard: Shard(3), scope: HoldScope::Message, head };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HoldRef {
    /// The shard.
    pub shard: Shard,
    /// What waits.
    pub scope: HoldScope,
    /// The head.
    pub head: RecordRef,
}

impl Hold {
    /// What names it.
    #[must_use]
    pub fn reference(&self) -> HoldRef {
        HoldRef {
            shard: self.shard,
            scope: self.scope.clone(),
            head: self.head,
        }
    }
}

/// A change of holds within a settlement.
///
/// ```
/// use outbox_core::{Hold, HoldChange, ShardSettlement};
///
/// /// A key was delivered at last: the hold of its head goes.
/// fn cleared(part: &mut ShardSettlement, hold: &Hold) {
///     part.delivered.push(hold.head);
///     part.holds.push(HoldChange::Clear(hold.reference()));
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HoldChange {
    /// Writes the hold, in place of one that may be there for the same scope (for a keyless message: the same
    /// position).
    Put(Hold),
    /// Removes it, if it is there.
    Clear(HoldRef),
}

/// Parked holds as operators see them: the head of a key waits in the outbox until someone decides.
///
/// The relay notices within seconds. All of it is safe beside a running relay.
///
/// # Contract
/// - What is parked, and nothing else, **MUST** be listed, resumed and buried, each once (`parked_is_listed`,
///   `parked_resumes`, `only_parked_is_resumed`). What is resumed is due now with no attempts, or has no hold.
/// - What is buried **MUST** be a dead letter, with what the hold knew, and its hold gone, in one transaction
///   (`parked_is_buried`, `parked_topic_is_not_buried`).
///
/// # Example
/// ```
/// # use std::sync::Arc;
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// use outbox_core::{MemorySink, MemoryStore, Message, OnFailure, OutboxStore, Outcome, Relay, RelayConfig};
///
/// let (store, sink) = (MemoryStore::default(), MemorySink::new());
/// let mut tx = store.begin();
/// store.enqueue(&mut tx, &Message::builder("orders").key("42").build()?).await?;
/// tx.commit();
/// sink.fail_next(Outcome::Poison("too large".into()));
/// let config = RelayConfig { on_failure: OnFailure::Park, ..RelayConfig::default() };
/// let relay = Relay::new(Arc::new(store.clone()), Box::new(sink)).with_config(config);
/// relay.drain(std::future::pending()).await?;
///
/// let parking = store.parking().expect("this store lets keys be resumed");
/// let parked = parking.parked(10).await?;
/// assert_eq!(parked[0].scope.to_string(), "key orders/42");
/// assert!(parking.resume(&parked[0].reference()).await?);
/// # Ok(()) }
/// ```
#[async_trait]
pub trait Parking: Send + Sync {
    /// At most `limit` parked holds, oldest head first.
    async fn parked(&self, limit: usize) -> Result<Vec<Hold>>;

    /// Tries it again from the first attempt; false when no such hold is parked (any more).
    async fn resume(&self, hold: &HoldRef) -> Result<bool>;

    /// Moves the head to the dead letters and lets the key go on; false when no such hold is parked (any more).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for a topic, and in a store without dead letters.
    async fn bury(&self, hold: &HoldRef) -> Result<bool>;
}

impl fmt::Display for HoldScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Topic(topic) => write!(f, "topic {topic}"),
            Self::Key(key) => write!(f, "key {key}"),
            Self::Message => f.write_str("message"),
        }
    }
}
