//! The relay's hands: carries out the machine's commands and tells it what happened.
//!
//! Everything runs inside the one future of [`Driver::run`], so dropping it drops everything. Calls of the store run
//! side by side; calls of the sink take turns, and a hand-over that waits for room can be given up.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use futures::{FutureExt, future};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use super::edge::edge;
use super::health::Pulse;
use super::machine::{BatchId, Command, Event, Machine, Note, Setup};
use super::observe::Observer;
use super::{Relay, RelayConfig};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::{Fetched, Record};
use crate::lease::{LeaseRequest, RelayId};
use crate::shard::Shard;
use crate::sink::{Receipt, Sink};
use crate::store::{Count, OutboxStore, Reader, Stats};
use crate::wake::{WakeUp, Waker};

/// A drain, whose end other relays may have to do with.
#[derive(Default)]
struct Drain {
    /// The smallest backlog that was seen, and when.
    lowest: Option<(u64, Duration)>,
    /// Whether nothing is left that is not scheduled for later.
    done: bool,
}

pub(super) struct Driver {
    machine: Machine,
    store: Arc<dyn OutboxStore>,
    /// Calls take turns by this lock. It is held across awaits, but never while another lock is wanted.
    sink: Arc<Mutex<Box<dyn Sink>>>,
    config: RelayConfig,
    id: RelayId,
    waker: Waker,
    clock: Arc<dyn Clock>,
    /// Whether to stop when nothing is left, and how far that is.
    drain: Option<Drain>,
    /// Kept between fetches; none while a fetch has it, and after an error.
    reader: Option<Box<dyn Reader>>,
    /// What is being done, but for the two below.
    work: FuturesUnordered<BoxFuture<'static, Done>>,
    /// The hand-over under way, apart so that a purge can give it up.
    handing: Option<(BatchId, BoxFuture<'static, Receipt>)>,
    /// What the sink has taken over.
    receipts: FuturesUnordered<BoxFuture<'static, Event>>,
    observer: Observer,
    pulse: Pulse,
    /// When to look at the whole outbox again.
    observe_next: Duration,
    observing: bool,
    /// Whether the metrics tell of the whole outbox.
    observed: bool,
    /// When to take old messages out of the archive again.
    purge_next: Duration,
    purging: bool,
}

/// How often the state of the whole outbox is looked at, for metrics and draining, and the archive for old messages.
const OBSERVE_EVERY: Duration = Duration::from_secs(10);
/// The same while draining.
const DRAIN_LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long a relay that stops waits for the store, after the grace for the sink is over.
const LAST_CALLS: Duration = Duration::from_secs(2);
/// A sleep is at least so long, whatever the machine says: time resolves no finer, and a busy loop helps nobody.
const SHORTEST_SLEEP: Duration = Duration::from_micros(200);
/// How many archived messages one purge removes.
const PURGE_ROWS: usize = 1_000;

/// The end of something that was being done.
enum Done {
    Event(Event),
    Fetched(Option<Box<dyn Reader>>, Event),
    Observed(Option<Stats>),
    /// How many messages were taken out of the archive.
    Purged(usize),
}

impl Driver {
    pub(super) fn new(relay: Relay, drains: bool) -> Self {
        let Relay {
            store,
            sink,
            config,
            id,
            waker,
            clock,
            seed,
            pulse,
        } = relay;
        let setup = Setup {
            relay: id.clone(),
            config: config.clone(),
            shards: store.capabilities().shards,
            dead_letters: store.dead_letters().is_some(),
            scheduled: store.scheduled().is_some(),
            stops_key_at_failure: sink.capabilities().stops_key_at_failure,
            seed,
        };
        Self {
            machine: Machine::new(setup),
            observer: Observer::new(store.capabilities().name, sink.capabilities().name, &id),
            pulse,
            store,
            sink: Arc::new(Mutex::new(sink)),
            config,
            id,
            waker,
            clock,
            drain: drains.then(Drain::default),
            reader: None,
            work: FuturesUnordered::new(),
            handing: None,
            receipts: FuturesUnordered::new(),
            observe_next: Duration::ZERO,
            observing: false,
            observed: false,
            purge_next: Duration::ZERO,
            purging: false,
        }
    }

