//! The server: transactions, a sequence, a table of rows with the numbers of who wrote and who deleted them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::super::{Snapshot, Told, Xid};
use super::Variant;
use crate::shard::Shard;

/// No statement takes longer from drawing a position to storing its row.
pub(super) const LAG: u64 = 40;

/// A message that is to be written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Draft {
    pub(super) shard: Shard,
    pub(super) topic: usize,
    pub(super) key: Option<usize>,
    pub(super) bytes: usize,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    pub(super) draft: Draft,
    pub(super) position: i64,
    writer: Xid,
    /// Who deletes it, or has.
    deleter: Option<Xid>,
}

impl Row {
    pub(super) fn visible(&self, snapshot: &Snapshot) -> bool {
        snapshot.sees(self.writer) && !self.deleter.is_some_and(|xid| snapshot.sees(xid))
    }

    pub(super) fn place(&self) -> (Shard, i64) {
        (self.draft.shard, self.position)
    }
}

/// What a producer has open.
#[derive(Debug, Default)]
struct Open {
    xid: Option<Xid>,
    /// Stored, and not committed.
    drawn: Vec<(i64, Draft)>,
    /// Drawn by the statement that runs, and not stored yet, with the time by which it is.
    storing: VecDeque<(u64, i64, Draft)>,
    /// Ends seldom.
    slow: bool,
}

impl Open {
    /// The statement that runs stores its next row; says whether there was one.
    fn store(&mut self) -> bool {
        let next = self.storing.pop_front();
        self.drawn
            .extend(next.map(|(_, position, draft)| (position, draft)));
        next.is_some()
    }
}

/// A producer's connection.
#[derive(Debug, Default)]
struct Session {
    open: Option<Open>,
    /// Positions kept in reserve, under [`Variant::CachedSequence`].
    reserve: std::ops::Range<i64>,
}

#[derive(Debug)]
pub(super) struct Database {
    variant: Variant,
    next_xid: Xid,
    last_completed: Xid,
    running: BTreeSet<Xid>,
    /// As the catalogue has it: of a sequence that was never used it is the first value, not called.
    sequence: (i64, bool),
    sessions: Vec<Session>,
    /// How many of them go on; the others keep what they have open until the end.
    lively: usize,
    /// Who writes to which key, where producers lock it.
    locks: BTreeMap<usize, usize>,
    serial: bool,
    /// Whether statements of several rows draw all positions before they store the first row.
    draws_ahead: bool,
    pub(super) clock: u64,
    pub(super) rows: Vec<Row>,
    /// Settlements: what each deletes.
    settling: BTreeMap<Xid, Vec<(Shard, i64)>>,
}

impl Database {
    pub(super) fn new(variant: Variant, serial: bool, sessions: usize, draws_ahead: bool) -> Self {
        Self {
            variant,
            next_xid: 730,
            last_completed: 729,
            running: BTreeSet::new(),
            sequence: (1, false),
            sessions: (0..sessions).map(|_| Session::default()).collect(),
            lively: sessions,
            locks: BTreeMap::new(),
            serial,
            draws_ahead,
            clock: 0,
            rows: Vec::new(),
            settling: BTreeMap::new(),
        }
    }

    /// Time passes.
    pub(super) fn tick(&mut self) {
        self.clock += 1;
        for open in self
            .sessions
            .iter_mut()
            .filter_map(|session| session.open.as_mut())
        {
            while open.storing.front().is_some_and(|(by, ..)| *by <= self.clock) {
                open.store();
            }
        }
    }

    fn assign(&mut self) -> Xid {
        let xid = self.next_xid;
        self.next_xid += 1;
        self.running.insert(xid);
        xid
    }

    fn complete(&mut self, xid: Xid) {
        self.running.remove(&xid);
        self.last_completed = self.last_completed.max(xid);
    }

    fn advance(&mut self, by: i64) -> i64 {
        let (last, called) = self.sequence;
        let first = if called { last + 1 } else { last };
        self.sequence = (first + by - 1, true);
        first
    }

    fn draw(&mut self, session: usize) -> i64 {
        if self.variant != Variant::CachedSequence {
            return self.advance(1);
        }
        if self.sessions[session].reserve.is_empty() {
            let first = self.advance(4);
            self.sessions[session].reserve = first..first + 4;
        }
        self.sessions[session].reserve.next().unwrap()
    }

    /// Something that has nothing to do with the outbox takes a number, and is done.
    pub(super) fn bystander(&mut self) {
        let xid = self.assign();
        self.complete(xid);
    }

    /// A transaction writes, and stays open until the end.
    pub(super) fn pin(&mut self, draft: Draft) {
        let xid = self.assign();
        let position = self.advance(1);
        let open = Open {
            xid: Some(xid),
            drawn: vec![(position, draft)],
            ..Open::default()
        };
        self.sessions.push(Session {
            open: Some(open),
            ..Session::default()
        });
    }

