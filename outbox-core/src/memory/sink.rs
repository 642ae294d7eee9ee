//! A destination in memory that keeps what it got and fails as it is told.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::Instant;

use super::changes::{Changes, Listener};
use super::lock;
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::Record;
use crate::message::{MessageId, OrderKey};
use crate::sink::{Outcome, Reason, Receipt, Sink, SinkCapabilities};

/// A sink that keeps what it got, in order, and fails as it is told. Clones share it: give one to the relay, keep one.
///
/// It keeps the whole contract of [`Sink`], so a test with it shows what a relay does, not what a loose double does.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// use outbox_core::{MemoryFault, MemorySink, Outcome};
///
/// let sink = MemorySink::new();
/// sink.fail_next(Outcome::Retry("the destination hiccups".into()));
/// sink.fail(MemoryFault::new(Outcome::Poison("too large".into())).topic("films"));
/// sink.begin_outage("nobody home");
/// sink.end_outage();
/// assert!(sink.delivered().is_empty());
/// # Ok(()) }
/// ```
#[derive(Clone, Default)]
pub struct MemorySink {
    shared: Arc<Shared>,
}

/// A scripted failure: which messages, how, how often.
///
/// ```
/// use outbox_core::{MemoryFault, Outcome};
///
/// // The acknowledgement of one message of this key gets lost, the message does not.
/// let fault = MemoryFault::new(Outcome::Unknown("no answer".into())).key("42").times(1).written();
/// ```
#[derive(Debug, Clone)]
#[must_use = "a fault does nothing until MemorySink::fail is called with it"]
pub struct MemoryFault {
    outcome: Outcome,
    topic: Option<Arc<str>>,
    key: Option<Bytes>,
    id: Option<MessageId>,
    times: Option<u32>,
    written: bool,
}

#[derive(Default)]
struct Shared {
    /// Held briefly, never across an await.
    state: Mutex<State>,
    /// For those who wait for one.
    changes: Changes,
}

/// Everything is decided when it is looked at: what is due by then has left, what is not has not. So there is no
/// task behind it, and the same calls at the same times give the same result.
#[derive(Default)]
struct State {
    latency: Duration,
    /// Whether a key goes on behind a message that was refused for good.
    goes_on: bool,
    /// Publishing waits while so many records are under way; none is no limit.
    capacity: Option<usize>,
    faults: Vec<MemoryFault>,
    #[cfg(feature = "sim")]
    judge: Option<Judge>,
    outage: Option<Reason>,
    broken: Option<Reason>,
    delivered: Vec<Record>,
    queue: VecDeque<Batch>,
    last_batch: u64,
    /// Receipts whose outcomes have not been taken.
    open: BTreeSet<u64>,
    outcomes: BTreeMap<u64, Vec<Outcome>>,
    stopped: HashMap<OrderKey, Stop>,
}

struct Batch {
    number: u64,
    due: Instant,
    /// The receipts that were open when it was handed over, its own included: failures that the caller could not
    /// know of.
    open: BTreeSet<u64>,
    records: Vec<Record>,
}

/// Decides what becomes of each record when it is to leave, and takes those over that arrive: a sink with a judge keeps
/// nothing itself. For the simulation.
#[cfg(feature = "sim")]
struct Judge(Box<dyn FnMut(Record) -> Outcome + Send>);

/// Why nothing of a key goes out.
#[derive(Clone, Copy)]
enum Stop {
    /// A record of this batch was not delivered; whoever knows that may send the key again.
    Batch(u64),
    /// Until the next purge.
    Purge,
}

impl MemorySink {
    /// A sink that delivers everything at once.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One that delivers what follows a message that it refused for good, as Kafka's producer does. Give it no fault with
    /// [`Outcome::Retry`]: no such sink may answer so.
    ///
    /// ```
    /// use outbox_core::{MemorySink, Sink};
    ///
    /// assert!(!MemorySink::going_on().capabilities().stops_key_at_failure);
    /// ```
    #[must_use]
    pub fn going_on() -> Self {
        let sink = Self::new();
        lock(&sink.shared.state).goes_on = true;
        sink
    }