    pub(super) async fn run(mut self, shutdown: impl Future<Output = ()> + Send) {
        let mut shutdown = pin!(shutdown.fuse());
        let mut wake_up = self.store.wake_up();
        // When a relay that stops gives up on the sink, and then on the store.
        let mut last_moment: Option<Duration> = None;
        let mut hurried = false;
        loop {
            let now = self.clock.now();
            while let Some(command) = self.machine.poll(now) {
                self.start(command, now);
            }
            self.report(now, last_moment.is_some());
            if self.machine.has_left() {
                return;
            }
            if last_moment.is_none() {
                self.observe(now);
                self.forget_what_another_sees();
                self.purge_archive(now);
                if self.is_drained() {
                    self.machine.handle(Event::Shutdown, now);
                    last_moment = Some(now + self.config.grace);
                    continue;
                }
            }
            if let Some(moment) = last_moment
                && now >= moment
            {
                if hurried {
                    tracing::warn!(relay = %self.id, "stopped without an answer of the store or the sink; the leases run out by themselves");
                    return;
                }
                hurried = true;
                last_moment = Some(now + LAST_CALLS);
                self.machine.hurry();
                continue;
            }
            let due = self
                .machine
                .next_due(now)
                .into_iter()
                .chain(last_moment)
                .chain(self.observe_due())
                .min();
            let pause = due
                .map_or(OBSERVE_EVERY, |due| due.saturating_sub(now))
                .max(SHORTEST_SLEEP);

            tokio::select! {
                // A hand-over begins before any outcome is heard: a sink that stops a key at a failure must be able
                // to tell what was sent before the failure was known from what was sent after. See `Sink`.
                biased;
                (batch, receipt) = handed(&mut self.handing) => self.accepted(batch, receipt),
                () = &mut shutdown, if last_moment.is_none() => {
                    self.tell(Event::Shutdown);
                    last_moment = Some(self.clock.now() + self.config.grace);
                }
                Some(done) = self.work.next() => self.done(done),
                Some(event) = self.receipts.next() => self.tell(event),
                () = self.waker.woken() => self.tell(Event::Wake),
                () = woken(&mut wake_up) => self.tell(Event::Wake),
                () = sleep(pause) => {}
            }
        }
    }

    fn tell(&mut self, event: Event) {
        self.machine.handle(event, self.clock.now());
    }

    /// Passes on what the machine noticed, and shows that the loop goes round.
    fn report(&mut self, now: Duration, stopping: bool) {
        let notes = self.machine.take_notes();
        let mut pulse = self.pulse.state();
        pulse.turned = Some(now);
        pulse.stopping = stopping;
        pulse.shards = self.machine.owned();
        // What is not wanted any more has no failure.
        for (operation, is_wanted) in [
            ("fetch", self.machine.reads()),
            ("load holds", self.machine.loads_holds()),
            ("settle", self.machine.settles()),
        ] {
            if !is_wanted {
                pulse.store_failures.remove(operation);
            }
        }
        for note in &notes {
            match note {
                Note::SinkDown { reason, .. } => pulse.sink_failure = Some(reason.to_string()),
                Note::SinkUp => pulse.sink_failure = None,
                _ => {}
            }
        }
        drop(pulse);
        self.observer.report(notes);
    }

    /// What the answers of the store say about its health.
    fn feel(&self, event: &Event) {
        let mut pulse = self.pulse.state();
        if let Event::Leased { sent, result: Ok(_) } = event {
            pulse.leased = Some(*sent);
        }
        let (operation, error) = match event {
            Event::Leased { result, .. } => ("lease", result.as_ref().err()),
            Event::Fetched { result } => ("fetch", result.as_ref().err()),
            Event::HoldsLoaded { result } => ("load holds", result.as_ref().err()),
            Event::Settled { result } => ("settle", result.as_ref().err()),
            _ => return,
        };
        match error {
            Some(error) => pulse.store_failures.insert(operation, error.to_string()),
            None => pulse.store_failures.remove(operation),
        };
    }

    fn done(&mut self, done: Done) {
        if let Done::Event(event) | Done::Fetched(_, event) = &done {
            self.feel(event);
        }
        match done {
            Done::Event(event) => self.tell(event),
            Done::Fetched(reader, event) => {
                self.reader = reader;
                self.tell(event);
            }
            Done::Observed(stats) => {
                self.observing = false;
                let Some(stats) = stats else { return };
                self.observer.stats(&stats);
                self.observed = true;
                self.look_at_what_is_left(&stats);
            }
            Done::Purged(rows) => {
                self.purging = false;
                if rows == PURGE_ROWS {
                    // There is more: it must not come in faster than it goes.
                    self.purge_next = Duration::ZERO;
                }
            }
        }
    }

