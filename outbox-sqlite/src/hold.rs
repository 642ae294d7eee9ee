//! Holds as rows.

use std::time::Duration;

use outbox_core::{Hold, HoldName, HoldScope, HoldState, OrderKey, Position, RecordRef};
use rusqlite::types::Type;
use rusqlite::{Connection, Row, Transaction, params};

use crate::row::{SHARD, bytes, message_id};
use crate::sql::Sql;

/// Writes a hold, in place of one of the same name.
pub(crate) fn put_hold(transaction: &Transaction<'_>, sql: &Sql, hold: &Hold) -> rusqlite::Result<()> {
    let name = HoldName::new(SHARD, &hold.scope, hold.head);
    let (parked, due_in) = hold.state.stored();
    transaction.prepare_cached(&sql.hold_put)?.execute(params![
        name.scope,
        name.topic,
        name.key,
        name.message,
        hold.head.position.0,
        hold.head.id.as_bytes(),
        hold.attempts,
        parked,
        due_in,
        hold.reason,
    ])?;
    Ok(())
}

/// The holds that a statement selects.
pub(crate) fn list_holds(
    connection: &Connection,
    statement: &str,
    params: impl rusqlite::Params,
) -> rusqlite::Result<Vec<Hold>> {
    connection
        .prepare_cached(statement)?
        .query_map(params, read_hold)?
        .collect()
}

fn read_hold(row: &Row<'_>) -> rusqlite::Result<Hold> {
    let topic: String = row.get(1)?;
    let scope = match row.get_ref(0)?.as_str()? {
        "topic" => HoldScope::Topic(topic.into()),
        "key" => HoldScope::Key(OrderKey {
            topic: topic.into(),
            key: bytes(row.get_ref(2)?).unwrap_or_default(),
        }),
        _ => HoldScope::Message,
    };
    let id = message_id(row.get_ref(4)?)
        .ok_or_else(|| rusqlite::Error::InvalidColumnType(4, "head_message_id".into(), Type::Blob))?;
    let state = if row.get(6)? {
        HoldState::Parked
    } else {
        HoldState::Retrying {
            due_in: Duration::from_millis(row.get::<_, i64>(7)?.max(0).unsigned_abs()),
        }
    };
    Ok(Hold {
        shard: SHARD,
        scope,
        head: RecordRef {
            position: Position(row.get(3)?),
            id,
        },
        attempts: row.get(5)?,
        state,
        reason: row.get(8)?,
    })
}
