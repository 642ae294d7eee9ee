//! The database of a world: the store in memory, whose rows become visible as one of the real databases shows them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::OwnedMutexGuard;

use super::Simulation;
use super::reader::ServerReader;
use super::stage::Stage;
use crate::conformance::StoreHarness;
use crate::cursor::{Snapshot, Told, Xid};
use crate::dead::DeadLetters;
use crate::error::Result;
use crate::fetch::Record;
use crate::hold::{Hold, Parking};
use crate::inspect::Inspection;
use crate::lease::{LeaseRequest, Leases, Membership, RelayId};
use crate::memory::{MemoryConfig, MemoryStore, MemoryTransaction};
use crate::message::{Message, OrderKey};
use crate::retention::Retention;
use crate::scheduled::{Promotion, Scheduled};
use crate::settle::{Settled, Settlement, ShardSettlement};
use crate::shard::{OwnedShard, Shard};
use crate::store::{Capabilities, Ordering, OutboxStore, Reader, Stats};
use crate::wake::WakeUp;

/// No statement takes longer from drawing a position to storing its row.
pub(super) const LAG: Duration = Duration::from_millis(100);

/// How a database shows what is committed, and how a reader makes sure that it misses nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Visibility {
    /// Everything is read anew each time.
    Rescan,
    /// Transactions are numbered before they draw positions, and a snapshot tells which it sees: as PostgreSQL.
    Snapshots,
    /// Who asks is shown what is stored and not committed: as MySQL and MariaDB.
    DirtyReads,
    /// One writer at a time: positions are drawn in the order of commits, as in SQLite.
    OneWriter,
}

impl Visibility {
    pub(super) const ALL: [Self; 4] = [Self::Rescan, Self::Snapshots, Self::DirtyReads, Self::OneWriter];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Rescan => "rescan",
            Self::Snapshots => "snapshots",
            Self::DirtyReads => "dirty reads",
            Self::OneWriter => "one writer",
        }
    }
}

/// The server. Clones are handles of the same one.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) stage: Arc<Stage>,
    pub(super) store: MemoryStore,
    pub(super) visibility: Visibility,
    open: Arc<Mutex<Open>>,
    /// Held by a transaction that writes, where there is one writer.
    writer: Arc<tokio::sync::Mutex<()>>,
}

/// What is open.
#[derive(Debug)]
struct Open {
    next_xid: Xid,
    last_completed: Xid,
    running: BTreeSet<Xid>,
    /// The last position that a producer has drawn.
    last: i64,
    /// What is stored and not committed.
    stored: BTreeMap<i64, Stored>,
    /// How often the server came up anew.
    restarts: u64,
    /// The deliveries of the last settlement, if it had nothing else and no commit that waits for the disk came after it: a
    /// restart undoes them.
    undoable: Vec<Record>,
}

/// Where a stored row belongs.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) shard: Shard,
    pub(super) topic: Arc<str>,
    pub(super) key: Option<OrderKey>,
}

impl Stored {
    pub(super) fn of(record: &Record) -> Self {
        Self {
            shard: record.shard,
            topic: record.message.topic().into(),
            key: record.message.order_key(),
        }
    }
}

impl Server {
    pub(super) fn new(stage: Arc<Stage>, dawn: SystemTime) -> Self {
        let config = stage.draw(|random| MemoryConfig {
            shards: random.u16(1..=8),
            ordering: if random.bool() {
                Ordering::Insert
            } else {
                Ordering::Sequenced
            },
            archive: random.u8(..4) == 0,
            dead_letters: random.u8(..4) > 0,
            ..MemoryConfig::default()
        });
        let visibility = Visibility::ALL[stage.draw(|random| random.usize(..Visibility::ALL.len()))];
        stage.note(format_args!("{} {config:?}", visibility.name()));
        Self::like(stage, MemoryStore::born(config, dawn), visibility)
    }

