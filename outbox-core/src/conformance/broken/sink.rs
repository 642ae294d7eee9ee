//! Sinks with one flaw each.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::{Either, select};
use tokio::sync::watch;

use super::flaw::flaws;
use crate::conformance::{SinkFault, SinkHarness, TOPICS};
use crate::error::Result;
use crate::fetch::Record;
use crate::headers::Headers;
use crate::memory::{MemoryFault, MemorySink};
use crate::message::{Message, MessageId};
use crate::sink::{Outcome, Receipt, Sink, SinkCapabilities};

tokio::task_local! {
    static FLAW: SinkFlaw;
}

/// Runs a future, in which every [`BrokenSink`] has this flaw.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use outbox_core::conformance::broken::{BrokenSink, SinkFlaw, with_sink_flaw};
/// use outbox_core::conformance::prove_sink;
///
/// // A sink that loses headers still keeps the order.
/// with_sink_flaw(SinkFlaw::LosesHeaders, prove_sink::<BrokenSink>("order_within_key")).await;
/// # }
/// ```
pub async fn with_sink_flaw<F: Future>(flaw: SinkFlaw, future: F) -> F::Output {
    FLAW.scope(flaw, future).await
}

flaws! {
    /// What is wrong with a [`BrokenSink`].
    ///
    /// ```
    /// use outbox_core::conformance::broken::SinkFlaw;
    ///
    /// assert!(SinkFlaw::ALL.contains(&SinkFlaw::ReportsEarly));
    /// ```
    SinkFlaw {
        /// When much is handed over, puts some aside and sends it later.
        ReordersUnderPressure,
        /// Sends batches side by side.
        ReordersBatches,
        /// Reports what it has queued as delivered.
        ReportsEarly,
        /// Forgets the last outcome of a batch.
        DropsAnOutcome,
        /// Gives the outcomes in the order in which they became known.
        MixesOutcomes,
        /// Takes the whole batch for poison when one message is.
        PoisonFailsBatch,
        /// Takes poison for something that may go later.
        PoisonIsRetried,
        /// Says that it stops a key at a failure, and goes on.
        GoesOnAfterFailure,
        /// Says that it goes on after a failure, and asks for retries.
        RetriesThoughItGoesOn,
        /// Blocks all topics for one.
        BlocksEverything,
        /// Goes on with a key when its topic takes messages again, though its caller knows of nothing.
        ForgetsBlock,
        /// Takes an outage for a failure of each message.
        OutageIsPoison,
        /// Goes on with a key after an outage, though its caller knows of nothing.
        ForgetsOutage,
        /// Says that all is well in an outage.
        ProbeSaysYes,
        /// Waits in a probe for the outage to end.
        ProbeWaits,
        /// Leaves receipts open when it is purged.
        PurgeLeavesReceiptsOpen,
        /// Resolves receipts when it is purged, and sends what it has all the same.
        PurgeDropsNothing,
        /// Cannot be used after a purge.
        PurgeEndsIt,
        /// Is as broken after a rebuild as before.
        RebuildDoesNothing,
        /// Sends each message twice.
        SendsTwice,
        /// Sends no headers of the user's.
        LosesHeaders,
        /// Sends a tombstone as an empty payload.
        EmptyForTombstone,
        /// Gives each message an id of its own.
        LosesIds,
    }
}

/// A sink to memory with the flaw that [`with_sink_flaw`] says, and its harness.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use outbox_core::conformance::SinkHarness;
/// use outbox_core::conformance::broken::{BrokenSink, SinkFlaw, with_sink_flaw};
///
/// let harness = with_sink_flaw(SinkFlaw::SendsTwice, BrokenSink::fresh()).await;
/// assert!(harness.delivered().await.is_empty());
/// # }
/// ```
pub struct BrokenSink {
    inner: MemorySink,
    flaw: SinkFlaw,
}

#[async_trait]
impl SinkHarness for BrokenSink {
    async fn fresh() -> Self {
        Self {
            inner: MemorySink::new(),
            flaw: FLAW.get(),
        }
    }

    async fn sink(&self) -> Box<dyn Sink> {
        if self.flaw == SinkFlaw::ReportsEarly {
            self.inner.set_latency(Duration::from_millis(50));
        }
        Box::new(FlawedSink {
            inner: self.inner.clone(),
            flaw: self.flaw,
            aside: Arc::default(),
            purges: watch::Sender::new(0),
            batches: AtomicU64::new(0),
            ended: false,
        })
    }

