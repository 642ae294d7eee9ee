//! Enqueueing: one statement in the producer's own transaction.

use std::sync::Arc;

use outbox_core::{Enqueue, Limits, Message, Ordering, Result};
use sqlx::Transaction;
use sqlx::postgres::{PgConnection, Postgres};
use uuid::Uuid;

use crate::config::PostgresConfig;
use crate::error::During;
use crate::row::micros;
use crate::sql::Sql;

/// The producer's handle: cheap to clone, holds no connection.
///
/// Whatever the size of the call, it is one statement and one round trip. It writes in the caller's transaction: a
/// `sqlx::Transaction`, or any `PgConnection` on which one is open.
///
/// ```no_run
/// use outbox_core::Message;
/// use outbox_postgres::sqlx::{self, PgPool};
/// use outbox_postgres::{PostgresConfig, PostgresOutbox, begin};
///
/// # async fn example(pool: PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// let outbox = PostgresOutbox::new(&PostgresConfig::default())?;
///
/// let mut tx = begin(&pool).await?;
/// sqlx::query("INSERT INTO orders (id, total) VALUES ($1, $2)").bind(42).bind(12).execute(&mut *tx).await?;
/// outbox.enqueue(&mut tx, &Message::builder("orders").key("42").payload("placed").build()?).await?;
/// tx.commit().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct PostgresOutbox {
    sql: Arc<Sql>,
    limits: Limits,
    ordering: Ordering,
}

const DURING: &str = "enqueue";

impl PostgresOutbox {
    /// A handle to the outbox that `config` names; its `url` is not used, nothing is opened.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for a configuration that makes no sense.
    pub fn new(config: &PostgresConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            sql: Arc::new(Sql::new(config)),
            limits: config.limits.clone(),
            ordering: config.ordering,
        })
    }

    /// Enqueues a message in the transaction that is open on `connection`; `&mut tx` will do.
    ///
    /// Without an open transaction the message is committed at once, which is seldom what one wants.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for a message beyond the limits: nothing was written, the transaction is
    /// still usable. Others as the server gives them: roll back.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the transaction in an unknown state: roll it back.
    pub async fn enqueue(&self, connection: &mut PgConnection, message: &Message) -> Result<()> {
        if self.ordering == Ordering::Sequenced || message.deliver_at().is_some() {
            return self.enqueue_many(connection, std::slice::from_ref(message)).await;
        }
        self.limits.check(message)?;
        self.sql
            .insert
            .query()
            .bind(message.id().as_uuid())
            .bind(message.topic())
            .bind(message.key().map(AsRef::<[u8]>::as_ref))
            .bind(message.payload().map(AsRef::<[u8]>::as_ref))
            .bind(message.headers().encode())
            .bind(message.content_type())
            .execute(connection)
            .await
            .during(DURING)
            .map(drop)
            .map_err(|error| error.with("id", message.id()).with("topic", message.topic()))
    }

    /// Enqueues messages in this order, all or none.
    ///
    /// Under [`Ordering::Sequenced`] the counters of all keys are locked, in the order of the keys: a transaction that
    /// enqueues once, for all its messages, cannot be in a deadlock with another that does.
    ///
    /// # Errors
    /// As [`enqueue`](Self::enqueue).
    ///
    /// # Cancel safety
    /// As [`enqueue`](Self::enqueue).
    pub async fn enqueue_many(&self, connection: &mut PgConnection, messages: &[Message]) -> Result<()> {
        for message in messages {
            self.limits.check(message)?;
        }
        if messages.is_empty() {
            return Ok(());
        }
        let planned = messages.iter().any(|message| message.deliver_at().is_some());
        let statement = if planned {
            &self.sql.insert_or_schedule
        } else {
            &self.sql.insert_many
        };
        let each = || messages.iter();
        let query = statement
            .query()
            .bind(
                each()
                    .map(|message| message.id().as_uuid())
                    .collect::<Vec<Uuid>>(),
            )
            .bind(each().map(Message::topic).collect::<Vec<&str>>())
            .bind(
                each()
                    .map(|message| message.key().map(AsRef::as_ref))
                    .collect::<Vec<Option<&[u8]>>>(),
            )
            .bind(
                each()
                    .map(|message| message.payload().map(AsRef::as_ref))
                    .collect::<Vec<Option<&[u8]>>>(),
            )
            .bind(
                each()
                    .map(|message| message.headers().encode())
                    .collect::<Vec<Option<String>>>(),
            )
            .bind(each().map(Message::content_type).collect::<Vec<Option<&str>>>());
        let query = if planned {
            query.bind(
                each()
                    .map(|message| message.deliver_at().map(micros))
                    .collect::<Vec<Option<i64>>>(),
            )
        } else {
            query
        };
        query.execute(connection).await.during(DURING).map(drop)
    }
}

impl Enqueue<PgConnection> for PostgresOutbox {
    async fn enqueue_many(&self, connection: &mut PgConnection, messages: &[Message]) -> Result<()> {
        Self::enqueue_many(self, connection, messages).await
    }
}

impl Enqueue<Transaction<'_, Postgres>> for PostgresOutbox {
    async fn enqueue_many(&self, tx: &mut Transaction<'_, Postgres>, messages: &[Message]) -> Result<()> {
        Self::enqueue_many(self, tx, messages).await
    }
}

/// Begins a transaction, and may be dropped while it does: under `timeout` or `select!`, or when a request is cancelled.
///
/// `pool.begin()` of sqlx 0.9.0 may not. Dropped half-way it can put a connection back into the pool with a transaction
/// open that nobody knows of, and what the next user of that connection writes is rolled back some time later although
/// each statement succeeded (launchbadge/sqlx#4393).
///
/// # Errors
/// As the server and the pool give them.
///
/// # Cancel safety
/// Safe to drop: the transaction is rolled back, or never begun.
///
/// ```no_run
/// # async fn example(pool: outbox_postgres::sqlx::PgPool) -> outbox_postgres::Result<()> {
/// let tx = outbox_postgres::begin(&pool).await?;
/// # Ok(())
/// # }
/// ```
pub async fn begin(pool: &sqlx::PgPool) -> Result<Transaction<'static, Postgres>> {
    const DURING: &str = "begin";
    let pool = pool.clone();
    // In a task of its own it runs to its end, and the transaction that nobody waits for rolls back.
    tokio::spawn(async move { pool.begin().await })
        .await
        .map_err(|error| {
            outbox_core::Error::new(
                outbox_core::ErrorKind::Unavailable,
                DURING,
                "the runtime is shutting down",
            )
            .with_source(error)
        })?
        .during(DURING)
}
