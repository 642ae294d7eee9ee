//! The cursor against a model of its world: a server whose transactions end in any order, and a relay that fails, holds,
//! drops, asks again and changes shards.
//!
//! The model server answers a plan as the statements do, for either way to know what can have appeared below. The oracle is the simple reader: what a fetch may return are
//! the visible rows of its shards that are neither in flight nor held, the lowest of each key first. Everything is drawn
//! from one seed: `OUTBOX_SEED=n` replays one, `OUTBOX_SEEDS=n` runs so many.
//!
//! A [`Variant`] breaks one thing that the cursor rests on, in what it is told or in what is done with its plan; each
//! must be noticed, or the model proves nothing.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod relay;
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::relay::{Relay, Stage};
use self::server::{Database, Draft, LAG, Row};
use super::plan::within;
use super::transactions::MAX_MARKS;
use super::{
    Conclusion, Cursor, END, Found, Intake, Look, MAX_LANES, Pending, Place, Plan, Reach, START, Snapshot,
    Told, Transactions,
};
use crate::fetch::{FetchMode, FetchRequest, Held, Reread, RereadScope};
use crate::message::OrderKey;
use crate::shard::{Epoch, OwnedShard, Position, Shard};

/// How the store knows what can have appeared below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Transactions,
    Pending,
}

/// What the store knows.
enum Knowledge {
    Transactions(Transactions),
    Pending(Pending),
}

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Sound,
    /// The newest part is not read anew.
    NoLag,
    /// The newest part is read anew for half of the time that a statement may take.
    HalfLag,
    /// What is stored and not committed is forgotten.
    NoPending,
    /// The look leaves out what lanes read, of what is pending as well.
    PendingWithoutLanes,
    /// What was returned is passed over where it is wanted again, too.
    KnownAnywhere,
    /// What lanes go past is not looked at.
    LanesUnseen,
    /// A hold remembers where the scan began, and not what was pending.
    HoldForgetsPending,
    /// `xmax` passes for the next transaction number: it is only the last completed one, plus one.
    XmaxIsNext,
    /// Looks above the mark of the present snapshot's `xmax`, not of the one before.
    BoundByPresent,
    /// A sequence that was never used says its first number is drawn.
    CalledIgnored,
    /// Sessions keep positions in reserve.
    CachedSequence,
    /// A position is drawn before the transaction has its number.
    PositionFirst,
    /// A shard that was lost and regained keeps its position.
    PositionKept,
    /// Nothing is told of what was dropped.
    RereadInferred,
    /// A key that is let go is read from its head, not from where scans passed over it.
    LaneFromHead,
    /// A lane that is at its end leaves the main scan where it is, which has left the key out.
    NoRewind,
    /// A scan that stops says nothing of it.
    StopsInSilence,
    /// A scan that stops tells of the row behind.
    StopsTooFar,
}

struct World {
    seed: u64,
    variant: Variant,
    random: fastrand::Rng,
    database: Database,
    cursor: Cursor,
    knowledge: Knowledge,
    /// When the clock of the world stood at nought.
    dawn: Instant,
    relay: Relay,
    /// The epochs of all shards.
    epochs: BTreeMap<Shard, i64>,
    keys: usize,
    /// How many messages are still to be enqueued.
    budget: usize,
    max_rows: usize,
    max_bytes: usize,
    stride: usize,
    /// Whether the relay and the sink fail.
    rough: bool,
    /// Whether producers lock their keys.
    serial: bool,
    /// Settlements that are under way.
    settlements: Vec<u64>,
    /// What was delivered, and under which epoch.
    delivered: BTreeMap<(Shard, i64), i64>,
    /// The last first delivery of each key.
    latest: BTreeMap<usize, i64>,
    /// For how many fetches an eligible row has waited, and how many it may.
    waiting: BTreeMap<(Shard, i64, i64), (usize, usize)>,
    /// How often the sink was purged: what a fetch brings that was out meanwhile is dropped, too.
    generation: u64,
    ending: bool,
    reached: BTreeMap<&'static str, u64>,
    trace: Option<Vec<String>>,
}

type Outcome<T = ()> = Result<T, String>;

/// Where scans stopped.
type Stops = Vec<(Place, i64)>;

