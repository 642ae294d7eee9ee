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
