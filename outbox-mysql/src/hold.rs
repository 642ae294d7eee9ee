//! Holds as rows.

use std::collections::BTreeMap;
use std::time::Duration;

use outbox_core::{
    Hold, HoldChange, HoldScope, HoldState, OrderKey, Position, RecordRef, Shard, ShardSettlement, millis,
};
use sqlx::mysql::MySqlRow;

use crate::row::{flag, key, message_id, number, shard, span, text};
use crate::sql::{Field, json};

/// The primary key of a hold.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HoldName {
    shard: Shard,
    pub(crate) scope: &'static str,
    pub(crate) topic: String,
    pub(crate) key: Vec<u8>,
    pub(crate) message: i64,
}

impl HoldName {
    pub(crate) fn new(shard: Shard, scope: &HoldScope, head: RecordRef) -> Self {
        let (scope, topic, key, message) = match scope {
            HoldScope::Topic(topic) => ("topic", topic.to_string(), Vec::new(), 0),
            HoldScope::Key(key) => ("key", key.topic.to_string(), key.key.to_vec(), 0),
            HoldScope::Message => ("message", String::new(), Vec::new(), head.position.0),
        };
        Self {
            shard,
            scope,
            topic,
            key,
            message,
        }
    }
}

/// Changes of holds, of which the last one counts where several have one name; with the epoch of their shard.
#[derive(Debug, Default)]
pub(crate) struct HoldChanges<'h>(BTreeMap<HoldName, (i64, Option<&'h Hold>)>);

impl<'h> HoldChanges<'h> {
    pub(crate) fn add(&mut self, part: &ShardSettlement, change: &'h HoldChange) {
        let (name, hold) = match change {
            HoldChange::Put(hold) => (HoldName::new(part.shard, &hold.scope, hold.head), Some(hold)),
            HoldChange::Clear(hold) => (HoldName::new(part.shard, &hold.scope, hold.head), None),
        };
        self.0.insert(name, (part.epoch.0, hold));
    }

    /// The names of what is cleared, if anything is.
    pub(crate) fn cleared(&self) -> Option<String> {
        let cleared = self
            .0
            .iter()
            .filter(|(_, (_, hold))| hold.is_none())
            .map(|(name, (epoch, _))| named(name, *epoch));
        cleared.clone().next().is_some().then(|| json(cleared))
    }

    /// What is put, if anything is: names, then the rest.
    pub(crate) fn put(&self) -> Option<String> {
        let put = self.0.iter().filter_map(|(name, (epoch, hold))| {
            let hold = (*hold)?;
            let (parked, due_in) = match hold.state {
                HoldState::Parked => (1, 0),
                HoldState::Retrying { due_in } => (0, millis(due_in.min(FAR))),
            };
            let [shard, epoch, scope, topic, key, message] = named(name, *epoch);
            Some([
                shard,
                epoch,
                scope,
                topic,
                key,
                message,
                Field::Number(hold.head.position.0),
                Field::Bytes(hold.head.id.as_bytes()),
                Field::Number(i64::from(hold.attempts)),
                Field::Number(parked),
                Field::Number(due_in),
                Field::Bytes(hold.reason.as_bytes()),
            ])
        });
        put.clone().next().is_some().then(|| json(put))
    }
}

/// A due time that no clock reaches would overflow the sum: a thousand years.
const FAR: Duration = Duration::from_secs(1_000 * 366 * 24 * 60 * 60);

fn named(name: &HoldName, epoch: i64) -> [Field<'_>; 6] {
    [
        Field::Number(i64::from(name.shard.0)),
        Field::Number(epoch),
        Field::Bytes(name.scope.as_bytes()),
        Field::Bytes(name.topic.as_bytes()),
        Field::Bytes(&name.key),
        Field::Number(name.message),
    ]
}

pub(crate) fn read_hold(row: &MySqlRow) -> sqlx::Result<Hold> {
    let topic = text(row, 2)?.unwrap_or_default();
    let scope = match text(row, 1)? {
        Some("topic") => HoldScope::Topic(topic.into()),
        Some("key") => HoldScope::Key(OrderKey {
            topic: topic.into(),
            key: key(row, 3)?,
        }),
        _ => HoldScope::Message,
    };
    let state = if flag(row, 7)? {
        HoldState::Parked
    } else {
        HoldState::Retrying {
            due_in: span(row, 8)?.unwrap_or_default(),
        }
    };
    Ok(Hold {
        shard: shard(row, 0)?,
        scope,
        head: RecordRef {
            position: Position(number(row, 4)?),
            id: message_id(row, 5)?,
        },
        attempts: u32::try_from(number(row, 6)?).unwrap_or(u32::MAX),
        state,
        reason: text(row, 9)?.unwrap_or_default().to_owned(),
    })
}
