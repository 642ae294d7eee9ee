//! The one way to the server: each call has its limit, and a transaction that lost a race is tried again as a whole.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures::TryStreamExt;
use mongodb::bson::{Bson, Document, Timestamp, doc};
use mongodb::error::{Error as DriverError, ErrorKind as Driver, UNKNOWN_TRANSACTION_COMMIT_RESULT};
use mongodb::options::{ReadConcern, WriteConcern};
use mongodb::{Client, ClientSession, Collection};
use outbox_core::{Error, ErrorKind, Result, within};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::sleep;

use crate::commands::Collections;
use crate::config::MongoConfig;
use crate::error::{During, Refused, is_transient};

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
    pub(crate) limit: Duration,
}

impl Sessions {
    /// Reads the configuration; connections are opened as they are needed.
    pub(crate) async fn open(config: &MongoConfig) -> Result<Self> {
        let client = Client::with_options(config.options().await?).during("connect")?;
        Ok(Self::of(client, &config.database()?, config))
    }

    /// The same with somebody's client, in the database that the configuration names.
    pub(crate) fn of(client: Client, database: &str, config: &MongoConfig) -> Self {
        let database = client.database(database);
        Self {
            collections: Collections::new(database, &config.prefix, config.statement_timeout),
            client,
            limit: config.statement_timeout,
        }
    }

    /// One call, within the limit.
    pub(crate) async fn call<T>(
        &self,
        during: &'static str,
        call: impl Future<Output = Told<T>>,
    ) -> Result<T> {
        within(self.limit, during, async { call.await.during(during) }).await
    }

    /// All answers of an aggregation, within the limit.
    pub(crate) async fn aggregate<T: Send + Sync>(
        &self,
        during: &'static str,
        collection: &Collection<T>,
        pipeline: Vec<Document>,
    ) -> Result<Vec<Document>> {
        let read = async {
            let cursor = collection.aggregate(pipeline).await?;
            cursor.try_collect().await
        };
        self.call(during, read).await
    }

    /// The session for a store's transactions.
    pub(crate) async fn transactions(&self) -> Result<Transactions> {
        let session = self.client.start_session().await.during("connect")?;
        Ok(Transactions {
            id: session.id().clone(),
            session: Arc::new(Mutex::new(session)),
            open: Arc::default(),
            settled: Arc::default(),
            limit: self.limit,
        })
    }

    /// Ends what is open in the sessions of relays that have lost their leases, if they have this account. Others the server
    /// ends itself, a minute after they were begun.
    pub(crate) async fn kill(&self, during: &'static str, sessions: Vec<Document>) {
        let database = &self.collections.database;
        let kill = doc! { "killSessions": sessions };
        let killed = self
            .call(during, async { database.run_command(kill).await })
            .await;
        if let Err(error) = killed {
            tracing::warn!(
                error = %error,
                "a transaction that nobody ends cannot be ended: what it has locked may wait for a minute"
            );
        }
    }

    /// A session of its own, in which nothing is read that is older than what was done in it before.
    pub(crate) async fn session(&self) -> Told<ClientSession> {
        self.client.start_session().await
    }

    /// A session whose reads see one moment, not before `settled`: a transaction that only reads. What it shows counts when
    /// it is [confirmed](confirm). It ends when the session is dropped.
    pub(crate) async fn snapshot(&self, settled: Option<Timestamp>) -> Told<ClientSession> {
        let mut session = self.session().await?;
        if let Some(settled) = settled {
            session.advance_operation_time(settled);
        }
        begin_snapshot(&mut session).await?;
        Ok(session)
    }

    /// All answers of an aggregation as of one moment that is confirmed, and not before what was done in the session,
    /// within the limit.
    pub(crate) async fn confirmed<T: Send + Sync>(
        &self,
        during: &'static str,
        session: &mut ClientSession,
        collection: &Collection<T>,
        pipeline: Vec<Document>,
    ) -> Result<Vec<Document>> {
        let read = async {
            begin_snapshot(session).await?;
            let mut cursor = collection.aggregate(pipeline).session(&mut *session).await?;
            let told = cursor.stream(session).try_collect().await?;
            confirm(session).await?;
            Ok(told)
        };
        self.call(during, read).await
    }
}

/// Begins a transaction that only reads.
///
/// Not a snapshot session of the driver's, nor a read of what a majority is known to have: a primary that has just taken over
/// may know that of less than what was settled.
async fn begin_snapshot(session: &mut ClientSession) -> Told<()> {
    session
        .start_transaction()
        .read_concern(ReadConcern::snapshot())
        .write_concern(WriteConcern::majority())
        .await
}

