//! The tables of a store in memory, all under one lock: what is in them is committed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use crate::dead::DeadLetter;
use crate::fetch::{Record, RecordRef};
use crate::hold::{Hold, HoldRef, HoldScope, HoldState};
use crate::lease::LeaseTable;
use crate::message::{Message, MessageId};
use crate::shard::{Position, Shard};

/// The committed state.
#[derive(Debug)]
pub(super) struct State {
    /// The sequence: the last position that was drawn, whether its row ever became visible or not.
    pub(super) last_position: i64,
    /// The outbox, by position.
    pub(super) rows: BTreeMap<Position, Row>,
    /// The holds, by what waits.
    pub(super) holds: BTreeMap<HoldName, StoredHold>,
    /// The dead letters, with the shard they return to.
    pub(super) dead: BTreeMap<RecordRef, (Shard, DeadLetter)>,
    /// What is not yet due, by due time and order of commit.
    pub(super) scheduled: BTreeMap<(SystemTime, u64), (Shard, Message)>,
    /// Tells apart what is due at the same time.
    pub(super) last_scheduled: u64,
    /// The archive: when each message was delivered, oldest first.
    pub(super) processed: BTreeMap<(SystemTime, Position), Message>,
    /// Leases and members.
    pub(super) leases: LeaseTable,
    /// The inbox: what each consumer has handled, and when.
    pub(super) handled: BTreeMap<(Arc<str>, MessageId), SystemTime>,
}

/// A visible row of the outbox.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) shard: Shard,
    pub(super) key_seq: Option<i64>,
    pub(super) message: Message,
}

/// A hold, with its due time made absolute.
#[derive(Debug, Clone)]
pub(super) struct StoredHold {
    pub(super) hold: Hold,
    /// When it is due; none while it is parked.
    pub(super) due: Option<SystemTime>,
}

/// What makes two holds the same one.
pub(super) type HoldName = (Shard, HoldScope, Option<Position>);

impl State {
    pub(super) fn new(shards: u16) -> Self {
        Self {
            last_position: 0,
            rows: BTreeMap::new(),
            holds: BTreeMap::new(),
            dead: BTreeMap::new(),
            scheduled: BTreeMap::new(),
            last_scheduled: 0,
            processed: BTreeMap::new(),
            leases: LeaseTable::new(shards),
            handled: BTreeMap::new(),
        }
    }

    /// Draws the next position.
    pub(super) fn draw(&mut self) -> Position {
        self.last_position += 1;
        Position(self.last_position)
    }

    /// Takes a row out when shard, position and id are all its own.
    pub(super) fn take(&mut self, shard: Shard, record: RecordRef) -> Option<Row> {
        let row = self.rows.get(&record.position)?;
        (row.shard == shard && row.message.id() == record.id)
            .then(|| self.rows.remove(&record.position))
            .flatten()
    }

    /// Moves a row to the dead letters, if it is (still) there.
    pub(super) fn bury(
        &mut self,
        shard: Shard,
        record: RecordRef,
        attempts: u32,
        reason: &str,
        now: SystemTime,
    ) {
        if let Some(row) = self.take(shard, record) {
            let letter = DeadLetter {
                record,
                message: row.message,
                key_seq: row.key_seq,
                attempts,
                reason: reason.to_owned(),
                died_at: now,
            };
            self.dead.insert(record, (shard, letter));
        }
    }

    /// Adds a message that is not yet due.
    pub(super) fn schedule(&mut self, due: SystemTime, shard: Shard, message: Message) {
        self.last_scheduled += 1;
        self.scheduled
            .insert((due, self.last_scheduled), (shard, message));
    }
}

impl Row {
    pub(super) fn record(&self, position: Position) -> Record {
        Record {
            shard: self.shard,
            position,
            key_seq: self.key_seq,
            attempts: 0,
            message: self.message.clone(),
            defect: None,
        }
    }
}

impl StoredHold {
    pub(super) fn new(hold: Hold, now: SystemTime) -> Self {
        let due = match hold.state {
            HoldState::Retrying { due_in } => Some(now.checked_add(due_in).unwrap_or(now)),
            HoldState::Parked => None,
        };
        Self { hold, due }
    }

    /// The hold as it is at this time.
    pub(super) fn at(&self, now: SystemTime) -> Hold {
        Hold {
            state: match self.due {
                Some(due) => HoldState::Retrying {
                    due_in: due.duration_since(now).unwrap_or_default(),
                },
                None => HoldState::Parked,
            },
            ..self.hold.clone()
        }
    }
}

/// The name of the hold that `hold` refers to.
pub(super) fn hold_name(hold: &HoldRef) -> HoldName {
    let position = (hold.scope == HoldScope::Message).then_some(hold.head.position);
    (hold.shard, hold.scope.clone(), position)
}
