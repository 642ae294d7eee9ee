//! What can have appeared below, told by a look at what is stored and not committed.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::{Plan, Reach, START, Span};
use crate::fetch::Record;
use crate::shard::{Position, Shard};

/// A batch is read from so many single places at most, besides those that lie close together.
const MAX_RANGES: usize = 2_000;

/// So many rows of each span are looked at, at most.
const MAX_FOUND: usize = 50_000;

/// So many ranges of what was returned are told, the widest, so that they are not read anew.
const MAX_KNOWN: usize = 50;

/// So many are remembered: beyond it they are all forgotten, which only makes reading slower.
const MAX_REMEMBERED: usize = 10_000;

/// So often within the lag it is noted which positions are drawn.
const SAMPLES: u32 = 8;

/// Knows which positions can still appear, where a server shows rows that are **stored and not committed** to who asks
/// for them, and draws positions in ascending order. For a [joint](super::Cursor::joint) cursor.
///
/// After the batch is read it looks at the same part of the table once more, with the eyes of a dirty read: what is there
/// and was neither returned nor left out on purpose is not committed yet, or was not when the batch was read. These
/// positions it keeps, and asks for them until they are returned or gone.
///
/// Between drawing a position and storing its row there is a moment in which nothing can be seen. So the newest part of
/// the table, whose positions were drawn no longer ago than the *lag*, is read anew each time, but for what was returned
/// already. The premise is that **no
/// single INSERT takes longer than the lag** from drawing a position to storing its row; how long the transaction stays
/// open makes no difference.
///
/// ```
/// use std::time::{Duration, Instant};
/// use outbox_core::cursor::{Cursor, Found, Intake, Pending};
/// use outbox_core::{FetchMode, FetchRequest};
///
/// let lag = Duration::from_secs(10);
/// let (mut cursor, mut pending) = (Cursor::joint(FetchMode::Cursor, 6 * lag), Pending::new(lag));
/// let request = FetchRequest { max_rows: 100, max_bytes: 1 << 20, ..FetchRequest::default() };
/// let start = Instant::now();
/// for (seconds, lowest) in [(0, i64::MIN), (11, i64::MIN), (22, 90)] {
///     let plan = cursor.plan(&request, pending.reach(&request.in_flight));
///     assert_eq!(plan.pending, if seconds == 22 { vec![(42, 42)] } else { vec![] });
///     // Here the store reads the batch; nothing is committed.
///     let low = pending.low();
///     assert_eq!(low, lowest);
///     cursor.conclude(&plan, &Intake::new(&plan), low);
///     let now = start + Duration::from_secs(seconds);
///     if let Some(look) = pending.look(&plan, cursor.passed(&plan, low), &[], now) {
///         // Here it looks at what is stored. By now, 42 is there, not committed, and 90 is the highest.
///         let rows = look.spans.iter().enumerate().map(|(span, _)| (span + 1, 42)).collect();
///         pending.learn(look, Found { top: Some(90), rows }, now);
///     }
/// }
/// ```
#[derive(Debug)]
pub struct Pending {
    lag: Duration,
    /// Of the positions up to here all are stored, and those are known that can still appear.
    floor: i64,
    /// They.
    ids: BTreeSet<i64>,
    /// What was returned above the floor, as ranges: first and last.
    returned: BTreeMap<i64, i64>,
    /// When positions up to which one were drawn, the oldest first.
    drawn: VecDeque<(Instant, i64)>,
    /// When it was looked last.
    looked: Option<Instant>,
    max_ranges: usize,
    max_found: usize,
}

/// What to look at, by one dirty read.
///
/// ```
/// use outbox_core::cursor::Look;
///
/// fn text(look: &Look) -> String {
///     format!("{} pending, {} spans", look.pending.len(), look.spans.len())
/// }
/// ```
#[derive(Debug)]
pub struct Look {
    /// The highest position that is known; none before the first look. Wanted is the highest that there is.
    pub top: Option<i64>,
    /// Which of these are still there, if their keys and topics are not held?
    pub pending: Vec<(i64, i64)>,
    /// What is there of these spans: what the main scan, or the lane, would return if it were committed?
    pub spans: Vec<Span>,
    /// At most so many of each span, the lowest.
    pub limit: usize,
    floor: i64,
    known: HashSet<i64>,
    at: Instant,
}

