//! The relay, as far as a reader can tell: what is in flight, what waits, what is asked for again.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::server::Row;
use crate::fetch::{FetchRequest, Held, Reread, RereadScope};
use crate::message::OrderKey;
use crate::shard::{Epoch, OwnedShard, Position, Shard};

#[derive(Debug)]
pub(super) struct Flight {
    pub(super) topic: usize,
    pub(super) key: Option<usize>,
    pub(super) stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The sink has it, or will.
    Open,
    /// It is to be settled: delivered, or only its hold to be noted.
    Resolved { delivered: bool },
    /// A settlement of it is out.
    Settling { delivered: bool, by: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    Key(usize),
    Message(i64),
}

#[derive(Debug)]
pub(super) struct Hold {
    pub(super) head: i64,
    from: i64,
    topic: usize,
    /// Whether it was let go: its head is wanted, or in flight.
    pub(super) trying: bool,
    /// Whether its head is done with.
    over: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Topic {
    Waiting,
    Probing(Option<(Shard, i64)>),
}

#[derive(Debug)]
pub(super) struct Owned {
    pub(super) epoch: Epoch,
    pub(super) active: bool,
    reread: Option<i64>,
}

#[derive(Debug, Default)]
pub(super) struct Relay {
    pub(super) owned: BTreeMap<Shard, Owned>,
    pub(super) flights: BTreeMap<(Shard, i64), Flight>,
    pub(super) holds: BTreeMap<(Shard, Scope), Hold>,
    /// Keys of which more came than may wait.
    pub(super) overflows: BTreeMap<(Shard, usize), i64>,
    pub(super) topics: BTreeMap<usize, Topic>,
    pub(super) held: Arc<Held>,
    /// Notes of holds in the store, by shard, for who owns it next.
    pub(super) stored: Vec<(Shard, Scope, i64, usize)>,
    pub(super) keys: Vec<OrderKey>,
    pub(super) topic_names: Vec<Arc<str>>,
}

impl Relay {
    /// Takes a shard, and what waits there.
    pub(super) fn gain(&mut self, shard: Shard, epoch: i64) {
        let owned = Owned {
            epoch: Epoch(epoch),
            active: true,
            reread: None,
        };
        self.owned.insert(shard, owned);
        for (_, scope, head, topic) in self
            .stored
            .extract_if(.., |stored| stored.0 == shard)
            .collect::<Vec<_>>()
        {
            self.hold(shard, scope, head, topic);
        }
    }

    /// Forgets all of a shard, and leaves notes.
    pub(super) fn lose(&mut self, shard: Shard) {
        self.owned.remove(&shard);
        self.flights.retain(|(own, _), _| *own != shard);
        let held = Arc::make_mut(&mut self.held);
        held.keys.retain(|(own, _)| *own != shard);
        held.messages.retain(|(own, _)| *own != shard);
        self.overflows.retain(|(own, _), _| *own != shard);
        for ((_, scope), hold) in self.holds.extract_if(.., |(own, _), _| *own == shard) {
            self.stored.push((shard, scope, hold.head, hold.topic));
        }
        for topic in self.topics.values_mut() {
            if matches!(topic, Topic::Probing(Some((own, _))) if *own == shard) {
                *topic = Topic::Waiting;
            }
        }
        self.close_waiting_topics();
    }

    fn close_waiting_topics(&mut self) {
        let held = Arc::make_mut(&mut self.held);
        for (topic, state) in &self.topics {
            if *state == Topic::Waiting {
                held.topics.insert(Arc::clone(&self.topic_names[*topic]));
            }
        }
    }

    pub(super) fn reread(&mut self, shard: Shard, position: i64) {
        if let Some(owned) = self.owned.get_mut(&shard) {
            owned.reread = Some(owned.reread.map_or(position, |from| from.min(position)));
        }
    }

    fn reread_all(&mut self) {
        for owned in self.owned.values_mut() {
            owned.reread = Some(i64::MIN);
        }
    }

    fn unresolved(&self, key: usize) -> bool {
        self.flights
            .values()
            .any(|flight| flight.key == Some(key) && flight.stage == Stage::Open)
    }

    /// Lets a key or a message wait, in place of what waits there already.
    pub(super) fn hold(&mut self, shard: Shard, scope: Scope, head: i64, topic: usize) {
        let from = self
            .holds
            .get(&(shard, scope))
            .map_or(head, |hold| hold.from.min(head));
        let hold = Hold {
            head,
            from,
            topic,
            trying: false,
            over: false,
        };
        self.holds.insert((shard, scope), hold);
        let held = Arc::make_mut(&mut self.held);
        match scope {
            Scope::Key(key) => held.keys.insert((shard, self.keys[key].clone())),
            Scope::Message(position) => held.messages.insert((shard, Position(position))),
        };
    }

