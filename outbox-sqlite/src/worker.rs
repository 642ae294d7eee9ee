//! One thread owns one connection and does its jobs one by one.
//!
//! That is what makes cancelling safe: a job is a whole transaction, and dropping the future that waits for it
//! neither stops it half-way nor leaves anything open. It also keeps blocking calls off the async runtime and all
//! statements prepared.

use std::fs::{self, Metadata};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use outbox_core::{Error, ErrorKind, Result};
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};
use tokio::sync::oneshot;

use crate::config::{SqliteConfig, Synchronous};
use crate::error::During;
use crate::schema;
use crate::sql::STATEMENTS;

/// A handle to the thread; the thread ends with its last handle and its last job.
#[derive(Debug, Clone)]
pub(crate) struct Worker {
    /// To the thread, first in, first out.
    jobs: mpsc::Sender<Job>,
}

type Job = Box<dyn FnOnce(&mut Session) + Send>;

impl Worker {
    /// Starts the thread; it connects at its first job.
    pub(crate) fn start(name: &str, config: Arc<SqliteConfig>) -> Result<Self> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        thread::Builder::new()
            .name(format!("outbox-{name}"))
            .spawn(move || {
                let mut session = Session::new(config);
                for job in inbox {
                    job(&mut session);
                }
            })
            .map_err(|error| {
                Error::new(
                    ErrorKind::Unavailable,
                    "open",
                    "the system gives no thread for a connection",
                )
                .with_source(error)
            })?;
        Ok(Self { jobs })
    }

    /// Does a job on the connection. Dropping the future before the job began drops the job; after that the job is
    /// done all the same.
    pub(crate) async fn run<T, F>(&self, operation: &'static str, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Connection, FileId) -> Result<T> + Send + 'static,
    {
        let ended = || {
            Error::new(
                ErrorKind::Unexpected,
                operation,
                "the connection's thread has ended",
            )
        };
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |session| {
            if !reply.is_closed() {
                // Nobody may wait for it any more, which is all the same.
                let _ = reply.send(session.run(operation, job));
            }
        });
        self.jobs.send(job).map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }
}

/// A connection that is made when it is needed, and made anew when the file was replaced.
pub(crate) struct Session {
    config: Arc<SqliteConfig>,
    open: Option<(Connection, FileId)>,
}

impl Session {
    pub(crate) const fn new(config: Arc<SqliteConfig>) -> Self {
        Self { config, open: None }
    }

    pub(crate) fn run<T>(
        &mut self,
        operation: &'static str,
        job: impl FnOnce(&mut Connection, FileId) -> Result<T>,
    ) -> Result<T> {
        let file = FileId::of(&self.config)?;
        if self.open.as_ref().is_some_and(|(_, own)| *own != file) {
            self.open = None;
        }
        let (connection, file) = match &mut self.open {
            Some(open) => open,
            none => none.insert((open(&self.config)?, file)),
        };
        let result = job(connection, *file);
        // Transactions roll back when they are dropped; should that have failed, the connection is not used again.
        if !connection.is_autocommit() {
            tracing::warn!(operation, "a transaction was left open; the connection is closed");
            self.open = None;
        }
        // After anything but a lost race or a wrong argument, the next job begins with a connection that is checked.
        if let Err(error) = &result
            && !matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Invalid)
        {
            self.open = None;
        }
        result
    }
}

