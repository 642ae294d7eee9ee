//! Which shards are owned, until when, and how many should be.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Command, Machine, Note, Stage};
use crate::error::{Error, Result};
use crate::lease::{Leases, Membership};
use crate::shard::{Epoch, OwnedShard, Position, Shard};

#[derive(Debug, Default)]
pub(super) struct Leasing {
    pub(super) owned: BTreeMap<Shard, Owned>,
    /// Under which epoch a shard was last lost here. The store may count it as ours still, but that epoch is never
    /// taken up again: a settlement of it may be on its way yet, and would change what is read anew.
    void: BTreeMap<Shard, Epoch>,
    /// What the store counts as ours and is not to be: to be released.
    unwanted: Vec<OwnedShard>,
    /// Nothing is sent after this moment, a margin before the database would give the shards away.
    deadline: Duration,
    /// Whether a lease or a release is under way; never both, lest an old answer bring a released shard back.
    busy: bool,
    /// Whether the release under way is the last command.
    leaving: bool,
    next: Duration,
    /// Relays alive at the last renewal; none before the first, which only joins.
    relays: Option<u16>,
    failures: u32,
}

#[derive(Debug)]
pub(super) struct Owned {
    pub(super) epoch: Epoch,
    /// Whether its holds are known. Nothing is read before.
    pub(super) loaded: bool,
    /// Whether it is to be given up once nothing of it is in flight.
    draining: bool,
    /// The lowest record of it that was dropped and must be asked for again.
    pub(super) reread: Option<Position>,
    pub(super) in_flight: usize,
}

impl Owned {
    /// Whether it is to be read.
    pub(super) fn is_active(&self) -> bool {
        self.loaded && !self.draining
    }

    /// Notes that a record was dropped and must be asked for again.
    pub(super) fn reread_from(&mut self, position: Position) {
        self.reread = Some(self.reread.map_or(position, |from| from.min(position)));
    }
}

impl Leasing {
    /// The shards to read.
    pub(super) fn active(&self) -> Vec<OwnedShard> {
        self.owned
            .iter()
            .filter(|(_, owned)| owned.is_active())
            .map(|(shard, owned)| OwnedShard {
                shard: *shard,
                epoch: owned.epoch,
            })
            .collect()
    }

    pub(super) fn all(&self) -> Vec<OwnedShard> {
        self.owned
            .iter()
            .map(|(shard, owned)| OwnedShard {
                shard: *shard,
                epoch: owned.epoch,
            })
            .collect()
    }

    pub(super) fn owns(&self, shard: Shard, epoch: Epoch) -> bool {
        self.owned.get(&shard).is_some_and(|owned| owned.epoch == epoch)
    }
}

impl Machine {
    /// This relay's fair share of the shards; nothing before the first answer has told how many relays there are.
    fn fair_share(&self) -> u16 {
        self.leasing
            .relays
            .map_or(0, |relays| self.setup.shards.div_ceil(relays.max(1)))
    }

    pub(super) fn poll_leasing(&mut self, now: Duration) -> Option<Command> {
        if self.leasing.busy {
            return None;
        }
        if self.stopping && self.is_empty() && self.publishing.is_quiet() {
            return Some(self.leave());
        }
        // Renewal goes first: a release can wait, a lease cannot.
        if now >= self.leasing.next {
            self.leasing.busy = true;
            // While stopping, only what is held is renewed.
            return Some(Command::Lease {
                want: if self.stopping { 0 } else { self.fair_share() },
            });
        }
        if self.stopping {
            return None;
        }
        let mut shards = std::mem::take(&mut self.leasing.unwanted);
        for (shard, owned) in &self.leasing.owned {
            if owned.draining && owned.in_flight == 0 {
                shards.push(OwnedShard {
                    shard: *shard,
                    epoch: owned.epoch,
                });
            }
        }
        if shards.is_empty() {
            return None;
        }
        for owned in &shards {
            self.lose(owned.shard, "released");
        }
        self.leasing.busy = true;
        Some(Command::Release {
            shards,
            membership: Membership::Stays,
        })
    }

    /// The last command of a shutdown: nothing is in flight any more.
    fn leave(&mut self) -> Command {
        let mut shards = std::mem::take(&mut self.leasing.unwanted);
        for owned in self.leasing.all() {
            self.lose(owned.shard, "released");
            shards.push(owned);
        }
        self.leasing.busy = true;
        self.leasing.leaving = true;
        Command::Release {
            shards,
            membership: Membership::Leaves,
        }
    }

    pub(super) fn leasing_due(&self) -> Option<Duration> {
        let renewal = (!self.leasing.busy).then_some(self.leasing.next);
        let deadline = (!self.leasing.owned.is_empty()).then_some(self.leasing.deadline);
        renewal.into_iter().chain(deadline).min()
    }

