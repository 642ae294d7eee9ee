//! A reader of the simulated database: the cursor that the real stores have, and what it is told of the transactions.

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;

use super::server::{LAG, Server, Stored, Visibility};
use crate::cursor::{Cursor, Found, Intake, Look, Pending, Place, Plan, Reach, Transactions, within};
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::{FetchMode, FetchRequest, Fetched, Record};
use crate::store::Reader;

/// Everything is looked at from the start so often, to see that nothing was passed over.
const SWEEP: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct ServerReader {
    server: Server,
    cursor: Cursor,
    knowledge: Knowledge,
    /// How often the server had come up when it was connected.
    restarts: u64,
}

/// Where scans stopped.
type Stops = Vec<(Place, i64)>;

/// So few that scans stop now and then.
const STRIDE: usize = 30;

/// How it knows what can have appeared below.
#[derive(Debug)]
enum Knowledge {
    Snapshots(Transactions),
    DirtyReads(Pending),
    /// The highest position that there was at the last fetch.
    OneWriter(i64),
}

impl ServerReader {
    /// None where the store in memory has a reader of its own, which reads everything anew.
    pub(super) fn new(server: &Server) -> Option<Self> {
        let (cursor, knowledge) = match server.visibility {
            Visibility::Rescan => return None,
            Visibility::Snapshots => (
                Cursor::new(FetchMode::Cursor, SWEEP).striding(STRIDE),
                Knowledge::Snapshots(Transactions::new()),
            ),
            Visibility::DirtyReads => (
                Cursor::joint(FetchMode::Cursor, SWEEP).striding(STRIDE),
                Knowledge::DirtyReads(Pending::new(LAG)),
            ),
            Visibility::OneWriter => (
                Cursor::new(FetchMode::Cursor, SWEEP),
                Knowledge::OneWriter(i64::MIN),
            ),
        };
        Some(Self {
            restarts: server.come_up(),
            server: server.clone(),
            cursor,
            knowledge,
        })
    }
}

#[async_trait]
impl Reader for ServerReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        if self.server.come_up() != self.restarts {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "fetch",
                "the connection is gone",
            ));
        }
        let reach = match &mut self.knowledge {
            Knowledge::Snapshots(transactions) => transactions.reach(),
            Knowledge::DirtyReads(pending) => pending.reach(&request.in_flight),
            Knowledge::OneWriter(highest) => Reach::above(*highest),
        };
        let plan = self.cursor.plan(request, reach);
        // One moment, in which it reads and is told.
        let low = match &mut self.knowledge {
            Knowledge::Snapshots(transactions) => transactions.learn(&self.server.tell()),
            Knowledge::DirtyReads(pending) => pending.low(),
            Knowledge::OneWriter(highest) => *highest,
        };
        let asking = Asking {
            plan: &plan,
            request,
            low: if plan.from_start { i64::MIN } else { low },
            joint: matches!(self.knowledge, Knowledge::DirtyReads(_)),
        };
        let (mut records, mut intake) = (Vec::new(), Intake::new(&plan));
        let visible = self.server.store.pending();
        if let (Knowledge::OneWriter(highest), Some(last)) = (&mut self.knowledge, visible.last()) {
            *highest = last.position.0.max(*highest);
        }
        let (answer, stops) = asking.answer(&visible);
        for (place, record) in answer {
            if intake.offer(&plan, place, record.position.0, record.message.size()) {
                records.push(record);
            }
        }
        for (place, position) in stops {
            intake.stopped(place, position);
        }
        let conclusion = self.cursor.conclude(&plan, &intake, low);
        if conclusion.surplus > 0 {
            let what = format!(
                "a sweep found {} messages that had been passed over, by {plan:?} above {low}",
                conclusion.surplus
            );
            self.server.stage.ledger().is_broken("I1", what);
        }
        let spans = self.cursor.passed(&plan, low);
        if let Knowledge::DirtyReads(pending) = &mut self.knowledge
            && let Some(look) = pending.look(&plan, spans, &records, now())
        {
            self.server.stage.pause(0..3).await;
            let found = asking.look(&look, &self.server);
            self.server.stage.pause(0..2).await;
            pending.learn(look, found, now());
        }
        Ok(Fetched::Batch {
            records,
            more: conclusion.more,
        })
    }
}

fn now() -> std::time::Instant {
    tokio::time::Instant::now().into_std()
}

