//! What every measurement needs: an outbox, a topic, somebody who moves messages, and the check of what arrived.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use outbox::RelayConfig;

use crate::kafka::Topic;
use crate::ledger::{Flow, Ledger};
use crate::place::{Place, Server};
use crate::process::{System, Task, Usage, Worker, of_machine, of_server};
use crate::queue::QUEUE;
use crate::results::{Finding, Outcome};

/// So long nothing arrives before a measurement is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the broker is asked what has arrived: much more often would cost it, and us, time.
const ASK: Duration = Duration::from_millis(4);
/// Rows that are inserted by one transaction, so that a huge backlog can be watched growing.
const PORTION: u64 = 500_000;

/// A run, with all that it has found so far.
pub(crate) struct Bench {
    pub(crate) server: Server,
    pub(crate) brokers: String,
    pub(crate) relay: RelayConfig,
    /// The command, if any, that runs what moves the messages.
    pub(crate) under: Vec<String>,
    /// The servers that run on this machine, by their processes' ids.
    pub(crate) servers: Vec<(&'static str, String)>,
    pub(crate) quick: bool,
    pub(crate) run: String,
    pub(crate) samples: Vec<Samples>,
    /// Measurements that do not count, and why.
    pub(crate) failures: Vec<String>,
}

/// What rounds gave of one figure.
pub(crate) struct Samples {
    finding: Finding,
    values: Vec<f64>,
}

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'s> {
    pub(crate) workload: &'s str,
    pub(crate) system: &'s str,
    pub(crate) case: &'s str,
}

impl Bench {
    /// One of two sizes.
    pub(crate) const fn size<T: Copy>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    pub(crate) fn record(&mut self, subject: Subject<'_>, metric: &str, unit: &str, value: f64) {
        let finding = Finding {
            workload: subject.workload.to_owned(),
            store: self.server.store.name().to_owned(),
            system: subject.system.to_owned(),
            case: subject.case.to_owned(),
            metric: metric.to_owned(),
            unit: unit.to_owned(),
            median: 0.0,
            min: 0.0,
            max: 0.0,
            rounds: 0,
            run: self.run.clone(),
        };
        match self.samples.iter_mut().find(|samples| samples.finding == finding) {
            Some(samples) => samples.values.push(value),
            None => self.samples.push(Samples {
                finding,
                values: vec![value],
            }),
        }
    }

    /// The CPU time so far of each server, and of the whole machine.
    fn elsewhere(&self) -> Outcome<Vec<(&'static str, Duration)>> {
        let servers = self.servers.iter().map(|(name, id)| Ok((*name, of_server(id)?)));
        servers.chain([Ok(("machine", of_machine()?))]).collect()
    }

    /// Whether what arrived is what had to; if not, the measurement does not count, and the run fails.
    pub(crate) fn counts(&mut self, subject: Subject<'_>, verdict: Result<(), String>) -> bool {
        let Err(fault) = verdict else { return true };
        let Subject {
            workload,
            system,
            case,
        } = subject;
        let failure = format!("{workload} {case} ({system}): {fault}");
        say(&format!("DOES NOT COUNT: {failure}"));
        self.failures.push(failure);
        false
    }

    pub(crate) fn findings(&self) -> Vec<Finding> {
        self.samples
            .iter()
            .map(|Samples { finding, values }| {
                let (median, min, max) = Finding::spread(values);
                Finding {
                    median,
                    min,
                    max,
                    rounds: values.len(),
                    ..finding.clone()
                }
            })
            .collect()
    }
}

/// One measurement's outbox and topic.
pub(crate) struct Stage {
    pub(crate) place: Place,
    pub(crate) topic: Topic,
    pub(crate) flow: Flow,
    table: &'static str,
}

/// Where in time so many messages had arrived.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) at: Instant,
    pub(crate) arrived: u64,
    pub(crate) usage: Usage,
}

impl Seen {
    pub(crate) fn rate_until(&self, later: &Self) -> f64 {
        count(later.arrived - self.arrived) / (later.at - self.at).as_secs_f64()
    }

    /// Microseconds of CPU for a message.
    pub(crate) fn cost_until(&self, later: &Self) -> f64 {
        cost(
            later.usage.cpu.saturating_sub(self.usage.cpu),
            later.arrived - self.arrived,
        )
    }
}

impl Stage {
    pub(crate) async fn new(bench: &Bench, flow: Flow, system: System) -> Outcome<Self> {
        let place = bench.server.place().await?;
        let of_outbox = system == System::Outbox || matches!(place.spec, crate::place::Spec::Sqlite { .. });
        if !of_outbox {
            place.make_queue().await?;
        }
        Ok(Self {
            topic: Topic::create(&bench.brokers).await?,
            place,
            flow,
            table: if of_outbox { "outbox" } else { QUEUE },
        })
    }

