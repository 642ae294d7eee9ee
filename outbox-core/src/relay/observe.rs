//! What people and machines see of a relay: metrics and logs. The table in the documentation of
//! [`crate::metrics`] is the contract.

use std::sync::Arc;
use std::time::Duration;

use metrics::{Label, counter, gauge, histogram};

use super::machine::Note;
use crate::clock::Clock;
use crate::fetch::Record;
use crate::lease::RelayId;
use crate::store::Stats;

/// The state of the whole outbox.
const STATS: [&str; 7] = [
    "outbox_backlog",
    "outbox_oldest_age_seconds",
    "outbox_retrying",
    "outbox_parked",
    "outbox_dead",
    "outbox_scheduled",
    "outbox_relays",
];

/// Turns the machine's notes into metrics and logs.
pub(super) struct Observer {
    relay: String,
    labels: Vec<Label>,
}

/// Measures how long something takes.
pub(super) struct Timing {
    name: &'static str,
    labels: Vec<Label>,
    clock: Arc<dyn Clock>,
    from: Duration,
}

impl Timing {
    pub(super) fn stop(self) {
        histogram!(self.name, self.labels).record((self.clock.now().saturating_sub(self.from)).as_secs_f64());
    }
}

impl Observer {
    pub(super) fn new(store: &'static str, sink: &'static str, relay: &RelayId) -> Self {
        let labels = vec![Label::new("store", store), Label::new("sink", sink)];
        // From the beginning, so that what never happened is a nought and the first failure a change.
        for name in [
            "outbox_retries_total",
            "outbox_dead_letters_total",
            "outbox_parked_total",
            "outbox_topic_blocks_total",
            "outbox_sink_failures_total",
            "outbox_fenced_total",
            "outbox_resets_total",
        ] {
            counter!(name, labels.clone()).increment(0);
        }
        gauge!("outbox_sink_up", labels.clone()).set(1.0);
        Self {
            relay: relay.to_string(),
            labels,
        }
    }

    pub(super) fn timing(&self, name: &'static str, clock: &Arc<dyn Clock>) -> Timing {
        Timing {
            name,
            labels: self.labels.clone(),
            clock: clock.clone(),
            from: clock.now(),
        }
    }

    /// A batch goes to the sink: how large it is, and how old its oldest message.
    pub(super) fn publishing(&self, records: &[Record], clock: &Arc<dyn Clock>) {
        #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
        histogram!("outbox_batch_records", self.labels.clone()).record(records.len() as f64);
        if let Some(created) = records
            .iter()
            .filter_map(|record| record.message.created_at())
            .min()
        {
            let lag = clock.wall().duration_since(created).unwrap_or_default();
            histogram!("outbox_lag_seconds", self.labels.clone()).record(lag.as_secs_f64());
        }
    }

    /// The state of the whole outbox.
    #[expect(clippy::cast_precision_loss, reason = "metrics are approximate beyond 2^52")]
    pub(super) fn stats(&self, stats: &Stats) {
        self.set_stats([
            stats.backlog.value() as f64,
            stats.oldest_age.unwrap_or_default().as_secs_f64(),
            stats.retrying as f64,
            stats.parked as f64,
            stats.dead as f64,
            stats.scheduled as f64,
            stats.relays.len() as f64,
        ]);
    }

    /// Another relay tells of it from now on.
    pub(super) fn forget_stats(&self) {
        self.set_stats([f64::NAN; STATS.len()]);
    }

    fn set_stats(&self, values: [f64; STATS.len()]) {
        for (name, value) in STATS.into_iter().zip(values) {
            gauge!(name, self.labels.clone()).set(value);
        }
    }

    pub(super) fn report(&self, notes: Vec<Note>) {
        for note in notes {
            self.note(note);
        }
    }

