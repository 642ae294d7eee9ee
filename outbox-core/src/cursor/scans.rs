//! From where on something that is held was passed over.

use std::collections::{BTreeSet, VecDeque};

use super::END;

/// Where the main scans began that passed something held over. Of each fetch at which something came to be held, or
/// after which a scan began lower still: ascending in both.
#[derive(Debug, Default)]
pub(super) struct Scans(pub(super) VecDeque<(u64, i64)>);

impl Scans {
    /// Notes where a scan began; `newest` is the last fetch at which something came to be held.
    pub(super) fn note(&mut self, fetch: u64, begin: i64, newest: u64) {
        while self.0.back().is_some_and(|(_, later)| *later >= begin) {
            self.0.pop_back();
        }
        // Who asks for an earlier fetch gets the answer of one that began lower.
        if self.0.back().is_none_or(|(last, _)| *last < newest) {
            self.0.push_back((fetch, begin));
        }
    }

    /// The lowest position at which a scan began, of this fetch or a later one.
    pub(super) fn lowest_since(&self, fetch: u64) -> i64 {
        let index = self.0.partition_point(|(own, _)| *own < fetch);
        self.0.get(index).map_or(END, |(_, begin)| *begin)
    }

    /// Forgets what is not the answer for one of these fetches.
    pub(super) fn keep_for(&mut self, fetches: &BTreeSet<u64>) {
        let mut before = 0;
        self.0.retain(|(own, _)| {
            let asked = fetches.range(before..=*own).next().is_some();
            before = own + 1;
            asked
        });
    }
}
