//! The application's side in MongoDB: producers whose transactions overlap, and a consumer that sums.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::path::Path;
use std::time::Duration;

use outbox::mongo::mongodb::bson::spec::BinarySubtype;
use outbox::mongo::mongodb::bson::{Binary, Document, doc};
use outbox::mongo::mongodb::error::{Error, ErrorKind, TRANSIENT_TRANSACTION_ERROR};
use outbox::mongo::mongodb::options::ReturnDocument;
use outbox::mongo::mongodb::{Client, ClientSession, Collection};
use outbox::mongo::{MongoConfig, MongoInbox, MongoOutbox, MongoStore, driver_error};
use outbox::{Message, MessageId, Ordering, OutboxStore, Receive};
use tokio::runtime::{Handle, Runtime};

use crate::proof::oracle::Arrived;
use crate::proof::writer::{End, Producer};
use crate::stage::database::{Database, Killable, interrupted};
use crate::stage::say;
use crate::stage::services::OwnServer;

/// A database of its own, which goes with it.
#[derive(Debug)]
pub(crate) struct Mongo<K> {
    config: MongoConfig,
    name: String,
    /// To look, and to consume.
    client: Client,
    server: Option<OwnServer>,
    runtime: Handle,
    kind: PhantomData<K>,
}

/// Which server, and which outbox.
pub(crate) trait Kind: Send + Sync {
    /// Whether it is a server of the test's own, which may be killed.
    const OWN_SERVER: bool = false;
    const ORDERING: Ordering = Ordering::Insert;
}

#[derive(Debug)]
pub(crate) struct Shared;
#[derive(Debug)]
pub(crate) struct Own;
#[derive(Debug)]
pub(crate) struct Sequenced;

impl Kind for Shared {}

impl Kind for Own {
    const OWN_SERVER: bool = true;
}

impl Kind for Sequenced {
    const ORDERING: Ordering = Ordering::Sequenced;
}

impl<K> Mongo<K> {
    fn collection(&self, name: &str) -> Collection<Document> {
        self.client.database(&self.name).collection(name)
    }
}

impl<K: Kind> Database for Mongo<K> {
    type Producer = MongoProducer;

    const FEWER: u32 = 10;

    const SLOW: u32 = 3;

    const HOLD_EACH: usize = 50;

    const COMMIT: &[u8] = b"commitTransaction";

    /// As `max_connections`, and those by which the driver watches the server.
    const CONNECTIONS: usize = 6 + 2;

    fn make(folder: &Path, runtime: &Runtime) -> Self {
        let server = K::OWN_SERVER.then(|| OwnServer::start("mongo", folder));
        let url = server
            .as_ref()
            .map_or_else(shared_server, |server| server.variable(""));
        let name = format!("proof_{}_{:08x}", std::process::id(), fastrand::u32(..));
        let (place, _) = url.rsplit_once('/').unwrap();
        let config = MongoConfig {
            ordering: K::ORDERING,
            ..MongoConfig::new(format!("{place}/{name}"))
        };
        let client = runtime.block_on(async {
            outbox::mongo::migrate(&config).await.unwrap();
            Client::with_uri_str(&url).await.unwrap()
        });
        let made = Self {
            config,
            name,
            client,
            server,
            runtime: runtime.handle().clone(),
            kind: PhantomData,
        };
        runtime.block_on(async {
            // Up front: two transactions that make the same collection are in each other's way.
            for name in ["number", "written", "effect"] {
                made.client
                    .database(&made.name)
                    .create_collection(name)
                    .await
                    .unwrap();
            }
        });
        made
    }

    fn configuration(&self) -> String {
        use outbox::mongo::secrecy::ExposeSecret;
        let ordering = match K::ORDERING {
            Ordering::Insert => "insert",
            Ordering::Sequenced => "sequenced",
        };
        let url = self.config.url.expose_secret();
        format!("type = \"mongo\"\nurl = \"{url}\"\nordering = \"{ordering}\"")
    }

