//! Reading from where it stopped, exactly: pure logic over what the server told.
//!
//! Positions are drawn from a sequence while transactions are open, so a plain `id > last` loses what is committed
//! later with a lower id. But a transaction gets its number **before** it draws its first position (the default of the
//! column `id` sees to that). So of a transaction numbered `x` or later it is known below which position none of its
//! rows can lie: wherever the sequence stood when the next number to be given was still at most `x`. The cursor keeps
//! a history of such marks, and at each fetch it asks for what lies above
//!
//! - the shard's own position: what it has not read yet, and
//! - the lowest mark of the transactions that have **finished** since the last snapshot: what can have appeared below.
//!
//! A transaction that stays open costs nothing until it ends. The invariant, at the end of each fetch:
//!
//! > **Every undelivered row that is visible in the fetch's snapshot was returned since it was last asked for, is
//! > held, lies above its shard's position, or is ahead of a lane.**
//!
//! A *lane* is a key that is read apart, from a position of its own: because it is wanted again, or because it was
//! held and the main scan passed it over. Until the lane is at its end the main scan leaves the key out. A *single* is
//! a keyless message that is wanted again. A held key has a sleeping lane, which remembers where the scans began that
//! passed it over.

mod plan;
mod scans;
mod snapshot;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_core::{Epoch, FetchRequest, Held, OrderKey, Position, RereadScope, Shard};

pub(crate) use self::plan::{Intake, LanePlan, Place, Plan, ShardPlan};
use self::scans::Scans;
pub(crate) use self::snapshot::{Server, Snapshot, Xid};

/// The position of a shard of which nothing is left to read.
const END: i64 = i64::MAX;
/// The position before everything.
const START: i64 = i64::MIN;

/// More lanes at once make each fetch slow; beyond it the shard's position goes back instead.
const MAX_LANES: usize = 16;
/// More marks cost memory and give nothing: old ones can be thinned out, which only makes the cursor look further back.
const MAX_MARKS: usize = 128;

/// All transactions numbered `from` or later draw positions above `last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    from: Xid,
    last: i64,
}

/// Where the reader stands.
#[derive(Debug)]
pub(crate) struct Cursor {
    rescans: bool,
    /// The snapshot of the last fetch.
    snapshot: Option<Snapshot>,
    /// Ascending in both fields; the first one is true of every transaction.
    marks: VecDeque<Mark>,
    shards: BTreeMap<Shard, Progress>,
    lanes: BTreeMap<OrderKey, Lane>,
    singles: BTreeSet<(Shard, i64)>,
    /// What was held at the last fetch.
    held: Arc<Held>,
    /// Since which fetch each held topic is held.
    topics: BTreeMap<Arc<str>, u64>,
    scans: Scans,
    /// The last fetch at which something came to be held that still is.
    newest_hold: Option<u64>,
    /// Which fetch this is.
    fetches: u64,
    /// The shard with which the next fetch begins, so that none is always cut off by the limits.
    turn: Option<Shard>,
    /// Whether the last batch was filled by singles and lanes alone: then the next one is the shards'.
    crowded_out: bool,
    /// How many rows the last batches had room for, when their bytes were the limit.
    rows: usize,
    sweep: Sweep,
}

#[derive(Debug)]
struct Progress {
    epoch: Epoch,
    /// Up to here everything was read, but for what is held, in a lane or a single.
    position: i64,
    /// Below the lowest single that did not come while a topic was held: it is gone, or of that topic.
    missed: i64,
}

/// A key that is read apart, or that is held.
#[derive(Debug)]
struct Lane {
    shard: Shard,
    /// Up to here it was read.
    position: i64,
    /// How many rows it may give next: one, the head that failed before, and twice as many each time.
    step: usize,
    /// Since which fetch the key is held; none when it can be read.
    held_since: Option<u64>,
}

/// The check of the invariant: now and then everything is looked at from the start.
#[derive(Debug)]
struct Sweep {
    interval: Duration,
    /// When the next one is due; none is never.
    due: Option<Instant>,
}

