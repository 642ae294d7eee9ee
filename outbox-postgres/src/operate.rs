//! What operators do: dead letters, parked holds, scheduled delivery, the archive.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use outbox_core::{
    DeadLetter, DeadLetterQuery, DeadLetters, Hold, HoldName, HoldRef, Message, OwnedShard, Parking,
    Position, Promotion, RecordRef, RelayId, Result, Retention, Scheduled, millis,
};
use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use crate::error::During;
use crate::hold::{bind_name, read_hold};
use crate::row::{Rows, count, limit, number, optional_number, small, span, text, time};
use crate::sql::Statement;
use crate::store::{PostgresStore, epochs};

/// How many rows one transaction of an operator's moves, so that none takes long.
const CHUNK: usize = 1_000;

impl PostgresStore {
    /// Does the same to dead letters, some at a time.
    async fn move_dead(
        &self,
        operation: &'static str,
        statement: &Statement,
        records: &[RecordRef],
    ) -> Result<usize> {
        let mut moved = 0;
        for chunk in records.chunks(CHUNK) {
            let (positions, ids): (Vec<i64>, Vec<Uuid>) = chunk
                .iter()
                .map(|record| (record.position.0, record.id.as_uuid()))
                .unzip();
            let mut session = self.control.open(operation).await?;
            moved += session
                .changed(statement.query().bind(positions).bind(ids))
                .await?;
            session.finish().await?;
        }
        Ok(moved)
    }
}

#[async_trait]
impl DeadLetters for PostgresStore {
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>> {
        const DURING: &str = "list dead letters";
        let (position, id) = match query.after {
            Some(after) => (after.position.0, after.id.as_uuid()),
            None => (i64::MIN, Uuid::nil()),
        };
        let ids: Option<Vec<Uuid>> = query
            .ids
            .as_ref()
            .map(|ids| ids.iter().map(|id| id.as_uuid()).collect());
        let mut session = self.control.open(DURING).await?;
        let rows = session
            .rows(
                self.sql
                    .dead_list
                    .query()
                    .bind(query.topic.as_deref())
                    .bind(position)
                    .bind(id)
                    .bind(limit(query.limit))
                    .bind(ids),
            )
            .await?;
        session.finish().await?;
        let mut reading = Rows::default();
        rows.iter()
            .map(|row| dead_letter(&mut reading, row).during(DURING))
            .collect()
    }

    /// A message that is numbered gets a new number; its old one stays a hole.
    async fn requeue(&self, records: &[RecordRef]) -> Result<usize> {
        self.move_dead("requeue", &self.sql.dead_requeue, records).await
    }

    async fn discard(&self, records: &[RecordRef]) -> Result<usize> {
        self.move_dead("discard", &self.sql.dead_discard, records).await
    }
}

fn dead_letter(reading: &mut Rows, row: &PgRow) -> sqlx::Result<DeadLetter> {
    let (parts, _) = reading.parts(row, 1)?;
    Ok(DeadLetter {
        record: RecordRef {
            position: Position(number(row, 0)?),
            id: parts.id,
        },
        message: Message::from_stored(parts),
        key_seq: optional_number(row, 8)?,
        attempts: u32::try_from(number(row, 9)?).unwrap_or(u32::MAX),
        reason: text(row, 10)?.unwrap_or_default().to_owned(),
        died_at: time(row, 11)?.unwrap_or(SystemTime::UNIX_EPOCH),
    })
}

#[async_trait]
impl Parking for PostgresStore {
    async fn parked(&self, most: usize) -> Result<Vec<Hold>> {
        let mut session = self.control.open("list parked").await?;
        let rows = session.rows(self.sql.parked.query().bind(limit(most))).await?;
        session.finish().await?;
        rows.iter()
            .map(|row| read_hold(row).during("list parked"))
            .collect()
    }

