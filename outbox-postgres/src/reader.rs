//! Reading batches: one statement, on a connection of the reader's own.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::TryStreamExt;
use outbox_core::cursor::{Cursor, Intake, Place, Plan, Snapshot, Told, Transactions, Xid};
use outbox_core::{Error, ErrorKind, FetchRequest, Fetched, Held, Reader, Record, Result, within};
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Executor, Row};

use crate::config::PostgresConfig;
use crate::error::During;
use crate::row::{Rows, limit, number, small, text};
use crate::session::{Opening, Settings};
use crate::sql::{Sql, safe};

const DURING: &str = "fetch";

/// What a row's last column says: it is a message, and the scan goes on.
const GIVEN: i32 = 0;
/// It is none that is wanted, but where the scan ended.
const PASSED: i32 = 2;

/// A reader with a connection of its own, which is thrown away with it.
pub(crate) struct PostgresReader {
    connection: PgConnection,
    opening: Opening,
    sql: Arc<Sql>,
    config: Arc<PostgresConfig>,
    cursor: Cursor,
    transactions: Transactions,
    /// When the server was started, as it told at the first fetch.
    started: Option<String>,
    /// The last position that was drawn before the last fetch.
    last: i64,
    /// The relay hands over the same set until it changes.
    barred: Barred,
}

impl PostgresReader {
    /// Scans stop after so many rows.
    #[cfg(test)]
    pub(crate) fn striding(mut self, rows: usize) -> Self {
        self.cursor = self.cursor.striding(rows);
        self
    }

    pub(crate) async fn connect(config: &Arc<PostgresConfig>, sql: &Arc<Sql>) -> Result<Self> {
        let opening = Opening::new(config, Settings::reading(config));
        Ok(Self {
            connection: opening.connect(config, DURING).await?,
            opening,
            sql: Arc::clone(sql),
            cursor: Cursor::new(config.fetch, config.sweep_interval()),
            transactions: Transactions::new(),
            config: Arc::clone(config),
            started: None,
            last: i64::MIN,
            barred: Barred::default(),
        })
    }

    async fn read(&mut self, request: &FetchRequest) -> Result<Fetched> {
        let plan = self.cursor.plan(request, self.transactions.reach());
        self.barred.follow(&request.held);
        if let Some(begin) = self.opening.pooled() {
            self.connection
                .execute(safe(begin.to_owned()))
                .await
                .during(DURING)?;
        }
        let (server, records, intake) = self.run(&plan).await?;
        if self.opening.pooled().is_some() {
            self.connection
                .execute(safe("COMMIT".to_owned()))
                .await
                .during(DURING)?;
        }
        if let Some(reason) = self.replaced(&server) {
            return Ok(Fetched::Reset { reason });
        }
        let low = self.transactions.learn(&server.told);
        let conclusion = self.cursor.conclude(&plan, &intake, low);
        conclusion.report("postgres", &self.config.place());
        Ok(Fetched::Batch {
            records,
            more: conclusion.more,
        })
    }

    /// Runs the statement and takes of its rows what the limits allow; the rest is read off the wire and dropped.
    async fn run(&mut self, plan: &Plan) -> Result<(Answer, Vec<Record>, Intake)> {
        let finished = if plan.from_start {
            (i64::MIN, Vec::new())
        } else {
            self.transactions.finished()
        };
        let query = Binding {
            plan,
            finished,
            barred: &self.barred,
        };
        let mut stream = query.bind(&self.sql).fetch(&mut self.connection);
        let mut answer = None;
        let mut records = Vec::new();
        let mut intake = Intake::new(plan);
        let mut rows = Rows::default();
        while let Some(row) = stream.try_next().await.during(DURING)? {
            let branch: i32 = row.try_get(0).during(DURING)?;
            let index = usize::try_from(number(&row, 1).during(DURING)?)
                .unwrap_or_default()
                .saturating_sub(1);
            let place = match branch {
                0 => {
                    answer = Some(Answer::read(&row)?);
                    continue;
                }
                1 => Place::Single,
                2 => Place::Lane(index),
                _ => Place::Shard(index),
            };
            let passing: i32 = row.try_get(12).during(DURING)?;
            if passing != PASSED {
                let record = rows.record(&row, 2).during(DURING)?;
                if intake.offer(plan, place, record.position.0, record.message.size()) {
                    records.push(record);
                }
            }
            if passing != GIVEN {
                intake.stopped(place, number(&row, 3).during(DURING)?);
            }
        }
        drop(stream);
        let answer = answer.ok_or_else(|| {
            Error::new(
                ErrorKind::Unexpected,
                DURING,
                "the server told nothing of its state",
            )
        })?;
        Ok((answer, records, intake))
    }

    /// Why what is known is void: the server was restarted or replaced, which may have undone settlements.
    fn replaced(&mut self, answer: &Answer) -> Option<String> {
        let before = self.started.get_or_insert_with(|| answer.started.clone());
        if *before != answer.started {
            return Some(format!(
                "the server was started at {} and not at {before} as before",
                answer.started
            ));
        }
        let known = std::mem::replace(&mut self.last, answer.told.last);
        (self.last < known).then(|| {
            format!(
                "positions went back from {known} to {}: the sequence was reset or the database restored",
                self.last
            )
        })
    }
}

#[async_trait]
impl Reader for PostgresReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        if request.shards.is_empty() {
            return Ok(Fetched::Batch {
                records: Vec::new(),
                more: false,
            });
        }
        let limit = self.opening.limit();
        within(limit, DURING, self.read(request)).await
    }
}

