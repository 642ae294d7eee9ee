//! What operators do: dead letters, parked holds, scheduled delivery, the archive.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use outbox_core::{
    DeadLetter, DeadLetterQuery, DeadLetters, Hold, HoldName, HoldRef, Message, MessageId, Ordering,
    OwnedShard, Parking, Position, Promotion, RecordRef, RelayId, Result, Retention, Scheduled, Shard,
};
use rusqlite::{OptionalExtension, Transaction, TransactionBehavior, params};

use crate::error::During;
use crate::hold::list_holds;
use crate::row::{Rows, SHARD, time};
use crate::sql::Sql;
use crate::store::{SqliteStore, bury, load_leases};
use crate::worker::{durably, millis, write};

/// How many rows one transaction of an operator's moves, so that producers never wait long.
const CHUNK: usize = 500;

impl SqliteStore {
    /// Does one short writing transaction of an operator's.
    async fn operate<T, F>(&self, operation: &'static str, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Transaction<'_>, &Sql) -> rusqlite::Result<T> + Send + 'static,
    {
        let sql = Arc::clone(&self.sql);
        self.operator
            .run(operation, move |connection, _| {
                durably(connection, operation, |connection| {
                    let transaction = write(connection, operation)?;
                    let result = job(&transaction, &sql).during(operation)?;
                    transaction.commit().during(operation)?;
                    Ok(result)
                })
            })
            .await
    }
}

#[async_trait]
impl DeadLetters for SqliteStore {
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>> {
        const DURING: &str = "list dead letters";
        let (sql, query) = (Arc::clone(&self.sql), query.clone());
        let mut rows = Rows::new(self.config.ordering == Ordering::Sequenced);
        self.operator
            .run(DURING, move |connection, _| {
                let (position, id) = match query.after {
                    Some(after) => (after.position.0, after.id.as_bytes().to_vec()),
                    // Before everything: no id is shorter.
                    None => (i64::MIN, Vec::new()),
                };
                let (topic, limit) = (query.topic.as_deref(), bound(query.limit));
                let mut read = |row: &rusqlite::Row<'_>| dead_letter(&mut rows, row);
                let listed = || -> rusqlite::Result<Vec<DeadLetter>> {
                    match query.ids {
                        None => connection
                            .prepare_cached(&sql.dead_list)?
                            .query_map(params![topic, position, id, limit], &mut read)?
                            .collect(),
                        Some(ids) => connection
                            .prepare_cached(&sql.dead_list_by_id)?
                            .query_map(params![topic, position, id, limit, hex_list(&ids)], &mut read)?
                            .collect(),
                    }
                };
                listed().during(DURING)
            })
            .await
    }

    /// A message that is numbered gets a new number; its old one stays a hole.
    async fn requeue(&self, records: &[RecordRef]) -> Result<usize> {
        let mut requeued = 0;
        for chunk in records.chunks(CHUNK) {
            let chunk = chunk.to_vec();
            requeued += self
                .operate("requeue", move |transaction, sql| {
                    let mut insert = transaction.prepare_cached(&sql.dead_requeue)?;
                    let mut delete = transaction.prepare_cached(&sql.dead_delete)?;
                    let mut moved = 0;
                    for record in chunk {
                        let name = params![record.position.0, record.id.as_bytes()];
                        moved += insert.execute(name)?;
                        delete.execute(name)?;
                    }
                    Ok(moved)
                })
                .await?;
        }
        Ok(requeued)
    }

    async fn discard(&self, records: &[RecordRef]) -> Result<usize> {
        let mut discarded = 0;
        for chunk in records.chunks(CHUNK) {
            let chunk = chunk.to_vec();
            discarded += self
                .operate("discard", move |transaction, sql| {
                    let mut delete = transaction.prepare_cached(&sql.dead_delete)?;
                    let mut deleted = 0;
                    for record in chunk {
                        deleted += delete.execute(params![record.position.0, record.id.as_bytes()])?;
                    }
                    Ok(deleted)
                })
                .await?;
        }
        Ok(discarded)
    }
}

fn dead_letter(rows: &mut Rows, row: &rusqlite::Row<'_>) -> rusqlite::Result<DeadLetter> {
    let (parts, _) = rows.parts(row, 1)?;
    Ok(DeadLetter {
        record: RecordRef {
            position: Position(row.get(0)?),
            id: parts.id,
        },
        message: Message::from_stored(parts),
        key_seq: rows.key_seq(row, 8),
        attempts: row.get(9)?,
        reason: row.get(10)?,
        died_at: time(row.get(11)?).unwrap_or(SystemTime::UNIX_EPOCH),
    })
}

#[async_trait]
impl Parking for SqliteStore {
    async fn parked(&self, limit: usize) -> Result<Vec<Hold>> {
        let sql = Arc::clone(&self.sql);
        self.operator
            .run("list parked", move |connection, _| {
                list_holds(connection, &sql.parked, [bound(limit)]).during("list parked")
            })
            .await
    }

