//! Inspection: the facts about a message, a key or a topic, from which [`explain`](crate::explain) tells why it waits.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;

use crate::error::Result;
use crate::fetch::RecordRef;
use crate::hold::{Hold, HoldScope};
use crate::lease::RelayId;
use crate::message::{Message, MessageId, OrderKey};
use crate::shard::{Position, Shard, shard_of};
use crate::store::{Count, LeaseStatus};

/// Looks where something stands and what is around it. For people, one question at a time; it changes nothing and
/// waits for nobody.
///
/// # Contract
/// - Of a message id all places **MUST** be told, up to [`MAX_PLACES`] of a kind: outbox, scheduled, archive, dead
///   letters, with what is known of each (`inspection_finds_every_place`, `inspection_finds_all_of_an_id`). Of a key
///   or a topic the first undelivered message is told, and how many there are (`inspection_finds_head`,
///   `inspection_finds_first_of_topic`).
/// - What stands in an outbox **MUST** be told with how many of its shard stand before it
///   (`inspection_tells_line`), and all holds that stop any of what was asked for, no others
///   (`inspection_tells_holds`). Leases and relays are told as [`crate::OutboxStore::stats`] does
///   (`inspection_tells_owners`), the last number of a key where keys are numbered (`inspection_tells_last_number`).
/// - It **MUST NOT** look at more than `bound` rows where it has to search, and never claims more than it saw: then
///   [`Facts::complete`] is false, and a count is [`Count::AtLeast`] (`inspection_keeps_its_bound`).
///
/// ```
/// use outbox_core::{Count, MemoryStore, Message, OutboxStore, Subject};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// let store = MemoryStore::default();
/// let mut tx = store.begin();
/// store.enqueue(&mut tx, &Message::builder("orders").key("42").build()?).await?;
/// tx.commit();
///
/// // `None` would say that this store cannot tell.
/// let facts = store.inspection().unwrap().inspect(&Subject::Topic("orders".into()), 1_000).await?;
/// assert_eq!(facts.backlog, Count::Exact(1));
/// # Ok(()) }
/// ```
#[async_trait]
pub trait Inspection: Send + Sync {
    /// The facts about `subject`, as of one moment; a search looks at no more than `bound` rows of a table, oldest
    /// first, in the archive newest first.
    async fn inspect(&self, subject: &Subject, bound: usize) -> Result<Facts>;
}

/// So many places of one kind are told at most: ids need not be unique, but an answer has to end.
///
/// ```
/// assert!(outbox_core::MAX_PLACES >= 100);
/// ```
pub const MAX_PLACES: usize = 100;

/// What is asked about.
///
/// ```
/// use outbox_core::Subject;
///
/// let subject = Subject::Topic("orders".into());
/// assert_eq!(subject.to_string(), "topic orders");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// All messages with this id.
    Message(MessageId),
    /// An ordering domain.
    Key(OrderKey),
    /// A topic.
    Topic(Arc<str>),
}

/// What a store knows about a subject.
///
/// ```
/// use outbox_core::{MemoryStore, Message, OutboxStore, Subject};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// let store = MemoryStore::default();
/// let mut tx = store.begin();
/// store.enqueue(&mut tx, &Message::builder("orders").key("42").build()?).await?;
/// tx.commit();
///
/// let facts = store.inspection().unwrap().inspect(&Subject::Topic("orders".into()), 1_000).await?;
/// assert!(facts.complete && facts.relays.is_empty());
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// The time by the database's clock.
    pub now: SystemTime,
    /// Of a message id: every place where such a message stands. Of a key or a topic: the first undelivered message.
    pub found: Vec<Standing>,
    /// How many undelivered messages of the subject there are.
    pub backlog: Count,
    /// Of a message or a key: the holds that stop it. Of a topic: its own, those of its keys, and that of the message
    /// that was found if it has no key; a keyless message's hold names no topic, so those of later ones are not told.
    pub holds: Vec<Hold>,
    /// Of a key, under [`crate::Ordering::Sequenced`]: the last number that was given.
    pub last_seq: Option<i64>,
    /// The leases of all shards.
    pub leases: Vec<LeaseStatus>,
    /// The relays whose membership has not expired.
    pub relays: Vec<RelayId>,
    /// Whether everything was looked at; false when the bound cut a search off.
    pub complete: bool,
}

/// A message where it stands, without its payload and its headers, which nobody needs in order to know why it waits.
///
/// ```
/// use outbox_core::{MemoryStore, Message, OutboxStore, Subject};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// let store = MemoryStore::default();
/// let mut tx = store.begin();
/// store.enqueue(&mut tx, &Message::builder("orders").key("42").build()?).await?;
/// tx.commit();
///
/// let facts = store.inspection().unwrap().inspect(&Subject::Topic("orders".into()), 1_000).await?;
/// assert_eq!(&*facts.found[0].topic, "orders");
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Its id.
    pub id: MessageId,
    /// Its topic.
    pub topic: Arc<str>,
    /// Its ordering domain; none without a key.
    pub key: Option<OrderKey>,
    /// Its number within its key, under [`crate::Ordering::Sequenced`].
    pub key_seq: Option<i64>,
    /// When it was enqueued, by the database's clock.
    pub created_at: Option<SystemTime>,
    /// Where it stands.
    pub place: Place,
}