impl fmt::Debug for PostgresReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresReader")
            .field("cursor", &self.cursor)
            .finish_non_exhaustive()
    }
}

/// The first row: what the server says of itself.
struct Answer {
    told: Told,
    started: String,
}

impl Answer {
    fn read(row: &PgRow) -> Result<Self> {
        let told = text(row, 8).during(DURING)?.unwrap_or_default();
        let started = text(row, 9).during(DURING)?.unwrap_or_default().to_owned();
        let mut parts = told.split('|');
        let (snapshot, _low, ahead, reads_only, standby) = (
            parts.next().and_then(Snapshot::parse),
            parts.next(),
            parts.next().and_then(|text| text.parse().ok()),
            parts.next(),
            parts.next(),
        );
        let (Some(snapshot), Some(ahead)) = (snapshot, ahead) else {
            return Err(Error::new(
                ErrorKind::Unexpected,
                DURING,
                "the server's snapshot cannot be understood",
            ));
        };
        if standby != Some("f") {
            return Err(Error::new(
                ErrorKind::Unavailable,
                DURING,
                "the server is in recovery: a standby does not tell which transactions are open. Connect to the primary",
            ));
        }
        if reads_only != Some("t") {
            return Err(Error::new(
                ErrorKind::Unexpected,
                DURING,
                "the reader's transaction writes: is there a function of volatile effect in its way?",
            ));
        }
        Ok(Self {
            told: Told {
                snapshot,
                last: number(row, 3).during(DURING)?,
                ahead,
            },
            started,
        })
    }
}

/// What is held, as the statement's parameters.
#[derive(Debug, Default)]
struct Barred {
    held: Arc<Held>,
    topics: Vec<String>,
    key_topics: Vec<String>,
    keys: Vec<Vec<u8>>,
}

impl Barred {
    fn follow(&mut self, held: &Arc<Held>) {
        if Arc::ptr_eq(&self.held, held) {
            return;
        }
        self.topics = held.topics.iter().map(ToString::to_string).collect();
        self.key_topics = held.keys.iter().map(|(_, key)| key.topic.to_string()).collect();
        self.keys = held.keys.iter().map(|(_, key)| key.key.to_vec()).collect();
        self.held = Arc::clone(held);
    }
}

/// A plan as the statement's parameters, in their order.
struct Binding<'p> {
    plan: &'p Plan,
    /// As of [`Transactions::finished`].
    finished: (i64, Vec<(Xid, i64)>),
    barred: &'p Barred,
}

impl<'p> Binding<'p> {
    fn bind(&self, sql: &Sql) -> sqlx::query::Query<'p, sqlx::Postgres, sqlx::postgres::PgArguments> {
        let Self {
            plan,
            finished: (below, running),
            barred,
        } = self;
        let (xids, bounds): (Vec<String>, Vec<i64>) =
            running.iter().map(|(xid, low)| (xid.to_string(), *low)).unzip();
        let (single_shards, singles): (Vec<i16>, Vec<i64>) = plan
            .singles
            .iter()
            .map(|(shard, position)| (small(*shard), *position))
            .unzip();
        // What lanes read the shards leave out.
        let apart = || plan.lanes.iter().map(|lane| &lane.key);
        let key_topics: Vec<&'p str> = barred
            .key_topics
            .iter()
            .map(String::as_str)
            .chain(apart().map(|key| &*key.topic))
            .collect();
        let keys: Vec<&'p [u8]> = barred
            .keys
            .iter()
            .map(Vec::as_slice)
            .chain(apart().map(|key| &*key.key))
            .collect();
        let goes_past = !barred.held.topics.is_empty() || !key_topics.is_empty();
        let statement = if goes_past { &sql.fetch_past } else { &sql.fetch };
        let query = statement
            .query()
            .bind(*below)
            .bind(xids)
            .bind(bounds)
            .bind(&plan.skip)
            .bind(single_shards)
            .bind(singles)
            .bind(&barred.topics)
            .bind(key_topics)
            .bind(keys)
            .bind(
                plan.lanes
                    .iter()
                    .map(|lane| small(lane.shard))
                    .collect::<Vec<_>>(),
            )
            .bind(
                plan.lanes
                    .iter()
                    .map(|lane| &*lane.key.topic)
                    .collect::<Vec<&'p str>>(),
            )
            .bind(
                plan.lanes
                    .iter()
                    .map(|lane| &*lane.key.key)
                    .collect::<Vec<&'p [u8]>>(),
            )
            .bind(plan.lanes.iter().map(|lane| lane.after).collect::<Vec<_>>())
            .bind(plan.lanes.iter().map(|lane| lane.upto).collect::<Vec<_>>())
            .bind(
                plan.lanes
                    .iter()
                    .map(|lane| limit(lane.quota))
                    .collect::<Vec<_>>(),
            )
            .bind(
                plan.shards
                    .iter()
                    .map(|asked| small(asked.shard))
                    .collect::<Vec<_>>(),
            )
            .bind(plan.shards.iter().map(|asked| asked.after).collect::<Vec<_>>())
            .bind(
                plan.shards
                    .iter()
                    .map(|asked| limit(asked.quota))
                    .collect::<Vec<_>>(),
            );
        if goes_past {
            query.bind(limit(plan.stride))
        } else {
            query
        }
    }
}
