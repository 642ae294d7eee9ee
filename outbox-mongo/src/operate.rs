//! What operators do: dead letters, parked holds, scheduled delivery, the archive.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures::TryStreamExt;
use mongodb::ClientSession;
use mongodb::bson::{Bson, Document, doc};
use outbox_core::{
    DeadLetter, DeadLetterQuery, DeadLetters, Death, Hold, HoldRef, Message, Ordering, OwnedShard, Parking,
    Promotion, RecordRef, RelayId, Result, Retention, Scheduled, Shard, millis,
};

use crate::commands::{Raw, by_death, dead, dead_ones, died, later, one, parked, shards, with_now};
use crate::enqueue::{draw, insert};
use crate::hold::{now, read_hold};
use crate::row::{Row, Rows, again, span, time, timestamp, uuid};
use crate::session::{Told, Transaction};
use crate::store::MongoStore;

/// How many documents one transaction of an operator's moves, so that none takes long.
const CHUNK: usize = 1_000;

#[async_trait]
impl DeadLetters for MongoStore {
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>> {
        const DURING: &str = "list dead letters";
        let Some(limit) = limit(query.limit) else {
            return Ok(Vec::new());
        };
        let mut filter = dead_ones();
        if let Some(topic) = &query.topic {
            filter.insert("topic", topic.as_ref());
        }
        if let Some(ids) = &query.ids {
            let ids: Vec<Bson> = ids.iter().map(|id| Bson::Binary(uuid(*id))).collect();
            filter.insert("id", doc! { "$in": ids });
        }
        if let Some(after) = query.after {
            let ts = timestamp(after.position);
            // The first bounds the index.
            filter.insert("dead.ts", doc! { "$gte": ts });
            let behind = [
                doc! { "dead.ts": { "$gt": ts } },
                doc! { "id": { "$gt": uuid(after.id) } },
            ];
            filter.insert("$or", behind.to_vec());
        }
        let outbox = self.sessions.collections.outbox::<Raw>();
        let read = async {
            let cursor = outbox.find(filter).sort(by_death()).limit(limit).await?;
            cursor.try_collect::<Vec<Raw>>().await
        };
        let mut rows = Rows::new(self.config.shards);
        let letters = self.sessions.call(DURING, read).await?;
        Ok(letters.iter().map(|raw| dead_letter(&mut rows, raw)).collect())
    }

    /// A message that is numbered gets a new number; its old one stays a hole.
    async fn requeue(&self, records: &[RecordRef]) -> Result<usize> {
        let mut moved = 0;
        for chunk in records.chunks(CHUNK) {
            let tried = |session| self.try_requeue(session, chunk);
            moved += self.transactions.run("requeue", tried).await?;
        }
        Ok(moved)
    }

    async fn discard(&self, records: &[RecordRef]) -> Result<usize> {
        let outbox = self.sessions.collections.outbox::<Raw>();
        let mut gone = 0;
        for chunk in records.chunks(CHUNK) {
            let discarded = async { outbox.delete_many(dead(chunk)).await };
            let discarded = self.sessions.call("discard", discarded).await?;
            gone += usize::try_from(discarded.deleted_count).unwrap_or(usize::MAX);
        }
        Ok(gone)
    }
}

/// So many bytes of scheduled messages one transaction moves.
const MOST_BYTES: usize = 8 << 20;

/// A limit as the server takes it, for which 0 is none.
fn limit(most: usize) -> Option<i64> {
    (most > 0).then(|| i64::try_from(most).unwrap_or(i64::MAX))
}

/// What is told of a death.
pub(crate) struct Died {
    pub(crate) attempts: u32,
    pub(crate) reason: String,
    pub(crate) at: SystemTime,
}

impl Died {
    pub(crate) fn read(raw: &Raw) -> Self {
        let dead = raw
            .get_document("dead")
            .ok()
            .and_then(|dead| dead.to_raw_document_buf().to_document().ok())
            .unwrap_or_default();
        Self {
            attempts: u32::try_from(dead.get_i64("attempts").unwrap_or_default()).unwrap_or(u32::MAX),
            reason: dead.get_str("reason").unwrap_or_default().to_owned(),
            at: dead
                .get_datetime("at")
                .ok()
                .and_then(|at| time(*at))
                .unwrap_or(SystemTime::UNIX_EPOCH),
        }
    }
}

