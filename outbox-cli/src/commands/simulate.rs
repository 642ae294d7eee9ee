//! `outbox simulate`: the relay in simulated worlds, as many as you like.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use comfy_table::Table;
use outbox::sim::{Simulation, Summary, Violation};
use serde::Serialize;

use crate::args::SimulateArgs;
use crate::exit::{Answer, Code, Failure, Result};
use crate::output::{self, number};

/// What many worlds came to.
#[derive(Debug, Default, Serialize)]
struct Report {
    first_seed: u64,
    worlds: u64,
    committed: u64,
    arrived: u64,
    duplicates: u64,
    dead: u64,
    /// What went wrong, and how often.
    faults: BTreeMap<&'static str, u64>,
    /// How many worlds showed commits in which way.
    visibility: BTreeMap<&'static str, u64>,
    /// By the clocks of the worlds.
    simulated_seconds: f64,
    seconds: f64,
    /// The first one by its seed, if there was one.
    violation: Option<Violation>,
}

impl Report {
    fn add(&mut self, summary: &Summary) {
        self.worlds += 1;
        self.committed += summary.committed;
        self.arrived += summary.arrived;
        self.duplicates += summary.duplicates;
        self.dead += summary.dead;
        for (fault, times) in &summary.faults {
            *self.faults.entry(fault).or_default() += times;
        }
        *self.visibility.entry(summary.visibility).or_default() += 1;
        self.simulated_seconds += Duration::from_millis(summary.millis).as_secs_f64();
    }

    fn join(&mut self, other: Self) {
        self.worlds += other.worlds;
        self.committed += other.committed;
        self.arrived += other.arrived;
        self.duplicates += other.duplicates;
        self.dead += other.dead;
        for (fault, times) in other.faults {
            *self.faults.entry(fault).or_default() += times;
        }
        for (visibility, worlds) in other.visibility {
            *self.visibility.entry(visibility).or_default() += worlds;
        }
        self.simulated_seconds += other.simulated_seconds;
        let first = self.violation.take().into_iter().chain(other.violation);
        self.violation = first.min_by_key(|violation| violation.seed);
    }

    fn table(&self) -> Table {
        let mut table = output::table(["simulated worlds", ""]);
        let days = self.simulated_seconds / 86_400.0;
        table.add_row(["worlds".into(), number(self.worlds)]);
        table.add_row(["days by their clocks".into(), number(format!("{days:.1}"))]);
        for (visibility, worlds) in &self.visibility {
            table.add_row([format!("  store: {visibility}").into(), number(worlds)]);
        }
        table.add_row(["messages committed".into(), number(self.committed)]);
        table.add_row(["messages arrived".into(), number(self.arrived)]);
        table.add_row(["  again".into(), number(self.duplicates)]);
        table.add_row(["dead letters".into(), number(self.dead)]);
        table.add_row(["faults".into(), number(self.faults.values().sum::<u64>())]);
        for (fault, times) in &self.faults {
            table.add_row([format!("  {fault}").into(), number(times)]);
        }
        table.add_row(["laws broken".into(), number(u8::from(self.violation.is_some()))]);
        table
    }
}

pub(crate) fn run(args: &SimulateArgs) -> Result<Answer> {
    let first = args.seed.unwrap_or(0);
    if args.trace {
        return trace(simulation(args, first).traced());
    }
    let worlds = args.seeds.unwrap_or(if args.seed.is_some() { 1 } else { 1_000 });
    let begun = Instant::now();
    let mut report = simulate(args, first, worlds)?;
    report.first_seed = first;
    report.seconds = begun.elapsed().as_secs_f64();
    if args.json {
        output::json(&report)?;
    } else {
        output::line(report.table().to_string())?;
        output::line("")?;
        output::line(match &report.violation {
            Some(violation) => violation.to_string(),
            None => format!(
                "every law held in all worlds, seeds {first} to {}, in {:.1} s",
                first.saturating_add(worlds - 1),
                report.seconds
            ),
        })?;
    }
    Ok(if report.violation.is_none() {
        Answer::Yes
    } else {
        Answer::No
    })
}

const fn simulation(args: &SimulateArgs, seed: u64) -> Simulation {
    let simulation = Simulation::new(seed);
    if args.calm { simulation.calm() } else { simulation }
}

/// One world, line by line.
fn trace(simulation: Simulation) -> Result<Answer> {
    let (lines, end, answer) = match simulation.run() {
        Ok(summary) => (summary.lines, "every law held".to_owned(), Answer::Yes),
        Err(violation) => {
            let end = violation.to_string();
            (violation.lines, end, Answer::No)
        }
    };
    for line in lines {
        output::line(line)?;
    }
    output::notice(end);
    Ok(answer)
}

/// All seeds, on so many threads, until one breaks a law.
fn simulate(args: &SimulateArgs, first: u64, worlds: u64) -> Result<Report> {
    let threads = args.threads.map_or_else(
        || thread::available_parallelism().map_or(1, NonZero::get),
        |threads| usize::from(threads.get()),
    );
    let (next, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let bar = output::progress(worlds, "worlds");
    let work = || {
        let mut report = Report::default();
        while !over.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= worlds {
                break;
            }
            match simulation(args, first.wrapping_add(index)).run() {
                Ok(summary) => report.add(&summary),
                Err(violation) => {
                    report.worlds += 1;
                    report.violation = Some(violation);
                    over.store(true, Ordering::Relaxed);
                }
            }
            bar.inc(1);
        }
        report
    };
    let mut report = Report::default();
    let mut panicked = false;
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in running {
            match thread.join() {
                Ok(part) => report.join(part),
                Err(_) => panicked = true,
            }
        }
    });
    bar.finish_and_clear();
    if panicked {
        return Err(Failure::new(
            Code::Unexpected,
            "a simulated world panicked: the message above says where",
        ));
    }
    Ok(report)
}
