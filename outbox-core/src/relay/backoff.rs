//! Pauses between attempts: exponential with full jitter.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::config::in_range;
use crate::error::Result;
use crate::human;

/// Pauses that double from `initial` to `max`, each drawn at random between nothing and its full length, so that
/// what failed together does not come back together.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::{Backoff, RelayConfig};
///
/// let retry = Backoff { initial: Duration::from_secs(1), max: Duration::from_secs(60) };
/// let ceilings: Vec<_> = [1, 2, 3, 10].map(|attempts| retry.ceiling(attempts).as_secs()).into();
/// assert_eq!(ceilings, [1, 2, 4, 60]);
/// let config = RelayConfig { retry, ..RelayConfig::default() };
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backoff {
    /// The longest first pause.
    #[serde(with = "human")]
    pub initial: Duration,
    /// The longest pause at all.
    #[serde(with = "human")]
    pub max: Duration,
}

impl Backoff {
    /// The longest pause after `attempts` failures; 0 counts as 1.
    #[must_use]
    pub fn ceiling(&self, attempts: u32) -> Duration {
        let factor = 2_u32.checked_pow(attempts.saturating_sub(1)).unwrap_or(u32::MAX);
        self.initial.saturating_mul(factor).min(self.max)
    }

    /// A pause after `attempts` failures, drawn anew at each call.
    #[must_use]
    pub fn pause(&self, attempts: u32, random: &mut fastrand::Rng) -> Duration {
        // The factor is below one, so the product cannot overflow.
        self.ceiling(attempts).mul_f64(random.f64())
    }

    /// Whether both are within their ranges; `fields` are the names of `initial` and `max` for people.
    pub(super) fn check(&self, fields: [&'static str; 2]) -> Result<()> {
        in_range(fields[0], self.initial, Duration::from_millis(1), self.max)?;
        in_range(fields[1], self.max, self.initial, Duration::from_secs(24 * 3600))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pauses_stay_below_a_ceiling_that_never_falls(attempts: u32, initial in 1..1_000_000_u64, seed: u64) {
            let backoff = Backoff { initial: Duration::from_micros(initial), max: Duration::from_secs(60) };
            let mut random = fastrand::Rng::with_seed(seed);
            prop_assert!(backoff.pause(attempts, &mut random) <= backoff.ceiling(attempts));
            prop_assert!(backoff.ceiling(attempts) <= backoff.ceiling(attempts.saturating_add(1)));
            prop_assert!(backoff.ceiling(attempts) <= backoff.max);
        }
    }

    #[test]
    fn nothing_overflows() {
        let backoff = Backoff {
            initial: Duration::MAX,
            max: Duration::MAX,
        };
        let mut random = fastrand::Rng::with_seed(1);
        for attempts in [0, 1, 33, u32::MAX] {
            assert_eq!(backoff.ceiling(attempts), Duration::MAX);
            let _ = backoff.pause(attempts, &mut random);
        }
    }

    #[test]
    fn pauses_are_drawn_from_all_of_what_is_allowed() {
        let backoff = Backoff {
            initial: Duration::from_secs(1),
            max: Duration::from_secs(60),
        };
        let mut random = fastrand::Rng::with_seed(1);
        for attempts in [0, 1, 4, 99] {
            let ceiling = backoff.ceiling(attempts);
            let pauses: Vec<Duration> = (0..200).map(|_| backoff.pause(attempts, &mut random)).collect();
            assert!(
                pauses.iter().any(|pause| *pause < ceiling / 10),
                "{attempts}: some are short"
            );
            assert!(
                pauses.iter().any(|pause| *pause > ceiling / 10 * 9),
                "{attempts}: some are long"
            );
            assert!(pauses.iter().all(|pause| *pause <= ceiling));
        }
    }
}
