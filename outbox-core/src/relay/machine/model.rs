//! The machine against a model of its whole world: relays, a store, sinks, crashes, lost answers, stalls.
//!
//! Everything is drawn from one seed. The store's reader is as unforgiving as the contract allows: it returns a row
//! once, and again only when it is told to reread, so that anything the machine forgets to ask for stays lost and is
//! noticed. `OUTBOX_SEED=n` replays one seed, `OUTBOX_SEEDS=n` runs so many.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::{BatchId, Command, Event, Machine, Setup};
use crate::error::{Error, ErrorKind};
use crate::fetch::{FetchRequest, Fetched, Record, RecordRef, RereadScope};
use crate::hold::{Hold, HoldChange, HoldScope, HoldState};
use crate::lease::{LeaseRequest, LeaseTable, RelayId};
use crate::message::{Message, MessageId, OrderKey};
use crate::relay::config::{OnFailure, RelayConfig};
use crate::settle::{Settled, Settlement};
use crate::shard::{Position, Shard, shard_of};
use crate::sink::Outcome;

const SHARDS: u16 = 3;
const MAX_ATTEMPTS: u32 = 3;

/// One stored row.
#[derive(Debug, Clone)]
struct Row {
    message: Message,
    shard: Shard,
    /// Its number within its key, from 1; keyless rows have none.
    n: Option<u64>,
}

#[derive(Debug, Default)]
struct Store {
    now: Duration,
    leases: LeaseTable,
    rows: BTreeMap<Position, Row>,
    dead: BTreeMap<MessageId, u32>,
    holds: BTreeMap<(Shard, HoldScope, Option<Position>), (Hold, Option<Duration>)>,
}

/// What a reader has gone past, per shard and epoch: it comes back to nothing of it by itself.
#[derive(Debug, Default)]
struct Reader {
    passed: BTreeMap<Shard, (crate::Epoch, BTreeSet<Position>)>,
}

#[derive(Debug, Default)]
struct Sink {
    queue: VecDeque<Item>,
    /// Open receipts: outcomes so far, and keys that failed in them.
    open: BTreeMap<BatchId, Receipt>,
    /// The sink as a whole failed: nothing goes until it is purged.
    dead: Option<Outcome>,
}

#[derive(Debug)]
struct Receipt {
    outcomes: Vec<Option<Outcome>>,
    failed: BTreeSet<OrderKey>,
}

#[derive(Debug)]
struct Item {
    batch: BatchId,
    index: usize,
    record: Record,
    /// A predecessor of its key failed in a receipt that was open when it was handed over.
    skip: bool,
}

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
}

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
    /// The topic log.
    high: BTreeMap<OrderKey, u64>,
    seen: BTreeSet<MessageId>,
    committed: BTreeMap<MessageId, Row>,
    /// How often the sink said "retry" of a message.
    retries: BTreeMap<MessageId, u32>,
    blocked: BTreeSet<Arc<str>>,
    deliveries: u64,
    faults: u64,
    /// Whether things go wrong.
    rough: bool,
    park: bool,
    stops_key: bool,
    trace: Vec<String>,
}

