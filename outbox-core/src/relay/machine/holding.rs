//! What waits: keys and keyless messages for a retry or an operator, topics for a probe.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::fetching::Asked;
use super::{Command, Machine, Note};
use crate::error::Result;
use crate::fetch::{Held, RecordRef, Reread, RereadScope};
use crate::hold::{Hold, HoldChange, HoldRef, HoldScope, HoldState};
use crate::message::OrderKey;
use crate::shard::{OwnedShard, Position, Shard};
use crate::sink::Reason;

#[derive(Debug, Default)]
pub(super) struct Holds {
    /// What a reader must leave out: always the waiting and parked entries and the held topics below.
    held: Arc<Held>,
    entries: BTreeMap<(Shard, Scope), Entry>,
    /// The waiting entries by due time.
    queue: BTreeSet<(Duration, Shard, Scope)>,
    topics: BTreeMap<Arc<str>, TopicEntry>,
    /// In serial mode: keys of which more came than may wait, from the lowest that was dropped. Held as well.
    overflows: BTreeMap<(Shard, OrderKey), Position>,
    /// The load that is under way.
    loading: Option<Loading>,
    load_next: Duration,
    load_failures: u32,
    /// Counts loads and settlements, to know which came first.
    moment: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Scope {
    Key(OrderKey),
    Message(Position),
}

#[derive(Debug)]
struct Entry {
    head: RecordRef,
    /// Its topic; not known of a keyless message whose note comes from the store.
    topic: Option<Arc<str>>,
    /// The lowest record of the key that was dropped.
    from: Position,
    attempts: u32,
    state: State,
    /// Whether the store has, or is about to have, a note of it.
    written: bool,
    /// Since which moment the store is known to have it.
    durable: Option<u64>,
    /// Whether its head is done with, so that nothing remains of it once it is released.
    over: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting {
        due: Duration,
    },
    Parked,
    /// Released in this fetch; its head is wanted, or in flight.
    Trying {
        fetch: u64,
    },
}

#[derive(Debug)]
struct TopicEntry {
    attempts: u32,
    state: TopicState,
    /// The notes of it that the store has.
    written: BTreeMap<Shard, RecordRef>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TopicState {
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

#[derive(Debug)]
struct Loading {
    shards: Vec<OwnedShard>,
    moment: u64,
}

/// How something is to wait.
#[derive(Debug)]
pub(super) struct Wait {
    pub(super) topic: Arc<str>,
    pub(super) attempts: u32,
    /// Until when; none is until an operator says so.
    pub(super) due: Option<Duration>,
    /// Why, for the durable note; none is no note.
    pub(super) reason: Option<Reason>,
}

/// How soon the relay notices that an operator resumed something.
const RELOAD_EVERY: Duration = Duration::from_secs(2);

impl Scope {
    fn of(scope: &HoldScope, head: RecordRef) -> Option<Self> {
        match scope {
            HoldScope::Key(key) => Some(Self::Key(key.clone())),
            HoldScope::Message => Some(Self::Message(head.position)),
            HoldScope::Topic(_) => None,
        }
    }

    fn for_store(&self) -> HoldScope {
        match self {
            Self::Key(key) => HoldScope::Key(key.clone()),
            Self::Message(_) => HoldScope::Message,
        }
    }
}

impl Holds {
    pub(super) fn held(&self) -> Arc<Held> {
        self.held.clone()
    }

    /// When the next hold or topic is due.
    pub(super) fn due(&self) -> Option<Duration> {
        let topics = self.topics.values().filter_map(|topic| match topic.state {
            TopicState::Waiting { due } => Some(due),
            TopicState::Crowded { .. } | TopicState::Probing { .. } => None,
        });
        self.queue
            .first()
            .map(|(due, ..)| *due)
            .into_iter()
            .chain(topics)
            .min()
    }

    /// Whether anything waits for time to pass or for an answer, and not for an operator.
    pub(super) fn any_waiting(&self) -> bool {
        !self.overflows.is_empty()
            || self.entries.values().any(|entry| entry.state != State::Parked)
            || self
                .topics
                .values()
                .any(|topic| matches!(topic.state, TopicState::Probing { .. }))
    }

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

    /// Whether a record must be dropped because its key, or it itself, waits. The hold remembers to ask again.
    pub(super) fn keep_out(&mut self, shard: Shard, position: Position, key: Option<&OrderKey>) -> bool {
        if !self.overflows.is_empty()
            && let Some(key) = key
            && let Some(from) = self.overflows.get_mut(&(shard, key.clone()))
        {
            *from = position.min(*from);
            return true;
        }
        if self.entries.is_empty() {
            return false;
        }
        let scope = key.map_or(Scope::Message(position), |key| Scope::Key(key.clone()));
        match self.entries.get_mut(&(shard, scope)) {
            Some(entry) if !matches!(entry.state, State::Trying { .. }) => {
                entry.from = entry.from.min(position);
                true
            }
            _ => false,
        }
    }

    /// How often a record failed before.
    pub(super) fn attempts(&self, shard: Shard, position: Position, key: Option<&OrderKey>) -> u32 {
        if self.entries.is_empty() {
            return 0;
        }
        let scope = key.map_or(Scope::Message(position), |key| Scope::Key(key.clone()));
        self.entries
            .get(&(shard, scope))
            .filter(|entry| entry.head.position == position)
            .map_or(0, |entry| entry.attempts)
    }

    /// The head of a key that was released and has met no fate yet, and how often it failed before.
    pub(super) fn tried(&self, shard: Shard, key: Option<&OrderKey>) -> Option<(RecordRef, u32)> {
        let entry = self.entries.get(&(shard, Scope::Key(key?.clone())))?;
        Some((entry.head, entry.attempts))
    }

    /// In serial mode: more of a key came than may wait here.
    pub(super) fn overflow(&mut self, shard: Shard, key: &OrderKey, position: Position) {
        Arc::make_mut(&mut self.held).keys.insert((shard, key.clone()));
        self.overflows.insert((shard, key.clone()), position);
    }

    /// Whether more of this key came than could wait.
    pub(super) fn overflowed(&self, key: &(Shard, OrderKey)) -> bool {
        !self.overflows.is_empty() && self.overflows.contains_key(key)
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

    /// Forgets all of a shard.
    pub(super) fn forget(&mut self, shard: Shard) {
        let scopes: Vec<(Shard, Scope)> = self
            .entries
            .keys()
            .filter(|(own, _)| *own == shard)
            .cloned()
            .collect();
        for (shard, scope) in scopes {
            self.remove(shard, &scope);
        }
        let held = Arc::make_mut(&mut self.held);
        self.overflows.retain(|place, _| {
            let stays = place.0 != shard;
            if !stays {
                held.keys.remove(place);
            }
            stays
        });
        for topic in self.topics.values_mut() {
            topic.written.remove(&shard);
            // The probe is gone with its shard: whatever became of it, another record must tell.
            if let TopicState::Probing {
                probe: Some((own, _)),
                ..
            } = topic.state
                && own == shard
            {
                topic.state = TopicState::Waiting { due: Duration::ZERO };
            }
        }
    }

    /// Lets something wait, in place of what waits there already.
    fn wait(&mut self, shard: Shard, scope: Scope, head: RecordRef, attempts: u32, state: State) {
        let before = self.remove(shard, &scope);
        let held = Arc::make_mut(&mut self.held);
        match &scope {
            Scope::Key(key) => held.keys.insert((shard, key.clone())),
            Scope::Message(position) => held.messages.insert((shard, *position)),
        };
        if let State::Waiting { due } = state {
            self.queue.insert((due, shard, scope.clone()));
        }
        let topic = match &scope {
            Scope::Key(key) => Some(key.topic.clone()),
            Scope::Message(_) => before.as_ref().and_then(|entry| entry.topic.clone()),
        };
        let from = before
            .as_ref()
            .map_or(head.position, |entry| entry.from.min(head.position));
        let written = before.as_ref().is_some_and(|entry| entry.written);
        let durable = before
            .filter(|entry| entry.head == head)
            .and_then(|entry| entry.durable);
        self.entries.insert(
            (shard, scope),
            Entry {
                head,
                topic,
                from,
                attempts,
                state,
                written,
                durable,
                over: false,
            },
        );
    }

    fn remove(&mut self, shard: Shard, scope: &Scope) -> Option<Entry> {
        let entry = self.entries.remove(&(shard, scope.clone()))?;
        self.unhold(shard, scope, entry.state);
        Some(entry)
    }

    fn unhold(&mut self, shard: Shard, scope: &Scope, state: State) {
        if matches!(state, State::Trying { .. }) {
            return;
        }
        if let State::Waiting { due } = state {
            self.queue.remove(&(due, shard, scope.clone()));
        }
        let held = Arc::make_mut(&mut self.held);
        match scope {
            Scope::Key(key) => held.keys.remove(&(shard, key.clone())),
            Scope::Message(position) => held.messages.remove(&(shard, *position)),
        };
    }

    #[cfg(test)]
    pub(super) fn has_overflows(&self) -> bool {
        !self.overflows.is_empty()
    }

    /// Notes which holds a committed settlement has made durable.
    pub(super) fn committed<'a>(&mut self, puts: impl Iterator<Item = &'a Hold>) {
        self.moment += 1;
        for hold in puts {
            if let Some(scope) = Scope::of(&hold.scope, hold.head)
                && let Some(entry) = self.entries.get_mut(&(hold.shard, scope))
                && entry.head == hold.head
            {
                entry.durable = Some(self.moment);
            }
        }
    }
}

impl Machine {
    /// Lets the key of a failed record, or the keyless record itself, wait.
    pub(super) fn hold_record(
        &mut self,
        shard: Shard,
        record: RecordRef,
        key: Option<OrderKey>,
        wait: Wait,
        now: Duration,
    ) {
        let Wait {
            topic,
            attempts,
            due,
            reason,
        } = wait;
        if let Some(key) = &key {
            self.drop_key(shard, key);
        }
        let scope = key.map_or(Scope::Message(record.position), Scope::Key);
        let state = due.map_or(State::Parked, |due| State::Waiting { due });
        self.holds.wait(shard, scope.clone(), record, attempts, state);
        if let Some(entry) = self.holds.entries.get_mut(&(shard, scope.clone())) {
            entry.topic = Some(topic);
            if reason.is_some() {
                entry.written = true;
                entry.durable = None;
            }
        }
        if let Some(reason) = reason {
            let state = match due {
                Some(due) => HoldState::Retrying {
                    due_in: due.saturating_sub(now),
                },
                None => HoldState::Parked,
            };
            self.settle_hold(HoldChange::Put(Hold {
                shard,
                scope: scope.for_store(),
                head: record,
                attempts,
                state,
                reason: reason.as_str().to_owned(),
            }));
        }
        self.relieve_crowd(now);
    }

    /// Lets a key wait until its head is known to be buried: only then may what follows it be delivered.
    pub(super) fn hold_for_burial(&mut self, shard: Shard, record: RecordRef, key: OrderKey, now: Duration) {
        self.drop_key(shard, &key);
        let scope = Scope::Key(key);
        self.holds
            .wait(shard, scope.clone(), record, 0, State::Waiting { due: now });
        if let Some(entry) = self.holds.entries.get_mut(&(shard, scope)) {
            entry.over = true;
        }
    }

    /// Drops everything of a key that has not left for the sink. Its hold asks for it again.
    fn drop_key(&mut self, shard: Shard, key: &OrderKey) {
        if self.unresolved(shard, key) == 0 {
            return;
        }
        let waiting = self
            .keys
            .get_mut(&(shard, key.clone()))
            .map(|state| std::mem::take(&mut state.waiting));
        for record in waiting.into_iter().flatten() {
            self.drop_flight(shard, record.position);
        }
        let mut dropped = Vec::new();
        self.publishing.ready.retain(|record| {
            let stays = record.shard != shard || record.message.order_key().as_ref() != Some(key);
            if !stays {
                dropped.push(record.position);
            }
            stays
        });
        for position in dropped {
            self.drop_flight(shard, position);
        }
    }

    /// The head of a key, or a keyless message, is done with: its hold is over.
    pub(super) fn end_hold(&mut self, shard: Shard, record: RecordRef, key: Option<&OrderKey>) {
        if self.holds.entries.is_empty() {
            return;
        }
        let scope = key.map_or(Scope::Message(record.position), |key| Scope::Key(key.clone()));
        let place = (shard, scope);
        let Some(entry) = self
            .holds
            .entries
            .get_mut(&place)
            .filter(|entry| entry.head == record)
        else {
            return;
        };
        let written = std::mem::take(&mut entry.written);
        if matches!(entry.state, State::Trying { .. }) {
            self.holds.entries.remove(&place);
        } else {
            // What followed it was dropped, and is still to be read again.
            entry.over = true;
            entry.attempts = 0;
        }
        if written {
            self.settle_hold(HoldChange::Clear(HoldRef {
                shard,
                scope: place.1.for_store(),
                head: record,
            }));
        }
    }

    /// Releases what is due, where a fetch is being built, and says what the reader must look at again.
    pub(super) fn release_due_holds(&mut self, now: Duration) -> Vec<Reread> {
        let mut reread = Vec::new();
        let fetch = self.fetching.count;
        let later = self.look_again(now);
        let due: Vec<(Duration, Shard, Scope)> = self
            .holds
            .queue
            .iter()
            .take_while(|(due, ..)| *due <= now)
            .cloned()
            .collect();
        for (due, shard, scope) in due {
            let unresolved = match &scope {
                Scope::Key(key) => self.unresolved(shard, key),
                Scope::Message(_) => 0,
            };
            let Some(entry) = self.holds.entries.get_mut(&(shard, scope.clone())) else {
                continue;
            };
            if unresolved > 0 || self.flights.contains_key(&(shard, entry.head.position)) {
                // The sink still has some of it, or the hold is not written yet and its head would not be read.
                entry.state = State::Waiting { due: later };
                self.holds.queue.remove(&(due, shard, scope.clone()));
                self.holds.queue.insert((later, shard, scope));
                continue;
            }
            let from = entry.from;
            if entry.over {
                self.holds.remove(shard, &scope);
            } else {
                let state = std::mem::replace(&mut entry.state, State::Trying { fetch });
                self.holds.unhold(shard, &scope, state);
            }
            let scope = match scope {
                Scope::Key(key) => RereadScope::Key(key),
                Scope::Message(_) => RereadScope::Message,
            };
            reread.push(Reread { shard, scope, from });
        }
        self.release_overflows(&mut reread);
        self.release_due_topics(now, fetch);
        reread
    }

    fn release_overflows(&mut self, reread: &mut Vec<Reread>) {
        let drained: Vec<(Shard, OrderKey)> = self
            .holds
            .overflows
            .keys()
            .filter(|(shard, key)| self.unresolved(*shard, key) == 0)
            .cloned()
            .collect();
        for (shard, key) in drained {
            let Some(from) = self.holds.overflows.remove(&(shard, key.clone())) else {
                continue;
            };
            // What waits on its own account goes on waiting, and rereads from there.
            if self.holds.keep_out(shard, from, Some(&key)) {
                continue;
            }
            Arc::make_mut(&mut self.holds.held)
                .keys
                .remove(&(shard, key.clone()));
            reread.push(Reread {
                shard,
                scope: RereadScope::Key(key),
                from,
            });
        }
    }

    fn release_due_topics(&mut self, now: Duration, fetch: u64) {
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
                .any(|flight| flight.topic == topic && flight.stage != super::Stage::Resolved);
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
    fn close_topic(&mut self, topic: &Arc<str>) {
        Arc::make_mut(&mut self.holds.held).topics.insert(topic.clone());
        let ready: Vec<(Shard, Position)> = self
            .flights
            .iter()
            .filter(|(_, flight)| flight.topic == *topic && flight.stage == super::Stage::Ready)
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

    fn free_topic(&mut self, topic: &Arc<str>) {
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

    /// Nothing is left to read: whatever was released, was asked for and did not come is gone, taken out by hand.
    pub(super) fn drop_vanished_holds(&mut self, asked: &Asked) {
        let answered = self.fetching.count;
        let vanished: Vec<(Shard, Scope, RecordRef)> = self
            .holds
            .entries
            .iter()
            .filter(|((shard, _), entry)| {
                matches!(entry.state, State::Trying { fetch } if fetch <= answered)
                    && asked.shards.iter().any(|owned| owned.shard == *shard)
                    && match &entry.topic {
                        Some(topic) => !asked.held.topics.contains(topic),
                        // It may be one of those that are held.
                        None => asked.held.topics.is_empty(),
                    }
                    && !self.flights.contains_key(&(*shard, entry.head.position))
            })
            .map(|((shard, scope), entry)| (*shard, scope.clone(), entry.head))
            .collect();
        for (shard, scope, head) in vanished {
            let key = match &scope {
                Scope::Key(key) => Some(key),
                Scope::Message(_) => None,
            };
            self.end_hold(shard, head, key);
        }
        let silent: Vec<Arc<str>> = self
            .holds
            .topics
            .iter()
            .filter(|(_, entry)| matches!(entry.state, TopicState::Probing { fetch, probe: None } if fetch <= answered))
            .map(|(topic, _)| topic.clone())
            .collect();
        for topic in silent {
            self.free_topic(&topic);
        }
    }

    /// Too many wait: their topic is in trouble as a whole. It is held, and its notes, which the store has, are
    /// dropped here, so that memory stays bounded.
    fn relieve_crowd(&mut self, now: Duration) {
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
            .filter(|(_, entry)| {
                entry.topic.as_ref().is_some_and(is_crowded)
                    && !entry.over
                    && (entry.durable.is_some() || !entry.written)
            })
            .map(|(place, _)| place.clone())
            .collect();
        for (shard, scope) in shed {
            self.holds.remove(shard, &scope);
        }
    }

    /// The crowded topics that are due, given all notes of all our shards. One of which more is parked than may wait
    /// here stays held until an operator has seen to it; the others are probed.
    fn uncrowded(&mut self, loading: &Loading, loaded: &[Hold], now: Duration) -> BTreeSet<Arc<str>> {
        let complete = self
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
        });
        Some(Command::LoadHolds { shards })
    }

    fn is_loaded(&self, shard: Shard) -> bool {
        self.leasing.owned.get(&shard).is_none_or(|owned| owned.loaded)
    }

    fn wants_reload(&self) -> bool {
        !self.holds.entries.is_empty() || !self.holds.topics.is_empty()
    }

    /// Asks for the holds of new shards at once.
    pub(super) fn load_soon(&mut self) {
        self.holds.load_next = Duration::ZERO;
    }

    pub(super) fn holds_due(&self) -> Option<Duration> {
        let waits = self.holds.loading.is_none()
            && !self.stopping
            && (self.wants_reload() || self.leasing.owned.values().any(|owned| !owned.loaded));
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
        self.holds.load_next = now + RELOAD_EVERY;
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
