//! Reading from where it stopped, exactly: pure logic for readers of databases, without I/O.
//!
//! Positions are drawn while transactions are open, so a plain `id > last` loses what is committed later with a lower
//! position. A [`Cursor`] asks at each fetch for what lies above
//!
//! - its own position, of each shard: what it has not read yet, and
//! - the lowest position at which something can have **appeared** since the last fetch, which the store must know.
//!
//! Two ways to know it are here. [`Transactions`] is for servers that number their transactions before these draw
//! positions, and that tell which of them a snapshot sees. [`Pending`] is for servers that show what is stored and not
//! committed. Where positions are drawn in the order of commits, nothing ever appears below.
//!
//! The invariant, at the end of each fetch:
//!
//! > **Every undelivered row that is visible in the fetch's snapshot was returned since it was last asked for, is
//! > held, lies above its shard's position, or is ahead of a lane.**
//!
//! A *lane* is a key that is read apart, from a position of its own: because it is wanted again, or because it was
//! held and the main scan passed it over. Until the lane is at its end the main scan leaves the key out. A *single* is
//! a keyless message that is wanted again. A held key has a sleeping lane, which remembers where the scans began that
//! passed it over.

mod pending;
mod plan;
mod scans;
mod stride;
mod transactions;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::pending::{Found, Look, Pending};
#[cfg(feature = "sim")]
pub(crate) use self::plan::within;
pub use self::plan::{Conclusion, Intake, LanePlan, Place, Plan, Reach, ShardPlan, Span};
use self::scans::Scans;
use self::stride::Stride;
pub use self::transactions::{Snapshot, Told, Transactions, Xid};
use crate::fetch::{FetchMode, FetchRequest, Held, RereadScope};
use crate::message::OrderKey;
use crate::shard::{Epoch, OwnedShard, Position, Shard};

/// The position of a shard of which nothing is left to read.
const END: i64 = i64::MAX;
/// The position before everything.
const START: i64 = i64::MIN;

/// What stands for all shards where they are read as one.
const ALL: Shard = Shard(0);

/// More lanes at once make each fetch slow; beyond it the shard's position goes back instead.
const MAX_LANES: usize = 16;

/// The time by tokio's clock, which tests can pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Where a reader stands. It belongs to one reader and is lost with it, which is always safe.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::cursor::{Cursor, Intake, Place, Reach};
/// use outbox_core::{Epoch, FetchMode, FetchRequest, OwnedShard, Shard};
///
/// let mut cursor = Cursor::new(FetchMode::Cursor, Duration::from_secs(60));
/// let request = FetchRequest {
///     shards: vec![OwnedShard { shard: Shard(0), epoch: Epoch(1) }],
///     max_rows: 100,
///     max_bytes: 1 << 20,
///     ..FetchRequest::default()
/// };
/// // Here positions are drawn in the order of commits: what is new lies above the highest that there was.
/// let mut highest = i64::MIN;
/// for position in [7, 8] {
///     let plan = cursor.plan(&request, Reach::above(highest));
///     assert!(plan.shards[0].quota >= 100);
///     // The store asks its database for what lies above the lower one of `after` and `highest`, and offers the rows.
///     assert!(plan.shards[0].after.min(highest) < position);
///     let mut intake = Intake::new(&plan);
///     assert!(intake.offer(&plan, Place::Shard(0), position, 20));
///     let conclusion = cursor.conclude(&plan, &intake, highest);
///     assert!(!conclusion.more);
///     highest = position;
/// }
/// ```
#[derive(Debug)]
pub struct Cursor {
    rescans: bool,
    /// Whether all shards are read as one, and if so, which they were.
    joint: Option<Joint>,
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
    /// How many rows the scans of a fetch may go past.
    stride: Stride,
    /// When the fetch began that is out.
    asked: Instant,
    sweep: Sweep,
}

/// All shards as one: it begins anew when they are others.
#[derive(Debug, Default)]
struct Joint {
    shards: Vec<OwnedShard>,
    generation: i64,
}

#[derive(Debug)]
struct Progress {
    epoch: Epoch,
    /// Up to here everything was read, but for what is held, in a lane or a single.
    position: i64,
    /// Below the lowest single that did not come while a topic was held: it is gone, or of that topic.
    missed: i64,
    /// Whether the last scan stopped.
    stopped: bool,
    /// How far scans that stopped have got since the last one that came to the end.
    farthest: i64,
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
    /// When the next one is due. None before all has been read since the last one: it would begin from the start again what is
    /// not at its end yet.
    due: Option<Instant>,
}

