//! From commit to consume while messages are committed at a fixed rate.
//!
//! The schedule is open: a message is due when it is due, however long its predecessors take, so a system that stalls
//! is seen stalling by all that come meanwhile. Producers and the consumer are threads of one process with one clock.
//! The consumer takes messages one by one, because a call for a batch waits for it to fill.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use outbox::kafka::rdkafka::consumer::BaseConsumer;
use outbox::kafka::rdkafka::message::Message;
use tokio::task::JoinSet;

use crate::ledger::Flow;
use crate::process::{Busy, System};
use crate::results::{Outcome, figure};
use crate::stage::{Bench, Stage, Subject, count, say};
use crate::workloads::turn;

const FLOW: Flow = Flow::new(1024, 10_000);
const RATES: [u32; 3] = [1_000, 2_000, 5_000];
/// The baseline is measured at the lowest rate only.
const BASELINE: System = System::Batched(1_000);
/// Connections of the producers.
const CONNECTIONS: usize = 32;
/// Messages that are committed before it counts.
const WARM_UP: Duration = Duration::from_secs(2);
/// Below this share of its rate a schedule was not kept.
const KEPT: f64 = 0.98;

pub(super) async fn run(bench: &mut Bench, rounds: usize) -> Outcome<()> {
    let mut cases: Vec<(System, u32)> = RATES.iter().map(|rate| (System::Outbox, *rate)).collect();
    if bench.server.store.is_server() {
        cases.insert(1, (BASELINE, RATES[0]));
    }
    // The broker compiles its code for many small requests while this runs.
    let time = bench.size(Duration::from_secs(30), Duration::from_secs(4));
    let warm_up = Subject {
        workload: "warm up",
        system: System::Outbox.name(),
        case: "",
    };
    measure(bench, warm_up, RATES[0], System::Outbox, time).await?;
    let time = bench.size(Duration::from_secs(60), Duration::from_secs(4));
    for round in 0..rounds {
        for (system, rate) in turn(&cases, round) {
            let case = format!("{} messages/s", figure(f64::from(rate)));
            let subject = Subject {
                workload: "latency",
                system: system.name(),
                case: &case,
            };
            let Some(found) = measure(bench, subject, rate, system, time).await? else {
                continue;
            };
            bench.record(subject, "rate achieved", "messages/s", found.achieved);
            for (metric, value) in found.waits {
                bench.record(subject, metric, "ms", value);
            }
            bench.record(subject, "cores busy", "%", found.busy);
        }
    }
    Ok(())
}