/// Where a message stands.
///
/// ```
/// use outbox_core::{Count, Place, Position, Shard};
///
/// let place = Place::Outbox { shard: Shard(3), position: Position(42), ahead: Count::Exact(0) };
/// assert!(matches!(place, Place::Outbox { ahead: Count::Exact(0), .. })); // the next of its shard
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In the outbox: committed and not delivered.
    Outbox {
        /// Its shard.
        shard: Shard,
        /// Its position.
        position: Position,
        /// How many undelivered messages of its shard have a lower position.
        ahead: Count,
    },
    /// Among the scheduled ones: it has no position yet.
    Scheduled {
        /// Its shard.
        shard: Shard,
        /// When it is due, by the database's clock.
        due: SystemTime,
    },
    /// In the archive: delivered.
    Processed {
        /// The position it had.
        position: Position,
        /// When its delivery was settled.
        at: SystemTime,
    },
    /// In the dead letters: given up.
    Dead {
        /// The position it had.
        position: Position,
        /// How often it was tried.
        attempts: u32,
        /// What the sink said last.
        reason: String,
        /// When it was given up.
        at: SystemTime,
    },
}

impl Subject {
    /// The shard in which all of it is, if it has one of its own: a key has.
    ///
    /// ```
    /// use outbox_core::Subject;
    ///
    /// assert_eq!(Subject::Topic("orders".into()).shard(64), None);
    /// ```
    #[must_use]
    pub fn shard(&self, shards: u16) -> Option<Shard> {
        match self {
            // The id decides only where there is no key.
            Self::Key(key) => Some(shard_of(Some(&key.key), MessageId::from_bytes([0; 16]), shards)),
            Self::Message(_) | Self::Topic(_) => None,
        }
    }

    /// How many places in the outbox are told: of a key or a topic the first.
    ///
    /// ```
    /// use outbox_core::{MAX_PLACES, MessageId, Subject};
    ///
    /// assert_eq!(Subject::Message(MessageId::new()).places(), MAX_PLACES);
    /// assert_eq!(Subject::Topic("orders".into()).places(), 1);
    /// ```
    #[must_use]
    pub const fn places(&self) -> usize {
        match self {
            Self::Message(_) => MAX_PLACES,
            Self::Key(_) | Self::Topic(_) => 1,
        }
    }

    /// Whether a hold stops any of it; `found` is what was found of it. Ready-made for stores that have read all holds.
    ///
    /// ```
    /// use outbox_core::{Count, Hold, HoldScope, HoldState, Message, Place, Position, Shard, Standing, Subject};
    ///
    /// # fn main() -> outbox_core::Result<()> {
    /// let message = Message::builder("orders").build()?;
    /// let place = Place::Outbox { shard: Shard(0), position: Position(7), ahead: Count::Exact(0) };
    /// let first = Standing::of(&message, None, place);
    /// let head = outbox_core::RecordRef { position: Position(7), id: message.id() };
    /// let hold = Hold {
    ///     shard: Shard(0),
    ///     scope: HoldScope::Message,
    ///     head,
    ///     attempts: 3,
    ///     state: HoldState::Parked,
    ///     reason: "too large".into(),
    /// };
    /// let topic = Subject::Topic("orders".into());
    /// assert!(topic.is_stopped_by(&hold, &[first]));
    /// assert!(!topic.is_stopped_by(&hold, &[]));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn is_stopped_by(&self, hold: &Hold, found: &[Standing]) -> bool {
        match (self, &hold.scope) {
            (Self::Message(_), _) => found.iter().any(|standing| standing.is_stopped_by(hold)),
            (Self::Key(key), HoldScope::Topic(topic)) => key.topic == *topic,
            (Self::Key(key), HoldScope::Key(held)) => key == held,
            (Self::Topic(own), HoldScope::Topic(topic)) => own == topic,
            (Self::Topic(own), HoldScope::Key(held)) => *own == held.topic,
            // It names no topic: whose it is shows the message that it stops.
            (Self::Topic(_), HoldScope::Message) => found.iter().any(|standing| standing.is_stopped_by(hold)),
            (Self::Key(_), HoldScope::Message) => false,
        }
    }
}

impl Standing {
    /// What is told of a message that stands at a place.
    ///
    /// ```
    /// use outbox_core::{Message, Place, Shard, Standing};
    ///
    /// # fn main() -> outbox_core::Result<()> {
    /// let message = Message::builder("orders").key("42").build()?;
    /// let place = Place::Scheduled { shard: Shard(0), due: std::time::SystemTime::now() };
    /// assert_eq!(Standing::of(&message, None, place).key, message.order_key());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn of(message: &Message, key_seq: Option<i64>, place: Place) -> Self {
        Self {
            id: message.id(),
            topic: message.topic().into(),
            key: message.order_key(),
            key_seq,
            created_at: message.created_at(),
            place,
        }
    }

    /// Whether a hold stops it.
    #[must_use]
    pub fn is_stopped_by(&self, hold: &Hold) -> bool {
        let Place::Outbox { position, .. } = self.place else {
            return false;
        };
        match &hold.scope {
            HoldScope::Topic(topic) => *topic == self.topic,
            HoldScope::Key(key) => self.key.as_ref() == Some(key),
            HoldScope::Message => self.key.is_none() && hold.head.position == position,
        }
    }

    /// Whether it is the head of a hold.
    #[must_use]
    pub fn is_head_of(&self, hold: &Hold) -> bool {
        matches!(self.place, Place::Outbox { position, .. } if hold.head == RecordRef { position, id: self.id })
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(id) => write!(f, "message {id}"),
            Self::Key(key) => write!(f, "key {key}"),
            Self::Topic(topic) => write!(f, "topic {topic}"),
        }
    }
}
