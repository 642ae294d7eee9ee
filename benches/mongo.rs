//! What a run does on MongoDB, or on a server of its protocol, that it does nowhere else.

use std::ops::Range;

use futures::TryStreamExt;
use outbox::mongo::mongodb::bson::spec::BinarySubtype;
use outbox::mongo::mongodb::bson::{Binary, DateTime, Document, Timestamp, doc};
use outbox::mongo::mongodb::options::WriteConcern;
use outbox::mongo::mongodb::{Client, ClientSession, Collection, Database};
use outbox::{MessageId, shard_of};

use crate::ledger::Flow;
use crate::place::Spec;
use crate::queue::{QUEUE, Queue, Waiting};
use crate::results::{Mongo, Outcome};

/// So many documents are in one insert.
const TOGETHER: usize = 10_000;

/// What the server says of itself.
pub(crate) async fn describe(client: &Client) -> Outcome<Mongo> {
    let built = client
        .database("admin")
        .run_command(doc! { "buildInfo": 1 })
        .await?;
    Ok(Mongo {
        version: built.get_str("version").unwrap_or_default().to_owned(),
        // A server of the protocol says so in a field of its own.
        product: built
            .keys()
            .find(|name| name.to_lowercase().contains("secantus"))
            .map_or_else(|| "MongoDB".to_owned(), |_| "SecantusDB".to_owned()),
    })
}

fn binary(subtype: BinarySubtype, bytes: Vec<u8>) -> Binary {
    Binary { subtype, bytes }
}

/// A message as a producer writes it who has no library.
pub(crate) fn document(table: &str, topic: &str, flow: Flow, number: u64) -> Document {
    let (id, key) = (MessageId::new(), flow.key(number).to_string());
    let payload = binary(BinarySubtype::Generic, flow.payload(number));
    let name = binary(BinarySubtype::Uuid, id.as_bytes().to_vec());
    if table == QUEUE {
        let key = binary(BinarySubtype::Generic, key.into_bytes());
        return doc! {
            "id": name, "topic": topic, "key": key, "payload": payload, "claimed_at": null, "processed_at": null,
        };
    }
    doc! {
        "shard": i32::from(shard_of(Some(key.as_bytes()), id, 64).0),
        "flow": format!("{topic}/={key}"),
        "id": name,
        "topic": topic,
        "payload": payload,
        "ts": Timestamp { time: 0, increment: 0 },
    }
}

/// Enqueues messages in order.
pub(crate) async fn fill(
    database: &Database,
    table: &str,
    topic: &str,
    flow: Flow,
    numbers: Range<u64>,
) -> Outcome<()> {
    let collection = database.collection::<Document>(table);
    let all: Vec<u64> = numbers.collect();
    for part in all.chunks(TOGETHER) {
        let documents = part.iter().map(|number| document(table, topic, flow, *number));
        collection.insert_many(documents).await?;
    }
    Ok(())
}

/// How many are left that were not settled.
pub(crate) async fn left(database: &Database, table: &str) -> Outcome<u64> {
    let waits = match table {
        QUEUE => doc! { "processed_at": null },
        _ => doc! { "shard": { "$gte": 0 } },
    };
    Ok(database
        .collection::<Document>(table)
        .count_documents(waits)
        .await?)
}

/// Makes the baselines' collection, with the one index that claims need.
pub(crate) async fn make_queue(database: &Database) -> Outcome<()> {
    let index = doc! { "name": "waiting", "key": { "processed_at": 1, "_id": 1 } };
    database
        .run_command(doc! { "createIndexes": QUEUE, "indexes": [index] })
        .await?;
    Ok(())
}

/// What is open: a database, and the transaction in it.
pub(crate) struct Link {
    pub(crate) database: Database,
    session: Option<ClientSession>,
}

impl Link {
    pub(crate) const fn new(database: Database) -> Self {
        Self {
            database,
            session: None,
        }
    }

    pub(crate) async fn begin(&mut self) -> Outcome<()> {
        let mut session = self.database.client().start_session().await?;
        session.start_transaction().await?;
        self.session = Some(session);
        Ok(())
    }

