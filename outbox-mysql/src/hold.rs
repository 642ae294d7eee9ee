//! Holds as rows.

use outbox_core::{Hold, HoldName, HoldScope, HoldState, Position, RecordRef};
use sqlx::mysql::MySqlRow;

use crate::row::{bytes, flag, message_id, number, shard, text};
use crate::sql::Field;

/// The name of a hold in a list.
pub(crate) fn named(name: HoldName<'_>) -> [Field<'_>; 5] {
    [
        Field::Number(i64::from(name.shard.0)),
        Field::Bytes(name.scope.as_bytes()),
        Field::Bytes(name.topic.as_bytes()),
        Field::Bytes(name.key),
        Field::Number(name.message),
    ]
}

/// A hold in a list: its name, then the rest.
pub(crate) fn whole<'h>(name: HoldName<'h>, hold: &'h Hold) -> [Field<'h>; 11] {
    let [shard, scope, topic, key, message] = named(name);
    let (parked, due_in) = hold.state.stored();
    [
        shard,
        scope,
        topic,
        key,
        message,
        Field::Number(hold.head.position.0),
        Field::Bytes(hold.head.id.as_bytes()),
        Field::Number(i64::from(hold.attempts)),
        Field::Number(i64::from(parked)),
        Field::Number(due_in),
        Field::Bytes(hold.reason.as_bytes()),
    ]
}

pub(crate) fn read_hold(row: &MySqlRow) -> sqlx::Result<Hold> {
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
