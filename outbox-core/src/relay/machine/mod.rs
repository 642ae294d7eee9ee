//! The relay's decisions: a state machine without I/O, clock or async.
//!
//! Events go in ([`Machine::handle`]), commands come out ([`Machine::poll`]); time is an argument and chance a seed.
//! It alone knows what is owned, in flight and held. What must survive it is in the store.
//!
//! # A record's way
//!
//! ```text
//! fetched ─▶ Ready ─▶ Sent ─▶ Resolved ─▶ settled: leaves
//!              │        │
//!              ▼        ▼
//!           dropped: leaves at once, and is asked for again (reread)
//! ```
//!
//! A record is *in flight* from the answer that brought it to the settlement that is known to be committed, or until
//! it is dropped unsettled. The rules that keep each key in order:
//!
//! - One fetch is out at a time. A hold is released only where a fetch is built, so that no answer to an older
//!   request, in which the key was not held, can bring the key's later records first.
//! - When the head of a key fails, everything of the key that has not left is dropped, and the hold is released only
//!   when nothing of the key is with the sink any more.
//! - When the sink as a whole is in doubt (outage, unknown, broken), everything not delivered is dropped, the sink is
//!   purged, and only then does anything go again. Answers to fetches from before are thrown away.
//! - A shard's records count under the epoch under which they were asked for.

mod event;
mod fetching;
mod holding;
mod leasing;
#[cfg(test)]
mod model;
mod publishing;
mod reloading;
mod settling;
#[cfg(test)]
mod stand;
mod topics;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

pub(crate) use event::{BatchId, Command, Event, Note};

use self::fetching::Fetching;
use self::holding::Holds;
use self::leasing::Leasing;
use self::publishing::Publishing;
use self::settling::Settling;
use crate::fetch::{Record, RecordRef};
use crate::lease::RelayId;
use crate::message::OrderKey;
use crate::relay::config::{OnFailure, RelayConfig};
use crate::shard::{Position, Shard};

/// What the machine must know of its surroundings.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) relay: RelayId,
    pub(crate) config: RelayConfig,
    /// How many shards the store has.
    pub(crate) shards: u16,
    /// Whether the store keeps dead letters; without them what cannot be delivered parks.
    pub(crate) dead_letters: bool,
    /// Whether the store has scheduled delivery.
    pub(crate) scheduled: bool,
    /// See [`crate::SinkCapabilities`].
    pub(crate) stops_key_at_failure: bool,
    pub(crate) seed: u64,
}

/// The relay's decisions. See the module's documentation.
#[derive(Debug)]
pub(crate) struct Machine {
    setup: Setup,
    random: fastrand::Rng,
    leasing: Leasing,
    fetching: Fetching,
    publishing: Publishing,
    settling: Settling,
    holds: Holds,
    /// Everything in flight, by shard and position.
    flights: BTreeMap<(Shard, Position), Flight>,
    /// In serial mode: the keys that have anything in flight. Looked up, never walked.
    queues: HashMap<(Shard, OrderKey), Queue>,
    /// Bytes of all flights that are not resolved.
    bytes: usize,
    notes: Vec<Note>,
    stopping: bool,
    left: bool,
}

/// A record in flight.
#[derive(Debug)]
struct Flight {
    record: RecordRef,
    topic: Arc<str>,
    key: Option<OrderKey>,
    bytes: usize,
    attempts: u32,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Waits to be handed over, here.
    Ready,
    /// The sink has it.
    Sent(BatchId),
    /// Its outcome waits to be settled, or is being settled.
    Resolved,
}

/// The records of a key that go one by one.
#[derive(Debug, Default)]
struct Queue {
    /// How many are Ready or Sent.
    unresolved: usize,
    /// Read, and not to be handed over before the one before them is resolved.
    waiting: VecDeque<Record>,
}

/// How many records of one key wait in serial mode; what comes beyond is dropped and read again later.
const SERIAL_WAITING: usize = 32;

impl Machine {
    pub(crate) fn new(setup: Setup) -> Self {
        let random = fastrand::Rng::with_seed(setup.seed);
        let publishing = Publishing::new(setup.config.rate_limit);
        Self {
            setup,
            random,
            leasing: Leasing::default(),
            fetching: Fetching::default(),
            publishing,
            settling: Settling::default(),
            holds: Holds::default(),
            flights: BTreeMap::new(),
            queues: HashMap::new(),
            bytes: 0,
            notes: Vec::new(),
            stopping: false,
            left: false,
        }
    }

    /// Takes note of an event.
    pub(crate) fn handle(&mut self, event: Event, now: Duration) {
        self.expire(now);
        match event {
            Event::Leased { sent, result } => self.leased(sent, result, now),
            Event::Released { result } => self.released(result, now),
            Event::HoldsLoaded { result } => self.holds_loaded(result, now),
            Event::Fetched { result } => self.fetched(result, now),
            Event::Accepted { batch } => self.accepted(batch),
            Event::Outcomes { batch, outcomes } => self.outcomes(batch, outcomes, now),
            Event::Purged => self.purged(),
            Event::Rebuilt { result } => self.rebuilt(result, now),
            Event::Probed { result } => self.probed(result, now),
            Event::Settled { result } => self.settled(result, now),
            Event::Promoted { result } => self.promoted(result, now),
            Event::Wake => self.fetching.wake(),
            Event::Shutdown => self.stop(),
        }
    }

