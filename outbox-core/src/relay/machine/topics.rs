//! Topics that are held as a whole: blocked ones until a probe goes through, crowded ones for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::holding::{Holds, Scope};
use super::reloading::Loading;
use super::{Machine, Note, Stage};
use crate::fetch::RecordRef;
use crate::hold::{Hold, HoldChange, HoldRef, HoldScope, HoldState};
use crate::shard::{Position, Shard};
use crate::sink::Reason;

#[derive(Debug)]
pub(super) struct TopicEntry {
    pub(super) attempts: u32,
    pub(super) state: TopicState,
    /// The notes of it that the store has.
    pub(super) written: BTreeMap<Shard, RecordRef>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TopicState {
    /// Held.
    Waiting { due: Duration },
    /// Held because too many of its messages were; their notes were dropped here and must be loaded again.
    Crowded { due: Duration },
    /// The first record that comes goes alone; then the topic is held again until its outcome.
    Probing {
        fetch: u64,
        probe: Option<(Shard, Position)>,
    },
}

impl Holds {
    /// Whether records of a topic may be taken in now.
    pub(super) fn admit_topic(&self, topic: &Arc<str>) -> bool {
        self.topics.is_empty()
            || self
                .topics
                .get(topic)
                .is_none_or(|entry| matches!(entry.state, TopicState::Probing { probe: None, .. }))
    }

    /// Notes that a record was taken in; the first of a topic that is probed closes it again.
    pub(super) fn taken(&mut self, topic: &Arc<str>, shard: Shard, position: Position) {
        if let Some(TopicState::Probing { probe, .. }) =
            self.topics.get_mut(topic).map(|entry| &mut entry.state)
        {
            *probe = Some((shard, position));
            Arc::make_mut(&mut self.held).topics.insert(topic.clone());
        }
    }

    /// A record was dropped; if it was the probe of its topic, another one must be.
    pub(super) fn probe_dropped(&mut self, shard: Shard, position: Position, topic: &Arc<str>) {
        if !self.topics.is_empty()
            && let Some(entry) = self.topics.get_mut(topic)
            && matches!(entry.state, TopicState::Probing { probe: Some(probe), .. } if probe == (shard, position))
        {
            entry.state = TopicState::Waiting { due: Duration::ZERO };
        }
    }
}

impl Machine {
    pub(super) fn release_due_topics(&mut self, now: Duration, fetch: u64) {
        let due: Vec<Arc<str>> = self
            .holds
            .topics
            .iter()
            .filter(|(_, entry)| matches!(entry.state, TopicState::Waiting { due } if due <= now))
            .map(|(topic, _)| topic.clone())
            .collect();
        for topic in due {
            let with_sink = self
                .flights
                .values()
                .any(|flight| flight.topic == topic && flight.stage != Stage::Resolved);
            let later = self.look_again(now);
            let Some(entry) = self.holds.topics.get_mut(&topic) else {
                continue;
            };
            if with_sink {
                entry.state = TopicState::Waiting { due: later };
                continue;
            }
            entry.state = TopicState::Probing { fetch, probe: None };
            self.open_topic(&topic);
        }
    }

    /// Lets a topic's records be read again, all of them: where readers left some out is not known.
    fn open_topic(&mut self, topic: &Arc<str>) {
        Arc::make_mut(&mut self.holds.held).topics.remove(topic);
        for owned in self.leasing.owned.values_mut() {
            owned.reread_from(Position::MIN);
        }
    }

