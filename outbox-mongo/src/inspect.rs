//! Where something stands: what people ask. Read in one snapshot.

use std::time::SystemTime;

use async_trait::async_trait;
use futures::TryStreamExt;
use mongodb::bson::{Bson, Document, doc};
use mongodb::{ClientSession, Collection};
use outbox_core::{
    Count, Facts, Inspection, MAX_PLACES, Message, MessageId, Ordering, Place, Result, Shard, Standing,
    Subject,
};

use crate::commands::{Raw, by_death, counter, dead_ones, every_shard, shards, with_now};
use crate::hold::{now, read_hold};
use crate::operate::Died;
use crate::row::{Row, Rows, flow, flows_of, time, timestamp, uuid};
use crate::session::{Told, confirm};
use crate::store::MongoStore;

const DURING: &str = "inspect";

#[async_trait]
impl Inspection for MongoStore {
    async fn inspect(&self, subject: &Subject, bound: usize) -> Result<Facts> {
        let bound = i64::try_from(bound.max(1)).unwrap_or(i64::MAX);
        let mut facts = self.sessions.call(DURING, self.look(subject, bound)).await?;
        (facts.leases, facts.relays) = self.owners(DURING).await?;
        Ok(facts)
    }
}

impl MongoStore {
    async fn look(&self, subject: &Subject, bound: i64) -> Told<Facts> {
        let collections = &self.sessions.collections;
        let mut session = self.sessions.snapshot(None).await?;
        let (backlog, mut complete, mut found) = match subject {
            Subject::Message(id) => self.waiting_with_id(&mut session, *id, bound).await?,
            Subject::Key(key) => {
                let own = shards(subject.shard(self.config.shards).into_iter());
                let flow = flow(&key.topic, Some(&key.key), MessageId::from_bytes([0; 16]));
                let filter = doc! { "shard": { "$in": own }, "flow": flow };
                self.first_waiting(&mut session, filter, bound).await?
            }
            Subject::Topic(topic) => {
                let (first, behind) = flows_of(topic);
                let filter = doc! {
                    "shard": { "$in": every_shard(self.config.shards) },
                    "flow": { "$gte": first, "$lt": behind },
                };
                self.first_waiting(&mut session, filter, bound).await?
            }
        };
        if let Subject::Message(id) = subject {
            complete &= self.elsewhere(&mut session, *id, bound, &mut found).await?;
        }
        let all = doc! { "$match": { "over": { "$exists": false } } };
        let holds = aggregate(&collections.holds(), &mut session, vec![all, with_now()]).await?;
        let mut holds: Vec<_> = holds.iter().map(read_hold).collect();
        holds.retain(|hold| subject.is_stopped_by(hold, &found));
        let last_seq = match subject {
            Subject::Key(key) if self.config.ordering == Ordering::Sequenced => {
                let name = doc! { "_id": counter(&key.topic, &key.key) };
                let told = collections
                    .sequence()
                    .find_one(name)
                    .session(&mut session)
                    .await?;
                told.and_then(|told| told.get_i64("last").ok())
            }
            _ => None,
        };
        let told = aggregate(&collections.meta(), &mut session, vec![with_now()]).await?;
        confirm(&mut session).await?;
        let clock = told.first().map(now).and_then(time);
        Ok(Facts {
            now: clock.unwrap_or(SystemTime::UNIX_EPOCH),
            found,
            backlog,
            holds,
            last_seq,
            leases: Vec::new(),
            relays: Vec::new(),
            complete,
        })
    }

    /// Of a key or a topic: how many wait, and the first of them.
    async fn first_waiting(
        &self,
        session: &mut ClientSession,
        filter: Document,
        bound: i64,
    ) -> Told<(Count, bool, Vec<Standing>)> {
        let outbox = self.sessions.collections.outbox::<Raw>();
        let matching = count(&outbox, session, filter.clone(), bound).await?;
        let pipeline = vec![
            doc! { "$match": filter },
            doc! { "$limit": bound },
            doc! { "$sort": { "ts": 1 } },
            doc! { "$limit": 1 },
            without_payload(),
        ];
        let rows = aggregate(&outbox, session, pipeline).await?;
        let found = self.in_line(session, rows, bound).await?;
        let complete = matching < bound;
        Ok((Count::found(matching.unsigned_abs(), complete), complete, found))
    }

    /// Searches what waits for an id, oldest first: no index but those of reading and settling is worth its price to
    /// producers.
    async fn waiting_with_id(
        &self,
        session: &mut ClientSession,
        id: MessageId,
        bound: i64,
    ) -> Told<(Count, bool, Vec<Standing>)> {
        let outbox = self.sessions.collections.outbox::<Raw>();
        let all = doc! { "shard": { "$in": every_shard(self.config.shards) } };
        let seen = count(&outbox, session, all.clone(), bound).await?;
        let pipeline = vec![
            doc! { "$match": all },
            doc! { "$sort": { "ts": 1 } },
            doc! { "$limit": bound },
            doc! { "$match": { "id": uuid(id) } },
            without_payload(),
        ];
        let mut rows = aggregate(&outbox, session, pipeline).await?;
        let (matching, complete) = (rows.len(), seen < bound);
        rows.truncate(MAX_PLACES);
        let found = self.in_line(session, rows, bound).await?;
        let matching = u64::try_from(matching).unwrap_or(u64::MAX);
        Ok((Count::found(matching, complete), complete, found))
    }

