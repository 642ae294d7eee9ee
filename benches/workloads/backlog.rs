//! What a message costs the relay when ever more wait behind it.
//!
//! Of each backlog the inner part of a drain is timed, where the pipeline is full. A small backlog is over too soon
//! for that, so it is committed again and again, each time as a whole.

use std::time::Duration;

use crate::ledger::{Flow, Ledger};
use crate::process::{System, Usage};
use crate::results::{Outcome, figure};
use crate::stage::{Bench, Seen, Stage, Subject, cost, count, mebibytes, say};
use crate::workloads::turn;

const FLOW: Flow = Flow::new(200, 10_000);
const SMALL: u64 = 10_000;

/// A backlog that lasts for all rounds.
struct Backlog {
    size: u64,
    stage: Stage,
    ledger: Ledger,
    /// The next message to be committed.
    next: u64,
}

pub(super) async fn run(bench: &mut Bench, rounds: usize) -> Outcome<()> {
    let sizes = bench.size([SMALL, 1_000_000, 10_000_000], [SMALL, 50_000, 300_000]);
    let mut large = Vec::new();
    for size in sizes.into_iter().filter(|size| *size > SMALL) {
        let stage = Stage::new(bench, FLOW, System::Outbox).await?;
        large.push(Backlog {
            size,
            stage,
            ledger: Ledger::new(FLOW, 0),
            next: 0,
        });
    }
    for round in 0..rounds {
        let mut rates = Vec::new();
        let mut peaks = Vec::new();
        for size in turn(&sizes, round) {
            let case = name(size);
            let subject = subject(&case);
            let found = match large.iter_mut().find(|backlog| backlog.size == size) {
                Some(backlog) => backlog.measure(bench, subject).await?,
                None => again_and_again(bench, subject).await?,
            };
            let Some(found) = found else { continue };
            bench.record(subject, "rate", "messages/s", found.rate);
            bench.record(subject, "CPU", "µs/message", found.cost);
            bench.record(subject, "peak memory", "MiB", found.peak);
            say(&format!(
                "backlog {case}: {:.0} messages/s, {:.2} µs CPU, {:.0} MiB",
                found.rate, found.cost, found.peak
            ));
            rates.push((size, found.rate));
            peaks.push((size, found.peak));
        }
        for (metric, values, inverse) in [("time", rates, true), ("peak memory", peaks, false)] {
            let Some(&(_, small)) = values.iter().find(|(size, _)| *size == SMALL) else {
                continue;
            };
            for (size, value) in values.into_iter().filter(|(size, _)| *size != SMALL) {
                let ratio = if inverse { small / value } else { value / small };
                let metric = format!("{metric} for a message, in that at {}", name(SMALL))
                    .replace("memory for a message", "memory");
                bench.record(subject(&name(size)), &metric, "×", ratio);
            }
        }
    }
    for backlog in large {
        backlog.stage.remove().await?;
    }
    Ok(())
}

const fn subject(case: &str) -> Subject<'_> {
    Subject {
        workload: "backlog",
        system: "outbox",
        case,
    }
}

fn name(size: u64) -> String {
    format!("{} waiting", figure(count(size)))
}

struct Found {
    rate: f64,
    cost: f64,
    peak: f64,
}

impl Backlog {
    /// Drains a part with a new relay, when there is again as much as before.
    async fn measure(&mut self, bench: &mut Bench, subject: Subject<'_>) -> Outcome<Option<Found>> {
        let (skipped, timed) = bench.size((20_000, 100_000), (5_000, 20_000));
        // The rows that are there name the topic, so it stays the same.
        self.stage.topic.count_from_here()?;
        let whole = self.ledger.arrived + self.size;
        self.stage.fill(self.next..whole).await?;
        self.next = whole;
        self.stage.place.calm().await?;
        let mut worker = self.stage.worker(bench, System::Outbox).await?;
        worker.go().await?;
        let from = self.stage.until(skipped, None, &mut worker).await?;
        let to = self.stage.until(from.arrived + timed, None, &mut worker).await?;
        let used = worker.stop().await?;
        self.stage.topic.read_into(&mut self.ledger)?;
        let left = self.stage.place.left("outbox").await?;
        let mut verdict = self.ledger.verdict(None);
        if verdict.is_ok() && left != whole - self.ledger.arrived {
            verdict = Err(format!(
                "{left} messages are left in the table, and should be {}",
                whole - self.ledger.arrived
            ));
        }
        Ok(bench.counts(subject, verdict).then(|| Found {
            rate: from.rate_until(&to),
            cost: from.cost_until(&to),
            peak: mebibytes(used.peak),
        }))
    }
}

/// Commits the small backlog as often as it takes, each time when the one before is delivered.
async fn again_and_again(bench: &mut Bench, subject: Subject<'_>) -> Outcome<Option<Found>> {
    let times = bench.size(12, 4);
    let mut stage = Stage::new(bench, FLOW, System::Outbox).await?;
    stage.place.calm().await?;
    let mut worker = stage.worker(bench, System::Outbox).await?;
    worker.go().await?;
    let (mut timed, mut spent) = (0, Duration::ZERO);
    let mut before = Usage::default();
    for time in 0..times {
        let base = SMALL * time;
        if time == 1 {
            // The first one made the connections.
            before = worker.usage()?;
            (timed, spent) = (0, Duration::ZERO);
        }
        stage.fill(base..base + SMALL).await?;
        let from: Seen = stage.until(base + SMALL / 5, None, &mut worker).await?;
        let to = stage.until(base + SMALL / 5 * 4, None, &mut worker).await?;
        timed += to.arrived - from.arrived;
        spent += to.at - from.at;
        stage.until(base + SMALL, None, &mut worker).await?;
    }
    let used = worker.stop().await?;
    let all = SMALL * times;
    let verdict = stage.verify(0, all, 0).await?;
    stage.remove().await?;
    Ok(bench.counts(subject, verdict).then(|| Found {
        rate: count(timed) / spent.as_secs_f64(),
        cost: cost(used.cpu.saturating_sub(before.cpu), all - SMALL),
        peak: mebibytes(used.peak),
    }))
}