    pub(crate) async fn fill(&mut self, numbers: std::ops::Range<u64>) -> Outcome<()> {
        let bar = bar("filling", numbers.end - numbers.start);
        let mut from = numbers.start;
        while from < numbers.end {
            let to = (from + PORTION).min(numbers.end);
            self.place
                .fill(self.table, &self.topic.name, self.flow, from..to)
                .await?;
            bar.inc(to - from);
            from = to;
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Somebody who is connected and waits for the word.
    pub(crate) async fn worker(&self, bench: &Bench, system: System) -> Outcome<Worker> {
        let task = Task {
            system,
            spec: self.place.spec.clone(),
            brokers: bench.brokers.clone(),
            relay: bench.relay.clone(),
        };
        Worker::start(&task, &bench.under).await
    }

    /// Waits until so many messages have arrived, or until `end`.
    pub(crate) async fn until(
        &self,
        messages: u64,
        end: Option<Instant>,
        worker: &mut Worker,
    ) -> Outcome<Seen> {
        let bar = bar("arriving", messages);
        let (mut last, mut since) = (0, Instant::now());
        loop {
            let arrived = self.topic.arrived()?;
            let now = Instant::now();
            bar.set_position(arrived);
            if arrived >= messages || end.is_some_and(|end| now >= end) {
                bar.finish_and_clear();
                return Ok(Seen {
                    at: now,
                    arrived,
                    usage: worker.usage()?,
                });
            }
            worker.check()?;
            if arrived > last {
                (last, since) = (arrived, now);
            } else if since.elapsed() > PATIENCE {
                return Err(
                    format!("{arrived} of {messages} messages arrived, then none for {PATIENCE:?}").into(),
                );
            }
            tokio::time::sleep(ASK).await;
        }
    }

    /// Whether everything below `to` arrived, from `from` on, once and in order, and is settled but for `left` messages.
    pub(crate) async fn verify(&self, from: u64, to: u64, left: u64) -> Outcome<Result<(), String>> {
        let mut ledger = Ledger::new(self.flow, from);
        self.topic.read_into(&mut ledger)?;
        let unsettled = self.place.left(self.table).await?;
        Ok(ledger.verdict(Some(to)).and_then(|()| {
            if unsettled == left {
                Ok(())
            } else {
                Err(format!(
                    "{unsettled} messages are left in the table, and should be {left}"
                ))
            }
        }))
    }

    pub(crate) async fn remove(self) -> Outcome<()> {
        self.place.remove().await?;
        self.topic.delete().await
    }
}

/// One drain of a backlog.
#[derive(Debug, Clone)]
pub(crate) struct Drained {
    /// Messages a second.
    pub(crate) rate: f64,
    /// Microseconds of CPU for a message.
    pub(crate) cost: f64,
    /// Most MiB that were resident.
    pub(crate) peak: f64,
    /// Microseconds of CPU for a message, of each server and of the whole machine, until the last message's arrival.
    pub(crate) elsewhere: Vec<(&'static str, f64)>,
}

/// Drains a fresh backlog, from the word to begin to the last message's arrival; none when it does not count.
pub(crate) async fn drain(
    bench: &mut Bench,
    subject: Subject<'_>,
    flow: Flow,
    messages: u64,
    system: System,
) -> Outcome<Option<Drained>> {
    let mut stage = Stage::new(bench, flow, system).await?;
    stage.fill(0..messages).await?;
    stage.place.calm().await?;
    let mut worker = stage.worker(bench, system).await?;
    let before = worker.usage()?;
    let elsewhere = bench.elsewhere()?;
    let start = worker.go().await?;
    let end = stage.until(messages, None, &mut worker).await?;
    let elsewhere = std::iter::zip(elsewhere, bench.elsewhere()?)
        .map(|((name, before), (_, after))| (name, cost(after.saturating_sub(before), messages)))
        .collect();
    // Read at the very end: what is settled after the last message's arrival is paid as well.
    let used = worker.stop().await?;
    let verdict = stage.verify(0, messages, 0).await?;
    stage.remove().await?;
    let drained = Drained {
        rate: count(messages) / (end.at - start).as_secs_f64(),
        cost: cost(used.cpu.saturating_sub(before.cpu), messages),
        peak: mebibytes(used.peak),
        elsewhere,
    };
    if !bench.counts(subject, verdict) {
        return Ok(None);
    }
    say(&format!(
        "{} {} {}: {:.0} messages/s, {:.2} µs CPU, {:.0} MiB",
        subject.workload, subject.system, subject.case, drained.rate, drained.cost, drained.peak
    ));
    Ok(Some(drained))
}

/// One drain that is not measured: the broker's code is compiled while it runs.
pub(crate) async fn warm_up(bench: &mut Bench) -> Outcome<()> {
    let subject = Subject {
        workload: "warm up",
        system: System::Outbox.name(),
        case: "",
    };
    let messages = bench.size(bench.server.store.drained(), 20_000);
    drain(bench, subject, Flow::new(1024, 10_000), messages, System::Outbox).await?;
    Ok(())
}

pub(crate) fn cost(cpu: Duration, messages: u64) -> f64 {
    cpu.as_secs_f64() * 1e6 / count(messages)
}

pub(crate) fn mebibytes(bytes: u64) -> f64 {
    count(bytes) / f64::from(1 << 20)
}

/// A count as a figure.
#[expect(clippy::cast_precision_loss, reason = "nothing here is counted beyond 2^52")]
pub(crate) const fn count(number: u64) -> f64 {
    number as f64
}

/// A bar, where somebody looks.
pub(crate) fn bar(what: &'static str, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total).with_message(what);
    if let Ok(style) =
        indicatif::ProgressStyle::with_template("{msg:>10} {wide_bar} {human_pos}/{human_len} {eta}")
    {
        bar.set_style(style);
    }
    bar
}

/// Tells people how it goes; what was found goes to standard output.
pub(crate) fn say(text: &str) {
    eprintln!("{text}");
}
