//! One, two and four relays drain one backlog, which is committed as a whole when each has its share of the shards.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::ledger::Flow;
use crate::process::{System, Worker};
use crate::results::Outcome;
use crate::stage::{Bench, Stage, Subject, count, say};
use crate::workloads::turn;

const FLOW: Flow = Flow::new(1024, 10_000);
const RELAYS: [usize; 3] = [1, 2, 4];
/// How long the shards may take to be shared out.
const PATIENCE: Duration = Duration::from_secs(90);

pub(super) async fn run(bench: &mut Bench, rounds: usize) -> Outcome<()> {
    for round in 0..rounds {
        let mut rates = Vec::new();
        for relays in turn(&RELAYS, round) {
            let case = name(relays);
            let subject = subject(&case);
            if let Some(rate) = measure(bench, subject, relays).await? {
                bench.record(subject, "rate", "messages/s", rate);
                say(&format!("relays {relays}: {rate:.0} messages/s"));
                rates.push((relays, rate));
            }
        }
        let Some(&(_, one)) = rates.iter().find(|(relays, _)| *relays == 1) else {
            continue;
        };
        for (relays, rate) in rates.into_iter().filter(|(relays, _)| *relays > 1) {
            let metric = "rate, in that of one";
            bench.record(subject(&name(relays)), metric, "×", rate / one);
        }
    }
    Ok(())
}

const fn subject(case: &str) -> Subject<'_> {
    Subject {
        workload: "relays",
        system: "outbox",
        case,
    }
}

fn name(relays: usize) -> String {
    format!("{relays} relay{}", if relays == 1 { "" } else { "s" })
}

async fn measure(bench: &mut Bench, subject: Subject<'_>, relays: usize) -> Outcome<Option<f64>> {
    let messages = bench.size(200_000, 20_000);
    let mut stage = Stage::new(bench, FLOW, System::Outbox).await?;
    stage.place.calm().await?;
    let mut workers: Vec<Worker> = Vec::new();
    for _ in 0..relays {
        let mut worker = stage.worker(bench, System::Outbox).await?;
        worker.go().await?;
        workers.push(worker);
    }
    until_shared_out(&stage, relays).await?;
    stage.fill(0..messages).await?;
    // Everything became visible when that returned, or an instant before.
    let start = Instant::now();
    let end = match workers.first_mut() {
        Some(first) => stage.until(messages, None, first).await?,
        None => return Err("no relay".into()),
    };
    for worker in workers {
        worker.stop().await?;
    }
    let verdict = stage.verify(0, messages, 0).await?;
    stage.remove().await?;
    let rate = count(messages) / (end.at - start).as_secs_f64();
    Ok(bench.counts(subject, verdict).then_some(rate))
}

/// Waits until each relay has its share.
async fn until_shared_out(stage: &Stage, relays: usize) -> Outcome<()> {
    let store = stage.place.spec.open().await?;
    let end = Instant::now() + PATIENCE;
    loop {
        let mut shares: BTreeMap<String, usize> = BTreeMap::new();
        let leases = store.stats().await?.leases;
        for owner in leases.iter().filter_map(|lease| lease.owner.as_ref()) {
            *shares.entry(owner.to_string()).or_default() += 1;
        }
        let even = leases.len() / relays;
        let all: usize = shares.values().sum();
        if all == leases.len()
            && shares.len() == relays
            && shares.values().all(|share| share.abs_diff(even) <= 1)
        {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(format!("the shards are not shared out among {relays} relays: {shares:?}").into());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
