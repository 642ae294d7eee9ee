//! The end of the demo: what was promised beside what was found.

use std::time::Duration;

use comfy_table::{Cell, Color};
use serde::Serialize;

use super::promise::Verdict;
use crate::args::DemoArgs;
use crate::exit::Result;
use crate::output::{self, coloured, number};

/// All of it as JSON.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    verdict: &'a Verdict,
    orders: u32,
    keys: u32,
    /// `mock`, or the address.
    broker: &'a str,
    relays_killed: u32,
    seconds: f64,
}

pub(super) fn json(verdict: &Verdict, args: &DemoArgs, took: Duration) -> Result<()> {
    output::json(&Report {
        verdict,
        orders: args.orders,
        keys: args.keys,
        broker: args.kafka.as_deref().unwrap_or("mock"),
        relays_killed: 1,
        seconds: (took.as_secs_f64() * 1_000.0).round() / 1_000.0,
    })
}

pub(super) fn table(verdict: &Verdict, mock: bool, took: Duration) -> Result<()> {
    let mut table = output::table(["the promise", "", "expected", "found", ""]);
    let mut row = |promise: &str, what: &str, expected: String, found: String| {
        let mark = match expected == found {
            true => coloured("✔", Color::Green),
            false => coloured("✘ BROKEN", Color::Red),
        };
        table.add_row([
            Cell::new(promise),
            Cell::new(what),
            number(expected),
            number(found),
            mark,
        ]);
    };
    let zero = || "0".to_owned();
    row(
        "what commits is delivered",
        "messages delivered",
        verdict.committed.to_string(),
        verdict.delivered.to_string(),
    );
    row("", "lost", zero(), verdict.lost.to_string());
    row(
        "",
        "left in the outbox",
        zero(),
        verdict.left_in_outbox.to_string(),
    );
    row(
        "what rolls back is not",
        &format!("delivered, of {} rolled back", verdict.rolled_back),
        zero(),
        verdict.phantoms.to_string(),
    );
    row(
        "order per customer",
        "gaps and inversions",
        zero(),
        verdict.order_gaps.to_string(),
    );
    row(
        "each effect exactly once",
        "repeated by Kafka, dropped by the inbox",
        verdict.duplicates_at_broker.to_string(),
        verdict.duplicates_dropped.to_string(),
    );
    row(
        "",
        "sum of all orders",
        verdict.sum_expected.to_string(),
        verdict.sum_applied.to_string(),
    );
    row(
        "",
        "accounts that differ",
        zero(),
        verdict.accounts_wrong.to_string(),
    );
    output::line("")?;
    output::line(table.to_string())?;
    output::line("")?;
    let seconds = took.as_secs_f64();
    output::line(if verdict.kept {
        format!("Every part of the promise held, with a relay killed half-way, in {seconds:.1} s.")
    } else {
        format!("THE PROMISE WAS BROKEN, see above; after {seconds:.1} s.")
    })?;
    if mock {
        output::line(
            "The broker here is a mock, which shows the flow and proves little: the proof is in the tests on real Kafka.\n\
             To see it on yours: outbox demo --kafka HOST:PORT",
        )?;
    }
    Ok(())
}
