//! Where something stands: what people ask. Read in one snapshot.

use std::time::SystemTime;

use async_trait::async_trait;
use outbox_core::{
    Count, Facts, Inspection, MAX_PLACES, Message, MessageId, Ordering, Place, Position, Result, Shard,
    Standing, Subject,
};
use sqlx::postgres::PgRow;

use crate::error::During;
use crate::hold::read_hold;
use crate::row::{Rows, flag, limit, number, optional_number, shard, small, text, time};
use crate::session::Session;
use crate::store::{PostgresStore, owners};

const DURING: &str = "inspect";

/// A search looks at so many rows of each shard, if the bound allows it, however many shards there are.
const EACH: usize = 1_000;

#[async_trait]
impl Inspection for PostgresStore {
    async fn inspect(&self, subject: &Subject, bound: usize) -> Result<Facts> {
        let mut session = self.control.begin(DURING).await?;
        session
            .run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY".to_owned())
            .await?;
        let now = session.row(self.sql.now.query()).await?;
        let (backlog, mut complete, mut found) = self.in_outbox(&mut session, subject, bound).await?;
        if let Subject::Message(id) = subject {
            complete &= self.elsewhere(&mut session, *id, bound, &mut found).await?;
        }
        let holds = session.rows(self.sql.all_holds.query()).await?;
        let mut holds = holds
            .iter()
            .map(read_hold)
            .collect::<sqlx::Result<Vec<_>>>()
            .during(DURING)?;
        holds.retain(|hold| subject.is_stopped_by(hold, &found));
        let last_seq = match subject {
            Subject::Key(key) if self.config.ordering == Ordering::Sequenced => {
                let query = self.sql.last_number.query().bind(&*key.topic).bind(&key.key[..]);
                let rows = session.rows(query).await?;
                rows.first()
                    .map(|row| number(row, 0))
                    .transpose()
                    .during(DURING)?
            }
            _ => None,
        };
        let (leases, relays) = owners(&mut session, &self.sql, DURING).await?;
        session.finish().await?;
        Ok(Facts {
            now: time(&now, 0).during(DURING)?.unwrap_or(SystemTime::UNIX_EPOCH),
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

impl PostgresStore {
    /// Searches the outbox: no index but the position's is worth its price to producers. A key has one shard.
    async fn in_outbox(
        &self,
        session: &mut Session,
        subject: &Subject,
        bound: usize,
    ) -> Result<(Count, bool, Vec<Standing>)> {
        let shards: Vec<i16> = match subject.shard(self.config.shards) {
            Some(own) => vec![small(own)],
            None => (0..self.config.shards)
                .map(|number| small(Shard(number)))
                .collect(),
        };
        let (id, topic, key) = match subject {
            Subject::Message(id) => (Some(id.as_uuid()), None, None),
            Subject::Key(key) => (None, Some(&*key.topic), Some(&key.key[..])),
            Subject::Topic(topic) => (None, Some(&**topic), None),
        };
        let each = (bound / shards.len().max(1)).max(bound.min(EACH));
        let query = self
            .sql
            .search
            .query()
            .bind(shards)
            .bind(limit(each))
            .bind(limit(bound))
            .bind(id)
            .bind(topic)
            .bind(key)
            .bind(limit(subject.places()));
        let rows = session.rows(query).await?;
        let (mut matching, mut complete, mut found) = (0, true, Vec::new());
        for row in &rows {
            matching = number(row, 0).during(DURING)?.unsigned_abs();
            complete = flag(row, 1).during(DURING)?;
            if let Some(ahead) = optional_number(row, 2).during(DURING)? {
                let place = Place::Outbox {
                    shard: shard(row, 3).during(DURING)?,
                    position: Position(number(row, 4).during(DURING)?),
                    ahead: Count::Exact(ahead.unsigned_abs()),
                };
                found.push(standing(row, 5, place).during(DURING)?);
            }
        }
        Ok((Count::found(matching, complete), complete, found))
    }

    /// Searches the other tables for an id; says whether all was looked at.
    async fn elsewhere(
        &self,
        session: &mut Session,
        id: MessageId,
        bound: usize,
        found: &mut Vec<Standing>,
    ) -> Result<bool> {
        let (id, bound, most) = (id.as_uuid(), limit(bound), limit(MAX_PLACES));
        let sql = &self.sql;
        let query = sql.scheduled_by_id.query().bind(id).bind(bound).bind(most);
        for row in &session.rows(query).await? {
            let place = Place::Scheduled {
                shard: shard(row, 1).during(DURING)?,
                due: time(row, 0).during(DURING)?.unwrap_or(SystemTime::UNIX_EPOCH),
            };
            found.push(standing(row, 2, place).during(DURING)?);
        }
        let query = sql.processed_by_id.query().bind(id).bind(bound).bind(most);
        for row in &session.rows(query).await? {
            let place = Place::Processed {
                position: Position(number(row, 0).during(DURING)?),
                at: time(row, 9).during(DURING)?.unwrap_or(SystemTime::UNIX_EPOCH),
            };
            found.push(standing(row, 1, place).during(DURING)?);
        }
        for row in &session.rows(sql.dead_by_id.query().bind(id).bind(most)).await? {
            let place = Place::Dead {
                position: Position(number(row, 0).during(DURING)?),
                attempts: u32::try_from(number(row, 9).during(DURING)?).unwrap_or(u32::MAX),
                reason: text(row, 10).during(DURING)?.unwrap_or_default().to_owned(),
                at: time(row, 11).during(DURING)?.unwrap_or(SystemTime::UNIX_EPOCH),
            };
            found.push(standing(row, 1, place).during(DURING)?);
        }
        let mut complete = true;
        for statement in [&sql.scheduled_bounded, &sql.processed_count] {
            let counted = session.row(statement.query().bind(bound)).await?;
            complete &= number(&counted, 0).during(DURING)? < bound;
        }
        Ok(complete)
    }
}

/// What is told of the message that begins at a column.
fn standing(row: &PgRow, first: usize, place: Place) -> sqlx::Result<Standing> {
    let (parts, _) = Rows::default().parts(row, first)?;
    Ok(Standing::of(
        &Message::from_stored(parts),
        optional_number(row, first + 7)?,
        place,
    ))
}