    /// Messages that wait, with how many of their shards wait before each.
    async fn in_line(&self, session: &mut ClientSession, rows: Vec<Raw>, bound: i64) -> Told<Vec<Standing>> {
        let outbox = self.sessions.collections.outbox::<Raw>();
        let (mut reading, mut found) = (Rows::new(self.config.shards), Vec::new());
        for raw in &rows {
            let row = reading.read(raw);
            let shard = row.shard.unwrap_or(Shard(0));
            let before = doc! { "shard": i32::from(shard.0), "ts": { "$lt": timestamp(row.position) } };
            let ahead = count(&outbox, session, before, bound).await?.unsigned_abs();
            let place = Place::Outbox {
                shard,
                position: row.position,
                ahead: Count::up_to(bound.unsigned_abs(), ahead),
            };
            found.push(standing(row, place));
        }
        Ok(found)
    }

    /// Searches the rest for an id; says whether all was looked at.
    async fn elsewhere(
        &self,
        session: &mut ClientSession,
        id: MessageId,
        bound: i64,
        found: &mut Vec<Standing>,
    ) -> Told<bool> {
        let outbox = self.sessions.collections.outbox::<Raw>();
        let scheduled = self.sessions.collections.scheduled::<Raw>();
        let archived = doc! { "processed.at": { "$exists": true } };
        let mut reading = Rows::new(self.config.shards);
        let most = i64::try_from(MAX_PLACES).unwrap_or(i64::MAX);
        let mut complete = true;
        for (collection, filter, sort) in [
            (&scheduled, doc! {}, doc! { "shard": 1, "due": 1, "_id": 1 }),
            (&outbox, archived, doc! { "processed.at": -1 }),
            (&outbox, dead_ones(), by_death()),
        ] {
            complete &= count(collection, session, filter.clone(), bound).await? < bound;
            let pipeline = vec![
                doc! { "$match": filter },
                doc! { "$sort": sort },
                doc! { "$limit": bound },
                doc! { "$match": { "id": uuid(id) } },
                doc! { "$limit": most },
                without_payload(),
            ];
            for raw in aggregate(collection, session, pipeline).await? {
                let row = reading.read(&raw);
                let place = place(&row, &raw);
                found.push(standing(row, place));
            }
        }
        Ok(complete)
    }
}

/// Where something stands that does not wait in the outbox.
fn place(row: &Row, raw: &Raw) -> Place {
    let at = |document: &str, field: &str| {
        let document = raw.get_document(document).ok()?;
        document.get_datetime(field).ok().and_then(time)
    };
    if let Ok(due) = raw.get_datetime("due") {
        return Place::Scheduled {
            shard: row.shard.unwrap_or(Shard(0)),
            due: time(due).unwrap_or(SystemTime::UNIX_EPOCH),
        };
    }
    if let Some(at) = at("processed", "at") {
        return Place::Processed {
            position: row.position,
            at,
        };
    }
    let Died { attempts, reason, at } = Died::read(raw);
    Place::Dead {
        position: row.position,
        attempts,
        reason,
        at,
    }
}

fn standing(row: Row, place: Place) -> Standing {
    Standing::of(&Message::from_stored(row.parts), row.seq, place)
}

/// What nobody needs in order to know why something waits.
fn without_payload() -> Document {
    doc! { "$project": { "payload": 0, "headers": 0 } }
}

async fn aggregate<T: serde::de::DeserializeOwned + Send + Sync + Unpin>(
    collection: &Collection<T>,
    session: &mut ClientSession,
    pipeline: Vec<Document>,
) -> Told<Vec<T>> {
    let mut cursor = collection
        .aggregate(pipeline)
        .session(&mut *session)
        .with_type::<T>()
        .await?;
    cursor.stream(session).try_collect().await
}

/// How many there are, up to a bound.
async fn count(
    collection: &Collection<Raw>,
    session: &mut ClientSession,
    filter: Document,
    bound: i64,
) -> Told<i64> {
    let pipeline = vec![
        doc! { "$match": filter },
        doc! { "$limit": bound },
        doc! { "$count": "rows" },
    ];
    let mut cursor = collection.aggregate(pipeline).session(&mut *session).await?;
    let told: Vec<Document> = cursor.stream(session).try_collect().await?;
    Ok(told.first().map_or(0, |counted| match counted.get("rows") {
        Some(Bson::Int32(rows)) => i64::from(*rows),
        Some(Bson::Int64(rows)) => *rows,
        _ => 0,
    }))
}