    async fn delivered(&self) -> Vec<Message> {
        self.inner
            .delivered()
            .into_iter()
            .map(|record| record.message)
            .collect()
    }

    fn faults(&self) -> &'static [SinkFault] {
        use SinkFault::{Block, Break, Delay, Outage, Refuse};
        &[Refuse, Block, Outage, Break, Delay]
    }

    async fn inject(&self, fault: SinkFault, message: MessageId) {
        let script = |outcome| self.inner.fail(MemoryFault::new(outcome).id(message).times(1));
        match fault {
            SinkFault::Refuse => script(Outcome::Retry("refused".into())),
            SinkFault::Break => script(Outcome::Broken("broken".into())),
            SinkFault::Block => {
                let blocked = Outcome::TopicBlocked("blocked".into());
                self.inner.fail(MemoryFault::new(blocked).topic(TOPICS[1]));
            }
            SinkFault::Outage => self.inner.begin_outage("nobody home"),
            SinkFault::Heal => {
                self.inner.end_outage();
                self.inner.clear_faults();
            }
            SinkFault::Delay => self.inner.set_latency(Duration::from_millis(200)),
        }
    }

    async fn poison(&self, key: &'static str) -> Option<Message> {
        let message = Message::builder(TOPICS[0]).key(key).payload("poison").build();
        let message = message.unwrap();
        let poison = Outcome::Poison("it can never go".into());
        self.inner.fail(MemoryFault::new(poison).id(message.id()));
        Some(message)
    }
}

#[derive(Debug)]
struct FlawedSink {
    inner: MemorySink,
    flaw: SinkFlaw,
    /// A batch that was put aside, until the next one is out or its receipt is asked for.
    aside: Arc<Mutex<Option<Vec<Record>>>>,
    purges: watch::Sender<u64>,
    batches: AtomicU64,
    ended: bool,
}

#[async_trait]
impl Sink for FlawedSink {
    fn capabilities(&self) -> SinkCapabilities {
        SinkCapabilities {
            stops_key_at_failure: self.flaw != SinkFlaw::RetriesThoughItGoesOn,
            ..self.inner.capabilities()
        }
    }

    async fn publish(&mut self, batch: Vec<Record>) -> Receipt {
        let count = batch.len();
        let mut batch: Vec<Record> = batch.into_iter().map(|record| self.spoil(record)).collect();
        let number = self.batches.fetch_add(1, SeqCst);
        if self.ended {
            return Receipt::ready(vec![Outcome::Unknown("closed".into()); count]);
        }
        match self.flaw {
            SinkFlaw::ReordersUnderPressure if count >= 200 => {
                batch.rotate_left(100);
                let receipt = self.inner.publish(batch).await;
                Receipt::pending(async move {
                    let mut outcomes = receipt.outcomes().await;
                    outcomes.rotate_right(100);
                    outcomes
                })
            }
            SinkFlaw::ReordersBatches if number.is_multiple_of(2) => {
                *self.aside.lock().unwrap() = Some(batch);
                Receipt::pending(send_aside(self.inner.clone(), self.aside.clone(), count))
            }
            SinkFlaw::ReordersBatches => {
                let receipt = self.inner.publish(batch).await;
                drop(send_aside(self.inner.clone(), self.aside.clone(), 0).await);
                receipt
            }
            SinkFlaw::ReportsEarly => {
                drop(self.inner.publish(batch).await);
                Receipt::ready(vec![Outcome::Delivered; count])
            }
            SinkFlaw::SendsTwice => {
                drop(self.inner.publish(batch.clone()).await.outcomes().await);
                self.inner.publish(batch).await
            }
            SinkFlaw::GoesOnAfterFailure | SinkFlaw::RetriesThoughItGoesOn => self.go_on(batch).await,
            SinkFlaw::ForgetsOutage => self.forget_outage(batch).await,
            SinkFlaw::ForgetsBlock if batch.iter().any(|record| record.message.topic() == TOPICS[1]) => {
                self.go_on(batch).await
            }
            SinkFlaw::PurgeDropsNothing | SinkFlaw::PurgeLeavesReceiptsOpen => {
                let receipt = self.inner.publish(batch).await;
                Receipt::pending(until_purge(receipt, self.purges.subscribe(), self.flaw, count))
            }
            _ => {
                let receipt = self.inner.publish(batch).await;
                let flaw = self.flaw;
                Receipt::pending(async move { mistake(flaw, receipt.outcomes().await) })
            }
        }
    }