impl Cursor {
    /// Before everything, with a position for each shard. One that rescans reads from the start each time, and remembers
    /// only which shards have more.
    ///
    /// ```
    /// use outbox_core::{FetchMode, cursor::Cursor};
    ///
    /// let cursor = Cursor::new(FetchMode::Rescan, std::time::Duration::from_secs(60));
    /// ```
    #[must_use]
    pub fn new(mode: FetchMode, sweep_interval: Duration) -> Self {
        Self {
            rescans: mode == FetchMode::Rescan,
            joint: None,
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
            stride: Stride::new(),
            asked: now(),
            sweep: Sweep {
                interval: sweep_interval,
                due: None,
            },
        }
    }

    /// The same with one position for all shards, for who reads a table in its order: the plan has one shard, which
    /// stands for all of them. It begins anew whenever other shards are owned.
    ///
    /// ```
    /// use outbox_core::{FetchMode, cursor::Cursor};
    ///
    /// let cursor = Cursor::joint(FetchMode::Cursor, std::time::Duration::from_secs(60));
    /// ```
    #[must_use]
    pub fn joint(mode: FetchMode, sweep_interval: Duration) -> Self {
        Self {
            joint: Some(Joint::default()),
            ..Self::new(mode, sweep_interval)
        }
    }

    /// With a [stride](Plan::stride) of so many rows, for the scans of a fetch together, however long they take. Without it
    /// it is as long as a server manages in a moment.
    ///
    /// ```
    /// # use outbox_core::{FetchMode, FetchRequest, cursor::{Cursor, Reach}};
    /// let cursor = Cursor::joint(FetchMode::Cursor, std::time::Duration::from_secs(60));
    /// let plan = cursor.striding(500_000).plan(&FetchRequest::default(), Reach::nowhere());
    /// assert_eq!(plan.stride, 500_000);
    /// ```
    #[must_use]
    pub const fn striding(mut self, rows: usize) -> Self {
        self.stride = Stride::fixed(rows);
        self
    }

    fn progress(&self, shard: Shard) -> Option<&Progress> {
        self.shards.get(if self.joint.is_some() { &ALL } else { &shard })
    }

    fn progress_mut(&mut self, shard: Shard) -> Option<&mut Progress> {
        self.shards
            .get_mut(if self.joint.is_some() { &ALL } else { &shard })
    }

    /// Whether a shard is read at present.
    fn reads(&self, shard: Shard) -> bool {
        match &self.joint {
            Some(joint) => joint.shards.iter().any(|owned| owned.shard == shard),
            None => self.shards.contains_key(&shard),
        }
    }

    /// Decides what to ask for.
    ///
    /// ```
    /// # use outbox_core::{FetchMode, FetchRequest, cursor::{Cursor, Reach}};
    /// # let mut cursor = Cursor::new(FetchMode::Cursor, std::time::Duration::from_secs(60));
    /// let plan = cursor.plan(&FetchRequest::default(), Reach::nowhere());
    /// assert!(plan.shards.is_empty() && plan.lanes.is_empty() && plan.singles.is_empty());
    /// ```
    pub fn plan(&mut self, request: &FetchRequest, reach: Reach) -> Plan {
        self.fetches += 1;
        self.asked = now();
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
        let sweeps = !self.rescans && self.sweep.due.is_some_and(|due| now() >= due);
        let from_start = sweeps || self.rescans;
        let shards = self.plan_shards(rows);
        let lanes = self.plan_lanes(active, rows);
        let singles: Vec<(Shard, i64)> = self
            .singles
            .iter()
            .filter(|(shard, single)| !self.held.messages.contains(&(*shard, Position(*single))))
            .take(if self.crowded_out { 0 } else { (rows / 2).max(1) })
            .copied()
            .collect();
        let lowest = if from_start { START } else { reach.lowest };
        Plan {
            from_start,
            skip: self.skip(request, lowest, &lanes),
            pending: reach.pending,
            known: if from_start { Vec::new() } else { reach.known },
            singles,
            stride: self.plan_stride(&lanes, &shards),
            lanes,
            shards,
            max_rows,
            max_bytes: request.max_bytes,
            sweeps,
        }
    }

