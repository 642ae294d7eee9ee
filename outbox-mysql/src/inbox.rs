//! The inbox: what a consumer has handled, noted in the consumer's own transaction.

use std::sync::Arc;
use std::time::Duration;

use outbox_core::{Error, ErrorKind, Inbox, MessageId, Receive, Result, check_age, millis};
use sqlx::Transaction;
use sqlx::mysql::{MySql, MySqlConnection};

use crate::config::MysqlConfig;
use crate::error::{During, is_duplicate};
use crate::sql::Sql;

const DURING: &str = "receive";

/// How long a consumer's name may be.
const LONGEST: usize = 255;

/// The consumer's handle: cheap to clone, holds no connection.
///
/// First the note, then the effects, then the commit, then the offset. When two copies are handled at the same time,
/// the second waits for the first one's end.
///
/// ```no_run
/// use outbox_core::{MessageId, Receive};
/// use outbox_mysql::sqlx::MySqlPool;
/// use outbox_mysql::{MysqlConfig, MysqlInbox, begin};
///
/// # async fn example(pool: MySqlPool, id: MessageId) -> Result<(), Box<dyn std::error::Error>> {
/// let inbox = MysqlInbox::new(&MysqlConfig::default())?;
///
/// let mut tx = begin(&pool).await?;
/// // The id is that of the record's header `outbox-id`.
/// if inbox.receive(&mut tx, "billing", id).await? == Receive::Fresh {
///     // the effects
/// }
/// tx.commit().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct MysqlInbox {
    sql: Arc<Sql>,
}

impl MysqlInbox {
    /// A handle to the inbox beside the outbox that `config` names; its `url` is not used, nothing is opened.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for a configuration that makes no sense.
    pub fn new(config: &MysqlConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            sql: Arc::new(Sql::new(config)),
        })
    }

    /// Notes that `consumer` handles `id` in the transaction that is open on `connection`; `&mut tx` will do.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a name of more than 255 characters; others as the server gives them: roll back and try
    /// again.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the transaction in an unknown state: close the connection. A pool of sqlx 0.9.0 may not:
    /// it can wait for ever for an answer that was read already, while the transaction keeps what it has locked. Who may
    /// be cancelled runs the transaction in a task of its own.
    pub async fn receive(
        &self,
        connection: &mut MySqlConnection,
        consumer: &str,
        id: MessageId,
    ) -> Result<Receive> {
        if consumer.chars().count() > LONGEST {
            return Err(Error::new(
                ErrorKind::Invalid,
                DURING,
                "a consumer's name has at most 255 characters",
            )
            .with("consumer", consumer));
        }
        let query = self.sql.receive.query().bind(consumer).bind(&id.as_bytes()[..]);
        match query.execute(connection).await {
            Ok(_) => Ok(Receive::Fresh),
            Err(error) if is_duplicate(&error) => Ok(Receive::Duplicate),
            Err(error) => Err(error).during(DURING),
        }
    }

    /// Forgets at most `limit` messages handled longer ago than `age`, of all consumers; says how many.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for an age below [`outbox_core::MIN_INBOX_AGE`]; others as the server gives
    /// them.
    pub async fn purge(
        &self,
        connection: &mut MySqlConnection,
        age: Duration,
        limit: usize,
    ) -> Result<usize> {
        check_age(age)?;
        let age = millis(age.min(Duration::from_secs(100 * 366 * 24 * 60 * 60)));
        let deleted = self
            .sql
            .forget
            .query()
            .bind(age)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .execute(connection)
            .await
            .during("purge inbox")?;
        Ok(usize::try_from(deleted.rows_affected()).unwrap_or(usize::MAX))
    }
}

impl Inbox<MySqlConnection> for MysqlInbox {
    async fn receive(
        &self,
        connection: &mut MySqlConnection,
        consumer: &str,
        id: MessageId,
    ) -> Result<Receive> {
        Self::receive(self, connection, consumer, id).await
    }

    async fn purge(&self, connection: &mut MySqlConnection, age: Duration, limit: usize) -> Result<usize> {
        Self::purge(self, connection, age, limit).await
    }
}

impl Inbox<Transaction<'_, MySql>> for MysqlInbox {
    async fn receive(
        &self,
        tx: &mut Transaction<'_, MySql>,
        consumer: &str,
        id: MessageId,
    ) -> Result<Receive> {
        Self::receive(self, tx, consumer, id).await
    }

    async fn purge(&self, tx: &mut Transaction<'_, MySql>, age: Duration, limit: usize) -> Result<usize> {
        Self::purge(self, tx, age, limit).await
    }
}
