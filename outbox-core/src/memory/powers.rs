//! The optional powers: dead letters, scheduled delivery, retention, parking.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use super::lock;
use super::state::{Row, hold_name};
use super::store::{Counters, MemoryStore};
use crate::dead::{DeadLetter, DeadLetterQuery, DeadLetters};
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::RecordRef;
use crate::hold::{Hold, HoldRef, HoldScope, HoldState, Parking};
use crate::lease::RelayId;
use crate::message::{Message, OrderKey};
use crate::retention::Retention;
use crate::scheduled::{Promotion, Scheduled};
use crate::settle::{Settlement, ShardSettlement};
use crate::shard::OwnedShard;
use crate::store::Ordering;

#[async_trait]
impl DeadLetters for MemoryStore {
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>> {
        let state = lock(&self.inner.state);
        let listed = state
            .dead
            .values()
            .map(|(_, letter)| letter)
            .filter(|letter| {
                query
                    .topic
                    .as_deref()
                    .is_none_or(|topic| topic == letter.message.topic())
            })
            .filter(|letter| {
                query
                    .ids
                    .as_ref()
                    .is_none_or(|ids| ids.contains(&letter.record.id))
            })
            .filter(|letter| query.after.is_none_or(|after| letter.record > after));
        Ok(listed.take(query.limit).cloned().collect())
    }

    async fn requeue(&self, records: &[RecordRef]) -> Result<usize> {
        let keys = {
            let state = lock(&self.inner.state);
            let letters = records.iter().filter_map(|record| state.dead.get(record));
            self.sequenced_keys(letters.map(|(_, letter)| &letter.message))
        };
        let mut counters = self.lock_counters(keys).await?;
        let mut moved = 0;
        {
            let mut state = lock(&self.inner.state);
            for record in records {
                let Some((shard, letter)) = state.dead.remove(record) else {
                    continue;
                };
                let key_seq = next_number(&mut counters, &letter.message);
                let position = state.draw();
                state.rows.insert(
                    position,
                    Row {
                        shard,
                        key_seq,
                        message: letter.message,
                    },
                );
                moved += 1;
            }
        }
        self.inner.commits.tell();
        Ok(moved)
    }

    async fn discard(&self, records: &[RecordRef]) -> Result<usize> {
        let mut state = lock(&self.inner.state);
        Ok(records
            .iter()
            .filter(|record| state.dead.remove(record).is_some())
            .count())
    }
}

#[async_trait]
impl Scheduled for MemoryStore {
    async fn promote(&self, relay: &RelayId, shards: &[OwnedShard], limit: usize) -> Result<Promotion> {
        let keys = {
            let now = self.now();
            let state = lock(&self.inner.state);
            let mine = state
                .scheduled
                .iter()
                .take_while(|((due, _), _)| *due <= now)
                .filter(|(_, (shard, _))| shards.iter().any(|owned| owned.shard == *shard));
            self.sequenced_keys(mine.take(limit).map(|(_, (_, message))| message))
        };
        // Producers may hold a key: its messages wait for them, and nothing else is locked meanwhile.
        let mut counters = self.lock_counters(keys).await?;

        let now = self.now();
        let mut state = lock(&self.inner.state);
        let held = state.leases.held_by(relay, self.millis());
        let fence = Settlement {
            relay: relay.clone(),
            shards: shards
                .iter()
                .map(|owned| ShardSettlement::new(owned.shard, owned.epoch))
                .collect(),
        };
        let (kept, lost) = fence.fence(&held);
        let mine: Vec<_> = state
            .scheduled
            .iter()
            .filter(|(_, (shard, _))| kept.iter().any(|part| part.shard == *shard))
            .map(|(name, (_, message))| (*name, message.order_key()))
            .collect();
        let mut promotion = Promotion {
            lost,
            ..Promotion::default()
        };
        for (name, key) in mine {
            let (due, _) = name;
            // A key that became due after the counters were locked waits for the next call.
            let unlocked = self.inner.config.ordering == Ordering::Sequenced
                && key.is_some_and(|key| !counters.contains_key(&key));
            if due > now || promotion.promoted == limit || unlocked {
                promotion.next_in = Some(due.duration_since(now).unwrap_or(Duration::ZERO));
                break;
            }
            if let Some((shard, message)) = state.scheduled.remove(&name) {
                let key_seq = next_number(&mut counters, &message);
                let position = state.draw();
                state.rows.insert(
                    position,
                    Row {
                        shard,
                        key_seq,
                        message,
                    },
                );
                promotion.promoted += 1;
            }
        }
        Ok(promotion)
    }
}

#[async_trait]
impl Retention for MemoryStore {
    async fn purge(&self, age: Duration, limit: usize) -> Result<usize> {
        let Some(oldest) = self.now().checked_sub(age) else {
            return Ok(0);
        };
        let mut state = lock(&self.inner.state);
        let old: Vec<(SystemTime, _)> = state
            .processed
            .keys()
            .take_while(|(delivered, _)| *delivered < oldest)
            .take(limit)
            .copied()
            .collect();
        for name in &old {
            state.processed.remove(name);
        }
        Ok(old.len())
    }
}

#[async_trait]
impl Parking for MemoryStore {
    async fn parked(&self, limit: usize) -> Result<Vec<Hold>> {
        let now = self.now();
        let state = lock(&self.inner.state);
        let mut parked: Vec<Hold> = state
            .holds
            .values()
            .map(|stored| stored.at(now))
            .filter(|hold| hold.state == HoldState::Parked)
            .collect();
        parked.sort_by_key(|hold| hold.head);
        parked.truncate(limit);
        Ok(parked)
    }

    async fn resume(&self, hold: &HoldRef) -> Result<bool> {
        let now = self.now();
        let mut state = lock(&self.inner.state);
        let Some(stored) = state.holds.get_mut(&hold_name(hold)) else {
            return Ok(false);
        };
        if stored.due.is_some() || stored.hold.head != hold.head {
            return Ok(false);
        }
        stored.due = Some(now);
        stored.hold.attempts = 0;
        Ok(true)
    }

    async fn bury(&self, hold: &HoldRef) -> Result<bool> {
        if matches!(hold.scope, HoldScope::Topic(_)) || !self.inner.config.dead_letters {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "bury",
                "only a message can be moved to the dead letters, and only where there are any",
            ));
        }
        let now = self.now();
        let mut state = lock(&self.inner.state);
        let name = hold_name(hold);
        let parked = state
            .holds
            .get(&name)
            .is_some_and(|stored| stored.due.is_none() && stored.hold.head == hold.head);
        let Some(stored) = parked.then(|| state.holds.remove(&name)).flatten() else {
            return Ok(false);
        };
        let Hold { attempts, reason, .. } = stored.hold;
        state.bury(hold.shard, hold.head, attempts, &reason, now);
        Ok(true)
    }
}

impl MemoryStore {
    /// The keys whose counters must be locked before these messages get a position.
    fn sequenced_keys<'a>(&self, messages: impl Iterator<Item = &'a Message>) -> BTreeSet<OrderKey> {
        match self.inner.config.ordering {
            Ordering::Insert => BTreeSet::new(),
            Ordering::Sequenced => messages.filter_map(Message::order_key).collect(),
        }
    }
}

/// Draws a message's number within its key, if its counter is locked.
fn next_number(counters: &mut Counters, message: &Message) -> Option<i64> {
    let counter = counters.get_mut(&message.order_key()?)?;
    **counter += 1;
    Some(**counter)
}
