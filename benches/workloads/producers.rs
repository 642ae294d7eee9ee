//! What a relay costs those who commit: as many connections as commit one message a transaction, as fast as they can,
//! with a relay at work and without.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::ledger::Flow;
use crate::process::{Busy, System};
use crate::results::Outcome;
use crate::stage::{Bench, Stage, Subject, count, say};
use crate::workloads::turn;

const FLOW: Flow = Flow::new(1024, 10_000);
const CONNECTIONS: usize = 8;

pub(super) async fn run(bench: &mut Bench, rounds: usize) -> Outcome<()> {
    for round in 0..rounds {
        let (mut with, mut without) = (None, None);
        for relay in turn(&[false, true], round) {
            let found = measure(bench, relay).await?;
            *(if relay { &mut with } else { &mut without }) = found;
        }
        if let Some((with, without)) = with.zip(without) {
            bench.record(
                subject(true),
                "commits, share of those without",
                "%",
                100.0 * with / without,
            );
        }
    }
    Ok(())
}

const fn subject(relay: bool) -> Subject<'static> {
    Subject {
        workload: "producers",
        system: "outbox",
        case: if relay { "with a relay" } else { "without" },
    }
}

async fn measure(bench: &mut Bench, relay: bool) -> Outcome<Option<f64>> {
    let time = bench.size(Duration::from_secs(20), Duration::from_secs(4));
    let stage = Stage::new(bench, FLOW, System::Outbox).await?;
    stage.place.calm().await?;
    let mut worker = None;
    if relay {
        let mut started = stage.worker(bench, System::Outbox).await?;
        started.go().await?;
        worker = Some(started);
    }
    let busy = Busy::from_now()?;
    let (committed, taken) = produce(&stage, time).await?;
    let busy = busy.share()?;
    let rate = count(committed) / taken.as_secs_f64();
    let mut verdict = Ok(());
    if let Some(mut worker) = worker {
        stage.until(committed, None, &mut worker).await?;
        worker.stop().await?;
        verdict = stage.verify(0, committed, 0).await?;
    }
    stage.remove().await?;
    let subject = subject(relay);
    if !bench.counts(subject, verdict) {
        return Ok(None);
    }
    bench.record(subject, "commits", "commits/s", rate);
    bench.record(subject, "cores busy", "%", busy);
    say(&format!("producers {}: {rate:.0} commits/s", subject.case));
    Ok(Some(rate))
}

/// Commits for a while; says how many messages, and how long it took.
async fn produce(stage: &Stage, time: Duration) -> Outcome<(u64, Duration)> {
    let next = Arc::new(AtomicU64::new(0));
    let mut ready = Vec::new();
    for _ in 0..stage.place.producers(CONNECTIONS) {
        ready.push(stage.place.producer("outbox", &stage.topic.name, FLOW).await?);
    }
    let start = Instant::now();
    let mut producers = JoinSet::new();
    for mut producer in ready {
        let next = Arc::clone(&next);
        producers.spawn(async move {
            while start.elapsed() < time {
                producer.commit(next.fetch_add(1, Ordering::Relaxed)).await?;
            }
            Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
        });
    }
    while let Some(ended) = producers.join_next().await {
        ended??;
    }
    Ok((next.load(Ordering::Relaxed), start.elapsed()))
}