    pub(super) fn leased(&mut self, sent: Duration, result: Result<Leases>, now: Duration) {
        self.leasing.busy = false;
        let lease = self.setup.config.lease;
        let leases = match result {
            Ok(leases) => leases,
            Err(error) => {
                self.leasing.failures = self.leasing.failures.saturating_add(1);
                let longest = lease / 6;
                let pause = self
                    .setup
                    .config
                    .outage_retry
                    .pause(self.leasing.failures, &mut self.random)
                    .min(longest);
                self.leasing.next = now + pause;
                self.store_failed("lease", error, pause);
                return;
            }
        };
        self.leasing.failures = 0;
        let share_before = self.fair_share();
        self.leasing.relays = Some(leases.relays);
        self.leasing.unwanted.clear();
        // Counted from before the request left, so the database's own end is never earlier than ours.
        self.leasing.deadline = sent + leases.time_left.saturating_sub(lease / 5);
        self.leasing.next = sent + lease / 3;

        let gone: Vec<Shard> = self
            .leasing
            .owned
            .iter()
            .filter(|(shard, owned)| {
                !leases.held.contains(&OwnedShard {
                    shard: **shard,
                    epoch: owned.epoch,
                })
            })
            .map(|(shard, _)| *shard)
            .collect();
        for shard in gone {
            self.lose(shard, "taken");
        }
        for owned in leases.held {
            if self.leasing.owns(owned.shard, owned.epoch) {
                continue;
            }
            if self.stopping || self.leasing.void.get(&owned.shard) == Some(&owned.epoch) {
                self.leasing.unwanted.push(owned);
                continue;
            }
            self.note(Note::ShardGained(owned));
            self.leasing.owned.insert(
                owned.shard,
                Owned {
                    epoch: owned.epoch,
                    loaded: false,
                    draining: false,
                    reread: None,
                    in_flight: 0,
                },
            );
        }
        if self.stopping {
            return;
        }
        if self.leasing.owned.values().any(|owned| !owned.loaded) {
            self.load_soon();
        }
        let share = self.fair_share();
        // The highest shards go; which ones does not matter, only that the choice stays the same.
        for (index, owned) in self.leasing.owned.values_mut().enumerate() {
            owned.draining = index >= usize::from(share);
        }
        if share > share_before {
            self.leasing.next = now;
        } else if self.leasing.owned.len() < usize::from(share) {
            // Others are about to give shards up, or about to be found dead.
            self.leasing.next = sent + lease / 10;
        }
    }

    pub(super) fn released(&mut self, result: Result<()>, now: Duration) {
        self.leasing.busy = false;
        self.left = self.leasing.leaving;
        match result {
            // What was released because its epoch was void is wanted back under a new one.
            Ok(()) if self.leasing.owned.len() < usize::from(self.fair_share()) => self.leasing_now(now),
            Ok(()) => {}
            // The leases run out by themselves, or the next renewal shows that they are still ours.
            Err(error) => self.store_failed("release", error, self.leasing.next.saturating_sub(now)),
        }
    }

    /// Gives up what the clock says is, or may be, another's.
    pub(super) fn expire(&mut self, now: Duration) {
        if !self.leasing.owned.is_empty() && now >= self.leasing.deadline {
            for owned in self.leasing.all() {
                self.lose(owned.shard, "expired");
            }
            // Whoever was late may be late by much: ask at once.
            self.leasing_now(now);
        }
    }

    /// Forgets a shard and all that is in flight of it. What the sink has of it must not leave any more.
    pub(super) fn lose(&mut self, shard: Shard, why: &'static str) {
        let Some(owned) = self.leasing.owned.remove(&shard) else {
            return;
        };
        self.leasing.void.insert(shard, owned.epoch);
        self.note(Note::ShardLost { shard, why });
        self.settling.forget(shard);
        self.publishing.ready.retain(|record| record.shard != shard);
        let positions: Vec<Position> = self
            .flights
            .range((shard, Position::MIN)..=(shard, Position::MAX))
            .map(|((_, position), _)| *position)
            .collect();
        for position in positions {
            if let Some(flight) = self.flights.remove(&(shard, position)) {
                if flight.stage != Stage::Resolved {
                    self.bytes = self.bytes.saturating_sub(flight.bytes);
                }
                if matches!(flight.stage, Stage::Sent(_)) {
                    self.publishing.purge_wanted = true;
                }
                if let Some(key) = flight.key.filter(|_| !self.queues.is_empty()) {
                    self.queues.remove(&(shard, key));
                }
            }
        }
        self.holds.forget(shard);
    }

    /// Renews at once.
    pub(super) fn leasing_now(&mut self, now: Duration) {
        self.leasing.next = self.leasing.next.min(now);
    }

    pub(super) fn store_failed(&mut self, operation: &'static str, error: Error, pause: Duration) {
        self.note(Note::StoreFailed {
            operation,
            error: error.into(),
            pause,
        });
    }
}
