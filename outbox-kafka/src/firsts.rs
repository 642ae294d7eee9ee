//! What a client sends first to each partition.
//!
//! A broker that knows nothing of a client takes whatever comes first, though it has just refused what goes before it: while
//! a leader is elected, or a topic made. So of a key only one message is under way until the broker has taken something of
//! its partition. From then on it refuses what comes out of turn, and librdkafka tries again in order.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub(crate) struct Firsts {
    /// Topics that have partitions of which nothing was taken: spares the reports the lock.
    open: AtomicUsize,
    topics: Mutex<HashMap<Arc<str>, Topic>>,
    /// Whether it stays so for ever.
    one_by_one: bool,
}

/// When a message may be handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Now, as everything of its topic.
    Always,
    /// Now. What becomes of it has to be [`told`](Firsts::told).
    Now,
    /// When another one of its key is told.
    Later,
}

#[derive(Debug, Default)]
struct Topic {
    /// Whether something was taken of every partition.
    begun: bool,
    /// Partitions of which something was taken, and keys that go there, as hashes.
    partitions: HashSet<i32>,
    keys: HashSet<u64>,
    /// Other keys that have a message under way.
    under_way: HashSet<u64>,
}

/// So many keys are kept of a topic. Others have one message under way until all of its partitions have begun.
const KEYS: usize = 10_000;

impl Firsts {
    /// Of each key one message is under way, whatever has begun.
    pub(crate) fn one_by_one() -> Self {
        Self {
            one_by_one: true,
            ..Self::default()
        }
    }

    fn topics(&self) -> MutexGuard<'_, HashMap<Arc<str>, Topic>> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose turn it is, of a key and a topic of so many partitions.
    pub(crate) fn turn(&self, topic: &Arc<str>, partitions: usize, key: &[u8]) -> Turn {
        let mut topics = self.topics();
        let state = topics.entry(topic.clone()).or_insert_with(|| {
            self.open.fetch_add(1, Ordering::Relaxed);
            Topic::default()
        });
        // Some may have been added since they were counted.
        let has = |id| i32::try_from(id).is_ok_and(|id| state.partitions.contains(&id));
        if !self.one_by_one
            && !state.begun
            && state.partitions.len() >= partitions
            && (0..partitions).all(has)
        {
            self.open.fetch_sub(1, Ordering::Relaxed);
            *state = Topic {
                begun: true,
                ..Topic::default()
            };
        }
        if state.begun {
            return Turn::Always;
        }
        let key = hash(key);
        if !self.one_by_one && state.keys.contains(&key) || state.under_way.insert(key) {
            Turn::Now
        } else {
            Turn::Later
        }
    }

    /// The topic may be made anew, with partitions that know nothing.
    pub(crate) fn forget(&self, topic: &str) {
        let mut topics = self.topics();
        if let Some(state) = topics.get_mut(topic) {
            self.open.fetch_add(usize::from(state.begun), Ordering::Relaxed);
            *state = Topic {
                under_way: std::mem::take(&mut state.under_way),
                ..Topic::default()
            };
        }
    }

    /// What became of a message: whether the broker has taken it, and where.
    pub(crate) fn told(&self, topic: &str, key: Option<&[u8]>, taken: Option<i32>) {
        if self.open.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut topics = self.topics();
        let Some(state) = topics.get_mut(topic).filter(|state| !state.begun) else {
            return;
        };
        if !self.one_by_one {
            state.partitions.extend(taken);
        }
        if let Some(key) = key.map(hash) {
            state.under_way.remove(&key);
            if taken.is_some() && !self.one_by_one && state.keys.len() < KEYS {
                state.keys.insert(key);
            }
        }
    }
}

fn hash(key: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_one_message_under_way_until_its_partition_has_begun() {
        let firsts = Firsts::default();
        let topic: Arc<str> = "t".into();
        let turn = |key: &[u8]| firsts.turn(&topic, 2, key);
        assert_eq!(turn(b"a"), Turn::Now);
        assert_eq!(turn(b"a"), Turn::Later);
        assert_eq!(turn(b"b"), Turn::Now, "another key");
        assert_eq!(firsts.turn(&"other".into(), 2, b"a"), Turn::Now, "another topic");
        // Refused: the next may try.
        firsts.told("t", Some(b"a"), None);
        assert_eq!(turn(b"a"), Turn::Now);
        firsts.told("t", Some(b"a"), Some(1));
        for _ in 0..3 {
            assert_eq!(turn(b"a"), Turn::Now);
            assert_eq!(turn(b"b"), Turn::Later, "it may go elsewhere");
        }
    }

    #[test]
    fn a_key_whose_messages_go_one_by_one_never_has_two_under_way() {
        let firsts = Firsts::one_by_one();
        let topic: Arc<str> = "t".into();
        for _ in 0..3 {
            assert_eq!(firsts.turn(&topic, 1, b"a"), Turn::Now);
            assert_eq!(firsts.turn(&topic, 1, b"a"), Turn::Later);
            firsts.told("t", Some(b"a"), Some(0));
        }
    }

    #[test]
    fn all_go_when_all_partitions_have_begun() {
        let firsts = Firsts::default();
        let topic: Arc<str> = "t".into();
        assert_eq!(firsts.turn(&topic, 2, b"a"), Turn::Now);
        firsts.told("t", Some(b"a"), Some(1));
        firsts.told("t", None, Some(0));
        for _ in 0..3 {
            assert_eq!(firsts.turn(&topic, 2, b"new"), Turn::Always);
        }
        assert_eq!(firsts.open.load(Ordering::Relaxed), 0);
        assert!(firsts.topics()["t"].keys.is_empty(), "nothing is kept");
        firsts.forget("t");
        assert_eq!(firsts.turn(&topic, 2, b"a"), Turn::Now);
        assert_eq!(firsts.turn(&topic, 2, b"a"), Turn::Later);
    }
}