    /// What was delivered so far, in order.
    #[must_use]
    pub fn delivered(&self) -> Vec<Record> {
        let mut state = lock(&self.shared.state);
        state.advance(Instant::now());
        state.delivered.clone()
    }

    /// Takes out what was delivered so far.
    #[must_use]
    pub fn take_delivered(&self) -> Vec<Record> {
        let mut state = lock(&self.shared.state);
        state.advance(Instant::now());
        std::mem::take(&mut state.delivered)
    }

    /// Waits until at least `count` messages have been delivered, and gives them all. Put a timeout around it.
    ///
    /// ```
    /// # use std::{sync::Arc, time::Duration};
    /// # use outbox_core::{MemorySink, MemoryStore, Message, Relay};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let (store, sink) = (MemoryStore::default(), MemorySink::new());
    /// # let mut tx = store.begin();
    /// # store.enqueue(&mut tx, &Message::builder("orders").build()?).await?;
    /// # tx.commit();
    /// # let relay = Relay::new(Arc::new(store), Box::new(sink.clone()));
    /// tokio::spawn(relay.run(std::future::pending()));
    /// let delivered = tokio::time::timeout(Duration::from_secs(10), sink.wait_for(1)).await?;
    /// assert_eq!(delivered[0].message.topic(), "orders");
    /// # Ok(()) }
    /// ```
    pub async fn wait_for(&self, count: usize) -> Vec<Record> {
        let mut changes = self.shared.changes.listen();
        loop {
            let delivered = self.delivered();
            if delivered.len() >= count {
                return delivered;
            }
            let due = lock(&self.shared.state).queue.front().map(|batch| batch.due);
            wait(&mut changes, due).await;
        }
    }

    /// The next message gets this outcome, whatever it is.
    pub fn fail_next(&self, outcome: Outcome) {
        self.fail(MemoryFault::new(outcome).times(1));
    }

    /// Messages that fit get the fault's outcome. Of several faults that fit the oldest counts.
    pub fn fail(&self, fault: MemoryFault) {
        lock(&self.shared.state).faults.push(fault);
    }

    /// Forgets all faults. An outage goes on.
    pub fn clear_faults(&self) {
        lock(&self.shared.state).faults.clear();
    }

    /// From now on nobody can go.
    pub fn begin_outage(&self, reason: impl Into<Reason>) {
        lock(&self.shared.state).outage = Some(reason.into());
    }

    /// The destination takes messages again.
    pub fn end_outage(&self) {
        lock(&self.shared.state).outage = None;
    }

    /// How long messages are under way, from now on. Zero is at once, and the default.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> outbox_core::Result<()> {
    /// # use std::time::Duration;
    /// use outbox_core::{MemorySink, MemoryStore, Message, Outcome, Sink};
    ///
    /// # let store = MemoryStore::default();
    /// # let mut tx = store.begin();
    /// # store.enqueue(&mut tx, &Message::builder("orders").build()?).await?;
    /// # tx.commit();
    /// let mut sink = MemorySink::new();
    /// sink.set_latency(Duration::from_millis(100));
    /// let receipt = sink.publish(store.pending()).await;
    /// assert!(sink.delivered().is_empty()); // under way
    /// assert_eq!(receipt.outcomes().await, [Outcome::Delivered]);
    /// # Ok(()) }
    /// ```
    pub fn set_latency(&self, latency: Duration) {
        lock(&self.shared.state).latency = latency;
    }

    /// How many records may be under way before publishing waits; one batch always may. Without a limit at first.
    pub fn set_capacity(&self, records: usize) {
        lock(&self.shared.state).capacity = Some(records);
    }

    /// Asks for each record that is to leave what becomes of it.
    #[cfg(feature = "sim")]
    pub(crate) fn judge_by(&self, judge: impl FnMut(Record) -> Outcome + Send + 'static) {
        lock(&self.shared.state).judge = Some(Judge(Box::new(judge)));
    }

    fn changed(&self) {
        self.shared.changes.tell();
    }
}

