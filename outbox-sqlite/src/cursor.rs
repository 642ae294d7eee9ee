//! Reading from where it stopped.
//!
//! SQLite has one writer and the outbox draws its positions with AUTOINCREMENT: the order of positions is the order
//! of commits, nothing ever becomes visible below a position that was seen, and a plain position is exact. What it
//! needs beside that is a way back to what was passed over. The invariant, at the end of each fetch:
//!
//! > **Every undelivered row at or below the position was returned since it was last asked for, is held, or is
//! > ahead of a lane.**
//!
//! A *lane* is a key that is read again, from a position of its own up to the main one; until it gets there, the
//! main scan leaves the key out. A *single* is a keyless message that is wanted again. Because delivered rows are
//! gone, what a lane passes is only what is held or in flight.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_core::{Epoch, Held, OrderKey, Position, Reread, RereadScope};
use rusqlite::params;

use crate::reader::{Batch, Scan, list, name};
use crate::row::{Rows, SHARD, bytes, text};

/// A position, lanes and singles, of one epoch.
#[derive(Debug)]
pub(crate) struct Cursor {
    epoch: Epoch,
    /// What was held at the last fetch.
    held: Arc<Held>,
    /// The main position.
    position: i64,
    lanes: BTreeMap<OrderKey, Lane>,
    singles: BTreeSet<i64>,
    sweep: Sweep,
}

/// A key that is read again.
#[derive(Debug)]
struct Lane {
    /// Up to here it was read.
    position: i64,
    /// How many rows it may give next: one, the head that failed before, and twice as many each time.
    step: usize,
}

/// The check of the invariant: now and then everything below the main position is looked at.
#[derive(Debug)]
struct Sweep {
    /// When the next one begins; none is never.
    due: Option<Instant>,
    /// Up to where the present one came.
    reached: Option<i64>,
}

/// More lanes at once make each fetch slow; then the main position goes back instead.
const MAX_LANES: usize = 16;

/// How many rows the lanes, and how many the sweep, may look at in one fetch, so that none takes long.
const MAX_EXAMINED: usize = 20_000;

impl Cursor {
    /// Before everything.
    pub(crate) fn new(epoch: Epoch, held: &Arc<Held>, sweep_interval: Duration) -> Self {
        Self {
            epoch,
            held: Arc::clone(held),
            position: i64::MIN,
            lanes: BTreeMap::new(),
            singles: BTreeSet::new(),
            sweep: Sweep {
                due: Instant::now().checked_add(sweep_interval),
                reached: None,
            },
        }
    }

    pub(crate) const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Fills the batch; says whether there may be more.
    pub(crate) fn fetch(
        &mut self,
        scan: &Scan<'_>,
        sweep_interval: Duration,
        rows: &mut Rows,
        batch: &mut Batch,
    ) -> rusqlite::Result<bool> {
        self.release(scan);
        self.go_back(scan);
        self.sweep(scan, sweep_interval)?;
        self.tidy(scan);

        // What is read again gets at most half of the batch, so that neither side starves the other.
        let (max_rows, max_bytes) = (batch.max_rows, batch.max_bytes);
        batch.max_rows = (max_rows / 2).max(1);
        batch.max_bytes = max_bytes / 2;
        let more_singles = self.read_singles(scan, rows, batch)?;
        let more_lanes = self.read_lanes(scan, rows, batch)?;
        batch.max_rows = max_rows;
        batch.max_bytes = max_bytes;

        let apart = list(self.lanes.keys().map(|key| name(&key.topic, &key.key)));
        let (position, cut) = scan.onward(self.position, apart, rows, batch)?;
        self.position = position;
        Ok(cut || more_singles || more_lanes)
    }

    /// Goes back to what was held at the last fetch and is not any more, whether the relay asks for it or not: it may
    /// never have seen what the main scan passed over, and a topic's hold does not say which of its rows is lowest.
    fn release(&mut self, scan: &Scan<'_>) {
        let now = &scan.wanted.barred.held;
        if Arc::ptr_eq(&self.held, now) {
            return;
        }
        if !self.held.topics.is_subset(&now.topics) {
            self.position = i64::MIN;
        }
        for (_, key) in self.held.keys.difference(&now.keys) {
            let told = |reread: &Reread| matches!(&reread.scope, RereadScope::Key(wanted) if wanted == key);
            if !scan.wanted.reread.iter().any(told) {
                let lane = Lane {
                    position: i64::MIN,
                    step: 1,
                };
                self.lanes.insert(key.clone(), lane);
            }
        }
        for (_, message) in self.held.messages.difference(&now.messages) {
            self.singles.insert(message.0);
        }
        self.held = Arc::clone(now);
    }

    /// Notes what is wanted again. What lies ahead of the main position comes by itself.
    fn go_back(&mut self, scan: &Scan<'_>) {
        for reread in &scan.wanted.reread {
            let (from, before) = (reread.from.0, reread.from.0.saturating_sub(1));
            if from > self.position {
                continue;
            }
            match &reread.scope {
                RereadScope::Shard => self.position = before,
                RereadScope::Message => {
                    self.singles.insert(from);
                }
                RereadScope::Key(key) => {
                    let lane = self.lanes.entry(key.clone()).or_insert(Lane {
                        position: before,
                        step: 1,
                    });
                    lane.position = lane.position.min(before);
                    lane.step = 1;
                }
            }
        }
    }

