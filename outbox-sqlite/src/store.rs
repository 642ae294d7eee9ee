//! The store: leases, holds, settlements, readers.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::{
    Capabilities, Count, DeadLetters, Hold, HoldChange, HoldName, Inspection, LeaseRequest, LeaseRow,
    LeaseTable, Leases, Membership, OutboxStore, OwnedShard, Parking, Reader, RecordRef, RelayId, Result,
    Retention, Scheduled, Settled, Settlement, Shard, ShardSettlement, Stats, StoreMillis, WakeUp,
};
use rusqlite::{Connection, Transaction, params};

use crate::config::{SqliteConfig, Synchronous};
use crate::error::During;
use crate::hold::{list_holds, put_hold};
use crate::reader::SqliteReader;
use crate::row::SHARD;
use crate::sql::Sql;
use crate::wake::SqliteWakeUp;
use crate::worker::{FileId, Worker, durably, open, write};

/// An outbox in an SQLite file, as the relay and operators use it. One shard: SQLite has one writer anyway.
///
/// Cheap to clone. Two connections, each on a thread of its own: one for the relay's writes, one for operators; each
/// reader and each wake-up has another. No transaction is open while messages are being published.
///
/// ```
/// use outbox_core::OutboxStore;
/// use outbox_sqlite::{SqliteConfig, SqliteStore, migrate};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), outbox_core::Error> {
/// # let dir = tempfile::tempdir().unwrap();
/// let config = SqliteConfig::new(dir.path().join("app.db"));
/// migrate(&config)?;
/// let store = SqliteStore::open(config)?;
/// assert_eq!(store.stats().await?.backlog.value(), 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct SqliteStore {
    pub(crate) config: Arc<SqliteConfig>,
    pub(crate) sql: Arc<Sql>,
    /// For what the relay writes; nothing slow goes here, lest a lease expire.
    pub(crate) relay: Worker,
    /// For what people ask.
    pub(crate) operator: Worker,
}

impl SqliteStore {
    /// Opens an outbox that [`migrate`](crate::migrate) has made. It blocks for a moment.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Schema`] when the file or the outbox is missing, of another version, or made with
    /// another ordering; `Denied` when the file is read-only; others as SQLite gives them.
    pub fn open(config: SqliteConfig) -> Result<Self> {
        config.check()?;
        FileId::of(&config)?;
        drop(open(&config)?);
        let config = Arc::new(config);
        Ok(Self {
            sql: Arc::new(Sql::new(&config.prefix)),
            relay: Worker::start("relay", Arc::clone(&config))?,
            operator: Worker::start("operator", Arc::clone(&config))?,
            config,
        })
    }

    /// Does one short transaction of the relay's, as durable as configured or more.
    async fn transact<T, F>(&self, operation: &'static str, least: Synchronous, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Transaction<'_>, &Sql) -> Result<T> + Send + 'static,
    {
        let sql = Arc::clone(&self.sql);
        let transact = move |connection: &mut Connection| {
            let transaction = write(connection, operation)?;
            let result = job(&transaction, &sql)?;
            transaction.commit().during(operation)?;
            Ok(result)
        };
        self.relay
            .run(operation, move |connection, _| match least {
                Synchronous::Normal => transact(connection),
                Synchronous::Full => durably(connection, operation, transact),
            })
            .await
    }
}

/// What is given up or waits must stay so: the relay goes on with the key, and a power loss must not bring back what was
/// before it. Deliveries alone need not wait for the disk.
fn durability(settlement: &Settlement) -> Synchronous {
    match settlement.shards.iter().all(ShardSettlement::is_deliveries_only) {
        true => Synchronous::Normal,
        false => Synchronous::Full,
    }
}

