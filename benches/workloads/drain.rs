//! A backlog of messages of 1 KiB is drained: by the relay and by the baselines.

use crate::ledger::Flow;
use crate::place::Store;
use crate::process::System;
use crate::results::Outcome;
use crate::stage::{Bench, Drained, Subject, count, drain, say};
use crate::workloads::turn;

const FLOW: Flow = Flow::new(1024, 10_000);
/// Rows in a claim of the naive baseline.
const NAIVE: i64 = 100;

pub(super) async fn run(bench: &mut Bench, rounds: usize) -> Outcome<()> {
    let systems = match bench.server.store {
        Store::Postgres | Store::Mysql | Store::Mariadb | Store::Mongo => vec![
            System::Outbox,
            System::Batched(tune(bench, System::Batched).await?),
            System::Locked(tune(bench, System::Locked).await?),
            System::Naive(NAIVE),
        ],
        Store::Sqlite => vec![System::Outbox, System::Naive(1)],
        Store::Memory => vec![System::Outbox],
    };
    let backlog = bench.server.store.drained();
    for round in 0..rounds {
        let mut outbox = None;
        let mut others = Vec::new();
        for system in turn(&systems, round) {
            let messages = match system {
                System::Naive(_) => bench.size(2_000, 200),
                _ => bench.size(backlog, 20_000),
            };
            let subject = subject(system);
            let Some(drained) = drain(bench, subject, FLOW, messages, system).await? else {
                continue;
            };
            let Drained {
                rate,
                cost,
                peak,
                elsewhere,
            } = drained;
            bench.record(subject, "rate", "messages/s", rate);
            bench.record(subject, "CPU", "µs/message", cost);
            for (name, cost) in elsewhere {
                bench.record(subject, &format!("CPU of the {name}"), "µs/message", cost);
            }
            bench.record(subject, "peak memory", "MiB", peak);
            match system {
                System::Outbox => outbox = Some(rate),
                other => others.push((other, rate)),
            }
        }
        for (system, rate) in others {
            if let Some(outbox) = outbox {
                let metric = format!("rate, in rates of {}", system.name());
                bench.record(subject(System::Outbox), &metric, "×", outbox / rate);
            }
        }
    }
    Ok(())
}

const fn subject(system: System) -> Subject<'static> {
    Subject {
        workload: "drain",
        system: system.name(),
        case: "",
    }
}

/// The batch with which a baseline is fastest here.
async fn tune(bench: &mut Bench, system: fn(i64) -> System) -> Outcome<i64> {
    let enough = match bench.server.store {
        Store::Mongo => 4_000,
        _ => 30_000,
    };
    let messages = bench.size(enough, 4_000);
    let mut best = (0.0, 500);
    // Where a claim is a transaction of its own that waits for the disk, larger batches may pay.
    let sizes: &[i64] = match bench.server.store {
        Store::Mysql | Store::Mariadb => &[100, 500, 1_000, 2_000, 5_000],
        Store::Postgres | Store::Mongo | Store::Sqlite | Store::Memory => &[100, 500, 1_000, 2_000],
    };
    for &rows in sizes {
        let case = format!("tuning, batch {rows}");
        let subject = Subject {
            case: &case,
            ..subject(system(rows))
        };
        if let Some(drained) = drain(bench, subject, FLOW, messages, system(rows)).await?
            && drained.rate > best.0
        {
            best = (drained.rate, rows);
        }
    }
    say(&format!("{} takes {} rows at a time", system(0).name(), best.1));
    bench.record(
        subject(system(best.1)),
        "best batch",
        "rows",
        count(best.1.unsigned_abs()),
    );
    Ok(best.1)
}
