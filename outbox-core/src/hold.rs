//! Holds: the durable notes that a key, a keyless message or a topic waits.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::{Error, ErrorKind, Result};
use crate::fetch::RecordRef;
use crate::lease::millis;
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

impl HoldScope {
    /// The scope that a [`HoldName`] names.
    ///
    /// ```
    /// use outbox_core::HoldScope;
    ///
    /// assert_eq!(HoldScope::named("topic", "orders", b""), HoldScope::Topic("orders".into()));
    /// ```
    #[must_use]
    pub fn named(scope: &str, topic: &str, key: &[u8]) -> Self {
        match scope {
            "topic" => Self::Topic(topic.into()),
            "key" => Self::Key(OrderKey {
                topic: topic.into(),
                key: Bytes::copy_from_slice(key),
            }),
            _ => Self::Message,
        }
    }
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

impl HoldState {
    /// What a row says that was [`stored`](Self::stored), and how many milliseconds are left; what is over is now.
    ///
    /// ```
    /// use std::time::Duration;
    /// use outbox_core::HoldState;
    ///
    /// let state = HoldState::Retrying { due_in: Duration::from_secs(1) };
    /// let (parked, due_in) = state.stored();
    /// assert_eq!(HoldState::read(parked, due_in), state);
    /// ```
    #[must_use]
    pub const fn read(parked: bool, left: i64) -> Self {
        if parked {
            return Self::Parked;
        }
        let left = if left < 0 { 0 } else { left.unsigned_abs() };
        Self::Retrying {
            due_in: Duration::from_millis(left),
        }
    }

    /// As a row has it: whether it is parked, and in how many milliseconds it is due.
    ///
    /// A time that no clock reaches would overflow a database's sum: it is cut at a thousand years.
    ///
    /// ```
    /// use outbox_core::HoldState;
    ///
    /// assert_eq!(HoldState::Parked.stored(), (true, 0));
    /// ```
    #[must_use]
    pub fn stored(self) -> (bool, i64) {
        const FAR: Duration = Duration::from_secs(1_000 * 366 * 24 * 60 * 60);
        match self {
            Self::Parked => (true, 0),
            Self::Retrying { due_in } => (false, millis(due_in.min(FAR))),
        }
    }
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

impl HoldRef {
    /// Whether there is one message that could be buried: a topic is parked for all of its own.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a topic.
    ///
    /// ```
    /// use outbox_core::{ErrorKind, HoldRef, HoldScope, MessageId, Position, RecordRef, Shard};
    ///
    /// let head = RecordRef { position: Position(1), id: MessageId::new() };
    /// let topic = HoldRef { shard: Shard(0), scope: HoldScope::Topic("orders".into()), head };
    /// assert_eq!(topic.check_buriable().unwrap_err().kind(), ErrorKind::Unsupported);
    /// ```
    pub fn check_buriable(&self) -> Result<()> {
        match &self.scope {
            HoldScope::Topic(topic) => Err(Error::new(
                ErrorKind::Unsupported,
                "bury",
                "a topic is parked for all its messages, not for one that could be buried: resume it",
            )
            .with("topic", topic)),
            HoldScope::Key(_) | HoldScope::Message => Ok(()),
        }
    }
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

/// What names a hold where holds are rows: its primary key. The fields that a scope does not use are empty, so that the
/// key is total.
///
/// ```
/// use outbox_core::{HoldName, HoldScope, MessageId, Position, RecordRef, Shard};
///
/// let head = RecordRef { position: Position(7), id: MessageId::new() };
/// let name = HoldName::new(Shard(3), &HoldScope::Message, head);
/// assert_eq!((name.scope, name.topic, name.message), ("message", "", 7));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HoldName<'h> {
    /// The shard.
    pub shard: Shard,
    /// `topic`, `key` or `message`.
    pub scope: &'static str,
    /// The topic, of a topic or of a key.
    pub topic: &'h str,
    /// The key.
    pub key: &'h [u8],
    /// The position of a keyless message.
    pub message: i64,
}

impl<'h> HoldName<'h> {
    /// Of what waits, with its head.
    #[must_use]
    pub fn new(shard: Shard, scope: &'h HoldScope, head: RecordRef) -> Self {
        let (scope, topic, key, message): (_, &str, &[u8], _) = match scope {
            HoldScope::Topic(topic) => ("topic", topic, &[], 0),
            HoldScope::Key(key) => ("key", &key.topic, &key.key, 0),
            HoldScope::Message => ("message", "", &[], head.position.0),
        };
        Self {
            shard,
            scope,
            topic,
            key,
            message,
        }
    }
}

/// Changes of holds by name, for stores that write many at once: of one name the last change counts.
///
/// ```
/// use outbox_core::{HoldChange, HoldChanges, HoldRef, HoldScope, MessageId, Position, RecordRef, Shard};
///
/// let head = RecordRef { position: Position(7), id: MessageId::new() };
/// let clear = HoldChange::Clear(HoldRef { shard: Shard(3), scope: HoldScope::Message, head });
/// let mut changes = HoldChanges::default();
/// changes.add(Shard(3), &clear);
/// changes.add(Shard(3), &clear);
/// assert_eq!((changes.cleared().count(), changes.put().count()), (1, 0));
/// ```
#[derive(Debug, Default)]
pub struct HoldChanges<'h>(BTreeMap<HoldName<'h>, Option<&'h Hold>>);

impl<'h> HoldChanges<'h> {
    /// Notes a change of a shard's part of a settlement.
    pub fn add(&mut self, shard: Shard, change: &'h HoldChange) {
        let (name, hold) = match change {
            HoldChange::Put(hold) => (HoldName::new(shard, &hold.scope, hold.head), Some(hold)),
            HoldChange::Clear(hold) => (HoldName::new(shard, &hold.scope, hold.head), None),
        };
        self.0.insert(name, hold);
    }

    /// What goes.
    pub fn cleared(&self) -> impl Iterator<Item = HoldName<'h>> + Clone {
        let cleared = |(name, hold): (&HoldName<'h>, &Option<_>)| hold.is_none().then_some(*name);
        self.0.iter().filter_map(cleared)
    }

    /// What is written.
    pub fn put(&self) -> impl Iterator<Item = (HoldName<'h>, &'h Hold)> + Clone {
        self.0
            .iter()
            .filter_map(|(name, hold)| hold.map(|hold| (*name, hold)))
    }
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