    /// What is committed now is seen from now on.
    pub(crate) async fn look(&mut self) -> Outcome<()> {
        self.begin().await?;
        if let Some(session) = &mut self.session {
            let outbox = self.database.collection::<Document>("outbox");
            outbox.find_one(doc! {}).session(session).await?;
        }
        Ok(())
    }

    pub(crate) async fn insert(&mut self, table: &str, document: Document) -> Outcome<()> {
        let collection = self.database.collection::<Document>(table);
        match &mut self.session {
            Some(session) => collection.insert_one(document).session(session).await?,
            None => {
                let insert = collection.insert_one(document);
                insert.write_concern(WriteConcern::majority()).await?
            }
        };
        Ok(())
    }

    pub(crate) async fn commit(&mut self) -> Outcome<()> {
        if let Some(mut session) = self.session.take() {
            session.commit_transaction().await?;
        }
        Ok(())
    }
}

/// MongoDB locks nothing for a reader: a claim is a note, and who holds a transaction open instead reads in it.
pub(crate) struct MongoQueue {
    queue: Collection<Document>,
    session: Option<ClientSession>,
}

impl MongoQueue {
    async fn read(&self, filter: Document, rows: i64) -> Outcome<Vec<Document>> {
        let found = self
            .queue
            .find(filter)
            .sort(doc! { "_id": 1 })
            .limit(rows)
            .await?;
        Ok(found.try_collect().await?)
    }

    /// Notes the time in a field of all of these rows.
    async fn note(&mut self, field: &str, rows: &[Document]) -> Outcome<()> {
        let names: Vec<_> = rows.iter().filter_map(|row| row.get("_id")).collect();
        let noted = doc! { "$set": { field: DateTime::now() } };
        let update = self.queue.update_many(doc! { "_id": { "$in": names } }, noted);
        match &mut self.session {
            Some(session) => update.session(session).await?,
            None => update.write_concern(WriteConcern::majority()).await?,
        };
        Ok(())
    }
}

impl Queue for MongoQueue {
    type Row = Document;

    async fn open(spec: &Spec) -> Outcome<Self> {
        let Spec::Mongo { url, database } = spec else {
            return Err("this needs MongoDB".into());
        };
        let client = Client::with_uri_str(url).await?;
        Ok(Self {
            queue: client.database(database).collection(QUEUE),
            session: None,
        })
    }

    async fn claim(&mut self, rows: i64) -> Outcome<Vec<Document>> {
        let long_ago = DateTime::from_millis(DateTime::now().timestamp_millis() - 60_000);
        let free = doc! { "processed_at": null, "$or": [{ "claimed_at": null }, { "claimed_at": { "$lt": long_ago } }] };
        let batch = self.read(free, rows).await?;
        if !batch.is_empty() {
            self.note("claimed_at", &batch).await?;
        }
        Ok(batch)
    }

    async fn lock(&mut self, rows: i64) -> Outcome<Vec<Document>> {
        let mut session = self.queue.client().start_session().await?;
        session.start_transaction().await?;
        let mut found = self
            .queue
            .find(doc! { "processed_at": null })
            .sort(doc! { "_id": 1 })
            .limit(rows)
            .session(&mut session)
            .await?;
        let batch = found.stream(&mut session).try_collect().await?;
        self.session = Some(session);
        Ok(batch)
    }

    async fn mark(&mut self, rows: &[Document]) -> Outcome<()> {
        self.note("processed_at", rows).await
    }

    async fn commit(&mut self) -> Outcome<()> {
        if let Some(mut session) = self.session.take() {
            session.commit_transaction().await?;
        }
        Ok(())
    }

    fn waiting(row: &Document) -> Outcome<Waiting<'_>> {
        let bytes = |field: &str| match row.get(field) {
            Some(outbox::mongo::mongodb::bson::Bson::Binary(binary)) => Ok(binary.bytes.as_slice()),
            _ => Err(format!("{field} is missing")),
        };
        let id = MessageId::from_bytes(bytes("id")?.try_into()?);
        Ok(Waiting {
            message_id: id.to_string().into(),
            topic: row.get_str("topic")?,
            key: bytes("key")?,
            payload: bytes("payload")?,
        })
    }
}
