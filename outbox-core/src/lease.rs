//! Leases: which relay owns which shard, until when.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::shard::{Epoch, OwnedShard, Shard};
use crate::store::LeaseStatus;

/// Names one run of one relay. Two running relays **must not** share it; [`RelayId::unique`] sees to that.
///
/// ```
/// use outbox_core::RelayId;
///
/// assert_ne!(RelayId::unique("relay"), RelayId::unique("relay"));
/// assert_eq!(RelayId::new("relay-1").to_string(), "relay-1");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RelayId(Arc<str>);

impl RelayId {
    /// The id with this name.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// A name that no other relay has: `prefix`, the process and a random part.
    #[must_use]
    pub fn unique(prefix: &str) -> Self {
        let random = uuid::Uuid::new_v4().simple().to_string();
        Self(format!("{prefix}-{}-{}", std::process::id(), &random[..8]).into())
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RelayId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a relay asks for when it renews.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::{LeaseRequest, RelayId};
///
/// let join = LeaseRequest { relay: RelayId::unique("relay"), want: 0, ttl: Duration::from_secs(10) };
/// let take = LeaseRequest { want: 32, ..join };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRequest {
    /// Who asks.
    pub relay: RelayId,
    /// How many shards it wants in all. With 0 it only becomes, or stays, a member.
    pub want: u16,
    /// How long the leases and the membership are to last from now, by the database's clock.
    pub ttl: Duration,
}

impl LeaseRequest {
    /// The span in milliseconds, a year at most: what is longer overflows the times of databases.
    ///
    /// ```
    /// use std::time::Duration;
    /// use outbox_core::{LeaseRequest, RelayId};
    ///
    /// let forever = LeaseRequest { relay: RelayId::new("me"), want: 1, ttl: Duration::MAX };
    /// assert_eq!(forever.ttl_millis(), 366 * 24 * 60 * 60 * 1_000);
    /// ```
    #[must_use]
    pub fn ttl_millis(&self) -> StoreMillis {
        millis(self.ttl.min(Duration::from_secs(366 * 24 * 60 * 60)))
    }
}

/// What a relay owns now.
///
/// ```
/// use outbox_core::Leases;
///
/// /// What a relay should hold of the shards, with so many relays alive.
/// fn share(shards: u16, leases: &Leases) -> u16 {
///     shards.div_ceil(leases.relays.max(1))
/// }
/// assert_eq!(share(64, &Leases { relays: 3, ..Leases::default() }), 22);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Leases {
    /// All shards it owns, and under which epochs. What is not here is not, or no longer, its own.
    pub held: Vec<OwnedShard>,
    /// How many relays are alive, this one included.
    pub relays: u16,
    /// How long the shortest of the leases still runs, by the database's clock.
    pub time_left: Duration,
}

/// Whether a relay that releases shards stays a member.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::{LeaseRequest, LeaseTable, Membership, RelayId};
///
/// let (mut table, relay) = (LeaseTable::new(4), RelayId::new("relay-1"));
/// let held = table.lease(&LeaseRequest { relay: relay.clone(), want: 4, ttl: Duration::from_secs(10) }, 0).held;
/// table.release(&relay, &held[..2], Membership::Stays); // makes room for another relay
/// assert_eq!((table.held_by(&relay, 0).len(), table.relays(0).len()), (2, 1));
/// table.release(&relay, &held[2..], Membership::Leaves); // stops
/// assert_eq!((table.held_by(&relay, 0).len(), table.relays(0).len()), (0, 0));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// It gives shards away to others and goes on.
    Stays,
    /// It stops.
    Leaves,
}

/// Milliseconds by the database's clock, from whatever beginning it counts.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::{StoreMillis, millis};
///
/// let now: StoreMillis = 1_000; // from the database
/// assert_eq!(now + millis(Duration::from_secs(10)), 11_000);
/// ```
pub type StoreMillis = i64;

/// The leasing rules, ready-made for stores: load the rows in a transaction that excludes other writers of them,
/// apply the request, write the rows back, commit.
///
/// A store that can say all this in statements of its own need not use it.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::{LeaseRequest, LeaseTable, RelayId};
///
/// let mut table = LeaseTable::new(4);
/// let request = |name: &str, want| LeaseRequest { relay: RelayId::new(name), want, ttl: Duration::from_secs(10) };
///
/// assert_eq!(table.lease(&request("a", 4), 0).held.len(), 4);
/// assert_eq!(table.lease(&request("b", 2), 5_000).held.len(), 0); // all taken
/// let taken = table.lease(&request("b", 2), 10_000); // a's have expired
/// assert_eq!((taken.held.len(), taken.relays), (2, 1));
/// assert_eq!(taken.held[0].epoch.0, 2);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct LeaseTable {
    /// One row a shard.
    pub leases: BTreeMap<Shard, LeaseRow>,
    /// One row a member: until when it counts as alive.
    pub members: BTreeMap<RelayId, StoreMillis>,
}