/// What was found.
///
/// ```
/// // Of what is pending 7 is still there, and in the first span there is 42.
/// let found = outbox_core::cursor::Found { top: Some(90), rows: vec![(0, 7), (1, 42)] };
/// ```
#[derive(Debug, Default)]
pub struct Found {
    /// The highest position that there is; of a long way there, any that was come to.
    pub top: Option<i64>,
    /// Positions, with 0 for those that were pending, or the number of their span, counted from 1; ascending in each.
    pub rows: Vec<(usize, i64)>,
}

impl Pending {
    /// Knows nothing: all has to be read anew until the lag is over.
    ///
    /// ```
    /// let pending = outbox_core::cursor::Pending::new(std::time::Duration::from_secs(10));
    /// assert_eq!(pending.low(), i64::MIN);
    /// ```
    #[must_use]
    pub const fn new(lag: Duration) -> Self {
        Self {
            lag,
            floor: START,
            ids: BTreeSet::new(),
            returned: BTreeMap::new(),
            drawn: VecDeque::new(),
            looked: None,
            max_ranges: MAX_RANGES,
            max_found: MAX_FOUND,
        }
    }

    /// With less room, for tests.
    #[cfg(test)]
    pub(super) fn with_room(lag: Duration, max_ranges: usize, max_found: usize) -> Self {
        Self {
            max_ranges,
            max_found,
            ..Self::new(lag)
        }
    }

    /// How many ranges are kept, for tests.
    #[cfg(test)]
    pub(super) fn ranges(&self) -> usize {
        ranges(&self.ids).len()
    }

    /// Where something can appear.
    ///
    /// ```
    /// # let mut pending = outbox_core::cursor::Pending::new(std::time::Duration::from_secs(10));
    /// assert!(pending.reach(&[]).pending.is_empty());
    /// ```
    pub fn reach(&mut self, in_flight: &[(Shard, Position)]) -> Reach {
        if !self.ids.is_empty() {
            for (_, position) in in_flight {
                self.ids.remove(&position.0);
            }
        }
        Reach {
            lowest: self.floor,
            pending: ranges(&self.ids),
            known: self.known(),
        }
    }

    /// The widest ranges of what was returned, ascending.
    fn known(&self) -> Vec<(i64, i64)> {
        let mut known: Vec<(i64, i64)> = self
            .returned
            .iter()
            .map(|(first, last)| (*first, *last))
            .collect();
        if known.len() > MAX_KNOWN {
            known.sort_unstable_by_key(|(first, last)| first.saturating_sub(*last));
            known.truncate(MAX_KNOWN);
            known.sort_unstable();
        }
        known
    }

    fn remember(&mut self, position: i64) {
        let next = position.saturating_add(1);
        let last = self.returned.remove(&next).unwrap_or(position);
        match self.returned.range_mut(..=position).next_back() {
            Some((_, end)) if end.saturating_add(1) >= position => *end = last.max(*end),
            _ => {
                self.returned.insert(position, last);
            }
        }
    }

    /// The position above which the present fetch has to look.
    ///
    /// ```
    /// assert_eq!(outbox_core::cursor::Pending::new(std::time::Duration::ZERO).low(), i64::MIN);
    /// ```
    #[must_use]
    pub const fn low(&self) -> i64 {
        self.floor
    }

    /// Decides, after a batch was read and concluded, whether it has to be looked once more and at what: a batch that went
    /// past positions which will not be read anew. `spans` are [`Cursor::passed`](super::Cursor::passed).
    ///
    /// ```
    /// # use std::time::{Duration, Instant};
    /// # use outbox_core::{FetchMode, FetchRequest, cursor::{Cursor, Found, Pending}};
    /// # let mut cursor = Cursor::joint(FetchMode::Cursor, Duration::from_secs(60));
    /// # let mut pending = Pending::new(Duration::from_secs(10));
    /// # let plan = cursor.plan(&FetchRequest::default(), pending.reach(&[]));
    /// let look = pending.look(&plan, Vec::new(), &[], Instant::now()).unwrap();
    /// pending.learn(look, Found::default(), Instant::now());
    /// assert!(pending.look(&plan, Vec::new(), &[], Instant::now()).is_none()); // not yet again
    /// ```
    pub fn look(&mut self, plan: &Plan, spans: Vec<Span>, returned: &[Record], now: Instant) -> Option<Look> {
        let returned = || returned.iter().map(|record| record.position.0);
        self.look_past(plan, spans, returned, now)
    }

