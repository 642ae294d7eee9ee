//! The consumer: its own database, an inbox, and books made from messages alone.

use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use outbox::Receive;
use outbox::kafka::rdkafka::consumer::{BaseConsumer, Consumer as _};
use outbox::kafka::rdkafka::error::KafkaError;
use outbox::kafka::rdkafka::message::BorrowedMessage;
use outbox::kafka::rdkafka::{ClientConfig, Offset, TopicPartitionList};
use outbox::kafka::{ReceivedMessage, rdkafka};
use outbox::sqlite::rusqlite::{self, Connection, TransactionBehavior};
use outbox::sqlite::{SqliteConfig, SqliteInbox, migrate};
use serde::Deserialize;

use super::broker::{Broker, PARTITIONS};
use super::promise::{Books, Delivery};
use super::shop::{connect, read_books};
use super::sqlite_failed;
use super::stage::Progress;
use crate::exit::{Code, Failure, Result};

/// What the consumer noted.
#[derive(Debug, Default)]
pub(super) struct Consumed {
    pub(super) deliveries: Vec<Delivery>,
    pub(super) dropped: usize,
    pub(super) books: Books,
}

/// The order as it comes in a message.
#[derive(Deserialize)]
struct Order {
    customer: i64,
    number: i64,
    amount: i64,
}

/// The inbox keeps consumers apart by name.
const NAME: &str = "books";
/// At most so many messages in one transaction.
const BATCH: usize = 200;
/// How long to wait for the first of them.
const POLL: Duration = Duration::from_millis(20);
/// How long the last messages may take, once all that should come is there.
const PATIENCE: Duration = Duration::from_secs(10);

/// Starts it. When the demo is over it reads to the end of the topic as it is then, and stops.
pub(super) fn start(
    directory: &Path,
    broker: &Broker,
    progress: &Arc<Progress>,
) -> Result<JoinHandle<Result<Consumed>>> {
    let config = SqliteConfig::new(directory.join("books.db"));
    migrate(&config)?;
    let inbox = SqliteInbox::new(&config)?;
    let connection = connect(&config)?;
    connection
        .execute_batch("CREATE TABLE books (customer INTEGER PRIMARY KEY, orders INTEGER, sum INTEGER)")
        .map_err(|error| sqlite_failed("make the books", &error))?;
    let consumer = subscribe(broker).map_err(|error| kafka_failed(&error))?;
    let mut worker = Worker {
        inbox,
        connection,
        topic: broker.topic.clone(),
        progress: progress.clone(),
        consumed: Consumed::default(),
    };
    Ok(thread::spawn(move || {
        worker.run(&consumer)?;
        worker.consumed.books = read_books(&worker.connection, "SELECT customer, orders, sum FROM books")?;
        Ok(worker.consumed)
    }))
}

/// From the beginning of every partition; no group, since there is one consumer and the inbox forgives repetition.
fn subscribe(broker: &Broker) -> std::result::Result<BaseConsumer, KafkaError> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &broker.servers)
        .set("group.id", "outbox-demo")
        .set("enable.auto.commit", "false")
        // The mock answers only after this wait when it had nothing at first.
        .set("fetch.wait.max.ms", "20")
        .create()?;
    let mut partitions = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        partitions.add_partition_offset(&broker.topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&partitions)?;
    Ok(consumer)
}

struct Worker {
    inbox: SqliteInbox,
    connection: Connection,
    topic: String,
    progress: Arc<Progress>,
    consumed: Consumed,
}

impl Worker {
    fn run(&mut self, consumer: &BaseConsumer) -> Result<()> {
        let partitions = usize::try_from(PARTITIONS).unwrap_or_default();
        let mut next = vec![0_i64; partitions];
        let mut ends: Option<Vec<i64>> = None;
        let mut patience_ends = None;
        loop {
            let mut batch = Vec::new();
            while batch.len() < BATCH {
                match consumer.poll(if batch.is_empty() { POLL } else { Duration::ZERO }) {
                    Some(Ok(message)) => batch.push(message),
                    // Brokers that go away come back, or nothing more comes and that is what is found in the end.
                    Some(Err(_)) => {}
                    None => break,
                }
            }
            for message in &batch {
                if let Some(next) = usize::try_from(rdkafka::Message::partition(message))
                    .ok()
                    .and_then(|index| next.get_mut(index))
                {
                    *next = rdkafka::Message::offset(message) + 1;
                }
            }
            self.apply(&batch)?;
            if !self.progress.finishing() {
                continue;
            }
            if ends.is_none() {
                ends = Some(self.ends(consumer)?);
            }
            let until = *patience_ends.get_or_insert_with(|| Instant::now() + PATIENCE);
            let read = ends.iter().flatten().zip(&next).all(|(end, next)| next >= end);
            if read || Instant::now() > until {
                return Ok(());
            }
        }
    }

    /// This is the consumer's half of the pattern: note the id, apply the effect, commit; then the next messages.
    fn apply(&mut self, batch: &[BorrowedMessage<'_>]) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let failed = |error: rusqlite::Error| sqlite_failed("apply an order", &error);
        let tx = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(failed)?;
        let mut fresh = 0;
        for record in batch {
            let message = ReceivedMessage::read(record)?;
            let order: Order = serde_json::from_slice(message.payload.as_deref().unwrap_or_default())
                .map_err(|error| Failure::new(Code::Unexpected, format!("read an order: {error}")))?;
            self.consumed.deliveries.push(Delivery {
                id: message.id,
                customer: order.customer,
                number: order.number,
            });
            match self.inbox.receive(&tx, NAME, message.id)? {
                Receive::Duplicate => self.consumed.dropped += 1,
                Receive::Fresh => {
                    tx.prepare_cached(
                        "INSERT INTO books VALUES (?1, 1, ?2) \
                         ON CONFLICT DO UPDATE SET orders = orders + 1, sum = sum + excluded.sum",
                    )
                    .and_then(|mut statement| statement.execute((order.customer, order.amount)))
                    .map_err(failed)?;
                    fresh += 1;
                }
            }
        }
        tx.commit().map_err(failed)?;
        self.progress.applied(batch.len(), fresh);
        Ok(())
    }

    fn ends(&self, consumer: &BaseConsumer) -> Result<Vec<i64>> {
        (0..PARTITIONS)
            .map(|partition| {
                consumer
                    .fetch_watermarks(&self.topic, partition, PATIENCE)
                    .map(|(_, high)| high)
                    .map_err(|error| kafka_failed(&error))
            })
            .collect()
    }
}

fn kafka_failed(error: &KafkaError) -> Failure {
    Failure::new(Code::Unavailable, format!("consume: {error}")).because(error)
}
