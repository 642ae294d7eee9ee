//! What a fetch asks for, and what is taken of the answer.

use std::collections::BTreeSet;

use crate::message::OrderKey;
use crate::shard::Shard;

/// How far below its positions a scan may have to look.
///
/// ```
/// // Positions are drawn in the order of commits, and 7 was the highest that there was at the last fetch.
/// let reach = outbox_core::cursor::Reach::above(7);
/// assert!(reach.pending.is_empty());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    /// Above it something can have appeared.
    pub lowest: i64,
    /// Single positions at which something can appear, as ranges with both ends included: ascending, and apart.
    pub pending: Vec<(i64, i64)>,
    /// Ranges of positions at which nothing can appear: all were returned, or are nobody's.
    pub known: Vec<(i64, i64)>,
}

impl Reach {
    /// Nothing can have appeared, below or above: nobody writes any more. A table that goes on growing has at least what
    /// lies [above](Self::above) the highest position that there was.
    ///
    /// ```
    /// assert!(outbox_core::cursor::Reach::nowhere().pending.is_empty());
    /// ```
    #[must_use]
    pub const fn nowhere() -> Self {
        Self::above(i64::MAX)
    }

    /// Anywhere above a position.
    ///
    /// ```
    /// assert_eq!(outbox_core::cursor::Reach::above(7).lowest, 7);
    /// ```
    #[must_use]
    pub const fn above(lowest: i64) -> Self {
        Self {
            lowest,
            pending: Vec::new(),
            known: Vec::new(),
        }
    }
}

/// What one fetch asks the server for. Its parts are asked for in the order of [`Place`].
///
/// ```
/// use outbox_core::{FetchMode, FetchRequest, cursor::{Cursor, Reach}};
///
/// let mut cursor = Cursor::new(FetchMode::Rescan, std::time::Duration::from_secs(60));
/// let plan = cursor.plan(&FetchRequest::default(), Reach::nowhere());
/// assert!(plan.from_start);
/// ```
#[derive(Debug)]
pub struct Plan {
    /// Whether this fetch looks at everything, whatever the positions are.
    pub from_start: bool,
    /// Positions that are not to be returned by lanes and shards: in flight, held, or asked for as singles.
    pub skip: Vec<i64>,
    /// As in [`Reach::pending`]: lanes and shards return them as well.
    pub pending: Vec<(i64, i64)>,
    /// As in [`Reach::known`]: the main scan need not look there, up to its own position.
    pub known: Vec<(i64, i64)>,
    /// Messages that are asked for by their positions.
    pub singles: Vec<(Shard, i64)>,
    /// Keys that are read apart, which the shards leave out.
    pub lanes: Vec<LanePlan>,
    /// The shards; of a joint cursor one, which stands for all that were asked for.
    pub shards: Vec<ShardPlan>,
    /// The scan of a lane or a shard may [stop](Intake::stopped) when it has gone past so many rows, returned or held.
    /// Otherwise who begins anew where millions of rows are held would wait until all are passed over, or for ever where a
    /// statement may not take so long.
    pub stride: usize,
    pub(super) max_rows: usize,
    pub(super) max_bytes: usize,
    /// Whether this fetch is a check of the cursor.
    pub(super) sweeps: bool,
}

impl Plan {
    /// Whether something is expected to appear at a position.
    pub(crate) fn awaits(&self, position: i64) -> bool {
        within(&self.pending, position)
    }

    /// Up to where is read what came as far as `last` and was asked for from `base` on. What was pending lies below, and
    /// what is left of it is still known; what a sweep finds below is not.
    pub(super) fn reached(&self, last: i64, base: i64) -> i64 {
        if self.sweeps { last } else { last.max(base) }
    }
}

/// Whether a position lies in one of these ranges, which are ascending.
pub(crate) fn within(ranges: &[(i64, i64)], position: i64) -> bool {
    let index = ranges.partition_point(|(_, last)| *last < position);
    ranges.get(index).is_some_and(|(first, _)| *first <= position)
}

/// A key that is read apart.
///
/// ```
/// use outbox_core::{OrderKey, Shard, cursor::LanePlan};
///
/// let key = OrderKey { topic: "orders".into(), key: "42".into() };
/// let lane = LanePlan { shard: Shard(3), key, after: 7, upto: 90, quota: 1 };
/// ```
#[derive(Debug)]
pub struct LanePlan {
    /// Where it belongs.
    pub shard: Shard,
    /// The key.
    pub key: OrderKey,
    /// Above it, or above the lowest position at which something can have appeared.
    pub after: i64,
    /// Inclusive; beyond it the main scan will come.
    pub upto: i64,
    /// At most so many rows.
    pub quota: usize,
}

