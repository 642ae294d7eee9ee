//! How far a scan goes in one fetch.

use std::time::Duration;

/// How many rows the scans of a fetch go past together, at most. As many as a server manages in a moment, which is found out
/// by trying: between servers there are orders of magnitude.
#[derive(Debug)]
pub(super) struct Stride {
    rows: usize,
    /// Whether it stays as it is.
    fixed: bool,
    /// How many times as many, while scans see again what they have seen.
    times: usize,
}

/// The first one.
const FIRST: usize = 16_000;
const LEAST: usize = 1_000;
const MOST: usize = 1_024_000;
/// What is done faster than this could have been more.
const QUICK: Duration = Duration::from_millis(250);
/// What takes longer than this keeps others waiting.
const SLOW: Duration = Duration::from_secs(1);

impl Stride {
    pub(super) const fn new() -> Self {
        Self {
            rows: FIRST,
            fixed: false,
            times: 1,
        }
    }

    pub(super) const fn fixed(rows: usize) -> Self {
        Self {
            rows,
            fixed: true,
            times: 1,
        }
    }

    /// For each of so many scans.
    pub(super) fn each(&self, scans: usize) -> usize {
        self.rows.saturating_mul(self.times) / scans.max(1)
    }

    /// A fetch took so long. `stopped` says whether a scan ended because of the stride; `again`, whether one did that has seen
    /// again what had been seen. Were that so each time, because what began long ago is committed without end, or because what
    /// was held is let go, what is new would never be reached. So it gets longer until no scan stops.
    pub(super) fn adapt(&mut self, took: Duration, stopped: bool, again: bool) {
        if again {
            self.times = self.times.saturating_mul(2);
        } else if !stopped {
            self.times = (self.times / 2).max(1);
        }
        if !stopped || self.fixed {
            return;
        }
        if took < QUICK {
            self.rows = (self.rows * 2).min(MOST);
        } else if took > SLOW {
            self.rows = (self.rows / 2).max(LEAST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_while_the_server_is_quick_and_shrinks_while_it_is_slow() {
        let mut stride = Stride::new();
        for _ in 0..20 {
            stride.adapt(Duration::ZERO, true, false);
        }
        assert_eq!(stride.each(1), MOST);
        stride.adapt(SLOW, true, false);
        stride.adapt(2 * SLOW, false, false);
        assert_eq!(
            stride.each(1),
            MOST,
            "neither quick nor slow, and not for its sake"
        );
        for _ in 0..20 {
            stride.adapt(2 * SLOW, true, false);
        }
        assert_eq!(stride.each(1), LEAST);
    }

    #[test]
    fn scans_that_begin_below_get_farther_each_time() {
        let mut stride = Stride::fixed(10);
        stride.adapt(Duration::ZERO, true, true);
        stride.adapt(Duration::ZERO, true, true);
        stride.adapt(Duration::ZERO, true, false);
        assert_eq!((stride.each(1), stride.each(4)), (40, 10));
        for _ in 0..5 {
            stride.adapt(Duration::ZERO, false, false);
        }
        assert_eq!(stride.each(1), 10);
    }
}