struct Found {
    /// Messages a second that were committed.
    achieved: f64,
    /// From commit to consume, in milliseconds.
    waits: [(&'static str, f64); 3],
    /// Percent of the machine's cores.
    busy: f64,
}

/// Commits so many a second for a while; none when it does not count.
async fn measure(
    bench: &mut Bench,
    subject: Subject<'_>,
    rate: u32,
    system: System,
    time: Duration,
) -> Outcome<Option<Found>> {
    let messages = u64::from(rate) * (time + WARM_UP).as_secs();
    let stage = Stage::new(bench, FLOW, system).await?;
    stage.place.calm().await?;
    let mut worker = stage.worker(bench, system).await?;
    let watch = Arc::new(Watch::new(messages));
    let consumer = std::thread::spawn({
        let (consumer, watch) = (stage.topic.consumer()?, Arc::clone(&watch));
        move || consume(&consumer, &watch)
    });
    worker.go().await?;
    let busy = Busy::from_now()?;
    let produced = produce(&stage, system, rate, &watch).await;
    let busy = busy.share()?;
    let arrived = match produced {
        Ok(_) => stage.until(messages, None, &mut worker).await,
        Err(_) => stage.until(0, None, &mut worker).await,
    };
    // The broker has it before the consumer does.
    let end = Instant::now() + Duration::from_secs(10);
    while watch.consumed.load(Ordering::Relaxed) < messages && Instant::now() < end && arrived.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    watch.over.store(true, Ordering::Relaxed);
    consumer.join().map_err(|_| "the consumer panicked")??;
    let taken = produced?;
    arrived?;
    worker.stop().await?;
    let verdict = stage.verify(0, messages, 0).await?;
    stage.remove().await?;
    if !bench.counts(subject, verdict) {
        return Ok(None);
    }
    let achieved = count(messages) / taken.as_secs_f64();
    let Subject {
        workload,
        system,
        case,
    } = subject;
    if achieved / f64::from(rate) < KEPT {
        say(&format!(
            "{workload} {case}: only {achieved:.0} messages/s could be committed"
        ));
    }
    let mut all = watch.waits(u64::from(rate) * WARM_UP.as_secs());
    all.sort_unstable();
    let waits = [("p50", 0.5), ("p99", 0.99), ("max", 1.0)];
    let waits = waits.map(|(metric, share)| (metric, quantile(&all, share)));
    let told = waits
        .map(|(metric, value)| format!("{metric} {value:.2} ms"))
        .join(", ");
    say(&format!(
        "{workload} {system} {case}: {told}, {busy:.0} % of the cores busy"
    ));
    Ok(Some(Found {
        achieved,
        waits,
        busy,
    }))
}

/// When each message was committed and consumed, in microseconds of one clock; 0 is not yet.
struct Watch {
    begin: Instant,
    committed: Vec<AtomicU64>,
    arrived: Vec<AtomicU64>,
    consumed: AtomicU64,
    /// Tells the consumer to end.
    over: AtomicBool,
}

impl Watch {
    fn new(messages: u64) -> Self {
        let times = || (0..messages).map(|_| AtomicU64::new(0)).collect();
        Self {
            begin: Instant::now(),
            committed: times(),
            arrived: times(),
            consumed: AtomicU64::new(0),
            over: AtomicBool::new(false),
        }
    }

    fn note(&self, times: &[AtomicU64], number: u64) {
        let now = u64::try_from(self.begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let Some(time) = usize::try_from(number).ok().and_then(|number| times.get(number)) {
            time.store(now, Ordering::Relaxed);
        }
    }

    /// How long messages took, from number `from` on. A message can be consumed before its producer has heard of the
    /// commit: that took no time.
    fn waits(&self, from: u64) -> Vec<u64> {
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let pairs = self.committed.iter().zip(&self.arrived).skip(from);
        pairs
            .map(|(committed, arrived)| {
                arrived
                    .load(Ordering::Relaxed)
                    .saturating_sub(committed.load(Ordering::Relaxed))
            })
            .collect()
    }
}

/// Milliseconds that this share of messages did not exceed.
fn quantile(sorted: &[u64], share: f64) -> f64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index into a list that fits into memory"
    )]
    let index = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).map_or(f64::NAN, |micros| count(*micros) / 1e3)
}

fn consume(consumer: &BaseConsumer, watch: &Watch) -> Outcome<()> {
    while !watch.over.load(Ordering::Relaxed) {
        if let Some(record) = consumer.poll(Duration::from_millis(50)) {
            let record = record?;
            if let Some(number) = record.payload().and_then(Flow::number) {
                watch.note(&watch.arrived, number);
                watch.consumed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    Ok(())
}

/// Commits on schedule; says how long that took.
async fn produce(stage: &Stage, system: System, rate: u32, watch: &Arc<Watch>) -> Outcome<Duration> {
    let next = Arc::new(AtomicU64::new(0));
    let mut producers = JoinSet::new();
    let table = if system == System::Outbox {
        "outbox"
    } else {
        crate::queue::QUEUE
    };
    let mut ready = Vec::new();
    for _ in 0..stage.place.producers(CONNECTIONS) {
        ready.push(stage.place.producer(table, &stage.topic.name, FLOW).await?);
    }
    let start = tokio::time::Instant::now();
    for mut producer in ready {
        let (next, watch) = (Arc::clone(&next), Arc::clone(watch));
        producers.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= watch.committed.len() as u64 {
                    return Ok::<(), Box<dyn std::error::Error + Send + Sync>>(());
                }
                let due = start + Duration::from_secs_f64(count(number) / f64::from(rate));
                tokio::time::sleep_until(due).await;
                producer.commit(number).await?;
                watch.note(&watch.committed, number);
            }
        });
    }
    while let Some(ended) = producers.join_next().await {
        ended??;
    }
    Ok(start.elapsed())
}