/// What a fetch came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Conclusion {
    /// Whether there may be more right now.
    pub(crate) more: bool,
    /// Rows that a sweep found below where everything had been read: a defect, of this crate or of who wrote a
    /// position by hand.
    pub(crate) surplus: usize,
}

impl Cursor {
    /// Before everything. One that `rescans` reads from the start each time, and remembers only which shards have more.
    pub(crate) fn new(sweep_interval: Duration, rescans: bool) -> Self {
        Self {
            rescans,
            snapshot: None,
            marks: VecDeque::from([Mark { from: 0, last: START }]),
            shards: BTreeMap::new(),
            lanes: BTreeMap::new(),
            singles: BTreeSet::new(),
            held: Arc::default(),
            topics: BTreeMap::new(),
            scans: Scans::default(),
            newest_hold: None,
            fetches: 0,
            turn: None,
            crowded_out: false,
            rows: usize::MAX,
            sweep: Sweep {
                interval: sweep_interval,
                due: Instant::now().checked_add(sweep_interval),
            },
        }
    }

    /// Decides what to ask for.
    pub(crate) fn plan(&mut self, request: &FetchRequest) -> Plan {
        self.fetches += 1;
        let gained = self.follow_leases(request);
        if gained || !Arc::ptr_eq(&self.held, &request.held) {
            self.follow_holds(request);
        }
        self.go_back(request);
        if self.rescans {
            self.lanes.clear();
            self.singles.clear();
        }
        let active = self.tidy();

        let max_rows = request.max_rows.max(1);
        let rows = max_rows.min(self.rows);
        let sweeps = !self.rescans && self.sweep.due.is_some_and(|due| Instant::now() >= due);
        let (below, running) = match &self.snapshot {
            Some(snapshot) if !sweeps && !self.rescans => (
                self.bound(snapshot.xmax),
                snapshot
                    .running
                    .iter()
                    .map(|xid| (*xid, self.bound(*xid)))
                    .collect(),
            ),
            _ => (START, Vec::new()),
        };
        let shards = self.plan_shards(rows);
        let lanes = self.plan_lanes(active, rows);
        let singles: Vec<(Shard, i64)> = self
            .singles
            .iter()
            .filter(|(shard, single)| !self.held.messages.contains(&(*shard, Position(*single))))
            .take(if self.crowded_out { 0 } else { (rows / 2).max(1) })
            .copied()
            .collect();
        let lowest = running.iter().map(|(_, low)| *low).fold(below, i64::min);
        let skip = self.skip(request, lowest, &lanes);
        Plan {
            below,
            running,
            skip,
            singles,
            lanes,
            shards,
            max_rows,
            max_bytes: request.max_bytes,
            sweeps,
        }
    }

    /// Forgets shards that are not owned any more under the same epoch; says whether there are new ones.
    fn follow_leases(&mut self, request: &FetchRequest) -> bool {
        let owned: BTreeMap<Shard, Epoch> = request
            .shards
            .iter()
            .map(|owned| (owned.shard, owned.epoch))
            .collect();
        let before = self.shards.len();
        self.shards
            .retain(|shard, progress| owned.get(shard) == Some(&progress.epoch));
        if self.shards.len() < before {
            // A shard that comes back is read from the start: nothing of it is wanted apart.
            let shards = &self.shards;
            self.lanes.retain(|_, lane| shards.contains_key(&lane.shard));
            self.singles.retain(|(shard, _)| shards.contains_key(shard));
        }
        let known = self.shards.len();
        for (shard, epoch) in owned {
            self.shards.entry(shard).or_insert(Progress {
                epoch,
                position: START,
                missed: END,
            });
        }
        self.shards.len() > known
    }

