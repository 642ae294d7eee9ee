//! Enqueueing, in the producer's own transaction.

use std::collections::BTreeMap;
use std::sync::Arc;

use outbox_core::{Enqueue, Error, ErrorKind, Limits, Message, Ordering, Result};
use sqlx::mysql::{MySql, MySqlArguments, MySqlConnection};
use sqlx::query::Query;
use sqlx::{Executor, Transaction};

use crate::config::MysqlConfig;
use crate::error::During;
use crate::row::{bytes, micros, number, text, time};
use crate::session::run;
use crate::sql::{SAVEPOINT, Sql, Statement};

/// The producer's handle: cheap to clone, holds no connection.
///
/// It writes in the caller's transaction: a `sqlx::Transaction`, or any `MySqlConnection` on which one is open. The outbox
/// is in the connection's current database.
///
/// ```no_run
/// use outbox_core::Message;
/// use outbox_mysql::sqlx::{self, MySqlPool};
/// use outbox_mysql::{MysqlConfig, MysqlOutbox, begin};
///
/// # async fn example(pool: MySqlPool) -> Result<(), Box<dyn std::error::Error>> {
/// let outbox = MysqlOutbox::new(&MysqlConfig::default())?;
///
/// let mut tx = begin(&pool).await?;
/// sqlx::query("INSERT INTO orders (id, total) VALUES (?, ?)").bind(42).bind(12).execute(&mut *tx).await?;
/// outbox.enqueue(&mut tx, &Message::builder("orders").key("42").payload("placed").build()?).await?;
/// tx.commit().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct MysqlOutbox {
    sql: Arc<Sql>,
    limits: Limits,
    ordering: Ordering,
}

const DURING: &str = "enqueue";

/// So many messages go into one statement at most: the server takes 65,535 parameters, and few megabytes.
const MOST_ROWS: usize = 1_000;
/// So many bytes: the smallest `max_allowed_packet` that is usual is 16 MiB.
const MOST_BYTES: usize = 4 << 20;
/// Statements of so many rows stay prepared; those of more are of one size each, and seldom come again.
const KEPT_ROWS: usize = 8;

