//! Measures what the relay does and what it costs, against real servers: run by `scripts/bench`.
//!
//! - Systems and cases take turns within each round, because a machine drifts; medians and ranges are told.
//! - What moves the messages is a process of its own, so that its CPU time and memory are its alone.
//! - Time ends when the broker has the last message, never when the relay says so.
//! - Every topic is then read from its beginning. A measurement with a loss, a duplicate or an inversion does not count,
//!   and fails the run.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench prints what it measured"
)]

mod baseline;
mod kafka;
mod ledger;
mod machine;
mod mongo;
mod mysql;
mod place;
mod plot;
mod process;
mod queue;
mod report;
mod results;
mod stage;
mod worker;
mod workloads;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use comfy_table::{CellAlignment, Table};
use outbox::RelayConfig;
use tokio::signal::unix::{SignalKind, signal};

use crate::place::{Server, Store};
use crate::results::{Finding, Machine, Outcome, Results, figure};
use crate::stage::{Bench, say};
use crate::workloads::Workload;

/// Measures the outbox against real servers.
#[derive(Parser)]
#[command(bin_name = "scripts/bench")]
struct Options {
    /// What to measure. Default: all that fits the store.
    workloads: Vec<Workload>,
    /// Where the messages wait.
    #[arg(long, value_enum, default_value = "postgres")]
    store: Store,
    /// Rounds. Default: 5, or 2 with --quick.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Small sizes: all workloads in a few minutes. Good to see that it works, and for nothing else.
    #[arg(long)]
    quick: bool,
    /// Adds what is found to a file, in place of what it has of the same workloads and store.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draws what is found.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Settings of the relay that are not the defaults: '{"batch_rows": 500}'.
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = relay_config)]
    relay: RelayConfig,
    /// Runs what moves the messages under a profiler: 'valgrind --tool=callgrind'.
    #[arg(long, value_name = "COMMAND")]
    under: Option<String>,
    /// Measures nothing: makes the report, and its drawing beside it, of what a file has.
    #[arg(long, num_args = 2, value_names = ["FILE.json", "FILE.md"])]
    report: Option<Vec<PathBuf>>,
    #[arg(long, env = "OUTBOX_TEST_POSTGRES", hide = true, hide_env_values = true)]
    postgres: Option<String>,
    #[arg(long, env = "OUTBOX_TEST_MYSQL", hide = true, hide_env_values = true)]
    mysql: Option<String>,
    #[arg(long, env = "OUTBOX_TEST_MARIADB", hide = true, hide_env_values = true)]
    mariadb: Option<String>,
    #[arg(long, env = "OUTBOX_TEST_MONGO", hide = true, hide_env_values = true)]
    mongo: Option<String>,
    #[arg(long, env = "OUTBOX_TEST_KAFKA", hide = true)]
    kafka: Option<String>,
    /// Files with the ids of the servers' processes, when they run on this machine.
    #[arg(long, env = "OUTBOX_TEST_POSTGRES_PID", hide = true)]
    postgres_pid: Option<PathBuf>,
    #[arg(long, env = "OUTBOX_TEST_MYSQL_PID", hide = true)]
    mysql_pid: Option<PathBuf>,
    #[arg(long, env = "OUTBOX_TEST_MARIADB_PID", hide = true)]
    mariadb_pid: Option<PathBuf>,
    #[arg(long, env = "OUTBOX_TEST_MONGO_PID", hide = true)]
    mongo_pid: Option<PathBuf>,
    #[arg(long, env = "OUTBOX_TEST_KAFKA_PID", hide = true)]
    kafka_pid: Option<PathBuf>,
    /// Passed by cargo bench.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    /// The URL of the store's server, and the file with the id of its process.
    const fn database(&self) -> (Option<&String>, Option<&PathBuf>) {
        match self.store {
            Store::Postgres => (self.postgres.as_ref(), self.postgres_pid.as_ref()),
            Store::Mysql => (self.mysql.as_ref(), self.mysql_pid.as_ref()),
            Store::Mariadb => (self.mariadb.as_ref(), self.mariadb_pid.as_ref()),
            Store::Mongo => (self.mongo.as_ref(), self.mongo_pid.as_ref()),
            Store::Sqlite | Store::Memory => (None, None),
        }
    }
}