impl World {
    fn new(seed: u64, rough: bool) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let (park, stops_key) = (random.bool(), random.bool());
        let mut world = Self {
            seed,
            random,
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
            high: BTreeMap::new(),
            seen: BTreeSet::new(),
            committed: BTreeMap::new(),
            retries: BTreeMap::new(),
            blocked: BTreeSet::new(),
            deliveries: 0,
            faults: 0,
            rough,
            park,
            stops_key,
            trace: Vec::new(),
        };
        for _ in 0..world.random.usize(1..=3) {
            world.start_relay();
        }
        world
    }

    fn config(&self) -> RelayConfig {
        RelayConfig {
            lease: Duration::from_secs(2),
            batch_rows: 5,
            window_rows: 12,
            settle_rows: 4,
            max_attempts: MAX_ATTEMPTS,
            max_holds: 4,
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
            dead_letters: true,
            scheduled: false,
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
        });
    }

    fn fail(&self, what: &str) -> ! {
        for line in self.trace.iter().rev().take(200).rev() {
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
                self.relays.push(relay);
            }
        }
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
        let busy = self.open.iter().any(|(_, row)| row.message.order_key() == key);
        if key.is_some() && busy {
            return;
        }
        let n = key.map(|key| self.counters.get(&key).map_or(1, |n| n + 1));
        let shard = shard_of(message.key().map(AsRef::as_ref), message.id(), SHARDS);
        self.open
            .push((Position(self.next_position), Row { message, shard, n }));
        self.next_position += 1;
    }

    fn end_transaction(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let (position, row) = self.open.swap_remove(self.random.usize(..self.open.len()));
        if self.chance(10) {
            return;
        }
        if let (Some(key), Some(n)) = (row.message.order_key(), row.n) {
            self.counters.insert(key, n);
        }
        self.trace.push(format!(
            "{:?} commit {position} {:?} n {:?}",
            self.now,
            row.message.order_key(),
            row.n
        ));
        self.committed.insert(row.message.id(), row.clone());
        self.store.rows.insert(position, row);
    }

    /// Crashes, stalls, forbidden topics.
    fn disturb(&mut self) {
        match self.random.u8(..4) {
            0 if !self.relays.is_empty() => {
                self.faults += 1;
                let relay = self.relays.swap_remove(self.random.usize(..self.relays.len()));
                self.trace.push(format!("{:?} crash of {}", self.now, relay.id));
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
            1 if !self.relays.is_empty() => {
                self.faults += 1;
                let asleep = self.now + Duration::from_millis(self.random.u64(500..5000));
                let index = self.random.usize(..self.relays.len());
                self.relays[index].asleep = asleep;
            }
            2 => {
                let topic: Arc<str> = ["a", "b"][self.random.usize(..2)].into();
                // A topic changes only while nothing of it is under way: no sink could keep order otherwise.
                let under_way = self.relays.iter().any(|relay| {
                    !relay.sink.open.is_empty()
                        || relay
                            .commands
                            .iter()
                            .any(|c| matches!(c, Command::Publish { .. }))
                });
                if !under_way && !self.blocked.remove(&topic) {
                    self.blocked.insert(topic);
                }
            }
            _ => {
                // What dead relays had on the wire may still arrive, in order.
                for orphan in &mut self.orphans {
                    if let Some(record) = orphan.pop_front() {
                        deliver(&mut self.high, &mut self.seen, &self.committed, &record).unwrap_or_else(
                            |what| {
                                for l in &self.trace {
                                    eprintln!("{l}");
                                }
                                panic!("seed {}: orphan: {what}", self.seed)
                            },
                        );
                        self.deliveries += 1;
                    }
                }
            }
        }
    }

    /// An operator resumes what is parked.
    fn operate(&mut self) {
        let parked: Vec<_> = self
            .store
            .holds
            .iter()
            .filter(|(_, (hold, _))| hold.state == HoldState::Parked)
            .map(|(k, _)| k.clone())
            .collect();
        if !parked.is_empty() && (self.chance(20) || !self.rough) {
            let scope = &parked[self.random.usize(..parked.len())];
            self.trace.push(format!("{:?} resume {scope:?}", self.now));
            self.store.holds.remove(scope);
        }
    }

    fn run(&mut self, relay: &mut Relay) {
        match self.random.u8(..4) {
            0 => {
                if !relay.events.is_empty() {
                    let event = relay.events.swap_remove(self.random.usize(..relay.events.len()));
                    if let Event::Outcomes { batch, .. } = &event {
                        relay.sink.open.remove(batch);
                    }
                    self.trace.push(format!(
                        "{:?} {} handles {}",
                        self.now,
                        relay.id,
                        brief(&format!("{event:?}"))
                    ));
                    relay.machine.handle(event, self.now);
                }
            }
            1 => {
                let mut command = relay.machine.poll(self.now);
                if command.is_none()
                    && relay
                        .machine
                        .next_due(self.now)
                        .is_some_and(|due| due <= self.now)
                {
                    // A step without a command may have made one possible; a second time it must not be.
                    command = relay.machine.poll(self.now);
                    if command.is_none()
                        && relay
                            .machine
                            .next_due(self.now)
                            .is_some_and(|due| due <= self.now)
                    {
                        self.idle_spin(relay);
                    }
                }
                if let Some(command) = command {
                    self.trace.push(format!(
                        "{:?} {} wants {}",
                        self.now,
                        relay.id,
                        brief(&format!("{command:?}"))
                    ));
                    if let Command::Publish { .. } = command {
                        // A hand-over begins before anything else is heard: the driver's order of business.
                        self.execute(relay, command);
                    } else {
                        relay.commands.push(command);
                    }
                }
                for note in relay.machine.take_notes() {
                    if let super::Note::ContractBroken { who, what } = note {
                        self.fail(&format!("{who} {what}"));
                    }
                }
            }
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

    /// The machine says that something is due and wants nothing: a driver would spin.
    fn idle_spin(&self, relay: &Relay) {
        self.fail(&format!(
            "{} is due at once but wants nothing: {:#?}",
            relay.id, relay.machine
        ));
    }

    fn execute(&mut self, relay: &mut Relay, command: Command) {
        let lost = self.rough && self.chance(4);
        let done_all_the_same = self.random.bool();
        self.faults += u64::from(lost);
        let error = || Error::new(ErrorKind::Unavailable, "model", "no answer");
        let effect = !lost || done_all_the_same;
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
                Event::Released {
                    result: if lost { Err(error()) } else { Ok(()) },
                }
            }
            Command::LoadHolds { shards } => {
                let holds = self
                    .store
                    .holds
                    .values()
                    .filter(|(hold, _)| shards.iter().any(|owned| owned.shard == hold.shard))
                    .map(|(hold, due)| Hold {
                        state: self.store.state(hold, *due),
                        ..hold.clone()
                    })
                    .collect();
                Event::HoldsLoaded {
                    result: if lost { Err(error()) } else { Ok(holds) },
                }
            }
            Command::Fetch { request } => {
                if lost {
                    relay.reader = Reader::default();
                    Event::Fetched { result: Err(error()) }
                } else {
                    let result = Ok(self.fetch(relay, &request));
                    Event::Fetched { result }
                }
            }
            Command::Publish { batch, records } => {
                let receipt = Receipt {
                    outcomes: vec![None; records.len()],
                    failed: BTreeSet::new(),
                };
                for (index, record) in records.into_iter().enumerate() {
                    let key = record.message.order_key();
                    let skip = self.stops_key
                        && key.is_some_and(|key| {
                            relay.sink.open.values().any(|open| open.failed.contains(&key))
                        });
                    relay.sink.queue.push_back(Item {
                        batch,
                        index,
                        record,
                        skip,
                    });
                }
                relay.sink.open.insert(batch, receipt);
                Event::Accepted { batch }
            }
            Command::Purge => {
                self.purge(relay);
                Event::Purged
            }
            Command::Rebuild => Event::Rebuilt {
                result: if lost { Err(error()) } else { Ok(()) },
            },
            Command::Probe => Event::Probed {
                result: if lost { Err(error()) } else { Ok(()) },
            },
            Command::Settle { settlement } => {
                let settled = effect.then(|| self.settle(&settlement));
                Event::Settled {
                    result: settled.filter(|_| !lost).ok_or_else(error),
                }
            }
            Command::Promote { .. } => self.fail("promoted without being scheduled"),
        };
        relay.events.push(event);
    }

    fn fetch(&mut self, relay: &mut Relay, request: &FetchRequest) -> Fetched {
        let reader = &mut relay.reader;
        reader.passed.retain(|shard, (epoch, _)| {
            request
                .shards
                .iter()
                .any(|owned| owned.shard == *shard && owned.epoch == *epoch)
        });
        for owned in &request.shards {
            reader
                .passed
                .entry(owned.shard)
                .or_insert_with(|| (owned.epoch, BTreeSet::new()));
        }
        for reread in &request.reread {
            let Some((_, passed)) = reader.passed.get_mut(&reread.shard) else {
                continue;
            };
            let rows = &self.store.rows;
            passed.retain(|position| match &reread.scope {
                RereadScope::Shard => *position < reread.from,
                RereadScope::Message => *position != reread.from,
                RereadScope::Key(key) => {
                    rows.get(position)
                        .and_then(|row| row.message.order_key())
                        .as_ref()
                        != Some(key)
                }
            });
        }
        let mut records = Vec::new();
        let mut more = false;
        for (position, row) in &self.store.rows {
            let Some((_, passed)) = reader.passed.get_mut(&row.shard) else {
                continue;
            };
            let key = row.message.order_key();
            let topic: Arc<str> = row.message.topic().into();
            if !request.admits(row.shard, *position, &topic, key.as_ref()) {
                passed.insert(*position);
                continue;
            }
            if passed.contains(position) {
                let what = format!(
                    "{} forgot to ask again for {position} of shard {}",
                    relay.id, row.shard
                );
                for line in self.trace.iter().rev().take(80).rev() {
                    eprintln!("{line}");
                }
                panic!("seed {}: {what}\n{:#?}", self.seed, relay.machine);
            }
            if records.len() == request.max_rows {
                more = true;
                break;
            }
            passed.insert(*position);
            records.push(Record {
                shard: row.shard,
                position: *position,
                key_seq: None,
                attempts: 0,
                message: row.message.clone(),
                defect: None,
            });
        }
        Fetched::Batch { records, more }
    }

    fn settle(&mut self, settlement: &Settlement) -> Settled {
        let held = self
            .store
            .leases
            .held_by(&settlement.relay, millis(self.store.now));
        let (kept, lost) = settlement.fence(&held);
        for part in kept {
            let matches = |rows: &BTreeMap<Position, Row>, record: &RecordRef| {
                rows.get(&record.position)
                    .is_some_and(|row| row.message.id() == record.id)
            };
            for record in &part.delivered {
                if matches(&self.store.rows, record) {
                    if !self.seen.contains(&record.id) {
                        self.fail(&format!("{record:?} was settled as delivered and was not"));
                    }
                    self.store.rows.remove(&record.position);
                }
            }
            for death in &part.dead {
                if matches(&self.store.rows, &death.record)
                    && let Some(row) = self.store.rows.remove(&death.record.position)
                {
                    self.store.dead.insert(death.record.id, death.attempts);
                    if let (Some(key), Some(n)) = (row.message.order_key(), row.n) {
                        let high = self.high.entry(key).or_default();
                        // Buried: as good as seen. It may have been in doubt before, so it need not be the next.
                        *high = (*high).max(n);
                    }
                }
            }
            for change in &part.holds {
                match change {
                    HoldChange::Put(hold) => {
                        let retried = self.retries.get(&hold.head.id).copied().unwrap_or_default();
                        if !matches!(hold.scope, HoldScope::Topic(_)) && hold.attempts > retried + 1 {
                            self.fail(&format!(
                                "{:?} has {} attempts after {retried} retries",
                                hold.head, hold.attempts
                            ));
                        }
                        let due = match hold.state {
                            HoldState::Retrying { due_in } => Some(self.now + due_in),
                            HoldState::Parked => None,
                        };
                        self.store
                            .holds
                            .insert(place(hold.shard, &hold.scope, hold.head), (hold.clone(), due));
                    }
                    HoldChange::Clear(hold) => {
                        self.store
                            .holds
                            .remove(&place(hold.shard, &hold.scope, hold.head));
                    }
                }
            }
        }
        Settled { lost }
    }

    /// The sink does something with the first of what it has.
    fn sink_progress(&mut self, relay: &mut Relay) {
        if let Some(item) = relay.sink.queue.pop_front() {
            let outcome = self.outcome(&relay.sink, &item);
            self.trace.push(format!(
                "{:?} {} sink: {} {}",
                self.now,
                relay.id,
                item.record.position,
                brief(&format!("{outcome:?}"))
            ));
            if outcome == Outcome::Delivered {
                self.deliver(&item.record);
            }
            let whole = matches!(
                outcome,
                Outcome::Outage(_) | Outcome::Unknown(_) | Outcome::Broken(_)
            );
            if whole {
                self.faults += 1;
                relay.sink.dead.get_or_insert_with(|| outcome.clone());
            }
            let failed = !matches!(outcome, Outcome::Delivered | Outcome::Poison(_))
                || (outcome != Outcome::Delivered && self.stops_key);
            if failed && let Some(key) = item.record.message.order_key() {
                if self.stops_key {
                    for later in &mut relay.sink.queue {
                        later.skip |= later.record.message.order_key().as_ref() == Some(&key);
                    }
                }
                if let Some(receipt) = relay.sink.open.get_mut(&item.batch) {
                    receipt.failed.insert(key);
                }
            }
            if let (Outcome::Poison(_), false, false) = (&outcome, self.stops_key, self.park)
                && let Some(row) = self.committed.get(&item.record.message.id())
                && let (Some(key), Some(n)) = (row.message.order_key(), row.n)
            {
                // Such a sink delivers what follows a refused message at once: refused is as good as buried.
                let high = self.high.entry(key).or_default();
                *high = (*high).max(n);
            }
            if let Outcome::Retry(_) = outcome {
                *self.retries.entry(item.record.message.id()).or_default() += 1;
            }
            if let Some(receipt) = relay.sink.open.get_mut(&item.batch) {
                receipt.outcomes[item.index] = Some(outcome);
            }
            let batch = item.batch;
            if let Some(receipt) = relay.sink.open.get(&batch)
                && receipt.outcomes.iter().all(Option::is_some)
            {
                let outcomes = receipt.outcomes.iter().flatten().cloned().collect();
                relay.events.push(Event::Outcomes {
                    batch,
                    outcomes: Some(outcomes),
                });
            }
        }
    }

    fn outcome(&mut self, sink: &Sink, item: &Item) -> Outcome {
        if let Some(dead) = &sink.dead {
            return dead.clone();
        }
        if item.skip {
            return Outcome::Skipped;
        }
        if self.blocked.contains(item.record.message.topic()) {
            return Outcome::TopicBlocked("forbidden".into());
        }
        if !self.rough {
            return Outcome::Delivered;
        }
        match self.random.u8(..100) {
            0..4 => Outcome::Poison("poison".into()),
            4..12 if self.stops_key => Outcome::Retry("later".into()),
            12 => Outcome::Outage("down".into()),
            13 => {
                // Written, and nobody knows.
                if self.random.bool() {
                    self.deliver(&item.record);
                }
                Outcome::Unknown("no answer".into())
            }
            14 => Outcome::Broken("fatal".into()),
            _ => Outcome::Delivered,
        }
    }

    fn purge(&mut self, relay: &mut Relay) {
        // Of what is under way a prefix may have been written.
        let written = self.random.usize(..=relay.sink.queue.len());
        let dead = relay.sink.dead.take().is_some();
        for (index, item) in std::mem::take(&mut relay.sink.queue).into_iter().enumerate() {
            if index < written && !dead && !item.skip && !self.blocked.contains(item.record.message.topic()) {
                self.deliver(&item.record);
            }
        }
        for (batch, receipt) in &mut relay.sink.open {
            if receipt.outcomes.iter().any(Option::is_none) {
                let outcomes = receipt.outcomes.iter_mut().map(|outcome| {
                    outcome
                        .get_or_insert_with(|| Outcome::Unknown("purged".into()))
                        .clone()
                });
                relay.events.push(Event::Outcomes {
                    batch: *batch,
                    outcomes: Some(outcomes.collect()),
                });
            }
        }
    }

    fn deliver(&mut self, record: &Record) {
        self.deliveries += 1;
        if let Err(what) = deliver(&mut self.high, &mut self.seen, &self.committed, record) {
            self.fail(&what);
        }
    }

    /// Heals everything and sees that nothing is left behind.
    fn settle_down(&mut self) {
        self.rough = false;
        for mut relay in std::mem::take(&mut self.relays) {
            while !relay.sink.queue.is_empty() {
                self.sink_progress(&mut relay);
            }
            self.relays.push(relay);
        }
        self.blocked.clear();
        self.orphans.clear();
        while !self.open.is_empty() {
            self.end_transaction();
        }
        for relay in &mut self.relays {
            relay.asleep = Duration::ZERO;
        }
        for _ in 0..2_000_000 {
            if self.store.rows.is_empty() && self.store.holds.is_empty() {
                break;
            }
            self.step();
        }
        if !self.store.rows.is_empty() || !self.store.holds.is_empty() {
            let relays: Vec<_> = self
                .relays
                .iter()
                .map(|relay| (&relay.machine, &relay.commands, &relay.events))
                .collect();
            let state = format!(
                "rows {:?}\nholds {:?}\n{relays:#?}",
                self.store.rows.keys(),
                self.store.holds
            );
            self.fail(&format!("stranded\n{state}"));
        }
        for id in self.committed.keys() {
            if !self.seen.contains(id) && !self.store.dead.contains_key(id) {
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

impl Store {
    fn state(&self, hold: &Hold, due: Option<Duration>) -> HoldState {
        match (hold.state, due) {
            (HoldState::Parked, _) | (_, None) => HoldState::Parked,
            (HoldState::Retrying { .. }, Some(due)) => HoldState::Retrying {
                due_in: due.saturating_sub(self.now),
            },
        }
    }
}

fn place(shard: Shard, scope: &HoldScope, head: RecordRef) -> (Shard, HoldScope, Option<Position>) {
    (
        shard,
        scope.clone(),
        (*scope == HoldScope::Message).then_some(head.position),
    )
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap()
}

fn brief(text: &str) -> String {
    text.chars().take(600).collect()
}

/// The law of the log: only what was committed, and of each key no step further than the next.
fn deliver(
    high: &mut BTreeMap<OrderKey, u64>,
    seen: &mut BTreeSet<MessageId>,
    committed: &BTreeMap<MessageId, Row>,
    record: &Record,
) -> Result<(), String> {
    let id = record.message.id();
    let Some(row) = committed.get(&id) else {
        return Err(format!("{id} was delivered and never committed"));
    };
    seen.insert(id);
    if let (Some(key), Some(n)) = (row.message.order_key(), row.n) {
        let high = high.entry(key.clone()).or_default();
        if n > *high + 1 {
            return Err(format!("{key}: {n} was delivered after {high}"));
        }
        *high = (*high).max(n);
    }
    Ok(())
}

fn run(seed: u64) {
    let mut world = World::new(seed, true);
    for _ in 0..4_000 {
        world.step();
    }
    world.settle_down();
}

#[test]
fn nothing_is_lost_reordered_or_stranded_whatever_happens() {
    if let Ok(seed) = std::env::var("OUTBOX_SEED") {
        return run(seed.parse().unwrap());
    }
    let seeds = std::env::var("OUTBOX_SEEDS").map_or(300, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        run(seed);
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
        assert_eq!(world.deliveries, world.committed.len() as u64, "seed {seed}");
        assert_eq!(world.faults, 0);
    }
}