fn dead_letter(rows: &mut Rows, raw: &Raw) -> DeadLetter {
    let row = rows.read(raw);
    let Died { attempts, reason, at } = Died::read(raw);
    DeadLetter {
        record: row.reference(),
        key_seq: row.seq,
        message: Message::from_stored(row.parts),
        attempts,
        reason,
        died_at: at,
    }
}

impl MongoStore {
    /// What is dead is deleted and stored anew, because only so the server gives it a new position.
    async fn try_requeue(&self, mut session: Transaction, records: &[RecordRef]) -> Told<usize> {
        let collections = &self.sessions.collections;
        let outbox = collections.outbox::<Raw>();
        let mut cursor = outbox
            .find(dead(records))
            .sort(by_death())
            .session(&mut *session)
            .await?;
        let letters: Vec<Raw> = cursor.stream(&mut session).try_collect().await?;
        if letters.is_empty() {
            session.abort().await?;
            return Ok(0);
        }
        outbox.delete_many(dead(records)).session(&mut *session).await?;
        self.put_back(&mut session, &letters).await?;
        session.commit().await?;
        Ok(letters.len())
    }

    /// Puts documents into the outbox that were stored before, as they are, with new positions.
    async fn put_back(&self, session: &mut ClientSession, stored: &[Raw]) -> Told<()> {
        let collections = &self.sessions.collections;
        let mut reading = Rows::new(self.config.shards);
        let rows: Vec<Row> = stored.iter().map(|raw| reading.read(raw)).collect();
        let messages: Vec<Message> = rows
            .iter()
            .map(|row| Message::from_stored(row.parts.clone()))
            .collect();
        let mut numbers = match self.config.ordering {
            Ordering::Insert => Default::default(),
            Ordering::Sequenced => draw(collections, session, messages.iter()).await?,
        };
        let documents = stored
            .iter()
            .zip(&rows)
            .zip(&messages)
            .map(|((raw, row), message)| again(raw, row, self.config.shards, numbers.next(message)))
            .collect();
        // What came past the validator comes past it again, and may die again: it must not keep the others.
        insert(collections, session, documents, true).await
    }

    async fn try_bury(&self, mut session: Transaction, hold: &HoldRef) -> Told<bool> {
        let collections = &self.sessions.collections;
        let found = collections
            .holds()
            .find_one_and_delete(parked(hold))
            .session(&mut *session)
            .await?;
        let Some(found) = found else {
            session.abort().await?;
            return Ok(false);
        };
        let Hold { attempts, reason, .. } = read_hold(&found);
        let death = Death {
            record: hold.head,
            attempts,
            reason,
        };
        collections
            .outbox::<Raw>()
            .update_one(one(hold.shard, hold.head), died(&death))
            .session(&mut *session)
            .await?;
        session.commit().await?;
        Ok(true)
    }

    /// Promotes what is due; none where a lease is not held any more.
    async fn try_promote(
        &self,
        mut session: Transaction,
        relay: &RelayId,
        owned: &[OwnedShard],
        most: i64,
    ) -> Told<Option<usize>> {
        let collections = &self.sessions.collections;
        if !self.fence(&mut session, relay, owned).await? {
            session.abort().await?;
            return Ok(None);
        }
        let scheduled = collections.scheduled::<Raw>();
        let due = doc! {
            "shard": { "$in": shards(owned.iter().map(|owned| owned.shard)) },
            "$expr": { "$lte": ["$due", "$$NOW"] },
        };
        let mut cursor = scheduled
            .find(due)
            .sort(doc! { "due": 1, "_id": 1 })
            .limit(most)
            .session(&mut *session)
            .await?;
        // So many bytes at once: the leases are locked meanwhile.
        let (mut due, mut bytes) = (Vec::new(), 0);
        while bytes < MOST_BYTES && cursor.advance(&mut session).await? {
            let raw = cursor.current().to_raw_document_buf();
            bytes += raw.as_bytes().len();
            due.push(raw);
        }
        drop(cursor);
        let names: Vec<Bson> = due
            .iter()
            .filter_map(|raw| raw.get("_id").ok().flatten())
            .filter_map(|name| name.try_into().ok())
            .collect();
        scheduled
            .delete_many(doc! { "_id": { "$in": names } })
            .session(&mut *session)
            .await?;
        self.put_back(&mut session, &due).await?;
        session.commit().await?;
        Ok(Some(due.len()))
    }

