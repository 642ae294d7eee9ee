//! The names of all metrics, which go through the `metrics` facade. All carry the labels `store` and `sink`.
//!
//! | name | kind | further labels | what it tells |
//! |---|---|---|---|
//! | `outbox_backlog` | gauge | | undelivered messages, an estimate or a lower bound |
//! | `outbox_oldest_age_seconds` | gauge | | the age of the oldest of them |
//! | `outbox_retrying`, `outbox_parked` | gauge | | keys, messages and topics that wait for time, for an operator |
//! | `outbox_dead`, `outbox_scheduled` | gauge | | dead letters; messages not yet due |
//! | `outbox_relays` | gauge | | relays alive |
//! | `outbox_shards_owned` | gauge | | shards that this relay owns |
//! | `outbox_sink_up` | gauge | | 0 while nothing can go through the sink |
//! | `outbox_outcomes_total` | counter | `topic`, `outcome` | what the sink answered: `delivered`, `poison`, `retry`, … |
//! | `outbox_retries_total` | counter | | messages that will be tried again |
//! | `outbox_dead_letters_total`, `outbox_parked_total` | counter | | messages given up; keys stopped |
//! | `outbox_topic_blocks_total` | counter | | topics found unknown or forbidden |
//! | `outbox_sink_failures_total` | counter | | times at which the sink as a whole was in doubt |
//! | `outbox_store_failures_total` | counter | `operation` | calls of the store that failed |
//! | `outbox_fenced_total` | counter | | settlements refused because a shard had a new owner |
//! | `outbox_lease_changes_total` | counter | `change` | shards `gained`, `released`, `taken`, `expired`, `reset` |
//! | `outbox_resets_total` | counter | | times at which the store was another one than before |
//! | `outbox_sweep_surplus_total` | counter | | rows that a reader's sweep found and its cursor had missed: must stay 0 |
//! | `outbox_contract_breaches_total` | counter | `who` | answers of a store or sink that its contract forbids: must stay 0 |
//! | `outbox_batch_records` | histogram | | records handed over at once |
//! | `outbox_fetch_seconds`, `outbox_publish_seconds`, `outbox_settle_seconds` | histogram | | how long these took |
//! | `outbox_lag_seconds` | histogram | | from enqueueing to hand-over, of each batch's oldest message |
//!
//! Of the whole outbox, which is what the gauges down to `outbox_relays` tell, one relay tells: the owner of the first shard.
//! When it loses that shard they are NaN there. Take their `max` over all relays.

use metrics::{describe_counter, describe_gauge, describe_histogram};

/// Gives the recorder of this process a description of every metric. For programs that show metrics; a relay works
/// without it.
///
/// ```
/// // after a recorder was installed:
/// outbox_core::metrics::describe();
/// ```
pub fn describe() {
    for (name, kind, help) in METRICS {
        match kind {
            Kind::Gauge => describe_gauge!(*name, *help),
            Kind::Counter => describe_counter!(*name, *help),
            Kind::Histogram => describe_histogram!(*name, *help),
        }
    }
}

#[derive(Debug, PartialEq)]
enum Kind {
    Gauge,
    Counter,
    Histogram,
}

/// All metrics, in the order of the table above.
const METRICS: &[(&str, Kind, &str)] = &[
    (
        "outbox_backlog",
        Kind::Gauge,
        "Undelivered messages, an estimate or a lower bound.",
    ),
    (
        "outbox_oldest_age_seconds",
        Kind::Gauge,
        "The age of the oldest undelivered message.",
    ),
    (
        "outbox_retrying",
        Kind::Gauge,
        "Keys, messages and topics that wait for a retry.",
    ),
    (
        "outbox_parked",
        Kind::Gauge,
        "Keys, messages and topics that wait for an operator.",
    ),
    ("outbox_dead", Kind::Gauge, "Dead letters."),
    ("outbox_scheduled", Kind::Gauge, "Messages not yet due."),
    ("outbox_relays", Kind::Gauge, "Relays alive."),
    ("outbox_shards_owned", Kind::Gauge, "Shards that this relay owns."),
    (
        "outbox_sink_up",
        Kind::Gauge,
        "0 while nothing can go through the sink.",
    ),
    (
        "outbox_outcomes_total",
        Kind::Counter,
        "What the sink answered, by topic and outcome.",
    ),
    (
        "outbox_retries_total",
        Kind::Counter,
        "Messages that will be tried again.",
    ),
    ("outbox_dead_letters_total", Kind::Counter, "Messages given up."),
    (
        "outbox_parked_total",
        Kind::Counter,
        "Keys and messages stopped until an operator decides.",
    ),
    (
        "outbox_topic_blocks_total",
        Kind::Counter,
        "Topics found unknown or forbidden.",
    ),
    (
        "outbox_sink_failures_total",
        Kind::Counter,
        "Times at which the sink as a whole was in doubt.",
    ),
    (
        "outbox_store_failures_total",
        Kind::Counter,
        "Calls of the store that failed, by operation.",
    ),
    (
        "outbox_fenced_total",
        Kind::Counter,
        "Settlements refused because a shard had a new owner.",
    ),
    (
        "outbox_lease_changes_total",
        Kind::Counter,
        "Shards gained, released, taken, expired, reset.",
    ),
    (
        "outbox_resets_total",
        Kind::Counter,
        "Times at which the store was another one than before.",
    ),
    (
        "outbox_sweep_surplus_total",
        Kind::Counter,
        "Rows that a reader's cursor had missed: must stay 0.",
    ),
    (
        "outbox_contract_breaches_total",
        Kind::Counter,
        "Answers that a contract forbids: must stay 0.",
    ),
    (
        "outbox_batch_records",
        Kind::Histogram,
        "Records handed over at once.",
    ),
    ("outbox_fetch_seconds", Kind::Histogram, "How long reads took."),
    (
        "outbox_publish_seconds",
        Kind::Histogram,
        "How long the sink took from hand-over to outcome.",
    ),
    (
        "outbox_settle_seconds",
        Kind::Histogram,
        "How long settlements took.",
    ),
    (
        "outbox_lag_seconds",
        Kind::Histogram,
        "From enqueueing to hand-over, of each batch's oldest message.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_and_the_descriptions_name_the_same_metrics() {
        let table = include_str!("metrics.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("//! | `"));
        let named = table.flat_map(|row| {
            let cells: Vec<&str> = row.split(" | ").collect();
            let kind = match cells[1] {
                "gauge" => Kind::Gauge,
                "counter" => Kind::Counter,
                _ => Kind::Histogram,
            };
            let names = cells[0].trim_end_matches('`').split("`, `");
            names
                .map(move |name| (name, kind == Kind::Gauge, kind == Kind::Counter))
                .collect::<Vec<_>>()
        });
        let described = METRICS
            .iter()
            .map(|(name, kind, _)| (*name, *kind == Kind::Gauge, *kind == Kind::Counter));
        assert_eq!(named.collect::<Vec<_>>(), described.collect::<Vec<_>>());
    }
}
