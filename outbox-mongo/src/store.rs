//! The store: leases, holds, settlements, readers.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use mongodb::bson::{Document, doc};
use mongodb::{ClientSession, Collection};
use outbox_core::{
    Capabilities, Count, DeadLetters, Epoch, Hold, Inspection, LeaseRequest, LeaseStatus, Leases, Membership,
    OutboxStore, OwnedShard, Parking, Position, Reader, RelayId, Result, Retention, Scheduled, Settled,
    Settlement, Shard, Stats, WakeUp,
};
use tokio::time::sleep;

use crate::commands::{Raw, dead_ones, every_shard, fence, leased, owned, shards, with_now};
use crate::config::MongoConfig;
use crate::error::During;
use crate::hold::{now, read_hold};
use crate::reader::MongoReader;
use crate::row::{Rows, date, span};
use crate::schema::{EPOCH, Outbox, check};
use crate::session::{Sessions, Told, Transaction, Transactions, write};
use crate::wake::ChangeStream;

/// An outbox in a MongoDB database, as the relay and operators use it.
///
/// Cheap to clone. It has a client of its own, whose connections are lent for a command or a transaction. None is in
/// a transaction while messages are being published.
///
/// ```no_run
/// use outbox_core::OutboxStore;
/// use outbox_mongo::{MongoConfig, MongoStore, migrate};
///
/// # async fn example() -> outbox_mongo::Result<()> {
/// let config = MongoConfig::new("mongodb://relay:secret@db.example/shop?replicaSet=rs0");
/// migrate(&config).await?;
/// let store = MongoStore::connect(config).await?;
/// assert_eq!(store.stats().await?.backlog.value(), 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct MongoStore {
    pub(crate) config: Arc<MongoConfig>,
    pub(crate) sessions: Sessions,
    pub(crate) transactions: Transactions,
    /// When its readers began, and what they read up to.
    known: Arc<Known>,
}

/// By what a reader notices that the server is another one, or was set back.
#[derive(Debug)]
pub(crate) struct Known {
    outbox: Mutex<Outbox>,
}

impl Known {
    /// Compares with what is there now: says what was noticed, once.
    fn compare(&self, now: Outbox) -> Option<String> {
        let mut known = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        let reason = if known.born != now.born {
            Some("the outbox is another one than before: was the database replaced?")
        } else if now.now < known.now && known.now != Position::MAX {
            Some("the server gave later positions before: was it restored from a backup?")
        } else {
            None
        };
        *known = now;
        reason.map(ToOwned::to_owned)
    }
}

impl MongoStore {
    /// Connects to an outbox that [`migrate`](crate::migrate) has made.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Schema`] when the outbox is missing, of another version, or made with another ordering;
    /// `Unsupported` for a server that stands alone or is too old; others as the server gives them.
    pub async fn connect(config: MongoConfig) -> Result<Self> {
        config.check()?;
        let sessions = Sessions::open(&config).await?;
        Self::over(sessions, config).await
    }

    /// The same over connections that are there.
    pub(crate) async fn over(sessions: Sessions, mut config: MongoConfig) -> Result<Self> {
        let outbox = check(&sessions, &config).await?;
        config.shards = outbox.shards;
        Ok(Self {
            config: Arc::new(config),
            transactions: sessions.transactions().await?,
            sessions,
            known: Arc::new(Known {
                outbox: Mutex::new(outbox),
            }),
        })
    }

    /// All leases and all members that were alive once, as of one moment, not before what was done in the session.
    async fn leases(&self, during: &'static str, session: &mut ClientSession) -> Result<Owners> {
        let collection = self.sessions.collections.leases();
        let told = self
            .sessions
            .confirmed(during, session, &collection, vec![with_now()]);
        let mut owners = Owners::default();
        for document in &told.await? {
            let lease = Lease::read(document);
            match (document.get_str("_id"), lease.shard) {
                (Ok(relay), _) if lease.is_free() => owners.gone.push(RelayId::new(relay)),
                (Ok(relay), _) => owners.members.push(RelayId::new(relay)),
                (Err(_), shard) if shard.0 < self.config.shards => owners.leases.push(lease),
                (Err(_), _) => {}
            }
        }
        owners.leases.sort_unstable_by_key(|lease| lease.shard);
        Ok(owners)
    }

