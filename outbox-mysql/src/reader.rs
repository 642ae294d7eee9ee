//! Reading batches: one statement, and now and then a look at what is not committed yet, on a connection of the reader's
//! own.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use futures::TryStreamExt;
use outbox_core::cursor::{Cursor, Found, Intake, Pending, Place, Plan};
use outbox_core::{FetchMode, FetchRequest, Fetched, Reader, Record, Result, within};
use sqlx::mysql::MySqlConnection;

use crate::config::MysqlConfig;
use crate::error::During;
use crate::row::{Rows, number, optional_number};
use crate::schema::read_only;
use crate::session::{Opening, run};
use crate::sql::{Asking, Barred, Sql, WRITERS, safe};

const DURING: &str = "fetch";

/// Who owns no more than one shard in so many reads each of them by itself.
const FEW: usize = 8;

/// A reader with a connection of its own, which is thrown away with it.
pub(crate) struct MysqlReader {
    connection: MySqlConnection,
    opening: Opening,
    sql: Arc<Sql>,
    config: Arc<MysqlConfig>,
    mode: FetchMode,
    cursor: Cursor,
    pending: Pending,
    barred: Barred,
}

impl MysqlReader {
    /// Scans stop after so many rows.
    #[cfg(test)]
    pub(crate) fn striding(mut self, rows: usize) -> Self {
        self.cursor = self.cursor.striding(rows);
        self
    }

    pub(crate) async fn connect(config: &Arc<MysqlConfig>, sql: &Arc<Sql>) -> Result<Self> {
        let opening = Opening::new(config)?;
        let mut connection = opening.connect(DURING).await?;
        let mode = mode(config, &mut connection, &opening).await?;
        Ok(Self {
            connection,
            opening,
            sql: Arc::clone(sql),
            mode,
            cursor: Cursor::joint(mode, config.sweep_interval),
            pending: Pending::new(config.lag),
            barred: Barred::new(&Arc::default()),
            config: Arc::clone(config),
        })
    }

    async fn read(&mut self, request: &FetchRequest) -> Result<Fetched> {
        let plan = self.cursor.plan(request, self.pending.reach(&request.in_flight));
        self.barred.follow(&request.held);
        let low = self.pending.low();
        let mut asking = Asking {
            plan: &plan,
            low: if plan.from_start { i64::MIN } else { low },
            floor: i64::MIN,
            owned: &request.shards,
            few: request.shards.len() * FEW <= usize::from(self.config.shards),
            barred: &self.barred,
        };
        if asking.begins_anew() {
            let answers = run(&mut self.connection, self.sql.lowest(), DURING).await?;
            let lowest = optional_number(answers.row(0).during(DURING)?, 0).during(DURING)?;
            asking.floor = lowest.map_or(i64::MIN, |lowest| lowest.saturating_sub(1));
        }
        let (records, intake) = batch(&mut self.connection, &plan, self.sql.fetch(&asking)).await?;
        let conclusion = self.cursor.conclude(&plan, &intake, low);
        let spans = self.cursor.passed(&plan, low);
        if self.mode == FetchMode::Cursor
            && let Some(look) = self.pending.look(&plan, spans, &records, Instant::now())
        {
            let found = found(&mut self.connection, self.sql.look(&look, &asking)).await?;
            self.pending.learn(look, found, Instant::now());
        }
        if conclusion.surplus > 0 {
            conclusion.report("mysql", &self.config.place());
            // Whether positions went back or a statement took too long: nothing that was known of them is certain.
            self.pending = Pending::new(self.config.lag);
        }
        Ok(Fetched::Batch {
            records,
            more: conclusion.more,
        })
    }
}

/// How to read: dirty reads see what one server does, so where several write, all is read from the start.
async fn mode(
    config: &MysqlConfig,
    connection: &mut MySqlConnection,
    opening: &Opening,
) -> Result<FetchMode> {
    if config.fetch == FetchMode::Rescan {
        return Ok(FetchMode::Rescan);
    }
    let writers = run(connection, WRITERS.to_owned(), DURING);
    let several = within(opening.limit(), DURING, writers).await?;
    if several.rows(0).is_empty() {
        return Ok(FetchMode::Cursor);
    }
    tracing::warn!(
        outbox = config.place(),
        "several servers of this cluster take writes, and one does not show what is open on another: reading from the \
         start each time"
    );
    Ok(FetchMode::Rescan)
}

/// Takes of the answer what the limits allow; the rest is read off the wire and dropped.
async fn batch(
    connection: &mut MySqlConnection,
    plan: &Plan,
    statement: String,
) -> Result<(Vec<Record>, Intake)> {
    let mut stream = sqlx::raw_sql(safe(Arc::new(statement))).fetch(connection);
    let (mut rows, mut records, mut intake) = (Rows::default(), Vec::new(), Intake::new(plan));
    while let Some(row) = stream.try_next().await.during(DURING)? {
        let index = usize::try_from(number(&row, 1).during(DURING)?).unwrap_or_default();
        let place = match number(&row, 0).during(DURING)? {
            0 if index == 0 => continue,
            // What it has comes from another one: in its own order, and later than that one shows it.
            0 => return Err(read_only(DURING)),
            ends @ (1 | 2) => {
                let place = match ends {
                    1 => Place::Shard(index),
                    _ => Place::Lane(index),
                };
                intake.stopped(place, number(&row, 3).during(DURING)?.saturating_sub(1));
                continue;
            }
            3 => Place::Single,
            4 => Place::Lane(index),
            _ => Place::Shard(index),
        };
        let record = rows.record(&row, 2).during(DURING)?;
        if intake.offer(plan, place, record.position.0, record.message.size()) {
            records.push(record);
        }
    }
    Ok((records, intake))
}

async fn found(connection: &mut MySqlConnection, script: String) -> Result<Found> {
    let answers = run(connection, script, DURING).await?;
    let mut found = Found::default();
    for row in answers.rows(1) {
        let position = optional_number(row, 1).during(DURING)?;
        match (usize::try_from(number(row, 0).during(DURING)?), position) {
            (Ok(span), Some(position)) => found.rows.push((span, position)),
            (_, top) => found.top = top,
        }
    }
    found.rows.sort_unstable();
    Ok(found)
}

#[async_trait]
impl Reader for MysqlReader {
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

impl fmt::Debug for MysqlReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MysqlReader")
            .field("cursor", &self.cursor)
            .field("pending", &self.pending)
            .finish_non_exhaustive()
    }
}
