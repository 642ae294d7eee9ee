//! A world from its beginning to its end: things go wrong for a while, then everything heals, and is judged.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::ledger::count;
use super::process::Process;
use super::producer::{Keys, TOPICS, produce};
use super::stage::Stage;
use super::{Summary, Violation};
use crate::conformance::StoreHarness;
use crate::dead::DeadLetterQuery;
use crate::error::Result;
use crate::hold::HoldScope;
use crate::message::MessageId;
use crate::relay::{Backoff, OnFailure, RelayConfig};
use crate::store::{Ordering, OutboxStore, Stats};

/// How long anything may take to come to its end.
const PATIENCE: Duration = Duration::from_secs(600);

struct World {
    stage: Arc<Stage>,
    store: Arc<dyn OutboxStore>,
    config: RelayConfig,
    relays: Vec<Process>,
    next_relay: u32,
    /// Whether the destination goes on with a key behind a message that it refused.
    goes_on: bool,
}

pub(super) async fn play<H: StoreHarness>(
    harness: Arc<H>,
    stage: &Arc<Stage>,
    visibility: &'static str,
    again: String,
) -> std::result::Result<Summary, Violation> {
    let store = harness.store();
    let goes_on = stage.happens(300);
    {
        let mut ledger = stage.ledger();
        ledger.sequenced = store.capabilities().ordering == Ordering::Sequenced;
        ledger.goes_on = goes_on;
    }
    let mut world = World {
        goes_on,
        config: config(stage, &*store),
        stage: Arc::clone(stage),
        store,
        relays: Vec::new(),
        next_relay: 0,
    };
    let producers = producers(&harness, stage);
    let lived = world.live(producers).await;
    if let Err(error) = lived {
        stage
            .ledger()
            .is_broken("I6", format!("the store failed: {error}"));
    }
    let dead = world.dead().await.unwrap_or_default();
    let window = count(world.config.window_rows);
    let mut ledger = stage.ledger();
    let total = ledger.judge(&dead, window, stage.simulation.calm);
    let seed = stage.simulation.seed;
    if let Some((law, what)) = ledger.breach().cloned() {
        let lines = ledger.lines.take().unwrap_or_default();
        return Err(Violation {
            seed,
            law,
            what,
            again,
            lines,
        });
    }
    Ok(Summary {
        seed,
        trace: ledger.trace(),
        visibility,
        committed: total.committed,
        arrived: total.arrived,
        duplicates: total.duplicates,
        dead: count(dead.len()),
        faults: ledger.faults.clone(),
        millis: u64::try_from(stage.now().as_millis()).unwrap_or(u64::MAX),
        lines: ledger.lines.take().unwrap_or_default(),
    })
}

/// How all relays of a world are.
fn config(stage: &Stage, store: &dyn OutboxStore) -> RelayConfig {
    let millis = Duration::from_millis;
    let config = stage.draw(|random| {
        let lease = millis(random.u64(1_000..3_000));
        let batch_rows = random.usize(1..=20);
        RelayConfig {
            lease,
            batch_rows,
            batch_bytes: *random.choice(&[1, 300, 4 << 20, 4 << 20]).unwrap_or(&1),
            window_bytes: *random.choice(&[1, 1_000, 16 << 20, 16 << 20]).unwrap_or(&1),
            window_rows: batch_rows * random.usize(1..=4),
            settle_rows: random.usize(1..=20),
            settle_every: millis(if random.bool() { 20 } else { 0 }),
            on_failure: if random.bool() || store.dead_letters().is_none() {
                OnFailure::Park
            } else {
                OnFailure::DeadLetter
            },
            max_attempts: random.u32(1..=5),
            retry: backoff(50, 1_000),
            topic_retry: backoff(100, 2_000),
            outage_retry: backoff(50, 1_000),
            max_holds: random.usize(2..=50),
            rate_limit: (random.u8(..6) == 0).then_some(200),
            grace: Duration::from_secs(3),
            call_timeout: millis(random.u64(1_000..3_000)),
            ..RelayConfig::default()
        }
    });
    stage.note(format_args!("{config:?}"));
    config
}