impl World {
    fn new(seed: u64, kind: Kind, variant: Variant, messages: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let (shards, topics) = (random.u16(1..=4), random.usize(1..=3));
        let keys = random.usize(1..=6);
        let serial = random.u8(..4) > 0;
        let topic_names: Vec<Arc<str>> = (0..topics).map(|topic| format!("topic-{topic}").into()).collect();
        let relay = Relay {
            keys: (0..keys)
                .map(|key| OrderKey {
                    topic: Arc::clone(&topic_names[key % topics]),
                    key: vec![u8::try_from(key).unwrap()].into(),
                })
                .collect(),
            topic_names,
            ..Relay::default()
        };
        let sessions = random.usize(1..=5);
        let mut world = Self {
            seed,
            variant,
            database: Database::new(variant, serial, sessions, kind == Kind::Pending),
            // Sweeps are ordered by hand.
            cursor: match kind {
                Kind::Transactions => Cursor::new(FetchMode::Cursor, Duration::MAX),
                Kind::Pending => Cursor::joint(FetchMode::Cursor, Duration::MAX),
            },
            knowledge: match kind {
                Kind::Transactions => Knowledge::Transactions(Transactions::new()),
                Kind::Pending => {
                    let lag = Duration::from_millis(match variant {
                        Variant::NoLag => 0,
                        Variant::HalfLag => LAG / 2,
                        _ => LAG,
                    });
                    let room = *random.choice(&[2, 4, 1_000, 1_000]).unwrap();
                    Knowledge::Pending(Pending::with_room(lag, room, room * 2))
                }
            },
            dawn: Instant::now(),
            relay,
            epochs: (0..shards).map(|shard| (Shard(shard), 1)).collect(),
            keys,
            budget: messages,
            max_rows: *random.choice(&[1, 2, 3, 5, 8, 20]).unwrap(),
            max_bytes: *random
                .choice(&[1, 6, 12, usize::MAX, usize::MAX, usize::MAX])
                .unwrap(),
            stride: usize::MAX,
            rough: random.u8(..5) > 0,
            serial,
            settlements: Vec::new(),
            delivered: BTreeMap::new(),
            latest: BTreeMap::new(),
            waiting: BTreeMap::new(),
            generation: 0,
            ending: false,
            reached: BTreeMap::new(),
            trace: std::env::var_os("OUTBOX_SEED").map(|_| Vec::new()),
            random,
        };
        for shard in 0..shards {
            world.relay.gain(Shard(shard), 1);
        }
        world.stride = *world.random.choice(&[1, 2, 6, 30, usize::MAX]).unwrap();
        world.cursor = world.cursor.striding(world.stride);
        world
    }

