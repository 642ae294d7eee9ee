//! Holds as rows.

use std::collections::BTreeMap;
use std::time::Duration;

use outbox_core::{Hold, HoldChange, HoldScope, HoldState, OrderKey, Position, RecordRef, Shard, millis};
use sqlx::postgres::{PgArguments, PgRow, Postgres};
use sqlx::query::Query;
use uuid::Uuid;

use crate::row::{flag, key, message_id, number, shard, small, span, text};
use crate::sql::Statement;

/// The primary key of a hold.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HoldName {
    shard: i16,
    scope: &'static str,
    topic: String,
    key: Vec<u8>,
    message: i64,
}

impl HoldName {
    pub(crate) fn new(own: Shard, scope: &HoldScope, head: RecordRef) -> Self {
        let (name, topic, key, message) = match scope {
            HoldScope::Topic(topic) => ("topic", topic.to_string(), Vec::new(), 0),
            HoldScope::Key(key) => ("key", key.topic.to_string(), key.key.to_vec(), 0),
            HoldScope::Message => ("message", String::new(), Vec::new(), head.position.0),
        };
        Self {
            shard: small(own),
            scope: name,
            topic,
            key,
            message,
        }
    }

    /// A statement about this one hold, and this head of it.
    pub(crate) fn bind<'q>(self, statement: &Statement, head: RecordRef) -> Query<'q, Postgres, PgArguments> {
        statement
            .query()
            .bind(self.shard)
            .bind(self.scope)
            .bind(self.topic)
            .bind(self.key)
            .bind(self.message)
            .bind(head.position.0)
            .bind(head.id.as_uuid())
    }
}

/// Changes of holds, of which the last one counts where several have one name.
#[derive(Debug, Default)]
pub(crate) struct HoldChanges<'h>(BTreeMap<HoldName, Option<&'h Hold>>);

impl<'h> HoldChanges<'h> {
    pub(crate) fn add(&mut self, shard: Shard, change: &'h HoldChange) {
        let (name, hold) = match change {
            HoldChange::Put(hold) => (HoldName::new(shard, &hold.scope, hold.head), Some(hold)),
            HoldChange::Clear(hold) => (HoldName::new(shard, &hold.scope, hold.head), None),
        };
        self.0.insert(name, hold);
    }

    /// Binds what is cleared, then what is put.
    pub(crate) fn bind<'q>(
        &self,
        query: Query<'q, Postgres, PgArguments>,
    ) -> Query<'q, Postgres, PgArguments> {
        let cleared = self
            .0
            .iter()
            .filter(|(_, hold)| hold.is_none())
            .map(|(name, _)| name);
        let put = || {
            self.0
                .iter()
                .filter_map(|(name, hold)| hold.map(|hold| (name, hold)))
        };
        let holds = || put().map(|(_, hold)| hold);
        let due_in = |hold: &Hold| match hold.state {
            HoldState::Parked => 0,
            HoldState::Retrying { due_in } => millis(due_in.min(FAR)),
        };
        let query = bind_names(query, cleared);
        bind_names(query, put().map(|(name, _)| name))
            .bind(holds().map(|hold| hold.head.position.0).collect::<Vec<i64>>())
            .bind(holds().map(|hold| hold.head.id.as_uuid()).collect::<Vec<Uuid>>())
            .bind(holds().map(|hold| i64::from(hold.attempts)).collect::<Vec<i64>>())
            .bind(
                holds()
                    .map(|hold| hold.state == HoldState::Parked)
                    .collect::<Vec<bool>>(),
            )
            .bind(holds().map(due_in).collect::<Vec<i64>>())
            .bind(
                holds()
                    .map(|hold| storable(&hold.reason))
                    .collect::<Vec<String>>(),
            )
    }
}

/// A due time that no clock reaches would overflow the sum: a thousand years.
const FAR: Duration = Duration::from_secs(1_000 * 366 * 24 * 60 * 60);

/// Binds names of holds as arrays.
fn bind_names<'q, 'n>(
    query: Query<'q, Postgres, PgArguments>,
    names: impl Iterator<Item = &'n HoldName> + Clone,
) -> Query<'q, Postgres, PgArguments> {
    query
        .bind(names.clone().map(|name| name.shard).collect::<Vec<i16>>())
        .bind(
            names
                .clone()
                .map(|name| name.scope)
                .collect::<Vec<&'static str>>(),
        )
        .bind(
            names
                .clone()
                .map(|name| name.topic.clone())
                .collect::<Vec<String>>(),
        )
        .bind(
            names
                .clone()
                .map(|name| name.key.clone())
                .collect::<Vec<Vec<u8>>>(),
        )
        .bind(names.map(|name| name.message).collect::<Vec<i64>>())
}

/// Text as the server takes it: it has no character for zero.
pub(crate) fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

pub(crate) fn read_hold(row: &PgRow) -> sqlx::Result<Hold> {
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
