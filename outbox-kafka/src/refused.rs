//! Topics that were refused, until whoever published has heard of it.
//!
//! More of a topic may be handed over between its refusal and that moment, and the topic may be there by then: many are
//! made just when their first messages come. What comes later must not overtake what was refused, so it is refused as well.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use outbox_core::{Outcome, Reason};

/// A batch whose receipt has not resolved: its future has this, and drops it when it resolves or is dropped.
pub(crate) type Unheard = Arc<()>;

/// Shared by the sink and all its producers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Refused(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Spares the publisher the lock as long as all is well.
    any: AtomicBool,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    open: Vec<Weak<()>>,
    topics: HashMap<Arc<str>, Refusal>,
}

#[derive(Debug)]
struct Refusal {
    reason: Reason,
    /// The batches that have messages it was refused for.
    batches: Vec<Weak<()>>,
}

impl Refused {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A batch is handed over: its token, and those of the batches whose receipts are open. Nothing that these were refused
    /// lapses while they are kept.
    pub(crate) fn begin(&self) -> (Unheard, Vec<Unheard>) {
        let own = Unheard::default();
        let mut table = self.table();
        let open: Vec<Unheard> = table.open.iter().filter_map(Weak::upgrade).collect();
        table.open = open.iter().chain([&own]).map(Arc::downgrade).collect();
        (own, open)
    }

    /// What became of a message of this batch, whose topic it may be that was refused.
    pub(crate) fn note(&self, topic: &str, outcome: &Outcome, batch: &Weak<()>) {
        let Outcome::TopicBlocked(reason) = outcome else {
            return;
        };
        let mut table = self.table();
        let refusal = table.topics.entry(topic.into()).or_insert_with(|| Refusal {
            reason: reason.clone(),
            batches: Vec::new(),
        });
        if !refusal.batches.iter().any(|noted| noted.ptr_eq(batch)) {
            refusal.batches.retain(is_open);
            refusal.batches.push(batch.clone());
        }
        self.0.any.store(true, Ordering::Release);
    }

    /// Why a message of this topic must not be sent now.
    pub(crate) fn reason(&self, topic: &str) -> Option<Reason> {
        if !self.0.any.load(Ordering::Acquire) {
            return None;
        }
        let mut table = self.table();
        table
            .topics
            .retain(|_, refusal| refusal.batches.iter().any(is_open));
        self.0.any.store(!table.topics.is_empty(), Ordering::Release);
        table.topics.get(topic).map(|refusal| refusal.reason.clone())
    }

    /// All that was handed over is over: whatever is sent from now on is sent in order.
    pub(crate) fn forget(&self) {
        let mut table = self.table();
        table.topics.clear();
        self.0.any.store(false, Ordering::Release);
    }
}

fn is_open(batch: &Weak<()>) -> bool {
    batch.strong_count() > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_is_refused_until_each_batch_that_it_was_refused_for_is_heard() {
        let refused = Refused::default();
        let no = Outcome::TopicBlocked("no".into());
        let (first, _) = refused.begin();
        let (second, _) = refused.begin();
        assert_eq!(refused.reason("t"), None);
        for batch in [&first, &second] {
            refused.note("t", &no, &Arc::downgrade(batch));
        }
        assert_eq!(refused.reason("other"), None);
        drop(first);
        assert_eq!(refused.reason("t"), Some("no".into()));
        drop(second);
        assert_eq!(refused.reason("t"), None);
        assert!(!refused.0.any.load(Ordering::Relaxed));
    }

    #[test]
    fn nothing_lapses_while_a_batch_is_handed_over() {
        let refused = Refused::default();
        let no = Outcome::TopicBlocked("no".into());
        let (first, _) = refused.begin();
        let (_second, open) = refused.begin();
        // Noted and heard meanwhile.
        refused.note("t", &no, &Arc::downgrade(&first));
        drop(first);
        assert_eq!(refused.reason("t"), Some("no".into()));
        drop(open);
        assert_eq!(refused.reason("t"), None);
    }

    #[test]
    fn a_purge_ends_it() {
        let refused = Refused::default();
        let (batch, _) = refused.begin();
        refused.note("t", &Outcome::Delivered, &Arc::downgrade(&batch));
        assert_eq!(refused.reason("t"), None);
        refused.note("t", &Outcome::TopicBlocked("no".into()), &Arc::downgrade(&batch));
        refused.forget();
        assert_eq!(refused.reason("t"), None);
    }
}
