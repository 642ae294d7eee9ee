//! Enqueueing, in the producer's own transaction.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::TryStreamExt;
use mongodb::ClientSession;
use mongodb::bson::{DateTime, Document, doc};
use outbox_core::{Enqueue, Error, Limits, Message, Ordering, Result};
use tokio::sync::OnceCell;

use crate::commands::{Collections, counter};
use crate::config::MongoConfig;
use crate::error::During;
use crate::row::{scheduled, time, waiting};
use crate::schema::check;
use crate::session::{Sessions, Told, in_transaction, write};

/// The producer's handle: cheap to clone, holds no connection.
///
/// It writes in the caller's own transaction, which the driver may run again as a whole. The outbox is in the database that
/// the configuration's `url` names, on the server of the session's client.
///
/// ```no_run
/// use outbox_core::Message;
/// use outbox_mongo::mongodb::bson::doc;
/// use outbox_mongo::mongodb::{Client, bson::Document};
/// use outbox_mongo::{MongoConfig, MongoOutbox};
///
/// # async fn example(client: Client) -> Result<(), Box<dyn std::error::Error>> {
/// let outbox = MongoOutbox::new(&MongoConfig::new("mongodb://db.example/shop"))?;
///
/// let mut session = client.start_session().await?;
/// session.start_transaction().await?;
/// let orders = client.database("shop").collection::<Document>("orders");
/// orders.insert_one(doc! { "_id": 42, "total": 12 }).session(&mut session).await?;
/// outbox.enqueue(&mut session, &Message::builder("orders").key("42").payload("placed").build()?).await?;
/// session.commit_transaction().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct MongoOutbox {
    config: Arc<MongoConfig>,
    database: String,
    limits: Limits,
    ordering: Ordering,
    /// How many shards the outbox has: asked for once.
    shards: Arc<OnceCell<u16>>,
}

const DURING: &str = "enqueue";

impl MongoOutbox {
    /// A handle to the outbox that `config` names; of its `url` only the database is used, nothing is opened.
    ///
    /// # Errors
    /// [`Invalid`](outbox_core::ErrorKind::Invalid) for a configuration that makes no sense.
    pub fn new(config: &MongoConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            database: config.database()?,
            limits: config.limits.clone(),
            ordering: config.ordering,
            config: Arc::new(config.clone()),
            shards: Arc::default(),
        })
    }

    /// Enqueues a message in the session's transaction. Best as its last write, after the one that the transactions of this
    /// key have in common: messages are ordered by when they are written here.
    ///
    /// The first call asks what the outbox is like, outside of the transaction.
    ///
    /// # Errors
    /// [`Invalid`](outbox_core::ErrorKind::Invalid) for a message beyond the limits or a session without a transaction:
    /// nothing was written. [`Conflict`](outbox_core::ErrorKind::Conflict) when another transaction was in the way: run
    /// the whole transaction again; within a callback of the driver's, [`driver_error`](crate::driver_error) tells it so.
    /// [`Schema`](outbox_core::ErrorKind::Schema) where there is no outbox. Others as the server gives them: abort.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the transaction in an unknown state: abort it, or drop the session, which does. If it was
    /// the transaction's first command neither does: then the server ends it, after a minute, or when the session is used
    /// again.
    pub async fn enqueue(&self, session: &mut ClientSession, message: &Message) -> Result<()> {
        self.enqueue_many(session, std::slice::from_ref(message))
            .await
            .map_err(|error| error.with("id", message.id()).with("topic", message.topic()))
    }

    /// Enqueues messages in this order, all or none: one command, or a few for many megabytes.
    ///
    /// Messages with a time ask the server for its own first. Under [`Ordering::Sequenced`] two commands more count up the
    /// numbers of all keys, or a few of very many.
    ///
    /// # Errors
    /// As [`enqueue`](Self::enqueue).
    ///
    /// # Cancel safety
    /// As [`enqueue`](Self::enqueue).
    pub async fn enqueue_many(&self, session: &mut ClientSession, messages: &[Message]) -> Result<()> {
        for message in messages {
            self.limits.check(message)?;
        }
        let sessions = Sessions::of(session.client(), &self.database, &self.config);
        let ask = async || Ok::<_, Error>(check(&sessions, &self.config).await?.shards);
        let shards = *self.shards.get_or_try_init(ask).await?;
        in_transaction(session, DURING).await?;
        let collections = &sessions.collections;
        let (mut now, mut later) = (Vec::with_capacity(messages.len()), Vec::new());
        if messages.iter().any(|message| message.deliver_at().is_some()) {
            let clock = server_time(collections).await.during(DURING)?;
            for message in messages {
                match message.deliver_at() {
                    Some(due) if Some(due) > time(clock) => {
                        later.push(scheduled(message, shards, due, clock))
                    }
                    _ => now.push(message),
                }
            }
        } else {
            now.extend(messages);
        }
        let mut numbers = match self.ordering {
            Ordering::Insert => Numbers::default(),
            Ordering::Sequenced => draw(collections, session, now.iter().copied())
                .await
                .during(DURING)?,
        };
        let waiting = now
            .into_iter()
            .map(|message| waiting(message, shards, numbers.next(message)))
            .collect();
        insert(collections, session, waiting, false)
            .await
            .during(DURING)?;
        if !later.is_empty() {
            let scheduled = collections.scheduled::<Document>();
            let inserted = scheduled.insert_many(later).session(session).await;
            inserted.during(DURING)?;
        }
        Ok(())
    }
}

