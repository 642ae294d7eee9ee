//! What goes to the sink, what came of it, and whether anything may go at all.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::holding::Wait;
use super::{BatchId, Command, Flight, Machine, Note, Stage};
use crate::error::Result;
use crate::fetch::Record;
use crate::settle::Death;
use crate::shard::{Position, Shard};
use crate::sink::{Outcome, Reason};

#[derive(Debug)]
pub(super) struct Publishing {
    /// Records to be handed over, in order.
    pub(super) ready: VecDeque<Record>,
    /// What the sink has: each batch's records in order. Those that were forgotten meanwhile match no flight.
    batches: BTreeMap<BatchId, Vec<(Shard, Position)>>,
    next_batch: BatchId,
    /// The batch that the sink has not wholly taken over yet.
    handing: Option<BatchId>,
    line: Line,
    /// Whether the sink must drop what it has: something of it may not leave any more.
    pub(super) purge_wanted: bool,
    purging: bool,
    /// Counts the times at which everything unsent was dropped: answers to fetches from before are void.
    pub(super) generation: u64,
    /// Failures of the sink as a whole since something was delivered.
    failures: u32,
    rate: Option<Rate>,
}

/// Whether messages may go to the sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// They may.
    Open,
    /// It is in doubt: it is being purged, and all outcomes are awaited.
    Closing { rebuild: bool, probe: bool },
    /// It is being rebuilt.
    Rebuilding,
    /// A pause until the next look at it.
    Paused { until: Duration, rebuild: bool },
    /// It is being looked at.
    Probing,
}

/// A token bucket that holds a tenth of a second's worth.
#[derive(Debug)]
struct Rate {
    per_second: f64,
    tokens: f64,
    at: Duration,
}

impl Rate {
    fn refill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.at = now;
        self.tokens = (self.tokens + passed * self.per_second).min((self.per_second / 10.0).max(1.0));
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between zero and a tenth of a u32"
    )]
    fn whole(&self) -> usize {
        self.tokens as usize
    }

    fn due(&self, now: Duration) -> Duration {
        now + Duration::from_secs_f64(((1.0 - self.tokens) / self.per_second).max(0.001))
    }
}

impl Publishing {
    pub(super) fn new(rate_limit: Option<u32>) -> Self {
        Self {
            ready: VecDeque::new(),
            batches: BTreeMap::new(),
            next_batch: 0,
            handing: None,
            line: Line::Open,
            purge_wanted: false,
            purging: false,
            generation: 0,
            failures: 0,
            rate: rate_limit.map(|rate| Rate {
                per_second: f64::from(rate),
                tokens: 1.0,
                at: Duration::ZERO,
            }),
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.line == Line::Open && !self.purge_wanted
    }

    /// Whether the sink has nothing of ours.
    pub(super) fn is_quiet(&self) -> bool {
        self.batches.is_empty() && !self.purging && !self.purge_wanted
    }
}

impl Machine {
    /// Keeps the sink usable: purges, rebuilds, probes.
    pub(super) fn poll_sink(&mut self, now: Duration) -> Option<Command> {
        let publishing = &mut self.publishing;
        if publishing.purge_wanted && !publishing.purging {
            publishing.purge_wanted = false;
            publishing.purging = true;
            if publishing.line == Line::Open {
                publishing.line = Line::Closing {
                    rebuild: false,
                    probe: false,
                };
                self.drop_ready();
            }
            return Some(Command::Purge);
        }
        match publishing.line {
            Line::Closing { rebuild, probe } if publishing.is_quiet() => {
                if self.stopping {
                    return None;
                }
                if rebuild {
                    publishing.line = Line::Rebuilding;
                    return Some(Command::Rebuild);
                }
                if probe {
                    let pause = self.sink_pause();
                    self.publishing.line = Line::Paused {
                        until: now + pause,
                        rebuild: false,
                    };
                } else {
                    publishing.line = Line::Open;
                }
                None
            }
            Line::Paused { until, rebuild } if now >= until && !self.stopping => {
                publishing.line = if rebuild { Line::Rebuilding } else { Line::Probing };
                Some(if rebuild { Command::Rebuild } else { Command::Probe })
            }
            _ => None,
        }
    }