    /// Who owns what, and who is alive.
    pub(crate) async fn owners(&self, during: &'static str) -> Result<(Vec<LeaseStatus>, Vec<RelayId>)> {
        let mut session = self.sessions.session().await.during(during)?;
        let Owners { leases, members, .. } = self.leases(during, &mut session).await?;
        Ok((leases.into_iter().map(Lease::status).collect(), members))
    }

    /// What the relay owns now.
    async fn held(&self, during: &'static str, relay: &RelayId) -> Result<Vec<OwnedShard>> {
        let mut session = self.sessions.session().await.during(during)?;
        Ok(self.leases(during, &mut session).await?.of(relay))
    }

    /// Which of these the relay still owns.
    pub(crate) async fn held_of(
        &self,
        during: &'static str,
        relay: &RelayId,
        owned: &[OwnedShard],
    ) -> Result<Vec<OwnedShard>> {
        let mut held = self.held(during, relay).await?;
        held.retain(|lease| owned.contains(lease));
        Ok(held)
    }

    /// Settles all of it, or nothing: then it tells that some of the leases are not held any more.
    async fn try_settle(&self, mut session: Transaction, settlement: &Settlement) -> Told<bool> {
        let collections = &self.sessions.collections;
        if !self
            .fence(&mut session, &settlement.relay, &owned(settlement))
            .await?
        {
            session.abort().await?;
            return Ok(false);
        }
        let parts = &settlement.shards;
        let commands = [
            collections.deletion(parts, self.config.archive),
            collections.taking_out(parts, self.config.archive),
            collections.holding(parts),
        ];
        for command in commands.into_iter().flatten() {
            write(collections, Some(&mut *session), command).await?;
        }
        session.commit().await?;
        Ok(true)
    }

    /// Whether the relay holds all these leases; nobody takes one of them before the transaction ends.
    pub(crate) async fn fence(
        &self,
        session: &mut ClientSession,
        relay: &RelayId,
        shards: &[OwnedShard],
    ) -> Told<bool> {
        let leases = self.sessions.collections.leases();
        let fenced = leases
            .update_many(leased(relay, shards), fence())
            .session(session)
            .await?;
        Ok(usize::try_from(fenced.matched_count) == Ok(shards.len()))
    }
}

/// Before a settlement is tried again of which something was lost.
const PAUSE: Duration = Duration::from_millis(2);
/// How far what may be many is counted.
const COUNTED: u64 = 100_000;