impl MemoryFault {
    /// Every message, every time.
    pub const fn new(outcome: Outcome) -> Self {
        Self {
            outcome,
            topic: None,
            key: None,
            id: None,
            times: None,
            written: false,
        }
    }

    /// Only messages of this topic.
    pub fn topic(mut self, topic: impl Into<Arc<str>>) -> Self {
        self.topic = Some(topic.into());
        self
    }

    /// Only messages of this key.
    pub fn key(mut self, key: impl Into<Bytes>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Only the message of this id.
    pub const fn id(mut self, id: MessageId) -> Self {
        self.id = Some(id);
        self
    }

    /// Only so many times.
    pub const fn times(mut self, times: u32) -> Self {
        self.times = Some(times);
        self
    }

    /// The message arrives all the same: for [`Outcome::Unknown`] and [`Outcome::Broken`].
    pub const fn written(mut self) -> Self {
        self.written = true;
        self
    }

    fn fits(&self, record: &Record) -> bool {
        let message = &record.message;
        self.times != Some(0)
            && self.topic.as_deref().is_none_or(|topic| topic == message.topic())
            && self.key.as_ref().is_none_or(|key| message.key() == Some(key))
            && self.id.is_none_or(|id| id == message.id())
    }
}

impl State {
    /// Lets everything leave that is due.
    fn advance(&mut self, now: Instant) {
        while self.queue.front().is_some_and(|batch| batch.due <= now)
            && let Some(batch) = self.queue.pop_front()
        {
            let Batch {
                number,
                open,
                records,
                ..
            } = batch;
            let outcomes = records
                .into_iter()
                .map(|record| self.send(record, number, &open))
                .collect();
            self.finish(number, outcomes);
        }
    }

    fn send(&mut self, record: Record, batch: u64, open: &BTreeSet<u64>) -> Outcome {
        let key = record.message.order_key();
        if let Some(reason) = &self.broken {
            return Outcome::Broken(reason.clone());
        }
        let stopped = key.as_ref().and_then(|key| self.stopped.get(key));
        let outcome = match stopped {
            Some(Stop::Purge) => return Outcome::Skipped,
            Some(Stop::Batch(failed)) if open.contains(failed) => Outcome::Skipped,
            _ => self.attempt(record),
        };
        let stop = match &outcome {
            Outcome::Delivered => None,
            Outcome::Outage(_) | Outcome::Unknown(_) | Outcome::Broken(_) => Some(Stop::Purge),
            Outcome::Poison(_) if self.goes_on => None,
            Outcome::Poison(_) | Outcome::Retry(_) | Outcome::TopicBlocked(_) | Outcome::Skipped => {
                Some(Stop::Batch(batch))
            }
        };
        match (key, stop) {
            (Some(key), Some(stop)) => drop(self.stopped.insert(key, stop)),
            (Some(key), None) => drop(self.stopped.remove(&key)),
            (None, _) => {}
        }
        outcome
    }

    fn attempt(&mut self, record: Record) -> Outcome {
        if let Some(reason) = &self.outage {
            return Outcome::Outage(reason.clone());
        }
        #[cfg(feature = "sim")]
        if let Some(Judge(judge)) = &mut self.judge {
            let outcome = judge(record);
            if let Outcome::Broken(reason) = &outcome {
                self.broken = Some(reason.clone());
            }
            return outcome;
        }
        let Some(fault) = self.faults.iter_mut().find(|fault| fault.fits(&record)) else {
            self.delivered.push(record);
            return Outcome::Delivered;
        };
        fault.times = fault.times.map(|times| times - 1);
        let outcome = fault.outcome.clone();
        if fault.written || outcome == Outcome::Delivered {
            self.delivered.push(record);
        }
        self.faults.retain(|fault| fault.times != Some(0));
        if let Outcome::Broken(reason) = &outcome {
            self.broken = Some(reason.clone());
        }
        outcome
    }