    /// A topic is unknown or forbidden.
    pub(super) fn hold_topic(
        &mut self,
        shard: Shard,
        record: RecordRef,
        topic: Arc<str>,
        now: Duration,
        reason: &Reason,
    ) {
        let probed = match self.holds.topics.get(&topic).map(|entry| entry.state) {
            // What was with the sink when the topic was blocked.
            Some(TopicState::Waiting { .. } | TopicState::Crowded { .. }) => return,
            Some(TopicState::Probing { probe, .. }) if probe != Some((shard, record.position)) => return,
            Some(TopicState::Probing { .. }) => true,
            None => false,
        };
        let attempts = if probed {
            self.holds.topics.get(&topic).map_or(0, |entry| entry.attempts) + 1
        } else {
            1
        };
        let pause = self.setup.config.topic_retry.ceiling(attempts);
        let entry = self
            .holds
            .topics
            .entry(topic.clone())
            .or_insert_with(|| TopicEntry {
                attempts,
                state: TopicState::Waiting { due: Duration::ZERO },
                written: BTreeMap::new(),
            });
        entry.attempts = attempts;
        entry.state = TopicState::Waiting { due: now + pause };
        entry.written.insert(shard, record);
        self.close_topic(&topic);
        self.settle_hold(HoldChange::Put(Hold {
            shard,
            scope: HoldScope::Topic(topic.clone()),
            head: record,
            attempts,
            state: HoldState::Retrying { due_in: pause },
            reason: reason.as_str().to_owned(),
        }));
        self.note(Note::TopicHeld {
            topic,
            pause,
            reason: reason.clone(),
        });
    }

    /// Drops everything of a topic that has not left for the sink.
    pub(super) fn close_topic(&mut self, topic: &Arc<str>) {
        Arc::make_mut(&mut self.holds.held).topics.insert(topic.clone());
        let ready: Vec<(Shard, Position)> = self
            .flights
            .iter()
            .filter(|(_, flight)| flight.topic == *topic && flight.stage == Stage::Ready)
            .map(|(place, _)| *place)
            .collect();
        self.drop_unsent(&ready);
    }

    /// A record of a topic met any other fate than "topic blocked": if it was the probe, the topic flows again.
    pub(super) fn topic_answered(&mut self, shard: Shard, position: Position, topic: &Arc<str>) {
        if self.holds.topics.is_empty() {
            return;
        }
        if let Some(TopicState::Probing {
            probe: Some(probe), ..
        }) = self.holds.topics.get(topic).map(|entry| entry.state)
            && probe == (shard, position)
        {
            self.free_topic(topic);
        }
    }

    pub(super) fn free_topic(&mut self, topic: &Arc<str>) {
        let Some(entry) = self.holds.topics.remove(topic) else {
            return;
        };
        for (shard, head) in entry.written {
            self.settle_hold(HoldChange::Clear(HoldRef {
                shard,
                scope: HoldScope::Topic(topic.clone()),
                head,
            }));
        }
        self.open_topic(topic);
        self.note(Note::TopicFlows { topic: topic.clone() });
    }

    /// Too many wait: their topic is in trouble as a whole. It is held, and its notes, which the store has, are
    /// dropped here, so that memory stays bounded.
    pub(super) fn relieve_crowd(&mut self, now: Duration) {
        if self.holds.entries.len() <= self.setup.config.max_holds {
            return;
        }
        let mut all = 0;
        let mut crowds: BTreeMap<&Arc<str>, usize> = BTreeMap::new();
        // What is over waits for a settlement only, and is bounded by what may be in flight.
        for entry in self.holds.entries.values().filter(|entry| !entry.over) {
            // A note of a message without a key that was taken over does not say of which topic it is: to hold any one
            // for its sake would be no relief.
            let Some(topic) = &entry.topic else { continue };
            all += 1;
            if !self.holds.topics.contains_key(topic) {
                *crowds.entry(topic).or_default() += 1;
            }
        }
        if all <= self.setup.config.max_holds {
            return;
        }
        let Some(topic) = crowds
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .map(|(topic, _)| topic.clone())
        else {
            return;
        };
        self.holds.topics.insert(
            topic.clone(),
            TopicEntry {
                attempts: 0,
                state: TopicState::Crowded { due: now },
                written: BTreeMap::new(),
            },
        );
        self.crowd(&topic, now);
        self.close_topic(&topic);
        self.shed_crowded();
    }

