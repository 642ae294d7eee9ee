//! The only clock of the relay.

use std::fmt;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// Tells monotonic time, which is all that the relay decides by: leases run in the database's time, and wall clocks
/// jump.
///
/// ```
/// use std::time::{Duration, SystemTime};
/// use outbox_core::Clock;
///
/// /// A clock that stands where a test has put it.
/// #[derive(Debug)]
/// struct Stopped(Duration);
///
/// impl Clock for Stopped {
///     fn now(&self) -> Duration { self.0 }
///     fn wall(&self) -> SystemTime { SystemTime::UNIX_EPOCH + self.0 }
/// }
/// assert_eq!(Stopped(Duration::from_secs(5)).now().as_secs(), 5);
/// ```
pub trait Clock: Send + Sync + fmt::Debug + 'static {
    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;

    /// The wall clock, for metrics alone: no decision rests on it.
    fn wall(&self) -> SystemTime;
}

/// Tokio's clock, which tests can pause.
///
/// ```
/// use outbox_core::{Clock, MonotonicClock};
///
/// let clock = MonotonicClock::new();
/// assert!(clock.now() <= clock.now());
/// ```
#[derive(Debug, Clone, Copy)]
pub struct MonotonicClock(Instant);

impl MonotonicClock {
    /// A clock that starts now.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it reads the time")]
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}