    /// An empty one that shows what is in a store in this way.
    pub(super) fn like(stage: Arc<Stage>, store: MemoryStore, visibility: Visibility) -> Self {
        Self {
            store,
            visibility,
            stage,
            open: Arc::new(Mutex::new(Open {
                next_xid: 730,
                last_completed: 729,
                running: BTreeSet::new(),
                last: 0,
                stored: BTreeMap::new(),
                restarts: 0,
                undoable: Vec::new(),
            })),
            writer: Arc::default(),
        }
    }

    pub(super) const fn visibility(&self) -> &'static str {
        self.visibility.name()
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Comes up anew, if it went down since; says how often it has.
    pub(super) fn come_up(&self) -> u64 {
        let restarts = self.stage.weather().restarts;
        let undone = {
            let mut open = self.open();
            if std::mem::replace(&mut open.restarts, restarts) == restarts {
                return restarts;
            }
            std::mem::take(&mut open.undoable)
        };
        if !undone.is_empty() {
            self.stage
                .note(format_args!("the restart undoes {} deliveries", undone.len()));
        }
        self.store.restore(undone);
        restarts
    }

    /// All that was committed is on disk.
    fn sync(&self) {
        self.come_up();
        self.open().undoable.clear();
    }

    /// What it tells of its transactions at this moment.
    pub(super) fn tell(&self) -> Told {
        let open = self.open();
        let xmax = open.last_completed + 1;
        let running: Vec<Xid> = open.running.range(..xmax).copied().collect();
        Told {
            snapshot: Snapshot {
                xmin: running.first().copied().unwrap_or(xmax),
                xmax,
                running,
            },
            last: open.last,
            ahead: open.next_xid - xmax,
        }
    }

    /// What is stored, committed or not, in order of position.
    pub(super) fn stored(&self) -> BTreeMap<i64, Stored> {
        let mut stored = self.open().stored.clone();
        let committed = self.store.pending();
        stored.extend(
            committed
                .iter()
                .map(|record| (record.position.0, Stored::of(record))),
        );
        stored
    }
}

impl Open {
    fn assign(&mut self) -> Xid {
        let xid = self.next_xid;
        self.next_xid += 1;
        self.running.insert(xid);
        xid
    }

    fn complete(&mut self, xid: Xid) {
        self.running.remove(&xid);
        self.last_completed = self.last_completed.max(xid);
    }
}

/// A producer's transaction.
pub(super) struct ServerTransaction {
    server: Server,
    inner: Option<MemoryTransaction>,
    xid: Option<Xid>,
    writer: Option<OwnedMutexGuard<()>>,
}

impl ServerTransaction {
    /// Its number is given, its turn has come.
    async fn begin_to_write(&mut self) {
        let server = &self.server;
        if server.visibility == Visibility::OneWriter && self.writer.is_none() {
            self.writer = Some(Arc::clone(&server.writer).lock_owned().await);
        }
        if self.xid.is_none() {
            {
                let mut open = server.open();
                self.xid = Some(open.assign());
                // Somebody who has nothing to do with the outbox.
                let other = open.assign();
                open.complete(other);
            }
            // A position is drawn later than the number.
            server.stage.pause(0..3).await;
        }
    }

    async fn enqueue(&mut self, messages: &[Message]) -> Result<()> {
        self.begin_to_write().await;
        let Some(inner) = &mut self.inner else {
            return Ok(());
        };
        let before = inner.written().count();
        self.server.store.enqueue_many(inner, messages).await?;
        let drawn: Vec<(i64, Stored)> = inner
            .written()
            .skip(before)
            .map(|record| (record.position.0, Stored::of(&record)))
            .collect();
        if let Some((last, _)) = drawn.last() {
            let mut open = self.server.open();
            open.last = open.last.max(*last);
        }
        if self.server.visibility == Visibility::DirtyReads {
            // Drawn, and not stored yet: for a moment nobody can see it.
            let longest = if self.server.stage.happens(200) { 90 } else { 2 };
            self.server.stage.pause(0..longest).await;
        }
        self.server.open().stored.extend(drawn);
        Ok(())
    }