    /// Drops what the main scan will come across anyway, and makes it come across what is too much for lanes.
    fn tidy(&mut self, scan: &Scan<'_>) {
        let mut active: Vec<i64> = self
            .lanes
            .iter()
            .filter(|(key, _)| !held(scan, key))
            .map(|(_, lane)| lane.position)
            .collect();
        if active.len() > MAX_LANES {
            active.sort_unstable();
            self.position = self.position.min(active[MAX_LANES]);
        }
        let position = self.position;
        self.lanes.retain(|_, lane| lane.position < position);
        self.singles.retain(|single| *single <= position);
    }

    /// Takes keyless messages that are wanted again; says whether some are left.
    fn read_singles(
        &mut self,
        scan: &Scan<'_>,
        rows: &mut Rows,
        batch: &mut Batch,
    ) -> rusqlite::Result<bool> {
        let waiting: Vec<i64> = self
            .singles
            .iter()
            .copied()
            .filter(|single| {
                !scan
                    .wanted
                    .barred
                    .held
                    .messages
                    .contains(&(SHARD, Position(*single)))
            })
            .collect();
        for single in waiting {
            if !scan.wanted.in_flight.contains(&single) {
                if batch.room() == 0 {
                    return Ok(true);
                }
                let mut statement = scan.transaction.prepare_cached(&scan.sql.by_position)?;
                let mut found = statement.query([single])?;
                if let Some(row) = found.next()? {
                    let record = rows.record(row)?;
                    if scan.wanted.barred.held.topics.contains(record.message.topic()) {
                        continue;
                    }
                    if !batch.take(record) {
                        return Ok(true);
                    }
                }
            }
            self.singles.remove(&single);
        }
        Ok(false)
    }

    /// Reads the lanes on, each a few rows; says whether some are left that can be read.
    fn read_lanes(&mut self, scan: &Scan<'_>, rows: &mut Rows, batch: &mut Batch) -> rusqlite::Result<bool> {
        let most = (batch.max_rows / 2).max(1);
        let mut examined = 0;
        let mut left = false;
        let mut done = Vec::new();
        for (key, lane) in &mut self.lanes {
            if held(scan, key) {
                continue;
            }
            if batch.room() == 0 || examined >= MAX_EXAMINED {
                left = true;
                break;
            }
            if lane.read(key, self.position, scan, rows, batch, &mut examined)? {
                done.push(key.clone());
            } else {
                left = true;
                lane.step = (lane.step * 2).min(most);
            }
        }
        for key in done {
            self.lanes.remove(&key);
        }
        Ok(left)
    }

    /// Looks for rows below the main position that should have been returned. One is a defect, of this crate or of
    /// who wrote a position by hand; it is told, and read all the same.
    fn sweep(&mut self, scan: &Scan<'_>, interval: Duration) -> rusqlite::Result<()> {
        let from = match self.sweep.reached {
            Some(reached) => reached,
            None if self.sweep.due.is_some_and(|due| Instant::now() >= due) => i64::MIN,
            None => return Ok(()),
        };
        let mut statement = scan.transaction.prepare_cached(&scan.sql.scan)?;
        let mut found = statement.query(params![from, self.position])?;
        let mut examined = 0;
        while let Some(row) = found.next()? {
            let position: i64 = row.get(0)?;
            let topic = text(row.get_ref(1)?).unwrap_or_default().into();
            let key = bytes(row.get_ref(2)?).map(|key| OrderKey {
                topic: Arc::clone(&topic),
                key,
            });
            let known = scan.wanted.in_flight.contains(&position)
                || self.singles.contains(&position)
                || key.as_ref().is_some_and(|key| self.lanes.contains_key(key))
                || scan
                    .wanted
                    .barred
                    .held
                    .holds(SHARD, Position(position), &topic, key.as_ref());
            if !known {
                metrics::counter!("outbox_sweep_surplus_total", "store" => "sqlite").increment(1);
                tracing::error!(
                    position,
                    cursor = self.position,
                    "a message below the cursor had not been read; reading on from there. Was its id written by hand?"
                );
                self.position = position.saturating_sub(1);
                break;
            }
            examined += 1;
            if examined >= MAX_EXAMINED {
                self.sweep.reached = Some(position);
                return Ok(());
            }
        }
        self.sweep = Sweep {
            due: Instant::now().checked_add(interval),
            reached: None,
        };
        Ok(())
    }
}

impl Lane {
    /// Takes up to a step of the key's rows; says whether it arrived at the main position.
    fn read(
        &mut self,
        key: &OrderKey,
        until: i64,
        scan: &Scan<'_>,
        rows: &mut Rows,
        batch: &mut Batch,
        examined: &mut usize,
    ) -> rusqlite::Result<bool> {
        let mut statement = scan.transaction.prepare_cached(&scan.sql.scan)?;
        let mut whole = scan.transaction.prepare_cached(&scan.sql.by_position)?;
        let mut found = statement.query(params![self.position, until])?;
        let mut taken = 0;
        while let Some(row) = found.next()? {
            let position: i64 = row.get(0)?;
            let own = text(row.get_ref(1)?).unwrap_or_default() == &*key.topic
                && row.get_ref(2)?.as_blob_or_null()? == Some(&*key.key);
            if own && !scan.wanted.in_flight.contains(&position) {
                if taken == self.step {
                    return Ok(false);
                }
                if !batch.take(whole.query_row([position], |row| rows.record(row))?) {
                    return Ok(false);
                }
                taken += 1;
            }
            self.position = position;
            *examined += 1;
            if *examined >= MAX_EXAMINED {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Whether nothing of the key may be returned.
fn held(scan: &Scan<'_>, key: &OrderKey) -> bool {
    let held = &scan.wanted.barred.held;
    held.topics.contains(&key.topic) || held.keys.contains(&(SHARD, key.clone()))
}
