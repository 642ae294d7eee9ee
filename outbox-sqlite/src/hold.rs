//! Holds as rows.

use outbox_core::{Hold, HoldName, HoldScope, HoldState, Position, RecordRef};
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
    let (scope, topic, key) = (row.get_ref(0)?, row.get_ref(1)?, bytes(row.get_ref(2)?));
    let scope = HoldScope::named(scope.as_str()?, topic.as_str()?, &key.unwrap_or_default());
    let id = message_id(row.get_ref(4)?)
        .ok_or_else(|| rusqlite::Error::InvalidColumnType(4, "head_message_id".into(), Type::Blob))?;
    Ok(Hold {
        shard: SHARD,
        scope,
        head: RecordRef {
            position: Position(row.get(3)?),
            id,
        },
        attempts: row.get(5)?,
        state: HoldState::read(row.get(6)?, row.get(7)?),
        reason: row.get(8)?,
    })
}