    /// Holds a crowded topic (again) for a while.
    fn crowd(&mut self, topic: &Arc<str>, now: Duration) {
        let pause = self.setup.config.topic_retry.max;
        if let Some(entry) = self.holds.topics.get_mut(topic) {
            entry.state = TopicState::Crowded { due: now + pause };
        }
        self.note(Note::TopicHeld {
            topic: topic.clone(),
            pause,
            reason: Reason::from("too many of its messages wait for a retry or an operator"),
        });
    }

    /// Drops here the durable notes of crowded topics.
    pub(super) fn shed_crowded(&mut self) {
        let topics = &self.holds.topics;
        if !topics
            .values()
            .any(|entry| matches!(entry.state, TopicState::Crowded { .. }))
        {
            return;
        }
        let is_crowded = |topic: &Arc<str>| {
            topics
                .get(topic)
                .is_some_and(|entry| matches!(entry.state, TopicState::Crowded { .. }))
        };
        let shed: Vec<(Shard, Scope)> = self
            .holds
            .entries
            .iter()
            .filter(|((shard, _), entry)| {
                // The fate of a head that is with the sink must still find its hold, also when what followed it was
                // dropped and the hold waits again.
                let in_flight = self.flights.contains_key(&(*shard, entry.head.position));
                entry.topic.as_ref().is_some_and(is_crowded)
                    && !entry.over
                    && !in_flight
                    && (entry.durable.is_some() || !entry.written)
            })
            .map(|(place, _)| place.clone())
            .collect();
        if !shed.is_empty() {
            self.holds.shed_at = self.holds.moment;
        }
        for (shard, scope) in shed {
            self.holds.remove(shard, &scope);
        }
    }