    /// Puts lanes to sleep for what is held now, and wakes those of what is held no more, whether the relay asks for
    /// it or not: it may never have seen what the main scan passed over.
    fn follow_holds(&mut self, request: &FetchRequest) {
        let (before, now) = (Arc::clone(&self.held), &request.held);
        for (key, lane) in &mut self.lanes {
            if let Some(since) = lane.held_since
                && !now.keys.contains(&(lane.shard, key.clone()))
            {
                lane.held_since = None;
                lane.position = lane.position.min(self.scans.lowest_since(since));
                lane.step = 1;
            }
        }
        for (shard, key) in &now.keys {
            if self.shards.contains_key(shard) {
                let lane = self.lanes.entry(key.clone()).or_insert(Lane {
                    shard: *shard,
                    position: END,
                    step: 1,
                    held_since: None,
                });
                lane.held_since.get_or_insert(self.fetches);
            }
        }
        let released: Vec<Arc<str>> = self
            .topics
            .keys()
            .filter(|topic| !now.topics.contains(*topic))
            .cloned()
            .collect();
        for topic in released {
            if let Some(since) = self.topics.remove(&topic) {
                // Which of the rows passed over is the lowest, and of which shard, nobody knows.
                let lowest = self.scans.lowest_since(since);
                for progress in self.shards.values_mut() {
                    progress.position = progress.position.min(lowest).min(progress.missed);
                    progress.missed = END;
                }
            }
        }
        for topic in &now.topics {
            self.topics.entry(Arc::clone(topic)).or_insert(self.fetches);
        }
        for (shard, message) in before.messages.difference(&now.messages) {
            if self.shards.contains_key(shard) {
                self.singles.insert((*shard, message.0));
            }
        }
        self.held = Arc::clone(now);
        let since: BTreeSet<u64> = self
            .lanes
            .values()
            .filter_map(|lane| lane.held_since)
            .chain(self.topics.values().copied())
            .collect();
        self.scans.keep_for(&since);
        self.newest_hold = since.last().copied();
    }

    /// Notes what is wanted again. What lies ahead of the shard's position comes by itself.
    fn go_back(&mut self, request: &FetchRequest) {
        // What is in flight was returned since, whatever else became of it.
        if !self.singles.is_empty() {
            for (shard, position) in &request.in_flight {
                self.singles.remove(&(*shard, position.0));
            }
        }
        for reread in &request.reread {
            let Some(progress) = self.shards.get_mut(&reread.shard) else {
                continue;
            };
            let (from, before) = (reread.from.0, reread.from.0.saturating_sub(1));
            if from > progress.position {
                continue;
            }
            match &reread.scope {
                RereadScope::Shard => progress.position = before,
                RereadScope::Message => {
                    self.singles.insert((reread.shard, from));
                }
                RereadScope::Key(key) => {
                    let lane = self.lanes.entry(key.clone()).or_insert(Lane {
                        shard: reread.shard,
                        position: before,
                        step: 1,
                        held_since: None,
                    });
                    lane.position = lane.position.min(before);
                    lane.step = 1;
                }
            }
        }
    }

    /// Drops lanes that the main scan will come across anyway, and makes it come across what is too much for lanes.
    /// Says which are left to be read now.
    fn tidy(&mut self) -> Vec<OrderKey> {
        let topics = &self.held.topics;
        let mut active: Vec<(i64, OrderKey)> = self
            .lanes
            .iter()
            .filter(|(key, lane)| lane.held_since.is_none() && !topics.contains(&key.topic))
            .map(|(key, lane)| (lane.position, key.clone()))
            .collect();
        active.sort_unstable();
        for (position, key) in active.iter().skip(MAX_LANES) {
            if let Some(lane) = self.lanes.remove(key)
                && let Some(progress) = self.shards.get_mut(&lane.shard)
            {
                progress.position = progress.position.min(*position);
            }
        }
        let shards = &self.shards;
        self.lanes.retain(|_, lane| {
            lane.held_since.is_some()
                || shards
                    .get(&lane.shard)
                    .is_some_and(|progress| lane.position < progress.position)
        });
        active
            .into_iter()
            .take(MAX_LANES)
            .map(|(_, key)| key)
            .filter(|key| self.lanes.contains_key(key))
            .collect()
    }

