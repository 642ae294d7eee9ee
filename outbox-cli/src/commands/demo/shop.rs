//! The producers: each order and its message in one transaction, some of which roll back.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use outbox::sqlite::rusqlite::{self, Connection, TransactionBehavior};
use outbox::sqlite::{SqliteConfig, SqliteOutbox, migrate};
use outbox::{Message, MessageId};

use super::promise::{Account, Books};
use super::sqlite_failed;
use super::stage::Progress;
use crate::exit::{Code, Failure, Result};

/// How many threads place orders.
pub(super) const PRODUCERS: u32 = 4;
/// The orders are spread over this time, so that there is something to see.
const PLACING_TAKES: Duration = Duration::from_secs(3);
/// Of so many orders one rolls back.
const ROLLED_BACK: u32 = 20;

/// The shop: a database with a business table and an outbox.
pub(super) struct Shop {
    pub(super) config: SqliteConfig,
    pub(super) topic: String,
}

/// Which messages a producer committed and rolled back.
#[derive(Debug, Default)]
pub(super) struct Placed {
    pub(super) committed: HashSet<MessageId>,
    pub(super) rolled_back: HashSet<MessageId>,
}

impl Shop {
    pub(super) fn open(directory: &Path, topic: &str) -> Result<Self> {
        let config = SqliteConfig::new(directory.join("shop.db"));
        migrate(&config)?;
        connect(&config)?
            .execute_batch(
                "CREATE TABLE orders (customer INTEGER, number INTEGER, amount INTEGER, PRIMARY KEY (customer, number))",
            )
            .map_err(|error| sqlite_failed("make the shop's table", &error))?;
        Ok(Self {
            config,
            topic: topic.to_owned(),
        })
    }

    /// Starts the producers. They end when all orders are placed or somebody wants to stop.
    pub(super) fn place(
        &self,
        orders: u32,
        customers: u32,
        progress: &Arc<Progress>,
    ) -> Vec<JoinHandle<Result<Placed>>> {
        let start = Instant::now();
        (0..PRODUCERS)
            .map(|producer| {
                let (config, topic, progress) = (self.config.clone(), self.topic.clone(), progress.clone());
                thread::spawn(move || {
                    let mut connection = connect(&config)?;
                    let outbox = SqliteOutbox::new(&config)?;
                    let mut placed = Placed::default();
                    for order in (producer..orders).step_by(PRODUCERS as usize) {
                        let due = start + PLACING_TAKES * order / orders;
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        if progress.stopping() {
                            break;
                        }
                        let customer = i64::from(fastrand::u32(..customers));
                        place_one(&mut connection, &outbox, &topic, customer, &mut placed)?;
                        progress.placed();
                    }
                    Ok(placed)
                })
            })
            .collect()
    }

    /// What the business table says: the truth with which the consumer's books are compared.
    pub(super) fn books(&self) -> Result<Books> {
        read_books(
            &connect(&self.config)?,
            "SELECT customer, count(*), sum(amount) FROM orders GROUP BY customer",
        )
    }
}

/// This is the pattern: business change and message in one transaction of the producer's own.
fn place_one(
    connection: &mut Connection,
    outbox: &SqliteOutbox,
    topic: &str,
    customer: i64,
    placed: &mut Placed,
) -> Result<()> {
    let amount = fastrand::i64(1..=500);
    let rolls_back = fastrand::u32(..ROLLED_BACK) == 0;
    let failed = |error: rusqlite::Error| sqlite_failed("place an order", &error);

    let tx = connection
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .map_err(failed)?;
    let number: i64 = tx
        .query_row(
            "INSERT INTO orders SELECT ?1, 1 + coalesce(max(number), 0), ?2 FROM orders WHERE customer = ?1 \
             RETURNING number",
            (customer, amount),
            |row| row.get(0),
        )
        .map_err(failed)?;
    let order = serde_json::json!({"customer": customer, "number": number, "amount": amount});
    let message = Message::json(topic, &order).key(customer.to_string()).build()?;
    outbox.enqueue(&tx, &message)?;
    if rolls_back {
        tx.rollback().map_err(failed)?;
        placed.rolled_back.insert(message.id());
    } else {
        tx.commit().map_err(failed)?;
        placed.committed.insert(message.id());
    }
    Ok(())
}

/// A connection with patience, since producers, relay and each other take turns.
pub(super) fn connect(config: &SqliteConfig) -> Result<Connection> {
    let open = || -> rusqlite::Result<Connection> {
        let connection = Connection::open(&config.path)?;
        connection.busy_timeout(Duration::from_secs(30))?;
        // The files are thrown away in the end; a shop of its own would keep SQLite's default, FULL.
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        Ok(connection)
    };
    open().map_err(|error| sqlite_failed("open a database", &error))
}

pub(super) fn read_books(connection: &Connection, query: &str) -> Result<Books> {
    let read = || -> rusqlite::Result<Books> {
        connection
            .prepare(query)?
            .query_map([], |row| {
                let account = Account {
                    orders: row.get(1)?,
                    sum: row.get(2)?,
                };
                Ok((row.get(0)?, account))
            })?
            .collect()
    };
    read().map_err(|error| sqlite_failed("read the books", &error))
}

/// Waits for the producers and puts together what they noted.
pub(super) fn join(producers: Vec<JoinHandle<Result<Placed>>>) -> Result<Placed> {
    let mut all = Placed::default();
    for producer in producers {
        let placed = producer
            .join()
            .map_err(|_| Failure::new(Code::Unexpected, "a producer of the demo panicked"))??;
        all.committed.extend(placed.committed);
        all.rolled_back.extend(placed.rolled_back);
    }
    Ok(all)
}