    fn count(&self, name: &'static str, label: Option<(&'static str, String)>, by: u64) {
        let mut labels = self.labels.clone();
        labels.extend(label.map(|(name, value)| Label::new(name, value)));
        counter!(name, labels).increment(by);
    }

    fn note(&self, note: Note) {
        let relay = self.relay.as_str();
        match note {
            Note::ShardGained(owned) => {
                gauge!("outbox_shards_owned", self.labels.clone()).increment(1.0);
                self.count("outbox_lease_changes_total", Some(("change", "gained".into())), 1);
                tracing::debug!(
                    relay,
                    shard = owned.shard.0,
                    epoch = owned.epoch.0,
                    "shard gained"
                );
            }
            Note::ShardLost { shard, why } => {
                gauge!("outbox_shards_owned", self.labels.clone()).decrement(1.0);
                self.count("outbox_lease_changes_total", Some(("change", why.into())), 1);
                match why {
                    "released" => tracing::debug!(relay, shard = shard.0, why, "shard given up"),
                    _ => tracing::warn!(
                        relay,
                        shard = shard.0,
                        why,
                        "shard lost; its unsettled messages are delivered again"
                    ),
                }
            }
            Note::Fenced(shard) => {
                self.count("outbox_fenced_total", None, 1);
                tracing::warn!(
                    relay,
                    shard = shard.0,
                    "a settlement was refused: the shard has a new owner"
                );
            }
            Note::Published { records } => tracing::trace!(relay, records, "handed over"),
            Note::Outcome { topic, class, count } => {
                let mut labels = self.labels.clone();
                labels.extend([
                    Label::new("topic", topic.to_string()),
                    Label::new("outcome", class),
                ]);
                counter!("outbox_outcomes_total", labels).increment(count);
                tracing::trace!(relay, %topic, class, count, "outcomes");
            }
            Note::Retrying {
                what,
                attempts,
                pause,
                reason,
            } => {
                self.count("outbox_retries_total", None, 1);
                tracing::info!(relay, what, attempts, ?pause, %reason, "will be tried again");
            }
            Note::Dead {
                what,
                attempts,
                reason,
            } => {
                self.count("outbox_dead_letters_total", None, 1);
                tracing::error!(relay, what, attempts, %reason, "dead letter: requeue or discard it when the cause is known");
            }
            Note::Parked {
                what,
                attempts,
                reason,
            } => {
                self.count("outbox_parked_total", None, 1);
                tracing::error!(relay, what, attempts, %reason, "parked: waits until it is resumed, requeued or discarded");
            }
            Note::TopicHeld { topic, pause, reason } => {
                self.count("outbox_topic_blocks_total", None, 1);
                tracing::warn!(relay, %topic, ?pause, %reason, "topic held; it is probed after the pause");
            }
            Note::TopicFlows { topic } => tracing::info!(relay, %topic, "topic flows again"),
            Note::SinkDown { reason, pause } => {
                gauge!("outbox_sink_up", self.labels.clone()).set(0.0);
                self.count("outbox_sink_failures_total", None, 1);
                tracing::warn!(relay, %reason, ?pause, "the sink cannot be used; nothing is lost, no attempt is counted");
            }
            Note::SinkUp => {
                gauge!("outbox_sink_up", self.labels.clone()).set(1.0);
                tracing::info!(relay, "the sink can be used again");
            }
            Note::Reset { reason } => {
                self.count("outbox_resets_total", None, 1);
                tracing::error!(relay, reason, "the store is not the one it was: starting anew");
            }
            Note::StoreFailed {
                operation,
                error,
                pause,
            } => {
                self.count(
                    "outbox_store_failures_total",
                    Some(("operation", operation.into())),
                    1,
                );
                if error.is_retryable() {
                    tracing::warn!(relay, operation, %error, ?pause, "the store failed; it is tried again");
                } else {
                    tracing::error!(relay, operation, error = ?error, ?pause, "the store refused; it is tried again, but someone must act");
                }
            }
            Note::ContractBroken { who, what } => {
                self.count("outbox_contract_breaches_total", Some(("who", who.into())), 1);
                tracing::error!(
                    relay,
                    who,
                    what,
                    "a contract was broken; run the conformance suite on it"
                );
            }
        }
    }
}
