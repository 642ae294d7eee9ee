//! Holds as rows.

use outbox_core::{Hold, HoldChanges, HoldName, HoldScope, HoldState, Position, RecordRef};
use sqlx::postgres::{PgArguments, PgRow, Postgres};
use sqlx::query::Query;
use uuid::Uuid;

use crate::row::{bytes, flag, message_id, number, shard, small, text};
use crate::sql::Statement;

/// A statement about this one hold, and this head of it.
pub(crate) fn bind_name<'q>(
    statement: &Statement,
    name: HoldName<'q>,
    head: RecordRef,
) -> Query<'q, Postgres, PgArguments> {
    statement
        .query()
        .bind(small(name.shard))
        .bind(name.scope)
        .bind(name.topic)
        .bind(name.key)
        .bind(name.message)
        .bind(head.position.0)
        .bind(head.id.as_uuid())
}

/// Binds what is cleared, then what is put.
pub(crate) fn bind_changes<'q>(
    query: Query<'q, Postgres, PgArguments>,
    changes: &HoldChanges<'q>,
) -> Query<'q, Postgres, PgArguments> {
    let holds = || changes.put().map(|(_, hold)| hold);
    let query = bind_names(query, changes.cleared());
    bind_names(query, changes.put().map(|(name, _)| name))
        .bind(holds().map(|hold| hold.head.position.0).collect::<Vec<i64>>())
        .bind(holds().map(|hold| hold.head.id.as_uuid()).collect::<Vec<Uuid>>())
        .bind(holds().map(|hold| i64::from(hold.attempts)).collect::<Vec<i64>>())
        .bind(holds().map(|hold| hold.state.stored().0).collect::<Vec<bool>>())
        .bind(holds().map(|hold| hold.state.stored().1).collect::<Vec<i64>>())
        .bind(
            holds()
                .map(|hold| storable(&hold.reason))
                .collect::<Vec<String>>(),
        )
}

/// Binds names of holds as arrays.
fn bind_names<'q>(
    query: Query<'q, Postgres, PgArguments>,
    names: impl Iterator<Item = HoldName<'q>> + Clone,
) -> Query<'q, Postgres, PgArguments> {
    query
        .bind(names.clone().map(|name| small(name.shard)).collect::<Vec<i16>>())
        .bind(names.clone().map(|name| name.scope).collect::<Vec<&str>>())
        .bind(names.clone().map(|name| name.topic).collect::<Vec<&str>>())
        .bind(names.clone().map(|name| name.key).collect::<Vec<&[u8]>>())
        .bind(names.map(|name| name.message).collect::<Vec<i64>>())
}

/// Text as the server takes it: it has no character for zero.
pub(crate) fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

pub(crate) fn read_hold(row: &PgRow) -> sqlx::Result<Hold> {
    let (scope, topic, key) = (text(row, 1)?, text(row, 2)?, bytes(row, 3)?);
    let scope = HoldScope::named(
        scope.unwrap_or_default(),
        topic.unwrap_or_default(),
        &key.unwrap_or_default(),
    );
    Ok(Hold {
        shard: shard(row, 0)?,
        scope,
        head: RecordRef {
            position: Position(number(row, 4)?),
            id: message_id(row, 5)?,
        },
        attempts: u32::try_from(number(row, 6)?).unwrap_or(u32::MAX),
        state: HoldState::read(flag(row, 7)?, number(row, 8)?),
        reason: text(row, 9)?.unwrap_or_default().to_owned(),
    })
}