    fn reach(&mut self, what: &'static str) {
        *self.reached.entry(what).or_default() += 1;
        if let Some(trace) = &mut self.trace {
            trace.push(what.to_owned());
        }
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(line());
        }
    }

    fn fail<T>(&self, what: &str) -> Outcome<T> {
        Err(format!(
            "seed {}: {what}; replay with OUTBOX_SEED={}",
            self.seed, self.seed
        ))
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.random.u32(..n) == 0
    }

    fn draft(&mut self) -> Option<Draft> {
        if self.ending || self.budget == 0 {
            return None;
        }
        Some(self.any_draft())
    }

    fn any_draft(&mut self) -> Draft {
        let shards = u16::try_from(self.epochs.len()).unwrap();
        let key = (self.random.u8(..3) > 0).then(|| self.random.usize(..self.keys));
        let topics = self.relay.topic_names.len();
        Draft {
            shard: Shard(key.map_or_else(
                || self.random.u16(..shards),
                |key| u16::try_from(key).unwrap() % shards,
            )),
            topic: key.map_or_else(|| self.random.usize(..topics), |key| key % topics),
            key,
            bytes: self.random.usize(1..=4),
        }
    }

    fn now(&self) -> Instant {
        self.dawn + Duration::from_millis(self.database.clock)
    }

    fn step(&mut self) -> Outcome {
        match self.random.u8(..20) {
            0..=2 => self.fetch(),
            _ => self.other_step(),
        }
    }

    /// What happens while a fetch is out as well.
    fn other_step(&mut self) -> Outcome {
        self.database.tick();
        match self.random.u8(..20) {
            0..=8 => {
                let draft = self.draft();
                if self.database.produce(&mut self.random, draft) {
                    self.budget -= 1;
                }
            }
            9 => self.database.bystander(),
            10..=14 => return self.answer_of_sink(),
            15 => self.begin_settlement(),
            16 | 17 => self.end_settlement(),
            18 if self.rough && self.one_in(3) => self.change_shards(),
            _ => {}
        }
        Ok(())
    }

    /// The sink answers for some record.
    fn answer_of_sink(&mut self) -> Outcome {
        // It keeps the order within a key.
        let mut heads = BTreeSet::new();
        let candidates: Vec<(Shard, i64)> = self
            .relay
            .flights
            .iter()
            .filter(|(_, flight)| {
                flight.stage == Stage::Open && flight.key.is_none_or(|key| heads.insert(key))
            })
            .map(|(place, _)| *place)
            .collect();
        let Some(place) = self.random.choice(candidates) else {
            return Ok(());
        };
        let (key, topic) = {
            let flight = &self.relay.flights[&place];
            (flight.key, flight.topic)
        };
        let fault = if self.rough && !self.ending {
            self.random.u8(..24)
        } else {
            24
        };
        match fault {
            0..=3 => {
                self.reach("held");
                self.note(|| format!("{place:?} fails"));
                // It stays in flight until its hold is noted, or not.
                if self.random.bool()
                    && let Some(flight) = self.relay.flights.get_mut(&place)
                {
                    flight.stage = Stage::Resolved { delivered: false };
                }
                self.relay.fail(place);
                self.relay
                    .drop_flights(|own, flight| *own == place && flight.stage == Stage::Open);
                self.relay.answered(place, topic);
            }
            4 => {
                self.reach("topic held");
                self.note(|| format!("topic {topic} is blocked by {place:?}"));
                self.relay.block_topic(place, topic);
            }
            5 => {
                self.reach("unsent");
                self.generation += 1;
                let dropped = self.relay.drop_flights(|_, flight| flight.stage == Stage::Open);
                self.note(|| format!("unsent {dropped:?}"));
                for (shard, position) in dropped {
                    self.relay.reread(shard, position);
                }
            }
            _ => {
                self.note(|| format!("{place:?} is delivered"));
                if let Some(flight) = self.relay.flights.get_mut(&place) {
                    flight.stage = Stage::Resolved { delivered: true };
                }
                self.relay.end_hold(place, key);
                self.relay.answered(place, topic);
                let epoch = self.epochs[&place.0];
                let before = self.delivered.insert(place, epoch);
                if before == Some(epoch) {
                    return self.fail(&format!("{place:?} is delivered twice"));
                }
                if before.is_none()
                    && self.serial
                    && let Some(key) = key
                    && self.latest.insert(key, place.1) > Some(place.1)
                {
                    return self.fail(&format!("{place:?} is out of order"));
                }
            }
        }
        Ok(())
    }

    fn begin_settlement(&mut self) {
        if self.settlements.len() >= 2 {
            return;
        }
        let mut places = Vec::new();
        let mut deleted = Vec::new();
        for (place, flight) in &self.relay.flights {
            if let Stage::Resolved { delivered } = flight.stage
                && self.random.u8(..4) > 0
            {
                places.push((*place, delivered));
                if delivered {
                    deleted.push(*place);
                }
            }
        }
        self.note(|| format!("settling {deleted:?}"));
        let xid = self.database.begin_settlement(deleted);
        for (place, delivered) in places {
            if let Some(flight) = self.relay.flights.get_mut(&place) {
                flight.stage = Stage::Settling { delivered, by: xid };
            }
        }
        self.settlements.push(xid);
    }

    /// A settlement commits or not, and the relay learns of it or not.
    fn end_settlement(&mut self) {
        if self.settlements.is_empty() {
            return;
        }
        let xid = self.settlements.remove(0);
        let commits = !self.rough || self.random.u8(..6) > 0;
        let known = commits && (!self.rough || self.random.u8(..6) > 0);
        self.database.end_settlement(xid, commits);
        self.note(|| format!("settled by {xid}: commits {commits}, known {known}"));
        self.relay.flights.retain(|_, flight| match flight.stage {
            Stage::Settling { delivered, by } if by == xid => {
                flight.stage = Stage::Resolved { delivered };
                !known
            }
            _ => true,
        });
        if commits && !known {
            self.reach("settled, unknown");
        }
    }

    fn change_shards(&mut self) {
        let shards: Vec<Shard> = self.epochs.keys().copied().collect();
        let shard = self.random.choice(shards).unwrap();
        match self.relay.owned.get_mut(&shard) {
            None => self.gain(shard),
            Some(owned) if self.random.bool() => {
                owned.active = !owned.active || self.ending;
                self.reach("not asked for");
            }
            Some(_) => {
                self.note(|| format!("{shard:?} is lost"));
                self.relay.lose(shard);
                self.reach("lost");
                if self.random.bool() {
                    self.gain(shard);
                }
            }
        }
    }

    fn gain(&mut self, shard: Shard) {
        // A settlement that is open keeps the lease row.
        if !self.database.is_settling(shard) {
            self.reach("regained");
            let epoch = self.epochs.get_mut(&shard).unwrap();
            *epoch += 1;
            let epoch = *epoch;
            self.note(|| format!("{shard:?} is gained, epoch {epoch}"));
            self.relay.gain(shard, epoch);
        }
    }

    fn some_steps(&mut self) -> Outcome {
        while self.random.bool() {
            self.other_step()?;
        }
        Ok(())
    }

    fn fetch(&mut self) -> Outcome {
        if self.relay.flights.len() > 24 || self.relay.owned.values().all(|owned| !owned.active) {
            return Ok(());
        }
        self.database.vacuum();
        let generation = self.generation;
        let mut request = self.relay.request(&mut self.random, self.ending);
        request.max_rows = self.max_rows;
        request.max_bytes = self.max_bytes;
        let plan = self.plan(&request);
        self.note(|| format!("asks {request:?}\n  {plan:?}"));
        self.some_steps()?;

        // The snapshot is taken; then the sequence is read; then the next transaction number.
        let snapshot = self.database.snapshot();
        self.some_steps()?;
        let last = self.database.last();
        self.some_steps()?;
        let told = self.database.tell(&snapshot, last);

        let mut intake = Intake::new(&plan);
        let mut taken: Vec<Row> = Vec::new();
        let (answer, stops) = self.answer(&plan, &request, &snapshot);
        for (place, row) in answer {
            if intake.offer(&plan, place, row.position, row.draft.bytes) {
                taken.push(row);
            }
        }
        for (place, position) in stops {
            self.reach(match place {
                Place::Shard(_) => "stopped",
                _ => "lane stopped",
            });
            if self.variant != Variant::StopsInSilence {
                intake.stopped(place, position);
            }
        }
        self.note(|| {
            format!(
                "  {told:?} gives {:?}",
                taken.iter().map(Row::place).collect::<Vec<_>>()
            )
        });
        let conclusion = self.conclude(plan, &request, &intake, &told, &taken)?;
        self.check(&request, &snapshot, &taken, &conclusion)?;
        self.some_steps()?;

        let current = self.generation == generation && (!self.rough || self.ending || !self.one_in(16));
        for row in &taken {
            let (shard, position) = row.place();
            let epoch = request
                .shards
                .iter()
                .find(|asked| asked.shard == shard)
                .unwrap()
                .epoch;
            if self
                .relay
                .owned
                .get(&shard)
                .is_none_or(|owned| owned.epoch != epoch)
            {
                continue;
            }
            if current {
                let crowded = self.rough && !self.ending && self.one_in(16);
                self.relay.take(row, crowded);
            } else {
                self.reach("not taken");
                self.relay.reread(shard, position);
            }
        }
        if taken.is_empty() && !conclusion.more && current {
            self.reach("nothing");
            for place in self.relay.drop_vanished(&request) {
                let there = self
                    .database
                    .rows
                    .iter()
                    .any(|row| row.place() == place && row.visible(&snapshot));
                if there {
                    return self.fail(&format!("{place:?} was taken for gone"));
                }
            }
        }
        Ok(())
    }

    fn plan(&mut self, request: &FetchRequest) -> Plan {
        if self.one_in(40) {
            self.reach("sweep");
            self.cursor.sweep_now();
        }
        if self.variant == Variant::LaneFromHead {
            self.cursor.scans.0.clear();
        }
        let mut told = request.clone();
        if self.variant == Variant::PositionKept {
            told.shards.iter_mut().for_each(|owned| owned.epoch = Epoch(1));
        }
        if self.variant == Variant::RereadInferred {
            told.reread.clear();
        }
        let reach = match &mut self.knowledge {
            Knowledge::Transactions(transactions) => transactions.reach(),
            Knowledge::Pending(pending) => pending.reach(&told.in_flight),
        };
        self.cursor.plan(&told, reach)
    }

    /// Answers a plan as the statement does: the rows, and where scans stopped.
    fn answer(&self, plan: &Plan, request: &FetchRequest, snapshot: &Snapshot) -> (Vec<(Place, Row)>, Stops) {
        let low = match &self.knowledge {
            _ if plan.from_start => START,
            Knowledge::Pending(pending) => pending.low(),
            Knowledge::Transactions(transactions) => {
                let (mut below, running) = transactions.finished();
                if self.variant == Variant::BoundByPresent {
                    below = transactions.bound(snapshot.xmax);
                }
                running
                    .iter()
                    .filter(|(xid, _)| snapshot.sees(*xid))
                    .map(|(_, low)| *low)
                    .fold(below, i64::min)
            }
        };
        let mut rows: Vec<Row> = self
            .database
            .rows
            .iter()
            .filter(|row| row.visible(snapshot))
            .copied()
            .collect();
        rows.sort_unstable_by_key(|row| row.position);
        let skip: BTreeSet<i64> = plan.skip.iter().copied().collect();
        let number = |key: &OrderKey| usize::from(key.key[0]);
        let topics: BTreeSet<usize> = (0..self.relay.topic_names.len())
            .filter(|topic| request.held.topics.contains(&self.relay.topic_names[*topic]))
            .collect();
        let (mut answer, mut stops) = (Vec::new(), Vec::new());
        // The rows that a scan comes across, and those of them that it is for.
        let mut scan = |place: Place, quota: usize, all: Vec<&Row>, wanted: &dyn Fn(&Row) -> bool| {
            let there = all.len().min(plan.stride);
            let of_place: Vec<_> = all[..there]
                .iter()
                .filter(|row| wanted(row))
                .take(quota)
                .map(|row| (place, **row))
                .collect();
            let behind = usize::from(self.variant == Variant::StopsTooFar);
            if there == plan.stride
                && of_place.len() < quota
                && let Some(last) = all.get(there - 1 + behind)
            {
                stops.push((place, last.position));
            }
            of_place
        };
        for single in &plan.singles {
            answer.extend(
                rows.iter()
                    .filter(|row| row.place() == *single && !topics.contains(&row.draft.topic))
                    .map(|row| (Place::Single, *row)),
            );
        }
        for (index, lane) in plan.lanes.iter().enumerate() {
            let key = number(&lane.key);
            let of_shard = rows
                .iter()
                .filter(|row| {
                    row.draft.shard == lane.shard
                        && (row.position > lane.after.min(low) || plan.awaits(row.position))
                        && row.position <= lane.upto
                })
                .collect();
            answer.extend(scan(Place::Lane(index), lane.quota, of_shard, &|row| {
                row.draft.key == Some(key) && !skip.contains(&row.position)
            }));
        }
        let left_out: BTreeSet<usize> = (request.held.keys.iter().map(|(_, key)| key))
            .chain(plan.lanes.iter().map(|lane| &lane.key))
            .map(number)
            .collect();
        let joint = matches!(self.knowledge, Knowledge::Pending(_));
        let anywhere = self.variant == Variant::KnownAnywhere;
        let own = |shard| request.shards.iter().any(|owned| owned.shard == shard);
        for (index, asked) in plan.shards.iter().enumerate() {
            let in_shard = |row: &&Row| {
                if joint {
                    own(row.draft.shard)
                } else {
                    row.draft.shard == asked.shard
                }
            };
            let wanted = |row: &Row| {
                !skip.contains(&row.position)
                    && !topics.contains(&row.draft.topic)
                    && !row.draft.key.is_some_and(|key| left_out.contains(&key))
            };
            let awaited = |row: &&Row| plan.awaits(row.position);
            let new = |row: &&Row| {
                (row.position > asked.after && !(anywhere && within(&plan.known, row.position)))
                    || (row.position > low && !within(&plan.known, row.position))
            };
            let place = Place::Shard(index);
            let of_shard = rows.iter().filter(in_shard);
            if joint {
                // What is awaited is a part of its own, with as many rows.
                let first = of_shard.clone().filter(|row| awaited(row) && !new(row));
                let first = first.filter(|row| wanted(row)).take(asked.quota);
                answer.extend(first.map(|row| (place, *row)));
                let rest = of_shard.filter(new).collect();
                answer.extend(scan(place, asked.quota, rest, &wanted));
            } else {
                let all = of_shard.filter(|row| awaited(row) || new(row)).collect();
                answer.extend(scan(place, asked.quota, all, &wanted));
            }
        }
        (answer, stops)
    }

    fn conclude(
        &mut self,
        mut plan: Plan,
        request: &FetchRequest,
        intake: &Intake,
        told: &Told,
        taken: &[Row],
    ) -> Outcome<Conclusion> {
        if self.variant == Variant::NoRewind {
            plan.lanes.iter_mut().for_each(|lane| lane.upto = END);
        }
        if self.variant == Variant::HoldForgetsPending {
            plan.pending.clear();
        }
        let low = match &mut self.knowledge {
            Knowledge::Transactions(transactions) => transactions.learn(told),
            Knowledge::Pending(pending) => pending.low(),
        };
        let conclusion = self.cursor.conclude(&plan, intake, low);
        self.some_steps()?;
        let (mut spans, now) = (self.cursor.passed(&plan, low), self.now());
        if self.variant == Variant::LanesUnseen {
            spans.retain(|span| span.lane.is_none());
        }
        let returned = || taken.iter().map(|row| row.position);
        if let Knowledge::Pending(pending) = &mut self.knowledge
            && let Some(look) = pending.look_past(&plan, spans, returned, now)
        {
            self.some_steps()?;
            let found = self.look(&look, &plan, request);
            self.note(|| format!("  {look:?} finds {found:?}"));
            self.some_steps()?;
            let now = self.now();
            if let Knowledge::Pending(pending) = &mut self.knowledge {
                pending.learn(look, found, now);
                if pending.ranges() > 0 {
                    self.reach("pending");
                }
            }
        }
        Ok(conclusion)
    }

    /// Answers a look as the statement does.
    fn look(&self, look: &Look, plan: &Plan, request: &FetchRequest) -> Found {
        let rows = self.database.dirty();
        let number = |key: &OrderKey| usize::from(key.key[0]);
        let own = |draft: &Draft| request.shards.iter().any(|owned| owned.shard == draft.shard);
        let held = |draft: &Draft| {
            let topic = &self.relay.topic_names[draft.topic];
            request.held.topics.contains(topic)
                || draft.key.is_some_and(|key| {
                    let keys = &request.held.keys;
                    keys.contains(&(draft.shard, self.relay.keys[key].clone()))
                })
        };
        let in_lane = |draft: &Draft| {
            draft
                .key
                .is_some_and(|key| plan.lanes.iter().any(|lane| number(&lane.key) == key))
        };
        let mut found = Found {
            top: rows.last().map(|(position, _)| *position),
            rows: Vec::new(),
        };
        if self.variant == Variant::NoPending {
            return found;
        }
        for (position, draft) in &rows {
            let pending = look
                .pending
                .iter()
                .any(|(first, last)| (first..=last).contains(&position));
            let passed = self.variant == Variant::PendingWithoutLanes && in_lane(draft);
            if pending && !held(draft) && !passed {
                found.rows.push((0, *position));
            }
        }
        for (index, span) in look.spans.iter().enumerate() {
            let wanted = |draft: &Draft| match span.lane {
                Some(lane) => draft.key == Some(number(&plan.lanes[lane].key)),
                None => own(draft) && !held(draft) && !in_lane(draft),
            };
            let of_span = rows
                .iter()
                .filter(|(position, draft)| *position > span.above && *position <= span.upto && wanted(draft))
                .take(look.limit);
            found
                .rows
                .extend(of_span.map(|(position, _)| (index + 1, *position)));
        }
        found
    }

    /// Compares a batch with what the simple reader would choose from.
    fn check(
        &mut self,
        request: &FetchRequest,
        snapshot: &Snapshot,
        taken: &[Row],
        conclusion: &Conclusion,
    ) -> Outcome {
        let flying: BTreeSet<(Shard, i64)> = request
            .in_flight
            .iter()
            .map(|(shard, position)| (*shard, position.0))
            .collect();
        let mut eligible: Vec<Row> = self
            .database
            .rows
            .iter()
            .filter(|row| {
                row.visible(snapshot)
                    && request.shards.iter().any(|owned| owned.shard == row.draft.shard)
                    && !flying.contains(&row.place())
                    && !request.held.holds(
                        row.draft.shard,
                        Position(row.position),
                        &self.relay.topic_names[row.draft.topic],
                        row.draft.key.map(|key| &self.relay.keys[key]),
                    )
            })
            .copied()
            .collect();
        eligible.sort_unstable_by_key(|row| row.position);

        let mut seen = BTreeSet::new();
        for row in taken {
            let place = row.place();
            if !seen.insert(place) {
                return self.fail(&format!("{place:?} is returned twice at once"));
            }
            if !eligible.iter().any(|own| own.place() == place) {
                return self.fail(&format!("{place:?} is in flight, held or not asked for"));
            }
        }
        for key in 0..self.keys {
            let of_key = |row: &&Row| row.draft.key == Some(key);
            let (got, lowest) = (taken.iter().filter(of_key), eligible.iter().filter(of_key));
            if let Some((got, lowest)) = got
                .zip(lowest)
                .find(|(got, lowest)| got.position != lowest.position)
            {
                return self.fail(&format!(
                    "{:?} is passed over for {:?}",
                    lowest.place(),
                    got.place()
                ));
            }
        }
        if taken.len() > request.max_rows {
            return self.fail("more rows than asked for");
        }
        let bytes: usize = taken.iter().map(|row| row.draft.bytes).sum();
        if taken.len() > 1 && bytes > request.max_bytes {
            return self.fail("more bytes than asked for");
        }
        if taken.is_empty() && !conclusion.more && !eligible.is_empty() {
            return self.fail(&format!(
                "nothing is left, it says, but {:?}",
                eligible[0].place()
            ));
        }
        if conclusion.surplus > 0 {
            return self.fail("a sweep found what was passed over");
        }
        self.check_patience(request, &eligible, &seen)?;
        self.check_memory(request)
    }

    fn check_patience(
        &mut self,
        request: &FetchRequest,
        eligible: &[Row],
        taken: &BTreeSet<(Shard, i64)>,
    ) -> Outcome {
        // What begins anew for a shard begins anew for its rows.
        let anew = |shard: Shard| {
            request
                .reread
                .iter()
                .any(|reread| reread.shard == shard && reread.scope == RereadScope::Shard)
        };
        let epochs = &self.epochs;
        self.waiting
            .retain(|(shard, _, epoch), _| !anew(*shard) && epochs[shard] == *epoch);
        let at_once = request.max_rows.min(request.max_bytes / 4).max(1);
        let shards = self.epochs.len();
        // What is committed later with lower positions goes first, as with the simple reader.
        let ahead = eligible.len()
            + self.database.open_rows()
            + if at_once >= 4 {
                0
            } else {
                self.database.rows.len() - eligible.len()
            };
        let rows = self.database.rows.len() + self.database.open_rows();
        let stops = (shards + MAX_LANES) * rows / self.stride;
        let bound = (shards + 1) * ahead.div_ceil(at_once) + 2 * shards + 4 + stops;
        let left = eligible
            .iter()
            .filter(|row| !taken.contains(&row.place()))
            .map(|row| {
                let (shard, position) = row.place();
                let place = (shard, position, epochs[&shard]);
                let (fetches, bound) = self.waiting.get(&place).copied().unwrap_or((0, bound));
                (place, (fetches + 1, bound))
            })
            .collect();
        self.waiting = left;
        for (place, (fetches, bound)) in &self.waiting {
            if fetches > bound {
                return self.fail(&format!("{place:?} has waited for {fetches} fetches"));
            }
        }
        Ok(())
    }

    /// What is kept grows with what is held, never with what lies in the table.
    fn check_memory(&mut self, request: &FetchRequest) -> Outcome {
        let cursor = &self.cursor;
        let (held, lanes) = (request.held.keys.len(), cursor.lanes.len());
        if lanes > held + MAX_LANES {
            return self.fail(&format!("{lanes} lanes for {held} held keys"));
        }
        let marks = match &self.knowledge {
            Knowledge::Transactions(transactions) => transactions.marks(),
            Knowledge::Pending(_) => 0,
        };
        if marks > MAX_MARKS + 1 {
            return self.fail("too many marks");
        }
        if cursor.scans.0.len() > held + request.held.topics.len() + 1 {
            return self.fail("too many scans");
        }
        if cursor.topics.len() != request.held.topics.len() {
            return self.fail("topics are not those that are held");
        }
        if marks > MAX_MARKS / 2 {
            self.reach("many marks");
        }
        if lanes >= 2 {
            self.reach("lanes");
        }
        Ok(())
    }

    /// Everything heals, and ends.
    fn settle_down(&mut self) -> Outcome {
        self.ending = true;
        let shards: Vec<Shard> = self.epochs.keys().copied().collect();
        for _ in 0..100 + self.database.rows.len() * 20 {
            for shard in &shards {
                match self.relay.owned.get_mut(shard) {
                    Some(owned) => owned.active = true,
                    None => self.gain(*shard),
                }
            }
            self.fetch()?;
            for _ in 0..12 {
                self.answer_of_sink()?;
                self.database.produce(&mut self.random, None);
            }
            self.begin_settlement();
            self.end_settlement();
            self.database.vacuum();
            if self.database.is_quiet() && self.database.rows.is_empty() && self.settlements.is_empty() {
                return Ok(());
            }
        }
        let left: Vec<(Shard, i64)> = self.database.rows.iter().map(Row::place).collect();
        self.fail(&format!("never delivered: {left:?}"))
    }
}

