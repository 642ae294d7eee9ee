//! The inbox: what a consumer has handled, noted in the consumer's own transaction.

use std::sync::Arc;
use std::time::Duration;

use outbox_core::{Inbox, MessageId, Receive, Result, check_age};
use rusqlite::{Connection, Transaction, params};

use crate::config::SqliteConfig;
use crate::error::During;
use crate::sql::Sql;
use crate::worker::millis;

/// The consumer's handle: cheap to clone, holds no connection.
///
/// First the note, then the effects, then the commit, then the offset:
///
/// ```
/// use outbox_core::{MessageId, Receive};
/// use outbox_sqlite::rusqlite::{Connection, TransactionBehavior};
/// use outbox_sqlite::{SqliteConfig, SqliteInbox, migrate};
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let config = SqliteConfig::new(dir.path().join("app.db"));
/// # migrate(&config)?;
/// let inbox = SqliteInbox::new(&config)?;
/// let mut connection = Connection::open(&config.path)?;
///
/// let id = MessageId::new(); // from the record's header `outbox-id`
/// for expected in [Receive::Fresh, Receive::Duplicate] {
///     let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
///     let receive = inbox.receive(&tx, "billing", id)?;
///     assert_eq!(receive, expected);
///     if receive == Receive::Fresh {
///         // the effects
///     }
///     tx.commit()?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct SqliteInbox {
    sql: Arc<Sql>,
}

impl SqliteInbox {
    /// A handle to the inbox beside the outbox that `config` names; nothing is opened.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for a configuration that makes no sense.
    pub fn new(config: &SqliteConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            sql: Arc::new(Sql::new(&config.prefix)),
        })
    }

    /// Notes that `consumer` handles `id` in the transaction that is open on `connection`.
    ///
    /// # Errors
    /// As SQLite gives them: roll back and try again.
    pub fn receive(&self, connection: &Connection, consumer: &str, id: MessageId) -> Result<Receive> {
        let changes = connection
            .prepare_cached(&self.sql.receive)
            .and_then(|mut insert| insert.execute(params![consumer, id.as_bytes()]))
            .during("receive")?;
        Ok(if changes == 0 {
            Receive::Duplicate
        } else {
            Receive::Fresh
        })
    }

    /// Forgets at most `limit` messages handled longer ago than `age`, of all consumers; says how many.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for an age below [`outbox_core::MIN_INBOX_AGE`]; others as SQLite gives
    /// them.
    ///
    /// # Example
    /// ```
    /// use std::time::Duration;
    /// # use outbox_sqlite::{SqliteConfig, SqliteInbox, migrate, rusqlite::Connection};
    ///
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let config = SqliteConfig::new(dir.path().join("app.db"));
    /// # migrate(&config)?;
    /// # let inbox = SqliteInbox::new(&config)?;
    /// # let connection = Connection::open(&config.path)?;
    /// let month = Duration::from_secs(30 * 24 * 3600);
    /// while inbox.purge(&connection, month, 1_000)? == 1_000 {}
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn purge(&self, connection: &Connection, age: Duration, limit: usize) -> Result<usize> {
        check_age(age)?;
        connection
            .prepare_cached(&self.sql.forget)
            .and_then(|mut delete| {
                delete.execute(params![millis(age), i64::try_from(limit).unwrap_or(i64::MAX)])
            })
            .during("purge inbox")
    }
}

impl Inbox<Connection> for SqliteInbox {
    async fn receive(&self, connection: &mut Connection, consumer: &str, id: MessageId) -> Result<Receive> {
        Self::receive(self, connection, consumer, id)
    }

    async fn purge(&self, connection: &mut Connection, age: Duration, limit: usize) -> Result<usize> {
        Self::purge(self, connection, age, limit)
    }
}

impl<'c> Inbox<Transaction<'c>> for SqliteInbox {
    async fn receive(
        &self,
        transaction: &mut Transaction<'c>,
        consumer: &str,
        id: MessageId,
    ) -> Result<Receive> {
        Self::receive(self, transaction, consumer, id)
    }

    async fn purge(&self, transaction: &mut Transaction<'c>, age: Duration, limit: usize) -> Result<usize> {
        Self::purge(self, transaction, age, limit)
    }
}
