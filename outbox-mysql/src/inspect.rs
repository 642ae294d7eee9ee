//! Where something stands: what people ask. Read in one snapshot.

use std::time::SystemTime;

use async_trait::async_trait;
use outbox_core::{
    Count, Facts, Inspection, MAX_PLACES, Message, MessageId, Ordering, Place, Position, Result, Standing,
    Subject,
};
use sqlx::mysql::MySqlRow;

use crate::error::During;
use crate::hold::read_hold;
use crate::row::{Rows, count, number, optional_number, shard, text, time};
use crate::session::Session;
use crate::sql::Sql;
use crate::store::{MysqlStore, owners};

const DURING: &str = "inspect";

#[async_trait]
impl Inspection for MysqlStore {
    async fn inspect(&self, subject: &Subject, bound: usize) -> Result<Facts> {
        let mut session = self.control.open(DURING).await?;
        let begin = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY";
        session.run(begin.to_owned()).await?;
        let now = session.run(Sql::now()).await?;
        let (backlog, mut complete, mut found) = self.in_outbox(&mut session, subject, bound).await?;
        if let Subject::Message(id) = subject {
            complete &= self.elsewhere(&mut session, *id, bound, &mut found).await?;
        }
        let holds = session.run(self.sql.all_holds()).await?;
        let mut holds = holds
            .rows(0)
            .iter()
            .map(read_hold)
            .collect::<sqlx::Result<Vec<_>>>()
            .during(DURING)?;
        holds.retain(|hold| subject.is_stopped_by(hold, &found));
        let last_seq = match subject {
            Subject::Key(key) if self.config.ordering == Ordering::Sequenced => {
                let told = session.run(self.sql.last_number(&key.topic, &key.key)).await?;
                told.rows(0)
                    .first()
                    .map(|row| number(row, 0))
                    .transpose()
                    .during(DURING)?
            }
            _ => None,
        };
        let told = session.run(self.sql.owners()).await?;
        let (leases, relays) = owners(&told, 0).during(DURING)?;
        session.run("COMMIT".to_owned()).await?;
        session.finish();
        let now = now.row(0).and_then(|row| time(row, 0)).during(DURING)?;
        Ok(Facts {
            now: now.unwrap_or(SystemTime::UNIX_EPOCH),
            found,
            backlog,
            holds,
            last_seq,
            leases,
            relays,
            complete,
        })
    }
}

impl MysqlStore {
    /// Searches the outbox: no index but the position's is worth its price to producers. A key has one shard.
    async fn in_outbox(
        &self,
        session: &mut Session,
        subject: &Subject,
        bound: usize,
    ) -> Result<(Count, bool, Vec<Standing>)> {
        let (own, most) = (subject.shard(self.config.shards), subject.places());
        let told = session.run(self.sql.search(subject, own, bound, most)).await?;
        let counts = told.row(0).during(DURING)?;
        let (seen, meant) = (count(counts, 0).during(DURING)?, count(counts, 1).during(DURING)?);
        let complete = usize::try_from(seen).is_ok_and(|seen| seen < bound);
        let mut found = Vec::new();
        for row in told.rows(1) {
            let place = Place::Outbox {
                shard: shard(row, 1).during(DURING)?,
                position: Position(number(row, 2).during(DURING)?),
                ahead: Count::Exact(count(row, 0).during(DURING)?),
            };
            found.push(standing(row, 3, place).during(DURING)?);
        }
        Ok((Count::found(meant, complete), complete, found))
    }

    /// Searches the other tables for an id; says whether all was looked at.
    async fn elsewhere(
        &self,
        session: &mut Session,
        id: MessageId,
        bound: usize,
        found: &mut Vec<Standing>,
    ) -> Result<bool> {
        let script = self.sql.elsewhere(id.as_bytes(), bound, MAX_PLACES);
        let told = session.run(script).await?;
        for row in told.rows(0) {
            let place = Place::Scheduled {
                shard: shard(row, 1).during(DURING)?,
                due: time(row, 0).during(DURING)?.unwrap_or(SystemTime::UNIX_EPOCH),
            };
            found.push(standing(row, 2, place).during(DURING)?);
        }
        for row in told.rows(1) {
            let place = Place::Processed {
                position: Position(number(row, 0).during(DURING)?),
                at: time(row, 10).during(DURING)?.unwrap_or(SystemTime::UNIX_EPOCH),
            };
            found.push(standing(row, 1, place).during(DURING)?);
        }
        for row in told.rows(2) {
            let place = Place::Dead {
                position: Position(number(row, 0).during(DURING)?),
                attempts: u32::try_from(number(row, 10).during(DURING)?).unwrap_or(u32::MAX),
                reason: text(row, 11).during(DURING)?.unwrap_or_default().to_owned(),
                at: time(row, 12).during(DURING)?.unwrap_or(SystemTime::UNIX_EPOCH),
            };
            found.push(standing(row, 1, place).during(DURING)?);
        }
        let mut complete = true;
        for index in [3, 4] {
            let rows = told.row(index).and_then(|row| count(row, 0)).during(DURING)?;
            complete &= usize::try_from(rows).is_ok_and(|rows| rows < bound);
        }
        Ok(complete)
    }
}

/// What is told of the message that begins at a column.
fn standing(row: &MySqlRow, first: usize, place: Place) -> sqlx::Result<Standing> {
    let (parts, _) = Rows::default().parts(row, first)?;
    Ok(Standing::of(
        &Message::from_stored(parts),
        optional_number(row, first + 8)?,
        place,
    ))
}