    /// The crowded topics that are due, given all notes of all our shards. One of which more is parked than may wait
    /// here stays held until an operator has seen to it; the others are probed.
    pub(super) fn uncrowded(
        &mut self,
        loading: &Loading,
        loaded: &[Hold],
        now: Duration,
    ) -> BTreeSet<Arc<str>> {
        // What was read before the last notes were shed does not have them.
        let complete = loading.moment > self.holds.shed_at
            && self
                .leasing
                .all()
                .iter()
                .all(|owned| loading.shards.contains(owned));
        let due: Vec<Arc<str>> = self
            .holds
            .topics
            .iter()
            .filter(|(_, entry)| matches!(entry.state, TopicState::Crowded { due } if complete && due <= now))
            .map(|(topic, _)| topic.clone())
            .collect();
        let mut uncrowded = BTreeSet::new();
        for topic in due {
            let parked = loaded.iter().filter(|hold| {
                hold.state == HoldState::Parked
                    && match &hold.scope {
                        HoldScope::Key(key) => key.topic == topic,
                        // Of which topic it is is not known, but if it waits here, it was not dropped as this one's.
                        HoldScope::Message => !self.holds.knows(hold),
                        HoldScope::Topic(_) => false,
                    }
            });
            if parked.count() > self.setup.config.max_holds {
                self.crowd(&topic, now);
            } else {
                uncrowded.insert(topic);
            }
        }
        uncrowded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::Record;
    use crate::relay::Backoff;
    use crate::relay::config::RelayConfig;
    use crate::relay::machine::stand::{
        SECOND, Stand, hold_of, keyed, keyless, ms, owned, parking, published,
    };
    use crate::relay::machine::{Command, Setup};
    use crate::sink::Outcome;

    const RETRY: Backoff = Backoff {
        initial: SECOND,
        max: Duration::from_secs(60),
    };

    fn blocked() -> Outcome {
        Outcome::TopicBlocked("forbidden".into())
    }

    fn poison() -> Outcome {
        Outcome::Poison("no".into())
    }

    /// Of each topic that was held since the last look: which, and for how long.
    fn held(stand: &mut Stand) -> Vec<(String, Duration)> {
        let notes = stand.notes().into_iter();
        notes
            .filter_map(|note| match note {
                Note::TopicHeld { topic, pause, .. } => Some((topic.to_string(), pause)),
                _ => None,
            })
            .collect()
    }

    fn flows(stand: &mut Stand) -> bool {
        let flows = |note: &Note| matches!(note, Note::TopicFlows { .. });
        stand.notes().iter().any(flows)
    }

    /// Whether a topic is left out of what is read.
    fn is_held(stand: &Stand, topic: &str) -> bool {
        stand.machine.holds.held.topics.contains(topic)
    }

    fn is_crowded(stand: &Stand, topic: &str) -> bool {
        let entry = stand.machine.holds.topics.get(topic);
        entry.is_some_and(|entry| matches!(entry.state, TopicState::Crowded { .. }))
    }

    /// The attempts of the notes that were written.
    fn noted(commands: &[Command]) -> Vec<u32> {
        let settlements = commands.iter().filter_map(|command| match command {
            Command::Settle { settlement } => Some(settlement),
            _ => None,
        });
        settlements
            .flat_map(|settlement| &settlement.shards)
            .flat_map(|part| &part.holds)
            .filter_map(|change| match change {
                HoldChange::Put(hold) => Some(hold.attempts),
                HoldChange::Clear(_) => None,
            })
            .collect()
    }

    #[test]
    fn a_topic_that_stays_blocked_is_probed_with_one_message_after_ever_longer_pauses() {
        let mut stand = Stand::new(RelayConfig {
            topic_retry: RETRY,
            ..RelayConfig::default()
        });
        stand.outcome = Some(blocked());
        stand.rows = (1..=3).map(|at| keyed("t", &at.to_string(), at)).collect();
        let commands = stand.pass(ms(100));
        assert_eq!(published(&commands), [1, 2, 3]);
        assert_eq!(
            held(&mut stand),
            [("t".to_owned(), SECOND)],
            "once, though three were with the sink"
        );

        for (attempts, pause) in [(2, SECOND * 2), (3, SECOND * 4), (4, SECOND * 8)] {
            let due = stand.machine.holds.due().unwrap();
            let commands = stand.pass(due - stand.now - ms(1));
            assert!(published(&commands).is_empty(), "the pause is not over");
            assert!(is_held(&stand, "t"));
            let commands = stand.pass(ms(100));
            assert_eq!(published(&commands), [1], "one goes ahead");
            assert_eq!(
                noted(&commands),
                [attempts],
                "the note says how often it was tried"
            );
            assert_eq!(held(&mut stand), [("t".to_owned(), pause)]);
            assert!(stand.machine.holds.due() > Some(due + pause - ms(1)));
        }

        stand.outcome = Some(Outcome::Delivered);
        let commands = stand.pass(SECOND * 9);
        assert_eq!(
            published(&commands),
            [1, 2, 3],
            "the probe went through, and then all"
        );
        assert!(flows(&mut stand) && !is_held(&stand, "t"));
    }

    #[test]
    fn a_blocked_topic_is_probed_when_nothing_of_it_is_with_the_sink_whatever_of_others_is() {
        let mut stand = Stand::new(RelayConfig {
            topic_retry: RETRY,
            ..RelayConfig::default()
        });
        let first = stand.sent(vec![keyed("t", "a", 1)]);
        let slow = stand.sent(vec![keyed("t", "b", 2)]);
        stand.sent(vec![keyed("other", "c", 3)]);
        stand.settles = false;
        let unsettled = stand.sent(vec![keyed("t", "d", 4)]);
        stand.outcomes(unsettled, vec![Outcome::Delivered]);
        stand.outcomes(first, vec![blocked()]);
        stand.pass(SECOND * 3);
        assert!(is_held(&stand, "t"), "one is with the sink");
        stand.outcomes(slow, vec![blocked()]);
        stand.pass(ms(200));
        assert!(
            !is_held(&stand, "t"),
            "what waits to be settled or is of another topic keeps nothing back"
        );
    }

    #[test]
    fn a_blocked_topic_drops_what_of_it_has_not_left_and_nothing_else() {
        let mut stand = Stand::new(RelayConfig {
            batch_rows: 2,
            window_rows: 8,
            ..RelayConfig::default()
        });
        let of_it = [keyed("t", "a", 1), keyed("t", "b", 2), keyed("t", "c", 3)];
        let mut rows = of_it.to_vec();
        rows.push(keyed("other", "c", 4));
        stand.reads.push_back(rows);
        let batch = stand.until(|command| match command {
            Command::Publish { batch, .. } => Some(*batch),
            _ => None,
        });
        stand.outcomes(batch, vec![blocked(), Outcome::Delivered]);
        assert_eq!([0, 2].map(|at| stand.flies(&of_it[at])), [false, false]);
        assert!(stand.flies(&of_it[1]), "it is delivered, and is to be settled");
        stand.outcome = None;
        assert_eq!(published(&stand.run()), [4]);
        assert!(
            is_held(&stand, "t"),
            "that another one of it was delivered at the same time says nothing"
        );
    }

    #[test]
    fn a_probe_that_fails_by_itself_says_that_its_topic_flows() {
        let mut stand = Stand::new(RelayConfig {
            topic_retry: RETRY,
            ..RelayConfig::default()
        });
        stand.rows = vec![keyed("t", "a", 1), keyed("t", "b", 2)];
        stand.outcome = Some(blocked());
        stand.pass(ms(100));
        stand.outcome = Some(Outcome::Retry("later".into()));
        stand.pass(SECOND);
        assert!(flows(&mut stand) && !is_held(&stand, "t"));
    }

    #[test]
    fn a_probe_that_is_lost_with_its_shard_or_dropped_is_followed_by_another_at_once() {
        let mut stand = Stand::of(Setup {
            shards: 2,
            ..Setup::of_one_shard(RelayConfig {
                topic_retry: RETRY,
                ..RelayConfig::default()
            })
        });
        let probe = keyed("t", "a", 1);
        let other = Record {
            shard: Shard(1),
            ..keyed("u", "b", 2)
        };
        stand.rows = vec![probe, other];
        stand.outcome = Some(blocked());
        stand.pass(ms(100));
        stand.outcome = None;
        stand.pass(SECOND);
        let probing = |stand: &Stand, topic: &str| {
            let state = stand.machine.holds.topics[topic].state;
            matches!(state, TopicState::Probing { probe: Some(_), .. })
        };
        assert!(probing(&stand, "t") && probing(&stand, "u"));
        stand.machine.lose(Shard(0), "taken");
        assert!(!probing(&stand, "t") && probing(&stand, "u"));
        assert_eq!(stand.machine.holds.due(), Some(Duration::ZERO));

        stand.machine.drop_flight(Shard(1), Position(3));
        assert!(probing(&stand, "u"), "that was no probe");
        stand
            .machine
            .holds
            .probe_dropped(Shard(1), Position(7), &Arc::from("u"));
        assert!(probing(&stand, "u"), "nor was that");
        stand.machine.drop_flight(Shard(1), Position(2));
        assert!(!probing(&stand, "u"));
    }

    /// A relay that parks what fails, and holds a topic of which more than two wait.
    fn narrow() -> RelayConfig {
        RelayConfig {
            max_holds: 2,
            topic_retry: RETRY,
            ..parking()
        }
    }

    #[test]
    fn the_topic_most_of_which_waits_is_held_when_too_many_do() {
        let mut stand = Stand::new(narrow());
        stand.settles = false;
        let batch = stand.sent(vec![keyless("quiet", 1), keyless("many", 2)]);
        stand.outcomes(batch, vec![poison(); 2]);
        assert!(held(&mut stand).is_empty(), "two may wait");
        let batch = stand.sent(vec![keyless("many", 3)]);
        stand.outcomes(batch, vec![poison()]);
        assert_eq!(held(&mut stand), [("many".to_owned(), RETRY.max)]);
        assert!(is_held(&stand, "many") && !is_held(&stand, "quiet"));
        let due = TopicState::Crowded {
            due: stand.now + RETRY.max,
        };
        assert_eq!(stand.machine.holds.topics["many"].state, due);
    }

    #[test]
    fn notes_of_a_crowded_topic_are_forgotten_here_once_the_store_has_them() {
        let mut stand = Stand::new(narrow());
        stand.settles = false;
        let rows = [keyless("few", 1), keyless("many", 2), keyless("many", 3)];
        let batch = stand.sent(rows.to_vec());
        stand.outcomes(batch, vec![poison(); 3]);
        stand.run();
        let entries = |stand: &Stand| -> Vec<i64> {
            let entries = stand.machine.holds.entries.values();
            entries.map(|entry| entry.head.position.0).collect()
        };
        assert_eq!(entries(&stand), [1, 2, 3], "they are not written yet");
        stand.settled();
        assert_eq!(
            entries(&stand),
            [1],
            "they are, and the other topic's is not forgotten"
        );
        assert_eq!(stand.machine.holds.shed_at, stand.machine.holds.moment);
        assert_eq!(stand.machine.holds.held.messages.len(), 1);
    }

    /// The store's note of a message without a key does not say of which topic it is.
    #[test]
    fn a_healthy_topic_is_not_held_for_the_notes_that_a_relay_takes_over() {
        let mut stand = Stand::apart(Setup::of_one_shard(narrow()));
        stand.holds = (1..=4)
            .map(|at| hold_of(&keyless("bad", at), HoldState::Parked))
            .collect();
        stand.run();
        let rows = [keyed("good", "k", 11), keyed("good", "l", 12)];
        let batch = stand.sent(rows.to_vec());
        stand.outcomes(batch, vec![Outcome::Retry("later".into()), Outcome::Delivered]);
        stand.pass(SECOND);
        assert!(!is_crowded(&stand, "good"));
    }

    #[test]
    fn a_topic_that_was_crowded_flows_again_whatever_is_parked_of_others() {
        let mut stand = Stand::apart(Setup::of_one_shard(narrow()));
        stand.holds = (1..=4)
            .map(|at| hold_of(&keyless("bad", at), HoldState::Parked))
            .collect();
        stand.run();
        let rows = (11..=13).map(|at| keyed("good", &at.to_string(), at));
        let batch = stand.sent(rows.collect());
        stand.outcomes(batch, vec![Outcome::Retry("later".into()); 3]);
        stand.run();
        assert!(is_crowded(&stand, "good"));
        stand.pass(SECOND * 200);
        assert!(!is_crowded(&stand, "good"));
    }

    #[test]
    fn of_a_crowded_topic_what_waits_without_a_note_is_forgotten_at_once() {
        let mut stand = Stand::new(narrow());
        stand.settles = false;
        let skipped = keyed("many", "k", 1);
        let batch = stand.sent(vec![skipped, keyless("many", 2), keyless("many", 3)]);
        stand.outcomes(batch, vec![Outcome::Skipped, poison(), poison()]);
        assert!(is_crowded(&stand, "many"));
        let heads = stand
            .machine
            .holds
            .entries
            .values()
            .map(|entry| entry.head.position.0);
        assert_eq!(
            heads.collect::<Vec<_>>(),
            [2, 3],
            "opening the topic reads it again"
        );
        assert!(stand.machine.holds.held.keys.is_empty());
    }

    #[test]
    fn a_crowded_topic_keeps_the_hold_whose_head_is_with_the_sink() {
        let mut stand = Stand::new(narrow());
        let head = keyed("many", "k", 1);
        stand.holds = vec![hold_of(
            &head,
            HoldState::Retrying {
                due_in: Duration::ZERO,
            },
        )];
        stand.lease(stand.now);
        stand.machine.lose(Shard(0), "taken");
        stand.held = vec![owned(0, 2)];
        stand.rows = vec![head.clone()];
        stand.outcome = None;
        stand.pass(SECOND * 12);
        assert!(stand.flies(&head), "it is tried again");
        stand.rows.clear();
        let batch = stand.sent(vec![keyless("many", 2), keyless("many", 3), keyless("many", 4)]);
        stand.outcomes(batch, vec![poison(); 3]);
        stand.pass(ms(100));
        assert!(is_crowded(&stand, "many"));
        let left: Vec<i64> = stand
            .machine
            .holds
            .entries
            .values()
            .map(|entry| entry.head.position.0)
            .collect();
        assert_eq!(left, [1]);
    }

    #[test]
    fn what_only_waits_for_its_burial_crowds_nothing() {
        let mut stand = Stand::new(RelayConfig {
            max_holds: 2,
            ..RelayConfig::default()
        });
        stand.settles = false;
        let rows: Vec<Record> = (1..=6).map(|at| keyed("t", &at.to_string(), at)).collect();
        let batch = stand.sent(rows);
        let mut outcomes = vec![poison(); 4];
        outcomes.extend(vec![Outcome::Retry("later".into()); 2]);
        stand.outcomes(batch, outcomes);
        assert_eq!(stand.machine.holds.entries.len(), 6);
        assert!(held(&mut stand).is_empty());
    }

    /// A crowded topic, and what the store has of it. All of it is parked.
    fn crowded(parked: &[Record]) -> Stand {
        let mut stand = Stand::new(narrow());
        let batch = stand.sent((1..=3).map(|at| keyless("many", at)).collect());
        stand.outcomes(batch, vec![poison(); 3]);
        stand.pass(ms(100));
        assert!(is_crowded(&stand, "many"));
        stand.holds = parked.iter().map(|row| hold_of(row, HoldState::Parked)).collect();
        stand.notes();
        stand
    }

    #[test]
    fn a_crowded_topic_stays_held_as_long_as_too_many_of_it_are_parked() {
        let parked = [keyless("many", 1), keyed("many", "k", 2), keyed("many", "l", 3)];
        let mut stand = crowded(&parked);
        stand.pass(SECOND * 59);
        assert!(
            is_crowded(&stand, "many") && held(&mut stand).is_empty(),
            "it is looked at after a minute"
        );
        stand.pass(SECOND * 4);
        assert!(is_crowded(&stand, "many"));
        assert_eq!(
            held(&mut stand),
            [("many".to_owned(), RETRY.max)],
            "and again after another"
        );

        stand.holds.pop();
        stand.pass(SECOND * 63);
        assert!(!is_crowded(&stand, "many"), "two may wait");
        assert_eq!(stand.machine.holds.entries.len(), 2, "and do");
    }

    #[test]
    fn what_is_parked_of_other_topics_or_waits_for_time_keeps_no_crowd() {
        let rows = [
            keyless("many", 1),
            keyed("many", "k", 2),
            keyed("other", "l", 3),
            keyed("other", "m", 4),
        ];
        let mut stand = crowded(&rows);
        let mut waiting = hold_of(&keyed("many", "later", 5), HoldState::Parked);
        waiting.state = HoldState::Retrying { due_in: SECOND };
        stand.holds.push(waiting);
        stand.pass(SECOND * 63);
        assert!(!is_crowded(&stand, "many"));
    }

    #[test]
    fn a_crowd_is_judged_by_all_notes_of_all_shards_as_they_are_after_the_last_were_forgotten() {
        let mut stand = crowded(&[]);
        stand.now += SECOND * 61;
        let moment = stand.machine.holds.moment;
        let mut due = |moment, shards: &[_]| {
            let loading = Loading {
                at: Duration::ZERO,
                shards: shards.to_vec(),
                moment,
            };
            !stand.machine.uncrowded(&loading, &[], stand.now).is_empty()
        };
        assert!(
            !due(moment, &[owned(0, 1)]),
            "what was read before does not have them"
        );
        assert!(!due(moment + 1, &[]), "nor is it all of them");
        assert!(
            !due(moment + 1, &[owned(0, 7)]),
            "nor what was read under another epoch"
        );
        assert!(due(moment + 1, &[owned(0, 1)]));
    }
}