#[async_trait]
impl OutboxStore for MongoStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities::all("mongo", self.config.shards, self.config.ordering)
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        const DURING: &str = "lease";
        self.transactions.end(DURING, &self.sessions).await;
        let collections = &self.sessions.collections;
        let relay = request.relay.as_str();
        // All in one session: what is read is not older than what was written, whoever became the primary in between.
        let mut session = self.sessions.session().await.during(DURING)?;
        let renewal = collections.renewal(relay, request.ttl_millis());
        let renewed = async { write(collections, Some(&mut session), renewal).await };
        self.sessions.call(DURING, renewed).await?;
        let leases = collections.leases();
        let mut owners = self.leases(DURING, &mut session).await?;
        if !owners.gone.is_empty() {
            let gone: Vec<&str> = owners.gone.iter().map(RelayId::as_str).collect();
            let gone = doc! { "_id": { "$in": gone }, "$expr": { "$lte": ["$until", "$$NOW"] } };
            let struck = async { leases.delete_many(gone).await };
            self.sessions.call(DURING, struck).await?;
        }
        let held = owners.of(&request.relay).len();
        let lacking = usize::from(request.want).saturating_sub(held);
        let free = owners.leases.iter().filter(|lease| lease.is_free());
        let free: Vec<&Lease> = free.take(lacking).collect();
        if !free.is_empty() {
            // Of relays that died, or stand still.
            let own = self.transactions.id();
            let mut left: Vec<Document> = Vec::new();
            for session in free.iter().filter_map(|lease| lease.session.as_ref()) {
                if session != own && !left.contains(session) {
                    left.push(session.clone());
                }
            }
            if !left.is_empty() {
                self.sessions.kill(DURING, left).await;
            }
            let free = free.iter().map(|lease| lease.shard);
            let taking = collections.taking(relay, own, free, request.ttl_millis());
            let taken = async { write(collections, Some(&mut session), taking).await };
            if let Err(error) = self.sessions.call(DURING, taken).await {
                if !error.is_retryable() {
                    return Err(error);
                }
                // The next call tries again. What was renewed is the relay's all the same.
                tracing::debug!(error = %error, "not all free shards could be taken");
            }
            owners = self.leases(DURING, &mut session).await?;
        }
        Ok(Leases {
            held: owners.of(&request.relay),
            relays: u16::try_from(owners.members.len()).unwrap_or(u16::MAX),
            time_left: owners
                .time_left(&request.relay)
                .unwrap_or(request.ttl)
                .min(request.ttl),
        })
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        const DURING: &str = "release";
        self.transactions.end(DURING, &self.sessions).await;
        let collections = &self.sessions.collections;
        if !shards.is_empty() {
            let leases = collections.leases();
            let free = doc! { "$set": { "owner": null, "until": EPOCH }, "$unset": { "session": "" } };
            let freed = async { leases.update_many(leased(relay, shards), free).await };
            self.sessions.call(DURING, freed).await?;
        }
        if membership == Membership::Leaves {
            let leases = collections.leases();
            let left = async { leases.delete_one(doc! { "_id": relay.as_str() }).await };
            self.sessions.call(DURING, left).await?;
        }
        Ok(())
    }

    async fn holds(&self, owned: &[OwnedShard]) -> Result<Vec<Hold>> {
        const DURING: &str = "holds";
        let collection = self.sessions.collections.holds();
        let asked = shards(owned.iter().map(|owned| owned.shard));
        let asked = doc! { "$match": { "shard": { "$in": asked }, "over": { "$exists": false } } };
        let mut session = self.sessions.session().await.during(DURING)?;
        let holds = self
            .sessions
            .confirmed(DURING, &mut session, &collection, vec![asked, with_now()]);
        Ok(holds.await?.iter().map(read_hold).collect())
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        let now = check(&self.sessions, &self.config).await?;
        let reset = self.known.compare(now);
        if reset.is_some() {
            self.transactions.forget();
        }
        Ok(Box::new(MongoReader::new(self, reset)))
    }

    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        const DURING: &str = "settle";
        let mut settling = Cow::Borrowed(settlement);
        while !settling.shards.is_empty() {
            let tried = |session| self.try_settle(session, &settling);
            if self.transactions.run(DURING, tried).await? {
                break;
            }
            // What was lost is not even tried again. A look that is older than the refusal may show it as held.
            sleep(PAUSE).await;
            let held = self.held(DURING, &settlement.relay).await?;
            let kept = |shard, epoch| held.contains(&OwnedShard { shard, epoch });
            settling
                .to_mut()
                .shards
                .retain(|part| kept(part.shard, part.epoch));
        }
        let held: Vec<Shard> = settling.shards.iter().map(|part| part.shard).collect();
        Ok(Settled::but_for(settlement, &held))
    }

    async fn stats(&self) -> Result<Stats> {
        const DURING: &str = "stats";
        let collections = &self.sessions.collections;
        let all = doc! { "shard": { "$in": every_shard(self.config.shards) } };
        let outbox = collections.outbox::<Raw>();
        let oldest = vec![
            doc! { "$match": all.clone() },
            doc! { "$sort": { "ts": 1 } },
            doc! { "$limit": 1 },
            doc! { "$project": { "payload": 0, "headers": 0 } },
            with_now(),
        ];
        let oldest = self.sessions.aggregate(DURING, &outbox, oldest).await?;
        let oldest_age = oldest.first().map(|document| {
            let created = Raw::from_document(document)
                .ok()
                .and_then(|raw| Rows::new(self.config.shards).read(&raw).parts.created_at)
                .map_or(EPOCH, date);
            span(created, now(document))
        });
        let scheduled = collections.scheduled::<Raw>();
        // Each counts keys of an index, and fetches no document.
        let count = async |collection: &Collection<Raw>, filter: Document| {
            let counted = async { collection.count_documents(filter).limit(COUNTED).await };
            self.sessions.call(DURING, counted).await
        };
        let backlog = count(&outbox, all.clone()).await?;
        let processed = count(&outbox, doc! { "processed.at": { "$gt": EPOCH } }).await?;
        let scheduled = count(&scheduled, all).await?;
        let holds = async |parked: bool| {
            let filter = doc! { "parked": parked, "over": { "$exists": false } };
            let counted = async { collections.holds().count_documents(filter).await };
            self.sessions.call(DURING, counted).await
        };
        let (retrying, parked) = (holds(false).await?, holds(true).await?);
        let dead = async { outbox.count_documents(dead_ones()).await };
        let dead = self.sessions.call(DURING, dead).await?;
        let (leases, relays) = self.owners(DURING).await?;
        Ok(Stats {
            backlog: Count::up_to(COUNTED, backlog),
            oldest_age,
            retrying,
            parked,
            dead,
            scheduled,
            processed: Count::up_to(COUNTED, processed),
            leases,
            relays,
        })
    }

    fn dead_letters(&self) -> Option<&dyn DeadLetters> {
        Some(self)
    }

    fn scheduled(&self) -> Option<&dyn Scheduled> {
        Some(self)
    }

    fn retention(&self) -> Option<&dyn Retention> {
        self.config.archive.then_some(self)
    }

    fn parking(&self) -> Option<&dyn Parking> {
        Some(self)
    }

    fn inspection(&self) -> Option<&dyn Inspection> {
        Some(self)
    }

    /// The outbox's change stream, if the configuration asks for it.
    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        let follow = || Box::new(ChangeStream::new(&self.sessions)) as Box<dyn WakeUp>;
        self.config.change_stream.then(follow)
    }
}