    /// Else the driver asks where the server is, and goes there.
    fn configuration_by(&self, server: &str, place: &str) -> String {
        let configuration = self.configuration().replace(server, place);
        configuration.replace(&self.name, &format!("{}?directConnection=true", self.name))
    }

    fn store(&self) -> Box<dyn OutboxStore> {
        Box::new(
            self.runtime
                .block_on(MongoStore::connect(self.config.clone()))
                .unwrap(),
        )
    }

    fn producer(&self) -> MongoProducer {
        MongoProducer {
            client: self.client.clone(),
            database: self.name.clone(),
            outbox: MongoOutbox::new(&self.config).unwrap(),
            faults: K::OWN_SERVER,
            runtime: self.runtime.clone(),
        }
    }

    fn backlog(&self) -> u64 {
        let waits = doc! { "shard": { "$gte": 0 } };
        self.runtime
            .block_on(async { self.collection("outbox").count_documents(waits).await })
            .unwrap()
    }

    fn committed(&self, unknown: &[MessageId]) -> BTreeSet<MessageId> {
        self.runtime.block_on(async {
            let mut committed = BTreeSet::new();
            for id in unknown {
                let written = doc! { "_id": uuid(*id) };
                if self
                    .collection("written")
                    .find_one(written)
                    .await
                    .unwrap()
                    .is_some()
                {
                    committed.insert(*id);
                }
            }
            committed
        })
    }

    /// The server that the tests run on does not tell whose connections it has.
    fn connections(&self) -> usize {
        0
    }

    fn idle_in_transaction(&self) -> (Duration, String) {
        (Duration::ZERO, String::new())
    }

    /// A settlement writes its leases: it is in conflict with whoever has written them, and is tried again.
    fn hold_settlements(&self, work: impl FnOnce()) {
        let mut session = loop {
            let held = self.runtime.block_on(async {
                let mut session = self.client.start_session().await?;
                session.start_transaction().await?;
                let leases = self.collection("outbox_lease");
                let noted = doc! { "$inc": { "fence": 1_i64 } };
                leases.update_many(doc! {}, noted).session(&mut session).await?;
                Ok::<_, Error>(session)
            });
            match held {
                Ok(session) => break session,
                // A settlement was first.
                Err(error) => assert!(error.contains_label(TRANSIENT_TRANSACTION_ERROR), "{error}"),
            }
        };
        work();
        self.runtime
            .block_on(async { session.abort_transaction().await })
            .unwrap();
    }

    fn consume(&self, arrived: &[Arrived]) -> BTreeMap<String, u64> {
        let inbox = MongoInbox::new(&self.config).unwrap();
        let effects = self.collection("effect");
        self.runtime.block_on(async {
            for batch in interrupted(arrived) {
                let mut session = self.client.start_session().await.unwrap();
                session.start_transaction().await.unwrap();
                let mut fresh: BTreeMap<String, i64> = BTreeMap::new();
                for stamp in batch.records.iter().filter_map(Arrived::stamp) {
                    // First the note, then the effect.
                    if inbox.receive(&mut session, "sums", stamp.id).await.unwrap() == Receive::Fresh {
                        *fresh.entry(stamp.key).or_default() += stamp.n.cast_signed();
                    }
                }
                for (key, sum) in fresh {
                    effects
                        .update_one(doc! { "_id": key }, doc! { "$inc": { "sum": sum } })
                        .upsert(true)
                        .session(&mut session)
                        .await
                        .unwrap();
                }
                let ended = match batch.commit {
                    true => session.commit_transaction().await,
                    false => session.abort_transaction().await,
                };
                ended.unwrap();
            }
            let mut sums = BTreeMap::new();
            let mut found = effects.find(doc! {}).await.unwrap();
            while found.advance().await.unwrap() {
                let effect = found.deserialize_current().unwrap();
                let key = effect.get_str("_id").unwrap().to_owned();
                sums.insert(key, effect.get_i64("sum").unwrap().unsigned_abs());
            }
            sums
        })
    }
}

impl Killable for Mongo<Own> {
    fn kill(&self) {
        self.server.as_ref().unwrap().signal("KILL");
    }

