//! What the relay asks a reader for, and what it gets.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::message::{Message, MessageId, OrderKey};
use crate::shard::{OwnedShard, Position, Shard};

/// How a store's readers read.
///
/// ```
/// assert_eq!(outbox_core::FetchMode::default(), outbox_core::FetchMode::Cursor);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FetchMode {
    /// From where they stopped, and separately what is wanted again.
    #[default]
    Cursor,
    /// From the start each time: correct by construction, slow behind many held messages.
    Rescan,
}

/// A stored message as the relay reads it.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// # let store = outbox_core::MemoryStore::default();
/// # let mut tx = store.begin();
/// # store.enqueue(&mut tx, &outbox_core::Message::builder("orders").build()?).await?;
/// # tx.commit();
/// let record = &store.pending()[0];
/// assert_eq!((record.position.0, record.attempts), (1, 0));
/// assert_eq!(record.reference().id, record.message.id());
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The shard it belongs to.
    pub shard: Shard,
    /// Where the store put it.
    pub position: Position,
    /// Its number within its key, without gaps; only under [`crate::Ordering::Sequenced`].
    pub key_seq: Option<i64>,
    /// How often it failed before. Readers leave it 0; the relay fills it in from the holds.
    pub attempts: u32,
    /// The message.
    pub message: Message,
    /// Why the stored row cannot be understood; such a record is dead-lettered alone and never sent.
    pub defect: Option<String>,
}

impl Record {
    /// What names it in a settlement.
    #[must_use]
    pub fn reference(&self) -> RecordRef {
        RecordRef {
            position: self.position,
            id: self.message.id(),
        }
    }
}

/// Names a stored message within its shard: by position **and** id, so that a sequence that went back can never
/// make a settlement hit another message.
///
/// ```
/// use outbox_core::{MessageId, Position, RecordRef};
///
/// let record = RecordRef { position: Position(7), id: MessageId::new() };
/// assert_ne!(record, RecordRef { id: MessageId::new(), ..record }); // another message at the same place
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordRef {
    /// Where the store put it.
    pub position: Position,
    /// Its id.
    pub id: MessageId,
}

/// What to read.
///
/// ```
/// use outbox_core::{Epoch, FetchRequest, OwnedShard, Position, Shard};
///
/// let request = FetchRequest {
///     shards: vec![OwnedShard { shard: Shard(3), epoch: Epoch(1) }],
///     max_rows: 100,
///     max_bytes: 1 << 20,
///     ..FetchRequest::default()
/// };
/// assert!(request.admits(Shard(3), Position(1), &"orders".into(), None));
/// assert!(!request.admits(Shard(4), Position(1), &"orders".into(), None)); // not asked for
/// ```
#[derive(Debug, Clone, Default)]
pub struct FetchRequest {
    /// The shards to read, with the epochs under which they are held.
    pub shards: Vec<OwnedShard>,
    /// What was read and is not known to be settled.
    pub in_flight: Vec<(Shard, Position)>,
    /// What waits.
    pub held: Arc<Held>,
    /// What was returned before, was not delivered, and is wanted again. Told once.
    pub reread: Vec<Reread>,
    /// At most so many records; at least 1.
    pub max_rows: usize,
    /// At most so many bytes of messages, but at least one record.
    pub max_bytes: usize,
}

impl FetchRequest {
    /// Whether a row may be returned: its shard was asked for, and it is neither in flight nor held.
    ///
    /// For stores that filter in memory; `in_flight` is searched one by one, so SQL stores had better not.
    #[must_use]
    pub fn admits(&self, shard: Shard, position: Position, topic: &Arc<str>, key: Option<&OrderKey>) -> bool {
        self.shards.iter().any(|owned| owned.shard == shard)
            && !self.in_flight.contains(&(shard, position))
            && !self.held.holds(shard, position, topic, key)
    }
}

/// What must not be returned because its head waits.
///
/// ```
/// use outbox_core::{Held, Position, Shard};
///
/// let held = Held { topics: ["orders".into()].into(), ..Held::default() };
/// assert!(held.holds(Shard(0), Position(1), &"orders".into(), None));
/// assert!(!held.holds(Shard(0), Position(1), &"films".into(), None));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    /// Topics that are blocked, on every shard.
    pub topics: BTreeSet<Arc<str>>,
    /// Keys whose head waits.
    pub keys: BTreeSet<(Shard, OrderKey)>,
    /// Keyless messages that wait, one by one.
    pub messages: BTreeSet<(Shard, Position)>,
}

impl Held {
    /// Whether a row is held.
    #[must_use]
    pub fn holds(&self, shard: Shard, position: Position, topic: &Arc<str>, key: Option<&OrderKey>) -> bool {
        self.topics.contains(topic)
            || match key {
                // A lookup wants an owned pair; the clone is two counters.
                Some(key) => !self.keys.is_empty() && self.keys.contains(&(shard, key.clone())),
                None => self.messages.contains(&(shard, position)),
            }
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.topics.is_empty() && self.keys.is_empty() && self.messages.is_empty()
    }
}

/// Something that was returned before and is wanted again, from a position (inclusive).
///
/// ```
/// use outbox_core::{Position, Reread, RereadScope, Shard};
///
/// let reread = Reread { shard: Shard(3), scope: RereadScope::Shard, from: Position(7) };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reread {
    /// The shard.
    pub shard: Shard,
    /// What of it.
    pub scope: RereadScope,
    /// The lowest position that is wanted again.
    pub from: Position,
}

/// What is wanted again of a shard.
///
/// ```
/// use outbox_core::{OrderKey, RereadScope};
///
/// let key = OrderKey { topic: "orders".into(), key: "42".into() };
/// let scope = RereadScope::Key(key);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RereadScope {
    /// Everything.
    Shard,
    /// One key.
    Key(OrderKey),
    /// The one keyless message at the position.
    Message,
}

/// What a reader found.
///
/// ```
/// use outbox_core::Fetched;
///
/// fn says(fetched: &Fetched) -> String {
///     match fetched {
///         Fetched::Batch { records, more: true } => format!("{} and there may be more", records.len()),
///         Fetched::Batch { records, more: false } => format!("{}, all there was", records.len()),
///         Fetched::Reset { reason } => format!("begin anew: {reason}"),
///     }
/// }
/// assert_eq!(says(&Fetched::Batch { records: Vec::new(), more: false }), "0, all there was");
/// ```
#[derive(Debug, Clone, PartialEq)]
pub enum Fetched {
    /// Records, in order within each key.
    Batch {
        /// The records.
        records: Vec<Record>,
        /// Whether there may be more right now: a limit cut the batch off.
        more: bool,
    },
    /// The server is another one, or its numbers went back: everything the relay knows is void.
    Reset {
        /// What was noticed.
        reason: String,
    },
}