    fn commit(mut self) {
        if let Some(inner) = self.inner.take() {
            self.server.sync();
            for record in inner.written() {
                self.server.open().stored.remove(&record.position.0);
            }
            inner.commit();
        }
    }
}

impl Drop for ServerTransaction {
    fn drop(&mut self) {
        let mut open = self.server.open();
        for record in self.inner.iter().flat_map(MemoryTransaction::written) {
            open.stored.remove(&record.position.0);
        }
        if let Some(xid) = self.xid {
            open.complete(xid);
        }
    }
}

#[async_trait]
impl StoreHarness for Server {
    type Tx = ServerTransaction;

    async fn fresh() -> Self {
        let dawn = SystemTime::now();
        Self::new(Arc::new(Stage::new(Simulation::new(0).calm(), dawn)), dawn)
    }

    fn store(&self) -> Arc<dyn OutboxStore> {
        Arc::new(self.clone())
    }

    async fn begin(&self) -> ServerTransaction {
        ServerTransaction {
            server: self.clone(),
            inner: Some(self.store.begin()),
            xid: None,
            writer: None,
        }
    }

    async fn enqueue(&self, tx: &mut ServerTransaction, messages: &[Message]) -> Result<()> {
        tx.enqueue(messages).await
    }

    async fn commit(&self, tx: ServerTransaction) {
        tx.commit();
    }

    async fn rollback(&self, tx: ServerTransaction) {
        drop(tx);
    }

    fn concurrent_transactions(&self) -> bool {
        self.visibility != Visibility::OneWriter
    }
}

#[async_trait]
impl OutboxStore for Server {
    fn capabilities(&self) -> Capabilities {
        self.store.capabilities()
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        self.sync();
        self.store.lease(request).await
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        self.store.release(relay, shards, membership).await
    }

    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>> {
        self.store.holds(shards).await
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        match ServerReader::new(self) {
            Some(reader) => Ok(Box::new(reader)),
            None => self.store.reader().await,
        }
    }

    /// Deliveries alone need not wait for the disk: what is undone is delivered again.
    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        self.come_up();
        let before = self.store.pending();
        let settled = self.store.settle(settlement).await?;
        let after: BTreeSet<_> = self.store.pending().iter().map(Record::reference).collect();
        let deliveries = settlement.shards.iter().all(ShardSettlement::is_deliveries_only);
        let mut undoable = before;
        undoable.retain(|record| {
            deliveries && !self.store.config().archive && !after.contains(&record.reference())
        });
        self.open().undoable = undoable;
        Ok(settled)
    }

    async fn stats(&self) -> Result<Stats> {
        self.come_up();
        self.store.stats().await
    }

    fn dead_letters(&self) -> Option<&dyn DeadLetters> {
        self.store.dead_letters()
    }

    fn scheduled(&self) -> Option<&dyn Scheduled> {
        self.store.scheduled().is_some().then_some(self)
    }

    fn retention(&self) -> Option<&dyn Retention> {
        self.store.retention()
    }

    fn parking(&self) -> Option<&dyn Parking> {
        self.store.parking()
    }

    fn inspection(&self) -> Option<&dyn Inspection> {
        self.store.inspection()
    }

    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        self.store.wake_up()
    }
}

#[async_trait]
impl Scheduled for Server {
    async fn promote(&self, relay: &RelayId, shards: &[OwnedShard], limit: usize) -> Result<Promotion> {
        self.sync();
        // It writes as well, and must wait for its turn.
        let _turn = match self.visibility {
            Visibility::OneWriter => Some(self.writer.lock().await),
            _ => None,
        };
        match self.store.scheduled() {
            Some(scheduled) => scheduled.promote(relay, shards, limit).await,
            None => Ok(Promotion::default()),
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("visibility", &self.visibility)
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}
