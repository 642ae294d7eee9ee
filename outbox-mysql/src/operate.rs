//! What operators do: dead letters, parked holds, scheduled delivery, the archive.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use outbox_core::{
    DeadLetter, DeadLetterQuery, DeadLetters, Hold, HoldRef, Message, OwnedShard, Parking, Position,
    Promotion, RecordRef, RelayId, Result, Retention, Scheduled, Shard, millis,
};
use sqlx::mysql::MySqlRow;

use crate::error::During;
use crate::hold::read_hold;
use crate::row::{Rows, number, optional_number, shard, span, text, time};
use crate::sql::FENCED;
use crate::store::{MysqlStore, shards};

/// How many rows one transaction of an operator's moves, so that none takes long.
const CHUNK: usize = 1_000;

#[async_trait]
impl DeadLetters for MysqlStore {
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>> {
        const DURING: &str = "list dead letters";
        let listed = self.control.run(DURING, self.sql.dead_list(query)).await?;
        let mut reading = Rows::default();
        listed
            .rows(0)
            .iter()
            .map(|row| dead_letter(&mut reading, row).during(DURING))
            .collect()
    }

    /// A message that is numbered gets a new number; its old one stays a hole.
    async fn requeue(&self, records: &[RecordRef]) -> Result<usize> {
        let mut moved = 0;
        for chunk in records.chunks(CHUNK) {
            let script = self.sql.dead_requeue(chunk);
            moved += self.control.run("requeue", script).await?.rows(1).len();
        }
        Ok(moved)
    }

    async fn discard(&self, records: &[RecordRef]) -> Result<usize> {
        let mut gone = 0;
        for chunk in records.chunks(CHUNK) {
            let script = self.sql.dead_discard(chunk);
            gone += self.control.run("discard", script).await?.changed(0);
        }
        Ok(gone)
    }
}

fn dead_letter(reading: &mut Rows, row: &MySqlRow) -> sqlx::Result<DeadLetter> {
    let (parts, _) = reading.parts(row, 1)?;
    Ok(DeadLetter {
        record: RecordRef {
            position: Position(number(row, 0)?),
            id: parts.id,
        },
        message: Message::from_stored(parts),
        key_seq: optional_number(row, 9)?,
        attempts: u32::try_from(number(row, 10)?).unwrap_or(u32::MAX),
        reason: text(row, 11)?.unwrap_or_default().to_owned(),
        died_at: time(row, 12)?.unwrap_or(SystemTime::UNIX_EPOCH),
    })
}

#[async_trait]
impl Parking for MysqlStore {
    async fn parked(&self, most: usize) -> Result<Vec<Hold>> {
        const DURING: &str = "list parked";
        let parked = self.control.run(DURING, self.sql.parked(most)).await?;
        parked
            .rows(0)
            .iter()
            .map(|row| read_hold(row).during(DURING))
            .collect()
    }

    async fn resume(&self, hold: &HoldRef) -> Result<bool> {
        let resumed = self.control.run("resume", self.sql.resume(hold)).await?;
        Ok(resumed.changed(0) > 0)
    }

    async fn bury(&self, hold: &HoldRef) -> Result<bool> {
        const DURING: &str = "bury";
        hold.check_buriable()?;
        let buried = self.control.run(DURING, self.sql.bury(hold)).await?;
        Ok(!buried.rows(1).is_empty())
    }
}

#[async_trait]
impl Scheduled for MysqlStore {
    async fn promote(&self, relay: &RelayId, owned: &[OwnedShard], most: usize) -> Result<Promotion> {
        let (mut promotion, due) = self.look_ahead(relay, owned, most).await?;
        if !due.is_empty() {
            let script = self.sql.promote(relay.as_str(), owned, &due);
            let promoted = self.control.run(PROMOTE, script).await?.rows(FENCED + 1).len();
            (promotion, _) = self.look_ahead(relay, owned, 0).await?;
            promotion.promoted = promoted;
        }
        Ok(promotion)
    }
}

const PROMOTE: &str = "promote";

impl MysqlStore {
    /// What is planned, what is lost, and what is due by shard and id: most often nothing is, and that is asked without
    /// locking a thing.
    async fn look_ahead(
        &self,
        relay: &RelayId,
        owned: &[OwnedShard],
        most: usize,
    ) -> Result<(Promotion, Vec<(Shard, i64)>)> {
        if owned.is_empty() {
            return Ok(Default::default());
        }
        let script = self.sql.next_due(relay.as_str(), owned, most);
        let told = self.control.run(PROMOTE, script).await?;
        let held = shards(told.rows(1)).during(PROMOTE)?;
        let promotion = Promotion {
            promoted: 0,
            next_in: span(told.row(0).during(PROMOTE)?, 0).during(PROMOTE)?,
            lost: owned
                .iter()
                .map(|owned| owned.shard)
                .filter(|shard| !held.contains(shard))
                .collect(),
        };
        let due = told
            .rows(2)
            .iter()
            .map(|row| Ok((shard(row, 0)?, number(row, 1)?)))
            .collect::<sqlx::Result<_>>()
            .during(PROMOTE)?;
        Ok((promotion, due))
    }
}

#[async_trait]
impl Retention for MysqlStore {
    async fn purge(&self, age: Duration, most: usize) -> Result<usize> {
        let age = millis(age.min(Duration::from_secs(100 * 366 * 24 * 60 * 60)));
        let mut purged = 0;
        while purged < most {
            let chunk = (most - purged).min(CHUNK);
            let script = self.sql.purge(age, chunk);
            let deleted = self.control.run("purge", script).await?.changed(0);
            purged += deleted;
            if deleted < chunk {
                break;
            }
        }
        Ok(purged)
    }
}