/// The lease of one shard as it is stored.
///
/// ```
/// use outbox_core::{LeaseRow, RelayId};
///
/// let row = LeaseRow { owner: Some(RelayId::new("relay-1")), epoch: 7, until: 11_000 };
/// assert!(row.until > 10_999 && row.until <= 11_000); // owned until then, exclusive
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct LeaseRow {
    /// Who owns it, or owned it last.
    pub owner: Option<RelayId>,
    /// How often its owner changed.
    pub epoch: i64,
    /// Until when, exclusive.
    pub until: StoreMillis,
}

impl LeaseTable {
    /// Free shards and no members.
    #[must_use]
    pub fn new(shards: u16) -> Self {
        Self {
            leases: (0..shards)
                .map(|shard| (Shard(shard), LeaseRow::default()))
                .collect(),
            ..Self::default()
        }
    }

    /// Renews, takes and counts, as [`crate::OutboxStore::lease`] promises.
    pub fn lease(&mut self, request: &LeaseRequest, now: StoreMillis) -> Leases {
        let until = now.saturating_add(millis(request.ttl));
        self.members.retain(|_, until| *until > now);
        self.members.insert(request.relay.clone(), until);

        let mut held = Vec::new();
        for (shard, lease) in &mut self.leases {
            if lease.owner.as_ref() == Some(&request.relay) && lease.until > now {
                lease.until = until;
                held.push(OwnedShard {
                    shard: *shard,
                    epoch: Epoch(lease.epoch),
                });
            }
        }
        for (shard, lease) in &mut self.leases {
            if held.len() >= usize::from(request.want) {
                break;
            }
            if lease.owner.is_none() || lease.until <= now {
                *lease = LeaseRow {
                    owner: Some(request.relay.clone()),
                    epoch: lease.epoch + 1,
                    until,
                };
                held.push(OwnedShard {
                    shard: *shard,
                    epoch: Epoch(lease.epoch),
                });
            }
        }
        held.sort_unstable();
        Leases {
            held,
            relays: u16::try_from(self.members.len()).unwrap_or(u16::MAX),
            time_left: request.ttl,
        }
    }

    /// Frees shards held under these epochs, as [`crate::OutboxStore::release`] promises.
    pub fn release(&mut self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) {
        for owned in shards {
            if let Some(lease) = self.leases.get_mut(&owned.shard)
                && lease.owner.as_ref() == Some(relay)
                && lease.epoch == owned.epoch.0
            {
                lease.owner = None;
                lease.until = 0;
            }
        }
        if membership == Membership::Leaves {
            self.members.remove(relay);
        }
    }

    /// What a relay holds now: the fence of a settlement.
    #[must_use]
    pub fn held_by(&self, relay: &RelayId, now: StoreMillis) -> Vec<OwnedShard> {
        self.leases
            .iter()
            .filter(|(_, lease)| lease.owner.as_ref() == Some(relay) && lease.until > now)
            .map(|(shard, lease)| OwnedShard {
                shard: *shard,
                epoch: Epoch(lease.epoch),
            })
            .collect()
    }

    /// The leases as people see them.
    #[must_use]
    pub fn status(&self, now: StoreMillis) -> Vec<LeaseStatus> {
        self.leases
            .iter()
            .map(|(shard, lease)| {
                let left = lease.until.saturating_sub(now).max(0);
                LeaseStatus {
                    shard: *shard,
                    epoch: Epoch(lease.epoch),
                    owner: lease.owner.clone().filter(|_| left > 0),
                    time_left: Duration::from_millis(left.unsigned_abs()),
                }
            })
            .collect()
    }

    /// The members that are alive.
    #[must_use]
    pub fn relays(&self, now: StoreMillis) -> Vec<RelayId> {
        self.members
            .iter()
            .filter(|(_, until)| **until > now)
            .map(|(relay, _)| relay.clone())
            .collect()
    }
}

/// A duration as the store's milliseconds, rounded up, so that a wait is never shorter than asked.
///
/// ```
/// use std::time::Duration;
///
/// assert_eq!(outbox_core::millis(Duration::from_micros(1_500)), 2);
/// ```
#[must_use]
pub fn millis(duration: Duration) -> StoreMillis {
    StoreMillis::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(StoreMillis::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(name: &str, want: u16) -> LeaseRequest {
        LeaseRequest {
            relay: RelayId::new(name),
            want,
            ttl: Duration::from_secs(10),
        }
    }

    #[test]
    fn an_owner_that_comes_back_after_expiry_gets_a_new_epoch() {
        let mut table = LeaseTable::new(1);
        assert_eq!(table.lease(&request("a", 1), 0).held[0].epoch, Epoch(1));
        assert_eq!(table.lease(&request("a", 1), 9_999).held[0].epoch, Epoch(1));
        assert_eq!(table.lease(&request("a", 1), 19_999).held[0].epoch, Epoch(2));
    }

    #[test]
    fn a_release_under_an_old_epoch_frees_nothing() {
        let mut table = LeaseTable::new(1);
        let old = table.lease(&request("a", 1), 0).held;
        let new = table.lease(&request("a", 1), 10_000).held;
        table.release(&RelayId::new("a"), &old, Membership::Stays);
        assert_eq!(table.held_by(&RelayId::new("a"), 10_000), new);
        table.release(&RelayId::new("a"), &new, Membership::Leaves);
        assert!(table.held_by(&RelayId::new("a"), 10_000).is_empty() && table.relays(10_000).is_empty());
    }
}