    /// The next thing to do, if there is one right now.
    pub(crate) fn poll(&mut self, now: Duration) -> Option<Command> {
        self.expire(now);
        if self.left {
            return None;
        }
        self.poll_leasing(now)
            .or_else(|| self.poll_holds(now))
            .or_else(|| self.poll_sink(now))
            .or_else(|| self.poll_settle(now))
            .or_else(|| self.poll_publish(now))
            .or_else(|| self.poll_fetch(now))
            .or_else(|| self.poll_promote(now))
    }

    /// When to poll again, should nothing happen before; none is never.
    pub(crate) fn next_due(&self, now: Duration) -> Option<Duration> {
        [
            self.leasing_due(),
            self.holds_due(),
            self.sink_due(),
            self.settle_due(),
            self.publish_due(now),
            self.fetch_due(),
            self.promote_due(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// What people and metrics should know since the last call.
    pub(crate) fn take_notes(&mut self) -> Vec<Note> {
        std::mem::take(&mut self.notes)
    }

    /// Whether the relay has stopped: nothing is in flight and its shards are released, as far as that was possible.
    pub(crate) fn has_left(&self) -> bool {
        self.left
    }

    /// Whether all shards are owned and nothing is eligible, due or in flight: what is left is parked or blocked.
    pub(crate) fn is_idle(&self) -> bool {
        self.leasing.owned.len() == usize::from(self.setup.shards)
            && self
                .leasing
                .owned
                .values()
                .all(|owned| owned.is_active() && owned.reread.is_none())
            && self.flights.is_empty()
            && self.settling.is_empty()
            && self.publishing.is_open()
            && self.fetching.found_nothing()
            && !self.holds.any_waiting()
    }

    /// Whether nothing at all is in flight here.
    pub(crate) fn is_empty(&self) -> bool {
        self.flights.is_empty() && self.settling.is_empty()
    }

    pub(crate) fn owns(&self, shard: Shard) -> bool {
        self.leasing.owned.contains_key(&shard)
    }

    /// Gives up what the sink has, for a shutdown whose grace is over.
    pub(crate) fn hurry(&mut self) {
        self.stop();
        self.publishing.purge_wanted = true;
    }

    /// Whether a key's records go one by one: the sink would deliver what follows a failed one, and the key is to
    /// stop at it.
    fn is_serial(&self) -> bool {
        self.parks() && !self.setup.stops_key_at_failure
    }

    fn parks(&self) -> bool {
        self.setup.config.on_failure == OnFailure::Park || !self.setup.dead_letters
    }

    fn note(&mut self, note: Note) {
        self.notes.push(note);
    }

    fn stop(&mut self) {
        if !self.stopping {
            self.stopping = true;
            self.drop_ready();
        }
    }

    /// Counts a flight as resolved: it weighs nothing any more, and its key may go on.
    fn resolve(&mut self, shard: Shard, position: Position) {
        let Some(flight) = self.flights.get_mut(&(shard, position)) else {
            return;
        };
        if flight.stage == Stage::Resolved {
            return;
        }
        flight.stage = Stage::Resolved;
        self.bytes = self.bytes.saturating_sub(flight.bytes);
        if !self.queues.is_empty()
            && let Some(key) = flight.key.clone()
        {
            self.leave_queue(shard, key);
        }
    }

    /// Takes a flight out unsettled; the caller sees to it that it is read again.
    fn drop_flight(&mut self, shard: Shard, position: Position) -> Option<Flight> {
        self.resolve(shard, position);
        let flight = self.remove_flight(shard, position)?;
        self.holds.probe_dropped(shard, position, &flight.topic);
        Some(flight)
    }

    /// Takes a flight out for good.
    fn remove_flight(&mut self, shard: Shard, position: Position) -> Option<Flight> {
        let flight = self.flights.remove(&(shard, position))?;
        if let Some(owned) = self.leasing.owned.get_mut(&shard) {
            owned.in_flight = owned.in_flight.saturating_sub(1);
        }
        Some(flight)
    }

    fn leave_queue(&mut self, shard: Shard, key: OrderKey) {
        let Entry::Occupied(mut entry) = self.queues.entry((shard, key)) else {
            return;
        };
        let queue = entry.get_mut();
        queue.unresolved = queue.unresolved.saturating_sub(1);
        if queue.unresolved > queue.waiting.len() {
            return;
        }
        match queue.waiting.pop_front() {
            Some(next) => self.publishing.ready.push_back(next),
            None => {
                let (key, _) = entry.remove_entry();
                if self.holds.overflowed(&key) {
                    self.fetching.wake();
                }
            }
        }
    }

    /// Which keys of a shard have records that are not resolved. Asked only when something waits or fails.
    fn unresolved(&self, shard: Shard) -> impl Iterator<Item = &OrderKey> {
        self.flights
            .range((shard, Position::MIN)..=(shard, Position::MAX))
            .filter(|(_, flight)| flight.stage != Stage::Resolved)
            .filter_map(|(_, flight)| flight.key.as_ref())
    }
}
