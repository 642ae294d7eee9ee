//! The cursor against a model of its world: a server whose transactions end in any order, and a relay that fails, holds,
//! drops, asks again and changes shards.
//!
//! The model server answers a plan as the statement does. The oracle is the simple reader: what a fetch may return are
//! the visible rows of its shards that are neither in flight nor held, the lowest of each key first. Everything is drawn
//! from one seed: `OUTBOX_SEED=n` replays one, `OUTBOX_SEEDS=n` runs so many.
//!
//! A [`Variant`] breaks one thing that the cursor rests on, in what it is told or in what is done with its plan; each
//! must be noticed, or the model proves nothing.

mod relay;
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_core::{Epoch, FetchRequest, Held, OrderKey, OwnedShard, Position, Reread, RereadScope, Shard};

use self::relay::{Relay, Stage};
use self::server::{Database, Draft, Row};
use super::{Conclusion, Cursor, END, Intake, MAX_LANES, MAX_MARKS, Place, Plan, Server, Snapshot};

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Sound,
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
}

struct World {
    seed: u64,
    variant: Variant,
    random: fastrand::Rng,
    database: Database,
    cursor: Cursor,
    relay: Relay,
    /// The epochs of all shards.
    epochs: BTreeMap<Shard, i64>,
    keys: usize,
    /// How many messages are still to be enqueued.
    budget: usize,
    max_rows: usize,
    max_bytes: usize,
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

impl World {
    fn new(seed: u64, variant: Variant, messages: usize) -> Self {
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
            database: Database::new(variant, serial, sessions),
            // Sweeps are ordered by hand.
            cursor: Cursor::new(Duration::MAX, false),
            relay,
            epochs: (0..shards).map(|shard| (Shard(shard), 1)).collect(),
            keys,
            budget: messages,
            max_rows: *random.choice(&[1, 2, 3, 5, 8, 20]).unwrap(),
            max_bytes: *random
                .choice(&[1, 6, 12, usize::MAX, usize::MAX, usize::MAX])
                .unwrap(),
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

    fn step(&mut self) -> Outcome {
        match self.random.u8(..20) {
            0..=2 => self.fetch(),
            _ => self.other_step(),
        }
    }

    /// What happens while a fetch is out as well.
    fn other_step(&mut self) -> Outcome {
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
        let server = self.database.tell(&snapshot, last);

        let mut intake = Intake::new(&plan);
        let mut taken: Vec<Row> = Vec::new();
        for (place, row) in self.answer(&plan, &request, &snapshot) {
            if intake.offer(&plan, place, row.position, row.draft.bytes) {
                taken.push(row);
            }
        }
        self.note(|| {
            format!(
                "  {server:?} gives {:?}",
                taken.iter().map(Row::place).collect::<Vec<_>>()
            )
        });
        let conclusion = self.conclude(plan, &intake, &server);
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
            self.cursor.sweep.due = Some(Instant::now());
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
        self.cursor.plan(&told)
    }

    /// Answers a plan as the statement does.
    fn answer(&self, plan: &Plan, request: &FetchRequest, snapshot: &Snapshot) -> Vec<(Place, Row)> {
        let below = if self.variant == Variant::BoundByPresent {
            self.cursor.bound(snapshot.xmax)
        } else {
            plan.below
        };
        let low = plan
            .running
            .iter()
            .filter(|(xid, _)| snapshot.sees(*xid))
            .map(|(_, low)| *low)
            .fold(below, i64::min);
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
        let mut answer = Vec::new();
        for single in &plan.singles {
            answer.extend(
                rows.iter()
                    .filter(|row| row.place() == *single && !topics.contains(&row.draft.topic))
                    .map(|row| (Place::Single, *row)),
            );
        }
        for (index, lane) in plan.lanes.iter().enumerate() {
            let key = number(&lane.key);
            answer.extend(
                rows.iter()
                    .filter(|row| {
                        row.draft.shard == lane.shard
                            && row.draft.key == Some(key)
                            && row.position > lane.after.min(low)
                            && row.position <= lane.upto
                            && !skip.contains(&row.position)
                    })
                    .take(lane.quota)
                    .map(|row| (Place::Lane(index), *row)),
            );
        }
        let left_out: BTreeSet<usize> = (request.held.keys.iter().map(|(_, key)| key))
            .chain(plan.lanes.iter().map(|lane| &lane.key))
            .map(number)
            .collect();
        for (index, asked) in plan.shards.iter().enumerate() {
            answer.extend(
                rows.iter()
                    .filter(|row| {
                        row.draft.shard == asked.shard
                            && row.position > asked.after.min(low)
                            && !skip.contains(&row.position)
                            && !topics.contains(&row.draft.topic)
                            && !row.draft.key.is_some_and(|key| left_out.contains(&key))
                    })
                    .take(asked.quota)
                    .map(|row| (Place::Shard(index), *row)),
            );
        }
        answer
    }

    fn conclude(&mut self, mut plan: Plan, intake: &Intake, server: &Server) -> Conclusion {
        if self.variant == Variant::NoRewind {
            plan.lanes.iter_mut().for_each(|lane| lane.upto = END);
        }
        self.cursor.conclude(&plan, intake, server)
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
        let bound = (shards + 1) * ahead.div_ceil(at_once) + 2 * shards + 4;
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
        if cursor.marks.len() > MAX_MARKS + 1 {
            return self.fail("too many marks");
        }
        if cursor.scans.0.len() > held + request.held.topics.len() + 1 {
            return self.fail("too many scans");
        }
        if cursor.topics.len() != request.held.topics.len() {
            return self.fail("topics are not those that are held");
        }
        let marks = cursor.marks.len();
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

fn run(seed: u64, variant: Variant, messages: usize) -> Outcome<BTreeMap<&'static str, u64>> {
    let mut world = World::new(seed, variant, messages);
    let outcome = (0..messages * 8)
        .try_for_each(|_| world.step())
        .and_then(|()| world.settle_down());
    if let Some(trace) = world.trace {
        println!("{}", trace.join("\n"));
    }
    outcome.map(|()| world.reached)
}

#[test]
fn nothing_is_lost_reordered_or_starved_whatever_happens() {
    if let Ok(seed) = std::env::var("OUTBOX_SEED") {
        run(seed.parse().unwrap(), Variant::Sound, 30).unwrap();
        return;
    }
    let seeds: u64 = std::env::var("OUTBOX_SEEDS").map_or(5_000, |seeds| seeds.parse().unwrap());
    let mut reached: BTreeMap<&'static str, u64> = BTreeMap::new();
    for seed in 0..seeds {
        for (what, times) in run(seed, Variant::Sound, 30).unwrap() {
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
        "sweep",
        "topic held",
        "unsent",
    ] {
        assert!(reached.contains_key(what), "never {what}");
    }
}

/// One transaction stays open while thousands end: marks are thinned out, and its rows are found all the same.
#[test]
fn a_transaction_that_stays_open_loses_nothing() {
    let mut thinned = 0;
    for seed in 0..20 {
        let mut world = World::new(seed, Variant::Sound, 1_000);
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

/// A lane that never ends has its share and no more, even where a batch has room for one row only.
#[test]
fn an_endless_lane_starves_nobody() {
    let mut cursor = Cursor::new(Duration::MAX, false);
    let key = OrderKey {
        topic: "t".into(),
        key: "k".into(),
    };
    let mut request = FetchRequest {
        shards: vec![OwnedShard {
            shard: Shard(0),
            epoch: Epoch(1),
        }],
        max_rows: 1,
        max_bytes: 1,
        ..FetchRequest::default()
    };
    let server = Server {
        snapshot: Snapshot {
            xmin: 10,
            xmax: 10,
            running: Vec::new(),
        },
        last: 100,
        ahead: 0,
    };
    let plan = cursor.plan(&request);
    cursor.conclude(&plan, &Intake::new(&plan), &server);
    request.reread.push(Reread {
        shard: Shard(0),
        scope: RereadScope::Key(key),
        from: Position(1),
    });
    let (mut of_lane, mut of_shard) = (0, 0);
    for position in 1..=20 {
        let plan = cursor.plan(&request);
        request.reread.clear();
        let mut intake = Intake::new(&plan);
        if let Some(lane) = plan.lanes.first()
            && lane.quota > 0
        {
            of_lane += u32::from(intake.offer(&plan, Place::Lane(0), position, 5));
        }
        of_shard += u32::from(intake.offer(&plan, Place::Shard(0), 100 + position, 5));
        cursor.conclude(&plan, &intake, &server);
    }
    assert_eq!((of_lane, of_shard), (10, 10));
}

/// What the relay has in flight is not returned, whether it was held before or not.
#[test]
fn a_message_in_flight_is_not_asked_for() {
    let mut cursor = Cursor::new(Duration::MAX, false);
    let place = (Shard(0), Position(7));
    let mut request = FetchRequest {
        shards: vec![OwnedShard {
            shard: Shard(0),
            epoch: Epoch(1),
        }],
        in_flight: vec![place],
        held: Arc::new(Held {
            messages: [place].into(),
            ..Held::default()
        }),
        max_rows: 10,
        max_bytes: 10,
        ..FetchRequest::default()
    };
    assert!(cursor.plan(&request).singles.is_empty());
    request.held = Arc::default();
    assert!(cursor.plan(&request).singles.is_empty());
}

fn catches(variant: Variant) {
    let caught = (0..1_000).find_map(|seed| run(seed, variant, 30).err());
    println!("{}", caught.as_deref().unwrap_or("nothing was noticed"));
    assert!(caught.is_some(), "{variant:?} goes unnoticed");
}

#[test]
fn catches_xmax_taken_for_the_next_number() {
    catches(Variant::XmaxIsNext);
}

#[test]
fn catches_a_bound_by_the_present_snapshot() {
    catches(Variant::BoundByPresent);
}

#[test]
fn catches_a_fresh_sequence_taken_for_used() {
    catches(Variant::CalledIgnored);
}

#[test]
fn catches_a_sequence_with_a_cache() {
    catches(Variant::CachedSequence);
}

#[test]
fn catches_a_position_before_its_transaction() {
    catches(Variant::PositionFirst);
}

#[test]
fn catches_a_position_kept_for_a_regained_shard() {
    catches(Variant::PositionKept);
}

#[test]
fn catches_rereads_that_are_not_told() {
    catches(Variant::RereadInferred);
}

#[test]
fn catches_lanes_that_begin_at_the_head() {
    catches(Variant::LaneFromHead);
}

#[test]
fn catches_a_main_scan_that_is_not_set_back() {
    catches(Variant::NoRewind);
}
