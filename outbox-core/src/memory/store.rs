//! The relay's side: leases, settlements and what people want to know.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::changes::{Changes, Listener};
use super::config::MemoryConfig;
use super::lock;
use super::reader::MemoryReader;
#[cfg(feature = "sim")]
use super::state::Row;
use super::state::{State, StoredHold, hold_name};
use crate::dead::DeadLetters;
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::Record;
use crate::hold::{Hold, HoldChange, HoldState, Parking};
use crate::inspect::{Inspection, Subject};
#[cfg(feature = "conformance")]
use crate::lease::LeaseTable;
use crate::lease::{LeaseRequest, Leases, Membership, RelayId, StoreMillis};
use crate::message::{MessageId, OrderKey};
use crate::retention::Retention;
use crate::scheduled::Scheduled;
use crate::settle::{Settled, Settlement, ShardSettlement};
use crate::shard::OwnedShard;
use crate::store::{Capabilities, Count, OutboxStore, Reader, Stats};
use crate::wake::WakeUp;

/// A store in memory, with every optional power. Clones share it.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// use outbox_core::{MemoryStore, Message};
///
/// let store = MemoryStore::default();
/// let mut tx = store.begin();
/// store.enqueue(&mut tx, &Message::builder("orders").key("42").payload("placed").build()?).await?;
/// assert!(store.pending().is_empty()); // not before the commit
/// tx.commit();
/// assert_eq!(store.pending()[0].message.topic(), "orders");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct MemoryStore {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) config: MemoryConfig,
    /// Everything that is committed. Held briefly and never across an await; never taken while `counters` or
    /// `claims` is held.
    pub(super) state: Mutex<State>,
    /// Under [`crate::Ordering::Sequenced`] each key's counter, which a transaction keeps locked until its end.
    counters: Mutex<Locks<OrderKey, i64>>,
    /// One lock for each message id that a consumer's open transaction has noted.
    claims: Mutex<Locks<(Arc<str>, MessageId), ()>>,
    /// Commits, to wake relays.
    pub(super) commits: Changes,
    /// The database's clock: a wall clock that goes on as tokio's does.
    born: (SystemTime, Instant),
}

/// Locks that a transaction can keep until its end.
type Locks<K, V> = HashMap<K, Arc<tokio::sync::Mutex<V>>>;

/// Locked counters of keys.
pub(super) type Counters = BTreeMap<OrderKey, OwnedMutexGuard<i64>>;

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new(config: MemoryConfig) -> Self {
        Self::born(config, SystemTime::now())
    }

    /// An empty store whose clock shows this time.
    pub(crate) fn born(config: MemoryConfig, wall: SystemTime) -> Self {
        let shards = config.shards.max(1);
        Self {
            inner: Arc::new(Inner {
                config: MemoryConfig { shards, ..config },
                state: Mutex::new(State::new(shards)),
                counters: Mutex::default(),
                claims: Mutex::default(),
                commits: Changes::default(),
                born: (wall, Instant::now()),
            }),
        }
    }

    /// How it was configured.
    #[must_use]
    pub fn config(&self) -> &MemoryConfig {
        &self.inner.config
    }

    /// The time by the store's own clock, which leases, due times and ages go by.
    #[must_use]
    pub fn now(&self) -> SystemTime {
        let (wall, instant) = self.inner.born;
        wall + instant.elapsed()
    }

    /// What is visible and undelivered, held or not, in order of position: for assertions in tests.
    #[must_use]
    pub fn pending(&self) -> Vec<Record> {
        let state = lock(&self.inner.state);
        state
            .rows
            .iter()
            .map(|(position, row)| row.record(*position))
            .collect()
    }

    /// Brings back what was settled, as a server does that comes up without its last commit.
    #[cfg(feature = "sim")]
    pub(crate) fn restore(&self, records: Vec<Record>) {
        let mut state = lock(&self.inner.state);
        for record in records {
            let row = Row {
                shard: record.shard,
                key_seq: record.key_seq,
                message: record.message,
            };
            state.rows.insert(record.position, row);
        }
    }

    /// Writes what was settled of shards whose epochs are held.
    fn apply(&self, state: &mut State, kept: &[&ShardSettlement], now: SystemTime) -> Result<()> {
        if !self.inner.config.dead_letters && kept.iter().any(|part| !part.dead.is_empty()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "settle",
                "this store keeps no dead letters",
            ));
        }
        for part in kept {
            for record in &part.delivered {
                if let Some(row) = state.take(part.shard, *record)
                    && self.inner.config.archive
                {
                    state.processed.insert((now, record.position), row.message);
                }
            }
            for death in &part.dead {
                state.bury(part.shard, death.record, death.attempts, &death.reason, now);
            }
            for change in &part.holds {
                match change {
                    HoldChange::Put(hold) => {
                        let name = hold_name(&hold.reference());
                        state.holds.insert(name, StoredHold::new(hold.clone(), now));
                    }
                    HoldChange::Clear(hold) => {
                        state.holds.remove(&hold_name(hold));
                    }
                }
            }
        }
        Ok(())
    }

    /// Settles without looking at the epochs: for the stores that are broken on purpose.
    #[cfg(feature = "conformance")]
    pub(crate) fn settle_unfenced(&self, settlement: &Settlement) -> Result<()> {
        let parts: Vec<_> = settlement.shards.iter().collect();
        self.apply(&mut lock(&self.inner.state), &parts, self.now())
    }

    /// The leases and the time that they go by: for the stores that are broken on purpose.
    #[cfg(feature = "conformance")]
    pub(crate) fn with_leases<T>(&self, change: impl FnOnce(&mut LeaseTable, StoreMillis) -> T) -> T {
        change(&mut lock(&self.inner.state).leases, self.millis())
    }

    /// The clock of the leases.
    pub(super) fn millis(&self) -> StoreMillis {
        StoreMillis::try_from(self.inner.born.1.elapsed().as_millis()).unwrap_or(StoreMillis::MAX)
    }

    /// Locks the counters of these keys, in their order, so that two calls cannot wait for each other.
    pub(super) async fn lock_counters(&self, keys: BTreeSet<OrderKey>) -> Result<Counters> {
        let mut locked = Counters::new();
        for key in keys {
            let counter = lock(&self.inner.counters).entry(key.clone()).or_default().clone();
            let guard = self.wait(counter, "enqueue").await?;
            locked.insert(key, guard);
        }
        Ok(locked)
    }

    /// The last number that a key was given; none while a transaction has its counter, which nobody waits for here.
    pub(super) fn last_number(&self, subject: &Subject) -> Option<i64> {
        let Subject::Key(key) = subject else { return None };
        let counter = lock(&self.inner.counters).get(key).cloned()?;
        counter.try_lock().ok().map(|last| *last).filter(|last| *last > 0)
    }

    /// Claims a message id for a consumer's transaction, waiting for another one that has it.
    pub(super) async fn claim(&self, name: &(Arc<str>, MessageId)) -> Result<OwnedMutexGuard<()>> {
        let claim = {
            let mut claims = lock(&self.inner.claims);
            claims.retain(|_, claim| Arc::strong_count(claim) > 1);
            claims.entry(name.clone()).or_default().clone()
        };
        self.wait(claim, "receive").await
    }

    async fn wait<T>(
        &self,
        mutex: Arc<tokio::sync::Mutex<T>>,
        operation: &'static str,
    ) -> Result<OwnedMutexGuard<T>> {
        tokio::time::timeout(self.inner.config.lock_wait, mutex.lock_owned())
            .await
            .map_err(|elapsed| {
                Error::new(
                    ErrorKind::Conflict,
                    operation,
                    "another transaction keeps the lock; very likely the two wait for each other",
                )
                .with_source(elapsed)
            })
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new(MemoryConfig::default())
    }
}