/// What a fetch asks for, answered as the statements of the real stores answer it.
struct Asking<'r> {
    plan: &'r Plan,
    request: &'r FetchRequest,
    /// Above it something can have appeared.
    low: i64,
    /// Whether one scan stands for all shards.
    joint: bool,
}

impl Asking<'_> {
    fn owns(&self, row: &Stored) -> bool {
        self.request.shards.iter().any(|owned| owned.shard == row.shard)
    }

    fn is_held(&self, row: &Stored) -> bool {
        let held = &self.request.held;
        held.topics.contains(&row.topic)
            || row
                .key
                .as_ref()
                .is_some_and(|key| held.keys.contains(&(row.shard, key.clone())))
    }

    fn is_in_lane(&self, row: &Stored) -> bool {
        let lanes = &self.plan.lanes;
        row.key
            .as_ref()
            .is_some_and(|key| lanes.iter().any(|lane| lane.key == *key))
    }

    /// Of what is visible, in order of position, what is asked for, in the order of places; and where scans stopped.
    fn answer(&self, visible: &[Record]) -> (Vec<(Place, Record)>, Stops) {
        let Self { plan, low, .. } = self;
        let rows: Vec<(i64, Stored, &Record)> = visible
            .iter()
            .map(|record| (record.position.0, Stored::of(record), record))
            .collect();
        let skip: BTreeSet<i64> = plan.skip.iter().copied().collect();
        let mut answer = Vec::new();
        for (shard, single) in &plan.singles {
            let wanted = |row: &Stored| row.shard == *shard && !self.request.held.topics.contains(&row.topic);
            let found = rows
                .iter()
                .filter(|(position, row, _)| position == single && wanted(row));
            answer.extend(found.map(|(_, _, record)| (Place::Single, (*record).clone())));
        }
        let mut stops = Vec::new();
        // Of what a scan comes across, a stride at most.
        let mut scan = |place: Place,
                        quota: usize,
                        comes: &dyn Fn(i64, &Stored) -> bool,
                        wanted: &dyn Fn(&Stored) -> bool| {
            let mut there = rows
                .iter()
                .filter(|(position, row, _)| comes(*position, row))
                .take(plan.stride);
            let mut gone_past = 0;
            let mut given = 0;
            while given < quota
                && let Some((position, row, record)) = there.next()
            {
                gone_past += 1;
                if !skip.contains(position) && wanted(row) {
                    answer.push((place, (*record).clone()));
                    given += 1;
                }
                if gone_past == plan.stride {
                    stops.push((place, *position));
                }
            }
        };
        for (index, lane) in plan.lanes.iter().enumerate() {
            let comes = |position: i64, row: &Stored| {
                row.shard == lane.shard
                    && (position > lane.after.min(*low) || plan.awaits(position))
                    && position <= lane.upto
            };
            scan(Place::Lane(index), lane.quota, &comes, &|row| {
                row.key.as_ref() == Some(&lane.key)
            });
        }
        for (index, asked) in plan.shards.iter().enumerate() {
            let comes = |position: i64, row: &Stored| {
                (if self.joint {
                    self.owns(row)
                } else {
                    row.shard == asked.shard
                }) && (position > asked.after
                    || (position > *low && !within(&plan.known, position))
                    || plan.awaits(position))
            };
            scan(Place::Shard(index), asked.quota, &comes, &|row| {
                !self.is_held(row) && !self.is_in_lane(row)
            });
        }
        (answer, stops)
    }

    /// A look at what is stored, committed or not.
    fn look(&self, look: &Look, server: &Server) -> Found {
        let rows = server.stored();
        let mut found = Found {
            top: rows.keys().next_back().copied(),
            rows: Vec::new(),
        };
        let pending = rows
            .iter()
            .filter(|(position, row)| within(&look.pending, **position) && !self.is_held(row));
        found.rows.extend(pending.map(|(position, _)| (0, *position)));
        for (index, span) in look.spans.iter().enumerate() {
            let wanted = |row: &Stored| match span.lane {
                Some(lane) => row.key.as_ref() == Some(&self.plan.lanes[lane].key),
                None => self.owns(row) && !self.is_held(row) && !self.is_in_lane(row),
            };
            let of_span = rows
                .iter()
                .filter(|(position, row)| **position > span.above && **position <= span.upto && wanted(row))
                .take(look.limit);
            found
                .rows
                .extend(of_span.map(|(position, _)| (index + 1, *position)));
        }
        found
    }
}
