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

    /// Whether this one is to be read.
    pub(super) fn reads(&self, shard: Shard) -> bool {
        self.owned.get(&shard).is_some_and(Owned::is_active)
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
        let mut gained = false;
        for owned in leases.held {
            if self.leasing.owns(owned.shard, owned.epoch) {
                continue;
            }
            if self.stopping || self.leasing.void.get(&owned.shard) == Some(&owned.epoch) {
                self.leasing.unwanted.push(owned);
                continue;
            }
            self.note(Note::ShardGained(owned));
            gained = true;
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
        if gained {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::Record;
    use crate::hold::HoldState;
    use crate::relay::Backoff;
    use crate::relay::config::RelayConfig;
    use crate::relay::machine::stand::{
        SECOND, Stand, failure, hold_of, keyed, keyless, ms, owned, record_of,
    };
    use crate::relay::machine::{Event, Setup};
    use crate::settle::Settled;
    use crate::sink::Outcome;

    const LEASE: Duration = Duration::from_secs(30);

    fn setup(shards: u16) -> Setup {
        let config = RelayConfig {
            lease: LEASE,
            ..RelayConfig::default()
        };
        Setup {
            shards,
            ..Setup::of_one_shard(config)
        }
    }

    fn wants(command: &Command) -> Option<u16> {
        match command {
            Command::Lease { want } => Some(*want),
            _ => None,
        }
    }

    fn released(command: &Command) -> Option<Vec<OwnedShard>> {
        match command {
            Command::Release { shards, .. } => Some(shards.clone()),
            _ => None,
        }
    }

    /// Asks for a renewal, and says when it did.
    fn renewal(stand: &mut Stand) -> Duration {
        stand.until(wants);
        stand.now
    }

    #[test]
    fn a_lease_counts_from_when_it_was_asked_for_and_ends_a_fifth_early() {
        let mut stand = Stand::of(setup(1));
        let sent = renewal(&mut stand);
        stand.now += SECOND * 5;
        stand.lease(sent);
        assert_eq!(
            stand.machine.leasing_due(),
            Some(sent + LEASE / 3),
            "renewed at a third"
        );

        assert_eq!(renewal(&mut stand), sent + LEASE / 3);
        let end = sent + LEASE - LEASE / 5;
        assert_eq!(
            stand.machine.leasing_due(),
            Some(end),
            "no second one while one is out"
        );
        stand.now = end - ms(1);
        stand.wanted();
        assert!(stand.machine.owns(Shard(0)));
        stand.now = end;
        stand.wanted();
        assert!(!stand.machine.owns(Shard(0)));
        let expired = |note: &Note| matches!(note, Note::ShardLost { why: "expired", .. });
        assert!(stand.notes().iter().any(expired));
        assert_eq!(stand.machine.leasing_due(), None, "nothing is left to end");
    }

    #[test]
    fn a_lease_that_the_store_says_is_short_ends_early() {
        let mut stand = Stand::of(setup(1));
        let sent = renewal(&mut stand);
        let leases = Leases {
            held: stand.held.clone(),
            relays: 1,
            time_left: SECOND * 14,
        };
        stand.tell(Event::Leased {
            sent,
            result: Ok(leases),
        });
        assert_eq!(stand.machine.leasing_due(), Some(sent + SECOND * 8));
    }

    #[test]
    fn a_renewal_that_fails_is_repeated_within_a_sixth_of_the_lease_and_at_once_when_it_is_over() {
        let mut setup = setup(1);
        setup.config.outage_retry = Backoff {
            initial: SECOND * 3600,
            max: SECOND * 3600,
        };
        let mut stand = Stand::of(setup);
        let begin = renewal(&mut stand) - LEASE / 3;
        let fail = |stand: &mut Stand| {
            let result = Err(failure());
            let sent = stand.now;
            stand.tell(Event::Leased { sent, result });
        };
        fail(&mut stand);
        assert_eq!(stand.machine.leasing_due(), Some(stand.now + LEASE / 6));
        let failed = |note: &Note| {
            matches!(
                note,
                Note::StoreFailed {
                    operation: "lease",
                    ..
                }
            )
        };
        assert!(stand.notes().iter().any(failed));

        for seconds in [15, 20] {
            assert_eq!(renewal(&mut stand), begin + SECOND * seconds);
            fail(&mut stand);
        }
        assert_eq!(
            renewal(&mut stand),
            begin + SECOND * 24,
            "the end of the lease, and not later"
        );
        assert!(!stand.machine.owns(Shard(0)));
    }

    #[test]
    fn a_relay_that_has_less_than_its_share_asks_sooner_and_at_once_when_the_share_grows() {
        let mut stand = Stand::of(setup(8));
        let mut renew = |relays: u16, held: u16| {
            let sent = renewal(&mut stand);
            stand.relays = relays;
            stand.held = (0..held).map(|shard| owned(shard, 1)).collect();
            stand.now += SECOND;
            stand.lease(sent);
            stand.machine.leasing_due().map(|due| due.saturating_sub(sent))
        };
        assert_eq!(renew(1, 8), Some(LEASE / 3));
        assert_eq!(renew(1, 7), Some(LEASE / 10), "one is missing");
        assert_eq!(renew(2, 4), Some(LEASE / 3), "it has its half");
        assert_eq!(renew(2, 5), Some(LEASE / 3), "it has more than its half");
        assert_eq!(renew(1, 4), Some(SECOND), "the other has gone: now");
        assert_eq!(renew(3, 2), Some(LEASE / 10), "a third of eight is three");
    }

    #[test]
    fn what_is_beyond_the_share_goes_when_nothing_of_it_is_in_flight() {
        let mut stand = Stand::of(setup(4));
        let (low, high) = (
            record_of(1),
            Record {
                shard: Shard(3),
                ..record_of(2)
            },
        );
        let batch = stand.sent(vec![low, high]);
        stand.relays = 2;
        assert_eq!(
            stand.until(released),
            [owned(2, 1)],
            "of the fourth something is with the sink"
        );
        stand.tell(Event::Released { result: Ok(()) });
        stand.held.retain(|owned| owned.shard != Shard(2));
        let active: Vec<_> = stand.machine.leasing.active();
        assert_eq!(
            active,
            [owned(0, 1), owned(1, 1)],
            "and nothing more is read of it"
        );

        stand.outcomes(batch, vec![Outcome::Delivered; 2]);
        assert_eq!(stand.until(released), [owned(3, 1)]);
        stand.tell(Event::Released { result: Ok(()) });
        assert!(
            stand.machine.leasing_due() > Some(stand.now),
            "it has its share, and asks for no more"
        );
    }

    #[test]
    fn an_epoch_that_was_lost_is_given_back_and_asked_for_anew() {
        let mut stand = Stand::of(setup(1));
        stand.settles = false;
        let batch = stand.sent(vec![record_of(1)]);
        stand.outcomes(batch, vec![Outcome::Delivered]);
        stand.run();
        let lost = vec![Shard(0)];
        stand.tell(Event::Settled {
            result: Ok(Settled { lost }),
        });
        assert!(!stand.machine.owns(Shard(0)));

        assert_eq!(
            stand.until(released),
            [owned(0, 1)],
            "the store counts it as ours still"
        );
        assert!(!stand.machine.owns(Shard(0)));
        stand.held = vec![owned(0, 2)];
        stand.tell(Event::Released { result: Ok(()) });
        let now = stand.now;
        assert_eq!(renewal(&mut stand), now, "at once");
        stand.lease(now);
        assert!(stand.machine.leasing.owns(Shard(0), Epoch(2)));
    }

    #[test]
    fn a_release_that_fails_is_told_and_left_to_the_next_renewal() {
        let mut stand = Stand::of(setup(2));
        stand.relays = 2;
        assert_eq!(stand.until(released), [owned(1, 1)]);
        let due = stand.machine.leasing.next;
        stand.tell(Event::Released {
            result: Err(failure()),
        });
        assert_eq!(stand.machine.leasing.next, due);
        let failed = |note: &Note| {
            matches!(
                note,
                Note::StoreFailed {
                    operation: "release",
                    ..
                }
            )
        };
        assert!(stand.notes().iter().any(failed));
    }

    #[test]
    fn what_was_in_flight_of_a_lost_shard_weighs_nothing_and_of_another_still_does() {
        let mut stand = Stand::of(setup(2));
        stand.settles = false;
        let delivered = keyed("t", "delivered", 1);
        let (sent, other) = (
            keyed("t", "with the sink", 2),
            Record {
                shard: Shard(1),
                ..keyless("another", 3)
            },
        );
        let weight = other.message.size();
        let first = stand.sent(vec![delivered]);
        stand.outcomes(first, vec![Outcome::Delivered]);
        stand.sent(vec![sent, other]);
        stand.machine.lose(Shard(0), "taken");
        assert_eq!(stand.machine.bytes, weight);
        assert!(
            matches!(stand.machine.poll(stand.now), Some(Command::Purge)),
            "the sink has some of it"
        );
    }

    #[test]
    fn what_only_waits_to_be_settled_needs_no_purge_when_its_shard_is_lost() {
        let mut stand = Stand::of(setup(1));
        stand.settles = false;
        let batch = stand.sent(vec![record_of(1)]);
        stand.outcomes(batch, vec![Outcome::Delivered]);
        stand.run();
        stand.machine.lose(Shard(0), "taken");
        assert!(
            !stand
                .run()
                .iter()
                .any(|command| matches!(command, Command::Purge))
        );
    }

    #[test]
    fn the_holds_of_a_gained_shard_are_read_at_once_and_a_renewal_alone_reads_none() {
        let mut stand = Stand::apart(setup(2));
        stand.held = vec![owned(0, 1)];
        stand.holds = vec![hold_of(&record_of(1), HoldState::Parked)];
        stand.run();
        let due = stand.machine.holds_due();
        assert!(due > Some(stand.now), "what is parked is looked at again later");
        stand.lease(stand.now);
        assert_eq!(stand.machine.holds_due(), due);

        stand.held.push(owned(1, 1));
        stand.lease(stand.now);
        let loads = stand.until(|command| match command {
            Command::LoadHolds { shards } => Some(shards.clone()),
            _ => None,
        });
        assert_eq!(loads, [owned(1, 1)], "of that one alone");
        assert!(Some(stand.now) < due);
    }

    #[test]
    fn a_relay_that_stops_keeps_what_it_has_until_it_is_settled_and_asks_for_no_more() {
        let mut stand = Stand::of(setup(2));
        let batch = stand.sent(vec![record_of(1)]);
        stand.tell(Event::Shutdown);
        assert_eq!(stand.until(wants), 0, "it renews while the sink has something");
        stand.held.push(owned(2, 5));
        stand.lease(stand.now);
        assert!(!stand.machine.owns(Shard(2)), "what comes now is given back");
        stand.outcomes(batch, vec![Outcome::Delivered]);
        let (shards, membership) = stand.until(|command| match command {
            Command::Release { shards, membership } => Some((shards.clone(), *membership)),
            Command::Lease { .. } => panic!("it has nothing to renew for"),
            _ => None,
        });
        assert_eq!(shards, [owned(2, 5), owned(0, 1), owned(1, 1)]);
        assert_eq!(membership, Membership::Leaves);
        assert!(!stand.machine.has_left());
        stand.tell(Event::Released { result: Ok(()) });
        assert!(stand.machine.has_left());
    }
}
