//! The machine against a model of its whole world: relays, a store, sinks, crashes, lost answers, stalls.
//!
//! Everything is drawn from one seed. The store's reader is as unforgiving as the contract allows: it returns a row
//! once, and again only when it is told to reread, so that anything the machine forgets to ask for stays lost and is
//! noticed. `OUTBOX_SEED=n` replays one seed, `OUTBOX_SEEDS=n` runs so many.

/// Writes a line down, when one seed is replayed.
macro_rules! trace {
    ($world:expr, $($line:tt)*) => {
        if $world.trace.is_some() {
            let line = format!("{:?} {}", $world.now, format_args!($($line)*));
            $world.trace.get_or_insert_default().push(line);
        }
    };
}

mod sink;
mod store;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use self::sink::{Log, Sink};
use self::store::{Reader, Row, Store};
use super::{Command, Event, Machine, Note, Setup};
use crate::error::{Error, ErrorKind};
use crate::fetch::Record;
use crate::lease::{LeaseRequest, LeaseTable, RelayId};
use crate::message::{Message, OrderKey};
use crate::relay::Backoff;
use crate::relay::config::{OnFailure, RelayConfig};
use crate::shard::{Position, shard_of};

const SHARDS: u16 = 3;
const MAX_ATTEMPTS: u32 = 3;

#[derive(Debug)]
struct Relay {
    id: RelayId,
    machine: Machine,
    commands: Vec<Command>,
    events: Vec<Event>,
    reader: Reader,
    sink: Sink,
    /// Not scheduled before.
    asleep: Duration,
    /// Whether it was told to stop.
    stopping: bool,
}

/// A world, how it is and what became of it.
struct World {
    seed: u64,
    random: fastrand::Rng,
    now: Duration,
    store: Store,
    relays: Vec<Relay>,
    /// What dead relays had on the wire.
    orphans: Vec<VecDeque<Record>>,
    next_position: i64,
    next_relay: u32,
    next_id: u128,
    /// Rows of open transactions; a key has one at a time, as its producers lock their aggregate.
    open: Vec<(Position, Row)>,
    counters: BTreeMap<OrderKey, u64>,
    log: Log,
    blocked: BTreeSet<Arc<str>>,
    faults: u64,
    /// Whether things go wrong.
    rough: bool,
    park: bool,
    dead_letters: bool,
    stops_key: bool,
    scheduled: bool,
    rate_limit: Option<u32>,
    /// More messages of a key at once than a serial relay lets wait.
    bursts: bool,
    /// Relays live long, so that they get further.
    sturdy: bool,
    /// The sink as a whole fails often.
    shaky: bool,
    /// Reads take longer than all else.
    slow_reads: bool,
    /// What happened, when one seed is replayed: to write it down costs more than all the rest.
    trace: Option<Vec<String>>,
    /// How often this and that happened: proof that the model gets there.
    reached: BTreeMap<&'static str, u64>,
}

