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
            all += 1;
            if let Some(topic) = &entry.topic
                && !self.holds.topics.contains_key(topic)
            {
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
            reason: Reason::from("too many of its messages wait"),
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
                        // Of which topic it is is not known.
                        HoldScope::Message => true,
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
