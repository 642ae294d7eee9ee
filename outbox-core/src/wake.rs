//! Wake-ups: hints that there may be work. Polling stays the truth.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Notify;

/// A store's own hint that there may be work.
///
/// ```
/// use async_trait::async_trait;
/// use outbox_core::{WakeUp, Waker};
///
/// /// Wakes when somebody of this process says so.
/// struct Local(Waker);
///
/// #[async_trait]
/// impl WakeUp for Local {
///     async fn wait(&mut self) {
///         self.0.woken().await;
///     }
/// }
/// ```
#[async_trait]
pub trait WakeUp: Send {
    /// Waits for a hint. It may come late, twice, for nothing or never; the relay polls all the same.
    ///
    /// # Cancel safety
    /// Safe to drop: at worst a hint is lost.
    async fn wait(&mut self);
}

/// Wakes a relay of the same process, for producers that know they have just committed.
///
/// ```
/// let waker = outbox_core::Waker::new();
/// // after the producer's commit:
/// waker.wake();
/// ```
#[derive(Debug, Clone, Default)]
pub struct Waker(Arc<Notify>);

impl Waker {
    /// A waker to be shared by producers and a relay.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes the relay, now or as soon as it sleeps. Costs next to nothing; call it after the commit.
    pub fn wake(&self) {
        self.0.notify_one();
    }

    /// Waits until somebody wakes.
    pub async fn woken(&self) {
        self.0.notified().await;
    }
}
