//! How a relay behaves.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::backoff::Backoff;
use crate::error::{Error, ErrorKind, Result};
use crate::human;

/// How a relay behaves. The defaults suit most; serde reads and writes durations as people do, `10s`.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::{OnFailure, RelayConfig};
///
/// let config = RelayConfig { on_failure: OnFailure::Park, ..RelayConfig::default() };
/// assert!(config.check().is_ok());
/// let error = RelayConfig { batch_rows: 0, ..config }.check().unwrap_err();
/// assert_eq!(error.to_string(), "configure relay: batch_rows must be 1 to 100000 (value: \"0\")");
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RelayConfig {
    /// How long a lease lasts without renewal; a dead relay's shards are taken over after that. Renewed at a third of
    /// it; sending stops at four fifths. 100 ms to 1 h. Default: 10 s.
    #[serde(with = "human")]
    pub lease: Duration,
    /// Most records in one read and in one hand-over to the sink. 1 to 100,000. Default: 2,000.
    pub batch_rows: usize,
    /// Most bytes in one read; one record always passes. At least 1. Default: 4 MiB.
    pub batch_bytes: usize,
    /// Most records that are read and not yet settled. At least `batch_rows`. Default: 8,000.
    pub window_rows: usize,
    /// Most bytes that are read and not yet known to be delivered, give or take one read. Default: 16 MiB.
    pub window_bytes: usize,
    /// Most records in one settlement: short transactions leave room for producers. What belongs to a failure stays
    /// together even beyond that. Default: 2,000.
    pub settle_rows: usize,
    /// The pause between settlements of few records, in which more join: one costs the database about as much for one
    /// record as for ten. It delays no message. A relay that dies delivers so much more a second time. At most
    /// a fifth of `lease`. Default: 20 ms.
    #[serde(with = "human")]
    pub settle_every: Duration,
    /// The pause after a read that left nothing: a longer one gathers more in a batch, which costs everybody less and the
    /// first of them time. Five times as long where messages come fast, and never shorter than the read took.
    /// Default: 1 ms.
    #[serde(with = "human")]
    pub poll_busy: Duration,
    /// Up to what that pause grows while nothing is found. Default: 50 ms.
    #[serde(with = "human")]
    pub poll_idle: Duration,
    /// What happens to a message that cannot be delivered. Default: dead letter, and its key goes on.
    pub on_failure: OnFailure,
    /// How often a message is tried that the sink wants to try again. At least 1. Default: 10.
    pub max_attempts: u32,
    /// The pauses between these attempts. Default: 200 ms to 60 s.
    pub retry: Backoff,
    /// The pauses between probes of a blocked topic. Default: 1 s to 60 s.
    pub topic_retry: Backoff,
    /// The pauses between probes of a sink that nothing can go through, and between calls to a store that fails.
    /// Default: 100 ms to 10 s.
    pub outage_retry: Backoff,
    /// Most keys and keyless messages that may wait at one time; beyond it the topic with most of them is held as a
    /// whole. At least 1. Default: 5,000.
    pub max_holds: usize,
    /// Most messages per second, to spare consumers after an outage. Default: no limit.
    pub rate_limit: Option<u32>,
    /// How long a shutdown waits for what the sink has. Default: 10 s.
    #[serde(with = "human")]
    pub grace: Duration,
    /// How long one call of the store may take before it is given up and repeated: so long nothing is delivered where a
    /// connection is lost and nobody is told, as a firewall does it. Leases are asked for within a third of their time,
    /// whatever this is. Default: 30 s.
    #[serde(with = "human")]
    pub call_timeout: Duration,
    /// How long delivered messages stay in the archive, where the store keeps one. Default: 7 days.
    #[serde(with = "human")]
    pub retention: Duration,
}