    /// The first failure after a delivery is looked into at once, further ones with growing pauses.
    fn sink_pause(&mut self) -> Duration {
        match self.publishing.failures {
            0 | 1 => Duration::ZERO,
            failures => self
                .setup
                .config
                .outage_retry
                .pause(failures - 1, &mut self.random),
        }
    }

    pub(super) fn sink_due(&self) -> Option<Duration> {
        match self.publishing.line {
            Line::Paused { until, .. } if !self.stopping => Some(until),
            _ => None,
        }
    }

    pub(super) fn poll_publish(&mut self, now: Duration) -> Option<Command> {
        loop {
            if self.publishing.handing.is_some() || !self.publishing.is_open() || self.stopping {
                return None;
            }
            let mut most = self.setup.config.batch_rows;
            if let Some(rate) = &mut self.publishing.rate {
                rate.refill(now);
                most = most.min(rate.whole());
            }
            let count = most.min(self.publishing.ready.len());
            if count == 0 {
                return None;
            }
            let batch = self.publishing.next_batch;
            let mut records = Vec::with_capacity(count);
            let mut places = Vec::with_capacity(count);
            while records.len() < count
                && let Some(mut record) = self.publishing.ready.pop_front()
            {
                let place = (record.shard, record.position);
                if let Some(defect) = record.defect.take() {
                    self.conclude_defect(place, defect, now);
                    continue;
                }
                if let Some(flight) = self.flights.get_mut(&place) {
                    flight.stage = Stage::Sent(batch);
                    places.push(place);
                    records.push(record);
                }
            }
            if records.is_empty() {
                // There may be more behind the defects.
                continue;
            }
            if let Some(rate) = &mut self.publishing.rate {
                rate.tokens -= f64::from(u32::try_from(records.len()).unwrap_or(u32::MAX));
            }
            self.publishing.next_batch += 1;
            self.publishing.handing = Some(batch);
            self.publishing.batches.insert(batch, places);
            self.note(Note::Published {
                records: records.len(),
            });
            return Some(Command::Publish { batch, records });
        }
    }

    pub(super) fn publish_due(&self, now: Duration) -> Option<Duration> {
        let publishing = &self.publishing;
        if publishing.handing.is_some()
            || !publishing.is_open()
            || publishing.ready.is_empty()
            || self.stopping
        {
            return None;
        }
        publishing.rate.as_ref().map(|rate| rate.due(now))
    }

    pub(super) fn accepted(&mut self, batch: BatchId) {
        if self.publishing.handing == Some(batch) {
            self.publishing.handing = None;
        }
    }