    /// Drops what has not left, and lets the caller send every key again.
    fn purge(&mut self, now: Instant) {
        self.advance(now);
        for batch in std::mem::take(&mut self.queue) {
            let outcome = Outcome::Unknown("purged before it left".into());
            self.finish(batch.number, vec![outcome; batch.records.len()]);
        }
        self.stopped.clear();
    }

    fn finish(&mut self, batch: u64, outcomes: Vec<Outcome>) {
        // Nobody asks for it any more when the receipt was dropped.
        if self.open.contains(&batch) {
            self.outcomes.insert(batch, outcomes);
        }
    }

    fn has_room(&self) -> bool {
        let under_way: usize = self.queue.iter().map(|batch| batch.records.len()).sum();
        self.queue.is_empty() || self.capacity.is_none_or(|capacity| under_way < capacity)
    }
}

#[async_trait]
impl Sink for MemorySink {
    fn capabilities(&self) -> SinkCapabilities {
        SinkCapabilities {
            name: "memory",
            stops_key_at_failure: !lock(&self.shared.state).goes_on,
        }
    }

    async fn publish(&mut self, batch: Vec<Record>) -> Receipt {
        let mut changes = self.shared.changes.listen();
        // It has the batch from here on: of what fails while it waits for room the caller cannot know yet.
        let open = lock(&self.shared.state).open.clone();
        let ticket = loop {
            let due = {
                let mut state = lock(&self.shared.state);
                state.advance(Instant::now());
                if state.has_room() {
                    break self.accept(&mut state, batch, open);
                }
                state.queue.front().map(|batch| batch.due)
            };
            wait(&mut changes, due).await;
        };
        self.changed();
        Receipt::pending(ticket.outcomes())
    }

    async fn probe(&mut self) -> Result<()> {
        let state = lock(&self.shared.state);
        match state.outage.as_ref().or(state.broken.as_ref()) {
            Some(reason) => Err(Error::new(
                ErrorKind::Unavailable,
                "probe",
                reason.as_str().to_owned(),
            )),
            None => Ok(()),
        }
    }

    async fn purge(&mut self) {
        lock(&self.shared.state).purge(Instant::now());
        self.changed();
    }

    async fn rebuild(&mut self) -> Result<()> {
        {
            let mut state = lock(&self.shared.state);
            state.purge(Instant::now());
            state.broken = None;
        }
        self.changed();
        Ok(())
    }
}

impl MemorySink {
    fn accept(&self, state: &mut State, records: Vec<Record>, mut open: BTreeSet<u64>) -> Ticket {
        state.last_batch += 1;
        let number = state.last_batch;
        let due = Instant::now() + state.latency;
        state.open.insert(number);
        open.insert(number);
        state.queue.push_back(Batch {
            number,
            due,
            open,
            records,
        });
        state.advance(Instant::now());
        Ticket {
            sink: self.clone(),
            number,
            due,
        }
    }
}

/// An open receipt. Dropping it closes it; what it stands for goes out all the same.
struct Ticket {
    sink: MemorySink,
    number: u64,
    due: Instant,
}

impl Ticket {
    async fn outcomes(self) -> Vec<Outcome> {
        let mut changes = self.sink.shared.changes.listen();
        loop {
            let outcomes = {
                let mut state = lock(&self.sink.shared.state);
                state.advance(Instant::now());
                state.outcomes.remove(&self.number)
            };
            if let Some(outcomes) = outcomes {
                self.sink.changed();
                return outcomes;
            }
            wait(&mut changes, Some(self.due)).await;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = lock(&self.sink.shared.state);
        state.open.remove(&self.number);
        state.outcomes.remove(&self.number);
    }
}

/// Waits for a change or until `due`.
async fn wait(changes: &mut Listener, due: Option<Instant>) {
    match due {
        Some(due) => drop(tokio::time::timeout_at(due, changes.changed()).await),
        None => changes.changed().await,
    }
}

impl fmt::Debug for MemorySink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.shared.state);
        f.debug_struct("MemorySink")
            .field("delivered", &state.delivered.len())
            .field("outage", &state.outage)
            .field("broken", &state.broken)
            .finish_non_exhaustive()
    }
}