    /// Shares the rows out: those shards that are known to have more get all of them, the others a few, in case.
    fn plan_shards(&self, rows: usize) -> Vec<ShardPlan> {
        let behind = self
            .shards
            .values()
            .filter(|progress| progress.position < END)
            .count()
            .max(1);
        let (quota_behind, quota_end) = ((rows / behind).max(1), 1 + rows / self.shards.len().max(1));
        let plan = |(shard, progress): (&Shard, &Progress)| ShardPlan {
            shard: *shard,
            after: if self.rescans { START } else { progress.position },
            quota: if progress.position < END {
                quota_behind
            } else {
                quota_end
            },
        };
        let turn = self.turn.unwrap_or(Shard(0));
        self.shards
            .range(turn..)
            .chain(self.shards.range(..turn))
            .map(plan)
            .collect()
    }

    fn plan_lanes(&self, active: Vec<OrderKey>, rows: usize) -> Vec<LanePlan> {
        let most = if self.crowded_out {
            0
        } else {
            (rows / 2 / active.len().max(1)).max(1)
        };
        active
            .into_iter()
            .filter_map(|key| {
                let lane = self.lanes.get(&key)?;
                Some(LanePlan {
                    shard: lane.shard,
                    after: lane.position,
                    upto: self.shards.get(&lane.shard)?.position,
                    quota: lane.step.min(most),
                    key,
                })
            })
            .collect()
    }

    /// What scans could come across and must not return. Most of what is in flight lies below where they begin.
    fn skip(&self, request: &FetchRequest, lowest: i64, lanes: &[LanePlan]) -> Vec<i64> {
        let scanned = |shard: Shard, position: i64| {
            self.shards
                .get(&shard)
                .is_some_and(|progress| position > progress.position.min(lowest))
        };
        let in_lane = |shard: Shard, position: i64| {
            lanes
                .iter()
                .any(|lane| lane.shard == shard && position > lane.after.min(lowest) && position <= lane.upto)
        };
        let flights = request
            .in_flight
            .iter()
            .map(|(shard, position)| (*shard, position.0))
            .filter(|(shard, position)| scanned(*shard, *position) || in_lane(*shard, *position))
            .map(|(_, position)| position);
        let held = self
            .held
            .messages
            .iter()
            .filter(|(shard, position)| scanned(*shard, position.0))
            .map(|(_, position)| position.0);
        let singles = self
            .singles
            .iter()
            .filter(|(shard, position)| scanned(*shard, *position))
            .map(|(_, position)| *position);
        flights.chain(held).chain(singles).collect()
    }

    /// Above what the rows of transactions numbered `xid` or later lie.
    fn bound(&self, xid: Xid) -> i64 {
        let index = self.marks.partition_point(|mark| mark.from <= xid);
        self.marks
            .get(index.saturating_sub(1))
            .map_or(START, |mark| mark.last)
    }

    /// The lowest position above which this fetch had to look, whatever a sweep looked at.
    fn low(&self, now: &Snapshot) -> i64 {
        let Some(before) = &self.snapshot else {
            return START;
        };
        before
            .running
            .iter()
            .filter(|xid| now.sees(**xid))
            .map(|xid| self.bound(*xid))
            .fold(self.bound(before.xmax), i64::min)
    }