    fn unhold(&mut self, shard: Shard, scope: Scope) {
        let held = Arc::make_mut(&mut self.held);
        match scope {
            Scope::Key(key) => held.keys.remove(&(shard, self.keys[key].clone())),
            Scope::Message(position) => held.messages.remove(&(shard, Position(position))),
        };
    }

    /// Lets the key of a failed record, or the keyless record itself, wait.
    pub(super) fn fail(&mut self, (shard, position): (Shard, i64)) {
        let Some(flight) = self.flights.get(&(shard, position)) else {
            return;
        };
        let (key, topic) = (flight.key, flight.topic);
        if let Some(key) = key {
            self.drop_flights(|_, flight| flight.key == Some(key) && flight.stage == Stage::Open);
        }
        let scope = key.map_or(Scope::Message(position), Scope::Key);
        self.hold(shard, scope, position, topic);
    }

    /// Drops what has not left. What becomes of it is the caller's.
    pub(super) fn drop_flights(
        &mut self,
        drops: impl Fn(&(Shard, i64), &Flight) -> bool,
    ) -> Vec<(Shard, i64)> {
        let dropped: Vec<(Shard, i64)> = self
            .flights
            .extract_if(.., |place, flight| drops(place, flight))
            .map(|(place, _)| place)
            .collect();
        for topic in self.topics.values_mut() {
            if matches!(topic, Topic::Probing(Some(probe)) if dropped.contains(probe)) {
                *topic = Topic::Waiting;
            }
        }
        self.close_waiting_topics();
        dropped
    }

    pub(super) fn block_topic(&mut self, (shard, position): (Shard, i64), topic: usize) {
        match self.topics.get(&topic) {
            Some(Topic::Waiting) => return,
            Some(Topic::Probing(probe)) if *probe != Some((shard, position)) => return,
            _ => {}
        }
        self.topics.insert(topic, Topic::Waiting);
        self.close_waiting_topics();
        self.drop_flights(|_, flight| flight.topic == topic && flight.stage == Stage::Open);
    }

    fn open_topic(&mut self, topic: usize) {
        Arc::make_mut(&mut self.held)
            .topics
            .remove(&self.topic_names[topic]);
        self.reread_all();
    }

    fn free_topic(&mut self, topic: usize) {
        self.topics.remove(&topic);
        self.open_topic(topic);
    }

    /// The sink answered something other than "topic blocked".
    pub(super) fn answered(&mut self, place: (Shard, i64), topic: usize) {
        if self.topics.get(&topic) == Some(&Topic::Probing(Some(place))) {
            self.free_topic(topic);
        }
    }

    /// The head of a key, or a keyless message, is done with.
    pub(super) fn end_hold(&mut self, (shard, position): (Shard, i64), key: Option<usize>) {
        let place = (shard, key.map_or(Scope::Message(position), Scope::Key));
        if let Some(hold) = self.holds.get_mut(&place)
            && hold.head == position
        {
            if hold.trying {
                self.holds.remove(&place);
            } else {
                hold.over = true;
            }
        }
    }

