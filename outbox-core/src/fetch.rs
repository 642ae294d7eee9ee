//! What the relay asks a reader for, and what it gets.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::message::{Message, MessageId, OrderKey};
use crate::shard::{OwnedShard, Position, Shard};

/// A stored message as the relay reads it.
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordRef {
    /// Where the store put it.
    pub position: Position,
    /// Its id.
    pub id: MessageId,
}

/// What to read.
#[derive(Debug, Clone, Default)]
pub struct FetchRequest {
    /// The shards to read, with the epochs under which they are held.
    pub shards: Vec<OwnedShard>,
    /// What was read and is not known to be settled.
    pub in_flight: Vec<InFlight>,
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
            && !self
                .in_flight
                .iter()
                .any(|flight| flight.shard == shard && flight.position == position)
            && !self.held.holds(shard, position, topic, key)
    }
}

/// A record that was read and is not known to be settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InFlight {
    /// Its shard.
    pub shard: Shard,
    /// Its position.
    pub position: Position,
    /// Its ordering domain.
    pub key: Option<OrderKey>,
}

/// What must not be returned because its head waits.
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