    async fn probe(&mut self) -> Result<()> {
        match self.flaw {
            SinkFlaw::ProbeSaysYes => Ok(()),
            SinkFlaw::ProbeWaits => {
                while self.inner.probe().await.is_err() {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Ok(())
            }
            _ => self.inner.probe().await,
        }
    }

    async fn purge(&mut self) {
        self.purges.send_modify(|purges| *purges += 1);
        match self.flaw {
            SinkFlaw::PurgeDropsNothing => {}
            SinkFlaw::PurgeEndsIt => {
                self.inner.purge().await;
                self.ended = true;
            }
            _ => self.inner.purge().await,
        }
    }

    async fn rebuild(&mut self) -> Result<()> {
        match self.flaw {
            SinkFlaw::RebuildDoesNothing => Ok(()),
            _ => self.inner.rebuild().await,
        }
    }
}

impl FlawedSink {
    fn spoil(&self, mut record: Record) -> Record {
        let mut parts = record.message.into_parts();
        match self.flaw {
            SinkFlaw::LosesHeaders => parts.headers = Headers::new(),
            SinkFlaw::EmptyForTombstone => parts.payload = Some(parts.payload.unwrap_or_default()),
            // Those with headers only: the scripted faults go by the id.
            SinkFlaw::LosesIds if !parts.headers.is_empty() => parts.id = MessageId::new(),
            _ => {}
        }
        record.message = Message::from_stored(parts);
        record
    }

    /// Sends message by message, so that nothing stops a key.
    async fn go_on(&mut self, batch: Vec<Record>) -> Receipt {
        let mut outcomes = Vec::new();
        for record in batch {
            outcomes.extend(self.inner.publish(vec![record]).await.outcomes().await);
        }
        Receipt::ready(outcomes)
    }

    /// Sends, and forgets at once that an outage came in between.
    async fn forget_outage(&mut self, batch: Vec<Record>) -> Receipt {
        let outcomes = self.inner.publish(batch).await.outcomes().await;
        if outcomes
            .iter()
            .any(|outcome| matches!(outcome, Outcome::Outage(_)))
        {
            self.inner.purge().await;
        }
        Receipt::ready(outcomes)
    }
}

/// What the sink makes of the outcomes.
fn mistake(flaw: SinkFlaw, mut outcomes: Vec<Outcome>) -> Vec<Outcome> {
    let first = |class: &str| outcomes.iter().find(|outcome| outcome.as_str() == class).cloned();
    match flaw {
        SinkFlaw::DropsAnOutcome if outcomes.len() > 1 => drop(outcomes.pop()),
        SinkFlaw::MixesOutcomes => outcomes.sort_by_key(|outcome| *outcome == Outcome::Delivered),
        SinkFlaw::PoisonFailsBatch => {
            if let Some(poison) = first("poison") {
                outcomes.fill(poison);
            }
        }
        SinkFlaw::BlocksEverything => {
            if let Some(blocked) = first("topic_blocked") {
                outcomes.fill(blocked);
            }
        }
        SinkFlaw::PoisonIsRetried | SinkFlaw::OutageIsPoison => {
            for outcome in &mut outcomes {
                match (flaw, &*outcome) {
                    (SinkFlaw::PoisonIsRetried, Outcome::Poison(reason)) => {
                        *outcome = Outcome::Retry(reason.clone())
                    }
                    (SinkFlaw::OutageIsPoison, Outcome::Outage(reason)) => {
                        *outcome = Outcome::Poison(reason.clone())
                    }
                    _ => {}
                }
            }
        }
        _ => {}
    }
    outcomes
}

/// Sends the batch that was put aside, if it is still there.
async fn send_aside(
    mut sink: MemorySink,
    aside: Arc<Mutex<Option<Vec<Record>>>>,
    count: usize,
) -> Vec<Outcome> {
    let batch = aside.lock().unwrap().take();
    match batch {
        Some(batch) => sink.publish(batch).await.outcomes().await,
        None => vec![Outcome::Delivered; count],
    }
}

/// Waits for a receipt, which a purge cuts off.
async fn until_purge(
    receipt: Receipt,
    mut purges: watch::Receiver<u64>,
    flaw: SinkFlaw,
    count: usize,
) -> Vec<Outcome> {
    let purged = Box::pin(purges.changed());
    match select(purged, Box::pin(receipt.outcomes())).await {
        Either::Right((outcomes, _)) => outcomes,
        Either::Left(_) if flaw == SinkFlaw::PurgeLeavesReceiptsOpen => std::future::pending().await,
        Either::Left(_) => vec![Outcome::Unknown("purged".into()); count],
    }
}