#[async_trait]
impl OutboxStore for SqliteStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities::all("sqlite", 1, self.config.ordering)
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        let request = request.clone();
        self.transact("lease", Synchronous::Normal, move |transaction, sql| {
            let (before, now) = load_leases(transaction, sql).during("lease")?;
            let mut after = before.clone();
            let leases = after.lease(&request, now);
            save_leases(transaction, sql, &before, &after).during("lease")?;
            Ok(leases)
        })
        .await
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        let (relay, shards) = (relay.clone(), shards.to_vec());
        self.transact("release", Synchronous::Normal, move |transaction, sql| {
            let (before, _) = load_leases(transaction, sql).during("release")?;
            let mut after = before.clone();
            after.release(&relay, &shards, membership);
            save_leases(transaction, sql, &before, &after).during("release")
        })
        .await
    }

    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>> {
        if !shards.iter().any(|owned| owned.shard == SHARD) {
            return Ok(Vec::new());
        }
        let sql = Arc::clone(&self.sql);
        self.relay
            .run("holds", move |connection, _| {
                list_holds(connection, &sql.holds, params![]).during("holds")
            })
            .await
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        Ok(Box::new(SqliteReader::start(&self.config, &self.sql)?))
    }

    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        let settlement = settlement.clone();
        let archive = self.config.archive;
        self.transact("settle", durability(&settlement), move |transaction, sql| {
            let (table, now) = load_leases(transaction, sql).during("settle")?;
            let (kept, lost) = settlement.fence(&table.held_by(&settlement.relay, now));
            for part in kept {
                settle(transaction, sql, part, archive).during("settle")?;
            }
            Ok(Settled { lost })
        })
        .await
    }

    async fn stats(&self) -> Result<Stats> {
        let sql = Arc::clone(&self.sql);
        self.operator
            .run("stats", move |connection, _| {
                let transaction = connection.transaction().during("stats")?;
                stats(&transaction, &sql).during("stats")
            })
            .await
    }

    fn dead_letters(&self) -> Option<&dyn DeadLetters> {
        Some(self)
    }

    fn scheduled(&self) -> Option<&dyn Scheduled> {
        Some(self)
    }

    fn retention(&self) -> Option<&dyn Retention> {
        self.config.archive.then_some(self)
    }

    fn parking(&self) -> Option<&dyn Parking> {
        Some(self)
    }

    fn inspection(&self) -> Option<&dyn Inspection> {
        Some(self)
    }

    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        if self.config.wake_interval.is_zero() {
            return None;
        }
        Some(Box::new(SqliteWakeUp::start(&self.config)?))
    }
}

impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStore")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// All leases and members, and the database's time. Within a writing transaction nobody else can change them.
pub(crate) fn load_leases(connection: &Connection, sql: &Sql) -> rusqlite::Result<(LeaseTable, StoreMillis)> {
    let mut table = LeaseTable::default();
    let mut statement = connection.prepare_cached(&sql.leases)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let lease = LeaseRow {
            owner: row.get::<_, Option<String>>(1)?.map(RelayId::new),
            epoch: row.get(2)?,
            until: row.get(3)?,
        };
        table.leases.insert(Shard(row.get(0)?), lease);
    }
    let mut statement = connection.prepare_cached(&sql.relays)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        table
            .members
            .insert(RelayId::new(row.get::<_, String>(0)?), row.get(1)?);
    }
    let now = connection
        .prepare_cached(&sql.now)?
        .query_row([], |row| row.get(0))?;
    Ok((table, now))
}

/// Writes what changed.
fn save_leases(
    transaction: &Transaction<'_>,
    sql: &Sql,
    before: &LeaseTable,
    after: &LeaseTable,
) -> rusqlite::Result<()> {
    for (shard, lease) in &after.leases {
        if before.leases.get(shard) != Some(lease) {
            let owner = lease.owner.as_ref().map(RelayId::as_str);
            transaction.prepare_cached(&sql.lease_write)?.execute(params![
                shard.0,
                owner,
                lease.epoch,
                lease.until
            ])?;
        }
    }
    for relay in before.members.keys() {
        if !after.members.contains_key(relay) {
            transaction
                .prepare_cached(&sql.relay_delete)?
                .execute([relay.as_str()])?;
        }
    }
    for (relay, until) in &after.members {
        if before.members.get(relay) != Some(until) {
            transaction
                .prepare_cached(&sql.relay_write)?
                .execute(params![relay.as_str(), until])?;
        }
    }
    Ok(())
}

