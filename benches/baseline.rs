//! What a relay is compared with: the outbox as it is written without one, on a table of its own.
//!
//! Both send what the relay sends, the header with the id included, under the same promises of Kafka's.

use std::time::Duration;

use futures::future::join_all;
use outbox::kafka::OUTBOX_ID;
use outbox::kafka::rdkafka::ClientConfig;
use outbox::kafka::rdkafka::message::{Header, OwnedHeaders};
use outbox::kafka::rdkafka::producer::{FutureProducer, FutureRecord};
use outbox::postgres::sqlx::postgres::{PgConnectOptions, PgConnection, PgRow};
use outbox::postgres::sqlx::{AssertSqlSafe, Connection, Row, query};
use outbox::sqlite::rusqlite::{OptionalExtension, params};
use tokio::time::sleep;

use crate::place::{self, QUEUE, Spec};
use crate::process::Task;
use crate::results::Outcome;
use crate::worker::Word;

/// How long nobody looks when nothing was there.
const PAUSE: Duration = Duration::from_millis(1);
const COLUMNS: &str = "id, message_id::text, topic, key, payload";

/// Claims a batch by an `UPDATE` with `SKIP LOCKED`, sends all of it, waits for all, marks all with one `UPDATE`: as
/// libraries do it that hold no transaction open while they wait for a broker.
pub(crate) async fn batched(task: &Task, rows: i64, word: Word) -> Outcome<()> {
    let producer = producer(task, &[("linger.ms", "0")])?;
    claiming(task, rows, word, async |batch| send_all(&producer, batch).await).await
}

/// Locks a batch with `FOR UPDATE SKIP LOCKED`, sends all of it, waits for all, marks all with one `UPDATE`, commits.
///
/// The fastest that is known of its kind: the lock lasts as long as the transaction, so that the claim itself writes
/// nothing; and as with the relay, marks need not wait for the disk.
pub(crate) async fn locked(task: &Task, rows: i64, mut word: Word) -> Outcome<()> {
    let (mut connection, queue) = open(task).await?;
    query("SET synchronous_commit = off")
        .execute(&mut connection)
        .await?;
    let producer = producer(task, &[("linger.ms", "0")])?;
    let claim = format!(
        "SELECT {COLUMNS} FROM {queue} WHERE processed_at IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED"
    );
    let mark = mark(&queue);
    word.begins().await?;
    let ended = word.ends();
    tokio::pin!(ended);
    loop {
        let mut transaction = connection.begin().await?;
        let batch = query(AssertSqlSafe(claim.clone()))
            .bind(rows)
            .fetch_all(&mut *transaction)
            .await?;
        if batch.is_empty() {
            transaction.commit().await?;
            tokio::select! {
                () = &mut ended => return Ok(()),
                () = sleep(PAUSE) => continue,
            }
        }
        send_all(&producer, &batch).await?;
        query(AssertSqlSafe(mark.clone()))
            .bind(ids(&batch)?)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
    }
}

/// What is written first: claims by an `UPDATE`, sends one after the other and waits for each with librdkafka's own
/// linger, then marks. In SQLite: reads one, sends it, deletes it.
pub(crate) async fn naive(task: &Task, rows: i64, mut word: Word) -> Outcome<()> {
    let producer = producer(task, &[])?;
    if let Spec::Sqlite { path } = &task.spec {
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
            let sent = hand_over(&producer, &message_id, &topic, &key, &payload)?;
            sent.await?.map_err(|(error, _)| error)?;
            connection
                .prepare_cached("DELETE FROM outbox WHERE id = ?1")?
                .execute(params![id])?;
        }
    }
    claiming(task, rows, word, async |batch| {
        for row in batch {
            send(&producer, row)?.await?.map_err(|(error, _)| error)?;
        }
        Ok(())
    })
    .await
}

/// Claims a batch, lets it be sent, marks it.
async fn claiming(
    task: &Task,
    rows: i64,
    mut word: Word,
    send: impl AsyncFn(&[PgRow]) -> Outcome<()>,
) -> Outcome<()> {
    let (mut connection, queue) = open(task).await?;
    let (claim, mark) = (claim(&queue), mark(&queue));
    word.begins().await?;
    let ended = word.ends();
    tokio::pin!(ended);
    loop {
        let mut batch = query(AssertSqlSafe(claim.clone()))
            .bind(rows)
            .fetch_all(&mut connection)
            .await?;
        if batch.is_empty() {
            tokio::select! {
                () = &mut ended => return Ok(()),
                () = sleep(PAUSE) => continue,
            }
        }
        // What RETURNING returns has no order.
        batch.sort_by_key(|row| row.try_get::<i64, _>(0).unwrap_or_default());
        send(&batch).await?;
        query(AssertSqlSafe(mark.clone()))
            .bind(ids(&batch)?)
            .execute(&mut connection)
            .await?;
    }
}

fn claim(queue: &str) -> String {
    format!(
        "UPDATE {queue} SET claimed_at = clock_timestamp() WHERE id IN (SELECT id FROM {queue} \
         WHERE processed_at IS NULL AND (claimed_at IS NULL OR claimed_at < clock_timestamp() - interval '1 minute') \
         ORDER BY id FOR UPDATE SKIP LOCKED LIMIT $1) RETURNING {COLUMNS}"
    )
}

fn mark(queue: &str) -> String {
    format!("UPDATE {queue} SET processed_at = clock_timestamp() WHERE id = ANY($1)")
}

async fn open(task: &Task) -> Outcome<(PgConnection, String)> {
    let Spec::Postgres { url, .. } = &task.spec else {
        return Err("this needs PostgreSQL".into());
    };
    let options: PgConnectOptions = url.parse()?;
    Ok((
        PgConnection::connect_with(&options).await?,
        task.spec.table(QUEUE),
    ))
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

async fn send_all(producer: &FutureProducer, batch: &[PgRow]) -> Outcome<()> {
    let mut sent = Vec::with_capacity(batch.len());
    for row in batch {
        sent.push(send(producer, row)?);
    }
    for delivered in join_all(sent).await {
        delivered?.map_err(|(error, _)| error)?;
    }
    Ok(())
}

fn send(producer: &FutureProducer, row: &PgRow) -> Outcome<outbox::kafka::rdkafka::producer::DeliveryFuture> {
    hand_over(
        producer,
        row.try_get(1)?,
        row.try_get(2)?,
        row.try_get(3)?,
        row.try_get(4)?,
    )
}

/// Never `FutureProducer::send`, which lets messages of a key overtake each other when the queue is full.
fn hand_over(
    producer: &FutureProducer,
    id: &str,
    topic: &str,
    key: &[u8],
    payload: &[u8],
) -> Outcome<outbox::kafka::rdkafka::producer::DeliveryFuture> {
    let headers = OwnedHeaders::new_with_capacity(1).insert(Header {
        key: OUTBOX_ID,
        value: Some(id),
    });
    let record = FutureRecord::to(topic).key(key).payload(payload).headers(headers);
    Ok(producer.send_result(record).map_err(|(error, _)| error)?)
}

fn ids(batch: &[PgRow]) -> Outcome<Vec<i64>> {
    Ok(batch.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
}
