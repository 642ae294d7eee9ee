//! A store that can be watched and told to fail, and relays to run over it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::{
    Capabilities, DeadLetterQuery, DeadLetters, Error, ErrorKind, FetchRequest, Fetched, Hold, Inspection,
    LeaseRequest, Leases, Membership, MemoryConfig, MemorySink, MemoryStore, Message, OutboxStore,
    OwnedShard, Parking, Reader, Record, Relay, RelayConfig, RelayId, Result, Retention, Scheduled, Settled,
    Settlement, Stats, WakeUp,
};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// What a call is to do.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// It fails.
    Error,
    /// It is done, and the answer is lost.
    Lost,
    /// It never answers.
    Hang,
    /// It is done later.
    Late(Duration),
    /// It is as it should be.
    None,
}

/// A `MemoryStore` whose calls are counted and fail as they are told. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    pub(crate) memory: MemoryStore,
    shared: Arc<Mutex<Script>>,
}

#[derive(Debug, Default)]
struct Script {
    faults: BTreeMap<&'static str, VecDeque<Fault>>,
    always: BTreeMap<&'static str, Fault>,
    calls: BTreeMap<&'static str, usize>,
    requests: Vec<(usize, usize, usize)>,
    defects: BTreeSet<Vec<u8>>,
}

impl Store {
    pub(crate) fn new(config: MemoryConfig) -> Self {
        Self {
            memory: MemoryStore::new(config),
            shared: Arc::default(),
        }
    }

    /// The next calls of an operation go like this.
    pub(crate) fn script(&self, operation: &'static str, faults: impl IntoIterator<Item = Fault>) {
        let mut script = self.shared.lock().unwrap();
        script.faults.entry(operation).or_default().extend(faults);
    }

    /// All calls of an operation go like this, until it is told otherwise.
    pub(crate) fn always(&self, operation: &'static str, fault: Fault) {
        self.shared.lock().unwrap().always.insert(operation, fault);
    }

    pub(crate) fn calls(&self, operation: &'static str) -> usize {
        self.shared
            .lock()
            .unwrap()
            .calls
            .get(operation)
            .copied()
            .unwrap_or_default()
    }

    pub(crate) fn all_calls(&self) -> usize {
        self.shared.lock().unwrap().calls.values().sum()
    }

    /// Of each read: how much was asked for at most, how much was in flight, and how many bytes came.
    pub(crate) fn requests(&self) -> Vec<(usize, usize, usize)> {
        self.shared.lock().unwrap().requests.clone()
    }

    /// Rows with this payload make no sense.
    pub(crate) fn defect(&self, payload: &str) {
        let mut script = self.shared.lock().unwrap();
        script.defects.insert(payload.as_bytes().to_vec());
    }

    pub(crate) fn handles(&self) -> usize {
        Arc::strong_count(&self.shared)
    }

    pub(crate) async fn enqueue(&self, topic: &str, key: Option<&str>, payload: impl Into<String>) {
        let mut builder = Message::builder(topic).payload(payload.into());
        if let Some(key) = key {
            builder = builder.key(key.to_owned());
        }
        self.enqueue_message(&builder.build().unwrap()).await;
    }

    pub(crate) async fn enqueue_message(&self, message: &Message) {
        let mut tx = self.memory.begin();
        self.memory.enqueue(&mut tx, message).await.unwrap();
        tx.commit();
    }

    pub(crate) async fn dead(&self) -> Vec<(String, u32)> {
        let letters = DeadLetters::list(&self.memory, &DeadLetterQuery::default())
            .await
            .unwrap();
        letters
            .iter()
            .map(|letter| (text(&letter.message), letter.attempts))
            .collect()
    }

    /// How many shards each relay owns.
    pub(crate) async fn owners(&self) -> BTreeMap<String, usize> {
        let mut owners = BTreeMap::new();
        for lease in self.memory.stats().await.unwrap().leases {
            if let Some(owner) = lease.owner {
                *owners.entry(owner.to_string()).or_default() += 1;
            }
        }
        owners
    }

