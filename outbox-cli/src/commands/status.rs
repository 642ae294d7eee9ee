//! `outbox status`: the state of the outbox, for people and for probes.

use std::collections::BTreeMap;

use comfy_table::{Cell, Color, Table};
use outbox::human::short;
use outbox::{OutboxStore, Stats};
use serde::Serialize;

use super::signals::Signals;
use super::sureness;
use crate::args::StatusArgs;
use crate::exit::{Answer, Code, Failure, Result};
use crate::output::{self, coloured, number, readable};

/// The state as JSON: durations in seconds, counts as numbers with a word on how sure they are.
#[derive(Serialize)]
struct Report {
    store: &'static str,
    backlog: u64,
    /// `exact`, `at_least` or `about`.
    backlog_is: &'static str,
    oldest_age_seconds: Option<f64>,
    retrying: u64,
    parked: u64,
    dead: u64,
    scheduled: u64,
    processed: u64,
    processed_is: &'static str,
    relays: Vec<String>,
    leases: Vec<Lease>,
    /// Whether the limits of the command line are kept.
    ok: bool,
}

#[derive(Serialize)]
struct Lease {
    shard: u16,
    owner: Option<String>,
    epoch: i64,
    time_left_seconds: f64,
}

pub(crate) async fn run(args: &StatusArgs) -> Result<Answer> {
    let store = super::store(&args.config).await?;
    let Some(interval) = args.watch else {
        return show(args, &*store, &store.stats().await?);
    };
    let mut signals = Signals::listen().map_err(|error| {
        Failure::new(Code::Unexpected, format!("listen for signals: {error}")).because(&error)
    })?;
    let mut answer = None;
    loop {
        let stats = tokio::select! {
            stats = store.stats() => stats?,
            signal = signals.next() => return Ok(answer.unwrap_or(Answer::Interrupted(signal))),
        };
        if !args.json {
            output::clear();
        }
        let last = *answer.insert(show(args, &*store, &stats)?);
        tokio::select! {
            _ = signals.next() => return Ok(last),
            () = tokio::time::sleep(interval) => {}
        }
    }
}

fn show(args: &StatusArgs, store: &dyn OutboxStore, stats: &Stats) -> Result<Answer> {
    let late = matches!((args.max_age, stats.oldest_age), (Some(limit), Some(age)) if age > limit);
    let deaths = args.max_dead.is_some_and(|limit| stats.dead > limit);
    let ok = !late && !deaths;
    if args.json {
        output::json(&report(store.capabilities().name, stats, ok))?;
    } else {
        output::line(counts(stats, late, deaths).to_string())?;
        output::line("")?;
        output::line(owners(stats).to_string())?;
    }
    Ok(if ok { Answer::Yes } else { Answer::No })
}

fn counts(stats: &Stats, late: bool, deaths: bool) -> Table {
    let mut table = output::table(["outbox", "", ""]);
    let mut row = |name: &str, value: String, alarming: bool, meaning: &str| {
        let value = match alarming {
            true => coloured(value, Color::Red),
            false => Cell::new(value),
        };
        let value = value.set_alignment(comfy_table::CellAlignment::Right);
        table.add_row([Cell::new(name), value, Cell::new(meaning)]);
    };
    let age = stats.oldest_age.map_or_else(|| "–".to_owned(), short);
    row(
        "backlog",
        stats.backlog.to_string(),
        false,
        "committed and not delivered",
    );
    row("oldest", age, late, "age of the oldest of them");
    row(
        "retrying",
        stats.retrying.to_string(),
        false,
        "keys, messages, topics that wait for a retry",
    );
    row(
        "parked",
        stats.parked.to_string(),
        stats.parked > 0,
        "the same that wait for you: outbox parked list",
    );
    row(
        "dead",
        stats.dead.to_string(),
        deaths || stats.dead > 0,
        "given up: outbox dead list",
    );
    row("scheduled", stats.scheduled.to_string(), false, "not yet due");
    row(
        "processed",
        stats.processed.to_string(),
        false,
        "delivered and kept in the archive",
    );
    table
}

/// Who owns what: a row a relay, since shards may be many.
fn owners(stats: &Stats) -> Table {
    let mut table = output::table(["relay", "shards", "epochs", "lease left"]);
    let mut owners: BTreeMap<Option<&str>, Vec<&outbox::LeaseStatus>> = BTreeMap::new();
    for relay in &stats.relays {
        owners.insert(Some(relay.as_str()), Vec::new());
    }
    for lease in &stats.leases {
        let owner = lease.owner.as_ref().map(outbox::RelayId::as_str);
        owners.entry(owner).or_default().push(lease);
    }
    // Who owns nothing comes last: relays without shards are spare, shards without relay are not delivered.
    let (nobody, relays): (Vec<_>, Vec<_>) = owners.into_iter().partition(|(owner, _)| owner.is_none());
    for (owner, leases) in relays.into_iter().chain(nobody) {
        let epochs = leases.iter().map(|lease| lease.epoch.0);
        let epochs = match (epochs.clone().min(), epochs.max()) {
            (Some(min), Some(max)) if min == max => min.to_string(),
            (Some(min), Some(max)) => format!("{min}–{max}"),
            _ => String::new(),
        };
        let left = leases.iter().map(|lease| lease.time_left).min();
        table.add_row([
            owner.map_or_else(
                || coloured("nobody", Color::Yellow),
                |owner| Cell::new(readable(owner)),
            ),
            Cell::new(ranges(leases.iter().map(|lease| lease.shard.0))),
            number(epochs),
            number(left.filter(|_| owner.is_some()).map_or_else(String::new, short)),
        ]);
    }
    table
}

/// Numbers that follow each other as ranges: `0–3, 7`.
fn ranges(numbers: impl Iterator<Item = u16>) -> String {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, end)) if end.checked_add(1) == Some(number) => *end = number,
            _ => ranges.push((number, number)),
        }
    }
    let show = |(from, to)| {
        if from == to {
            format!("{from}")
        } else {
            format!("{from}–{to}")
        }
    };
    ranges.into_iter().map(show).collect::<Vec<_>>().join(", ")
}

fn report(store: &'static str, stats: &Stats, ok: bool) -> Report {
    Report {
        store,
        backlog: stats.backlog.value(),
        backlog_is: sureness(stats.backlog),
        oldest_age_seconds: stats.oldest_age.map(|age| age.as_secs_f64()),
        retrying: stats.retrying,
        parked: stats.parked,
        dead: stats.dead,
        scheduled: stats.scheduled,
        processed: stats.processed.value(),
        processed_is: sureness(stats.processed),
        relays: stats.relays.iter().map(ToString::to_string).collect(),
        leases: stats
            .leases
            .iter()
            .map(|lease| Lease {
                shard: lease.shard.0,
                owner: lease.owner.as_ref().map(ToString::to_string),
                epoch: lease.epoch.0,
                time_left_seconds: lease.time_left.as_secs_f64(),
            })
            .collect(),
        ok,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_shown_as_ranges() {
        assert_eq!(ranges([0, 1, 2, 5, 7, 8].into_iter()), "0–2, 5, 7–8");
        assert_eq!(ranges([].into_iter()), "");
    }
}
