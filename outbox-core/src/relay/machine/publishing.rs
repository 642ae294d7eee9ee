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
