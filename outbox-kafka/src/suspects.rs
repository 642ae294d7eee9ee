//! Topics of which the broker refused something.
//!
//! A broker refuses a whole request for one message in it, or because the request is too large altogether, and does
//! not always say for which. Messages that nothing is wrong with must not end as dead letters for that. So at the
//! first refusal everything unresolved is sent again, and this topic's messages one by one from then on: what is
//! refused then is refused for itself.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long after the last refusal a topic's messages go in batches again.
const CAREFUL_FOR: Duration = Duration::from_secs(600);

/// Shared by the sink and all its producers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Suspects(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Spares the publisher the lock as long as all is well.
    any: AtomicBool,
    topics: Mutex<HashMap<Arc<str>, Instant>>,
}

impl Suspects {
    fn topics(&self) -> MutexGuard<'_, HashMap<Arc<str>, Instant>> {
        self.0.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something of this topic was refused.
    pub(crate) fn add(&self, topic: &str) {
        let known = self.topics().insert(topic.into(), Instant::now()).is_some();
        self.0.any.store(true, Ordering::Release);
        if !known {
            tracing::warn!(
                topic,
                "the broker refused messages of this topic; they are sent one by one until all is well for a while"
            );
        }
    }

    /// The topics whose messages go one by one. `forget` when none of theirs is under way, so that those that go in
    /// batches again cannot overtake any.
    pub(crate) fn now(&self, forget: bool) -> Vec<Arc<str>> {
        if !self.0.any.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut topics = self.topics();
        if forget {
            topics.retain(|_, refused| refused.elapsed() < CAREFUL_FOR);
            self.0.any.store(!topics.is_empty(), Ordering::Release);
        }
        topics.keys().cloned().collect()
    }
}
