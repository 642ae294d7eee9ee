//! The relay: reads committed messages, hands them to the sink, settles what became of them.
//!
//! [`machine`] decides, [`driver`] does. A reader of this code begins with the machine's documentation.

mod backoff;
mod config;
mod driver;
mod edge;
mod health;
mod machine;
mod observe;

use std::sync::Arc;

pub use backoff::Backoff;
pub use config::{OnFailure, RelayConfig};
pub use health::{Health, Vitals};

use crate::clock::{Clock, MonotonicClock};
use crate::error::Result;
use crate::lease::RelayId;
use crate::sink::Sink;
use crate::store::OutboxStore;
use crate::wake::Waker;

/// Moves messages from a store to a sink. Run as many as you like: they share the shards by lease.
///
/// # Promise
/// A message whose transaction committed is handed to the sink until the sink has it, or it is dead-lettered, or
/// parked; never one of a transaction that rolled back. Per topic and key, first deliveries are in order and without
/// a gap, through retries, crashes and changes of owner. What is not known to be settled when a relay dies is
/// delivered again.
///
/// # Cancel safety
/// Dropping the future of [`run`](Self::run) stops everything at once; no task outlives it. It is a crash as far as
/// the outbox is concerned: the leases run out by themselves, and unsettled messages are delivered again. For an
/// orderly end let `shutdown` resolve.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use outbox_core::{MemorySink, MemoryStore, Relay};
/// # use outbox_core::Message;
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> outbox_core::Result<()> {
/// let store = MemoryStore::default();
/// let mut tx = store.begin();
/// store.enqueue(&mut tx, &Message::builder("orders").key("42").payload("placed").build()?).await?;
/// tx.commit();
///
/// let sink = MemorySink::default();
/// let relay = Relay::new(Arc::new(store), Box::new(sink.clone()));
/// relay.drain(std::future::pending()).await?;
/// assert_eq!(sink.delivered().len(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Relay {
    store: Arc<dyn OutboxStore>,
    sink: Box<dyn Sink>,
    config: RelayConfig,
    id: RelayId,
    waker: Waker,
    clock: Arc<dyn Clock>,
    seed: u64,
    pulse: health::Pulse,
}

impl Relay {
    /// A relay with the default configuration and a name of its own.
    #[must_use]
    pub fn new(store: Arc<dyn OutboxStore>, sink: Box<dyn Sink>) -> Self {
        Self {
            store,
            sink,
            config: RelayConfig::default(),
            id: RelayId::unique("relay"),
            waker: Waker::new(),
            clock: Arc::new(MonotonicClock::new()),
            seed: fastrand::u64(..),
            pulse: health::Pulse::default(),
        }
    }

    /// With another configuration. It is checked when the relay runs.
    #[must_use]
    pub fn with_config(mut self, config: RelayConfig) -> Self {
        self.config = config;
        self
    }

    /// With a name. No two running relays of an outbox may have the same.
    #[must_use]
    pub fn with_id(mut self, id: RelayId) -> Self {
        self.id = id;
        self
    }

    /// With a waker that producers of the same process share.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use outbox_core::{MemorySink, MemoryStore, Relay, Waker};
    ///
    /// let waker = Waker::new();
    /// let relay = Relay::new(Arc::new(MemoryStore::default()), Box::new(MemorySink::new()))
    ///     .with_waker(waker.clone());
    /// // a producer of this process, after its commit:
    /// waker.wake();
    /// ```
    #[must_use]
    pub fn with_waker(mut self, waker: Waker) -> Self {
        self.waker = waker;
        self
    }

    /// With another clock, for tests.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// With a seed for all that it leaves to chance, for tests.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The relay's name.
    #[must_use]
    pub fn id(&self) -> &RelayId {
        &self.id
    }

    /// The waker that wakes this relay.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// How it is doing, to be asked while it runs. Set the clock before, if at all.
    #[must_use]
    pub fn health(&self) -> Health {
        Health::new(self.clock.clone(), self.pulse.clone())
    }

    /// Runs until `shutdown` resolves, then stops in order: hands nothing more over, waits up to the configured grace
    /// for what the sink has, settles it and releases the shards.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a configuration out of range. Nothing else ends a relay: a store or a sink
    /// that fails is tried again, with growing pauses, and reported through metrics and logs.
    ///
    /// # Example
    /// ```
    /// # use std::sync::Arc;
    /// # use outbox_core::{MemorySink, MemoryStore, Relay};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
    /// # let relay = Relay::new(Arc::new(MemoryStore::default()), Box::new(MemorySink::new()));
    /// let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    /// let running = tokio::spawn(relay.run(async { drop(stopped.await) }));
    /// // when the service stops:
    /// stop.send(()).unwrap();
    /// running.await.unwrap()
    /// # }
    /// ```
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
        self.config.check()?;
        driver::Driver::new(self, false).run(shutdown).await;
        Ok(())
    }

    /// Runs until nothing is left that could be delivered now, then stops in order; or earlier, when `shutdown`
    /// resolves. Parked keys, blocked topics and messages scheduled for later stay.
    ///
    /// What other relays own is waited for. Where something of it is parked, blocked or waits for a retry, a drain that
    /// has nothing to do itself ends when the backlog has not become less for two leases.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub async fn drain(self, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
        self.config.check()?;
        driver::Driver::new(self, true).run(shutdown).await;
        Ok(())
    }
}
