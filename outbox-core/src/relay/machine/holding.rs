//! What waits: keys and keyless messages, for a retry or an operator.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::fetching::Asked;
use super::reloading::Loading;
use super::topics::{TopicEntry, TopicState};
use super::{Machine, Stage};
use crate::fetch::{Held, RecordRef, Reread, RereadScope};
use crate::hold::{Hold, HoldChange, HoldRef, HoldScope, HoldState};
use crate::message::OrderKey;
use crate::shard::{Position, Shard};
use crate::sink::Reason;

#[derive(Debug, Default)]
pub(super) struct Holds {
    /// What a reader must leave out: always the waiting and parked entries and the held topics below.
    pub(super) held: Arc<Held>,
    pub(super) entries: BTreeMap<(Shard, Scope), Entry>,
    /// The waiting entries by due time.
    pub(super) queue: BTreeSet<(Duration, Shard, Scope)>,
    pub(super) topics: BTreeMap<Arc<str>, TopicEntry>,
    /// In serial mode: keys of which more came than may wait, from the lowest that was dropped. Held as well.
    pub(super) overflows: BTreeMap<(Shard, OrderKey), Position>,
    /// The load that is under way.
    pub(super) loading: Option<Loading>,
    pub(super) load_next: Duration,
    pub(super) load_failures: u32,
    /// Counts loads and settlements, to know which came first.
    pub(super) moment: u64,
    /// The moment at which notes were last dropped here because the store has them.
    pub(super) shed_at: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    Key(OrderKey),
    Message(Position),
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) head: RecordRef,
    /// Its topic; not known of a keyless message whose note comes from the store.
    pub(super) topic: Option<Arc<str>>,
    /// The lowest record of the key that was dropped.
    pub(super) from: Position,
    pub(super) attempts: u32,
    pub(super) state: State,
    /// Whether the store has, or is about to have, a note of it.
    pub(super) written: bool,
    /// Since which moment the store is known to have it.
    pub(super) durable: Option<u64>,
    /// Whether its head is done with, so that nothing remains of it once it is released.
    pub(super) over: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Waiting {
        due: Duration,
    },
    Parked,
    /// Released in this fetch; its head is wanted, or in flight.
    Trying {
        fetch: u64,
    },
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

impl Scope {
    pub(super) fn of(scope: &HoldScope, head: RecordRef) -> Option<Self> {
        match scope {
            HoldScope::Key(key) => Some(Self::Key(key.clone())),
            HoldScope::Message => Some(Self::Message(head.position)),
            HoldScope::Topic(_) => None,
        }
    }

    pub(super) fn for_store(&self) -> HoldScope {
        match self {
            Self::Key(key) => HoldScope::Key(key.clone()),
            Self::Message(_) => HoldScope::Message,
        }
    }
}

impl Entry {
    /// Whether a reader that is told to leave this out may leave its head out, for its topic's sake.
    fn is_left_out(&self, held: &Held) -> bool {
        match &self.topic {
            Some(topic) => held.topics.contains(topic),
            // It may be one of those that are held.
            None => !held.topics.is_empty(),
        }
    }
}

impl Holds {
    pub(super) fn held(&self) -> Arc<Held> {
        self.held.clone()
    }