impl World {
    fn new(seed: u64, rough: bool) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let dead_letters = random.u8(..8) > 0;
        let mut world = Self {
            seed,
            now: Duration::from_secs(1),
            store: Store {
                leases: LeaseTable::new(SHARDS),
                ..Store::default()
            },
            relays: Vec::new(),
            orphans: Vec::new(),
            next_position: 1,
            next_relay: 0,
            next_id: 1,
            open: Vec::new(),
            counters: BTreeMap::new(),
            log: Log::default(),
            blocked: BTreeSet::new(),
            faults: 0,
            rough,
            park: random.bool() || !dead_letters,
            dead_letters,
            stops_key: random.bool(),
            scheduled: random.bool(),
            rate_limit: (random.u8(..4) == 0).then_some(300),
            bursts: random.u8(..4) == 0,
            sturdy: random.u8(..4) > 0,
            shaky: random.bool(),
            slow_reads: random.bool(),
            random,
            trace: std::env::var_os("OUTBOX_SEED").map(|_| Vec::new()),
            reached: BTreeMap::new(),
        };
        for _ in 0..world.random.usize(1..=3) {
            world.start_relay();
        }
        world
    }

    fn config(&self) -> RelayConfig {
        RelayConfig {
            lease: Duration::from_secs(2),
            batch_rows: if self.bursts { 50 } else { 5 },
            window_rows: if self.bursts { 100 } else { 12 },
            settle_rows: 4,
            settle_every: Duration::from_millis(if self.slow_reads { 0 } else { 200 }),
            max_attempts: MAX_ATTEMPTS,
            max_holds: 4,
            topic_retry: Backoff {
                initial: Duration::from_millis(100),
                max: Duration::from_secs(1),
            },
            rate_limit: self.rate_limit,
            on_failure: if self.park {
                OnFailure::Park
            } else {
                OnFailure::DeadLetter
            },
            ..RelayConfig::default()
        }
    }

    fn start_relay(&mut self) {
        self.next_relay += 1;
        let id = RelayId::new(format!("relay-{}", self.next_relay));
        let setup = Setup {
            relay: id.clone(),
            config: self.config(),
            shards: SHARDS,
            dead_letters: self.dead_letters,
            scheduled: self.scheduled,
            stops_key_at_failure: self.stops_key,
            seed: self.random.u64(..),
        };
        self.relays.push(Relay {
            id,
            machine: Machine::new(setup),
            commands: Vec::new(),
            events: Vec::new(),
            reader: Reader::default(),
            sink: Sink::default(),
            asleep: Duration::ZERO,
            stopping: false,
        });
    }

    fn reach(&mut self, what: &'static str) {
        *self.reached.entry(what).or_default() += 1;
    }

    fn fail(&self, what: &str) -> ! {
        for line in self.trace.iter().flatten() {
            eprintln!("{line}");
        }
        panic!(
            "seed {}: {what}; replay with OUTBOX_SEED={}",
            self.seed, self.seed
        );
    }

    fn chance(&mut self, percent: u8) -> bool {
        self.random.u8(..100) < percent
    }

    fn step(&mut self) {
        match self.random.u8(..100) {
            0..12 if self.rough => self.produce(),
            12..20 => self.end_transaction(),
            20..23 if self.rough => self.disturb(),
            20..23 => self.blocked.clear(),
            23..30 => {
                let passed = match self.random.u8(..20) {
                    0 if self.rough => Duration::from_millis(self.random.u64(300..1200)),
                    _ => Duration::from_millis(self.random.u64(..40)),
                };
                self.now += passed;
                self.store.now = self.now;
            }
            30..33 => self.operate(),
            _ => {
                if self.relays.is_empty() {
                    self.start_relay();
                }
                let index = self.random.usize(..self.relays.len());
                let mut relay = self.relays.swap_remove(index);
                if relay.asleep <= self.now {
                    self.run(&mut relay);
                }
                if relay.machine.has_left() {
                    self.left(&relay);
                } else {
                    self.relays.push(relay);
                }
            }
        }
    }

    fn left(&mut self, relay: &Relay) {
        if !relay.stopping || !relay.machine.is_empty() || !relay.sink.queue.is_empty() {
            self.fail(&format!(
                "{} left and should not have: {:#?}",
                relay.id, relay.machine
            ));
        }
        trace!(self, "{} left", relay.id);
        self.reach("left");
    }

    fn draw(&mut self) -> Position {
        self.next_position += 1;
        Position(self.next_position)
    }

    fn produce(&mut self) {
        let topic: Arc<str> = ["a", "b"][self.random.usize(..2)].into();
        let key = self.random.u8(..6);
        let mut builder = Message::builder(topic).id(uuid::Uuid::from_u128(self.next_id));
        self.next_id += 1;
        if key > 0 {
            builder = builder.key(vec![key]);
        }
        let message = builder.build().unwrap();
        let key = message.order_key();
        let shard = shard_of(message.key().map(AsRef::as_ref), message.id(), SHARDS);
        let mut row = Row {
            message,
            shard,
            n: None,
            defect: self.rough && self.chance(2),
        };
        if self.rough && self.scheduled && self.chance(10) {
            let due = self.now + Duration::from_millis(self.random.u64(..3_000));
            self.store.scheduled.push((due, row));
            return;
        }
        let busy = self.open.iter().any(|(_, row)| row.message.order_key() == key);
        if key.is_some() && busy {
            return;
        }
        row.n = key.map(|key| self.counters.get(&key).map_or(1, |n| n + 1));
        let position = self.draw();
        self.open.push((position, row));
    }

    fn end_transaction(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let (position, row) = self.open.swap_remove(self.random.usize(..self.open.len()));
        if self.chance(10) {
            return;
        }
        let (key, n) = (row.message.order_key(), row.n);
        self.commit(position, row.clone());
        let (Some(key), Some(n)) = (key, n) else { return };
        self.counters.insert(key.clone(), n);
        if self.rough && self.bursts && self.chance(5) {
            for n in n + 1..n + 45 {
                let mut parts = row.message.clone().into_parts();
                parts.id = uuid::Uuid::from_u128(self.next_id).into();
                self.next_id += 1;
                let position = self.draw();
                let message = Message::from_stored(parts);
                self.commit(
                    position,
                    Row {
                        message,
                        n: Some(n),
                        defect: false,
                        ..row
                    },
                );
                self.counters.insert(key.clone(), n);
            }
        }
    }

    fn commit(&mut self, position: Position, row: Row) {
        trace!(
            self,
            "commit {position} {:?} n {:?}",
            row.message.order_key(),
            row.n
        );
        self.log
            .committed
            .insert(row.message.id(), (position, row.clone()));
        self.store.rows.insert(position, row);
    }

    /// Crashes, stalls, joins, orderly ends, forbidden topics, restarts of the server.
    fn disturb(&mut self) {
        let what = self.random.u8(..12);
        if self.sturdy && matches!(what, 0..6 | 9) && !self.chance(15) {
            return;
        }
        match what {
            0..3 if !self.relays.is_empty() => {
                self.faults += 1;
                let relay = self.relays.swap_remove(self.random.usize(..self.relays.len()));
                trace!(self, "crash of {}", relay.id);
                let blocked = &self.blocked;
                let stuck = relay.sink.dead.is_some();
                let wire =
                    relay.sink.queue.into_iter().filter(|item| {
                        !stuck && !item.skip && !blocked.contains(item.record.message.topic())
                    });
                self.orphans.push(wire.map(|item| item.record).collect());
                if self.random.bool() {
                    self.start_relay();
                }
            }
            3..6 if !self.relays.is_empty() => {
                self.faults += 1;
                let asleep = self.now + Duration::from_millis(self.random.u64(500..5000));
                let index = self.random.usize(..self.relays.len());
                self.relays[index].asleep = asleep;
            }
            6..8 => {
                let topic: Arc<str> = ["a", "b"][self.random.usize(..2)].into();
                if !self.blocked.remove(&topic) {
                    self.blocked.insert(topic);
                }
            }
            8 if self.relays.len() < 4 => self.start_relay(),
            9 if !self.relays.is_empty() => {
                let index = self.random.usize(..self.relays.len());
                trace!(self, "{} is to stop", self.relays[index].id);
                let relay = &mut self.relays[index];
                if relay.stopping {
                    relay.machine.hurry();
                } else {
                    relay.machine.handle(Event::Shutdown, self.now);
                    relay.stopping = true;
                }
            }
            10 if self.chance(30) => {
                self.faults += 1;
                trace!(self, "the server restarts",);
                let noticed = self.relays.iter().any(|relay| {
                    Some(&relay.id) == self.store.undoable_of.as_ref() && relay.reader.is_connected()
                });
                self.store.restart(noticed);
            }
            _ => {
                // What dead relays had on the wire may still arrive, in order.
                let mut orphans = std::mem::take(&mut self.orphans);
                for record in orphans.iter_mut().filter_map(VecDeque::pop_front) {
                    if let Err(what) = self.log.deliver(&record) {
                        self.fail(&format!("orphan: {what}"));
                    }
                }
                self.orphans = orphans;
            }
        }
    }

    fn run(&mut self, relay: &mut Relay) {
        match self.random.u8(..4) {
            0 => self.tell(relay),
            1 => self.poll(relay),
            2 => {
                if !relay.commands.is_empty() {
                    let command = relay
                        .commands
                        .swap_remove(self.random.usize(..relay.commands.len()));
                    self.execute(relay, command);
                }
            }
            _ => self.sink_progress(relay),
        }
    }

    fn tell(&mut self, relay: &mut Relay) {
        if relay.events.is_empty() {
            return;
        }
        let event = relay.events.swap_remove(self.random.usize(..relay.events.len()));
        if self.slow_reads && matches!(event, Event::Fetched { .. }) && self.chance(85) {
            relay.events.push(event);
            return;
        }
        if let Event::Outcomes { batch, .. } = &event {
            relay.sink.open.remove(batch);
        }
        trace!(self, "{} handles {:?}", relay.id, event);
        relay.machine.handle(event, self.now);
    }

    fn poll(&mut self, relay: &mut Relay) {
        let mut command = relay.machine.poll(self.now);
        let is_due = |relay: &Relay| {
            relay
                .machine
                .next_due(self.now)
                .is_some_and(|due| due <= self.now)
        };
        if command.is_none() && is_due(relay) {
            // A step without a command may have made one possible; a second time it must not be.
            command = relay.machine.poll(self.now);
            if command.is_none() && is_due(relay) {
                self.fail(&format!(
                    "{} is due at once but wants nothing: {:#?}",
                    relay.id, relay.machine
                ));
            }
        }
        if let Some(command) = command {
            trace!(self, "{} wants {:?}", relay.id, command);
            if let Command::Publish { batch, records } = command {
                // A hand-over begins before anything else is heard: the driver's order of business.
                self.check_published(relay, &records);
                self.publish(relay, batch, records);
            } else {
                relay.commands.push(command);
            }
        }
        for note in relay.machine.take_notes() {
            self.take_note(note);
        }
    }

    /// What goes out under a lease goes out with its attempts: no fewer, no more.
    fn check_published(&self, relay: &Relay, records: &[Record]) {
        let owned = self.store.leases.held_by(&relay.id, millis(self.now));
        for record in records {
            let known = self
                .store
                .attempts
                .get(&record.message.id())
                .copied()
                .unwrap_or_default();
            if record.attempts != known && owned.iter().any(|owned| owned.shard == record.shard) {
                self.fail(&format!(
                    "{} sends {} with {} attempts, and there were {known}",
                    relay.id, record.position, record.attempts
                ));
            }
        }
    }

    fn take_note(&mut self, note: Note) {
        self.reach(match note {
            Note::ContractBroken { who, what } => self.fail(&format!("{who} {what}")),
            Note::ShardGained(_) => "gained",
            Note::ShardLost { why, .. } => why,
            Note::Fenced(_) => "fenced",
            Note::Published { .. } | Note::Outcome { .. } => return,
            Note::Retrying { .. } => "retrying",
            Note::Dead { .. } => "dead",
            Note::Parked { .. } => "parked",
            Note::TopicHeld { reason, .. } if reason.as_str().starts_with("too many") => "crowded",
            Note::TopicHeld { .. } => "topic held",
            Note::TopicFlows { .. } => "topic flows",
            Note::SinkDown { .. } => "sink down",
            Note::SinkUp => "sink up",
            Note::Reset { .. } => "reset by the reader",
            Note::StoreFailed { operation, .. } => operation,
        });
    }

    fn execute(&mut self, relay: &mut Relay, command: Command) {
        let lost = self.rough && self.chance(4);
        let done_all_the_same = self.random.bool();
        self.faults += u64::from(lost);
        let error = || Error::new(ErrorKind::Unavailable, "model", "no answer");
        let effect = !lost || done_all_the_same;
        let answer = || if lost { Err(error()) } else { Ok(()) };
        let event = match command {
            Command::Lease { want } => {
                let request = LeaseRequest {
                    relay: relay.id.clone(),
                    want,
                    ttl: self.config().lease,
                };
                let leases = effect.then(|| self.store.leases.lease(&request, millis(self.store.now)));
                Event::Leased {
                    sent: self.now,
                    result: leases.filter(|_| !lost).ok_or_else(error),
                }
            }
            Command::Release { shards, membership } => {
                if effect {
                    self.store.leases.release(&relay.id, &shards, membership);
                }
                Event::Released { result: answer() }
            }
            Command::LoadHolds { shards } => Event::HoldsLoaded {
                result: answer().map(|()| self.store.holds(&shards)),
            },
            Command::Fetch { request } => {
                if lost {
                    relay.reader.replace();
                    Event::Fetched { result: Err(error()) }
                } else {
                    let result = Ok(self.fetch(relay, &request));
                    Event::Fetched { result }
                }
            }
            // It has begun where it was wanted.
            Command::Publish { .. } => return,
            Command::Purge => {
                self.purge(relay);
                Event::Purged
            }
            Command::Rebuild => Event::Rebuilt { result: answer() },
            Command::Probe => Event::Probed { result: answer() },
            Command::Settle { settlement } => {
                let settled = effect.then(|| self.settle(&settlement));
                Event::Settled {
                    result: settled.filter(|_| !lost).ok_or_else(error),
                }
            }
            Command::Promote { shards } => {
                let promotion = effect.then(|| self.promote(&relay.id, &shards));
                Event::Promoted {
                    result: promotion.filter(|_| !lost).ok_or_else(error),
                }
            }
        };
        relay.events.push(event);
        if relay.machine.holds.has_overflows() {
            self.reach("overflow");
        }
    }

    /// Heals everything and sees that nothing is left behind.
    fn settle_down(&mut self) {
        self.rough = false;
        self.orphans.clear();
        while !self.open.is_empty() {
            self.end_transaction();
        }
        for relay in &mut self.relays {
            relay.asleep = Duration::ZERO;
        }
        for _ in 0..2_000_000 {
            if self.store.is_done() && !self.relays.iter().any(|relay| relay.stopping) {
                break;
            }
            self.step();
        }
        if !self.store.is_done() || self.relays.iter().any(|relay| relay.stopping) {
            let relays: Vec<_> = self
                .relays
                .iter()
                .map(|relay| (&relay.machine, &relay.commands, &relay.events))
                .collect();
            let state = format!(
                "rows {:?}\nscheduled {:?}\nholds {:?}\n{relays:#?}",
                self.store.rows.keys(),
                self.store.scheduled,
                self.store.holds
            );
            self.fail(&format!("stranded\n{state}"));
        }
        for id in self.log.committed.keys() {
            if !self.log.seen.contains(id) && !self.store.dead.contains_key(id) {
                self.fail(&format!("{id} is lost"));
            }
        }
        for (id, attempts) in &self.store.dead {
            if *attempts > MAX_ATTEMPTS {
                self.fail(&format!("{id} died after {attempts} attempts"));
            }
        }
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap()
}

