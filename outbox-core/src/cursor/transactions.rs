//! What can have appeared below, told by the numbers of transactions.

use std::collections::VecDeque;

use super::{Reach, START};

/// More marks cost memory and give nothing: old ones can be thinned out, which only makes the cursor look further back.
pub(super) const MAX_MARKS: usize = 128;

/// The number of a transaction, 64 bits without wrap-around.
///
/// ```
/// let first: outbox_core::cursor::Xid = 3;
/// ```
pub type Xid = u64;

/// Which transactions a snapshot sees: all below `xmin`; none from `xmax` on; of those between, all but `running`.
///
/// ```
/// use outbox_core::cursor::Snapshot;
///
/// let snapshot = Snapshot::parse("730:735:730,733").unwrap();
/// assert_eq!((snapshot.xmin, snapshot.xmax, snapshot.running), (730, 735, vec![730, 733]));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Below it all are seen.
    pub xmin: Xid,
    /// From it on none is seen. It is **not** the number that the next transaction gets.
    pub xmax: Xid,
    /// Which of those between are not seen.
    pub running: Vec<Xid>,
}

impl Snapshot {
    /// As PostgreSQL writes it: `xmin:xmax:running,…`.
    ///
    /// ```
    /// assert!(outbox_core::cursor::Snapshot::parse("730:735").is_none());
    /// ```
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (xmin, xmax) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let running = match parts.next()? {
            "" => Vec::new(),
            list => list.split(',').map(str::parse).collect::<Result<_, _>>().ok()?,
        };
        Some(Self { xmin, xmax, running })
    }

    pub(super) fn sees(&self, xid: Xid) -> bool {
        xid < self.xmin || (xid < self.xmax && !self.running.contains(&xid))
    }
}

/// What a server told with a batch. What its fields are read from must be read in this order.
///
/// ```
/// use outbox_core::cursor::{Snapshot, Told};
///
/// let told = Told { snapshot: Snapshot::parse("730:735:").unwrap(), last: 500, ahead: 1 };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The snapshot in which the batch was read.
    pub snapshot: Snapshot,
    /// The last position that was drawn.
    pub last: i64,
    /// How far the next transaction number is from the snapshot's `xmax`.
    pub ahead: u64,
}

/// All transactions numbered `from` or later draw positions above `last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    from: Xid,
    last: i64,
}

/// Knows below which position nothing can have appeared, where a transaction gets its number **before** it draws its
/// first position.
///
/// Of a transaction numbered `x` or later it is known below which position none of its rows can lie: wherever the
/// sequence stood when the next number to be given was still at most `x`. So a history of such marks tells how low the
/// rows of those transactions can lie that have **finished** since the last snapshot. One that stays open costs nothing
/// until it ends.
///
/// ```
/// use outbox_core::cursor::{Snapshot, Told, Transactions};
///
/// let mut transactions = Transactions::new();
/// let told = |text, last| Told { snapshot: Snapshot::parse(text).unwrap(), last, ahead: 1 };
/// assert_eq!(transactions.learn(&told("730:732:730", 500)), i64::MIN); // the first time all has to be looked at
/// assert_eq!(transactions.learn(&told("730:733:730", 500)), i64::MIN); // 732 has ended: it may have begun before
/// assert_eq!(transactions.finished(), (500, vec![(730, i64::MIN)])); // numbers from 733 on draw above 500
/// ```
#[derive(Debug)]
pub struct Transactions {
    /// The snapshot of the last fetch.
    snapshot: Option<Snapshot>,
    /// Ascending in both fields; the first one is true of every transaction.
    marks: VecDeque<Mark>,
}

impl Default for Transactions {
    fn default() -> Self {
        Self::new()
    }
}

impl Transactions {
    /// Knows nothing: all has to be looked at.
    ///
    /// ```
    /// assert_eq!(outbox_core::cursor::Transactions::new().finished(), (i64::MIN, Vec::new()));
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self {
            snapshot: None,
            marks: VecDeque::from([Mark { from: 0, last: START }]),
        }
    }

    /// Above what the rows lie of transactions that the last snapshot did not know; which ones were running then, and
    /// above what the rows of each lie. The server can tell which of these have finished.
    ///
    /// ```
    /// let (below, running) = outbox_core::cursor::Transactions::new().finished();
    /// ```
    #[must_use]
    pub fn finished(&self) -> (i64, Vec<(Xid, i64)>) {
        match &self.snapshot {
            Some(snapshot) => (
                self.bound(snapshot.xmax),
                snapshot
                    .running
                    .iter()
                    .map(|xid| (*xid, self.bound(*xid)))
                    .collect(),
            ),
            None => (START, Vec::new()),
        }
    }

    /// How low a scan can have to look, whichever of them finish.
    ///
    /// ```
    /// assert_eq!(outbox_core::cursor::Transactions::new().reach().lowest, i64::MIN);
    /// ```
    #[must_use]
    pub fn reach(&self) -> Reach {
        let (below, running) = self.finished();
        Reach::above(running.iter().map(|(_, low)| *low).fold(below, i64::min))
    }

    /// Takes note of what the server told; gives the position above which this fetch had to look.
    ///
    /// ```
    /// use outbox_core::cursor::{Snapshot, Told, Transactions};
    ///
    /// let told = Told { snapshot: Snapshot::parse("730:730:").unwrap(), last: 500, ahead: 0 };
    /// assert_eq!(Transactions::new().learn(&told), i64::MIN);
    /// ```
    pub fn learn(&mut self, told: &Told) -> i64 {
        let low = self.low(&told.snapshot);
        self.mark(told);
        self.snapshot = Some(told.snapshot.clone());
        low
    }

    /// Above what the rows of transactions numbered `xid` or later lie.
    pub(super) fn bound(&self, xid: Xid) -> i64 {
        let index = self.marks.partition_point(|mark| mark.from <= xid);
        self.marks
            .get(index.saturating_sub(1))
            .map_or(START, |mark| mark.last)
    }

    fn low(&self, now: &Snapshot) -> i64 {
        let (below, running) = self.finished();
        running
            .iter()
            .filter(|(xid, _)| now.sees(*xid))
            .map(|(_, low)| *low)
            .fold(below, i64::min)
    }

    /// Remembers where the sequence stood before the next transaction gets its number.
    fn mark(&mut self, told: &Told) {
        let from = told.snapshot.xmax.saturating_add(told.ahead);
        if let Some(newest) = self.marks.back_mut()
            && told.last > newest.last
        {
            if newest.from == from {
                newest.last = told.last;
            } else {
                self.marks.push_back(Mark {
                    from,
                    last: told.last,
                });
            }
        }
        // Nobody asks any more about transactions that every snapshot sees.
        while self
            .marks
            .get(1)
            .is_some_and(|second| second.from <= told.snapshot.xmin)
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

    /// How many marks there are, for tests.
    #[cfg(test)]
    pub(super) fn marks(&self) -> usize {
        self.marks.len()
    }
}
