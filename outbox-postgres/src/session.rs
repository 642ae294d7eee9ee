//! Connections, and the one way to use them.
//!
//! What was interrupted is never used again. A future of sqlx's that is dropped half-way leaves its connection in the
//! middle of an answer or, worse, of a transaction that nobody knows of, into which later writes vanish. So
//! a session that was not [finished](Session::finish) closes its connection, whatever it was doing; the server then
//! rolls back.

use std::time::Duration;

use outbox_core::{Lender, Lent, Result, within};
use sqlx::postgres::{PgArguments, PgConnectOptions, PgConnection, PgRow, Postgres};
use sqlx::query::Query;
use sqlx::{Connection, Executor};

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
        Self::of_all(config).with("synchronous_commit", "on")
    }

    fn of_all(config: &PostgresConfig) -> Self {
        let limit = config.statement_timeout.as_millis().to_string();
        Self(vec![
            ("statement_timeout", limit),
            // A relay that stands still amid a transaction must not keep its leases locked.
            ("idle_in_transaction_session_timeout", "5000".to_owned()),
        ])
    }

    fn with(mut self, name: &'static str, value: &str) -> Self {
        self.0.push((name, value.to_owned()));
        self
    }

    /// For settlements. Those of deliveries alone need not wait for the disk; the statement of the others sees to it that they
    /// do. The plan must not depend on how full the table was when it was made, so it is made once, for
    /// any parameters, and uses the primary key.
    pub(crate) fn settling(config: &PostgresConfig) -> Self {
        let durable = config.synchronous_settle || config.pooler;
        Self::of_all(config)
            .with("synchronous_commit", if durable { "on" } else { "off" })
            .with_index_plans()
    }

    /// For readers; the same of plans.
    pub(crate) fn reading(config: &PostgresConfig) -> Self {
        Self::of_all(config).with_index_plans()
    }

    fn with_index_plans(self) -> Self {
        [
            "enable_seqscan",
            "enable_bitmapscan",
            "enable_hashjoin",
            "enable_mergejoin",
            "jit",
        ]
        .into_iter()
        .fold(self, |settings, off| settings.with(off, "off"))
        .with("max_parallel_workers_per_gather", "0")
        .with("plan_cache_mode", "force_generic_plan")
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

/// Connections of one kind.
///
/// Not sqlx's pool: that one asks the server something whenever a connection comes back, and waits for the answer without
/// a limit. A connection that a firewall forgets in that moment keeps its place until the system gives up, in a quarter
/// of an hour; a few of them, and nothing goes any more.
#[derive(Clone)]
pub(crate) struct Sessions {
    options: PgConnectOptions,
    opening: Opening,
    lender: Lender<PgConnection>,
}

impl Sessions {
    /// Opens none yet.
    pub(crate) fn new(config: &PostgresConfig, settings: Settings, most: u32) -> Result<Self> {
        let opening = Opening::new(config, settings);
        Ok(Self {
            options: opening.options(config)?,
            lender: Lender::new(most, opening.connect_timeout),
            opening,
        })
    }

    /// A session for single statements, each its own transaction.
    pub(crate) async fn open(&self, operation: &'static str) -> Result<Session> {
        let connect = async || PgConnection::connect_with(&self.options).await.during(operation);
        let mut session = Session {
            lent: self.lender.lend(operation, connect).await?,
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

/// A connection that is lent for one operation. One that was not finished is closed with its socket when it is dropped.
pub(crate) struct Session {
    lent: Lent<PgConnection>,
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
        let connection = self.lent.connection()?;
        within(limit, operation, async {
            connection.execute(safe(text)).await.map(drop).during(operation)
        })
        .await
    }

    /// The rows of a statement.
    pub(crate) async fn rows(&mut self, query: Query<'_, Postgres, PgArguments>) -> Result<Vec<PgRow>> {
        let (limit, operation) = (self.limit, self.operation);
        let connection = self.lent.connection()?;
        within(limit, operation, async {
            query.fetch_all(connection).await.during(operation)
        })
        .await
    }

    /// The only row of a statement.
    pub(crate) async fn row(&mut self, query: Query<'_, Postgres, PgArguments>) -> Result<PgRow> {
        let (limit, operation) = (self.limit, self.operation);
        let connection = self.lent.connection()?;
        within(limit, operation, async {
            query.fetch_one(connection).await.during(operation)
        })
        .await
    }

    /// How many rows a statement changed.
    pub(crate) async fn changed(&mut self, query: Query<'_, Postgres, PgArguments>) -> Result<usize> {
        let (limit, operation) = (self.limit, self.operation);
        let connection = self.lent.connection()?;
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
        // In a state that is known.
        self.lent.give_back();
        Ok(())
    }
}
