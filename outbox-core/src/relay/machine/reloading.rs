//! Reading the stored holds: all of them when a shard is gained, and now and then what operators did to them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::holding::{Scope, State};
use super::topics::{TopicEntry, TopicState};
use super::{Command, Machine};
use crate::error::Result;
use crate::fetch::RecordRef;
use crate::hold::{Hold, HoldScope, HoldState};
use crate::shard::{OwnedShard, Shard};

#[derive(Debug)]
pub(super) struct Loading {
    pub(super) shards: Vec<OwnedShard>,
    pub(super) moment: u64,
    pub(super) at: Duration,
}

/// How soon the relay notices that an operator resumed something.
const RELOAD_EVERY: Duration = Duration::from_secs(2);
/// How many times as long as a load has taken the pause after it is at least: very many notes are read more rarely.
const RELOAD_SHARE: u32 = 10;

impl Machine {
    pub(super) fn poll_holds(&mut self, now: Duration) -> Option<Command> {
        if self.holds_due().is_none_or(|due| due > now) {
            return None;
        }
        let mut shards = self.leasing.all();
        if self.leasing.owned.values().any(|owned| !owned.loaded) {
            shards.retain(|owned| !self.is_loaded(owned.shard));
        }
        if shards.is_empty() {
            return None;
        }
        self.holds.moment += 1;
        self.holds.loading = Some(Loading {
            shards: shards.clone(),
            moment: self.holds.moment,
            at: now,
        });
        Some(Command::LoadHolds { shards })
    }

    fn is_loaded(&self, shard: Shard) -> bool {
        self.leasing.owned.get(&shard).is_none_or(|owned| owned.loaded)
    }

    /// Whether notes are to be read, now and then.
    pub(crate) fn loads_holds(&self) -> bool {
        !self.holds.entries.is_empty()
            || !self.holds.topics.is_empty()
            || self.leasing.owned.values().any(|owned| !owned.loaded)
    }

    /// Asks for the holds of new shards at once.
    pub(super) fn load_soon(&mut self) {
        self.holds.load_next = Duration::ZERO;
    }

    pub(super) fn holds_due(&self) -> Option<Duration> {
        let waits = self.holds.loading.is_none() && !self.stopping && self.loads_holds();
        (waits && !self.leasing.owned.is_empty()).then_some(self.holds.load_next)
    }

    pub(super) fn holds_loaded(&mut self, result: Result<Vec<Hold>>, now: Duration) {
        let Some(loading) = self.holds.loading.take() else {
            return;
        };
        let loaded = match result {
            Ok(loaded) => loaded,
            Err(error) => {
                self.holds.load_failures = self.holds.load_failures.saturating_add(1);
                let pause = self
                    .setup
                    .config
                    .outage_retry
                    .pause(self.holds.load_failures, &mut self.random);
                self.holds.load_next = now + pause;
                self.store_failed("load holds", error, pause);
                return;
            }
        };
        self.holds.load_failures = 0;
        let took = now.saturating_sub(loading.at);
        self.holds.load_next = now + RELOAD_EVERY.max(took.saturating_mul(RELOAD_SHARE));
        let mut fresh = BTreeSet::new();
        for owned in &loading.shards {
            if let Some(own) = self.leasing.owned.get_mut(&owned.shard)
                && own.epoch == owned.epoch
                && !std::mem::replace(&mut own.loaded, true)
            {
                fresh.insert(owned.shard);
            }
        }
        if self.leasing.owned.values().any(|owned| !owned.loaded) {
            self.load_soon();
        }
        let uncrowded = self.uncrowded(&loading, &loaded, now);
        let mut seen = BTreeSet::new();
        for hold in loaded {
            if !loading
                .shards
                .iter()
                .any(|owned| owned.shard == hold.shard && self.leasing.owns(owned.shard, owned.epoch))
            {
                continue;
            }
            let Some(scope) = Scope::of(&hold.scope, hold.head) else {
                self.topic_loaded(&hold, fresh.contains(&hold.shard), now);
                continue;
            };
            seen.insert((hold.shard, scope.clone()));
            let shed = match &scope {
                Scope::Key(key) => uncrowded.contains(&key.topic),
                Scope::Message(_) => !uncrowded.is_empty(),
            };
            let adopt = fresh.contains(&hold.shard)
                || shed && !self.holds.entries.contains_key(&(hold.shard, scope.clone()));
            self.hold_loaded(hold, scope, adopt, loading.moment, now);
        }
        self.release_resumed(&loading, &seen, now);
        for topic in uncrowded {
            // It opens where a fetch is built, as every topic does, and for one record at first.
            if let Some(entry) = self.holds.topics.get_mut(&topic) {
                entry.state = TopicState::Waiting { due: now };
            }
        }
    }

