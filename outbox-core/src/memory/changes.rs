//! Who waits for a change hears of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use tokio::sync::Notify;

/// Counts changes. Those who wait are woken in the order in which they came, so that the same calls give the same result;
/// a watch channel of tokio's leaves that order to chance.
#[derive(Debug, Clone, Default)]
pub(super) struct Changes(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    count: AtomicU64,
    notify: Notify,
}

/// One who waits for changes.
#[derive(Debug)]
pub(super) struct Listener {
    changes: Changes,
    heard: u64,
}

impl Changes {
    pub(super) fn tell(&self) {
        self.0.count.fetch_add(1, SeqCst);
        self.0.notify.notify_waiters();
    }

    /// Hears of all changes from now on.
    pub(super) fn listen(&self) -> Listener {
        Listener {
            changes: self.clone(),
            heard: self.0.count.load(SeqCst),
        }
    }
}

impl Listener {
    /// Waits until something has changed since the last time.
    pub(super) async fn changed(&mut self) {
        loop {
            // It hears what comes from here on, polled or not.
            let told = self.changes.0.notify.notified();
            let count = self.changes.0.count.load(SeqCst);
            if count != self.heard {
                self.heard = count;
                return;
            }
            told.await;
        }
    }
}