    /// Takes note of what the server answered and what was taken of it.
    pub(crate) fn conclude(&mut self, plan: &Plan, intake: &Intake, server: &Server) -> Conclusion {
        let low = self.low(&server.snapshot);
        if let Some(newest) = self.newest_hold {
            let begin = plan.shards.iter().map(|shard| shard.after).fold(low, i64::min);
            self.scans.note(self.fetches, begin, newest);
        }

        self.move_shards(plan, intake, low);
        self.move_lanes(plan, intake, low);
        self.move_singles(plan, intake);
        if intake.disordered {
            // The plan was carried out in another order than was asked for: what was cut off cannot be told.
            for progress in self.shards.values_mut() {
                progress.position = START;
            }
        }

        self.mark(server);
        self.snapshot = Some(server.snapshot.clone());
        self.turn = intake
            .cut
            .and_then(|index| plan.shards.get(index))
            .map(|shard| shard.shard);
        self.crowded_out = intake.cut.is_some() && intake.shards.iter().all(|taken| taken.rows == 0);
        self.rows = if intake.heavy {
            intake.rows.max(1)
        } else {
            self.rows.saturating_mul(2)
        };
        if plan.sweeps {
            self.sweep.due = Instant::now().checked_add(self.sweep.interval);
        }
        let waiting_lane = |(key, lane): (&OrderKey, &Lane)| {
            lane.held_since.is_none() && !self.held.topics.contains(&key.topic)
        };
        let waiting_single =
            |(shard, single): &(Shard, i64)| !self.held.messages.contains(&(*shard, Position(*single)));
        Conclusion {
            more: intake.cut.is_some()
                || self.shards.values().any(|progress| progress.position < END)
                || self.lanes.iter().any(waiting_lane)
                || self.singles.iter().any(waiting_single),
            surplus: intake
                .swept
                .iter()
                .filter(|(index, position)| {
                    plan.shards
                        .get(*index)
                        .is_some_and(|asked| *position <= asked.after.min(low))
                })
                .count(),
        }
    }

    fn move_shards(&mut self, plan: &Plan, intake: &Intake, low: i64) {
        for (index, asked) in plan.shards.iter().enumerate() {
            let (Some(progress), Some(taken)) = (self.shards.get_mut(&asked.shard), intake.shards.get(index))
            else {
                continue;
            };
            let reached = intake.cut.is_none_or(|cut| index < cut);
            progress.position = if reached && taken.rows < asked.quota {
                END
            } else if taken.rows > 0 {
                taken.last
            } else {
                asked.after.min(low)
            };
        }
    }

    fn move_singles(&mut self, plan: &Plan, intake: &Intake) {
        let cut = matches!(intake.cut_apart, Some(Place::Single));
        for single in &plan.singles {
            let came = intake.singles.contains(&single.1);
            if !came && cut {
                continue;
            }
            self.singles.remove(single);
            // The main scan comes across it when the topic is let go. Were it kept here, others would wait behind it.
            if !came
                && !self.held.topics.is_empty()
                && let Some(progress) = self.shards.get_mut(&single.0)
            {
                progress.missed = progress.missed.min(single.1.saturating_sub(1));
            }
        }
    }

    fn move_lanes(&mut self, plan: &Plan, intake: &Intake, low: i64) {
        for (index, asked) in plan.lanes.iter().enumerate() {
            let (Some(lane), Some(taken)) = (self.lanes.get_mut(&asked.key), intake.lanes.get(index)) else {
                continue;
            };
            let reached = intake.cut_apart.is_none_or(|cut| Place::Lane(index) < cut);
            if reached && taken.rows < asked.quota {
                self.lanes.remove(&asked.key);
                // The main scan has left the key out once more, from there on.
                if let Some(progress) = self.shards.get_mut(&asked.shard) {
                    progress.position = progress.position.min(asked.upto);
                }
            } else if taken.rows > 0 {
                lane.position = taken.last;
                lane.step = lane.step.saturating_mul(2);
            } else {
                // What appeared below was not taken, and will not be looked for again.
                lane.position = lane.position.min(low);
            }
        }
    }

    /// Remembers where the sequence stood before the next transaction gets its number.
    fn mark(&mut self, server: &Server) {
        let from = server.snapshot.xmax.saturating_add(server.ahead);
        if let Some(newest) = self.marks.back_mut()
            && server.last > newest.last
        {
            if newest.from == from {
                newest.last = server.last;
            } else {
                self.marks.push_back(Mark {
                    from,
                    last: server.last,
                });
            }
        }
        // Nobody asks any more about transactions that every snapshot sees.
        while self
            .marks
            .get(1)
            .is_some_and(|second| second.from <= server.snapshot.xmin)
        {
            self.marks.pop_front();
        }
        if self.marks.len() > MAX_MARKS {
            let mut index = 0;
            let half = self.marks.len() / 2;
            self.marks.retain(|_| {
                index += 1;
                index > half || index % 2 == 1
            });
        }
    }
}

#[cfg(test)]
mod model;
