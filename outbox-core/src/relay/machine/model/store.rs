//! The model's database: rows, leases, holds, and a reader as unforgiving as the contract allows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::{Relay, World, millis};
use crate::fetch::{FetchRequest, Fetched, Record, RecordRef, RereadScope};
use crate::hold::{Hold, HoldChange, HoldScope, HoldState};
use crate::lease::{LeaseTable, RelayId};
use crate::message::{Message, MessageId};
use crate::scheduled::Promotion;
use crate::settle::{Death, Settled, Settlement, ShardSettlement};
use crate::shard::{Epoch, OwnedShard, Position, Shard};

/// One stored row.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) message: Message,
    pub(super) shard: Shard,
    /// Its number within its key, from 1; keyless rows have none.
    pub(super) n: Option<u64>,
    /// Whether nobody can make sense of it.
    pub(super) defect: bool,
}

#[derive(Debug, Default)]
pub(super) struct Store {
    pub(super) now: Duration,
    pub(super) leases: LeaseTable,
    pub(super) rows: BTreeMap<Position, Row>,
    pub(super) dead: BTreeMap<MessageId, u32>,
    pub(super) holds: BTreeMap<HoldName, (Hold, Option<Duration>)>,
    pub(super) scheduled: Vec<(Duration, Row)>,
    /// Changes with a restart that undid what was not yet on disk.
    pub(super) identity: u64,
    /// The deliveries of the last settlement, when it had nothing else: a restart may undo them.
    pub(super) undoable: Vec<(Position, Row)>,
    /// Whose settlement that was.
    pub(super) undoable_of: Option<RelayId>,
    /// How often the head of a hold had failed when its note was last written.
    pub(super) attempts: BTreeMap<MessageId, u32>,
    /// What was settled last of each shard: repeated, it must change nothing.
    pub(super) last: BTreeMap<Shard, ShardSettlement>,
    /// Of these an operator has decided, so that attempts may count from the start at any moment.
    pub(super) operated: BTreeSet<MessageId>,
}

/// What makes two holds the same one.
type HoldName = (Shard, HoldScope, Option<Position>);

/// What a reader has gone past, per shard and epoch: it comes back to nothing of it by itself.
#[derive(Debug, Default)]
pub(super) struct Reader {
    passed: BTreeMap<Shard, (Epoch, BTreeSet<Position>)>,
    /// The server that it knows.
    identity: Option<u64>,
}

impl World {
    pub(super) fn fetch(&mut self, relay: &mut Relay, request: &FetchRequest) -> Fetched {
        let reader = &mut relay.reader;
        if reader
            .identity
            .replace(self.store.identity)
            .is_some_and(|known| known != self.store.identity)
        {
            reader.passed.clear();
            return Fetched::Reset {
                reason: "another server".into(),
            };
        }
        reader.prepare(request, &self.store.rows);
        let mut records = Vec::new();
        let mut more = false;
        for (position, row) in &self.store.rows {
            let Some((_, passed)) = reader.passed.get_mut(&row.shard) else {
                continue;
            };
            let key = row.message.order_key();
            let topic: Arc<str> = row.message.topic().into();
            if !request.admits(row.shard, *position, &topic, key.as_ref()) {
                passed.insert(*position);
                continue;
            }
            if passed.contains(position) {
                let what = format!(
                    "{} forgot to ask again for {position} of shard {}\n{:#?}",
                    relay.id, row.shard, relay.machine
                );
                self.fail(&what);
            }
            if records.len() == request.max_rows {
                more = true;
                break;
            }
            passed.insert(*position);
            records.push(Record {
                shard: row.shard,
                position: *position,
                key_seq: None,
                attempts: 0,
                message: row.message.clone(),
                defect: row.defect.then(|| "no sense".to_owned()),
            });
        }
        Fetched::Batch { records, more }
    }

    pub(super) fn settle(&mut self, settlement: &Settlement) -> Settled {
        let held = self
            .store
            .leases
            .held_by(&settlement.relay, millis(self.store.now));
        let (kept, lost) = settlement.fence(&held);
        self.store.undoable.clear();
        self.store.undoable_of = Some(settlement.relay.clone());
        let simple = kept
            .iter()
            .all(|part| part.dead.is_empty() && part.holds.is_empty());
        for part in kept {
            self.settle_part(part, simple);
        }
        Settled { lost }
    }