fn run(seed: u64, kind: Kind, variant: Variant, messages: usize) -> Outcome<BTreeMap<&'static str, u64>> {
    let mut world = World::new(seed, kind, variant, messages);
    let outcome = (0..messages * 8)
        .try_for_each(|_| world.step())
        .and_then(|()| world.settle_down());
    if let Some(trace) = world.trace {
        println!("{}", trace.join("\n"));
    }
    outcome.map(|()| world.reached)
}

fn nothing_is_lost(kind: Kind, reaches: &[&'static str]) {
    if let Ok(seed) = std::env::var("OUTBOX_SEED") {
        run(seed.parse().unwrap(), kind, Variant::Sound, 30).unwrap();
        return;
    }
    let seeds: u64 = std::env::var("OUTBOX_SEEDS").map_or(5_000, |seeds| seeds.parse().unwrap());
    let mut reached: BTreeMap<&'static str, u64> = BTreeMap::new();
    for seed in 0..seeds {
        for (what, times) in run(seed, kind, Variant::Sound, 30).unwrap() {
            *reached.entry(what).or_default() += times;
        }
    }
    println!("{reached:?}");
    // A model that does not get there proves nothing.
    for what in [
        "held",
        "lanes",
        "lost",
        "not asked for",
        "not taken",
        "nothing",
        "regained",
        "settled, unknown",
        "stopped",
        "lane stopped",
        "sweep",
        "topic held",
        "unsent",
    ]
    .iter()
    .chain(reaches)
    {
        assert!(reached.contains_key(what), "never {what}");
    }
}

#[test]
fn nothing_is_lost_reordered_or_starved_whatever_happens() {
    nothing_is_lost(Kind::Transactions, &[]);
}

#[test]
fn nothing_is_lost_reordered_or_starved_by_dirty_reads() {
    nothing_is_lost(Kind::Pending, &["pending"]);
}

/// One transaction stays open while thousands end: marks are thinned out, and its rows are found all the same.
#[test]
fn a_transaction_that_stays_open_loses_nothing() {
    let mut thinned = 0;
    for seed in 0..20 {
        let mut world = World::new(seed, Kind::Transactions, Variant::Sound, 1_000);
        // Its keys are its own, or the order of its rows would be nobody's promise.
        world.serial = false;
        let draft = world.any_draft();
        world.database.pin(draft);
        (0..6_000)
            .try_for_each(|_| world.step())
            .and_then(|()| world.settle_down())
            .unwrap();
        thinned += world.reached.get("many marks").copied().unwrap_or_default();
    }
    assert!(thinned > 0, "never many marks");
}

/// Nothing appears below what was read by now.
const fn quiet() -> Reach {
    Reach::above(100)
}

/// A request that has room for so many rows of a byte.
fn of_one_shard(room: usize) -> FetchRequest {
    FetchRequest {
        shards: vec![OwnedShard {
            shard: Shard(0),
            epoch: Epoch(1),
        }],
        max_rows: room,
        max_bytes: room,
        ..FetchRequest::default()
    }
}

/// A lane that never ends has its share and no more, even where a batch has room for one row only.
#[test]
fn an_endless_lane_starves_nobody() {
    let mut cursor = Cursor::new(FetchMode::Cursor, Duration::MAX);
    let key = OrderKey {
        topic: "t".into(),
        key: "k".into(),
    };
    let mut request = of_one_shard(1);
    let plan = cursor.plan(&request, quiet());
    cursor.conclude(&plan, &Intake::new(&plan), 100);
    request.reread.push(Reread {
        shard: Shard(0),
        scope: RereadScope::Key(key),
        from: Position(1),
    });
    let (mut of_lane, mut of_shard) = (0, 0);
    for position in 1..=20 {
        let plan = cursor.plan(&request, quiet());
        request.reread.clear();
        let mut intake = Intake::new(&plan);
        if let Some(lane) = plan.lanes.first()
            && lane.quota > 0
        {
            of_lane += u32::from(intake.offer(&plan, Place::Lane(0), position, 5));
        }
        of_shard += u32::from(intake.offer(&plan, Place::Shard(0), 100 + position, 5));
        cursor.conclude(&plan, &intake, 100);
    }
    assert_eq!((of_lane, of_shard), (10, 10));
}

/// Fetches from a table in which all is held, at each position up to `last`; says whether that was all.
fn goes_past(cursor: &mut Cursor, request: &mut FetchRequest, low: i64, last: i64) -> bool {
    let plan = cursor.plan(request, Reach::above(low));
    request.reread.clear();
    let mut intake = Intake::new(&plan);
    let stride = i64::try_from(plan.stride).unwrap();
    let mut scan = |place: Place, after: i64, upto: i64| {
        let base = if plan.from_start { 0 } else { after.clamp(0, low) };
        if base + stride < upto {
            intake.stopped(place, base + stride);
        }
    };
    scan(Place::Shard(0), plan.shards[0].after, last);
    for (index, lane) in plan.lanes.iter().enumerate() {
        scan(Place::Lane(index), lane.after, lane.upto.min(last));
    }
    !cursor.conclude(&plan, &intake, low).more
}

/// Where transactions end without end that began long ago, each fetch begins far below, among what is held. It must get to
/// what is new all the same.
#[test]
fn scans_that_begin_ever_farther_below_get_to_the_end() {
    for often in [1, 3] {
        let mut cursor = Cursor::new(FetchMode::Cursor, Duration::MAX).striding(10);
        let (mut request, mut ends) = (of_one_shard(1), 0);
        for last in 300..500 {
            // Of each fetch, or of every third, something is committed 300 rows back.
            let low = if last % often == 0 { last - 300 } else { last };
            ends += u32::from(goes_past(&mut cursor, &mut request, low, last));
            assert!(cursor.stride.each(1) <= 640, "{:?}", cursor.stride);
        }
        assert!(ends > 20, "{ends} of 200 fetches, low at every {often}");
    }
}

/// Every third fetch all is wanted again, as when a sink is purged.
#[test]
fn scans_that_are_sent_back_get_to_the_end() {
    let mut cursor = Cursor::new(FetchMode::Cursor, Duration::MAX).striding(10);
    let (mut request, last) = (of_one_shard(1), 1_000);
    let ended = (0..200).position(|fetch| {
        if fetch % 3 == 0 {
            request.reread.push(Reread {
                shard: Shard(0),
                scope: RereadScope::Shard,
                from: Position(1),
            });
        }
        goes_past(&mut cursor, &mut request, last, last)
    });
    assert!(ended.is_some(), "{:?}", cursor.stride);
}

/// Keys are let go all the time while the main scan goes past what is held.
#[test]
fn lanes_that_end_take_nothing_back_of_a_long_way() {
    for keys in [1, 4, 40] {
        let mut cursor = Cursor::new(FetchMode::Cursor, Duration::MAX).striding(50);
        let (mut request, last) = (of_one_shard(1), 1_000);
        let position = |cursor: &Cursor| cursor.shards.get(&Shard(0)).map_or(1, |main| main.position);
        for fetches in 0.. {
            assert!(fetches < 200, "{keys} keys, it is still at {:?}", cursor.shards);
            let key = |number: u8| OrderKey {
                topic: "t".into(),
                key: vec![number].into(),
            };
            request.reread.extend((0..keys).map(|number| Reread {
                shard: Shard(0),
                scope: RereadScope::Key(key(number)),
                from: Position(position(&cursor)),
            }));
            goes_past(&mut cursor, &mut request, last, last);
            // At the end there is nothing left to be in vain.
            if position(&cursor) > last - 50 {
                break;
            }
            assert_eq!(
                cursor.stride.each(1),
                50,
                "{keys} keys, and not by longer strides"
            );
        }
    }
}

/// A sweep that is due all the time begins when all has been read, and not before.
#[test]
fn sweeps_let_a_long_way_come_to_its_end() {
    let mut cursor = Cursor::new(FetchMode::Cursor, Duration::ZERO).striding(10);
    let (mut request, last) = (of_one_shard(1), 1_000);
    for _ in 0..3 {
        let ended = (0..150).position(|_| goes_past(&mut cursor, &mut request, last, last));
        assert!(ended.is_some_and(|fetches| fetches >= 50), "{ended:?}");
    }
}

/// What the relay has in flight is not returned, whether it was held before or not.
#[test]
fn a_message_in_flight_is_not_asked_for() {
    let mut cursor = Cursor::new(FetchMode::Cursor, Duration::MAX);
    let place = (Shard(0), Position(7));
    let mut request = FetchRequest {
        in_flight: vec![place],
        held: Arc::new(Held {
            messages: [place].into(),
            ..Held::default()
        }),
        ..of_one_shard(10)
    };
    assert!(cursor.plan(&request, quiet()).singles.is_empty());
    request.held = Arc::default();
    assert!(cursor.plan(&request, quiet()).singles.is_empty());
}

fn catches(kind: Kind, variant: Variant) {
    let caught = (0..1_000).find_map(|seed| run(seed, kind, variant, 30).err());
    println!("{}", caught.as_deref().unwrap_or("nothing was noticed"));
    assert!(caught.is_some(), "{variant:?} goes unnoticed");
}

#[test]
fn catches_xmax_taken_for_the_next_number() {
    catches(Kind::Transactions, Variant::XmaxIsNext);
}

#[test]
fn catches_a_bound_by_the_present_snapshot() {
    catches(Kind::Transactions, Variant::BoundByPresent);
}

#[test]
fn catches_a_fresh_sequence_taken_for_used() {
    catches(Kind::Transactions, Variant::CalledIgnored);
}

#[test]
fn catches_a_sequence_with_a_cache() {
    catches(Kind::Transactions, Variant::CachedSequence);
}

#[test]
fn catches_a_position_before_its_transaction() {
    catches(Kind::Transactions, Variant::PositionFirst);
}

#[test]
fn catches_a_position_kept_for_a_regained_shard() {
    catches(Kind::Transactions, Variant::PositionKept);
    catches(Kind::Pending, Variant::PositionKept);
}

#[test]
fn catches_rereads_that_are_not_told() {
    catches(Kind::Transactions, Variant::RereadInferred);
    catches(Kind::Pending, Variant::RereadInferred);
}

#[test]
fn catches_lanes_that_begin_at_the_head() {
    catches(Kind::Transactions, Variant::LaneFromHead);
    catches(Kind::Pending, Variant::LaneFromHead);
}

#[test]
fn catches_a_main_scan_that_is_not_set_back() {
    catches(Kind::Transactions, Variant::NoRewind);
    catches(Kind::Pending, Variant::NoRewind);
    catches(Kind::Transactions, Variant::StopsInSilence);
    catches(Kind::Pending, Variant::StopsInSilence);
    catches(Kind::Transactions, Variant::StopsTooFar);
    catches(Kind::Pending, Variant::StopsTooFar);
}

#[test]
fn catches_a_missing_or_short_lag() {
    catches(Kind::Pending, Variant::NoLag);
    catches(Kind::Pending, Variant::HalfLag);
}

#[test]
fn catches_what_is_pending_when_it_is_forgotten() {
    catches(Kind::Pending, Variant::NoPending);
    catches(Kind::Pending, Variant::HoldForgetsPending);
}

#[test]
fn catches_what_was_returned_when_it_is_passed_over_for_ever() {
    catches(Kind::Pending, Variant::KnownAnywhere);
}

#[test]
fn catches_lanes_past_which_nobody_looks() {
    catches(Kind::Pending, Variant::LanesUnseen);
    catches(Kind::Pending, Variant::PendingWithoutLanes);
}