    /// A producer does something; says whether it enqueued `draft`.
    pub(super) fn produce(&mut self, random: &mut fastrand::Rng, draft: Option<Draft>) -> bool {
        let session = if draft.is_some() {
            random.usize(..self.lively)
        } else {
            random.usize(..self.sessions.len())
        };
        let Some(mut open) = self.sessions[session].open.take() else {
            // At the end of the world nothing new is begun.
            let mut open = Open {
                slow: random.u8(..4) == 0,
                ..Open::default()
            };
            if draft.is_some() {
                if random.u8(..3) == 0 {
                    open.xid = Some(self.assign());
                }
                self.sessions[session].open = Some(open);
            }
            return false;
        };
        if open.store() {
            self.sessions[session].open = Some(open);
            return false;
        }
        if open.xid.is_none() && !open.drawn.is_empty() {
            // Only under `Variant::PositionFirst`.
            open.xid = Some(self.assign());
            self.sessions[session].open = Some(open);
            return false;
        }
        let mut wrote = false;
        match (random.u8(..12), draft) {
            (0, _) => {
                open.xid.get_or_insert_with(|| self.assign());
            }
            // A savepoint takes a number of its own, which ends with its transaction, or before, when it is rolled back.
            (1, _) if open.xid.is_some() => {
                let sub = self.next_xid;
                self.next_xid += 1;
                if random.bool() {
                    self.last_completed = self.last_completed.max(sub);
                }
            }
            // A rolled-back savepoint or a failed insert.
            (2, Some(_)) if open.xid.is_some() => {
                self.draw(session);
            }
            (3..=7, Some(draft)) => {
                let free = draft
                    .key
                    .is_none_or(|key| !self.serial || *self.locks.entry(key).or_insert(session) == session);
                if free {
                    if self.variant != Variant::PositionFirst {
                        open.xid.get_or_insert_with(|| self.assign());
                    }
                    let rows = if self.draws_ahead { random.u64(1..=3) } else { 1 };
                    for _ in 0..rows {
                        let position = self.draw(session);
                        open.storing.push_back((self.clock + LAG, position, draft));
                    }
                    if !self.draws_ahead {
                        open.store();
                    }
                    wrote = true;
                }
            }
            _ if !open.slow || draft.is_none() || random.u8(..8) == 0 => {
                self.end(session, open, random.u8(..8) > 0);
                return false;
            }
            _ => {}
        }
        self.sessions[session].open = Some(open);
        wrote
    }

    fn end(&mut self, session: usize, open: Open, commits: bool) {
        self.locks.retain(|_, owner| *owner != session);
        let Some(xid) = open.xid else {
            return;
        };
        if commits {
            self.rows
                .extend(open.drawn.into_iter().map(|(position, draft)| Row {
                    draft,
                    position,
                    writer: xid,
                    deleter: None,
                }));
        }
        self.complete(xid);
    }

    /// How many rows are stored and not committed.
    pub(super) fn open_rows(&self) -> usize {
        let open = self.sessions.iter().filter_map(|session| session.open.as_ref());
        open.map(|open| open.drawn.len() + open.storing.len()).sum()
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.sessions.iter().all(|session| session.open.is_none())
    }

    /// A settlement has arrived: it deletes, and is open.
    pub(super) fn begin_settlement(&mut self, places: Vec<(Shard, i64)>) -> Xid {
        let xid = self.assign();
        for row in &mut self.rows {
            if row.deleter.is_none() && places.contains(&row.place()) {
                row.deleter = Some(xid);
            }
        }
        self.settling.insert(xid, places);
        xid
    }

    pub(super) fn end_settlement(&mut self, xid: Xid, commits: bool) {
        self.settling.remove(&xid);
        if !commits {
            for row in &mut self.rows {
                if row.deleter == Some(xid) {
                    row.deleter = None;
                }
            }
        }
        self.complete(xid);
    }

    /// Whether a settlement still holds this shard's lease row.
    pub(super) fn is_settling(&self, shard: Shard) -> bool {
        self.settling
            .values()
            .flatten()
            .any(|(settling, _)| *settling == shard)
    }

    /// Takes out what nobody can see any more.
    pub(super) fn vacuum(&mut self) {
        let now = self.snapshot();
        self.rows
            .retain(|row| !row.deleter.is_some_and(|xid| now.sees(xid)));
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let xmax = self.last_completed + 1;
        let running: Vec<Xid> = self.running.range(..xmax).copied().collect();
        Snapshot {
            xmin: running.first().copied().unwrap_or(xmax),
            xmax,
            running,
        }
    }

    pub(super) fn last(&self) -> i64 {
        match self.sequence {
            (last, false) if self.variant != Variant::CalledIgnored => last - 1,
            (last, _) => last,
        }
    }

    /// What is stored, committed or not, but for what is being deleted.
    pub(super) fn dirty(&self) -> Vec<(i64, Draft)> {
        let committed = self.rows.iter().filter(|row| row.deleter.is_none());
        let open = self.sessions.iter().filter_map(|session| session.open.as_ref());
        let mut rows: Vec<(i64, Draft)> = committed
            .map(|row| (row.position, row.draft))
            .chain(open.flat_map(|open| open.drawn.iter().copied()))
            .collect();
        rows.sort_unstable_by_key(|(position, _)| *position);
        rows
    }

    /// What is told of a snapshot that was taken a moment ago, with the sequence as it was read since.
    pub(super) fn tell(&self, snapshot: &Snapshot, last: i64) -> Told {
        Told {
            ahead: if self.variant == Variant::XmaxIsNext {
                0
            } else {
                self.next_xid - snapshot.xmax
            },
            snapshot: snapshot.clone(),
            last,
        }
    }
}