const fn backoff(initial: u64, max: u64) -> Backoff {
    Backoff {
        initial: Duration::from_millis(initial),
        max: Duration::from_millis(max),
    }
}

fn producers<H: StoreHarness>(harness: &Arc<H>, stage: &Arc<Stage>) -> Vec<JoinHandle<Result<()>>> {
    let keys = Keys::new(stage);
    let (producers, messages) = stage.draw(|random| (random.usize(1..=4), random.usize(5..=40)));
    (0..producers)
        .map(|_| {
            let (harness, stage) = (Arc::clone(harness), Arc::clone(stage));
            tokio::spawn(produce(harness, stage, keys.clone(), messages))
        })
        .collect()
}

impl World {
    async fn live(&mut self, producers: Vec<JoinHandle<Result<()>>>) -> Result<()> {
        for _ in 0..self.stage.draw(|random| random.u8(1..=3)) {
            self.start_relay();
        }
        if !self.stage.simulation.calm {
            for _ in 0..self.stage.draw(|random| random.usize(10..40)) {
                self.stage.pause(0..500).await;
                self.disturb().await?;
            }
        }
        for producer in producers {
            match timeout(PATIENCE, producer).await {
                Ok(Ok(produced)) => produced?,
                Ok(Err(_)) => self
                    .stage
                    .ledger()
                    .is_broken("I6", "a producer panicked".to_owned()),
                Err(_) => self
                    .stage
                    .ledger()
                    .is_broken("I6", "a producer never ended".to_owned()),
            }
        }
        self.heal().await;
        self.drain().await?;
        self.end().await
    }

    fn start_relay(&mut self) {
        self.next_relay += 1;
        let store = Arc::clone(&self.store);
        let relay = Process::start(&self.stage, store, &self.config, self.next_relay, self.goes_on);
        self.relays.push(relay);
    }

    /// One of the relays that run, if there is one.
    fn any(&self) -> Option<usize> {
        (!self.relays.is_empty()).then(|| self.stage.draw(|random| random.usize(..self.relays.len())))
    }

    async fn disturb(&mut self) -> Result<()> {
        self.bury_the_ended().await;
        let stage = Arc::clone(&self.stage);
        let relay = self.any();
        match (stage.draw(|random| random.u8(..14)), relay) {
            (0..=2, Some(relay)) => {
                let relay = self.relays.swap_remove(relay);
                stage.fault("kill", &relay.id);
                let wire_lasts = if stage.happens(500) {
                    Duration::ZERO
                } else {
                    stage.millis(0..100)
                };
                relay.kill(wire_lasts);
                if stage.happens(700) {
                    self.start_relay();
                }
            }
            (3..=4, Some(relay)) => {
                let relay = &self.relays[relay];
                stage.fault("pause", &relay.id);
                relay.freeze(stage.millis(100..10_000));
            }
            (5, Some(relay)) => {
                let relay = &mut self.relays[relay];
                stage.note(format_args!("{} is to end", relay.id));
                relay.stop();
            }
            (6, Some(relay)) => {
                let relay = &self.relays[relay];
                stage.fault("clock jump", &relay.id);
                relay.jump(stage.millis(100..3_600_000));
            }
            (7, _) => {
                stage.fault("broker down", "");
                stage.weather().broker_down = true;
                later(&stage, 100..5_000, |stage| stage.weather().broker_down = false);
            }
            (8, _) => {
                if stage.happens(500) {
                    stage.fault("store restarted", "");
                    stage.weather().restarts += 1;
                } else {
                    stage.fault("store down", "");
                }
                stage.weather().store_down = true;
                later(&stage, 100..5_000, |stage| stage.weather().store_down = false);
            }
            (9, _) => {
                let topic: Arc<str> = TOPICS[stage.draw(|random| random.usize(..TOPICS.len()))].into();
                stage.fault("topic blocked", &topic);
                stage.weather().blocked.insert(Arc::clone(&topic));
                later(&stage, 100..5_000, move |stage| {
                    stage.weather().blocked.remove(&topic);
                });
            }
            (10 | 11, _) => self.operate().await?,
            _ if self.relays.len() < 4 => self.start_relay(),
            _ => {}
        }
        Ok(())
    }