    /// Other relays may own what is left: then it is theirs to drain, and done when it is gone, or has not become less for
    /// a while: parked, perhaps. An estimate of nothing proves nothing.
    fn look_at_what_is_left(&mut self, stats: &Stats) {
        let now = self.clock.now();
        let Some(drain) = &mut self.drain else { return };
        let backlog = stats.backlog.value();
        let since = match drain.lowest {
            Some((lowest, since)) if backlog >= lowest => since,
            _ => {
                drain.lowest = Some((backlog, now));
                now
            }
        };
        let is_empty = stats.backlog == Count::Exact(0)
            && self.machine.is_empty()
            && (stats.scheduled == 0 || self.machine.has_promoted());
        // A relay that died has lost its leases by then.
        let stands_still = self.machine.is_idle()
            && stats.parked + stats.retrying > 0
            && now.saturating_sub(since) > self.config.lease * 2;
        drain.done = is_empty || stands_still;
    }

    fn is_drained(&self) -> bool {
        let Some(drain) = &self.drain else { return false };
        drain.done || self.machine.owns_all() && self.machine.is_idle()
    }

    /// Begins what the machine wants done.
    fn start(&mut self, command: Command, now: Duration) {
        let store = self.store.clone();
        let relay = self.id.clone();
        let limit = self.config.call_timeout;
        match command {
            Command::Lease { want } => {
                let request = LeaseRequest {
                    relay,
                    want,
                    ttl: self.config.lease,
                };
                // Renewed at a third of the lease, given up at two thirds: one that hangs can be repeated in time.
                let limit = limit.min(self.config.lease / 3);
                self.event(async move {
                    let result = within(limit, "lease", store.lease(&request)).await;
                    edge("leased");
                    Event::Leased { sent: now, result }
                });
            }
            Command::Release { shards, membership } => self.event(async move {
                edge("releasing");
                let result = within(limit, "release", store.release(&relay, &shards, membership)).await;
                edge("released");
                Event::Released { result }
            }),
            Command::LoadHolds { shards } => self.event(async move {
                Event::HoldsLoaded {
                    result: within(limit, "load holds", store.holds(&shards)).await,
                }
            }),
            Command::Settle { settlement } => {
                let timing = self.observer.timing("outbox_settle_seconds", &self.clock);
                self.event(async move {
                    edge("settling");
                    let result = within(limit, "settle", store.settle(&settlement)).await;
                    edge("settled");
                    timing.stop();
                    Event::Settled { result }
                });
            }
            Command::Promote { shards } => {
                let limit_rows = self.config.batch_rows;
                self.event(async move {
                    let result = match store.scheduled() {
                        Some(scheduled) => {
                            within(limit, "promote", scheduled.promote(&relay, &shards, limit_rows)).await
                        }
                        None => Ok(crate::Promotion::default()),
                    };
                    Event::Promoted { result }
                });
            }
            Command::Fetch { request } => {
                let mut reader = self.reader.take();
                let timing = self.observer.timing("outbox_fetch_seconds", &self.clock);
                self.work.push(
                    async move {
                        let fetch = async {
                            let own = match &mut reader {
                                Some(own) => own,
                                none => none.insert(store.reader().await?),
                            };
                            own.fetch(&request).await
                        };
                        let result = within(limit, "fetch", fetch).await;
                        if matches!(&result, Ok(Fetched::Batch { records, .. }) if !records.is_empty()) {
                            edge("fetched");
                        }
                        timing.stop();
                        // After any error its connection is in doubt, and with it its cursor.
                        let reader = reader.filter(|_| result.is_ok());
                        Done::Fetched(reader, Event::Fetched { result })
                    }
                    .boxed(),
                );
            }
            Command::Publish { batch, records } => self.publish(batch, records),
            Command::Purge => {
                if let Some((batch, _)) = self.handing.take() {
                    self.receipts.push(
                        future::ready(Event::Outcomes {
                            batch,
                            outcomes: None,
                        })
                        .boxed(),
                    );
                }
                let sink = self.sink.clone();
                self.event(async move {
                    sink.lock().await.purge().await;
                    Event::Purged
                });
            }
            Command::Rebuild => {
                let sink = self.sink.clone();
                self.event(async move {
                    let result =
                        within(limit, "rebuild sink", async { sink.lock().await.rebuild().await }).await;
                    Event::Rebuilt { result }
                });
            }
            Command::Probe => {
                let sink = self.sink.clone();
                self.event(async move {
                    let result = within(limit, "probe sink", async { sink.lock().await.probe().await }).await;
                    Event::Probed { result }
                });
            }
        }
    }

