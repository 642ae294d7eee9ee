//! What a fetch asks for, and what is taken of the answer.

use std::collections::BTreeSet;

use outbox_core::{OrderKey, Shard};

use super::Xid;

/// What one fetch asks the server for.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Rows of transactions that the last snapshot did not know lie above this.
    pub(crate) below: i64,
    /// Transactions that were running then, and above what the rows of each lie.
    pub(crate) running: Vec<(Xid, i64)>,
    /// Positions that are not to be returned by lanes and shards: in flight, held, or asked for as singles.
    pub(crate) skip: Vec<i64>,
    pub(crate) singles: Vec<(Shard, i64)>,
    pub(crate) lanes: Vec<LanePlan>,
    pub(crate) shards: Vec<ShardPlan>,
    pub(super) max_rows: usize,
    pub(super) max_bytes: usize,
    /// Whether this fetch looks at everything.
    pub(super) sweeps: bool,
}

#[derive(Debug)]
pub(crate) struct LanePlan {
    pub(crate) shard: Shard,
    pub(crate) key: OrderKey,
    pub(crate) after: i64,
    /// Inclusive; beyond it the main scan will come.
    pub(crate) upto: i64,
    pub(crate) quota: usize,
}

#[derive(Debug)]
pub(crate) struct ShardPlan {
    pub(crate) shard: Shard,
    pub(crate) after: i64,
    pub(crate) quota: usize,
}

/// For what a row was asked; the index is that in the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Single,
    Lane(usize),
    Shard(usize),
}

/// How a batch fills up: decides row by row, in the order of the answer, what is taken.
#[derive(Debug)]
pub(crate) struct Intake {
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
}

impl Intake {
    pub(crate) fn new(plan: &Plan) -> Self {
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

    /// Whether a row is taken. The first one always is.
    pub(crate) fn offer(&mut self, plan: &Plan, place: Place, position: i64, bytes: usize) -> bool {
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
        let taken = match place {
            Place::Single => {
                self.singles.insert(position);
                None
            }
            Place::Lane(index) => self.lanes.get_mut(index),
            Place::Shard(index) => self.shards.get_mut(index),
        };
        if let Some(taken) = taken {
            taken.rows += 1;
            taken.last = position;
        }
        self.rows += 1;
        self.bytes = total;
        true
    }
}
