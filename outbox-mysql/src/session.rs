//! Connections, and the one way to use them.
//!
//! What was interrupted is never used again: a connection that was not given back in order is closed, whatever it was
//! doing, and the server then rolls back.
//!
//! What the relay does in a transaction is **one text**, a script that the server runs to its end whatever becomes of us:
//! a relay that is stopped in the middle keeps no lock. And it is one round trip.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use outbox_core::{ErrorKind, Lender, Lent, Result, within};
use sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlRow};
use sqlx::{ConnectOptions, Connection, Either};

use crate::config::MysqlConfig;
use crate::error::During;
use crate::sql::safe;

/// We give up on a statement a little later than the server does, whose reason is the better one.
const GRACE: Duration = Duration::from_secs(2);

/// How often a script is run again that lost a lock to another session. To repeat one is always safe: it is a
/// transaction, which was rolled back, or its statements are such that the second time they change nothing. Not once it
/// has waited for as long as a statement may take.
const REPEATS: u32 = 5;

/// How connections are opened, and for how long a call may take.
#[derive(Debug, Clone)]
pub(crate) struct Opening {
    options: MySqlConnectOptions,
    settings: String,
    statement: Duration,
    limit: Duration,
    connect_timeout: Duration,
}

/// How many seconds a lock is waited for: a settlement or a promotion that waits has its leases locked, and these must be
/// renewed.
const LOCKED: u64 = 2;

impl Opening {
    pub(crate) fn new(config: &MysqlConfig) -> Result<Self> {
        let limit = config.statement_timeout;
        let (seconds, millis) = (limit.as_secs_f64(), limit.as_millis());
        Ok(Self {
            // The text of a script holds keys and reasons, which no log should have.
            options: config.options()?.disable_statement_logging(),
            // Locks are waited for and then seen as they are, whatever the server's default. Values are refused, not
            // bent. The two servers have their own names for the limit of a statement, and for that of a list of
            // positions, beyond which they would go through the table.
            settings: format!(
                "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED; \
                 SET SESSION autocommit = 1, sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', \
                 group_concat_max_len = 1000000, innodb_lock_wait_timeout = {} \
                 /*!80000 , max_execution_time = {millis}, range_optimizer_max_mem_size = 0 */ \
                 /*M! , max_statement_time = {seconds}, in_predicate_conversion_threshold = 0 */",
                limit.as_secs().clamp(1, LOCKED),
            ),
            statement: limit,
            limit: limit.saturating_add(GRACE),
            connect_timeout: config.connect_timeout,
        })
    }

    /// How long one call may take.
    pub(crate) const fn limit(&self) -> Duration {
        self.limit
    }

    /// A connection by itself, for a reader.
    pub(crate) async fn connect(&self, operation: &'static str) -> Result<MySqlConnection> {
        within(self.connect_timeout, operation, self.open(operation)).await
    }

    async fn open(&self, operation: &'static str) -> Result<MySqlConnection> {
        let mut connection = MySqlConnection::connect_with(&self.options)
            .await
            .during(operation)?;
        run(&mut connection, self.settings.clone(), operation).await?;
        Ok(connection)
    }
}

/// What the statements of a script came to, in their order.
#[derive(Debug, Default)]
pub(crate) struct Answers(Vec<Answer>);

#[derive(Debug, Default)]
struct Answer {
    rows: Vec<MySqlRow>,
    changed: u64,
}

impl Answers {
    /// The rows of the statement at `index`.
    pub(crate) fn rows(&self, index: usize) -> &[MySqlRow] {
        self.0.get(index).map_or(&[], |answer| &answer.rows)
    }

    /// The only row of the statement at `index`.
    pub(crate) fn row(&self, index: usize) -> sqlx::Result<&MySqlRow> {
        self.rows(index).first().ok_or(sqlx::Error::RowNotFound)
    }

    /// How many rows the statement at `index` changed.
    pub(crate) fn changed(&self, index: usize) -> usize {
        let changed = self.0.get(index).map_or(0, |answer| answer.changed);
        usize::try_from(changed).unwrap_or(usize::MAX)
    }
}

/// Runs text of ours, of one statement or several.
pub(crate) async fn run(
    connection: &mut MySqlConnection,
    script: impl Into<Arc<String>>,
    operation: &'static str,
) -> Result<Answers> {
    let mut stream = sqlx::raw_sql(safe(script.into())).fetch_many(connection);
    let mut answers = Vec::new();
    let mut rows = Vec::new();
    while let Some(item) = stream.try_next().await.during(operation)? {
        match item {
            Either::Right(row) => rows.push(row),
            Either::Left(done) => answers.push(Answer {
                rows: std::mem::take(&mut rows),
                changed: done.rows_affected(),
            }),
        }
    }
    Ok(Answers(answers))
}

/// Connections of one kind.
#[derive(Debug, Clone)]
pub(crate) struct Sessions {
    opening: Opening,
    lender: Lender<MySqlConnection>,
}

impl Sessions {
    /// Opens none yet.
    pub(crate) fn new(config: &MysqlConfig, most: u32) -> Result<Self> {
        let opening = Opening::new(config)?;
        Ok(Self {
            lender: Lender::new(most, opening.connect_timeout),
            opening,
        })
    }

    /// A session of several calls.
    pub(crate) async fn open(&self, operation: &'static str) -> Result<Session> {
        let connect = async || self.opening.open(operation).await;
        Ok(Session {
            lent: self.lender.lend(operation, connect).await?,
            operation,
            limit: self.opening.limit,
        })
    }

    /// Runs a script by itself, and again when it lost a lock to another session.
    pub(crate) async fn run(&self, operation: &'static str, script: String) -> Result<Answers> {
        let script = Arc::new(script);
        let begun = Instant::now();
        let mut repeats = 0;
        loop {
            let mut session = self.open(operation).await?;
            match session.run(Arc::clone(&script)).await {
                Err(error)
                    if error.kind() == ErrorKind::Conflict
                        && repeats < REPEATS
                        && begun.elapsed() < self.opening.statement =>
                {
                    repeats += 1;
                    drop(session);
                    // Who met once would meet again.
                    let pause = fastrand::u64(0..5 << repeats);
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
                answers => {
                    let answers = answers?;
                    session.finish();
                    return Ok(answers);
                }
            }
        }
    }
}

/// A connection that is lent for one operation. One that was not finished is closed with its socket when it is dropped.
pub(crate) struct Session {
    lent: Lent<MySqlConnection>,
    operation: &'static str,
    limit: Duration,
}

impl Session {
    /// Runs text of ours, of one statement or several.
    pub(crate) async fn run(&mut self, script: impl Into<Arc<String>>) -> Result<Answers> {
        let (limit, operation) = (self.limit, self.operation);
        let connection = self.lent.connection()?;
        within(limit, operation, run(connection, script, operation)).await
    }

    /// Gives the connection back, on which nothing is open.
    pub(crate) fn finish(self) {
        self.lent.give_back();
    }
}