    fn settle_part(&mut self, part: &ShardSettlement, simple: bool) {
        let repeats = self.store.last.insert(part.shard, part.clone()).as_ref() == Some(part);
        for record in &part.delivered {
            if let Some(row) = self.store.take(*record) {
                if !self.log.seen.contains(&record.id) {
                    self.fail(&format!("{record:?} was settled as delivered and was not"));
                }
                if simple {
                    self.store.undoable.push((record.position, row));
                }
            }
        }
        for death in &part.dead {
            if let Some(row) = self.store.take(death.record) {
                self.check_attempts(death.record, death.attempts);
                self.bury(death, &row);
            }
        }
        for change in &part.holds {
            match change {
                HoldChange::Put(hold) => self.put_hold(hold, repeats),
                HoldChange::Clear(hold) => {
                    self.store.holds.remove(&name(hold.shard, &hold.scope, hold.head));
                }
            }
        }
    }

    fn put_hold(&mut self, hold: &Hold, repeats: bool) {
        let name = name(hold.shard, &hold.scope, hold.head);
        if !matches!(hold.scope, HoldScope::Topic(_)) {
            if !repeats {
                self.check_attempts(hold.head, hold.attempts);
            }
            self.store.attempts.insert(hold.head.id, hold.attempts);
            // A key has one note, its head's. A predecessor that comes back after a crash, delivered and not known to
            // be, and fails, is the head then; the attempts of what was the head before are forgotten.
            if let Some((before, _)) = self.store.holds.get(&name)
                && before.head != hold.head
            {
                self.store.attempts.remove(&before.head.id);
            }
        }
        let due = match hold.state {
            HoldState::Retrying { due_in } => Some(self.now + due_in),
            HoldState::Parked => None,
        };
        self.store.holds.insert(name, (hold.clone(), due));
    }

    /// One more than before, no matter how many crashes and outages there were.
    fn check_attempts(&self, record: RecordRef, attempts: u32) {
        let before = self.store.attempts.get(&record.id).copied().unwrap_or_default();
        if attempts != before + 1 && !self.store.operated.contains(&record.id) {
            self.fail(&format!("{record:?} has {attempts} attempts after {before}"));
        }
    }

    fn bury(&mut self, death: &Death, row: &Row) {
        self.store.dead.insert(death.record.id, death.attempts);
        self.log.count_as_seen(row);
    }

    /// An operator resumes or buries what is parked.
    pub(super) fn operate(&mut self) {
        let parked: Vec<HoldName> = self
            .store
            .holds
            .iter()
            .filter(|(_, (hold, _))| hold.state == HoldState::Parked)
            .map(|(name, _)| name.clone())
            .collect();
        if parked.is_empty() || self.rough && !self.chance(20) {
            return;
        }
        let name = &parked[self.random.usize(..parked.len())];
        let bury = self.rough && self.random.bool();
        let Some((hold, due)) = self.store.holds.get_mut(name) else {
            return;
        };
        let head = hold.head;
        self.store.operated.insert(head.id);
        self.store.attempts.remove(&head.id);
        let defect = self.store.rows.get(&head.position).is_some_and(|row| row.defect);
        if bury || defect {
            let attempts = hold.attempts;
            self.store.holds.remove(name);
            self.reach("buried");
            if let Some(row) = self.store.take(head) {
                let reason = String::new();
                self.bury(
                    &Death {
                        record: head,
                        attempts,
                        reason,
                    },
                    &row,
                );
            }
        } else if self.random.bool() {
            // Some stores keep the note, due at once; some drop it.
            hold.state = HoldState::Retrying {
                due_in: Duration::ZERO,
            };
            hold.attempts = 0;
            *due = Some(self.now);
            self.reach("resumed");
        } else {
            self.store.holds.remove(name);
            self.reach("resumed");
        }
        trace!(self, "operator on {head:?}",);
    }