    /// Takes a stored hold over, or learns from it that an operator wants it sooner.
    fn hold_loaded(&mut self, hold: Hold, scope: Scope, adopt: bool, moment: u64, now: Duration) {
        let state = match hold.state {
            HoldState::Parked => State::Parked,
            HoldState::Retrying { due_in } => State::Waiting {
                due: now.saturating_add(due_in),
            },
        };
        let known = self.holds.entries.get(&(hold.shard, scope.clone()));
        let sooner = known.is_some_and(|entry| {
            entry.head == hold.head
                && entry.durable.is_some_and(|durable| durable < moment)
                && match (entry.state, state) {
                    (State::Parked, State::Waiting { .. }) => true,
                    (State::Waiting { due: own }, State::Waiting { due }) => {
                        due + Duration::from_secs(1) < own
                    }
                    _ => false,
                }
        });
        if adopt || sooner {
            self.holds
                .wait(hold.shard, scope.clone(), hold.head, hold.attempts, state);
            if let Some(entry) = self.holds.entries.get_mut(&(hold.shard, scope)) {
                entry.written = true;
                entry.durable = Some(moment);
            }
        }
    }

    fn topic_loaded(&mut self, hold: &Hold, fresh: bool, now: Duration) {
        let HoldScope::Topic(topic) = &hold.scope else {
            return;
        };
        let due = match hold.state {
            HoldState::Retrying { due_in } => now.saturating_add(due_in),
            HoldState::Parked => return,
        };
        if let Some(entry) = self.holds.topics.get_mut(topic) {
            entry.written.insert(hold.shard, hold.head);
            if let TopicState::Waiting { due: own } = &mut entry.state
                && due + Duration::from_secs(1) < *own
            {
                *own = due;
            }
            return;
        }
        if !fresh {
            // The note is our own, read before it was cleared: the topic flows again.
            return;
        }
        self.holds.topics.insert(
            topic.clone(),
            TopicEntry {
                attempts: hold.attempts,
                state: TopicState::Waiting { due },
                written: BTreeMap::from([(hold.shard, hold.head)]),
            },
        );
        self.close_topic(topic);
    }