/// Ends a transaction that only reads, once a majority has what it showed: until then it is what one server has, which
/// a fail-over may undo. Nobody outside of the store is to act on what was read before this has succeeded.
pub(crate) async fn confirm(session: &mut ClientSession) -> Told<()> {
    session.commit_transaction().await
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
    /// Whether one was begun of which it is not known that it ended.
    open: Arc<AtomicBool>,
    /// When the last one was committed.
    settled: Arc<std::sync::Mutex<Option<Timestamp>>>,
    limit: Duration,
}

/// The session, with a transaction that has begun. Dropped, it stays open until the next one begins.
pub(crate) struct Transaction {
    session: OwnedMutexGuard<ClientSession>,
    of: Transactions,
}

impl Transaction {
    /// Commits. Of a result that is not known it is asked again, which commits nothing twice.
    pub(crate) async fn commit(mut self) -> Told<()> {
        let mut asked = 1;
        loop {
            match self.session.commit_transaction().await {
                Ok(()) => break,
                Err(error) if error.contains_label(UNKNOWN_TRANSACTION_COMMIT_RESULT) && asked < COMMITS => {
                    asked += 1;
                }
                Err(error) => return Err(error),
            }
        }
        let at = self.session.operation_time();
        let mut settled = self.of.settled.lock().unwrap_or_else(PoisonError::into_inner);
        // Timestamps are ordered by their seconds, then by their increments.
        *settled = (*settled).max(at);
        self.of.open.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Ends it with nothing done.
    pub(crate) async fn abort(mut self) -> Told<()> {
        self.session.abort_transaction().await?;
        self.of.open.store(false, Ordering::Relaxed);
        Ok(())
    }
}

impl Deref for Transaction {
    type Target = ClientSession;

    fn deref(&self) -> &ClientSession {
        &self.session
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut ClientSession {
        &mut self.session
    }
}

impl Transactions {
    /// The session's id, by which it can be killed.
    pub(crate) const fn id(&self) -> &Document {
        &self.id
    }

    /// When the last transaction was committed: whoever reads has to see it.
    pub(crate) fn settled(&self) -> Option<Timestamp> {
        *self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server's times are no longer those that they were.
    pub(crate) fn forget(&self) {
        *self.settled.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Ends what was dropped half-way, if nobody is at work: it would be in the way of a renewal of its own relay's.
    pub(crate) async fn end(&self, during: &'static str, sessions: &Sessions) {
        if self.open.load(Ordering::Relaxed)
            && let Ok(_idle) = self.session.try_lock()
        {
            // Held until it is done: nobody is to begin what would be ended with it.
            sessions.kill(during, vec![self.id.clone()]).await;
            self.open.store(false, Ordering::Relaxed);
        }
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
        self.open.store(true, Ordering::Relaxed);
        // Of one that was dropped or failed; most often there is none, which the driver knows without asking.
        let _ = session.abort_transaction().await;
        session
            .start_transaction()
            .read_concern(ReadConcern::snapshot())
            .await?;
        Ok(Transaction {
            session,
            of: self.clone(),
        })
    }
}

/// The driver does not tell whether a transaction is open, but it begins none in one, which it decides by itself.
pub(crate) async fn in_transaction(session: &mut ClientSession, during: &'static str) -> Result<()> {
    match session.start_transaction().await {
        Err(error) => match error.kind.as_ref() {
            Driver::Transaction { message, .. } if message.contains("in progress") => Ok(()),
            _ => Err(error).during(during),
        },
        Ok(()) => {
            session.abort_transaction().await.during(during)?;
            Err(Error::new(
                ErrorKind::Invalid,
                during,
                "the session has no transaction: call start_transaction, and commit when all is written",
            ))
        }
    }
}

/// Runs a command of several writes, in a transaction or by itself. One that is refused is told in the answer, not as an
/// error.
pub(crate) async fn write(
    collections: &Collections,
    session: Option<&mut ClientSession>,
    command: Document,
) -> Told<Document> {
    let run = collections.database.run_command(command);
    let told = match session {
        Some(session) => run.session(session).await?,
        None => run.await?,
    };
    let failed = |name: &str| {
        let failed = match told.get(name)? {
            Bson::Array(all) => all.first()?.as_document()?,
            one => one.as_document()?,
        };
        failed.get_i32("code").ok()
    };
    match failed("writeErrors").or_else(|| failed("writeConcernError")) {
        Some(code) => Err(DriverError::custom(Refused(code))),
        None => Ok(told),
    }
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}