/// What happens to a message that can never go, or whose attempts are used up.
///
/// ```
/// use outbox_core::{OnFailure, RelayConfig};
///
/// assert_eq!(RelayConfig::default().on_failure, OnFailure::DeadLetter);
/// let config = RelayConfig { on_failure: OnFailure::Park, ..RelayConfig::default() };
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// It becomes a dead letter and its key goes on.
    #[default]
    DeadLetter,
    /// It stays where it is, and its key waits until an operator resumes, requeues or discards it.
    Park,
}

impl Default for RelayConfig {
    fn default() -> Self {
        let backoff = |initial, max| Backoff {
            initial: Duration::from_millis(initial),
            max: Duration::from_millis(max),
        };
        Self {
            lease: Duration::from_secs(10),
            batch_rows: 2_000,
            batch_bytes: 4 << 20,
            window_rows: 8_000,
            window_bytes: 16 << 20,
            settle_rows: 2_000,
            settle_every: Duration::from_millis(20),
            poll_busy: Duration::from_millis(1),
            poll_idle: Duration::from_millis(50),
            on_failure: OnFailure::DeadLetter,
            max_attempts: 10,
            retry: backoff(200, 60_000),
            topic_retry: backoff(1_000, 60_000),
            outage_retry: backoff(100, 10_000),
            max_holds: 5_000,
            rate_limit: None,
            grace: Duration::from_secs(10),
            call_timeout: Duration::from_secs(30),
            retention: Duration::from_secs(7 * 24 * 60 * 60),
        }
    }
}

impl RelayConfig {
    /// Whether all values are within their ranges.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the field, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        let hour = Duration::from_secs(3600);
        in_range("lease", self.lease, Duration::from_millis(100), hour)?;
        in_range("batch_rows", self.batch_rows, 1, 100_000)?;
        in_range("batch_bytes", self.batch_bytes, 1, 1 << 30)?;
        in_range("window_rows", self.window_rows, self.batch_rows, 1_000_000)?;
        in_range("window_bytes", self.window_bytes, 1, 1 << 34)?;
        in_range("settle_rows", self.settle_rows, 1, 100_000)?;
        in_range("settle_every", self.settle_every, Duration::ZERO, self.lease / 5)?;
        in_range("poll_busy", self.poll_busy, Duration::from_micros(100), hour)?;
        in_range("poll_idle", self.poll_idle, self.poll_busy, hour)?;
        in_range("max_attempts", self.max_attempts, 1, u32::MAX)?;
        in_range("max_holds", self.max_holds, 1, 1_000_000)?;
        if let Some(rate) = self.rate_limit {
            in_range("rate_limit", rate, 1, u32::MAX)?;
        }
        in_range(
            "call_timeout",
            self.call_timeout,
            Duration::from_millis(100),
            hour,
        )?;
        self.retry.check(["retry.initial", "retry.max"])?;
        self.topic_retry
            .check(["topic_retry.initial", "topic_retry.max"])?;
        self.outage_retry
            .check(["outage_retry.initial", "outage_retry.max"])
    }
}