impl MysqlOutbox {
    /// A handle to the outbox that `config` names; its `url` is not used, nothing is opened.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for a configuration that makes no sense.
    pub fn new(config: &MysqlConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            sql: Arc::new(Sql::new(config)),
            limits: config.limits.clone(),
            ordering: config.ordering,
        })
    }

    /// Enqueues a message in the transaction that is open on `connection`; `&mut tx` will do.
    ///
    /// Without an open transaction the message is committed at once, which is seldom what one wants, and refused under
    /// [`Ordering::Sequenced`].
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Invalid`] for a message beyond the limits: nothing was written, the transaction is
    /// still usable. Others as the server gives them: roll back.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the transaction in an unknown state: close the connection. A pool of sqlx 0.9.0 may not:
    /// it can wait for ever for an answer that was read already, while the transaction keeps what it has locked. Who may
    /// be cancelled runs the transaction in a task of its own.
    pub async fn enqueue(&self, connection: &mut MySqlConnection, message: &Message) -> Result<()> {
        self.enqueue_many(connection, std::slice::from_ref(message))
            .await
            .map_err(|error| error.with("id", message.id()).with("topic", message.topic()))
    }

    /// Enqueues messages in this order, all or none if a transaction is open: one statement for each thousand messages
    /// or four megabytes.
    ///
    /// Messages with a time ask the server for its own first. Under [`Ordering::Sequenced`] the counters of all keys are
    /// locked before, in the order of the keys: a transaction that enqueues once, for all its messages, cannot be in
    /// a deadlock with another that does.
    ///
    /// # Errors
    /// As [`enqueue`](Self::enqueue).
    ///
    /// # Cancel safety
    /// As [`enqueue`](Self::enqueue).
    pub async fn enqueue_many(&self, connection: &mut MySqlConnection, messages: &[Message]) -> Result<()> {
        for message in messages {
            self.limits.check(message)?;
        }
        let (mut now, mut later) = (Vec::with_capacity(messages.len()), Vec::new());
        if messages.iter().any(|message| message.deliver_at().is_some()) {
            let told = run(connection, Sql::now(), DURING).await?;
            let clock = told.row(0).and_then(|row| time(row, 0)).during(DURING)?;
            for message in messages {
                if message.deliver_at() > clock {
                    later.push(message);
                } else {
                    now.push(message);
                }
            }
        } else {
            now.extend(messages);
        }
        let mut numbers = match self.ordering {
            Ordering::Insert => Numbers::default(),
            Ordering::Sequenced => self.draw(connection, &now).await?,
        };
        for chunk in chunks(&now) {
            let statement = self.sql.insert(chunk.len());
            let mut query = statement.query().persistent(chunk.len() <= KEPT_ROWS);
            for message in chunk {
                query = bind(query, message);
                if self.ordering == Ordering::Sequenced {
                    query = query.bind(numbers.next(message));
                }
            }
            execute(query, connection).await?;
        }
        for chunk in chunks(&later) {
            let statement: Statement = self.sql.schedule(chunk.len());
            let mut query = statement.query().persistent(chunk.len() <= KEPT_ROWS);
            for message in chunk {
                query = bind(query, message).bind(message.deliver_at().map(micros));
            }
            execute(query, connection).await?;
        }
        Ok(())
    }

    /// Draws the numbers of these messages.
    async fn draw(&self, connection: &mut MySqlConnection, messages: &[&Message]) -> Result<Numbers> {
        let mut counts = BTreeMap::<(&str, &[u8]), i64>::new();
        for message in messages {
            if let Some(key) = message.key() {
                *counts.entry((message.topic(), key.as_ref())).or_default() += 1;
            }
        }
        if counts.is_empty() {
            return Ok(Numbers::default());
        }
        run(connection, Sql::in_transaction(), DURING)
            .await
            .map_err(needs_a_transaction)?;
        // In one order: who draws once cannot be in a deadlock with another who does.
        let counts: Vec<_> = counts.into_iter().collect();
        let mut numbers = Numbers::default();
        for chunk in counts.chunks(MOST_ROWS) {
            let kept = chunk.len() <= KEPT_ROWS;
            let (draw, drawn) = (self.sql.draw(chunk.len()), self.sql.drawn(chunk.len()));
            let (mut draw, mut drawn) = (draw.query().persistent(kept), drawn.query().persistent(kept));
            for ((topic, key), count) in chunk {
                draw = draw.bind(*topic).bind(*key).bind(*count);
                drawn = drawn.bind(*topic).bind(*key);
            }
            execute(draw, connection).await?;
            for row in &drawn.fetch_all(&mut *connection).await.during(DURING)? {
                let name = (
                    text(row, 0).during(DURING)?.unwrap_or_default().to_owned(),
                    bytes(row, 1).during(DURING)?.unwrap_or_default().to_vec(),
                );
                numbers.0.insert(name, number(row, 2).during(DURING)?);
            }
        }
        // What was drawn here begins behind what had been given before.
        for ((topic, key), count) in counts {
            if let Some(last) = numbers.0.get_mut(&(topic.to_owned(), key.to_vec())) {
                *last -= count;
            }
        }
        Ok(numbers)
    }
}

/// The last number given of each key.
#[derive(Debug, Default)]
struct Numbers(BTreeMap<(String, Vec<u8>), i64>);

impl Numbers {
    /// None for a message without a key.
    fn next(&mut self, message: &Message) -> Option<i64> {
        let name = (message.topic().to_owned(), message.key()?.to_vec());
        let last = self.0.get_mut(&name)?;
        *last += 1;
        Some(*last)
    }
}

/// The savepoint that guards the counters is gone at once where no transaction is open.
fn needs_a_transaction(error: Error) -> Error {
    let said = std::error::Error::source(&error).map(ToString::to_string);
    if !said.is_some_and(|said| said.contains(SAVEPOINT)) {
        return error;
    }
    Error::new(
        ErrorKind::Invalid,
        DURING,
        "this outbox numbers its messages: enqueue in a transaction, which keeps the counters until its commit",
    )
    .with_source(error)
}

/// Messages in parts that the server takes.
fn chunks<'m>(mut messages: &'m [&'m Message]) -> impl Iterator<Item = &'m [&'m Message]> {
    std::iter::from_fn(move || {
        let mut bytes = 0_usize;
        let rows = messages
            .iter()
            .take(MOST_ROWS)
            .take_while(|message| {
                let first = bytes == 0;
                bytes = bytes.saturating_add(message.size().max(1));
                first || bytes <= MOST_BYTES
            })
            .count();
        let (chunk, rest) = messages.split_at_checked(rows)?;
        messages = rest;
        (!chunk.is_empty()).then_some(chunk)
    })
}

fn bind<'q>(
    query: Query<'q, MySql, MySqlArguments>,
    message: &'q Message,
) -> Query<'q, MySql, MySqlArguments> {
    query
        .bind(&message.id().as_bytes()[..])
        .bind(message.topic())
        .bind(message.key().map(AsRef::<[u8]>::as_ref))
        .bind(message.payload().map(AsRef::<[u8]>::as_ref))
        .bind(message.headers().encode())
        .bind(message.content_type())
}

async fn execute(query: Query<'_, MySql, MySqlArguments>, connection: &mut MySqlConnection) -> Result<()> {
    connection.execute(query).await.during(DURING).map(drop)
}

impl Enqueue<MySqlConnection> for MysqlOutbox {
    async fn enqueue_many(&self, connection: &mut MySqlConnection, messages: &[Message]) -> Result<()> {
        Self::enqueue_many(self, connection, messages).await
    }
}

impl Enqueue<Transaction<'_, MySql>> for MysqlOutbox {
    async fn enqueue_many(&self, tx: &mut Transaction<'_, MySql>, messages: &[Message]) -> Result<()> {
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
/// # async fn example(pool: outbox_mysql::sqlx::MySqlPool) -> outbox_mysql::Result<()> {
/// let tx = outbox_mysql::begin(&pool).await?;
/// # Ok(())
/// # }
/// ```
pub async fn begin(pool: &sqlx::MySqlPool) -> Result<Transaction<'static, MySql>> {
    const DURING: &str = "begin";
    let pool = pool.clone();
    // In a task of its own it runs to its end, and the transaction that nobody waits for rolls back.
    tokio::spawn(async move { pool.begin().await })
        .await
        .map_err(|error| {
            Error::new(ErrorKind::Unavailable, DURING, "the runtime is shutting down").with_source(error)
        })?
        .during(DURING)
}