    pub(super) fn look_past<R: Iterator<Item = i64>>(
        &mut self,
        plan: &Plan,
        mut spans: Vec<Span>,
        returned: impl Fn() -> R,
        now: Instant,
    ) -> Option<Look> {
        if plan.shards.first().is_some_and(|asked| asked.after == START) {
            // What was returned before may be wanted again.
            self.returned.clear();
        }
        for position in returned() {
            self.ids.remove(&position);
            if position > self.floor {
                self.remember(position);
            }
        }
        if self.returned.len() > MAX_REMEMBERED {
            self.returned.clear();
        }
        let due = self
            .looked
            .is_none_or(|looked| now.saturating_duration_since(looked) >= self.lag / SAMPLES);
        let floor = if due { self.stored_by(now) } else { self.floor };
        for span in &mut spans {
            span.upto = span.upto.min(floor);
        }
        spans.retain(|span| span.above < span.upto);
        if !due && spans.is_empty() {
            return None;
        }
        Some(Look {
            top: self.drawn.back().map(|(_, top)| *top),
            pending: ranges(&self.ids),
            known: if spans.is_empty() {
                HashSet::new()
            } else {
                plan.skip.iter().copied().chain(returned()).collect()
            },
            spans,
            limit: self.max_found,
            floor,
            at: now,
        })
    }

    /// Up to where everything is stored that was drawn, at that time and later.
    fn stored_by(&mut self, now: Instant) -> i64 {
        let old = |drawn: &(Instant, i64)| now.saturating_duration_since(drawn.0) >= self.lag;
        while self.drawn.get(1).is_some_and(old) {
            self.drawn.pop_front();
        }
        match self.drawn.front() {
            Some(drawn) if old(drawn) => drawn.1,
            _ => START,
        }
    }

    /// Takes note of what was found by `now`.
    ///
    /// ```
    /// # use std::time::{Duration, Instant};
    /// # use outbox_core::{FetchMode, FetchRequest, cursor::{Cursor, Found, Pending}};
    /// # let mut cursor = Cursor::joint(FetchMode::Cursor, Duration::from_secs(60));
    /// # let mut pending = Pending::new(Duration::from_secs(10));
    /// # let plan = cursor.plan(&FetchRequest::default(), pending.reach(&[]));
    /// # let look = pending.look(&plan, Vec::new(), &[], Instant::now()).unwrap();
    /// pending.learn(look, Found { top: Some(90), rows: Vec::new() }, Instant::now());
    /// ```
    pub fn learn(&mut self, look: Look, found: Found, now: Instant) {
        let mut floor = look.floor;
        for span in 1..=look.spans.len() {
            let mut of_span = found.rows.iter().filter(|(own, _)| *own == span);
            // What lies beyond was not looked at: it will be read anew.
            if let Some((_, last)) = of_span.nth(look.limit.saturating_sub(1)) {
                floor = floor.min(*last);
            }
        }
        let pending = found.rows.into_iter().map(|(_, position)| position);
        self.ids = pending
            .filter(|position| *position <= floor && !look.known.contains(position))
            .collect();
        if let Some((_, last)) = ranges(&self.ids).get(self.max_ranges - 1) {
            floor = floor.min(*last);
            self.ids.split_off(&floor.saturating_add(1));
        }
        self.floor = floor;
        self.returned.retain(|_, last| *last > floor);
        if let Some(top) = found.top.max(look.top) {
            self.drawn.push_back((now, top));
        }
        self.looked = Some(look.at);
    }
}

/// Positions as ranges of neighbours, ends included.
fn ranges(positions: &BTreeSet<i64>) -> Vec<(i64, i64)> {
    let mut ranges: Vec<(i64, i64)> = Vec::new();
    for position in positions {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*position) => *last = *position,
            _ => ranges.push((*position, *position)),
        }
    }
    ranges
}