    fn restart(&self) {
        self.server.as_ref().unwrap().restart();
    }
}

/// What a failed test leaves behind tells why.
impl<K> Drop for Mongo<K> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return say(&format!("the database {} is kept", self.name));
        }
        let database = self.client.database(&self.name);
        let _ = self.runtime.block_on(async { database.drop().await });
    }
}

fn uuid(id: MessageId) -> Binary {
    Binary {
        subtype: BinarySubtype::Uuid,
        bytes: id.as_bytes().to_vec(),
    }
}

/// The server that all tests share.
fn shared_server() -> String {
    std::env::var("OUTBOX_TEST_MONGO").unwrap_or_else(|_| {
        panic!(
            "OUTBOX_TEST_MONGO is not set: run scripts/services start mongo; eval \"$(scripts/services env mongo)\""
        )
    })
}

/// One producer.
#[derive(Debug)]
pub(crate) struct MongoProducer {
    client: Client,
    database: String,
    outbox: MongoOutbox,
    /// Whether faults are expected.
    faults: bool,
    runtime: Handle,
}

impl Producer for MongoProducer {
    fn transact(
        &mut self,
        keys: &[String],
        message: &mut dyn FnMut(&str, u64) -> Message,
        wait: Duration,
        commit: bool,
    ) -> End {
        let mut committing = false;
        let attempt = self.attempt(keys, message, wait, commit, &mut committing);
        match self.runtime.clone().block_on(attempt) {
            Ok(end) => end,
            Err(error) if !self.faults => panic!("a producer failed: {error}"),
            // Only a commit that has no answer can have succeeded.
            Err(_) if committing => End::Unknown,
            Err(_) => End::RolledBack,
        }
    }
}

impl MongoProducer {
    async fn attempt(
        &self,
        keys: &[String],
        message: &mut dyn FnMut(&str, u64) -> Message,
        wait: Duration,
        commit: bool,
        committing: &mut bool,
    ) -> Result<End, Error> {
        let (mut session, drawn) = self.lock(keys).await?;
        let messages: Vec<Message> = keys.iter().zip(drawn).map(|(key, n)| message(key, n)).collect();
        self.outbox
            .enqueue_many(&mut session, &messages)
            .await
            .map_err(driver_error)?;
        let written = messages.iter().map(|message| doc! { "_id": uuid(message.id()) });
        let database = self.client.database(&self.database);
        database
            .collection::<Document>("written")
            .insert_many(written)
            .session(&mut session)
            .await?;
        tokio::time::sleep(wait).await;
        if !commit {
            session.abort_transaction().await?;
            return Ok(End::RolledBack);
        }
        *committing = true;
        session.commit_transaction().await?;
        Ok(End::Committed)
    }

    /// Draws the numbers of these keys, which nobody else can until the transaction ends: where somebody else was first
    /// it begins again.
    async fn lock(&self, keys: &[String]) -> Result<(ClientSession, Vec<u64>), Error> {
        let numbers = self
            .client
            .database(&self.database)
            .collection::<Document>("number");
        loop {
            let mut session = self.client.start_session().await?;
            session.start_transaction().await?;
            let mut drawn = Vec::with_capacity(keys.len());
            let mut lost = false;
            for key in keys {
                let told = numbers
                    .find_one_and_update(doc! { "_id": key }, doc! { "$inc": { "last": 1_i64 } })
                    .upsert(true)
                    .return_document(ReturnDocument::After)
                    .session(&mut session)
                    .await;
                match told {
                    Ok(number) => {
                        drawn.push(number.unwrap().get_i64("last").unwrap().unsigned_abs());
                    }
                    // A server that is gone is no conflict.
                    Err(error)
                        if error.contains_label(TRANSIENT_TRANSACTION_ERROR)
                            && matches!(error.kind.as_ref(), ErrorKind::Command(_)) =>
                    {
                        lost = true;
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
            if !lost {
                return Ok((session, drawn));
            }
            let _ = session.abort_transaction().await;
            tokio::time::sleep(Duration::from_millis(fastrand::u64(1..20))).await;
        }
    }
}
