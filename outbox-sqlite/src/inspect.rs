//! Where something stands: what people ask. Read outside of the relay's connection, in one snapshot.

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use outbox_core::{
    Count, Facts, Inspection, MAX_PLACES, Message, MessageId, Ordering, Place, Position, Result, Standing,
    Subject,
};
use rusqlite::{OptionalExtension, Row, Transaction, params};

use crate::error::During;
use crate::hold::list_holds;
use crate::operate::bound as limit;
use crate::row::{Rows, SHARD, time};
use crate::sql::Sql;
use crate::store::{SqliteStore, load_leases};

#[async_trait]
impl Inspection for SqliteStore {
    async fn inspect(&self, subject: &Subject, bound: usize) -> Result<Facts> {
        const DURING: &str = "inspect";
        let (sql, subject) = (Arc::clone(&self.sql), subject.clone());
        let sequenced = self.config.ordering == Ordering::Sequenced;
        self.operator
            .run(DURING, move |connection, _| {
                connection
                    .transaction()
                    .and_then(|transaction| {
                        let look = Look {
                            transaction: &transaction,
                            sql: &sql,
                            bound: limit(bound),
                            sequenced,
                        };
                        look.at(&subject)
                    })
                    .during(DURING)
            })
            .await
    }
}

/// One question in one snapshot.
struct Look<'a> {
    transaction: &'a Transaction<'a>,
    sql: &'a Sql,
    bound: i64,
    sequenced: bool,
}

impl Look<'_> {
    fn at(&self, subject: &Subject) -> rusqlite::Result<Facts> {
        let (leases, now) = load_leases(self.transaction, self.sql)?;
        let (backlog, mut complete, mut found) = self.in_outbox(subject)?;
        if let Subject::Message(id) = subject {
            let (scheduled, all_scheduled) = self.scheduled(*id)?;
            let (processed, all_processed) = self.processed(*id)?;
            found.extend(scheduled.into_iter().chain(processed).chain(self.dead(*id)?));
            complete &= all_scheduled && all_processed;
        }
        let mut holds = list_holds(self.transaction, &self.sql.holds, params![])?;
        holds.retain(|hold| subject.is_stopped_by(hold, &found));
        let last_seq = match subject {
            Subject::Key(key) if self.sequenced => self
                .transaction
                .prepare_cached(&self.sql.last_number)?
                .query_row(params![&*key.topic, &key.key[..]], |row| row.get(0))
                .optional()?,
            _ => None,
        };
        Ok(Facts {
            now: time(now).unwrap_or(SystemTime::UNIX_EPOCH),
            found,
            backlog,
            holds,
            last_seq,
            leases: leases.status(now),
            relays: leases.relays(now),
            complete,
        })
    }

    /// Searches the outbox: no index but the position's is worth its price to producers.
    fn in_outbox(&self, subject: &Subject) -> rusqlite::Result<(Count, bool, Vec<Standing>)> {
        let (id, topic, key) = match subject {
            Subject::Message(id) => (Some(id.as_bytes()), None, None),
            Subject::Key(key) => (None, Some(&*key.topic), Some(&key.key[..])),
            Subject::Topic(topic) => (None, Some(&**topic), None),
        };
        let mut statement = self.transaction.prepare_cached(&self.sql.search)?;
        let mut rows = statement.query(params![self.bound, id, topic, key])?;
        let (mut seen, mut matching, mut found) = (0, 0, Vec::new());
        while let Some(row) = rows.next()? {
            if row.get(1)? {
                matching += 1;
                if found.len() < subject.places() {
                    found.push(self.standing_at(row.get(0)?, seen)?);
                }
            }
            seen += 1;
        }
        let complete = seen < self.bound.unsigned_abs();
        Ok((Count::found(matching, complete), complete, found))
    }

    /// The message at a position, before which `ahead` others stand.
    fn standing_at(&self, position: i64, ahead: u64) -> rusqlite::Result<Standing> {
        let place = Place::Outbox {
            shard: SHARD,
            position: Position(position),
            ahead: Count::Exact(ahead),
        };
        self.transaction
            .prepare_cached(&self.sql.by_position)?
            .query_row([position], |row| self.standing(row, place))
    }

    fn scheduled(&self, id: MessageId) -> rusqlite::Result<(Vec<Standing>, bool)> {
        let found = self.list(&self.sql.scheduled_by_id, id, |row| {
            let due = time(row.get(0)?).unwrap_or(SystemTime::UNIX_EPOCH);
            self.standing(row, Place::Scheduled { shard: SHARD, due })
        })?;
        Ok((found, self.fewer(&self.sql.scheduled_bounded)?))
    }

    fn processed(&self, id: MessageId) -> rusqlite::Result<(Vec<Standing>, bool)> {
        let found = self.list(&self.sql.processed_by_id, id, |row| {
            let place = Place::Processed {
                position: Position(row.get(0)?),
                at: time(row.get(9)?).unwrap_or(SystemTime::UNIX_EPOCH),
            };
            self.standing(row, place)
        })?;
        Ok((found, self.fewer(&self.sql.processed_count)?))
    }

    /// Dead letters have an index on their ids.
    fn dead(&self, id: MessageId) -> rusqlite::Result<Vec<Standing>> {
        self.list(&self.sql.dead_by_id, id, |row| {
            let place = Place::Dead {
                position: Position(row.get(0)?),
                attempts: row.get(9)?,
                reason: row.get(10)?,
                at: time(row.get(11)?).unwrap_or(SystemTime::UNIX_EPOCH),
            };
            self.standing(row, place)
        })
    }

    fn list(
        &self,
        statement: &str,
        id: MessageId,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<Standing>,
    ) -> rusqlite::Result<Vec<Standing>> {
        self.transaction
            .prepare_cached(statement)?
            .query_map(params![id.as_bytes(), self.bound, limit(MAX_PLACES)], read)?
            .collect()
    }

    /// Whether a table has fewer rows than the bound.
    fn fewer(&self, count: &str) -> rusqlite::Result<bool> {
        let count: i64 = self
            .transaction
            .prepare_cached(count)?
            .query_row([self.bound], |row| row.get(0))?;
        Ok(count < self.bound)
    }

    /// What is told of the message in a row of `position, message, key_seq, …`.
    fn standing(&self, row: &Row<'_>, place: Place) -> rusqlite::Result<Standing> {
        let mut rows = Rows::new(self.sequenced);
        let (parts, _) = rows.parts(row, 1)?;
        Ok(Standing::of(
            &Message::from_stored(parts),
            rows.key_seq(row, 8),
            place,
        ))
    }
}
