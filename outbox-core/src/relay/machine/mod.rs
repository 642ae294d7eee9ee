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
use self::leasing::{Leasing, Owned};
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

    /// Whether nothing of the shards that are owned is eligible, due or in flight: what is left of them is parked or
    /// blocked.
    pub(crate) fn is_idle(&self) -> bool {
        let mut owned = self.leasing.owned.values().peekable();
        let owns_nothing = owned.peek().is_none();
        owned.all(|owned| owned.is_active() && owned.reread.is_none())
            && self.is_empty()
            && self.publishing.is_open()
            && (owns_nothing || self.fetching.found_nothing())
            && !self.holds.any_waiting()
            && (owns_nothing || self.has_promoted())
    }

    pub(crate) fn owns_all(&self) -> bool {
        self.leasing.owned.len() == usize::from(self.setup.shards)
    }

    pub(crate) fn owned(&self) -> usize {
        self.leasing.owned.len()
    }

    /// Whether there is anything to read.
    pub(crate) fn reads(&self) -> bool {
        self.leasing.owned.values().any(Owned::is_active)
    }

    /// Whether there is anything to settle.
    pub(crate) fn settles(&self) -> bool {
        !self.settling.is_empty()
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

#[cfg(test)]
mod tests {
    use super::stand::{SECOND, Stand, hold_of, keyed, keyless, ms, parking, published, record_of};
    use super::*;
    use crate::hold::HoldState;
    use crate::sink::Outcome;

    fn poison() -> Outcome {
        Outcome::Poison("no".into())
    }

    #[test]
    fn a_relay_is_idle_when_all_shards_are_read_and_nothing_is_left_but_what_an_operator_must_see_to() {
        let setup = Setup {
            shards: 2,
            ..Setup::of_one_shard(parking())
        };
        let idle = || {
            let stand = Stand::of(setup.clone());
            assert!(stand.machine.is_idle() && stand.machine.owns_all());
            stand
        };
        let not = |what: &str, change: &dyn Fn(&mut Machine)| {
            let mut stand = idle();
            change(&mut stand.machine);
            assert!(!stand.machine.is_idle(), "{what}");
        };
        not("a wake-up says that there is more", &|machine| {
            machine.fetching.wake()
        });
        not("the holds of a shard are not known", &|machine| {
            machine.leasing.owned.get_mut(&Shard(0)).unwrap().loaded = false;
        });
        not("something is to be read again", &|machine| {
            machine.reread(Shard(0), Position(1))
        });
        not("something is to be settled", &|machine| {
            machine.settle_delivered(Shard(0), record_of(1).reference());
        });
        not("the sink is in doubt", &|machine| {
            machine.publishing.purge_wanted = true
        });
        not("a key waits for time to pass", &|machine| {
            let row = record_of(1);
            let scope = holding::Scope::Key(row.message.order_key().unwrap());
            let state = holding::State::Waiting { due: SECOND };
            machine.holds.wait(Shard(0), scope, row.reference(), 1, state);
        });
        let mut stand = idle();
        let batch = stand.sent(vec![record_of(1)]);
        assert!(!stand.machine.is_idle(), "something is in flight");
        stand.outcomes(batch, vec![poison()]);
        stand.pass(SECOND);
        assert!(
            stand.machine.is_idle() && stand.machine.is_empty(),
            "it is parked"
        );
        stand.until(|command| matches!(command, Command::Fetch { .. }).then_some(()));
        assert!(!stand.machine.is_idle(), "it asks whether there is more");

        let mut stand = idle();
        stand.machine.lose(Shard(1), "taken");
        assert!(
            stand.machine.is_idle() && !stand.machine.owns_all(),
            "it is another's"
        );
        stand.machine.lose(Shard(0), "taken");
        assert!(stand.machine.is_idle(), "all is");
    }

    #[test]
    fn a_relay_is_not_idle_before_it_has_looked_for_what_was_scheduled_and_is_due() {
        let promotion = |promoted, next_in| crate::Promotion {
            promoted,
            next_in,
            lost: Vec::new(),
        };
        for (promotion, idle) in [
            (promotion(0, None), true),
            (promotion(0, Some(SECOND)), true),
            (promotion(0, Some(Duration::ZERO)), false),
            (promotion(1, None), false),
        ] {
            let mut stand = Stand::apart(Setup {
                scheduled: true,
                ..Setup::of_one_shard(parking())
            });
            stand.until(|command| matches!(command, Command::Promote { .. }).then_some(()));
            stand.run();
            assert!(!stand.machine.is_idle(), "it asks what is due");
            stand.tell(Event::Promoted {
                result: Ok(promotion.clone()),
            });
            assert_eq!(stand.machine.is_idle(), idle, "{promotion:?}");
        }
    }

    #[test]
    fn a_relay_is_empty_when_nothing_is_in_flight_or_to_be_settled() {
        let mut stand = Stand::new(parking());
        assert!(stand.machine.is_empty());
        stand.read(vec![record_of(1)]);
        assert!(!stand.machine.is_empty());
        stand.machine.drop_flight(Shard(0), Position(1));
        assert!(stand.machine.is_empty());
        stand.machine.settle_delivered(Shard(0), record_of(1).reference());
        assert!(!stand.machine.is_empty());
    }

    #[test]
    fn a_relay_that_stops_drops_what_has_not_left_and_in_a_hurry_gives_up_what_the_sink_has() {
        let mut stand = Stand::new(parking());
        stand.sent(vec![record_of(1)]);
        stand.read(vec![keyless("t", 2)]);
        stand.tell(Event::Shutdown);
        assert_eq!(stand.machine.flights.len(), 1, "what the sink has is waited for");
        assert!(
            !stand
                .run()
                .iter()
                .any(|command| matches!(command, Command::Purge))
        );
        let generation = stand.machine.publishing.generation;
        stand.tell(Event::Shutdown);
        assert_eq!(
            stand.machine.publishing.generation, generation,
            "to be told twice changes nothing"
        );
        stand.machine.hurry();
        assert!(matches!(stand.machine.poll(stand.now), Some(Command::Purge)));
    }

    #[test]
    fn keys_go_one_by_one_only_where_they_park_and_the_sink_would_go_on() {
        for (on_failure, dead_letters, stops_key_at_failure, serial) in [
            (OnFailure::Park, true, false, true),
            (OnFailure::Park, true, true, false),
            (OnFailure::DeadLetter, true, false, false),
            (OnFailure::DeadLetter, false, false, true),
            (OnFailure::DeadLetter, false, true, false),
        ] {
            let mut stand = Stand::of(Setup {
                dead_letters,
                stops_key_at_failure,
                ..Setup::of_one_shard(RelayConfig {
                    on_failure,
                    ..RelayConfig::default()
                })
            });
            stand.outcome = None;
            stand.rows = vec![record_of(1), record_of(2), keyed("t", "l", 3)];
            let sent = if serial { vec![1, 3] } else { vec![1, 2, 3] };
            assert_eq!(published(&stand.pass(ms(100))), sent);
        }
    }

    #[test]
    fn of_keys_that_go_one_by_one_each_goes_on_with_its_own_outcome() {
        let mut stand = Stand::of(Setup {
            stops_key_at_failure: false,
            ..Setup::of_one_shard(parking())
        });
        let first = stand.sent(vec![
            keyed("t", "a", 1),
            keyed("t", "a", 2),
            keyed("t", "a", 3),
            keyed("t", "b", 4),
            keyed("t", "b", 5),
        ]);
        stand.outcome = None;
        stand.settles = false;
        stand.outcomes(first, vec![Outcome::Delivered, poison()]);
        let mut commands = stand.run();
        assert_eq!(published(&commands), [2], "the other key stops at its head");
        let sent = commands.drain(..).find_map(|command| match command {
            Command::Publish { batch, .. } => Some(batch),
            _ => None,
        });
        stand.outcomes(sent.unwrap(), vec![Outcome::Delivered]);
        assert_eq!(published(&stand.run()), [3]);
    }

    #[test]
    fn what_is_dropped_from_behind_a_head_sends_nothing_of_its_key_off() {
        let mut stand = Stand::of(Setup {
            stops_key_at_failure: false,
            ..Setup::of_one_shard(parking())
        });
        let rows: Vec<Record> = (1..=4).map(record_of).collect();
        let head = stand.sent(rows.clone());
        stand.outcome = None;
        let place = |row: &Record| (row.shard, row.position);
        stand.machine.drop_unsent(&[place(&rows[1])]);
        assert!(published(&stand.run()).is_empty());
        stand.machine.drop_unsent(&[place(&rows[2]), place(&rows[3])]);
        stand.read(rows[1..].to_vec());
        assert!(
            published(&stand.run()).is_empty(),
            "the head is still with the sink"
        );
        stand.outcomes(head, vec![Outcome::Delivered]);
        assert_eq!(published(&stand.run()), [2]);
    }

    #[test]
    fn the_first_of_all_that_is_due_is_what_is_waited_for() {
        let mut stand = Stand::new(RelayConfig {
            poll_idle: SECOND * 60,
            poll_busy: SECOND * 60,
            lease: SECOND * 60,
            ..RelayConfig::default()
        });
        let (now, machine) = (stand.now, &mut stand.machine);
        assert_eq!(machine.next_due(now), Some(now + SECOND * 20), "a renewal");
        machine.holds.load_next = now + SECOND * 9;
        let parked = hold_of(&record_of(1), HoldState::Parked);
        let scope = holding::Scope::of(&parked.scope, parked.head).unwrap();
        machine
            .holds
            .wait(Shard(0), scope, parked.head, 1, holding::State::Parked);
        assert_eq!(
            machine.next_due(now),
            Some(now + SECOND * 9),
            "a look at the holds"
        );
        machine.settle_delivered(Shard(0), record_of(1).reference());
        assert!(machine.next_due(now) < Some(now + SECOND), "a settlement");
    }
}