    pub(super) fn promote(&mut self, relay: &RelayId, shards: &[OwnedShard]) -> Promotion {
        let held = self.store.leases.held_by(relay, millis(self.store.now));
        let mut promotion = Promotion {
            lost: shards
                .iter()
                .filter(|owned| !held.contains(owned))
                .map(|owned| owned.shard)
                .collect(),
            ..Promotion::default()
        };
        let mut later = Vec::new();
        let mut waiting = BTreeSet::new();
        let mut scheduled = std::mem::take(&mut self.store.scheduled);
        scheduled.sort_by_key(|(due, _)| *due);
        for (due, mut row) in scheduled {
            let key = row.message.order_key();
            let mine =
                shards.iter().any(|owned| owned.shard == row.shard) && !promotion.lost.contains(&row.shard);
            // Producers keep their keys locked until they commit.
            let locked = self
                .open
                .iter()
                .any(|(_, open)| key.is_some() && open.message.order_key() == key);
            if !mine || due > self.now || locked || waiting.contains(&key) {
                if mine {
                    let wait = due.saturating_sub(self.now);
                    promotion.next_in = Some(promotion.next_in.map_or(wait, |next| next.min(wait)));
                }
                if key.is_some() {
                    waiting.insert(key);
                }
                later.push((due, row));
                continue;
            }
            row.n = key.map(|key| {
                let n = self.counters.entry(key).or_default();
                *n += 1;
                *n
            });
            let position = self.draw();
            self.commit(position, row);
            promotion.promoted += 1;
            self.reach("promoted");
        }
        self.store.scheduled = later;
        promotion
    }
}

impl Store {
    /// What readers of holds see.
    pub(super) fn holds(&self, shards: &[OwnedShard]) -> Vec<Hold> {
        self.holds
            .values()
            .filter(|(hold, _)| shards.iter().any(|owned| owned.shard == hold.shard))
            .map(|(hold, due)| Hold {
                state: match due {
                    Some(due) => HoldState::Retrying {
                        due_in: due.saturating_sub(self.now),
                    },
                    None => HoldState::Parked,
                },
                ..hold.clone()
            })
            .collect()
    }

    /// Comes up again after a crash, perhaps without what was not on disk.
    pub(super) fn restart(&mut self, undo: bool) {
        self.identity += 1;
        let undone = std::mem::take(&mut self.undoable);
        if undo {
            self.rows.extend(undone);
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.rows.is_empty() && self.holds.is_empty() && self.scheduled.is_empty()
    }

    fn take(&mut self, record: RecordRef) -> Option<Row> {
        let row = self.rows.get(&record.position)?;
        (row.message.id() == record.id)
            .then(|| self.rows.remove(&record.position))
            .flatten()
    }
}

impl Reader {
    /// Whether it would notice that the server is another one.
    pub(super) fn is_connected(&self) -> bool {
        self.identity.is_some()
    }

    /// A new one. It remembers the server, as one that can lose settlements needs to: what was in flight when it
    /// asked may have been settled and undone before it looked.
    pub(super) fn replace(&mut self) {
        self.passed.clear();
    }

    fn prepare(&mut self, request: &FetchRequest, rows: &BTreeMap<Position, Row>) {
        self.passed.retain(|shard, (epoch, _)| {
            request
                .shards
                .iter()
                .any(|owned| owned.shard == *shard && owned.epoch == *epoch)
        });
        for owned in &request.shards {
            self.passed
                .entry(owned.shard)
                .or_insert_with(|| (owned.epoch, BTreeSet::new()));
        }
        for reread in &request.reread {
            let Some((_, passed)) = self.passed.get_mut(&reread.shard) else {
                continue;
            };
            passed.retain(|position| match &reread.scope {
                RereadScope::Shard => *position < reread.from,
                RereadScope::Message => *position != reread.from,
                // Also below the position: what came back there while the key was held, only a reader can know.
                RereadScope::Key(key) => {
                    let row = rows.get(position);
                    row.and_then(|row| row.message.order_key()).as_ref() != Some(key)
                }
            });
        }
    }
}

fn name(shard: Shard, scope: &HoldScope, head: RecordRef) -> HoldName {
    (
        shard,
        scope.clone(),
        (*scope == HoldScope::Message).then_some(head.position),
    )
}