/// The main scan of a shard.
///
/// ```
/// use outbox_core::{Shard, cursor::ShardPlan};
///
/// let asked = ShardPlan { shard: Shard(3), after: i64::MIN, quota: 100 };
/// ```
#[derive(Debug)]
pub struct ShardPlan {
    /// The shard.
    pub shard: Shard,
    /// Above it, or above the lowest position at which something can have appeared.
    pub after: i64,
    /// At most so many rows.
    pub quota: usize,
}

/// For what a row was asked; the index is that in the plan.
///
/// ```
/// use outbox_core::cursor::Place;
///
/// assert!(Place::Single < Place::Lane(0) && Place::Lane(1) < Place::Shard(0));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A message by its position.
    Single,
    /// A key that is read apart.
    Lane(usize),
    /// The main scan.
    Shard(usize),
}

/// What a fetch came to.
///
/// ```
/// use outbox_core::cursor::Conclusion;
///
/// let quiet = Conclusion { more: false, surplus: 0 };
/// ```
#[derive(Debug, PartialEq, Eq)]
pub struct Conclusion {
    /// Whether there may be more right now.
    pub more: bool,
    /// Rows that a sweep found below where everything had been read: a defect of who uses the cursor, a promise of the
    /// database's that does not hold, or a position that somebody wrote by hand.
    pub surplus: usize,
}

impl Conclusion {
    /// Sounds the alarm about a surplus: an error in the log, and the metric `outbox_sweep_surplus_total`.
    ///
    /// ```
    /// let conclusion = outbox_core::cursor::Conclusion { more: false, surplus: 1 };
    /// conclusion.report("mine", "the outbox in the shop's database");
    /// ```
    pub fn report(&self, store: &'static str, outbox: &str) {
        if self.surplus == 0 {
            return;
        }
        metrics::counter!("outbox_sweep_surplus_total", "store" => store)
            .increment(u64::try_from(self.surplus).unwrap_or(u64::MAX));
        tracing::error!(
            rows = self.surplus,
            outbox,
            "messages below the cursor had not been read; they are now. Was an id written by hand, or did the database \
             stand still for long in the middle of an insert?"
        );
    }
}

/// A part of what there is that a fetch has gone past: of the positions above `above`, up to `upto` (inclusive), nothing
/// is asked for again.
///
/// ```
/// use outbox_core::cursor::Span;
///
/// let span = Span { lane: None, above: 7, upto: 90 };
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Of which lane of the plan; none is the main scan's, which leaves out what lanes read.
    pub lane: Option<usize>,
    /// Above this.
    pub above: i64,
    /// Up to here.
    pub upto: i64,
}

/// How a batch fills up: decides row by row, in the order of the answer, what is taken.
///
/// ```
/// use outbox_core::{FetchMode, FetchRequest, cursor::{Cursor, Intake, Place, Reach}};
///
/// let mut cursor = Cursor::joint(FetchMode::Cursor, std::time::Duration::from_secs(60));
/// let request = FetchRequest { max_rows: 1, max_bytes: 100, ..FetchRequest::default() };
/// let plan = cursor.plan(&request, Reach::nowhere());
/// let mut intake = Intake::new(&plan);
/// assert!(intake.offer(&plan, Place::Shard(0), 7, 20));
/// assert!(!intake.offer(&plan, Place::Shard(0), 8, 20)); // there is room for one
/// ```
#[derive(Debug)]
pub struct Intake {
    pub(super) rows: usize,
    bytes: usize,
    pub(super) singles: BTreeSet<i64>,
    pub(super) lanes: Vec<Taken>,
    pub(super) shards: Vec<Taken>,
    /// From where on nothing is taken any more of singles and lanes, which have half of the batch.
    pub(super) cut_apart: Option<Place>,
    /// The same of the shards.
    pub(super) cut: Option<usize>,
    /// Whether bytes were the limit, not rows.
    pub(super) heavy: bool,
    latest: Place,
    pub(super) disordered: bool,
    /// What a sweep came across, by the index of its shard.
    pub(super) swept: Vec<(usize, i64)>,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Taken {
    pub(super) rows: usize,
    pub(super) last: i64,
    /// Up to here the scan went, and no farther.
    pub(super) stopped: Option<i64>,
}

impl Taken {
    /// Where the scan stopped short of so many rows.
    pub(super) fn stops_before(&self, quota: usize) -> Option<i64> {
        self.stopped.filter(|_| self.rows < quota)
    }
}

impl Intake {
    /// Takes nothing yet.
    ///
    /// ```
    /// # use outbox_core::{FetchMode, FetchRequest, cursor::{Cursor, Intake, Reach}};
    /// # let mut cursor = Cursor::new(FetchMode::Cursor, std::time::Duration::from_secs(60));
    /// # let plan = cursor.plan(&FetchRequest::default(), Reach::nowhere());
    /// let intake = Intake::new(&plan);
    /// ```
    #[must_use]
    pub fn new(plan: &Plan) -> Self {
        Self {
            rows: 0,
            bytes: 0,
            singles: BTreeSet::new(),
            lanes: vec![Taken::default(); plan.lanes.len()],
            shards: vec![Taken::default(); plan.shards.len()],
            cut_apart: None,
            cut: None,
            heavy: false,
            latest: Place::Single,
            disordered: false,
            swept: Vec::new(),
        }
    }