    /// Builds a request, and lets go what is due.
    pub(super) fn request(&mut self, random: &mut fastrand::Rng, eager: bool) -> FetchRequest {
        let mut reread = Vec::new();
        let due: Vec<(Shard, Scope)> = self
            .holds
            .iter()
            .filter(|((shard, scope), hold)| {
                !hold.trying
                    && !self.flights.contains_key(&(*shard, hold.head))
                    && !matches!(scope, Scope::Key(key) if self.unresolved(*key))
                    && (eager || random.u8(..4) == 0)
            })
            .map(|(place, _)| *place)
            .collect();
        for (shard, scope) in due {
            let hold = self.holds.get_mut(&(shard, scope)).unwrap();
            let from = Position(hold.from);
            if hold.over {
                self.holds.remove(&(shard, scope));
            } else {
                hold.trying = true;
            }
            // What is overflowing stays held on that account.
            if !matches!(scope, Scope::Key(key) if self.overflows.contains_key(&(shard, key))) {
                self.unhold(shard, scope);
            }
            let scope = match scope {
                Scope::Key(key) => RereadScope::Key(self.keys[key].clone()),
                Scope::Message(_) => RereadScope::Message,
            };
            reread.push(Reread { shard, scope, from });
        }
        let drained: Vec<(Shard, usize)> = self
            .overflows
            .keys()
            .filter(|(_, key)| !self.unresolved(*key))
            .copied()
            .collect();
        for (shard, key) in drained {
            let from = self.overflows.remove(&(shard, key)).unwrap();
            if self.keep_out((shard, from), Some(key)) {
                continue;
            }
            self.unhold(shard, Scope::Key(key));
            reread.push(Reread {
                shard,
                scope: RereadScope::Key(self.keys[key].clone()),
                from: Position(from),
            });
        }
        let topics: Vec<usize> = self.topics.keys().copied().collect();
        for topic in topics {
            let busy = self
                .flights
                .values()
                .any(|flight| flight.topic == topic && flight.stage == Stage::Open);
            if self.topics[&topic] == Topic::Waiting && !busy && (eager || random.u8(..8) == 0) {
                self.topics.insert(topic, Topic::Probing(None));
                self.open_topic(topic);
            }
        }
        let mut shards = Vec::new();
        for (shard, owned) in self.owned.iter_mut().filter(|(_, owned)| owned.active) {
            shards.push(OwnedShard {
                shard: *shard,
                epoch: owned.epoch,
            });
            if let Some(from) = owned.reread.take() {
                reread.push(Reread {
                    shard: *shard,
                    scope: RereadScope::Shard,
                    from: Position(from),
                });
            }
        }
        let in_flight = self
            .flights
            .keys()
            .map(|(shard, position)| (*shard, Position(*position)))
            .collect();
        FetchRequest {
            shards,
            in_flight,
            held: Arc::clone(&self.held),
            reread,
            max_rows: 0,
            max_bytes: 0,
        }
    }

    /// Whether a record must be dropped because its key, or it itself, waits.
    fn keep_out(&mut self, (shard, position): (Shard, i64), key: Option<usize>) -> bool {
        if let Some(key) = key
            && let Some(from) = self.overflows.get_mut(&(shard, key))
        {
            *from = position.min(*from);
            return true;
        }
        match self
            .holds
            .get_mut(&(shard, key.map_or(Scope::Message(position), Scope::Key)))
        {
            Some(hold) if !hold.trying => {
                hold.from = hold.from.min(position);
                true
            }
            _ => false,
        }
    }

    /// Takes a record in, unless its way is closed by now.
    pub(super) fn take(&mut self, row: &Row, crowded: bool) {
        let (shard, position) = row.place();
        let (key, topic) = (row.draft.key, row.draft.topic);
        if self.owned.get(&shard).is_none_or(|owned| !owned.active) {
            self.reread(shard, position);
            return;
        }
        if matches!(
            self.topics.get(&topic),
            Some(Topic::Waiting | Topic::Probing(Some(_)))
        ) {
            return;
        }
        if self.keep_out((shard, position), key) {
            return;
        }
        if crowded
            && let Some(key) = key
            && self.unresolved(key)
        {
            Arc::make_mut(&mut self.held)
                .keys
                .insert((shard, self.keys[key].clone()));
            self.overflows.insert((shard, key), position);
            return;
        }
        if let Some(Topic::Probing(probe)) = self.topics.get_mut(&topic) {
            *probe = Some((shard, position));
            Arc::make_mut(&mut self.held)
                .topics
                .insert(Arc::clone(&self.topic_names[topic]));
        }
        let flight = Flight {
            topic,
            key,
            stage: Stage::Open,
        };
        self.flights.insert((shard, position), flight);
    }

    /// Nothing is left to read: what was let go and did not come must be gone. Says what is given up.
    pub(super) fn drop_vanished(&mut self, asked: &FetchRequest) -> Vec<(Shard, i64)> {
        let topics = &self.topic_names;
        let vanished: Vec<((Shard, Scope), i64)> = self
            .holds
            .iter()
            .filter(|((shard, scope), hold)| {
                hold.trying
                    && asked.shards.iter().any(|owned| owned.shard == *shard)
                    && ![&asked.held, &self.held]
                        .iter()
                        .any(|held| held.topics.contains(&topics[hold.topic]))
                    && !self.flights.contains_key(&(*shard, hold.head))
                    && !matches!(scope, Scope::Key(key) if self.overflows.contains_key(&(*shard, *key)))
            })
            .map(|(place, hold)| (*place, hold.head))
            .collect();
        let silent: Vec<usize> = self
            .topics
            .iter()
            .filter(|(_, topic)| **topic == Topic::Probing(None))
            .map(|(topic, _)| *topic)
            .collect();
        for topic in silent {
            self.free_topic(topic);
        }
        vanished
            .into_iter()
            .map(|(place, head)| {
                self.holds.remove(&place);
                (place.0, head)
            })
            .collect()
    }
}
