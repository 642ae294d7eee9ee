//! Settling: what became of messages, written back under the shards' epochs.

use crate::fetch::RecordRef;
use crate::hold::HoldChange;
use crate::lease::RelayId;
use crate::shard::{Epoch, OwnedShard, Shard};

/// What became of messages that were fetched: any subset of them, of any number of shards.
///
/// ```
/// use outbox_core::{Epoch, OwnedShard, RelayId, Settlement, Shard, ShardSettlement};
///
/// let settlement = Settlement {
///     relay: RelayId::new("relay-1"),
///     shards: vec![ShardSettlement::new(Shard(3), Epoch(7))],
/// };
/// // A store passes what it read, under a lock, of its lease rows.
/// let (kept, lost) = settlement.fence(&[OwnedShard { shard: Shard(3), epoch: Epoch(8) }]);
/// assert!(kept.is_empty());
/// assert_eq!(lost, [Shard(3)]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settlement {
    /// Who settles.
    pub relay: RelayId,
    /// What, shard by shard; each shard stands once.
    pub shards: Vec<ShardSettlement>,
}

/// What became of messages of one shard: written wholly, or not at all when `epoch` is no longer held.
///
/// ```
/// use outbox_core::{Epoch, MessageId, Position, RecordRef, Shard, ShardSettlement};
///
/// let mut part = ShardSettlement::new(Shard(3), Epoch(7));
/// assert!(part.is_empty());
/// part.delivered.push(RecordRef { position: Position(1), id: MessageId::new() });
/// assert!(part.is_deliveries_only());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardSettlement {
    /// The shard.
    pub shard: Shard,
    /// The epoch under which they were fetched.
    pub epoch: Epoch,
    /// Delivered: to be deleted, or moved to the archive.
    pub delivered: Vec<RecordRef>,
    /// Given up: to be moved to the dead letters.
    pub dead: Vec<Death>,
    /// Holds to write or to remove, in this order.
    pub holds: Vec<HoldChange>,
}

/// A message that is given up.
///
/// ```
/// use outbox_core::{Death, Record, Reason};
///
/// fn give_up(record: &Record, reason: &Reason) -> Death {
///     Death { record: record.reference(), attempts: record.attempts + 1, reason: reason.to_string() }
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// Which.
    pub record: RecordRef,
    /// How often it was tried.
    pub attempts: u32,
    /// What the sink said last, for people.
    pub reason: String,
}

/// The answer to a settlement that was committed.
///
/// ```
/// use outbox_core::{Settled, Shard};
///
/// let settled = Settled { lost: vec![Shard(3)] };
/// assert_ne!(settled, Settled::default()); // by default all was written
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settled {
    /// Shards whose epoch is no longer held; nothing was changed for them.
    pub lost: Vec<Shard>,
}

impl Settled {
    /// What was lost of a settlement of which these shards are still held.
    ///
    /// ```
    /// use outbox_core::{Epoch, RelayId, Settled, Settlement, Shard, ShardSettlement};
    ///
    /// let settlement = Settlement {
    ///     relay: RelayId::new("me"),
    ///     shards: [1, 2].map(|shard| ShardSettlement::new(Shard(shard), Epoch(1))).into(),
    /// };
    /// assert_eq!(Settled::but_for(&settlement, &[Shard(1)]).lost, [Shard(2)]);
    /// ```
    #[must_use]
    pub fn but_for(settlement: &Settlement, held: &[Shard]) -> Self {
        let shards = settlement.shards.iter().map(|part| part.shard);
        Self {
            lost: shards.filter(|shard| !held.contains(shard)).collect(),
        }
    }
}

impl ShardSettlement {
    /// Nothing yet.
    #[must_use]
    pub const fn new(shard: Shard, epoch: Epoch) -> Self {
        Self {
            shard,
            epoch,
            delivered: Vec::new(),
            dead: Vec::new(),
            holds: Vec::new(),
        }
    }

    /// How many messages and holds it touches.
    #[must_use]
    pub fn len(&self) -> usize {
        self.delivered.len() + self.dead.len() + self.holds.len()
    }

    /// Whether it settles deliveries and nothing else.
    #[must_use]
    pub fn is_deliveries_only(&self) -> bool {
        self.dead.is_empty() && self.holds.is_empty()
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Settlement {
    /// Divides it by the epochs that the relay holds now, which the store has read **under a lock** that excludes a
    /// take-over until the settlement is committed: what may be written, and what is lost.
    #[must_use]
    pub fn fence(&self, held: &[OwnedShard]) -> (Vec<&ShardSettlement>, Vec<Shard>) {
        let (kept, lost): (Vec<_>, Vec<_>) = self.shards.iter().partition(|part| {
            held.contains(&OwnedShard {
                shard: part.shard,
                epoch: part.epoch,
            })
        });
        (kept, lost.into_iter().map(|part| part.shard).collect())
    }
}