    async fn resume(&self, hold: &HoldRef) -> Result<bool> {
        let hold = hold.clone();
        self.operate("resume", move |transaction, sql| {
            let name = HoldName::new(hold.shard, &hold.scope, hold.head);
            let resumed = transaction.prepare_cached(&sql.hold_resume)?.execute(params![
                name.scope,
                name.topic,
                name.key,
                name.message,
                hold.head.position.0,
                hold.head.id.as_bytes()
            ])?;
            Ok(resumed > 0)
        })
        .await
    }

    async fn bury(&self, hold: &HoldRef) -> Result<bool> {
        hold.check_buriable()?;
        let hold = hold.clone();
        self.operate("bury", move |transaction, sql| {
            let name = HoldName::new(hold.shard, &hold.scope, hold.head);
            let parked: Option<(u32, String)> = transaction
                .prepare_cached(&sql.hold_unpark)?
                .query_row(
                    params![
                        name.scope,
                        name.topic,
                        name.key,
                        name.message,
                        hold.head.position.0,
                        hold.head.id.as_bytes()
                    ],
                    |row| Ok((row.get(0)?, row.get(1)?)),
                )
                .optional()?;
            let Some((attempts, reason)) = parked else {
                return Ok(false);
            };
            bury(transaction, sql, hold.head, attempts, &reason)?;
            Ok(true)
        })
        .await
    }
}

#[async_trait]
impl Scheduled for SqliteStore {
    async fn promote(&self, relay: &RelayId, shards: &[OwnedShard], limit: usize) -> Result<Promotion> {
        const DURING: &str = "promote";
        let (sql, relay, shards) = (Arc::clone(&self.sql), relay.clone(), shards.to_vec());
        self.relay
            .run(DURING, move |connection, _| {
                // Most often nothing is due, and the write lock stays with the producers.
                let idle = connection
                    .transaction_with_behavior(TransactionBehavior::Deferred)
                    .and_then(|transaction| promote(&transaction, &sql, &relay, &shards, 0))
                    .during(DURING)?;
                if limit == 0 || idle.next_in != Some(Duration::ZERO) {
                    return Ok(idle);
                }
                // A number that was given must not be given again, to a message of a producer's.
                durably(connection, DURING, |connection| {
                    let transaction = write(connection, DURING)?;
                    let promotion = promote(&transaction, &sql, &relay, &shards, limit).during(DURING)?;
                    transaction.commit().during(DURING)?;
                    Ok(promotion)
                })
            })
            .await
    }
}

fn promote(
    transaction: &Transaction<'_>,
    sql: &Sql,
    relay: &RelayId,
    shards: &[OwnedShard],
    limit: usize,
) -> rusqlite::Result<Promotion> {
    let (leases, now) = load_leases(transaction, sql)?;
    let held = leases.held_by(relay, now);
    let lost: Vec<Shard> = shards
        .iter()
        .filter(|owned| !held.contains(owned))
        .map(|owned| owned.shard)
        .collect();
    let mut promotion = Promotion {
        lost,
        ..Promotion::default()
    };
    if !shards.iter().any(|owned| owned.shard == SHARD) || promotion.lost.contains(&SHARD) {
        return Ok(promotion);
    }
    let due: Vec<i64> = transaction
        .prepare_cached(&sql.due)?
        .query_map([bound(limit)], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let mut insert = transaction.prepare_cached(&sql.promote)?;
    let mut delete = transaction.prepare_cached(&sql.promoted)?;
    for id in due {
        promotion.promoted += insert.execute([id])?;
        delete.execute([id])?;
    }
    promotion.next_in = transaction
        .prepare_cached(&sql.next_due)?
        .query_row([], |row| row.get::<_, Option<i64>>(0))?
        .map(|left| Duration::from_millis(left.max(0).unsigned_abs()));
    Ok(promotion)
}

#[async_trait]
impl Retention for SqliteStore {
    async fn purge(&self, age: Duration, limit: usize) -> Result<usize> {
        let age = millis(age);
        let mut purged = 0;
        // In short transactions, so that producers never wait long.
        while purged < limit {
            let chunk = (limit - purged).min(CHUNK);
            let deleted = self
                .operate("purge", move |transaction, sql| {
                    transaction
                        .prepare_cached(&sql.purge)?
                        .execute(params![age, bound(chunk)])
                })
                .await?;
            purged += deleted;
            if deleted < chunk {
                break;
            }
        }
        Ok(purged)
    }
}

/// Ids as one parameter: a JSON list of hexadecimal digits.
fn hex_list(ids: &[MessageId]) -> String {
    let ids: Vec<String> = ids
        .iter()
        .map(|id| format!("\"{}\"", id.as_uuid().simple()))
        .collect();
    format!("[{}]", ids.join(","))
}

/// A limit as SQLite takes it.
pub(crate) fn bound(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
