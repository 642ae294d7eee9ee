//! Reading the stored holds: all of them when a shard is gained, and now and then what operators did to them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::holding::{Scope, State};
use super::topics::{TopicEntry, TopicState};
use super::{Command, Machine};
use crate::error::Result;
use crate::fetch::RecordRef;
use crate::hold::{Hold, HoldScope, HoldState};
use crate::shard::{OwnedShard, Shard};

#[derive(Debug)]
pub(super) struct Loading {
    pub(super) shards: Vec<OwnedShard>,
    pub(super) moment: u64,
}

/// How soon the relay notices that an operator resumed something.
const RELOAD_EVERY: Duration = Duration::from_secs(2);

impl Machine {
    pub(super) fn poll_holds(&mut self, now: Duration) -> Option<Command> {
        if self.holds_due().is_none_or(|due| due > now) {
            return None;
        }
        let mut shards = self.leasing.all();
        if self.leasing.owned.values().any(|owned| !owned.loaded) {
            shards.retain(|owned| !self.is_loaded(owned.shard));
        }
        if shards.is_empty() {
            return None;
        }
        self.holds.moment += 1;
        self.holds.loading = Some(Loading {
            shards: shards.clone(),
            moment: self.holds.moment,
        });
        Some(Command::LoadHolds { shards })
    }

    fn is_loaded(&self, shard: Shard) -> bool {
        self.leasing.owned.get(&shard).is_none_or(|owned| owned.loaded)
    }

    fn wants_reload(&self) -> bool {
        !self.holds.entries.is_empty() || !self.holds.topics.is_empty()
    }

    /// Asks for the holds of new shards at once.
    pub(super) fn load_soon(&mut self) {
        self.holds.load_next = Duration::ZERO;
    }

    pub(super) fn holds_due(&self) -> Option<Duration> {
        let waits = self.holds.loading.is_none()
            && !self.stopping
            && (self.wants_reload() || self.leasing.owned.values().any(|owned| !owned.loaded));
        (waits && !self.leasing.owned.is_empty()).then_some(self.holds.load_next)
    }

    pub(super) fn holds_loaded(&mut self, result: Result<Vec<Hold>>, now: Duration) {
        let Some(loading) = self.holds.loading.take() else {
            return;
        };
        let loaded = match result {
            Ok(loaded) => loaded,
            Err(error) => {
                self.holds.load_failures = self.holds.load_failures.saturating_add(1);
                let pause = self
                    .setup
                    .config
                    .outage_retry
                    .pause(self.holds.load_failures, &mut self.random);
                self.holds.load_next = now + pause;
                self.store_failed("load holds", error, pause);
                return;
            }
        };
        self.holds.load_failures = 0;
        self.holds.load_next = now + RELOAD_EVERY;
        let mut fresh = BTreeSet::new();
        for owned in &loading.shards {
            if let Some(own) = self.leasing.owned.get_mut(&owned.shard)
                && own.epoch == owned.epoch
                && !std::mem::replace(&mut own.loaded, true)
            {
                fresh.insert(owned.shard);
            }
        }
        if self.leasing.owned.values().any(|owned| !owned.loaded) {
            self.load_soon();
        }
        let uncrowded = self.uncrowded(&loading, &loaded, now);
        let mut seen = BTreeSet::new();
        for hold in loaded {
            if !loading
                .shards
                .iter()
                .any(|owned| owned.shard == hold.shard && self.leasing.owns(owned.shard, owned.epoch))
            {
                continue;
            }
            let Some(scope) = Scope::of(&hold.scope, hold.head) else {
                self.topic_loaded(&hold, fresh.contains(&hold.shard), now);
                continue;
            };
            seen.insert((hold.shard, scope.clone()));
            let shed = match &scope {
                Scope::Key(key) => uncrowded.contains(&key.topic),
                Scope::Message(_) => !uncrowded.is_empty(),
            };
            let adopt = fresh.contains(&hold.shard)
                || shed && !self.holds.entries.contains_key(&(hold.shard, scope.clone()));
            self.hold_loaded(hold, scope, adopt, loading.moment, now);
        }
        self.release_resumed(&loading, &seen, now);
        for topic in uncrowded {
            // It opens where a fetch is built, as every topic does, and for one record at first.
            if let Some(entry) = self.holds.topics.get_mut(&topic) {
                entry.state = TopicState::Waiting { due: now };
            }
        }
    }

    /// Takes a stored hold over, or learns from it that an operator wants it sooner.
    fn hold_loaded(&mut self, hold: Hold, scope: Scope, adopt: bool, moment: u64, now: Duration) {
        let state = match hold.state {
            HoldState::Parked => State::Parked,
            HoldState::Retrying { due_in } => State::Waiting {
                due: now.saturating_add(due_in),
            },
        };
        let known = self.holds.entries.get(&(hold.shard, scope.clone()));
        let sooner = known.is_some_and(|entry| {
            entry.head == hold.head
                && entry.durable.is_some_and(|durable| durable < moment)
                && match (entry.state, state) {
                    (State::Parked, State::Waiting { .. }) => true,
                    (State::Waiting { due: own }, State::Waiting { due }) => {
                        due + Duration::from_secs(1) < own
                    }
                    _ => false,
                }
        });
        if adopt || sooner {
            self.holds
                .wait(hold.shard, scope.clone(), hold.head, hold.attempts, state);
            if let Some(entry) = self.holds.entries.get_mut(&(hold.shard, scope)) {
                entry.written = true;
                entry.durable = Some(moment);
            }
        }
    }

    fn topic_loaded(&mut self, hold: &Hold, fresh: bool, now: Duration) {
        let HoldScope::Topic(topic) = &hold.scope else {
            return;
        };
        let due = match hold.state {
            HoldState::Retrying { due_in } => now.saturating_add(due_in),
            HoldState::Parked => return,
        };
        if let Some(entry) = self.holds.topics.get_mut(topic) {
            entry.written.insert(hold.shard, hold.head);
            if let TopicState::Waiting { due: own } = &mut entry.state
                && due + Duration::from_secs(1) < *own
            {
                *own = due;
            }
            return;
        }
        if !fresh {
            // The note is our own, read before it was cleared: the topic flows again.
            return;
        }
        self.holds.topics.insert(
            topic.clone(),
            TopicEntry {
                attempts: hold.attempts,
                state: TopicState::Waiting { due },
                written: BTreeMap::from([(hold.shard, hold.head)]),
            },
        );
        self.close_topic(topic);
    }

    /// What was parked in the store when the load began, and is not there any more, an operator has resumed.
    fn release_resumed(&mut self, loading: &Loading, seen: &BTreeSet<(Shard, Scope)>, now: Duration) {
        let resumed: Vec<(Shard, Scope, RecordRef)> = self
            .holds
            .entries
            .iter()
            .filter(|((shard, scope), entry)| {
                !matches!(entry.state, State::Trying { .. })
                    && entry.durable.is_some_and(|durable| durable < loading.moment)
                    && loading.shards.iter().any(|owned| owned.shard == *shard)
                    && !seen.contains(&(*shard, scope.clone()))
            })
            .map(|((shard, scope), entry)| (*shard, scope.clone(), entry.head))
            .collect();
        for (shard, scope, head) in resumed {
            self.holds
                .wait(shard, scope.clone(), head, 0, State::Waiting { due: now });
            if let Some(entry) = self.holds.entries.get_mut(&(shard, scope)) {
                entry.written = false;
                entry.durable = None;
            }
        }
    }
}