    /// An operator tries what is parked again, or gives its head up.
    async fn operate(&self) -> Result<()> {
        let Some(parking) = self.store.parking() else {
            return Ok(());
        };
        for hold in parking.parked(100).await? {
            let buriable = !matches!(hold.scope, HoldScope::Topic(_)) && self.store.dead_letters().is_some();
            let name = hold.reference();
            if buriable && self.stage.strikes(300) {
                self.stage.note(format_args!("an operator buries {name:?}"));
                parking.bury(&name).await?;
            } else {
                self.stage.note(format_args!("an operator resumes {name:?}"));
                parking.resume(&name).await?;
            }
        }
        Ok(())
    }

    /// From now on nothing goes wrong any more.
    async fn heal(&mut self) {
        self.stage.note(format_args!("everything heals"));
        {
            let mut weather = self.stage.weather();
            weather.rough = false;
            weather.store_down = false;
            weather.broker_down = false;
            weather.blocked.clear();
            weather.poison.clear();
        }
        self.bury_the_ended().await;
        if self.relays.iter().all(Process::is_stopping) {
            self.start_relay();
        }
    }

    async fn bury_the_ended(&mut self) {
        for index in (0..self.relays.len()).rev() {
            if self.relays[index].is_over()
                && let Some(what) = self.relays.swap_remove(index).bury().await
            {
                self.stage.ledger().is_broken("I6", what);
            }
        }
    }

    /// I6: waits until nothing waits.
    async fn drain(&mut self) -> Result<()> {
        let end = self.stage.now() + PATIENCE;
        loop {
            self.operate().await?;
            let stats = self.store.stats().await?;
            if is_done(&stats) {
                return Ok(());
            }
            if self.stage.now() > end || self.stage.ledger().breach().is_some() {
                let what = format!("after {PATIENCE:?} without a fault there is still: {stats:?}");
                self.stage.ledger().is_broken("I6", what);
                return Ok(());
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// I6 and I7: all relays end in order, and leave nothing.
    async fn end(&mut self) -> Result<()> {
        for relay in &mut self.relays {
            relay.stop();
        }
        let end = self.stage.now() + Duration::from_secs(60);
        loop {
            self.bury_the_ended().await;
            if self.relays.is_empty() {
                break;
            }
            if self.stage.now() > end {
                let what = format!("{} was told to end and does not", self.relays[0].id);
                self.stage.ledger().is_broken("I6", what);
                return Ok(());
            }
            sleep(Duration::from_millis(50)).await;
        }
        // What was killed is forgotten when its lease is over; what it had sent has arrived by then.
        sleep(Duration::from_secs(15)).await;
        let stats = self.store.stats().await?;
        let owned = stats.leases.iter().any(|lease| lease.owner.is_some());
        if owned || !is_done(&stats) {
            let what = format!("all relays have ended, and there is still: {stats:?}");
            self.stage.ledger().is_broken("I6", what);
        }
        let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
        if tasks > 0 {
            let what = format!("{tasks} tasks are left of relays that have ended");
            self.stage.ledger().is_broken("I7", what);
        }
        Ok(())
    }

    async fn dead(&self) -> Result<BTreeSet<MessageId>> {
        let Some(dead) = self.store.dead_letters() else {
            return Ok(BTreeSet::new());
        };
        let query = DeadLetterQuery {
            limit: usize::MAX,
            ..DeadLetterQuery::default()
        };
        Ok(dead
            .list(&query)
            .await?
            .iter()
            .map(|letter| letter.record.id)
            .collect())
    }
}

fn is_done(stats: &Stats) -> bool {
    stats.backlog.value() == 0 && stats.scheduled == 0 && stats.retrying == 0 && stats.parked == 0
}

/// Does something after a while.
fn later(stage: &Arc<Stage>, millis: std::ops::Range<u64>, what: impl FnOnce(&Stage) + Send + 'static) {
    let (stage, length) = (Arc::clone(stage), stage.millis(millis));
    tokio::spawn(async move {
        sleep(length).await;
        what(&stage);
    });
}
