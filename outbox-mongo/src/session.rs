//! The one way to the server: each call has its limit, and a transaction that lost a race is tried again as a whole.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mongodb::bson::{Document, doc};
use mongodb::error::{Error as DriverError, UNKNOWN_TRANSACTION_COMMIT_RESULT};
use mongodb::options::ReadConcern;
use mongodb::{Client, ClientSession};
use outbox_core::{Result, within};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::sleep;

use crate::commands::Collections;
use crate::config::MongoConfig;
use crate::error::{During, is_transient};

/// What the driver answers.
pub(crate) type Told<T> = std::result::Result<T, DriverError>;

/// So often a transaction is tried that others are in the way of.
const TRIES: u32 = 12;
/// So often a commit is repeated whose result is not known.
const COMMITS: u32 = 3;

/// Connections to the server, and the collections there. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Sessions {
    pub(crate) collections: Collections,
    client: Client,
    limit: Duration,
}

impl Sessions {
    /// Reads the configuration; connections are opened as they are needed.
    pub(crate) async fn open(config: &MongoConfig) -> Result<Self> {
        let client = Client::with_options(config.options().await?).during("connect")?;
        Self::of(client, config)
    }

    /// The same with somebody's client.
    pub(crate) fn of(client: Client, config: &MongoConfig) -> Result<Self> {
        let database = client.database(&config.database()?);
        Ok(Self {
            collections: Collections::new(database, &config.prefix, config.statement_timeout),
            client,
            limit: config.statement_timeout,
        })
    }

    /// One call, within the limit.
    pub(crate) async fn call<T>(
        &self,
        during: &'static str,
        call: impl Future<Output = Told<T>>,
    ) -> Result<T> {
        within(self.limit, during, async { call.await.during(during) }).await
    }

    /// The session for a store's transactions.
    pub(crate) async fn transactions(&self) -> Result<Transactions> {
        let session = self.client.start_session().await.during("connect")?;
        Ok(Transactions {
            id: session.id().clone(),
            session: Arc::new(Mutex::new(session)),
            limit: self.limit,
        })
    }

    /// Ends what is open in the sessions of relays that have lost their leases. Where the server does not allow it, it ends
    /// them itself, a minute after they were begun.
    pub(crate) async fn kill(&self, during: &'static str, sessions: Vec<Document>) {
        let database = &self.collections.database;
        let kill = doc! { "killSessions": sessions };
        let killed = self
            .call(during, async { database.run_command(kill).await })
            .await;
        if let Err(error) = killed {
            tracing::warn!(
                error = %error,
                "an open transaction of a relay that is gone cannot be ended: its shards may wait for a minute"
            );
        }
    }

    /// A session whose reads see one moment.
    pub(crate) async fn snapshot(&self) -> Told<ClientSession> {
        self.client.start_session().snapshot(true).await
    }
}

/// The one session in which a store's transactions run, one after the other.
///
/// A transaction that nobody ends, because its process died or its future was dropped, keeps what it has written locked for
/// a minute, on the server. In one session it ends when the next one begins; and whoever takes over knows by the session's id
/// what to end ([`kill`](Sessions::kill)).
#[derive(Clone)]
pub(crate) struct Transactions {
    session: Arc<Mutex<ClientSession>>,
    id: Document,
    limit: Duration,
}

/// The session, with a transaction that has begun.
pub(crate) type Transaction = OwnedMutexGuard<ClientSession>;

impl Transactions {
    /// The session's id, by which it can be killed.
    pub(crate) const fn id(&self) -> &Document {
        &self.id
    }

    /// A transaction that `attempt` ends, within the limit: again from its beginning when it lost a race, after a random
    /// pause that grows.
    pub(crate) async fn run<T, F>(
        &self,
        during: &'static str,
        attempt: impl Fn(Transaction) -> F + Send + Sync,
    ) -> Result<T>
    where
        T: Send,
        F: Future<Output = Told<T>> + Send,
    {
        let trying = async {
            let mut tries = 0;
            loop {
                let begun = self.begin().await.during(during)?;
                match attempt(begun).await {
                    Err(error) if is_transient(&error) && tries < TRIES => {
                        tries += 1;
                        let longest = 1_u64 << tries.min(6);
                        sleep(Duration::from_millis(fastrand::u64(1..=longest))).await;
                    }
                    told => return told.during(during),
                }
            }
        };
        within(self.limit, during, trying).await
    }

    async fn begin(&self) -> Told<Transaction> {
        let mut session = Arc::clone(&self.session).lock_owned().await;
        // Of one that was dropped or failed; most often there is none, which the driver knows without asking.
        let _ = session.abort_transaction().await;
        session
            .start_transaction()
            .read_concern(ReadConcern::snapshot())
            .await?;
        Ok(session)
    }
}

/// Commits. Of a result that is not known it is asked again, which commits nothing twice.
pub(crate) async fn commit(mut transaction: Transaction) -> Told<()> {
    let mut asked = 1;
    loop {
        match transaction.commit_transaction().await {
            Err(error) if error.contains_label(UNKNOWN_TRANSACTION_COMMIT_RESULT) && asked < COMMITS => {
                asked += 1;
            }
            told => return told,
        }
    }
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}
