//! The inbox: what a consumer has handled, noted in the consumer's own transaction.

use std::time::Duration;

use futures::TryStreamExt;
use mongodb::ClientSession;
use mongodb::bson::{Bson, Document, doc};
use outbox_core::{Error, ErrorKind, Inbox, MessageId, Receive, Result, check_age, millis};

use crate::commands::later;
use crate::config::MongoConfig;
use crate::error::During;
use crate::row::uuid;
use crate::session::{Sessions, in_transaction};

const DURING: &str = "receive";

/// How long a consumer's name may be.
const LONGEST: usize = 255;

/// The consumer's handle: cheap to clone, holds no connection.
///
/// First the note, then the effects, then the commit, then the offset. When two copies are handled at the same time, the
/// second is in conflict with the first one: run its transaction again, and it is a duplicate.
///
/// ```no_run
/// use outbox_core::{MessageId, Receive};
/// use outbox_mongo::mongodb::Client;
/// use outbox_mongo::{MongoConfig, MongoInbox};
///
/// # async fn example(client: Client, id: MessageId) -> Result<(), Box<dyn std::error::Error>> {
/// let inbox = MongoInbox::new(&MongoConfig::new("mongodb://db.example/billing"))?;
///
/// let mut session = client.start_session().await?;
/// session.start_transaction().await?;
/// // The id is that of the record's header `outbox-id`.
/// if inbox.receive(&mut session, "billing", id).await? == Receive::Fresh {
///     // the effects
/// }
/// session.commit_transaction().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct MongoInbox {
    config: MongoConfig,
    database: String,
}

impl MongoInbox {
    /// A handle to the inbox beside the outbox that `config` names; of its `url` only the database is used, nothing is
    /// opened.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a configuration that makes no sense.
    pub fn new(config: &MongoConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            database: config.database()?,
            config: config.clone(),
        })
    }

    /// Notes that `consumer` handles `id` in the session's transaction.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a name of more than 255 characters, or a session without a transaction; [`ErrorKind::Conflict`] when a copy is being handled
    /// at this moment: run the transaction again; others as the server gives them: abort and try again.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the transaction in an unknown state: abort it, or drop the session, which does.
    pub async fn receive(
        &self,
        session: &mut ClientSession,
        consumer: &str,
        id: MessageId,
    ) -> Result<Receive> {
        if consumer.chars().count() > LONGEST {
            return Err(Error::new(
                ErrorKind::Invalid,
                DURING,
                "a consumer's name has at most 255 characters",
            )
            .with("consumer", consumer));
        }
        in_transaction(session, DURING).await?;
        let sessions = Sessions::of(session.client(), &self.database, &self.config);
        // Not an insert: a duplicate key would end the transaction.
        let name = doc! { "_id": { "consumer": consumer, "id": uuid(id) } };
        let noted = doc! { "$set": { "at": { "$ifNull": ["$at", "$$NOW"] } } };
        let told = sessions
            .collections
            .inbox()
            .update_one(name, vec![noted])
            .upsert(true)
            .session(session)
            .await
            .during(DURING)?;
        Ok(match told.upserted_id {
            Some(_) => Receive::Fresh,
            None => Receive::Duplicate,
        })
    }

    /// Forgets at most `limit` messages handled longer ago than `age`, of all consumers; says how many.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for an age below [`outbox_core::MIN_INBOX_AGE`]; others as the server gives them.
    pub async fn purge(&self, session: &mut ClientSession, age: Duration, limit: usize) -> Result<usize> {
        const DURING: &str = "purge inbox";
        check_age(age)?;
        let Ok(limit) = i64::try_from(limit) else {
            return Err(Error::new(
                ErrorKind::Invalid,
                DURING,
                "the limit is no number that a database knows",
            ));
        };
        if limit == 0 {
            return Ok(0);
        }
        let age = millis(age.min(Duration::from_secs(100 * 366 * 24 * 60 * 60)));
        let inbox = Sessions::of(session.client(), &self.database, &self.config)
            .collections
            .inbox();
        let old = doc! { "$expr": { "$lt": ["$at", later(-age)] } };
        let mut cursor = inbox
            .find(old)
            .sort(doc! { "at": 1 })
            .limit(limit)
            .projection(doc! { "_id": 1 })
            .session(&mut *session)
            .await
            .during(DURING)?;
        let old: Vec<Document> = cursor.stream(session).try_collect().await.during(DURING)?;
        let ids: Vec<Bson> = old
            .into_iter()
            .filter_map(|mut note| note.remove("_id"))
            .collect();
        let deleted = inbox
            .delete_many(doc! { "_id": { "$in": ids } })
            .session(session)
            .await
            .during(DURING)?;
        Ok(usize::try_from(deleted.deleted_count).unwrap_or(usize::MAX))
    }
}

impl Inbox<ClientSession> for MongoInbox {
    async fn receive(&self, session: &mut ClientSession, consumer: &str, id: MessageId) -> Result<Receive> {
        Self::receive(self, session, consumer, id).await
    }

    async fn purge(&self, session: &mut ClientSession, age: Duration, limit: usize) -> Result<usize> {
        Self::purge(self, session, age, limit).await
    }
}
