//! A backlog is drained whose messages share one key, or have one each.

use crate::ledger::Flow;
use crate::process::System;
use crate::results::{Outcome, figure};
use crate::stage::{Bench, Subject, count, drain};
use crate::workloads::turn;

const KEYS: [u64; 4] = [1, 100, 10_000, 1_000_000];
/// With so many the others are compared.
const MANY: u64 = 10_000;

pub(super) async fn run(bench: &mut Bench, rounds: usize) -> Outcome<()> {
    let messages = bench.size(200_000, 20_000);
    for round in 0..rounds {
        let mut rates = Vec::new();
        for keys in turn(&KEYS, round) {
            let case = name(keys);
            let subject = subject(&case);
            if let Some(drained) =
                drain(bench, subject, Flow::new(1024, keys), messages, System::Outbox).await?
            {
                bench.record(subject, "rate", "messages/s", drained.rate);
                bench.record(subject, "CPU", "µs/message", drained.cost);
                rates.push((keys, drained.rate));
            }
        }
        let Some(&(_, many)) = rates.iter().find(|(keys, _)| *keys == MANY) else {
            continue;
        };
        for (keys, rate) in rates.into_iter().filter(|(keys, _)| *keys != MANY) {
            let metric = format!("rate, share of that with {}", name(MANY));
            bench.record(subject(&name(keys)), &metric, "%", 100.0 * rate / many);
        }
    }
    Ok(())
}

const fn subject(case: &str) -> Subject<'_> {
    Subject {
        workload: "keys",
        system: "outbox",
        case,
    }
}

fn name(keys: u64) -> String {
    let plural = if keys == 1 { "" } else { "s" };
    let shown = if keys == 1 {
        "1".to_owned()
    } else {
        figure(count(keys))
    };
    format!("{shown} key{plural}")
}