fn run(seed: u64) -> BTreeMap<&'static str, u64> {
    let mut world = World::new(seed, true);
    for _ in 0..4_000 {
        world.step();
    }
    world.settle_down();
    world.reached
}

#[test]
fn nothing_is_lost_reordered_or_stranded_whatever_happens() {
    let mut reached: BTreeMap<&'static str, u64> = BTreeMap::new();
    if let Ok(seed) = std::env::var("OUTBOX_SEED") {
        run(seed.parse().unwrap());
        return;
    }
    let seeds = std::env::var("OUTBOX_SEEDS").map_or(300, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        for (what, times) in run(seed) {
            *reached.entry(what).or_default() += times;
        }
    }
    // A model that does not get there proves nothing.
    for what in [
        "gained",
        "released",
        "expired",
        "taken",
        "reset",
        "fenced",
        "retrying",
        "dead",
        "parked",
        "resumed",
        "buried",
        "crowded",
        "topic held",
        "topic flows",
        "overflow",
        "sink down",
        "sink up",
        "reset by the reader",
        "hand-over given up",
        "promoted",
        "left",
        "lease",
        "release",
        "load holds",
        "fetch",
        "settle",
        "promote scheduled messages",
    ] {
        assert!(
            reached.get(what).is_some_and(|times| *times > 0),
            "{what} is out of reach: {reached:?}"
        );
    }
}

#[test]
fn without_faults_each_message_is_delivered_once() {
    for seed in 0..100 {
        let mut world = World::new(seed, false);
        for _ in 0..200 {
            world.produce();
            world.end_transaction();
        }
        world.settle_down();
        assert_eq!(
            world.log.deliveries,
            world.log.committed.len() as u64,
            "seed {seed}"
        );
        assert_eq!(world.faults, 0);
    }
}