/// Whether a value lies within its range, bounds included.
pub(super) fn in_range<T: PartialOrd + std::fmt::Debug>(
    field: &'static str,
    value: T,
    min: T,
    max: T,
) -> Result<()> {
    if (&min..=&max).contains(&&value) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Invalid,
        "configure relay",
        format!("{field} must be {min:?} to {max:?}"),
    )
    .with("value", format!("{value:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);
    const HOUR: Duration = Duration::from_secs(3600);
    const DAY: Duration = Duration::from_secs(24 * 3600);

    /// What is wrong with the defaults after this change; nothing is nothing.
    fn wrong(change: impl FnOnce(&mut RelayConfig)) -> String {
        let mut config = RelayConfig::default();
        change(&mut config);
        let error = config.check().err();
        error.map(|error| error.to_string()).unwrap_or_default()
    }

    /// Both ends of a range are allowed, and what is beyond them is refused by the field's name and with its value.
    fn ranges<T: Copy + std::fmt::Debug>(
        field: &str,
        allowed: [T; 2],
        refused: [T; 2],
        set: impl Fn(&mut RelayConfig, T),
    ) {
        for value in allowed {
            assert_eq!(wrong(|config| set(config, value)), "", "{field}");
        }
        let [min, max] = allowed;
        for value in refused {
            let expected =
                format!("configure relay: {field} must be {min:?} to {max:?} (value: \"{value:?}\")");
            assert_eq!(wrong(|config| set(config, value)), expected);
        }
    }

    #[test]
    fn the_defaults_are_within_their_ranges() {
        assert_eq!(wrong(|_| ()), "");
    }

    #[test]
    fn counts_are_refused_outside_their_ranges() {
        ranges("batch_rows", [1, 100_000], [0, 100_001], |config, rows| {
            config.batch_rows = rows;
            config.window_rows = 200_000;
        });
        ranges(
            "batch_bytes",
            [1, 1 << 30],
            [0, (1 << 30) + 1],
            |config, bytes| config.batch_bytes = bytes,
        );
        ranges(
            "window_rows",
            [2_000, 1_000_000],
            [1_999, 1_000_001],
            |config, rows| {
                config.window_rows = rows;
            },
        );
        ranges(
            "window_bytes",
            [1, 1 << 34],
            [0, (1 << 34) + 1],
            |config, bytes| config.window_bytes = bytes,
        );
        ranges("settle_rows", [1, 100_000], [0, 100_001], |config, rows| {
            config.settle_rows = rows
        });
        ranges("max_holds", [1, 1_000_000], [0, 1_000_001], |config, holds| {
            config.max_holds = holds
        });
        ranges("max_attempts", [1, u32::MAX], [0, 0], |config, attempts| {
            config.max_attempts = attempts
        });
        ranges("rate_limit", [1, u32::MAX], [0, 0], |config, rate| {
            config.rate_limit = Some(rate)
        });
    }

    #[test]
    fn times_are_refused_outside_their_ranges() {
        ranges(
            "lease",
            [MILLI * 100, HOUR],
            [MILLI * 99, HOUR + MILLI],
            |config, lease| {
                config.lease = lease;
                config.settle_every = Duration::ZERO;
            },
        );
        // A fifth of the lease, which is ten seconds.
        ranges(
            "settle_every",
            [Duration::ZERO, MILLI * 2_000],
            [MILLI * 2_001; 2],
            |config, pause| {
                config.settle_every = pause;
            },
        );
        ranges(
            "poll_busy",
            [MILLI / 10, HOUR],
            [MILLI / 11, HOUR + MILLI],
            |config, pause| {
                config.poll_busy = pause;
                config.poll_idle = HOUR;
            },
        );
        ranges(
            "poll_idle",
            [MILLI, HOUR],
            [MILLI / 2, HOUR + MILLI],
            |config, pause| {
                config.poll_idle = pause;
            },
        );
        ranges(
            "call_timeout",
            [MILLI * 100, HOUR],
            [MILLI * 99, HOUR + MILLI],
            |config, time| {
                config.call_timeout = time;
            },
        );
    }

    #[test]
    fn pauses_are_refused_outside_their_ranges() {
        type Field = fn(&mut RelayConfig) -> &mut Backoff;
        let fields: [(&str, Field); 3] = [
            ("retry", |config| &mut config.retry),
            ("topic_retry", |config| &mut config.topic_retry),
            ("outage_retry", |config| &mut config.outage_retry),
        ];
        for (field, backoff) in fields {
            let initial = format!("{field}.initial");
            ranges(
                &initial,
                [MILLI, MILLI * 7_000],
                [MILLI / 2, MILLI * 7_001],
                |config, pause| {
                    *backoff(config) = Backoff {
                        initial: pause,
                        max: MILLI * 7_000,
                    };
                },
            );
            let max = format!("{field}.max");
            ranges(&max, [MILLI, DAY], [DAY + MILLI; 2], |config, pause| {
                *backoff(config) = Backoff {
                    initial: MILLI,
                    max: pause,
                };
            });
        }
    }
}