/// Who owns what and who is alive, as it was read.
#[derive(Debug, Default)]
struct Owners {
    leases: Vec<Lease>,
    members: Vec<RelayId>,
    /// Members that did not come back.
    gone: Vec<RelayId>,
}

impl Owners {
    /// What a relay owns.
    fn of(&self, relay: &RelayId) -> Vec<OwnedShard> {
        let own = self.leases.iter().filter(|lease| lease.is_of(relay));
        own.map(Lease::owned).collect()
    }

    /// How long the shortest of its leases still runs.
    fn time_left(&self, relay: &RelayId) -> Option<Duration> {
        let own = self.leases.iter().filter(|lease| lease.is_of(relay));
        own.filter_map(|lease| lease.left).min()
    }
}

/// A lease as it was read.
#[derive(Debug)]
struct Lease {
    shard: Shard,
    epoch: Epoch,
    owner: Option<RelayId>,
    /// That of the owner's transactions.
    session: Option<Document>,
    /// None when it is over.
    left: Option<Duration>,
}

impl Lease {
    fn read(document: &Document) -> Self {
        let until = document.get_datetime("until").copied().unwrap_or(EPOCH);
        let now = now(document);
        Self {
            shard: Shard(u16::try_from(document.get_i32("_id").unwrap_or(-1)).unwrap_or(u16::MAX)),
            epoch: Epoch(document.get_i64("epoch").unwrap_or_default()),
            owner: document.get_str("owner").ok().map(RelayId::new),
            session: document.get_document("session").ok().cloned(),
            left: (until > now).then(|| span(now, until)),
        }
    }

    fn is_free(&self) -> bool {
        self.left.is_none()
    }

    fn is_of(&self, relay: &RelayId) -> bool {
        !self.is_free() && self.owner.as_ref() == Some(relay)
    }

    const fn owned(&self) -> OwnedShard {
        OwnedShard {
            shard: self.shard,
            epoch: self.epoch,
        }
    }

    fn status(self) -> LeaseStatus {
        let free = self.is_free();
        LeaseStatus {
            shard: self.shard,
            epoch: self.epoch,
            owner: self.owner.filter(|_| !free),
            time_left: self.left.unwrap_or_default(),
        }
    }
}

impl fmt::Debug for MongoStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoStore")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}