    /// When the next of these shards is due.
    async fn next_due(&self, owned: &[OwnedShard]) -> Result<Option<Duration>> {
        let scheduled = self.sessions.collections.scheduled::<Raw>();
        let pipeline = vec![
            doc! { "$match": { "shard": { "$in": shards(owned.iter().map(|owned| owned.shard)) } } },
            doc! { "$sort": { "due": 1 } },
            doc! { "$limit": 1 },
            doc! { "$project": { "due": 1 } },
            with_now(),
        ];
        let next = self.sessions.aggregate(PROMOTE, &scheduled, pipeline).await?;
        Ok(next.first().map(|document| {
            let due = document.get_datetime("due").copied();
            span(now(document), due.unwrap_or_else(|_| now(document)))
        }))
    }
}

#[async_trait]
impl Parking for MongoStore {
    async fn parked(&self, most: usize) -> Result<Vec<Hold>> {
        let Some(limit) = limit(most) else {
            return Ok(Vec::new());
        };
        let holds = self.sessions.collections.holds();
        let pipeline = vec![
            doc! { "$match": { "parked": true, "over": { "$exists": false } } },
            doc! { "$sort": { "head": 1, "_id": 1 } },
            doc! { "$limit": limit },
            with_now(),
        ];
        let parked = self.sessions.aggregate("list parked", &holds, pipeline).await?;
        Ok(parked.iter().map(read_hold).collect())
    }

    async fn resume(&self, hold: &HoldRef) -> Result<bool> {
        let holds = self.sessions.collections.holds();
        let again = doc! { "$set": { "parked": false, "attempts": 0_i64, "due": "$$NOW" } };
        let resumed = async { holds.update_one(parked(hold), vec![again]).await };
        Ok(self.sessions.call("resume", resumed).await?.matched_count > 0)
    }

    async fn bury(&self, hold: &HoldRef) -> Result<bool> {
        hold.check_buriable()?;
        let tried = |session| self.try_bury(session, hold);
        self.transactions.run("bury", tried).await
    }
}

const PROMOTE: &str = "promote";

#[async_trait]
impl Scheduled for MongoStore {
    async fn promote(&self, relay: &RelayId, owned: &[OwnedShard], most: usize) -> Result<Promotion> {
        let leases = self.held_of(PROMOTE, relay, owned).await?;
        let lost: Vec<Shard> = owned
            .iter()
            .filter(|owned| !leases.contains(owned))
            .map(|owned| owned.shard)
            .collect();
        if leases.is_empty() {
            return Ok(Promotion {
                lost,
                ..Promotion::default()
            });
        }
        // Most often nothing is due, and that is asked without locking a thing.
        let mut next_in = self.next_due(&leases).await?;
        let mut promoted = 0;
        if let (Some(Duration::ZERO), Some(most)) = (next_in, limit(most.min(CHUNK))) {
            let tried = |session| self.try_promote(session, relay, &leases, most);
            // Where a lease was lost meanwhile the next call tells.
            promoted = self.transactions.run(PROMOTE, tried).await?.unwrap_or_default();
            next_in = self.next_due(&leases).await?;
        }
        Ok(Promotion {
            promoted,
            next_in,
            lost,
        })
    }
}

#[async_trait]
impl Retention for MongoStore {
    async fn purge(&self, age: Duration, most: usize) -> Result<usize> {
        const DURING: &str = "purge";
        let age = millis(age.min(Duration::from_secs(100 * 366 * 24 * 60 * 60)));
        let outbox = self.sessions.collections.outbox::<Document>();
        let mut purged = 0;
        while purged < most {
            let chunk = (most - purged).min(CHUNK);
            let old = doc! {
                "processed.at": { "$exists": true },
                "$expr": { "$lt": ["$processed.at", later(-age)] },
            };
            let read = async {
                let cursor = outbox
                    .find(old)
                    .sort(doc! { "processed.at": 1 })
                    .limit(i64::try_from(chunk).unwrap_or(i64::MAX))
                    .projection(doc! { "_id": 1 })
                    .await?;
                cursor.try_collect::<Vec<Document>>().await
            };
            let old = self.sessions.call(DURING, read).await?;
            let names: Vec<&Bson> = old.iter().filter_map(|row| row.get("_id")).collect();
            if names.is_empty() {
                break;
            }
            let deleted = async { outbox.delete_many(doc! { "_id": { "$in": &names } }).await };
            let deleted = self.sessions.call(DURING, deleted).await?.deleted_count;
            purged += usize::try_from(deleted).unwrap_or(usize::MAX);
            if names.len() < chunk {
                break;
            }
        }
        Ok(purged)
    }
}
