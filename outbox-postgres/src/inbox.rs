//! The inbox: what a consumer has handled, noted in the consumer's own transaction.

use std::sync::Arc;
use std::time::Duration;

use outbox_core::{Inbox, MessageId, Receive, Result, check_age, millis};
use sqlx::Transaction;
use sqlx::postgres::{PgConnection, Postgres};

use crate::config::PostgresConfig;
use crate::error::During;
use crate::row::limit as bound;
use crate::sql::Sql;

/// The consumer's handle: cheap to clone, holds no connection.
///
/// First the note, then the effects, then the commit, then the offset. When two copies are handled at the same time,
/// the second waits for the first one's end.
///
/// ```no_run
/// use outbox_core::{MessageId, Receive};
/// use outbox_postgres::sqlx::PgPool;
/// use outbox_postgres::{PostgresConfig, PostgresInbox, begin};
///
/// # async fn example(pool: PgPool, id: MessageId) -> Result<(), Box<dyn std::error::Error>> {
/// let inbox = PostgresInbox::new(&PostgresConfig::default())?;
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
pub struct PostgresInbox {
    sql: Arc<Sql>,
}

impl PostgresInbox {
    /// A handle to the inbox beside the outbox that `config` names; its `url` is not used, nothing is opened.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for a configuration that makes no sense.
    pub fn new(config: &PostgresConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            sql: Arc::new(Sql::new(config)),
        })
    }

    /// Notes that `consumer` handles `id` in the transaction that is open on `connection`; `&mut tx` will do.
    ///
    /// # Errors
    /// As the server gives them: roll back and try again.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the transaction in an unknown state: roll it back.
    pub async fn receive(
        &self,
        connection: &mut PgConnection,
        consumer: &str,
        id: MessageId,
    ) -> Result<Receive> {
        let inserted = self
            .sql
            .receive
            .query()
            .bind(consumer)
            .bind(id.as_uuid())
            .execute(connection)
            .await
            .during("receive")?;
        Ok(if inserted.rows_affected() == 0 {
            Receive::Duplicate
        } else {
            Receive::Fresh
        })
    }

    /// Forgets at most `limit` messages handled longer ago than `age`, of all consumers; says how many.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for an age below [`outbox_core::MIN_INBOX_AGE`]; others as the server gives
    /// them.
    pub async fn purge(&self, connection: &mut PgConnection, age: Duration, limit: usize) -> Result<usize> {
        check_age(age)?;
        let age = millis(age.min(Duration::from_secs(100 * 366 * 24 * 60 * 60)));
        let deleted = self
            .sql
            .forget
            .query()
            .bind(age)
            .bind(bound(limit))
            .execute(connection)
            .await
            .during("purge inbox")?;
        Ok(usize::try_from(deleted.rows_affected()).unwrap_or(usize::MAX))
    }
}

impl Inbox<PgConnection> for PostgresInbox {
    async fn receive(&self, connection: &mut PgConnection, consumer: &str, id: MessageId) -> Result<Receive> {
        Self::receive(self, connection, consumer, id).await
    }

    async fn purge(&self, connection: &mut PgConnection, age: Duration, limit: usize) -> Result<usize> {
        Self::purge(self, connection, age, limit).await
    }
}

impl Inbox<Transaction<'_, Postgres>> for PostgresInbox {
    async fn receive(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        consumer: &str,
        id: MessageId,
    ) -> Result<Receive> {
        Self::receive(self, tx, consumer, id).await
    }

    async fn purge(&self, tx: &mut Transaction<'_, Postgres>, age: Duration, limit: usize) -> Result<usize> {
        Self::purge(self, tx, age, limit).await
    }
}