    pub(super) fn outcomes(&mut self, batch: BatchId, outcomes: Option<Vec<Outcome>>, now: Duration) {
        self.accepted(batch);
        let Some(places) = self.publishing.batches.remove(&batch) else {
            return;
        };
        let unknown = || Outcome::Unknown(Reason::from("the sink was purged"));
        let outcomes = match outcomes {
            Some(outcomes) if outcomes.len() == places.len() => outcomes,
            Some(_) => {
                self.note(Note::ContractBroken {
                    who: "sink",
                    what: "gave another number of outcomes than records",
                });
                vec![unknown(); places.len()]
            }
            None => vec![unknown(); places.len()],
        };
        let mut counts: BTreeMap<(Arc<str>, &'static str), u64> = BTreeMap::new();
        let mut last: Option<(Arc<str>, &'static str, u64)> = None;
        for (place, outcome) in places.into_iter().zip(outcomes) {
            let Some(flight) = self
                .flights
                .get(&place)
                .filter(|flight| flight.stage == Stage::Sent(batch))
            else {
                continue;
            };
            // Runs of one topic and class, which is nearly always all, cost no lookup.
            match &mut last {
                Some((topic, class, count)) if *topic == flight.topic && *class == outcome.as_str() => {
                    *count += 1
                }
                _ => {
                    if let Some((topic, class, count)) = last.take() {
                        *counts.entry((topic, class)).or_default() += count;
                    }
                    last = Some((flight.topic.clone(), outcome.as_str(), 1));
                }
            }
            self.conclude(place, outcome, now);
        }
        if let Some((topic, class, count)) = last {
            *counts.entry((topic, class)).or_default() += count;
        }
        for ((topic, class), count) in counts {
            self.note(Note::Outcome { topic, class, count });
        }
    }

    /// What follows from the outcome of one record.
    fn conclude(&mut self, place: (Shard, Position), outcome: Outcome, now: Duration) {
        let (shard, position) = place;
        let Some(flight) = self.flights.get(&place) else {
            return;
        };
        let (record, attempts) = (flight.record, flight.attempts);
        let (topic, key) = (flight.topic.clone(), flight.key.clone());
        match outcome {
            Outcome::Delivered => {
                if self.publishing.line == Line::Open {
                    self.publishing.failures = 0;
                }
                self.settle_delivered(shard, record);
                self.resolve(shard, position);
                self.end_hold(shard, record, key.as_ref());
                self.topic_answered(shard, position, &topic);
            }
            Outcome::Poison(reason) => {
                self.topic_answered(shard, position, &topic);
                self.give_up(place, attempts.saturating_add(1), reason, now);
            }
            Outcome::Retry(reason) => {
                self.topic_answered(shard, position, &topic);
                let attempts = attempts.saturating_add(1);
                if attempts >= self.setup.config.max_attempts {
                    self.give_up(place, attempts, reason, now);
                    return;
                }
                let pause = self.setup.config.retry.pause(attempts, &mut self.random);
                self.note(Note::Retrying {
                    what: describe(place, &topic),
                    attempts,
                    pause,
                    reason: reason.clone(),
                });
                self.hold_record(
                    shard,
                    record,
                    key,
                    Wait {
                        topic,
                        attempts,
                        due: Some(now + pause),
                        reason: Some(reason),
                    },
                    now,
                );
                self.resolve(shard, position);
            }
            // Its predecessor is settled otherwise.
            Outcome::Skipped => self.read_again(place, now),
            Outcome::TopicBlocked(reason) => {
                self.hold_topic(shard, record, topic, now, &reason);
                self.drop_flight(shard, position);
            }
            Outcome::Outage(reason) => self.doubt(place, reason, false),
            Outcome::Unknown(reason) => self.doubt(place, reason, false),
            Outcome::Broken(reason) => self.doubt(place, reason, true),
        }
    }

    /// Drops a record and what follows it of its key, to be read again when nothing of the key is with the sink.
    fn read_again(&mut self, (shard, position): (Shard, Position), now: Duration) {
        let Some(flight) = self.drop_flight(shard, position) else {
            return;
        };
        if !self.holds.admit_topic(&flight.topic) {
            // Opening the topic rereads everything; a hold of its own would hide the one that the store has.
            return;
        }
        if self.holds.keep_out(shard, position, flight.key.as_ref()) {
            return;
        }
        // When the key's own head is still being tried, the hold stays that one's, with its attempts.
        let (record, attempts) = self
            .holds
            .tried(shard, flight.key.as_ref())
            .unwrap_or((flight.record, flight.attempts));
        let wait = Wait {
            topic: flight.topic,
            attempts,
            due: Some(now),
            reason: None,
        };
        self.hold_record(shard, record, flight.key, wait, now);
    }

    /// A record that nobody can make sense of is given up without ever going to the sink, but not before its
    /// predecessors are done with: its key would stop at it and they would wait behind it.
    fn conclude_defect(&mut self, place: (Shard, Position), defect: String, now: Duration) {
        let Some(Flight { key, topic, .. }) = self.flights.get(&place) else {
            return;
        };
        let follows = key.is_some()
            && self
                .flights
                .values()
                .any(|other| matches!(other.stage, Stage::Sent(_)) && other.key == *key);
        let topic = topic.clone();
        // It says nothing of its topic.
        self.holds.probe_dropped(place.0, place.1, &topic);
        if follows {
            self.read_again(place, now);
        } else {
            let attempts = self.flights.get(&place).map_or(0, |flight| flight.attempts);
            self.give_up(place, attempts.saturating_add(1), defect.into(), now);
        }
    }

    /// A message that cannot be delivered leaves the flow, or its key stops at it.
    fn give_up(&mut self, place: (Shard, Position), attempts: u32, reason: Reason, now: Duration) {
        let (shard, position) = place;
        let Some(flight) = self.flights.get(&place) else {
            return;
        };
        let (record, topic, key) = (flight.record, flight.topic.clone(), flight.key.clone());
        let what = describe(place, &topic);
        if self.parks() {
            self.note(Note::Parked {
                what,
                attempts,
                reason: reason.clone(),
            });
            self.hold_record(
                shard,
                record,
                key,
                Wait {
                    topic,
                    attempts,
                    due: None,
                    reason: Some(reason),
                },
                now,
            );
        } else {
            self.note(Note::Dead {
                what,
                attempts,
                reason: reason.clone(),
            });
            self.settle_death(
                shard,
                Death {
                    record,
                    attempts,
                    reason: reason.as_str().to_owned(),
                },
            );
            self.end_hold(shard, record, key.as_ref());
            if let Some(key) = key {
                self.hold_for_burial(shard, record, key, now);
            }
        }
        self.resolve(shard, position);
    }

    /// The sink as a whole is in doubt: whatever is not delivered is dropped and read again after it was purged.
    fn doubt(&mut self, place: (Shard, Position), reason: Reason, rebuild: bool) {
        let (shard, position) = place;
        self.drop_flight(shard, position);
        self.reread(shard, position);
        match &mut self.publishing.line {
            Line::Closing {
                rebuild: wanted,
                probe,
            } => {
                *wanted |= rebuild;
                *probe = true;
            }
            Line::Open => {
                self.publishing.failures = self.publishing.failures.saturating_add(1);
                self.publishing.line = Line::Closing { rebuild, probe: true };
                self.publishing.purge_wanted = true;
                let pause = self.setup.config.outage_retry.ceiling(self.publishing.failures);
                self.note(Note::SinkDown { reason, pause });
                self.drop_ready();
            }
            Line::Rebuilding | Line::Paused { .. } | Line::Probing => {}
        }
    }

    /// Drops everything that has not left for the sink, to be read again.
    pub(super) fn drop_ready(&mut self) {
        self.publishing.generation += 1;
        let ready: Vec<(Shard, Position)> = self
            .flights
            .iter()
            .filter(|(_, flight)| flight.stage == Stage::Ready)
            .map(|(place, _)| *place)
            .collect();
        self.drop_unsent(&ready);
        for (shard, position) in ready {
            self.reread(shard, position);
        }
    }

    /// Drops these records, none of which has left.
    pub(super) fn drop_unsent(&mut self, places: &[(Shard, Position)]) {
        // First those that wait behind another of their key: dropping that one must not send them off.
        for (shard, position) in places {
            if self.queues.is_empty() {
                break;
            }
            if let Some(key) = self
                .flights
                .get(&(*shard, *position))
                .and_then(|flight| flight.key.clone())
                && let Some(queue) = self.queues.get_mut(&(*shard, key))
            {
                queue.waiting.retain(|record| record.position != *position);
            }
        }
        for (shard, position) in places {
            self.drop_flight(*shard, *position);
        }
        let flights = &self.flights;
        self.publishing
            .ready
            .retain(|record| flights.contains_key(&(record.shard, record.position)));
    }

    pub(super) fn purged(&mut self) {
        self.publishing.purging = false;
    }

    pub(super) fn rebuilt(&mut self, result: Result<()>, now: Duration) {
        match result {
            Ok(()) => {
                self.publishing.line = Line::Paused {
                    until: now,
                    rebuild: false,
                }
            }
            Err(error) => self.sink_failed(&error.into(), true, now),
        }
    }

    pub(super) fn probed(&mut self, result: Result<()>, now: Duration) {
        match result {
            Ok(()) => {
                self.publishing.line = Line::Open;
                // After a purge for a lost shard nothing was told, and nothing is wrong with the sink.
                if self.publishing.failures > 0 {
                    self.note(Note::SinkUp);
                }
            }
            Err(error) => self.sink_failed(&error.into(), false, now),
        }
    }

    fn sink_failed(&mut self, error: &Arc<crate::Error>, rebuild: bool, now: Duration) {
        self.publishing.failures = self.publishing.failures.saturating_add(1);
        let pause = self.sink_pause();
        self.publishing.line = Line::Paused {
            until: now + pause,
            rebuild,
        };
        self.note(Note::SinkDown {
            reason: error.to_string().into(),
            pause,
        });
    }
}

/// A record for people: nothing of its key or payload, which are the users'.
fn describe((shard, position): (Shard, Position), topic: &str) -> String {
    format!("{topic} (shard {shard}, position {position})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::Backoff;
    use crate::relay::config::RelayConfig;
    use crate::relay::machine::stand::{
        SECOND, Stand, failure, keyed, keyless, ms, parking, published, record_of,
    };
    use crate::relay::machine::{Event, Setup};

    fn outage() -> Outcome {
        Outcome::Outage("away".into())
    }

    fn broken() -> Outcome {
        Outcome::Broken("fatal".into())
    }

    fn limited(rate: u32) -> RelayConfig {
        RelayConfig {
            rate_limit: Some(rate),
            ..RelayConfig::default()
        }
    }

    /// The pauses that were told with the failures of the sink.
    fn down(stand: &mut Stand) -> Vec<Duration> {
        let notes = stand.notes().into_iter();
        notes
            .filter_map(|note| match note {
                Note::SinkDown { pause, .. } => Some(pause),
                _ => None,
            })
            .collect()
    }

    fn is_probe(command: &Command) -> Option<()> {
        matches!(command, Command::Probe).then_some(())
    }

    #[test]
    fn a_bucket_fills_with_time_and_holds_a_tenth_of_a_second_or_one() {
        let bucket = |per_second, tokens| Rate {
            per_second,
            tokens,
            at: SECOND,
        };
        let mut rate = bucket(100.0, 1.0);
        rate.refill(SECOND + ms(35));
        assert_eq!(rate.whole(), 4);
        rate.refill(SECOND + ms(55));
        assert_eq!(rate.whole(), 6, "counted from the last time");
        rate.refill(SECOND * 9);
        assert_eq!(rate.whole(), 10);
        let mut slow = bucket(2.0, 0.0);
        slow.refill(SECOND * 9);
        assert_eq!(slow.whole(), 1);

        assert_eq!(bucket(100.0, 0.0).due(SECOND), SECOND + ms(10));
        assert_eq!(bucket(100.0, 0.5).due(SECOND), SECOND + ms(5));
        assert_eq!(bucket(100.0, 1.0).due(SECOND), SECOND + ms(1));
        assert_eq!(bucket(0.5, 0.0).due(SECOND), SECOND * 3);
    }

    #[test]
    fn a_limited_relay_says_when_the_next_may_go_while_anything_could() {
        let mut stand = Stand::new(limited(50));
        stand.pass(SECOND);
        assert_eq!(stand.machine.publish_due(stand.now), None, "there is nothing");
        stand.outcome = None;
        stand.rows = (1..=9).map(|at| keyless("t", at)).collect();
        let first = stand.until(|command| match command {
            Command::Publish { batch, records } => Some((*batch, records.len())),
            _ => None,
        });
        assert_eq!(first.1, 5, "a tenth of a second's worth");
        assert_eq!(
            stand.machine.publish_due(stand.now),
            None,
            "one hand-over after the other"
        );
        stand.tell(Event::Accepted { batch: first.0 });
        assert!(published(&stand.run()).is_empty(), "they are used up");
        assert_eq!(stand.machine.publish_due(stand.now), Some(stand.now + ms(20)));
        assert_eq!(published(&stand.pass(ms(200))), [6, 7, 8, 9], "one by one");
        assert_eq!(stand.machine.publish_due(stand.now), None);
    }

    #[test]
    fn outcomes_are_counted_by_topic_and_class() {
        let mut stand = Stand::new(RelayConfig::default());
        let topics = ["a", "a", "b", "a", "b", "b", "b"];
        let records = topics
            .iter()
            .zip(1..)
            .map(|(topic, at)| keyless(topic, at))
            .collect();
        let batch = stand.sent(records);
        let retry = || Outcome::Retry("later".into());
        let delivered = || Outcome::Delivered;
        let outcomes = vec![
            delivered(),
            delivered(),
            delivered(),
            delivered(),
            retry(),
            delivered(),
            delivered(),
        ];
        stand.outcomes(batch, outcomes);
        let counts: Vec<(String, &str, u64)> = stand
            .notes()
            .into_iter()
            .filter_map(|note| match note {
                Note::Outcome { topic, class, count } => Some((topic.to_string(), class, count)),
                _ => None,
            })
            .collect();
        let expected = [("a", "delivered", 3), ("b", "delivered", 3), ("b", "retry", 1)];
        assert_eq!(
            counts,
            expected.map(|(topic, class, count)| (topic.to_owned(), class, count))
        );
    }

    #[test]
    fn outcomes_that_are_too_few_or_too_many_tell_nothing_and_are_told() {
        for count in [1, 3] {
            let mut stand = Stand::new(RelayConfig::default());
            let records = vec![record_of(1), record_of(2)];
            let batch = stand.sent(records.clone());
            stand.outcomes(batch, vec![Outcome::Delivered; count]);
            let broke = |note: &Note| matches!(note, Note::ContractBroken { who: "sink", .. });
            assert!(stand.notes().iter().any(broke));
            assert!(stand.machine.is_empty(), "nothing is settled of it");
            stand.rows = records;
            assert_eq!(published(&stand.pass(SECOND)), [1, 2], "and it goes again");
        }
    }

    #[test]
    fn what_is_heard_of_a_hand_over_before_a_shard_was_lost_says_nothing_of_the_next_one() {
        let mut stand = Stand::new(RelayConfig::default());
        let old = stand.sent(vec![record_of(1)]);
        stand.machine.lose(Shard(0), "taken");
        stand.held = vec![crate::relay::machine::stand::owned(0, 2)];
        stand.machine.leasing_now(stand.now);
        assert!(matches!(
            stand.machine.poll(stand.now),
            Some(Command::Lease { .. })
        ));
        stand.lease(stand.now);
        stand.outcomes(old, vec![outage()]);
        assert!(down(&mut stand).is_empty());
        let new = stand.sent(vec![record_of(1)]);
        stand.outcomes(old, vec![Outcome::Delivered]);
        assert!(stand.machine.settling.is_empty());
        stand.outcomes(new, vec![Outcome::Delivered]);
        assert!(!stand.machine.settling.is_empty());
    }

    #[test]
    fn what_a_purge_for_a_lost_shard_drops_is_no_failure_of_the_sink() {
        let mut stand = Stand::of(Setup {
            shards: 2,
            ..Setup::of_one_shard(RelayConfig::default())
        });
        let other = Record {
            shard: Shard(1),
            ..keyless("t", 2)
        };
        let batch = stand.sent(vec![record_of(1), other]);
        stand.machine.lose(Shard(0), "taken");
        assert!(matches!(stand.machine.poll(stand.now), Some(Command::Purge)));
        stand.outcomes(batch, vec![Outcome::Unknown("purged".into()); 2]);
        stand.tell(Event::Purged);
        stand.until(is_probe);
        stand.tell(Event::Probed { result: Ok(()) });
        let told = |note: &Note| matches!(note, Note::SinkUp | Note::SinkDown { .. });
        assert!(!stand.notes().iter().any(told));
    }

    #[test]
    fn a_sink_in_doubt_is_probed_at_once_and_then_with_growing_pauses_until_it_answers() {
        let outage_retry = Backoff {
            initial: ms(100),
            max: SECOND * 3600,
        };
        let mut stand = Stand::new(RelayConfig {
            outage_retry,
            ..RelayConfig::default()
        });
        let batch = stand.sent(vec![record_of(1)]);
        let now = stand.now;
        stand.outcomes(batch, vec![outage()]);
        stand.until(is_probe);
        assert_eq!(stand.now, now, "at once");
        assert_eq!(down(&mut stand), [ms(100)]);
        let mut pauses = Vec::new();
        for failures in 1..10 {
            stand.tell(Event::Probed {
                result: Err(failure()),
            });
            let [pause] = down(&mut stand)[..] else { panic!() };
            assert!(pause <= outage_retry.ceiling(failures), "{failures}: {pause:?}");
            assert_eq!(stand.machine.sink_due(), Some(stand.now + pause));
            pauses.push(pause);
            let due = stand.now + pause;
            stand.until(is_probe);
            assert!((due..due + ms(2)).contains(&stand.now));
        }
        assert!(
            pauses.iter().max() > Some(&outage_retry.ceiling(7)),
            "they do grow: {pauses:?}"
        );
        stand.tell(Event::Probed { result: Ok(()) });
        assert!(stand.notes().iter().any(|note| matches!(note, Note::SinkUp)));
    }

    #[test]
    fn a_sink_that_answers_and_delivers_nothing_is_probed_ever_later_and_a_delivery_forgives() {
        let outage_retry = Backoff {
            initial: SECOND,
            max: SECOND * 3600,
        };
        let mut stand = Stand::new(RelayConfig {
            outage_retry,
            ..RelayConfig::default()
        });
        let mut fail = |first: Outcome| {
            let batch = stand.sent(vec![keyless("t", 1), keyless("t", 2)]);
            stand.outcomes(batch, vec![first, outage()]);
            let told = down(&mut stand);
            let now = stand.now;
            stand.until(is_probe);
            stand.tell(Event::Probed { result: Ok(()) });
            (told, stand.now - now)
        };
        assert_eq!(fail(outage()), (vec![SECOND], Duration::ZERO));
        for ceiling in [1, 2, 4, 8] {
            let (told, waited) = fail(outage());
            assert_eq!(told, [SECOND * ceiling * 2]);
            assert!(
                waited > Duration::ZERO && waited <= SECOND * ceiling + ms(2),
                "{waited:?}"
            );
        }
        assert_eq!(fail(Outcome::Delivered), (vec![SECOND], Duration::ZERO));
    }

    #[test]
    fn a_delivery_that_is_heard_of_while_the_sink_is_in_doubt_forgives_nothing() {
        let mut stand = Stand::new(RelayConfig::default());
        for told in [ms(100), ms(200), ms(400)] {
            let batch = stand.sent(vec![keyless("t", 1), keyless("t", 2)]);
            stand.outcomes(batch, vec![outage(), Outcome::Delivered]);
            assert_eq!(down(&mut stand), [told]);
        }
    }

    #[test]
    fn a_sink_is_rebuilt_when_anything_found_it_broken() {
        for outcomes in [
            vec![broken(), outage()],
            vec![outage(), broken()],
            vec![broken(), broken()],
        ] {
            let mut stand = Stand::new(RelayConfig::default());
            let batch = stand.sent(vec![keyless("t", 1), keyless("t", 2)]);
            stand.outcomes(batch, outcomes);
            let rebuilds = |command: &Command| match command {
                Command::Rebuild => Some(true),
                Command::Probe => Some(false),
                _ => None,
            };
            assert!(stand.until(rebuilds));
            stand.tell(Event::Rebuilt {
                result: Err(failure()),
            });
            assert!(stand.until(rebuilds), "again, when that failed");
            stand.tell(Event::Rebuilt { result: Ok(()) });
            assert!(!stand.until(rebuilds), "and then it is probed");
        }
    }

    #[test]
    fn a_relay_that_stops_looks_at_its_sink_no_more() {
        let mut stand = Stand::new(RelayConfig::default());
        let (slow, batch) = (
            stand.sent(vec![keyless("t", 1)]),
            stand.sent(vec![keyless("t", 2)]),
        );
        stand.outcomes(batch, vec![outage()]);
        stand.outcomes(slow, vec![outage()]);
        stand.until(is_probe);
        stand.tell(Event::Probed {
            result: Err(failure()),
        });
        assert!(stand.machine.sink_due().is_some());
        stand.settles = false;
        stand
            .machine
            .settle_delivered(Shard(0), keyless("t", 3).reference());
        stand.tell(Event::Shutdown);
        assert_eq!(stand.machine.sink_due(), None);
        let commands = stand.pass(SECOND * 30);
        assert!(!commands.iter().any(|command| is_probe(command).is_some()));
    }

    #[test]
    fn a_record_that_failed_waits_for_the_pause_that_is_told_and_written() {
        let mut stand = Stand::new(RelayConfig::default());
        let batch = stand.sent(vec![keyed("t", "k", 7)]);
        stand.settles = false;
        stand.outcomes(batch, vec![Outcome::Retry("later".into())]);
        let told = stand.notes().into_iter().find_map(|note| match note {
            Note::Retrying { what, pause, .. } => Some((what, pause)),
            _ => None,
        });
        let (what, pause) = told.unwrap();
        assert_eq!(what, "t (shard 0, position 7)");
        assert_eq!(stand.machine.holds.due(), Some(stand.now + pause));
        let written = stand.until(|command| match command {
            Command::Settle { settlement } => Some(settlement.shards[0].holds.clone()),
            _ => None,
        });
        let crate::hold::HoldChange::Put(hold) = &written[0] else {
            panic!("{written:?}")
        };
        assert_eq!(hold.state, crate::hold::HoldState::Retrying { due_in: pause });
    }

    #[test]
    fn the_last_attempt_gives_up_and_no_earlier_one_does() {
        let mut stand = Stand::new(RelayConfig {
            max_attempts: 2,
            ..parking()
        });
        stand.rows = vec![record_of(1)];
        stand.outcome = Some(Outcome::Retry("later".into()));
        stand.pass(SECOND * 60);
        let told: Vec<(bool, u32)> = stand
            .notes()
            .into_iter()
            .filter_map(|note| match note {
                Note::Retrying { attempts, .. } => Some((false, attempts)),
                Note::Parked { attempts, .. } => Some((true, attempts)),
                _ => None,
            })
            .collect();
        assert_eq!(told, [(false, 1), (true, 2)]);
    }

    #[test]
    fn a_topic_that_closes_drops_what_waits_behind_another_of_its_key_and_lets_the_rest_go_on() {
        // One by one: the sink would deliver what follows a failed one.
        let setup = Setup {
            stops_key_at_failure: false,
            ..Setup::of_one_shard(parking())
        };
        let mut stand = Stand::of(setup);
        stand.outcome = None;
        stand.reads.push_back(vec![
            keyed("t", "k", 1),
            keyed("t", "k", 2),
            keyed("u", "k", 3),
            keyed("u", "k", 4),
        ]);
        let sent = stand.sent(Vec::new().into_iter().collect());
        assert_eq!(stand.machine.flights.len(), 4);
        stand.machine.close_topic(&Arc::from("t"));
        assert_eq!(
            stand.machine.flights.len(),
            3,
            "the second of the first key had not left"
        );
        stand.outcomes(sent, vec![Outcome::Delivered; 2]);
        assert_eq!(
            published(&stand.run()),
            [4],
            "the other topic's key goes on, and that one does not"
        );
    }
}