    async fn resume(&self, hold: &HoldRef) -> Result<bool> {
        let name = HoldName::new(hold.shard, &hold.scope, hold.head);
        let mut session = self.control.open("resume").await?;
        let resumed = session
            .changed(bind_name(&self.sql.hold_resume, name, hold.head))
            .await?;
        session.finish().await?;
        Ok(resumed > 0)
    }

    async fn bury(&self, hold: &HoldRef) -> Result<bool> {
        const DURING: &str = "bury";
        hold.check_buriable()?;
        let name = HoldName::new(hold.shard, &hold.scope, hold.head);
        let mut session = self.control.begin(DURING).await?;
        let parked = session
            .rows(bind_name(&self.sql.hold_unpark, name, hold.head))
            .await?;
        let Some(row) = parked.first() else {
            session.finish().await?;
            return Ok(false);
        };
        let (attempts, reason) = (
            number(row, 0).during(DURING)?,
            text(row, 1).during(DURING)?.unwrap_or_default(),
        );
        session
            .changed(
                self.sql
                    .bury
                    .query()
                    .bind(small(hold.shard))
                    .bind(hold.head.position.0)
                    .bind(hold.head.id.as_uuid())
                    .bind(attempts)
                    .bind(reason),
            )
            .await?;
        session.finish().await?;
        Ok(true)
    }
}

#[async_trait]
impl Scheduled for PostgresStore {
    async fn promote(&self, relay: &RelayId, owned: &[OwnedShard], most: usize) -> Result<Promotion> {
        let mut promotion = self.look_ahead(relay, owned).await?;
        if promotion.next_in == Some(Duration::ZERO) && most > 0 {
            let (shards, epochs) = epochs(owned);
            let mut session = self.control.begin(PROMOTE).await?;
            // Counters may be locked by a producer that stays open, and the leases are locked meanwhile.
            session
                .run(format!("SET LOCAL lock_timeout = '{LOCKED}'"))
                .await?;
            let query = self.sql.promote.query().bind(shards).bind(epochs);
            let promoted = session.row(query.bind(relay.as_str()).bind(limit(most))).await?;
            session.finish().await?;
            let promoted = count(&promoted, 0).during(PROMOTE)?;
            promotion = Promotion {
                promoted: usize::try_from(promoted).unwrap_or(usize::MAX),
                ..self.look_ahead(relay, owned).await?
            };
        }
        Ok(promotion)
    }
}

const PROMOTE: &str = "promote";
/// How long a promotion waits for a lock: shorter than a renewal of the leases is waited for.
const LOCKED: &str = "500ms";

impl PostgresStore {
    /// What is planned, and what is lost: most often nothing is due, and that is asked without locking a thing.
    async fn look_ahead(&self, relay: &RelayId, owned: &[OwnedShard]) -> Result<Promotion> {
        let (shards, epochs) = epochs(owned);
        let mut session = self.control.open(PROMOTE).await?;
        let query = self.sql.next_due.query().bind(shards).bind(epochs);
        let row = session.row(query.bind(relay.as_str())).await?;
        session.finish().await?;
        let held: Vec<i16> = row.try_get(1).during(PROMOTE)?;
        Ok(Promotion {
            promoted: 0,
            next_in: span(&row, 0).during(PROMOTE)?,
            lost: owned
                .iter()
                .map(|owned| owned.shard)
                .filter(|shard| !held.contains(&small(*shard)))
                .collect(),
        })
    }
}

#[async_trait]
impl Retention for PostgresStore {
    async fn purge(&self, age: Duration, most: usize) -> Result<usize> {
        let age = millis(age.min(Duration::from_secs(100 * 366 * 24 * 60 * 60)));
        let mut purged = 0;
        while purged < most {
            let chunk = (most - purged).min(CHUNK);
            let mut session = self.control.open("purge").await?;
            let deleted = session
                .changed(self.sql.purge.query().bind(age).bind(limit(chunk)))
                .await?;
            session.finish().await?;
            purged += deleted;
            if deleted < chunk {
                break;
            }
        }
        Ok(purged)
    }
}