    /// Forgets shards that are not owned any more under the same epoch; says whether there are new ones.
    fn follow_leases(&mut self, request: &FetchRequest) -> bool {
        let owned: BTreeMap<Shard, Epoch> = match &mut self.joint {
            Some(joint) => {
                if joint.shards != request.shards {
                    joint.shards.clone_from(&request.shards);
                    joint.generation += 1;
                }
                BTreeMap::from([(ALL, Epoch(joint.generation))])
            }
            None => request
                .shards
                .iter()
                .map(|owned| (owned.shard, owned.epoch))
                .collect(),
        };
        let before = self.shards.len();
        self.shards
            .retain(|shard, progress| owned.get(shard) == Some(&progress.epoch));
        if self.shards.len() < before {
            // A shard that comes back is read from the start: nothing of it is wanted apart.
            let (shards, joint) = (&self.shards, self.joint.is_some());
            self.lanes
                .retain(|_, lane| !joint && shards.contains_key(&lane.shard));
            self.singles
                .retain(|(shard, _)| !joint && shards.contains_key(shard));
        }
        let known = self.shards.len();
        for (shard, epoch) in owned {
            self.shards.entry(shard).or_insert(Progress {
                epoch,
                position: START,
                missed: END,
                stopped: false,
                farthest: START,
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
            if self.reads(*shard) {
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
            if self.reads(*shard) {
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
            let (from, before) = (reread.from.0, reread.from.0.saturating_sub(1));
            if !self.reads(reread.shard) {
                continue;
            }
            let Some(progress) = self.progress_mut(reread.shard) else {
                continue;
            };
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
                && let Some(progress) = self.progress_mut(lane.shard)
            {
                progress.position = progress.position.min(*position);
            }
        }
        let mut lanes = std::mem::take(&mut self.lanes);
        lanes.retain(|_, lane| {
            lane.held_since.is_some()
                || self
                    .progress(lane.shard)
                    .is_some_and(|progress| lane.position < progress.position)
        });
        self.lanes = lanes;
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

    /// What each scan may go past: never less than it may return.
    fn plan_stride(&self, lanes: &[LanePlan], shards: &[ShardPlan]) -> usize {
        if self.rescans {
            return usize::MAX;
        }
        let quotas = lanes.iter().map(|asked| asked.quota);
        let quotas = quotas.chain(shards.iter().map(|asked| asked.quota));
        quotas.fold(self.stride.each(lanes.len() + shards.len()), usize::max)
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
                    upto: self.progress(lane.shard)?.position,
                    quota: lane.step.min(most),
                    key,
                })
            })
            .collect()
    }

    /// What scans could come across and must not return. Most of what is in flight lies below where they begin.
    fn skip(&self, request: &FetchRequest, lowest: i64, lanes: &[LanePlan]) -> Vec<i64> {
        let scanned = |shard: Shard, position: i64| {
            self.progress(shard)
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

    /// Takes note of what was taken of the answer. `low` is the position above which this fetch had to look, as the
    /// store knows it now, whatever a sweep looked at.
    ///
    /// ```
    /// # use outbox_core::{FetchMode, FetchRequest, cursor::{Cursor, Intake, Reach}};
    /// # let mut cursor = Cursor::new(FetchMode::Cursor, std::time::Duration::from_secs(60));
    /// # let plan = cursor.plan(&FetchRequest::default(), Reach::nowhere());
    /// let conclusion = cursor.conclude(&plan, &Intake::new(&plan), i64::MAX);
    /// assert_eq!((conclusion.more, conclusion.surplus), (false, 0));
    /// ```
    pub fn conclude(&mut self, plan: &Plan, intake: &Intake, low: i64) -> Conclusion {
        if let Some(newest) = self.newest_hold {
            let begin = plan
                .shards
                .iter()
                .map(|shard| shard.after)
                .chain(plan.pending.first().map(|(first, _)| first - 1))
                .fold(low, i64::min);
            self.scans.note(self.fetches, begin, newest);
        }

        self.move_shards(plan, intake, low);
        self.move_lanes(plan, intake, low);
        self.move_singles(plan, intake);
        self.adapt_stride(plan, intake, low);
        if intake.disordered {
            // The plan was carried out in another order than was asked for: what was cut off cannot be told.
            for progress in self.shards.values_mut() {
                progress.position = START;
            }
        }

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
            self.sweep.due = None;
        }
        if self.sweep.due.is_none() && self.shards.values().all(|progress| progress.position == END) {
            self.sweep.due = now().checked_add(self.sweep.interval);
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
                        && !plan.awaits(*position)
                })
                .count(),
        }
    }