#[async_trait]
impl OutboxStore for MemoryStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities::all("memory", self.inner.config.shards, self.inner.config.ordering)
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        Ok(lock(&self.inner.state).leases.lease(request, self.millis()))
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        lock(&self.inner.state).leases.release(relay, shards, membership);
        Ok(())
    }

    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>> {
        let now = self.now();
        let state = lock(&self.inner.state);
        Ok(state
            .holds
            .iter()
            .filter(|((shard, ..), _)| shards.iter().any(|owned| owned.shard == *shard))
            .map(|(_, stored)| stored.at(now))
            .collect())
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        Ok(Box::new(MemoryReader(self.clone())))
    }

    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        let now = self.now();
        // The state's lock is what excludes a take-over between the look at the epochs and the last change.
        let mut state = lock(&self.inner.state);
        let held = state.leases.held_by(&settlement.relay, self.millis());
        let (kept, lost) = settlement.fence(&held);
        self.apply(&mut state, &kept, now)?;
        Ok(Settled { lost })
    }

    async fn stats(&self) -> Result<Stats> {
        let now = self.now();
        let millis = self.millis();
        let state = lock(&self.inner.state);
        let oldest = state
            .rows
            .values()
            .filter_map(|row| row.message.created_at())
            .min();
        let parked = state
            .holds
            .values()
            .filter(|stored| stored.at(now).state == HoldState::Parked)
            .count();
        Ok(Stats {
            backlog: Count::Exact(count(state.rows.len())),
            oldest_age: oldest.map(|oldest| now.duration_since(oldest).unwrap_or(Duration::ZERO)),
            retrying: count(state.holds.len() - parked),
            parked: count(parked),
            dead: count(state.dead.len()),
            scheduled: count(state.scheduled.len()),
            processed: Count::Exact(count(state.processed.len())),
            leases: state.leases.status(millis),
            relays: state.leases.relays(millis),
        })
    }

    fn dead_letters(&self) -> Option<&dyn DeadLetters> {
        self.inner.config.dead_letters.then_some(self)
    }

    fn scheduled(&self) -> Option<&dyn Scheduled> {
        self.inner.config.scheduled.then_some(self)
    }

    fn retention(&self) -> Option<&dyn Retention> {
        self.inner.config.archive.then_some(self)
    }

    fn parking(&self) -> Option<&dyn Parking> {
        self.inner.config.parking.then_some(self)
    }

    fn inspection(&self) -> Option<&dyn Inspection> {
        Some(self)
    }

    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        self.inner
            .config
            .wake_up
            .then(|| Box::new(CommitWakeUp(self.inner.commits.listen())) as _)
    }
}

/// Wakes at every commit since the last wake-up.
struct CommitWakeUp(Listener);

#[async_trait]
impl WakeUp for CommitWakeUp {
    async fn wait(&mut self) {
        self.0.changed().await;
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore")
            .field("config", &self.inner.config)
            .finish_non_exhaustive()
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