    fn event(&mut self, event: impl Future<Output = Event> + Send + 'static) {
        self.work.push(event.map(Done::Event).boxed());
    }

    fn publish(&mut self, batch: BatchId, records: Vec<Record>) {
        edge("publishing");
        self.observer.publishing(&records, &self.clock);
        let sink = self.sink.clone();
        self.handing = Some((
            batch,
            async move { sink.lock().await.publish(records).await }.boxed(),
        ));
    }

    fn accepted(&mut self, batch: BatchId, receipt: Receipt) {
        edge("handed-over");
        let timing = self.observer.timing("outbox_publish_seconds", &self.clock);
        self.receipts.push(
            async move {
                let outcomes = Some(receipt.outcomes().await);
                edge("acknowledged");
                timing.stop();
                Event::Outcomes { batch, outcomes }
            }
            .boxed(),
        );
        self.tell(Event::Accepted { batch });
    }

    /// Now and then the owner of the first shard looks at the whole outbox: one relay of many is enough.
    fn observe(&mut self, now: Duration) {
        if self.observing || now < self.observe_next || !(self.drain.is_some() || self.machine.owns(Shard(0)))
        {
            return;
        }
        self.observing = true;
        self.observe_next = now
            + if self.drain.is_some() {
                DRAIN_LOOK_EVERY
            } else {
                OBSERVE_EVERY
            };
        let (store, limit) = (self.store.clone(), self.config.call_timeout);
        self.work.push(
            async move {
                match within(limit, "stats", store.stats()).await {
                    Ok(stats) => Done::Observed(Some(stats)),
                    Err(error) => {
                        tracing::warn!(%error, "the state of the outbox could not be read; the relay goes on");
                        Done::Observed(None)
                    }
                }
            }
            .boxed(),
        );
    }

    /// Who does not look at the whole outbox any more must not go on telling how it was.
    fn forget_what_another_sees(&mut self) {
        if self.observed && self.drain.is_none() && !self.machine.owns(Shard(0)) {
            self.observed = false;
            self.observer.forget_stats();
        }
    }

    /// The same owner takes what is old enough out of the archive, in short transactions, one after the other while
    /// there is more.
    fn purge_archive(&mut self, now: Duration) {
        if self.purging
            || now < self.purge_next
            || !self.machine.owns(Shard(0))
            || self.store.retention().is_none()
        {
            return;
        }
        self.purging = true;
        self.purge_next = now + OBSERVE_EVERY;
        let store = self.store.clone();
        let (limit, age) = (self.config.call_timeout, self.config.retention);
        self.work.push(
            async move {
                let Some(retention) = store.retention() else {
                    return Done::Purged(0);
                };
                let purged = within(limit, "purge archive", retention.purge(age, PURGE_ROWS)).await;
                Done::Purged(purged.unwrap_or_else(|error| {
                    tracing::warn!(%error, "the archive could not be purged; the relay goes on");
                    0
                }))
            }
            .boxed(),
        );
    }

    fn observe_due(&self) -> Option<Duration> {
        (self.drain.is_some() && !self.observing).then_some(self.observe_next)
    }
}

/// The hand-over under way, when the sink has taken it over; never when there is none.
async fn handed(handing: &mut Option<(BatchId, BoxFuture<'static, Receipt>)>) -> (BatchId, Receipt) {
    let Some((batch, receipt)) = handing else {
        return future::pending().await;
    };
    let done = (*batch, receipt.await);
    *handing = None;
    done
}

async fn woken(wake_up: &mut Option<Box<dyn WakeUp>>) {
    match wake_up {
        Some(wake_up) => wake_up.wait().await,
        None => future::pending().await,
    }
}

/// Gives a call up that takes too long. All these calls are safe to drop by contract.
async fn within<T>(
    limit: Duration,
    operation: &'static str,
    call: impl Future<Output = Result<T>>,
) -> Result<T> {
    timeout(limit, call).await.unwrap_or_else(|_| {
        Err(Error::new(
            ErrorKind::Unavailable,
            operation,
            "no answer within the time allowed",
        )
        .with("limit", format!("{limit:?}")))
    })
}