/// Writes one shard's outcomes. What is not there (any more) is passed over, so that repeating it is harmless.
///
/// Row by row through prepared statements: in SQLite that is no round trip, and faster than joining with a list.
fn settle(
    transaction: &Transaction<'_>,
    sql: &Sql,
    part: &ShardSettlement,
    archive: bool,
) -> rusqlite::Result<()> {
    let mut delete = transaction.prepare_cached(&sql.delete)?;
    let mut keep = transaction.prepare_cached(&sql.archive)?;
    for record in &part.delivered {
        let row = params![record.position.0, record.id.as_bytes()];
        if archive {
            keep.execute(row)?;
        }
        delete.execute(row)?;
    }
    for death in &part.dead {
        bury(transaction, sql, death.record, death.attempts, &death.reason)?;
    }
    for change in &part.holds {
        match change {
            HoldChange::Put(hold) => put_hold(transaction, sql, hold)?,
            HoldChange::Clear(hold) => {
                let name = HoldName::new(hold.shard, &hold.scope, hold.head);
                transaction.prepare_cached(&sql.hold_clear)?.execute(params![
                    name.scope,
                    name.topic,
                    name.key,
                    name.message
                ])?;
            }
        }
    }
    Ok(())
}

/// Moves a message to the dead letters, if it is there.
pub(crate) fn bury(
    transaction: &Transaction<'_>,
    sql: &Sql,
    record: RecordRef,
    attempts: u32,
    reason: &str,
) -> rusqlite::Result<()> {
    let (position, id) = (record.position.0, record.id);
    transaction
        .prepare_cached(&sql.bury)?
        .execute(params![position, id.as_bytes(), attempts, reason])?;
    transaction
        .prepare_cached(&sql.delete)?
        .execute(params![position, id.as_bytes()])?;
    Ok(())
}

/// How far large tables are counted.
const COUNTED: i64 = 100_000;

fn stats(transaction: &Transaction<'_>, sql: &Sql) -> rusqlite::Result<Stats> {
    let number = |statement: &str| -> rusqlite::Result<u64> {
        let number: i64 = transaction
            .prepare_cached(statement)?
            .query_row([], |row| row.get(0))?;
        Ok(number.unsigned_abs())
    };
    let bounded = |statement: &str| -> rusqlite::Result<Count> {
        let number: i64 = transaction
            .prepare_cached(statement)?
            .query_row([COUNTED], |row| row.get(0))?;
        Ok(Count::up_to(COUNTED.unsigned_abs(), number.unsigned_abs()))
    };
    let oldest = transaction
        .prepare_cached(&sql.oldest)?
        .query_map([], |row| row.get::<_, i64>(0))?
        .next()
        .transpose()?;
    let (retrying, parked): (i64, i64) = transaction
        .prepare_cached(&sql.hold_counts)?
        .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let (leases, now) = load_leases(transaction, sql)?;
    Ok(Stats {
        backlog: bounded(&sql.backlog)?,
        oldest_age: oldest.map(|age| Duration::from_millis(age.max(0).unsigned_abs())),
        retrying: retrying.unsigned_abs(),
        parked: parked.unsigned_abs(),
        dead: number(&sql.dead_count)?,
        scheduled: number(&sql.scheduled_count)?,
        processed: bounded(&sql.processed_count)?,
        leases: leases.status(now),
        relays: leases.relays(now),
    })
}

#[cfg(test)]
mod tests {
    use outbox_core::{Death, Epoch, MessageId, Position, RecordRef};

    use super::*;

    #[test]
    fn what_is_given_up_is_on_the_disk_before_it_is_told() {
        let record = RecordRef {
            position: Position(1),
            id: MessageId::new(),
        };
        let mut part = ShardSettlement::new(SHARD, Epoch(1));
        part.delivered.push(record);
        let settlement = |part: &ShardSettlement| Settlement {
            relay: RelayId::new("a"),
            shards: vec![part.clone()],
        };
        assert_eq!(durability(&settlement(&part)), Synchronous::Normal);
        part.dead.push(Death {
            record,
            attempts: 1,
            reason: "no".to_owned(),
        });
        assert_eq!(durability(&settlement(&part)), Synchronous::Full);

        let mut connection = Connection::open_in_memory().unwrap();
        connection.pragma_update(None, "synchronous", "NORMAL").unwrap();
        let asked = |connection: &Connection| -> i64 {
            connection
                .pragma_query_value(None, "synchronous", |row| row.get(0))
                .unwrap()
        };
        let during = durably(&mut connection, "test", |connection| Ok(asked(connection)));
        assert_eq!((during.unwrap(), asked(&connection)), (2, 1));
    }
}