    fn adapt_stride(&mut self, plan: &Plan, intake: &Intake, low: i64) {
        let (mut stopped, mut again) = (false, false);
        for asked in &plan.shards {
            let Some(progress) = self.shards.get_mut(&asked.shard) else {
                continue;
            };
            if progress.stopped {
                stopped = true;
                again |= low < asked.after || progress.position <= progress.farthest;
                progress.farthest = progress.farthest.max(progress.position);
            } else if progress.position == END {
                progress.farthest = START;
            }
        }
        for (asked, taken) in std::iter::zip(&plan.lanes, &intake.lanes) {
            if taken.stops_before(asked.quota).is_some() {
                stopped = true;
                again |= low < asked.after;
            }
        }
        // A sweep sees everything again by its nature.
        if !plan.sweeps {
            let took = now().saturating_duration_since(self.asked);
            self.stride.adapt(took, stopped, again);
        }
    }

    fn move_shards(&mut self, plan: &Plan, intake: &Intake, low: i64) {
        for (index, asked) in plan.shards.iter().enumerate() {
            let (Some(progress), Some(taken)) = (self.shards.get_mut(&asked.shard), intake.shards.get(index))
            else {
                continue;
            };
            let reached = intake.cut.is_none_or(|cut| index < cut);
            let base = asked.after.min(low);
            progress.stopped = reached && taken.stops_before(asked.quota).is_some();
            progress.position = if reached && taken.rows < asked.quota {
                taken.stopped.map_or(END, |stopped| plan.reached(stopped, base))
            } else if taken.rows > 0 {
                plan.reached(taken.last, base)
            } else {
                base
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
                && let Some(progress) = self.progress_mut(single.0)
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
                if let Some(stopped) = taken.stopped.filter(|stopped| *stopped < asked.upto) {
                    lane.position = plan.reached(stopped, asked.after.min(low));
                    continue;
                }
                let main = if self.joint.is_some() { ALL } else { asked.shard };
                match self.shards.get_mut(&main) {
                    // The main scan goes past what is held, and must not have done so in vain: the lane goes beside it.
                    Some(main) if main.stopped && main.position > asked.upto => lane.position = asked.upto,
                    // It has left the key out once more, from there on.
                    main => {
                        if let Some(main) = main {
                            main.position = main.position.min(asked.upto);
                        }
                        self.lanes.remove(&asked.key);
                    }
                }
            } else if taken.rows > 0 {
                lane.position = plan.reached(taken.last, asked.after.min(low));
                lane.step = lane.step.saturating_mul(2);
            } else {
                // What appeared below was not taken, and will not be looked for again.
                lane.position = lane.position.min(low);
            }
        }
    }

    /// Which part of what there is this fetch has gone past, after [`conclude`](Self::conclude): of these positions
    /// nothing is asked for again. Of a joint cursor only.
    #[must_use]
    pub fn passed(&self, plan: &Plan, low: i64) -> Vec<Span> {
        let all = plan.shards.first().map(|asked| Span {
            lane: None,
            above: asked.after.min(low),
            upto: self
                .progress(asked.shard)
                .map_or(START, |progress| progress.position),
        });
        let lanes = plan.lanes.iter().enumerate().map(|(index, asked)| Span {
            lane: Some(index),
            above: asked.after.min(low),
            upto: match self.lanes.get(&asked.key) {
                Some(lane) => lane.position,
                None => self
                    .progress(asked.shard)
                    .map_or(START, |progress| progress.position),
            },
        });
        let spans = all.into_iter().chain(lanes);
        spans.filter(|span| span.above < span.upto).collect()
    }

    /// Orders a sweep, for tests.
    #[cfg(test)]
    fn sweep_now(&mut self) {
        self.sweep.due = Some(now());
    }
}

#[cfg(test)]
mod model;