    /// Whether a row is taken, which has so many bytes. The first one always is; of a shard, no more than were asked for.
    ///
    /// ```
    /// # use outbox_core::{FetchMode, FetchRequest, cursor::{Cursor, Intake, Place, Reach}};
    /// # let mut cursor = Cursor::joint(FetchMode::Cursor, std::time::Duration::from_secs(60));
    /// # let plan = cursor.plan(&FetchRequest::default(), Reach::nowhere());
    /// assert!(Intake::new(&plan).offer(&plan, Place::Shard(0), 7, usize::MAX));
    /// ```
    pub fn offer(&mut self, plan: &Plan, place: Place, position: i64, bytes: usize) -> bool {
        if place < self.latest {
            self.disordered = true;
        }
        self.latest = place;
        let apart = !matches!(place, Place::Shard(_));
        let closed = if apart {
            self.cut_apart.is_some()
        } else {
            self.cut.is_some()
        };
        if closed {
            return false;
        }
        // Where a shard is asked for in parts, each has as many rows: what is more than its own may lie behind what the first
        // part has left out.
        if let Place::Shard(index) = place
            && let (Some(taken), Some(asked)) = (self.shards.get(index), plan.shards.get(index))
            && taken.rows >= asked.quota
        {
            return false;
        }
        let (max_rows, max_bytes) = if apart {
            ((plan.max_rows / 2).max(1), plan.max_bytes / 2)
        } else {
            (plan.max_rows, plan.max_bytes)
        };
        let total = self.bytes.saturating_add(bytes);
        if self.rows > 0 && (self.rows >= max_rows || total > max_bytes) {
            self.heavy |= total > max_bytes;
            match place {
                Place::Shard(index) => self.cut = Some(index),
                apart => self.cut_apart = Some(apart),
            }
            return false;
        }
        if let Place::Shard(index) = place
            && plan.sweeps
        {
            self.swept.push((index, position));
        }
        match place {
            Place::Single => {
                self.singles.insert(position);
            }
            place => {
                if let Some(taken) = self.scan(place) {
                    taken.rows += 1;
                    taken.last = position;
                }
            }
        }
        self.rows += 1;
        self.bytes = total;
        true
    }

    /// The scan of a lane or a shard ended at a position, though there may be more behind it: of what lies above, nothing
    /// was looked at.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use outbox_core::{Epoch, FetchMode, FetchRequest, OwnedShard, Shard, cursor::{Cursor, Intake, Place, Reach}};
    /// # let mut cursor = Cursor::new(FetchMode::Cursor, Duration::from_secs(60));
    /// # let shards = vec![OwnedShard { shard: Shard(0), epoch: Epoch(1) }];
    /// # let request = FetchRequest { shards, max_rows: 100, ..FetchRequest::default() };
    /// let plan = cursor.plan(&request, Reach::above(i64::MIN));
    /// let mut intake = Intake::new(&plan);
    /// // The server went past `plan.stride` rows, all of them held, and the last one was 300,000.
    /// intake.stopped(Place::Shard(0), 300_000);
    /// assert!(cursor.conclude(&plan, &intake, i64::MIN).more);
    /// ```
    pub fn stopped(&mut self, place: Place, position: i64) {
        if let Some(taken) = self.scan(place) {
            taken.stopped = Some(position);
        }
    }

    fn scan(&mut self, place: Place) -> Option<&mut Taken> {
        match place {
            Place::Single => None,
            Place::Lane(index) => self.lanes.get_mut(index),
            Place::Shard(index) => self.shards.get_mut(index),
        }
    }
}
