//! How a relay is doing: what a probe of the process wants to know.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Clock;

/// How a running relay is doing, for probes. Clones share it; it stays readable when the relay has ended.
///
/// ```
/// use std::sync::Arc;
/// use outbox_core::{MemorySink, MemoryStore, Relay};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// let relay = Relay::new(Arc::new(MemoryStore::default()), Box::new(MemorySink::default()));
/// let health = relay.health();
/// assert!(health.vitals().leased_ago.is_none()); // it does not run yet
/// relay.drain(std::future::pending()).await?;
/// assert!(health.vitals().leased_ago.is_some());
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Health {
    clock: Arc<dyn Clock>,
    pulse: Pulse,
}

/// What is known of a relay at one moment.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::Vitals;
///
/// /// Ready: it has leases, or was told that there are none for it, not long ago.
/// fn ready(vitals: &Vitals, lease: Duration) -> bool {
///     !vitals.stopping && vitals.leased_ago.is_some_and(|ago| ago < lease)
/// }
/// assert!(!ready(&Vitals::default(), Duration::from_secs(10)));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Vitals {
    /// How long ago its loop last went round, which it does every ten seconds at least. None: it never ran.
    pub turned_ago: Option<Duration>,
    /// How long ago it asked for the leases that it was last given. None: it was never given any.
    pub leased_ago: Option<Duration>,
    /// How many shards it owns. None at all is no fault: others may own them.
    pub shards: usize,
    /// Why the store failed, when the last lease, the last read of messages or holds, or the last settlement did.
    pub store_failure: Option<String>,
    /// Why nothing can go through the sink, while that is so.
    pub sink_failure: Option<String>,
    /// Whether it was told to stop.
    pub stopping: bool,
}

/// Where the driver writes.
#[derive(Debug, Clone, Default)]
pub(super) struct Pulse(Arc<Mutex<State>>);

/// Times are the relay's clock's.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) turned: Option<Duration>,
    pub(super) leased: Option<Duration>,
    pub(super) shards: usize,
    /// By the operation that failed when it was last tried.
    pub(super) store_failures: BTreeMap<&'static str, String>,
    pub(super) sink_failure: Option<String>,
    pub(super) stopping: bool,
}

impl Pulse {
    /// Held for a moment, and never across an await.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Health {
    pub(super) const fn new(clock: Arc<dyn Clock>, pulse: Pulse) -> Self {
        Self { clock, pulse }
    }

    /// How the relay is doing now.
    #[must_use]
    pub fn vitals(&self) -> Vitals {
        let now = self.clock.now();
        let state = self.pulse.state();
        let ago = |moment: Option<Duration>| moment.map(|moment| now.saturating_sub(moment));
        Vitals {
            turned_ago: ago(state.turned),
            leased_ago: ago(state.leased),
            shards: state.shards,
            store_failure: state
                .store_failures
                .get("lease")
                .or_else(|| state.store_failures.values().next())
                .cloned(),
            sink_failure: state.sink_failure.clone(),
            stopping: state.stopping,
        }
    }
}
