//! What a relay is compared with: the outbox as it is written without one, on a table of its own.
//!
//! Both send what the relay sends, the header with the id included, under the same promises of Kafka's.

use std::path::Path;
use std::time::Duration;

use futures::future::join_all;
use outbox::kafka::OUTBOX_ID;
use outbox::kafka::rdkafka::ClientConfig;
use outbox::kafka::rdkafka::message::{Header, OwnedHeaders};
use outbox::kafka::rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord};
use outbox::sqlite::rusqlite::{OptionalExtension, params};
use tokio::time::sleep;

use crate::mongo::MongoQueue;
use crate::place::{self, Spec};
use crate::process::{System, Task};
use crate::queue::{MysqlQueue, PostgresQueue, Queue, Waiting};
use crate::results::Outcome;
use crate::worker::Word;

/// How long nobody looks when nothing was there.
const PAUSE: Duration = Duration::from_millis(1);

/// Does what its task says, until it is told to end.
pub(crate) async fn run(task: &Task, word: Word) -> Outcome<()> {
    match &task.spec {
        Spec::Postgres { .. } => run_in::<PostgresQueue>(task, word).await,
        Spec::Mysql { .. } => run_in::<MysqlQueue>(task, word).await,
        Spec::Mongo { .. } => run_in::<MongoQueue>(task, word).await,
        Spec::Sqlite { path } => delete_one_by_one(task, path, word).await,
        Spec::Memory { .. } => Err("another process cannot read this one's memory".into()),
    }
}

async fn run_in<Q: Queue>(task: &Task, word: Word) -> Outcome<()> {
    let queue = Q::open(&task.spec).await?;
    match task.system {
        System::Outbox => Err("the relay is no baseline".into()),
        System::Batched(rows) => batched(task, queue, rows, word).await,
        System::Locked(rows) => locked(task, queue, rows, word).await,
        System::Naive(rows) => naive(task, queue, rows, word).await,
    }
}

/// Claims a batch with `SKIP LOCKED`, sends all of it, waits for all, marks all with one `UPDATE`: as libraries do it
/// that hold no transaction open while they wait for a broker.
async fn batched<Q: Queue>(task: &Task, queue: Q, rows: i64, word: Word) -> Outcome<()> {
    let producer = producer(task, &[("linger.ms", "0")])?;
    claiming(queue, rows, word, async |batch| {
        send_all::<Q>(&producer, batch).await
    })
    .await
}

/// Locks a batch with `FOR UPDATE SKIP LOCKED`, sends all of it, waits for all, marks all with one `UPDATE`, commits.
///
/// The fastest that is known of its kind: the lock lasts as long as the transaction, so that the claim itself writes
/// nothing; and in PostgreSQL, as with the relay, marks do not wait for the disk. MySQL and MariaDB decide that for all
/// of their sessions, not for one.
async fn locked<Q: Queue>(task: &Task, mut queue: Q, rows: i64, mut word: Word) -> Outcome<()> {
    let producer = producer(task, &[("linger.ms", "0")])?;
    word.begins().await?;
    let ended = word.ends();
    tokio::pin!(ended);
    loop {
        let batch = queue.lock(rows).await?;
        if batch.is_empty() {
            queue.commit().await?;
            tokio::select! {
                () = &mut ended => return Ok(()),
                () = sleep(PAUSE) => continue,
            }
        }
        send_all::<Q>(&producer, &batch).await?;
        queue.mark(&batch).await?;
        queue.commit().await?;
    }
}

/// What is written first: claims as [`batched`] does, sends one after the other and waits for each with librdkafka's own
/// linger, then marks.
async fn naive<Q: Queue>(task: &Task, queue: Q, rows: i64, word: Word) -> Outcome<()> {
    let producer = producer(task, &[])?;
    claiming(queue, rows, word, async |batch| {
        for row in batch {
            let sent = send(&producer, &Q::waiting(row)?)?;
            sent.await?.map_err(|(error, _)| error)?;
        }
        Ok(())
    })
    .await
}

/// Claims a batch, lets it be sent, marks it.
async fn claiming<Q: Queue>(
    mut queue: Q,
    rows: i64,
    mut word: Word,
    send: impl AsyncFn(&[Q::Row]) -> Outcome<()>,
) -> Outcome<()> {
    word.begins().await?;
    let ended = word.ends();
    tokio::pin!(ended);
    loop {
        let batch = queue.claim(rows).await?;
        if batch.is_empty() {
            tokio::select! {
                () = &mut ended => return Ok(()),
                () = sleep(PAUSE) => continue,
            }
        }
        send(&batch).await?;
        queue.mark(&batch).await?;
    }
}

/// What is written first for SQLite: reads one, sends it, waits for it with librdkafka's own linger, deletes it.
async fn delete_one_by_one(task: &Task, path: &Path, mut word: Word) -> Outcome<()> {
    let producer = producer(task, &[])?;
    let connection = place::connect(path)?;
    word.begins().await?;
    let ended = word.ends();
    tokio::pin!(ended);
    loop {
        let next = connection
            .prepare_cached(
                "SELECT id, lower(hex(message_id)), topic, key, payload FROM outbox ORDER BY id LIMIT 1",
            )?
            .query_row([], |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, String>(1)?,
                    row.get::<_, String>(2)?,
                    row.get::<_, Vec<u8>>(3)?,
                    row.get::<_, Vec<u8>>(4)?,
                ))
            })
            .optional()?;
        let Some((id, message_id, topic, key, payload)) = next else {
            tokio::select! {
                () = &mut ended => return Ok(()),
                () = sleep(PAUSE) => continue,
            }
        };
        let waiting = Waiting {
            message_id: message_id.into(),
            topic: &topic,
            key: &key,
            payload: &payload,
        };
        let sent = send(&producer, &waiting)?;
        sent.await?.map_err(|(error, _)| error)?;
        connection
            .prepare_cached("DELETE FROM outbox WHERE id = ?1")?
            .execute(params![id])?;
    }
}

/// As safe as the relay's, and into the same partitions.
fn producer(task: &Task, options: &[(&str, &str)]) -> Outcome<FutureProducer> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &task.brokers)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("partitioner", "murmur2_random");
    for (name, value) in options {
        config.set(*name, *value);
    }
    Ok(config.create()?)
}

async fn send_all<Q: Queue>(producer: &FutureProducer, batch: &[Q::Row]) -> Outcome<()> {
    let mut sent = Vec::with_capacity(batch.len());
    for row in batch {
        sent.push(send(producer, &Q::waiting(row)?)?);
    }
    for delivered in join_all(sent).await {
        delivered?.map_err(|(error, _)| error)?;
    }
    Ok(())
}

/// Never `FutureProducer::send`, which lets messages of a key overtake each other when the queue is full.
fn send(producer: &FutureProducer, waiting: &Waiting<'_>) -> Outcome<DeliveryFuture> {
    let headers = OwnedHeaders::new_with_capacity(1).insert(Header {
        key: OUTBOX_ID,
        value: Some(waiting.message_id.as_ref()),
    });
    let record = FutureRecord::to(waiting.topic)
        .key(waiting.key)
        .payload(waiting.payload)
        .headers(headers);
    Ok(producer.send_result(record).map_err(|(error, _)| error)?)
}
