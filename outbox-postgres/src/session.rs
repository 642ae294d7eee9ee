//! Connections, and the one way to use them.
//!
//! What was interrupted is never used again. A future of sqlx's that is dropped half-way leaves its connection in the
//! middle of an answer or, worse, of a transaction that nobody knows of, into which later writes vanish. So
//! a session that was not [finished](Session::finish) closes its connection, whatever it was doing; the server then
//! rolls back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outbox_core::{Error, ErrorKind, Result};
use sqlx::postgres::{PgArguments, PgConnectOptions, PgConnection, PgRow, Postgres};
use sqlx::query::Query;
use sqlx::{Connection, Executor};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::config::PostgresConfig;
use crate::error::During;
use crate::sql::safe;

/// Settings of the server's that our connections want.
#[derive(Debug, Clone)]
pub(crate) struct Settings(Vec<(&'static str, String)>);

/// Locks are waited for and then seen as they are, whatever the database's or the role's default.
const ISOLATION: &str = "read committed";

impl Settings {
    /// For leases, for operators and for settlements that wait for the disk, whatever the server's default.
    pub(crate) fn durable(config: &PostgresConfig) -> Self {
        Self::bounded(config, true)
    }

    /// For settlements. The plan must not depend on how full the table was when it was made, so it is made once, for
    /// any parameters, and uses the primary key.
    pub(crate) fn settling(config: &PostgresConfig) -> Self {
        let durable = config.synchronous_settle || config.pooler;
        Self::bounded(config, durable).with_index_plans()
    }

    /// For readers; the same of plans.
    pub(crate) fn reading(config: &PostgresConfig) -> Self {
        Self::bounded(config, true).with_index_plans()
    }

    /// A relay that stands still in the middle of a transaction must not keep its locks for longer than a lease lasts.
    fn bounded(config: &PostgresConfig, durable: bool) -> Self {
        let millis = |limit: Duration| limit.as_millis().to_string();
        Self(vec![
            ("statement_timeout", millis(config.statement_timeout)),
            (
                "idle_in_transaction_session_timeout",
                millis(config.statement_timeout.min(IDLE)),
            ),
            (
                "synchronous_commit",
                if durable { "on" } else { "off" }.to_owned(),
            ),
        ])
    }

    fn with_index_plans(mut self) -> Self {
        for off in [
            "enable_seqscan",
            "enable_bitmapscan",
            "enable_hashjoin",
            "enable_mergejoin",
            "jit",
        ] {
            self.0.push((off, "off".to_owned()));
        }
        self.0.push(("max_parallel_workers_per_gather", "0".to_owned()));
        self.0.push(("plan_cache_mode", "force_generic_plan".to_owned()));
        self
    }

    /// What begins a transaction that has these settings by itself, for connections that keep none.
    fn begin(&self) -> String {
        let settings: String = self
            .0
            .iter()
            .map(|(name, value)| format!("; SET LOCAL {name} = '{value}'"))
            .collect();
        format!("BEGIN ISOLATION LEVEL {ISOLATION}{settings}")
    }
}

/// How to open connections of one kind.
#[derive(Debug, Clone)]
pub(crate) struct Opening {
    settings: Settings,
    /// Whether connections keep no settings and no prepared statements.
    pooler: bool,
    /// How long one call may take as seen from here: longer than the server allows it, for when the server is silent.
    limit: Duration,
    connect_timeout: Duration,
    begin: String,
}

/// How long a transaction of ours may wait for its next statement.
const IDLE: Duration = Duration::from_secs(5);
/// A network that has lost the answer is noticed so much later than the server would have given up.
const GRACE: Duration = Duration::from_secs(5);

impl Opening {
    pub(crate) fn new(config: &PostgresConfig, settings: Settings) -> Self {
        Self {
            begin: if config.pooler {
                settings.begin()
            } else {
                "BEGIN".to_owned()
            },
            settings,
            pooler: config.pooler,
            limit: config.statement_timeout.saturating_add(GRACE),
            connect_timeout: config.connect_timeout,
        }
    }

    /// What begins a transaction, where each statement needs one.
    pub(crate) fn pooled(&self) -> Option<&str> {
        self.pooler.then_some(&self.begin)
    }

    /// How long one call may take.
    pub(crate) const fn limit(&self) -> Duration {
        self.limit
    }

    fn options(&self, config: &PostgresConfig) -> Result<PgConnectOptions> {
        let options = config.options()?;
        Ok(if self.pooler {
            options
        } else {
            options
                .options([("default_transaction_isolation", ISOLATION)])
                .options(
                    self.settings
                        .0
                        .iter()
                        .map(|(name, value)| (*name, value.as_str())),
                )
        })
    }

    /// A connection by itself, for a reader.
    pub(crate) async fn connect(
        &self,
        config: &PostgresConfig,
        operation: &'static str,
    ) -> Result<PgConnection> {
        let options = self.options(config)?;
        within(self.connect_timeout, operation, async {
            PgConnection::connect_with(&options).await.during(operation)
        })
        .await
    }
}

/// Connections of one kind, opened when they are needed and kept for the next time.
///
/// Not sqlx's pool: that asks each connection something when it comes back and waits for the answer without a limit. A
/// network that swallows the question would cost the relay one connection for good, and it has few.
#[derive(Debug, Clone)]
pub(crate) struct Sessions {
    opening: Opening,
    options: PgConnectOptions,
    /// Connections that nobody uses. The lock is held for a push or a pop.
    idle: Idle,
    /// One for each connection that may be open.
    permits: Arc<Semaphore>,
}

type Idle = Arc<Mutex<Vec<PgConnection>>>;

impl Sessions {
    /// Opens none yet.
    pub(crate) fn new(config: &PostgresConfig, settings: Settings, most: u32) -> Result<Self> {
        let opening = Opening::new(config, settings);
        Ok(Self {
            options: opening.options(config)?,
            opening,
            idle: Idle::default(),
            permits: Arc::new(Semaphore::new(usize::try_from(most).unwrap_or(usize::MAX))),
        })
    }

    /// A session for single statements, each its own transaction.
    pub(crate) async fn open(&self, operation: &'static str) -> Result<Session> {
        let connect = async {
            let permit = Arc::clone(&self.permits)
                .acquire_owned()
                .await
                .map_err(|_| Error::new(ErrorKind::Unavailable, operation, "the store is being dropped"))?;
            let kept = lock(&self.idle).pop();
            let connection = match kept {
                Some(connection) => connection,
                None => PgConnection::connect_with(&self.options)
                    .await
                    .during(operation)?,
            };
            Ok((permit, connection))
        };
        let (permit, connection) = within(self.opening.connect_timeout, operation, connect).await?;
        let mut session = Session {
            connection: Some(connection),
            idle: Arc::clone(&self.idle),
            _permit: permit,
            operation,
            limit: self.opening.limit,
            open: false,
        };
        // Behind a pooler only a transaction stays on one connection of the server's.
        if self.opening.pooler {
            session.begin(&self.opening.begin).await?;
        }
        Ok(session)
    }

    /// A session that is one transaction, committed when it is finished.
    pub(crate) async fn begin(&self, operation: &'static str) -> Result<Session> {
        let mut session = self.open(operation).await?;
        if !session.open {
            session.begin(&self.opening.begin).await?;
        }
        Ok(session)
    }
}

fn lock(idle: &Idle) -> MutexGuard<'_, Vec<PgConnection>> {
    idle.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection that is lent for one operation.
#[derive(Debug)]
pub(crate) struct Session {
    /// None once it is given back.
    connection: Option<PgConnection>,
    idle: Idle,
    _permit: OwnedSemaphorePermit,
    operation: &'static str,
    limit: Duration,
    /// Whether a transaction is open.
    open: bool,
}

impl Session {
    async fn begin(&mut self, text: &str) -> Result<()> {
        self.open = true;
        self.run(text.to_owned()).await
    }

    /// Runs text of ours that has no parameters.
    pub(crate) async fn run(&mut self, text: String) -> Result<()> {
        let (limit, operation) = (self.limit, self.operation);
        let connection = self.lent()?;
        within(limit, operation, async {
            connection.execute(safe(text)).await.map(drop).during(operation)
        })
        .await
    }

    /// The rows of a statement.
    pub(crate) async fn rows(&mut self, query: Query<'_, Postgres, PgArguments>) -> Result<Vec<PgRow>> {
        let (limit, operation) = (self.limit, self.operation);
        let connection = self.lent()?;
        within(limit, operation, async {
            query.fetch_all(connection).await.during(operation)
        })
        .await
    }

    /// The only row of a statement.
    pub(crate) async fn row(&mut self, query: Query<'_, Postgres, PgArguments>) -> Result<PgRow> {
        let (limit, operation) = (self.limit, self.operation);
        let connection = self.lent()?;
        within(limit, operation, async {
            query.fetch_one(connection).await.during(operation)
        })
        .await
    }

    /// How many rows a statement changed.
    pub(crate) async fn changed(&mut self, query: Query<'_, Postgres, PgArguments>) -> Result<usize> {
        let (limit, operation) = (self.limit, self.operation);
        let connection = self.lent()?;
        within(limit, operation, async {
            let result = query.execute(connection).await.during(operation)?;
            Ok(usize::try_from(result.rows_affected()).unwrap_or(usize::MAX))
        })
        .await
    }

    /// Commits what is open, and gives the connection back.
    pub(crate) async fn finish(mut self) -> Result<()> {
        if self.open {
            self.run("COMMIT".to_owned()).await?;
        }
        // Back to the others, in a state that is known.
        lock(&self.idle).extend(self.connection.take());
        Ok(())
    }

    fn lent(&mut self) -> Result<&mut PgConnection> {
        match &mut self.connection {
            Some(connection) => Ok(connection),
            None => Err(Error::new(
                ErrorKind::Unexpected,
                self.operation,
                "the session is over",
            )),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.connection.take().is_some() {
            // Closed with its socket, and the idle ones as well: what broke it, a restart or a network, has most likely
            // broken them, and each would cost somebody a failure to find that out.
            lock(&self.idle).clear();
        }
    }
}

/// Gives up on a server that does not answer.
pub(crate) async fn within<T>(
    limit: Duration,
    operation: &'static str,
    call: impl Future<Output = Result<T>>,
) -> Result<T> {
    timeout(limit, call).await.unwrap_or_else(|_| {
        Err(
            Error::new(ErrorKind::Unavailable, operation, "the server does not answer")
                .with("limit", format!("{limit:?}")),
        )
    })
}