    async fn call<T>(&self, operation: &'static str, call: impl Future<Output = Result<T>>) -> Result<T> {
        let fault = {
            let mut script = self.shared.lock().unwrap();
            *script.calls.entry(operation).or_default() += 1;
            script
                .faults
                .get_mut(operation)
                .and_then(VecDeque::pop_front)
                .or_else(|| script.always.get(operation).copied())
                .unwrap_or(Fault::None)
        };
        let failed = || Error::new(ErrorKind::Unavailable, operation, "told to fail");
        match fault {
            Fault::None => call.await,
            Fault::Error => Err(failed()),
            Fault::Lost => {
                call.await?;
                Err(failed())
            }
            Fault::Hang => std::future::pending().await,
            Fault::Late(pause) => {
                sleep(pause).await;
                call.await
            }
        }
    }
}

#[async_trait]
impl OutboxStore for Store {
    fn capabilities(&self) -> Capabilities {
        self.memory.capabilities()
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        self.call("lease", self.memory.lease(request)).await
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        self.call("release", self.memory.release(relay, shards, membership))
            .await
    }

    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>> {
        self.call("holds", self.memory.holds(shards)).await
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        let reader = self.call("reader", self.memory.reader()).await?;
        Ok(Box::new(WatchedReader(self.clone(), reader)))
    }

    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        self.call("settle", self.memory.settle(settlement)).await
    }

    async fn stats(&self) -> Result<Stats> {
        self.call("stats", self.memory.stats()).await
    }

    fn dead_letters(&self) -> Option<&dyn DeadLetters> {
        self.memory.dead_letters()
    }

    fn scheduled(&self) -> Option<&dyn Scheduled> {
        self.memory.scheduled()
    }

    fn retention(&self) -> Option<&dyn Retention> {
        self.memory.retention().map(|_| self as &dyn Retention)
    }

    fn parking(&self) -> Option<&dyn Parking> {
        self.memory.parking()
    }

    fn inspection(&self) -> Option<&dyn Inspection> {
        self.memory.inspection()
    }

    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        self.memory.wake_up()
    }
}

#[async_trait]
impl Retention for Store {
    async fn purge(&self, age: Duration, limit: usize) -> Result<usize> {
        self.call("purge", Retention::purge(&self.memory, age, limit))
            .await
    }
}

#[derive(Debug)]
struct WatchedReader(Store, Box<dyn Reader>);

#[async_trait]
impl Reader for WatchedReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        let Self(store, reader) = self;
        let mut fetched = store.call("fetch", reader.fetch(request)).await?;
        if let Fetched::Batch { records, .. } = &mut fetched {
            let mut script = store.shared.lock().unwrap();
            let bytes = records.iter().map(|record| record.message.size()).sum();
            script
                .requests
                .push((request.max_rows, request.in_flight.len(), bytes));
            for record in records {
                let payload = record.message.payload().map(|payload| payload.to_vec());
                if payload.is_some_and(|payload| script.defects.contains(&payload)) {
                    record.defect = Some("no sense".to_owned());
                }
            }
        }
        Ok(fetched)
    }
}

/// A relay that runs as a task of its own.
pub(crate) struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<()>>,
}

impl Running {
    pub(crate) fn start(relay: Relay) -> Self {
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        Self {
            stop,
            task: tokio::spawn(relay.run(shutdown)),
        }
    }

    /// An orderly end.
    pub(crate) async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.unwrap().unwrap();
    }

    /// A crash.
    pub(crate) async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

pub(crate) fn config() -> RelayConfig {
    RelayConfig {
        lease: Duration::from_secs(3),
        ..RelayConfig::default()
    }
}

pub(crate) fn relay(name: &str, store: &Store, sink: &MemorySink, config: RelayConfig) -> Relay {
    Relay::new(Arc::new(store.clone()), Box::new(sink.clone()))
        .with_id(RelayId::new(name))
        .with_config(config)
        .with_seed(7)
}

pub(crate) fn start(name: &str, store: &Store, sink: &MemorySink, config: RelayConfig) -> Running {
    Running::start(relay(name, store, sink, config))
}

pub(crate) fn text(message: &Message) -> String {
    String::from_utf8_lossy(message.payload().unwrap()).into_owned()
}

pub(crate) fn texts(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| text(&record.message)).collect()
}

/// Waits for so many deliveries, no longer than this.
pub(crate) async fn delivered(sink: &MemorySink, count: usize, within: Duration) -> Vec<String> {
    let Ok(records) = timeout(within, sink.wait_for(count)).await else {
        panic!(
            "{} of {count} were delivered within {within:?}: {:?}",
            sink.delivered().len(),
            texts(&sink.delivered())
        )
    };
    texts(&records)
}

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const MINUTE: Duration = Duration::from_secs(60);