/// Inserts messages in this order; `unchecked`, whatever the validator says of them.
pub(crate) async fn insert(
    collections: &Collections,
    session: &mut ClientSession,
    documents: Vec<Document>,
    unchecked: bool,
) -> Told<()> {
    // The driver takes no empty list.
    if documents.is_empty() {
        return Ok(());
    }
    let outbox = collections.outbox::<Document>();
    let inserted = outbox.insert_many(documents).session(session);
    match unchecked {
        true => inserted.bypass_document_validation(true).await.map(drop),
        false => inserted.await.map(drop),
    }
}

/// The server's own time, outside of any transaction.
async fn server_time(collections: &Collections) -> Told<DateTime> {
    let told = collections.database.run_command(doc! { "hello": 1 }).await?;
    let time = told.get_datetime("localTime").copied();
    time.map_err(|_| mongodb::error::Error::custom("the server does not tell its time"))
}

/// So many keys are asked for at once: a command has at most 16 MiB.
const TOGETHER: usize = 5_000;

/// Draws the numbers of these messages: two commands, or a few of very many keys. A transaction of the same keys is in
/// conflict with this one until it ends.
pub(crate) async fn draw<'m>(
    collections: &Collections,
    session: &mut ClientSession,
    messages: impl Iterator<Item = &'m Message>,
) -> Told<Numbers> {
    let mut counts = BTreeMap::<(&str, &[u8]), i64>::new();
    for message in messages {
        if let Some(key) = message.key() {
            *counts.entry((message.topic(), key.as_ref())).or_default() += 1;
        }
    }
    if counts.is_empty() {
        return Ok(Numbers::default());
    }
    let keys: Vec<(Document, i64)> = counts
        .iter()
        .map(|((topic, key), count)| (counter(topic, key), *count))
        .collect();
    for counting in collections.counting(keys.iter().map(|(key, count)| (key, *count))) {
        write(collections, Some(&mut *session), counting).await?;
    }
    let ids: Vec<Document> = keys.into_iter().map(|(key, _)| key).collect();
    let mut told: Vec<Document> = Vec::new();
    for ids in ids.chunks(TOGETHER) {
        let mut cursor = collections
            .sequence()
            .find(doc! { "_id": { "$in": ids } })
            .session(&mut *session)
            .await?;
        told.append(&mut cursor.stream(&mut *session).try_collect().await?);
    }
    let mut numbers = Numbers::default();
    for document in told {
        let Ok(name) = document.get_document("_id") else {
            continue;
        };
        let topic = name.get_str("topic").unwrap_or_default().to_owned();
        let key = name.get_binary_generic("key").cloned().unwrap_or_default();
        let drawn = counts.get(&(topic.as_str(), key.as_slice())).copied();
        // What was drawn here begins behind what had been given before.
        let last = document.get_i64("last").unwrap_or_default() - drawn.unwrap_or_default();
        numbers.0.insert((topic, key), last);
    }
    Ok(numbers)
}

/// The last number given of each key.
#[derive(Debug, Default)]
pub(crate) struct Numbers(BTreeMap<(String, Vec<u8>), i64>);

impl Numbers {
    /// None for a message without a key.
    pub(crate) fn next(&mut self, message: &Message) -> Option<i64> {
        let name = (message.topic().to_owned(), message.key()?.to_vec());
        let last = self.0.get_mut(&name)?;
        *last += 1;
        Some(*last)
    }
}

impl Enqueue<ClientSession> for MongoOutbox {
    async fn enqueue_many(&self, session: &mut ClientSession, messages: &[Message]) -> Result<()> {
        Self::enqueue_many(self, session, messages).await
    }
}