fn relay_config(text: &str) -> Result<RelayConfig, String> {
    let config: RelayConfig = serde_json::from_str(text).map_err(|error| error.to_string())?;
    config.check().map_err(|error| error.to_string())?;
    Ok(config)
}

#[tokio::main]
async fn main() -> ExitCode {
    let done = if std::env::args().nth(1).as_deref() == Some(process::WORKER) {
        worker::run().await
    } else {
        run(Options::parse()).await
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Outcome<()> {
    if let Some([json, markdown]) = options.report.as_deref() {
        return write_report(json, markdown);
    }
    let brokers = options
        .kafka
        .clone()
        .ok_or("OUTBOX_TEST_KAFKA is not set: see scripts/services")?;
    let (url, process) = options.database();
    let server = Server::start(options.store, url.map(String::as_str)).await?;
    let machine = machine::describe(&server, &machine::differences(&options.relay)?).await?;
    print_machine(&machine);
    let mut bench = Bench {
        server,
        brokers,
        relay: options.relay.clone(),
        under: options
            .under
            .iter()
            .flat_map(|under| under.split_whitespace().map(str::to_owned))
            .collect(),
        servers: [("database", process), ("broker", options.kafka_pid.as_ref())]
            .into_iter()
            .filter_map(|(name, file)| Some((name, file?)))
            .map(|(name, file)| Ok((name, std::fs::read_to_string(file)?.trim().to_owned())))
            .collect::<Outcome<_>>()?,
        quick: options.quick,
        run: machine.run.clone(),
        samples: Vec::new(),
        failures: Vec::new(),
    };
    let mut terminate = signal(SignalKind::terminate())?;
    // The database is dropped however this ends.
    let measured = tokio::select! {
        measured = measure(&options, &mut bench) => measured,
        _ = tokio::signal::ctrl_c() => Err("interrupted".into()),
        _ = terminate.recv() => Err("told to end".into()),
    };
    let (findings, failures) = (bench.findings(), std::mem::take(&mut bench.failures));
    bench.server.remove().await?;
    print_findings(&findings);
    measured?;
    let results = Results {
        machines: vec![machine],
        findings,
    };
    if let Some(path) = &options.plot {
        std::fs::write(path, plot::drawing(&results))?;
    }
    if let Some(path) = &options.json {
        let mut all = if path.exists() {
            Results::read(path)?
        } else {
            Results::default()
        };
        all.take_over(results);
        all.write(path)?;
    }
    if failures.is_empty() {
        return Ok(());
    }
    Err(format!(
        "{} measurements do not count:\n{}",
        failures.len(),
        failures.join("\n")
    )
    .into())
}

async fn measure(options: &Options, bench: &mut Bench) -> Outcome<()> {
    let rounds = options
        .rounds
        .map_or(if options.quick { 2 } else { 5 }, usize::from);
    let asked = if options.workloads.is_empty() {
        &Workload::ALL[..]
    } else {
        &options.workloads
    };
    stage::warm_up(bench).await?;
    for workload in asked {
        if workload.fits(options.store) {
            workload.run(bench, rounds).await?;
        } else {
            say(&format!(
                "{} is not measured with {}",
                workload.name(),
                options.store.name()
            ));
        }
    }
    Ok(())
}

fn write_report(json: &Path, markdown: &Path) -> Outcome<()> {
    let results = Results::read(json)?;
    std::fs::write(markdown, report::text(&results))?;
    std::fs::write(markdown.with_extension("svg"), plot::drawing(&results))?;
    Ok(())
}

fn print_machine(machine: &Machine) {
    for (name, value) in machine.lines() {
        println!("{name:<20} {value}");
    }
    println!();
}

fn print_findings(findings: &[Finding]) {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header([
        "workload", "system", "case", "metric", "median", "range", "unit", "rounds",
    ]);
    for finding in findings {
        table.add_row([
            finding.workload.clone(),
            finding.system.clone(),
            finding.case.clone(),
            finding.metric.clone(),
            figure(finding.median),
            finding.range(),
            finding.unit.clone(),
            finding.rounds.to_string(),
        ]);
    }
    for column in [4, 5, 7] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{table}");
}