/// A connection for the relay's side to an outbox that exists, its schema checked.
pub(crate) fn open(config: &SqliteConfig) -> Result<Connection> {
    let connection = connect(config, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    schema::check(&connection, config)?;
    Ok(connection)
}

/// A connection with the settings that all of ours have.
pub(crate) fn connect(config: &SqliteConfig, flags: OpenFlags) -> Result<Connection> {
    const DURING: &str = "open";
    let attempt = || -> rusqlite::Result<Connection> {
        let connection = Connection::open_with_flags(file(config), flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        connection.busy_timeout(config.busy_timeout)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        connection.pragma_update(None, SYNCHRONOUS, config.synchronous.name())?;
        // Reads the file for the first time, so that one that is no database is noticed here.
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        Ok(connection)
    };
    attempt()
        .during(DURING)
        .map_err(|error| error.with("path", config.path.display()))
}

/// The path such that SQLite does not take it for a URI.
fn file(config: &SqliteConfig) -> PathBuf {
    if config.path.as_os_str().to_string_lossy().starts_with("file:") {
        return PathBuf::from(".").join(&config.path);
    }
    config.path.clone()
}

const SYNCHRONOUS: &str = "synchronous";

impl Synchronous {
    const fn name(self) -> &'static str {
        match self {
            Self::Normal => "NORMAL",
            Self::Full => "FULL",
        }
    }
}

/// Does something whose commits are on the disk before anybody hears of them, whatever is configured.
pub(crate) fn durably<T>(
    connection: &mut Connection,
    operation: &'static str,
    job: impl FnOnce(&mut Connection) -> Result<T>,
) -> Result<T> {
    let usual: i64 = connection
        .pragma_query_value(None, SYNCHRONOUS, |row| row.get(0))
        .during(operation)?;
    connection
        .pragma_update(None, SYNCHRONOUS, Synchronous::Full.name())
        .during(operation)?;
    let result = job(connection);
    connection
        .pragma_update(None, SYNCHRONOUS, usual)
        .during(operation)?;
    result
}

/// A transaction that writes: it waits for its turn at its beginning, and never fails for having read first.
///
/// SQLite has no queue: whoever asks when the lock happens to be free gets it, and SQLite's own way to wait asks less
/// and less often, in the end every 100 ms. Beside a few busy producers a lease would run out before its turn came.
/// So this one asks every millisecond, as long as the connection's busy timeout says.
pub(crate) fn write<'c>(connection: &'c mut Connection, operation: &'static str) -> Result<Transaction<'c>> {
    let connection: &'c Connection = connection;
    let begin = || -> rusqlite::Result<Transaction<'c>> {
        let patience: u32 = connection.pragma_query_value(None, "busy_timeout", |row| row.get(0))?;
        let patience = Duration::from_millis(u64::from(patience));
        let end = Instant::now() + patience;
        connection.busy_timeout(Duration::ZERO)?;
        let begun = loop {
            match Transaction::new_unchecked(connection, TransactionBehavior::Immediate) {
                Err(error) if is_busy(&error) && Instant::now() < end => thread::sleep(TURN),
                begun => break begun,
            }
        };
        connection.busy_timeout(patience)?;
        begun
    };
    begin().during(operation)
}

/// How often a writer asks whether it is its turn.
const TURN: Duration = Duration::from_millis(1);

fn is_busy(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
}

/// Tells a file from another one that was put in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId(u64, u64);

impl FileId {
    /// The file that the path names now.
    pub(crate) fn of(config: &SqliteConfig) -> Result<Self> {
        let metadata = fs::metadata(&config.path).map_err(|error| {
            let (kind, text) = match error.kind() {
                std::io::ErrorKind::NotFound => (
                    ErrorKind::Schema,
                    "there is no such database file: run migrate, or correct the path",
                ),
                std::io::ErrorKind::PermissionDenied => {
                    (ErrorKind::Denied, "access to the database file was refused")
                }
                _ => (ErrorKind::Unavailable, "the database file cannot be reached"),
            };
            Error::new(kind, "open", text)
                .with("path", config.path.display())
                .with_source(error)
        })?;
        Ok(Self::read(&metadata))
    }

    #[cfg(unix)]
    fn read(metadata: &Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Self(metadata.dev(), metadata.ino())
    }

    /// Elsewhere an open file cannot be replaced.
    #[cfg(not(unix))]
    fn read(_: &Metadata) -> Self {
        Self(0, 0)
    }
}

/// A duration in SQLite's milliseconds.
pub(crate) fn millis(duration: Duration) -> i64 {
    outbox_core::millis(duration)
}