    /// What was parked in the store when the load began, and is not there any more, an operator has resumed.
    fn release_resumed(&mut self, loading: &Loading, seen: &BTreeSet<(Shard, Scope)>, now: Duration) {
        let resumed: Vec<(Shard, Scope, RecordRef)> = self
            .holds
            .entries
            .iter()
            .filter(|((shard, scope), entry)| {
                !matches!(entry.state, State::Trying { .. })
                    && entry.durable.is_some_and(|durable| durable < loading.moment)
                    && loading.shards.iter().any(|owned| owned.shard == *shard)
                    && !seen.contains(&(*shard, scope.clone()))
            })
            .map(|((shard, scope), entry)| (*shard, scope.clone(), entry.head))
            .collect();
        for (shard, scope, head) in resumed {
            self.holds
                .wait(shard, scope.clone(), head, 0, State::Waiting { due: now });
            if let Some(entry) = self.holds.entries.get_mut(&(shard, scope)) {
                entry.written = false;
                entry.durable = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::Record;
    use crate::hold::HoldChange;
    use crate::relay::Backoff;
    use crate::relay::config::RelayConfig;
    use crate::relay::machine::stand::{
        SECOND, Stand, failure, hold_of, keyed, keyless, ms, owned, parking, published,
    };
    use crate::relay::machine::{Event, Note, Setup};
    use crate::shard::Position;
    use crate::sink::Outcome;

    fn two_shards(config: RelayConfig) -> Setup {
        Setup {
            shards: 2,
            ..Setup::of_one_shard(config)
        }
    }

    fn retrying(due_in: Duration) -> HoldState {
        HoldState::Retrying { due_in }
    }

    /// A machine that took these notes over with its shards.
    fn holding(setup: Setup, holds: Vec<Hold>) -> Stand {
        let mut stand = Stand::apart(setup);
        stand.holds = holds;
        stand.run();
        stand
    }

    /// The next load is asked for. Its answer is the test's.
    fn load(stand: &mut Stand) -> Vec<OwnedShard> {
        stand.until(|command| match command {
            Command::LoadHolds { shards } => Some(shards.clone()),
            _ => None,
        })
    }

    fn reload(stand: &mut Stand, holds: Vec<Hold>) {
        load(stand);
        stand.holds = holds;
        stand.loaded();
    }

    /// How a record's key, or the keyless record itself, waits.
    fn state(stand: &Stand, record: &Record) -> Option<State> {
        let scope = Scope::of(&hold_of(record, HoldState::Parked).scope, record.reference()).unwrap();
        let entry = stand.machine.holds.entries.get(&(record.shard, scope));
        entry.map(|entry| entry.state)
    }

    fn topic_hold(head: &Record, due_in: Duration) -> Hold {
        Hold {
            scope: HoldScope::Topic(head.message.topic().into()),
            ..hold_of(head, retrying(due_in))
        }
    }

    #[test]
    fn notes_that_cannot_be_read_are_asked_for_again_after_the_pause_that_is_told_whatever_is_renewed_meanwhile()
     {
        let slow = Backoff {
            initial: SECOND * 60,
            max: SECOND * 60,
        };
        let mut stand = Stand::apart(Setup::of_one_shard(RelayConfig {
            outage_retry: slow,
            lease: SECOND * 3,
            ..RelayConfig::default()
        }));
        load(&mut stand);
        stand.tell(Event::HoldsLoaded {
            result: Err(failure()),
        });
        let told = stand.notes().into_iter().find_map(|note| match note {
            Note::StoreFailed {
                operation: "load holds",
                pause,
                ..
            } => Some(pause),
            _ => None,
        });
        let asked = stand.now;
        assert_eq!(load(&mut stand), [owned(0, 1)]);
        assert!(
            stand.now >= asked + told.unwrap() && told > Some(ms(1)),
            "{told:?}"
        );
        assert!(
            stand.machine.leasing.active().is_empty(),
            "nothing is read before"
        );
    }

    #[test]
    fn notes_that_take_long_to_read_are_read_more_rarely() {
        let parked = hold_of(&keyed("t", "k", 1), HoldState::Parked);
        let mut stand = holding(Setup::of_one_shard(RelayConfig::default()), vec![parked]);
        for (took, pause) in [(ms(1), SECOND * 2), (SECOND, SECOND * 10)] {
            load(&mut stand);
            stand.now += took;
            stand.loaded();
            assert_eq!(stand.machine.holds_due(), Some(stand.now + pause));
        }
    }

    #[test]
    fn notes_are_read_every_two_seconds_while_anything_is_held_and_not_when_nothing_is() {
        let mut stand = Stand::new(RelayConfig::default());
        let loads = |stand: &mut Stand| {
            let commands = stand.pass(SECOND * 61);
            let loads = commands
                .iter()
                .filter(|command| matches!(command, Command::LoadHolds { .. }));
            loads.count()
        };
        assert_eq!(loads(&mut stand), 0);
        let head = keyed("t", "k", 1);
        let parked = hold_of(&head, HoldState::Parked);
        let blocked = topic_hold(&head, SECOND * 3600);
        for hold in [parked, blocked] {
            let mut stand = holding(Setup::of_one_shard(RelayConfig::default()), vec![hold]);
            assert_eq!(loads(&mut stand), 30);
            load(&mut stand);
            assert_eq!(stand.machine.holds_due(), None, "one at a time");
            stand.loaded();
            assert_eq!(stand.machine.holds_due(), Some(stand.now + SECOND * 2));
            stand.tell(Event::Shutdown);
            assert_eq!(
                stand.machine.holds_due(),
                None,
                "a relay that stops releases nothing"
            );
        }
    }

    #[test]
    fn what_was_read_under_an_epoch_that_is_over_counts_for_nothing() {
        let mut stand = Stand::apart(two_shards(RelayConfig::default()));
        let (first, second) = (
            keyed("t", "k", 1),
            Record {
                shard: Shard(1),
                ..keyed("t", "l", 2)
            },
        );
        assert_eq!(load(&mut stand), [owned(0, 1), owned(1, 1)]);
        stand.machine.lose(Shard(0), "taken");
        stand.held[0] = owned(0, 2);
        stand.lease(stand.now);
        stand.holds = vec![
            hold_of(&first, HoldState::Parked),
            hold_of(&second, HoldState::Parked),
            topic_hold(&keyed("blocked", "m", 3), SECOND),
        ];
        stand.loaded();
        assert_eq!(stand.machine.leasing.active(), [owned(1, 1)]);
        assert_eq!(state(&stand, &first), None);
        assert_eq!(state(&stand, &second), Some(State::Parked));
        assert!(stand.machine.holds.topics.is_empty());
        assert_eq!(
            load(&mut stand),
            [owned(0, 2)],
            "it is read anew, at once, and the other is not"
        );
        stand.loaded();
        assert_eq!(state(&stand, &first), Some(State::Parked));
    }

    #[test]
    fn a_retry_that_the_store_has_sooner_by_more_than_a_second_goes_then() {
        let head = keyed("t", "k", 1);
        let in_a_minute = hold_of(&head, retrying(SECOND * 60));
        let mut stand = holding(Setup::of_one_shard(RelayConfig::default()), vec![in_a_minute]);
        let due = stand.now + SECOND * 60;
        let is_due = |stand: &Stand, due| state(stand, &head) == Some(State::Waiting { due });
        assert!(is_due(&stand, due));
        for (sooner, of) in [
            (ms(0), &head),
            (SECOND, &head),
            (SECOND * 30, &keyed("t", "k", 9)),
        ] {
            load(&mut stand);
            stand.holds = vec![hold_of(of, retrying(due - sooner - stand.now))];
            stand.loaded();
            assert!(is_due(&stand, due), "sooner by {sooner:?}");
        }
        reload(&mut stand, vec![hold_of(&head, retrying(SECOND * 3600))]);
        assert!(
            is_due(&stand, due),
            "later is what it was before it was written anew"
        );
        load(&mut stand);
        let sooner = due - SECOND - ms(1);
        stand.holds = vec![hold_of(&head, retrying(sooner - stand.now))];
        stand.loaded();
        assert!(is_due(&stand, sooner));
    }

    #[test]
    fn what_was_read_before_a_note_was_written_says_nothing_about_it() {
        let mut stand = Stand::new(parking());
        let (early, late) = (keyed("t", "k", 1), keyed("t", "l", 2));
        let fail = |stand: &mut Stand, record: &Record| {
            let batch = stand.sent(vec![record.clone()]);
            stand.outcomes(batch, vec![Outcome::Poison("no".into())]);
            stand.run();
        };
        fail(&mut stand, &early);
        stand.holds = vec![hold_of(&early, HoldState::Parked)];
        stand.pass(SECOND);
        load(&mut stand);
        // Both notes of this one come into the store after it was read.
        fail(&mut stand, &late);
        stand.holds = vec![hold_of(&late, retrying(Duration::ZERO))];
        let now = stand.now;
        stand.loaded();
        assert_eq!(state(&stand, &late), Some(State::Parked));
        assert_eq!(
            state(&stand, &early),
            Some(State::Waiting { due: now }),
            "an operator resumed it"
        );

        load(&mut stand);
        stand.loaded();
        let due = stand.now;
        assert_eq!(
            state(&stand, &late),
            Some(State::Waiting { due }),
            "and by now that one as well"
        );
    }

    #[test]
    fn a_parked_note_that_is_gone_was_resumed_and_counts_attempts_from_the_start() {
        let (gone, kept) = (keyed("t", "k", 1), keyed("t", "l", 2));
        let mut stand = holding(
            two_shards(RelayConfig::default()),
            vec![
                hold_of(&gone, HoldState::Parked),
                hold_of(&kept, HoldState::Parked),
            ],
        );
        stand.outcome = None;
        stand.rows = vec![gone.clone(), kept.clone()];
        reload(&mut stand, vec![hold_of(&kept, HoldState::Parked)]);
        assert_eq!(state(&stand, &kept), Some(State::Parked));
        assert_eq!(state(&stand, &gone), Some(State::Waiting { due: stand.now }));
        let commands = stand.pass(SECOND);
        assert_eq!(published(&commands), [1]);
        let attempts = commands.iter().find_map(|command| match command {
            Command::Publish { records, .. } => Some(records[0].attempts),
            _ => None,
        });
        assert_eq!(attempts, Some(0));
        assert!(matches!(state(&stand, &gone), Some(State::Trying { .. })));
        reload(&mut stand, vec![hold_of(&kept, HoldState::Parked)]);
        assert!(
            matches!(state(&stand, &gone), Some(State::Trying { .. })),
            "it is being tried"
        );
    }

    #[test]
    fn a_note_that_is_tried_and_gone_from_the_store_is_tried_all_the_same() {
        let head = keyed("t", "k", 1);
        let mut stand = Stand::apart(Setup::of_one_shard(RelayConfig::default()));
        stand.holds = vec![hold_of(&head, retrying(Duration::ZERO))];
        stand.outcome = None;
        stand.rows = vec![head.clone()];
        stand.pass(SECOND);
        assert!(stand.flies(&head));
        reload(&mut stand, Vec::new());
        assert!(matches!(state(&stand, &head), Some(State::Trying { .. })));
    }

    #[test]
    fn a_load_of_some_shards_says_nothing_about_the_others() {
        let head = keyed("t", "k", 1);
        let mut stand = Stand::apart(two_shards(RelayConfig::default()));
        stand.held = vec![owned(0, 1)];
        stand.holds = vec![hold_of(&head, HoldState::Parked)];
        stand.run();
        stand.held.push(owned(1, 1));
        stand.lease(stand.now);
        assert_eq!(load(&mut stand), [owned(1, 1)]);
        stand.holds.clear();
        stand.loaded();
        assert_eq!(state(&stand, &head), Some(State::Parked));
    }

    #[test]
    fn a_note_that_is_not_known_here_is_our_own_from_before_it_was_cleared() {
        let known = keyed("t", "k", 1);
        let hold = hold_of(&known, HoldState::Parked);
        let mut stand = holding(Setup::of_one_shard(RelayConfig::default()), vec![hold.clone()]);
        let (key, message) = (keyed("t", "l", 2), keyless("t", 3));
        reload(
            &mut stand,
            vec![
                hold,
                hold_of(&key, HoldState::Parked),
                hold_of(&message, HoldState::Parked),
                topic_hold(&keyed("u", "m", 4), SECOND),
            ],
        );
        assert_eq!((state(&stand, &key), state(&stand, &message)), (None, None));
        assert!(stand.machine.holds.topics.is_empty());
    }

    #[test]
    fn the_notes_of_a_blocked_topic_are_taken_over_and_cleared_when_it_flows() {
        let (first, second) = (
            keyed("t", "k", 1),
            Record {
                shard: Shard(1),
                ..keyed("t", "l", 2)
            },
        );
        let mut parked = topic_hold(&keyed("u", "m", 3), SECOND);
        parked.state = HoldState::Parked;
        let mut stand = holding(
            two_shards(RelayConfig::default()),
            vec![
                topic_hold(&first, SECOND * 60),
                topic_hold(&second, SECOND * 59),
                parked,
            ],
        );
        stand.rows = vec![first.clone(), second];
        let due = stand.now + SECOND * 60;
        let topics = |stand: &Stand| -> Vec<(String, TopicState)> {
            let topics = stand.machine.holds.topics.iter();
            topics
                .map(|(topic, entry)| (topic.to_string(), entry.state))
                .collect()
        };
        let waits = |due| [("t".to_owned(), TopicState::Waiting { due })];
        assert_eq!(topics(&stand), waits(due), "a second sooner is no sooner");
        for at in [due + SECOND * 3600, due - SECOND] {
            load(&mut stand);
            stand.holds = vec![topic_hold(&first, at - stand.now)];
            stand.loaded();
            assert_eq!(topics(&stand), waits(due));
        }
        load(&mut stand);
        let sooner = stand.now + SECOND * 9;
        stand.holds = vec![topic_hold(&first, SECOND * 9)];
        stand.loaded();
        assert_eq!(topics(&stand), waits(sooner));

        let commands = stand.pass(SECOND * 12);
        assert_eq!(published(&commands), [1, 2]);
        let mut cleared: Vec<Position> = commands
            .iter()
            .filter_map(|command| match command {
                Command::Settle { settlement } => Some(settlement),
                _ => None,
            })
            .flat_map(|settlement| &settlement.shards)
            .flat_map(|part| &part.holds)
            .map(|change| match change {
                HoldChange::Clear(hold) => hold.head.position,
                HoldChange::Put(_) => panic!("{change:?}"),
            })
            .collect();
        cleared.sort();
        assert_eq!(cleared, [Position(1), Position(2)]);
    }

    #[test]
    fn what_is_tried_of_a_crowded_topic_is_not_held_again_when_its_notes_are_read() {
        let head = keyed("many", "k", 1);
        let hold = hold_of(&head, retrying(Duration::ZERO));
        let config = RelayConfig {
            max_holds: 2,
            ..parking()
        };
        let mut stand = Stand::apart(Setup::of_one_shard(config));
        stand.holds = vec![hold.clone()];
        stand.outcome = None;
        stand.rows = vec![head.clone()];
        stand.pass(SECOND);
        let batch = stand.sent((2..=4).map(|at| keyless("many", at)).collect());
        stand.outcomes(batch, vec![Outcome::Poison("no".into()); 3]);
        let uncrowded = |stand: &Stand| {
            let mut topics = stand.machine.holds.topics.values();
            !topics.any(|entry| matches!(entry.state, TopicState::Crowded { .. }))
        };
        stand.pass(ms(100));
        assert!(!uncrowded(&stand));
        stand.holds = vec![hold];
        stand.pass(SECOND * 70);
        assert!(uncrowded(&stand));
        assert!(matches!(state(&stand, &head), Some(State::Trying { .. })));
    }
}
