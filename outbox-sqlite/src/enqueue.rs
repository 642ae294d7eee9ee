//! Enqueueing: one `INSERT` in the producer's own transaction.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use outbox_core::{Enqueue, Limits, Message, Result};
use rusqlite::{Connection, Transaction, params};

use crate::config::SqliteConfig;
use crate::error::During;
use crate::sql::Sql;

/// The producer's handle: cheap to clone, holds no connection.
///
/// Its functions block for as long as an `INSERT` does. Begin the transaction **IMMEDIATE**: one that reads first and
/// writes later fails when somebody else wrote in between. Have `PRAGMA synchronous = FULL` (SQLite's default) on the
/// producer's connection: with less, a power loss can undo a commit whose message was already delivered.
///
/// ```
/// use outbox_core::Message;
/// use outbox_sqlite::rusqlite::{Connection, TransactionBehavior};
/// use outbox_sqlite::{SqliteConfig, SqliteOutbox, migrate};
///
/// # let dir = tempfile::tempdir().unwrap();
/// let config = SqliteConfig::new(dir.path().join("app.db"));
/// migrate(&config)?;
/// let outbox = SqliteOutbox::new(&config)?;
///
/// let mut connection = Connection::open(&config.path)?;
/// connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, total INTEGER)", [])?;
///
/// let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
/// tx.execute("INSERT INTO orders VALUES (42, 12)", [])?;
/// outbox.enqueue(&tx, &Message::builder("orders").key("42").payload("placed").build()?)?;
/// tx.commit()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct SqliteOutbox {
    sql: Arc<Sql>,
    limits: Limits,
}

const DURING: &str = "enqueue";

/// Marks where [`SqliteOutbox::enqueue_many`] began, to return to.
const SAVEPOINT: &str = "outbox_enqueue";

impl SqliteOutbox {
    /// A handle to the outbox that `config` names; nothing is opened.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for a configuration that makes no sense.
    pub fn new(config: &SqliteConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            sql: Arc::new(Sql::new(&config.prefix)),
            limits: config.limits.clone(),
        })
    }

    /// Enqueues a message in the transaction that is open on `connection`; a `&Transaction` will do.
    ///
    /// Without an open transaction the message is committed at once, which is seldom what one wants.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for a message beyond the limits: nothing was written, the transaction is
    /// still usable. Others as SQLite gives them: roll back.
    pub fn enqueue(&self, connection: &Connection, message: &Message) -> Result<()> {
        self.limits.check(message)?;
        self.insert(connection, message)
    }

    /// Enqueues messages in this order, all or none.
    ///
    /// # Errors
    /// As [`enqueue`](Self::enqueue).
    ///
    /// # Example
    /// ```
    /// use outbox_core::Message;
    /// # use outbox_sqlite::{SqliteConfig, SqliteOutbox, migrate, rusqlite::Connection};
    ///
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let config = SqliteConfig::new(dir.path().join("app.db"));
    /// # migrate(&config)?;
    /// # let outbox = SqliteOutbox::new(&config)?;
    /// # let mut connection = Connection::open(&config.path)?;
    /// # let tx = connection.transaction()?;
    /// let event = |payload: &'static str| Message::builder("orders").key("42").payload(payload).build();
    /// outbox.enqueue_many(&tx, &[event("placed")?, event("paid")?])?;
    /// # tx.commit()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn enqueue_many(&self, connection: &Connection, messages: &[Message]) -> Result<()> {
        for message in messages {
            self.limits.check(message)?;
        }
        if let [message] = messages {
            return self.insert(connection, message);
        }
        let run = |statement: &str| connection.execute_batch(statement).during(DURING);
        run(&format!("SAVEPOINT {SAVEPOINT}"))?;
        let written = messages
            .iter()
            .try_for_each(|message| self.insert(connection, message));
        if let Err(error) = written {
            // On some errors SQLite has already rolled back everything, the savepoint included; the error that
            // caused it is the one to tell.
            let _ = run(&format!("ROLLBACK TO {SAVEPOINT}; RELEASE {SAVEPOINT}"));
            return Err(error);
        }
        run(&format!("RELEASE {SAVEPOINT}"))
    }

    fn insert(&self, connection: &Connection, message: &Message) -> Result<()> {
        let id = message.id();
        // As text, so that people and SQLite's JSON functions can read it.
        let headers = message.headers().encode();
        let key = message.key().map(AsRef::<[u8]>::as_ref);
        let payload = message.payload().map(AsRef::<[u8]>::as_ref);

        let written = match self.due_later(connection, message)? {
            None => connection
                .prepare_cached(&self.sql.insert)
                .and_then(|mut insert| {
                    insert.execute(params![
                        id.as_bytes(),
                        message.topic(),
                        key,
                        payload,
                        headers,
                        message.content_type()
                    ])
                }),
            Some(due) => connection
                .prepare_cached(&self.sql.schedule)
                .and_then(|mut insert| {
                    insert.execute(params![
                        id.as_bytes(),
                        message.topic(),
                        key,
                        payload,
                        headers,
                        message.content_type(),
                        due
                    ])
                }),
        };
        written
            .during(DURING)
            .map(drop)
            .map_err(|error| error.with("id", id).with("topic", message.topic()))
    }

    /// When the message is due, in the database's milliseconds, if that is not yet.
    fn due_later(&self, connection: &Connection, message: &Message) -> Result<Option<i64>> {
        let Some(time) = message.deliver_at() else {
            return Ok(None);
        };
        let due = stored(time);
        let now: i64 = connection
            .prepare_cached(&self.sql.now)
            .and_then(|mut now| now.query_row([], |row| row.get(0)))
            .during(DURING)?;
        Ok((due > now).then_some(due))
    }
}

/// A time in milliseconds since 1970, rounded up: never before it.
fn stored(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => outbox_core::millis(after),
        Err(before) => outbox_core::millis(before.duration()).saturating_neg(),
    }
}

impl Enqueue<Connection> for SqliteOutbox {
    async fn enqueue_many(&self, connection: &mut Connection, messages: &[Message]) -> Result<()> {
        Self::enqueue_many(self, connection, messages)
    }
}

impl<'c> Enqueue<Transaction<'c>> for SqliteOutbox {
    async fn enqueue_many(&self, transaction: &mut Transaction<'c>, messages: &[Message]) -> Result<()> {
        Self::enqueue_many(self, transaction, messages)
    }
}