    /// Whether what this note of the store's is about waits here, too.
    pub(super) fn knows(&self, hold: &Hold) -> bool {
        Scope::of(&hold.scope, hold.head).is_some_and(|scope| self.entries.contains_key(&(hold.shard, scope)))
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

    /// Whether anything waits for time to pass or for an answer, and not for an operator or for its topic.
    pub(super) fn any_waiting(&self) -> bool {
        !self.overflows.is_empty()
            || self.entries.values().any(|entry| match entry.state {
                State::Waiting { .. } => true,
                State::Parked => false,
                State::Trying { .. } => !entry.is_left_out(&self.held),
            })
            || self
                .topics
                .values()
                .any(|topic| matches!(topic.state, TopicState::Probing { .. }))
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
    pub(super) fn wait(&mut self, shard: Shard, scope: Scope, head: RecordRef, attempts: u32, state: State) {
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

    pub(super) fn remove(&mut self, shard: Shard, scope: &Scope) -> Option<Entry> {
        let entry = self.entries.remove(&(shard, scope.clone()))?;
        self.unhold(shard, scope, entry.state);
        Some(entry)
    }

    pub(super) fn unhold(&mut self, shard: Shard, scope: &Scope, state: State) {
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
        let mut flights = self
            .flights
            .range((shard, Position::MIN)..=(shard, Position::MAX));
        if !flights.any(|(_, flight)| flight.stage == Stage::Ready && flight.key.as_ref() == Some(key)) {
            return;
        }
        let waiting = self
            .queues
            .get_mut(&(shard, key.clone()))
            .map(|queue| std::mem::take(&mut queue.waiting));
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
        let shards: BTreeSet<Shard> = due.iter().map(|(_, shard, _)| *shard).collect();
        let unresolved: HashSet<(Shard, OrderKey)> = shards
            .into_iter()
            .flat_map(|shard| self.unresolved(shard).map(move |key| (shard, key.clone())))
            .collect();
        for (due, shard, scope) in due {
            let unresolved = match &scope {
                Scope::Key(key) => unresolved.contains(&(shard, key.clone())),
                Scope::Message(_) => false,
            };
            let is_read = self.leasing.reads(shard);
            let Some(entry) = self.holds.entries.get_mut(&(shard, scope.clone())) else {
                continue;
            };
            if unresolved || !is_read || self.flights.contains_key(&(shard, entry.head.position)) {
                // The sink still has some of it, or its shard is to be given up and is not read, or the hold is not
                // written yet and its head would not be read.
                entry.state = State::Waiting { due: later };
                self.holds.queue.remove(&(due, shard, scope.clone()));
                self.holds.queue.insert((later, shard, scope));
                continue;
            }
            let (from, head, written) = (entry.from, entry.head, entry.written);
            if entry.over {
                self.holds.remove(shard, &scope);
                if written {
                    // The note of a head before this one, whose outcome came later than this one's.
                    self.settle_hold(HoldChange::Clear(HoldRef {
                        shard,
                        scope: scope.for_store(),
                        head,
                    }));
                }
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
            .filter(|place| self.leasing.reads(place.0) && !self.queues.contains_key(place))
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

    /// Nothing is left to read: whatever was released, was asked for and did not come is gone, taken out by hand.
    pub(super) fn drop_vanished_holds(&mut self, asked: &Asked) {
        let answered = self.fetching.count;
        let vanished: Vec<(Shard, Scope, RecordRef)> = self
            .holds
            .entries
            .iter()
            .filter(|((shard, scope), entry)| {
                matches!(entry.state, State::Trying { fetch } if fetch <= answered)
                    && asked.shards.iter().any(|owned| owned.shard == *shard)
                    // Its topic was held, or has been since, and took the head out of flight.
                    && ![&asked.held, &self.holds.held].iter().any(|held| entry.is_left_out(held))
                    // It came too soon behind others of its key, and is read again when there is room.
                    && !matches!(scope, Scope::Key(key) if self.holds.overflowed(&(*shard, key.clone())))
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::{FetchRequest, Fetched, Record};
    use crate::lease::Leases;
    use crate::relay::config::RelayConfig;
    use crate::relay::machine::stand::{
        SECOND, Stand, hold_of, keyed, keyless, ms, owned, parking, published, record_of,
    };
    use crate::relay::machine::{Command, Event, Setup};
    use crate::settle::Settled;
    use crate::shard::{Epoch, OwnedShard};
    use crate::sink::Outcome;

    /// Of a key whose head has failed before, the second message dies before it is heard that the head was delivered.
    #[test]
    fn the_note_of_a_head_goes_when_what_follows_it_dies_first() {
        let mut machine = Machine::new(Setup::of_one_shard(RelayConfig::default()));
        let rows = [record_of(1), record_of(2)];
        let hold = Hold {
            shard: Shard(0),
            scope: HoldScope::Key(rows[0].message.order_key().unwrap()),
            head: rows[0].reference(),
            attempts: 1,
            state: HoldState::Retrying {
                due_in: Duration::ZERO,
            },
            reason: "later".to_owned(),
        };
        let mut unread = rows.into_iter();
        let (mut batches, mut changes) = (Vec::new(), Vec::new());
        for turn in 0..100 {
            let now = Duration::from_millis(turn * 10);
            while let Some(command) = machine.poll(now) {
                let answer = match command {
                    Command::Lease { .. } => Event::Leased {
                        sent: now,
                        result: Ok(Leases {
                            held: vec![OwnedShard {
                                shard: Shard(0),
                                epoch: Epoch(1),
                            }],
                            relays: 1,
                            time_left: Duration::from_secs(10),
                        }),
                    },
                    Command::LoadHolds { .. } => Event::HoldsLoaded {
                        result: Ok(vec![hold.clone()]),
                    },
                    Command::Fetch { .. } => Event::Fetched {
                        result: Ok(Fetched::Batch {
                            records: unread.next().into_iter().collect(),
                            more: false,
                        }),
                    },
                    Command::Publish { batch, .. } => {
                        batches.push(batch);
                        Event::Accepted { batch }
                    }
                    Command::Settle { settlement } => {
                        changes.extend(settlement.shards.iter().flat_map(|part| part.holds.clone()));
                        Event::Settled {
                            result: Ok(Settled::default()),
                        }
                    }
                    _ => continue,
                };
                machine.handle(answer, now);
            }
            if let [first, second] = batches[..] {
                for (batch, outcome) in [
                    (second, Outcome::Poison("no".into())),
                    (first, Outcome::Delivered),
                ] {
                    let outcomes = Some(vec![outcome]);
                    machine.handle(Event::Outcomes { batch, outcomes }, now);
                }
                batches.clear();
            }
        }
        assert!(
            matches!(&changes[..], [HoldChange::Clear(cleared)] if cleared.scope == hold.scope),
            "{changes:?}"
        );
    }

    fn retrying(record: &Record, due_in: Duration) -> Hold {
        hold_of(record, HoldState::Retrying { due_in })
    }

    /// A machine that took these notes over, and its first read, which is out.
    fn tries(setup: Setup, holds: Vec<Hold>) -> (Stand, Arc<FetchRequest>) {
        let mut stand = Stand::apart(setup);
        stand.holds = holds;
        let asked = request(&mut stand);
        (stand, asked)
    }

    fn one_shard() -> Setup {
        Setup::of_one_shard(RelayConfig::default())
    }

    fn request(stand: &mut Stand) -> Arc<FetchRequest> {
        stand.until(|command| match command {
            Command::Fetch { request } => Some(request.clone()),
            _ => None,
        })
    }

    /// The changes of holds in the next settlement.
    fn changes(stand: &mut Stand) -> Vec<HoldChange> {
        stand.until(|command| match command {
            Command::Settle { settlement } => Some(settlement.shards[0].holds.clone()),
            _ => None,
        })
    }

    #[test]
    fn the_next_of_what_waits_is_the_first_key_or_topic_and_nothing_that_is_parked_or_crowded() {
        let mut holds = Holds::default();
        assert_eq!(holds.due(), None);
        let topic = |state| TopicEntry {
            attempts: 1,
            state,
            written: BTreeMap::new(),
        };
        holds
            .topics
            .insert("c".into(), topic(TopicState::Crowded { due: SECOND }));
        let (parked, waits) = (keyed("t", "p", 1), keyed("t", "w", 2));
        let scope = |record: &Record| Scope::Key(record.message.order_key().unwrap());
        holds.wait(Shard(0), scope(&parked), parked.reference(), 1, State::Parked);
        assert_eq!(holds.due(), None);
        assert!(!holds.any_waiting(), "an operator is to see to that");
        let due = SECOND * 9;
        holds.wait(
            Shard(0),
            scope(&waits),
            waits.reference(),
            1,
            State::Waiting { due },
        );
        assert_eq!(holds.due(), Some(due));
        assert!(holds.any_waiting());
        holds
            .topics
            .insert("t".into(), topic(TopicState::Waiting { due: SECOND * 5 }));
        assert_eq!(holds.due(), Some(SECOND * 5));
        holds.remove(Shard(0), &scope(&waits));
        assert!(
            !holds.any_waiting(),
            "a blocked topic is left to those who see to it"
        );
        let probing = TopicState::Probing {
            fetch: 1,
            probe: None,
        };
        holds.topics.insert("t".into(), topic(probing));
        assert_eq!(holds.due(), None);
        assert!(holds.any_waiting());
    }

    #[test]
    fn what_is_tried_waits_for_its_head_unless_that_is_left_out_for_its_topic() {
        let mut holds = Holds::default();
        let tried = keyed("t", "k", 1);
        let scope = Scope::Key(tried.message.order_key().unwrap());
        let trying = State::Trying { fetch: 1 };
        holds.wait(Shard(0), scope, tried.reference(), 1, trying);
        assert!(holds.any_waiting());
        let blocked = TopicEntry {
            attempts: 1,
            state: TopicState::Waiting { due: SECOND },
            written: BTreeMap::new(),
        };
        holds.topics.insert("t".into(), blocked);
        Arc::make_mut(&mut holds.held).topics.insert("t".into());
        assert!(!holds.any_waiting());
    }

    #[test]
    fn nothing_is_released_of_a_shard_that_is_not_read() {
        let (kept, given_up) = (keyed("t", "k", 1), keyed("t", "l", 2));
        let setup = Setup {
            shards: 2,
            ..one_shard()
        };
        let mut stand = Stand::of(setup);
        let scope = |record: &Record| Scope::Key(record.message.order_key().unwrap());
        let waiting = State::Waiting { due: Duration::ZERO };
        let machine = &mut stand.machine;
        machine
            .holds
            .wait(Shard(0), scope(&kept), kept.reference(), 1, waiting);
        machine
            .holds
            .wait(Shard(1), scope(&given_up), given_up.reference(), 1, waiting);
        machine.leasing.owned.get_mut(&Shard(1)).unwrap().loaded = false;
        let released = machine.release_due_holds(stand.now);
        assert_eq!(
            released.iter().map(|reread| reread.shard).collect::<Vec<_>>(),
            [Shard(0)]
        );
        let entry = &machine.holds.entries[&(Shard(1), scope(&given_up))];
        assert!(matches!(entry.state, State::Waiting { due } if due > stand.now));
    }

    #[test]
    fn what_was_released_and_asked_for_and_is_not_there_is_over_and_its_note_is_cleared() {
        for gone in [keyed("t", "k", 1), keyless("t", 1)] {
            let (mut stand, _) = tries(one_shard(), vec![retrying(&gone, Duration::ZERO)]);
            assert_eq!(stand.machine.holds.entries.len(), 1);
            stand.fetched(vec![keyless("t", 9)]);
            assert_eq!(stand.machine.holds.entries.len(), 1, "there may be more");
            stand.outcome = None;
            request(&mut stand);
            stand.fetched(Vec::new());
            assert!(stand.machine.holds.entries.is_empty());
            let clear = HoldChange::Clear(retrying(&gone, SECOND).reference());
            assert_eq!(changes(&mut stand), [clear]);
        }
    }

    #[test]
    fn what_waits_or_is_in_flight_or_was_not_asked_for_is_not_over() {
        let setup = Setup {
            shards: 2,
            ..one_shard()
        };
        let (tried, waits, parked) = (keyed("t", "k", 1), keyed("t", "l", 2), keyless("t", 3));
        let (mut stand, _) = tries(
            setup,
            vec![
                retrying(&tried, Duration::ZERO),
                retrying(&waits, SECOND * 60),
                hold_of(&parked, HoldState::Parked),
            ],
        );
        stand.outcome = None;
        stand.fetched(vec![tried]);
        stand.pass(SECOND);
        assert_eq!(stand.machine.holds.entries.len(), 3);

        let (mut stand, _) = tries(one_shard(), vec![retrying(&waits, Duration::ZERO)]);
        let asked = Asked::of(Vec::new(), stand.machine.holds.held());
        stand.machine.drop_vanished_holds(&asked);
        assert_eq!(
            stand.machine.holds.entries.len(),
            1,
            "of its shard nothing was asked for"
        );
        let asked = Asked::of(vec![owned(0, 1)], stand.machine.holds.held());
        stand.machine.drop_vanished_holds(&asked);
        assert!(stand.machine.holds.entries.is_empty());
    }

    #[test]
    fn what_does_not_come_because_its_topic_is_held_is_not_over() {
        let held = |topics: &[&str]| {
            let topics = topics.iter().map(|topic| Arc::from(*topic)).collect();
            Arc::new(Held {
                topics,
                ..Held::default()
            })
        };
        let key = keyed("t", "k", 1);
        // The topic of a keyless message is not known from its note.
        for (row, topic, over) in [
            (key.clone(), "t", false),
            (key, "u", true),
            (keyless("t", 1), "t", false),
            (keyless("t", 1), "u", false),
        ] {
            for before in [true, false] {
                let (mut stand, _) = tries(one_shard(), vec![retrying(&row, Duration::ZERO)]);
                let (then, now) = if before {
                    (&[topic][..], &[][..])
                } else {
                    (&[][..], &[topic][..])
                };
                stand.machine.holds.held = held(now);
                let asked = Asked::of(vec![owned(0, 1)], held(then));
                stand.machine.drop_vanished_holds(&asked);
                assert_eq!(
                    stand.machine.holds.entries.is_empty(),
                    over,
                    "{topic} held before: {before}"
                );
            }
        }
    }

    #[test]
    fn a_key_is_released_when_nothing_of_it_is_with_the_sink_and_read_from_the_lowest_that_was_dropped() {
        let (low, high) = (keyed("t", "k", 3), keyed("t", "k", 5));
        let mut stand = Stand::new(parking());
        let first = stand.sent(vec![high.clone()]);
        stand
            .reads
            .push_back(vec![keyed("t", "other", 4), keyless("t", 6)]);
        stand.outcome = None;
        stand.run();
        stand.machine.holds.wait(
            Shard(0),
            Scope::Key(high.message.order_key().unwrap()),
            high.reference(),
            1,
            State::Waiting { due: stand.now },
        );
        stand
            .machine
            .holds
            .keep_out(Shard(0), low.position, low.message.order_key().as_ref());
        stand.machine.fetching.wake();
        assert!(request(&mut stand).reread.is_empty());
        stand.fetched(Vec::new());
        assert!(stand.machine.holds.due() > Some(stand.now));
        stand.outcomes(first, vec![Outcome::Unknown("no answer".into())]);
        stand.run();
        let reread = request(&mut stand).reread.clone();
        let of_key: Vec<Position> = reread
            .iter()
            .filter(|reread| matches!(reread.scope, RereadScope::Key(_)))
            .map(|reread| reread.from)
            .collect();
        assert_eq!(of_key, [Position(3)]);
    }

    #[test]
    fn a_message_whose_note_is_not_written_yet_is_not_released() {
        let mut stand = Stand::new(RelayConfig {
            retry: crate::relay::Backoff {
                initial: ms(1),
                max: ms(1),
            },
            ..RelayConfig::default()
        });
        stand.settles = false;
        let row = keyless("t", 1);
        let batch = stand.sent(vec![row.clone()]);
        stand.outcomes(batch, vec![Outcome::Retry("later".into())]);
        stand.outcome = None;
        for command in stand.pass(SECOND) {
            if let Command::Fetch { request } = command {
                assert!(request.reread.is_empty() && !request.in_flight.is_empty());
            }
        }
        stand.settled();
        assert!(!stand.flies(&row), "now it is");
        let asked = request(&mut stand);
        assert_eq!(asked.reread.len(), 1);
        assert_eq!(asked.reread[0].scope, RereadScope::Message);
        assert!(asked.held.messages.is_empty());
    }

    #[test]
    fn a_failed_head_drops_what_of_its_key_and_shard_has_not_left_and_nothing_else() {
        let mut stand = Stand::of(Setup {
            shards: 2,
            ..one_shard()
        });
        stand.machine.setup.config.batch_rows = 1;
        let elsewhere = Record {
            shard: Shard(1),
            ..keyed("t", "k", 3)
        };
        let head = keyed("t", "k", 1);
        let rows = [
            keyed("t", "k", 2),
            elsewhere,
            keyed("t", "l", 4),
            keyed("u", "k", 5),
            keyless("t", 6),
        ];
        let batch = stand.sent([&[head][..], &rows[..]].concat());
        stand.outcomes(batch, vec![Outcome::Retry("later".into())]);
        stand.outcome = None;
        let flies: Vec<bool> = rows.iter().map(|row| stand.flies(row)).collect();
        assert_eq!(flies, [false, true, true, true, true]);
        assert_eq!(published(&stand.run()), [3, 4, 5, 6]);
    }

    #[test]
    fn a_note_of_another_head_makes_nothing_durable() {
        let mut holds = Holds::default();
        let (head, other) = (keyed("t", "k", 1), keyed("t", "k", 2));
        let scope = Scope::Key(head.message.order_key().unwrap());
        holds.wait(Shard(0), scope.clone(), head.reference(), 1, State::Parked);
        let durable = |holds: &Holds| holds.entries[&(Shard(0), scope.clone())].durable;
        holds.committed([hold_of(&other, HoldState::Parked)].iter());
        assert_eq!(durable(&holds), None);
        holds.committed([hold_of(&head, HoldState::Parked)].iter());
        assert_eq!(durable(&holds), Some(2), "each settlement is a moment of its own");
        holds.wait(Shard(0), scope.clone(), head.reference(), 2, State::Parked);
        assert_eq!(durable(&holds), Some(2), "the same head waits on");
        holds.wait(Shard(0), scope.clone(), other.reference(), 1, State::Parked);
        assert_eq!(durable(&holds), None);
    }

    #[test]
    fn a_shard_that_is_lost_takes_its_holds_along_and_no_others() {
        let mut holds = Holds::default();
        let row = keyed("t", "k", 1);
        let key = row.message.order_key().unwrap();
        for shard in [Shard(0), Shard(1)] {
            let state = State::Waiting { due: SECOND };
            holds.wait(shard, Scope::Key(key.clone()), row.reference(), 1, state);
            holds.overflow(
                shard,
                &keyed("t", "l", 2).message.order_key().unwrap(),
                Position(2),
            );
        }
        holds.forget(Shard(0));
        assert_eq!(
            (holds.entries.len(), holds.queue.len(), holds.overflows.len()),
            (1, 1, 1)
        );
        let shards: Vec<Shard> = holds.held.keys.iter().map(|(shard, _)| *shard).collect();
        assert_eq!(shards, [Shard(1); 2]);
    }

    #[test]
    fn attempts_are_those_of_the_head_alone() {
        let mut holds = Holds::default();
        let row = keyed("t", "k", 1);
        let key = row.message.order_key().unwrap();
        assert_eq!(holds.attempts(Shard(0), Position(1), Some(&key)), 0);
        holds.wait(
            Shard(0),
            Scope::Key(key.clone()),
            row.reference(),
            7,
            State::Parked,
        );
        assert_eq!(holds.attempts(Shard(0), Position(1), Some(&key)), 7);
        assert_eq!(holds.attempts(Shard(0), Position(2), Some(&key)), 0);
        assert_eq!(holds.tried(Shard(0), Some(&key)), Some((row.reference(), 7)));
        assert_eq!(holds.tried(Shard(0), None), None);
    }

    #[test]
    fn keys_of_which_too_many_came_are_kept_out_from_the_lowest_and_no_others() {
        let mut holds = Holds::default();
        let key = |key| keyed("t", key, 1).message.order_key().unwrap();
        assert!(!holds.keep_out(Shard(0), Position(1), Some(&key("k"))));
        holds.overflow(Shard(0), &key("k"), Position(40));
        assert!(holds.keep_out(Shard(0), Position(39), Some(&key("k"))));
        assert!(holds.keep_out(Shard(0), Position(41), Some(&key("k"))));
        assert_eq!(holds.overflows[&(Shard(0), key("k"))], Position(39));
        assert!(!holds.keep_out(Shard(0), Position(39), Some(&key("l"))));
        assert!(!holds.keep_out(Shard(0), Position(39), None));
        assert!(holds.overflowed(&(Shard(0), key("k"))) && !holds.overflowed(&(Shard(0), key("l"))));
    }
}
