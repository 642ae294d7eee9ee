//! The classic outbox table, adopted as it stands: a store for a table of your own, on MySQL 8 or MariaDB 10.6
//! and newer.
//!
//! The table is [`CLASSIC`]; nothing of it changes, and producers go on with their `INSERT`. What the table does not know
//! stands beside it ([`BESIDE`]): who may send what (leases), which relays are alive, what waits after a failure (holds).
//!
//! Read it from the top: what is yours; what a row means; the store; its reader; the session. What is not the store's
//! business comes from the framework: [`LeaseTable`], [`Settlement::fence`], [`HoldChanges`], [`Lender`].
//! `tests/real_classic_table.rs` proves it with the conformance suite on both servers.

use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use async_trait::async_trait;
use futures::TryStreamExt;
use outbox::{
    Capabilities, Count, DeadLetters, Error, ErrorKind, FetchRequest, Fetched, Headers, Hold, HoldChanges,
    HoldName, HoldScope, HoldState, Inspection, LeaseRequest, LeaseRow, LeaseTable, Leases, Lender, Lent,
    Membership, Message, MessageId, OrderKey, Ordering, OutboxStore, OwnedShard, Parking, Parts, Position,
    Reader, Record, RecordRef, RelayId, Result, Retention, Scheduled, Settled, Settlement, Shard, Stats,
    StoreMillis, WakeUp,
};
use serde_json::json;
use sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlDatabaseError, MySqlRow};
use sqlx::{AssertSqlSafe, Connection, Row};

// ---- What is yours.

/// The table as it stands in many companies.
pub(crate) const CLASSIC: &str = "\
CREATE TABLE outbox (
    id BIGINT AUTO_INCREMENT PRIMARY KEY,
    payload JSON NOT NULL,
    status ENUM('pending', 'processed') DEFAULT 'pending',
    created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP
)";

/// The table does not say where a message goes: all go to one topic.
pub(crate) const TOPIC: &str = "orders";

/// Names this table among all whose messages reach the same consumers, for good: it is part of every message's id.
const SOURCE: &str = "shop";

/// Into how many parts relays divide the rows between them. It may change while no relay runs, once `outbox_lease` and
/// `outbox_hold` are emptied.
const SHARDS: u16 = 4;

/// The tables beside yours. Times are milliseconds by the database's clock. Operators may change holds by hand: see
/// [`OutboxStore::dead_letters`] below.
const BESIDE: &str = "\
CREATE TABLE IF NOT EXISTS outbox_lease (
    shard SMALLINT PRIMARY KEY, owner VARCHAR(255), epoch BIGINT NOT NULL, until BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS outbox_relay (
    relay VARCHAR(255) COLLATE utf8mb4_bin PRIMARY KEY, until BIGINT NOT NULL) CHARACTER SET utf8mb4;
CREATE TABLE IF NOT EXISTS outbox_hold (
    shard SMALLINT, scope VARBINARY(7), `key` VARBINARY(1024), message BIGINT, head BIGINT NOT NULL,
    head_id BINARY(16) NOT NULL, attempts BIGINT NOT NULL, parked BOOL NOT NULL, due BIGINT NOT NULL,
    reason TEXT NOT NULL, PRIMARY KEY (shard, scope, `key`, message)) CHARACTER SET utf8mb4";

// ---- What a row means, in SQL. `o` is the outbox.

/// The key: what stands at this path of the payload, without its quotes; nothing, or `null`, is no key.
///
/// As bytes, because a collation would make one key of two. Cut where it is too long for a key anyway, so that no
/// row of the answer is larger than the server sends.
const KEY: &str = "CAST(IF(JSON_TYPE(JSON_EXTRACT(o.payload, '$.order_id')) = 'NULL', NULL, \
                   LEFT(JSON_UNQUOTE(JSON_EXTRACT(o.payload, '$.order_id')), 1025)) AS BINARY)";

/// The payload; NULL if it is more than the server sends in one row. Of such JSON MySQL would send an empty text instead.
const PAYLOAD: &str =
    "IF(LENGTH(o.payload) BETWEEN 1 AND @@max_allowed_packet - 10000, CAST(o.payload AS BINARY), NULL)";

/// The shard: of a key as [`outbox::shard_of`] makes it, of a keyless row by its id.
fn shard() -> String {
    format!("CAST(CONV(LEFT(SHA2(COALESCE({KEY}, o.id), 256), 8), 16, 10) % {SHARDS} AS SIGNED)")
}

/// The message's id, by which consumers drop duplicates: the same whenever the row is read, and of no other row. The
/// time is in it because a table that is truncated begins its ids anew. A UUID of version 8.
fn message_id() -> String {
    let hash = format!("LEFT(SHA2(CONCAT_WS('/', '{SOURCE}', o.id, UNIX_TIMESTAMP(o.created_at)), 256), 32)");
    format!("UNHEX(INSERT(INSERT({hash}, 13, 1, '8'), 17, 1, '8'))")
}

const NOW: &str = "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000";

// ---- The store.

/// The store. Clones share its connections.
#[derive(Debug, Clone)]
pub(crate) struct ClassicStore {
    options: Arc<MySqlConnectOptions>,
    sessions: Lender<MySqlConnection>,
}

impl ClassicStore {
    /// Connects to the database in which your table is, and makes the tables beside it.
    pub(crate) async fn connect(url: &str) -> Result<Self> {
        const DURING: &str = "connect";
        let options = url.parse().map_err(failed(DURING))?;
        let store = Self {
            options: Arc::new(options),
            sessions: Lender::new(4, Duration::from_secs(10)),
        };
        let mut connection = store.open(DURING).await?;
        let free: Vec<String> = (0..SHARDS).map(|shard| format!("({shard}, 0, 0)")).collect();
        let free = format!(
            "INSERT IGNORE INTO outbox_lease (shard, epoch, until) VALUES {}",
            free.join(", ")
        );
        run(&mut connection, DURING, format!("{BESIDE}; {free}")).await?;
        Ok(store)
    }
}

#[async_trait]
impl OutboxStore for ClassicStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "classic",
            shards: SHARDS,
            ordering: Ordering::Insert,
            keys: true,
            fixed_topic: Some(TOPIC.into()),
            // The table has no column for these, and `payload` is NOT NULL.
            headers: false,
            content_types: false,
            tombstones: false,
            // JSON, kept as a value: MySQL writes its text anew, with other spaces and another order of members.
            any_bytes: false,
            message_ids: false,
        }
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        let mut tx = self.begin("lease").await?;
        let (mut table, now) = tx.leases("FOR UPDATE").await?;
        let leases = table.lease(request, now);
        tx.write_leases(&table).await?;
        tx.commit().await?;
        Ok(leases)
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        let mut tx = self.begin("release").await?;
        let (mut table, _) = tx.leases("FOR UPDATE").await?;
        table.release(relay, shards, membership);
        tx.write_leases(&table).await?;
        tx.commit().await
    }

    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>> {
        let mut tx = self.begin("holds").await?;
        let sql = format!(
            "SELECT shard, scope, `key`, head, head_id, attempts, parked, due - {NOW}, reason FROM outbox_hold \
             WHERE FIND_IN_SET(shard, '{}')",
            list(shards.iter().map(|owned| owned.shard))
        );
        let rows = tx.run(sql, &[]).await?;
        tx.commit().await?;
        rows.iter()
            .map(read_hold)
            .collect::<sqlx::Result<_>>()
            .map_err(failed("holds"))
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        Ok(Box::new(ClassicReader {
            connection: self.open("fetch").await?,
        }))
    }

    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        if settlement.shards.iter().any(|part| !part.dead.is_empty()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "settle",
                "this store keeps no dead letters",
            ));
        }
        let mut tx = self.begin("settle").await?;
        // Leases first, as everybody does, and shared: settlements run side by side, but nobody takes a shard over
        // between this look and the commit.
        let (leases, now) = tx.leases("LOCK IN SHARE MODE").await?;
        let (kept, lost) = settlement.fence(&leases.held_by(&settlement.relay, now));

        let (mut delivered, mut changes) = (Vec::new(), HoldChanges::default());
        for part in kept {
            for record in &part.delivered {
                delivered.push(json!([
                    part.shard.0,
                    record.position.0,
                    hex(record.id.as_bytes())
                ]));
            }
            part.holds
                .iter()
                .for_each(|change| changes.add(part.shard, change));
        }
        if !delivered.is_empty() {
            tx.mark(&json!(delivered).to_string()).await?;
        }
        tx.write_holds(&changes, now).await?;
        tx.commit().await?;
        Ok(Settled { lost })
    }

    async fn stats(&self) -> Result<Stats> {
        const COUNTED: u64 = 100_000;
        let mut tx = self.begin("stats").await?;
        let (leases, now) = tx.leases("").await?;
        let backlog =
            format!("SELECT COUNT(*) FROM (SELECT 1 FROM outbox WHERE status = 'pending' LIMIT {COUNTED}) c");
        let backlog = tx.number(backlog).await?.unwrap_or_default().unsigned_abs();
        let oldest = "SELECT TIMESTAMPDIFF(SECOND, created_at, UTC_TIMESTAMP()) FROM outbox \
                      WHERE status = 'pending' ORDER BY id LIMIT 1";
        let oldest = tx.number(oldest).await?;
        let holds = "SELECT COUNT(*) FROM outbox_hold WHERE parked =";
        let retrying = tx.number(format!("{holds} FALSE")).await?.unwrap_or_default();
        let parked = tx.number(format!("{holds} TRUE")).await?.unwrap_or_default();
        tx.commit().await?;
        Ok(Stats {
            backlog: if backlog < COUNTED {
                Count::Exact(backlog)
            } else {
                Count::AtLeast(backlog)
            },
            oldest_age: oldest.map(|seconds| Duration::from_secs(seconds.max(0).unsigned_abs())),
            retrying: retrying.unsigned_abs(),
            parked: parked.unsigned_abs(),
            dead: 0,
            scheduled: 0,
            // Processed rows are yours, see `retention`.
            processed: Count::Exact(0),
            leases: leases.status(now),
            relays: leases.relays(now),
        })
    }

    /// None: `status` has no value for them. What can never be sent parks its key, or itself alone when it has none, and
    /// all others flow. You decide, and the relay notices within seconds:
    ///
    /// ```sql
    /// SELECT scope, `key`, head, reason FROM outbox_hold WHERE parked;
    /// -- go on without it:
    /// UPDATE outbox SET status = 'processed' WHERE id = <head>;
    /// -- then, or to try it again:
    /// DELETE FROM outbox_hold WHERE parked AND head = <head>;
    /// ```
    fn dead_letters(&self) -> Option<&dyn DeadLetters> {
        None
    }

    fn scheduled(&self) -> Option<&dyn Scheduled> {
        None
    }

    /// None: the table does not tell when a row was sent, and whoever deletes processed rows now goes on. Delete them in
    /// bounded batches (`DELETE FROM outbox WHERE status = 'processed' AND created_at < … ORDER BY id LIMIT 1000`, at
    /// READ COMMITTED): the reader walks over each of them.
    fn retention(&self) -> Option<&dyn Retention> {
        None
    }

    fn parking(&self) -> Option<&dyn Parking> {
        None
    }

    fn inspection(&self) -> Option<&dyn Inspection> {
        None
    }

    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        None
    }
}

// ---- The reader.

/// The simple reader, correct by construction: pending, of my shards, not in flight, not held, lowest id first.
///
/// From the start each time: ids become visible in another order than they were drawn, so a reader that remembers the
/// last one loses the row of the transaction that commits late. The price is that each read walks over the processed rows.
/// While that is too slow, delete them (see [`OutboxStore::retention`] above), or add an index on `(status, id)`.
#[derive(Debug)]
struct ClassicReader {
    connection: MySqlConnection,
}

#[async_trait]
impl Reader for ClassicReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        let (mut records, mut bytes, mut seen) = (Vec::new(), 0, 0);
        if !request.shards.is_empty() && !request.held.topics.contains(TOPIC) {
            let sql = fetch(request);
            let mut rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch(&mut self.connection);
            while let Some(row) = rows.try_next().await.map_err(failed("fetch"))? {
                seen += 1;
                let record = read_record(&row).map_err(failed("fetch"))?;
                bytes += record.message.size();
                // One always passes, or a large message would never go. What comes behind is read and dropped.
                if bytes <= request.max_bytes || records.is_empty() {
                    records.push(record);
                }
            }
        }
        let more = seen == request.max_rows || seen > records.len();
        Ok(Fetched::Batch { records, more })
    }
}

/// One statement, that is one snapshot. Numbers and hexadecimal digits are all that is put into its text.
fn fetch(request: &FetchRequest) -> String {
    let (shard, message_id) = (shard(), message_id());
    let held = request.held.messages.iter();
    let ids = request.in_flight.iter().chain(held).map(|(_, position)| position);
    let keys = request.held.keys.iter();
    let keys = keys.map(|(_, held)| format!("X'{}'", hex(&held.key)));
    let none_of = |what: &str, those: String| match those.as_str() {
        "" => String::new(),
        those => format!("AND ({what} IS NULL OR {what} NOT IN ({those}))"),
    };
    format!(
        "SELECT {shard}, o.id, {message_id}, {KEY}, {PAYLOAD}, \
             CAST(UNIX_TIMESTAMP(o.created_at) AS SIGNED) \
         FROM outbox o WHERE o.status = 'pending' {} AND {shard} IN ({}) {} ORDER BY o.id LIMIT {}",
        none_of("o.id", list(ids)),
        list(request.shards.iter().map(|owned| owned.shard)),
        none_of(KEY, list(keys)),
        request.max_rows
    )
}

fn read_record(row: &MySqlRow) -> sqlx::Result<Record> {
    let created_at: Option<i64> = row.try_get(5)?;
    let mut parts = Parts {
        id: MessageId::from_bytes(read_id(row, 2)?),
        topic: TOPIC.into(),
        key: row.try_get::<Option<Vec<u8>>, _>(3)?.map(Into::into),
        payload: row.try_get::<Option<Vec<u8>>, _>(4)?.map(Into::into),
        headers: Headers::new(),
        content_type: None,
        created_at: created_at.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs())),
        deliver_at: None,
    };
    // A row with a defect is never sent: it waits for you, and with it its key.
    let too_large = || "the payload is larger than the server sends: see max_allowed_packet".to_owned();
    let mut defect = parts.payload.is_none().then(too_large);
    if let Err(error) = parts.check() {
        // What is too long is no key, so that the row waits alone.
        parts.key = None;
        defect = Some(error.to_string());
    }
    Ok(Record {
        shard: read_shard(row, 0)?,
        position: Position(row.try_get(1)?),
        key_seq: None,
        attempts: 0,
        message: Message::from_stored(parts),
        defect,
    })
}

// ---- Transactions.

/// A transaction. Dropped half-way it is rolled back: its connection is closed.
#[derive(Debug)]
struct Tx {
    session: Lent<MySqlConnection>,
    during: &'static str,
}

/// A relay that is stopped or cut off between two statements would keep its locks on the leases, and no other could take
/// over: the server ends a session that is silent so long in a transaction, and only then.
pub(crate) const BEGIN: &str = "SET SESSION wait_timeout = 10; START TRANSACTION";
const COMMIT: &str = "COMMIT; SET SESSION wait_timeout = DEFAULT";

/// At READ COMMITTED no lock is kept on what does not match, nor on gaps: producers wait for nothing.
const SETTINGS: &str = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED; \
                        SET SESSION innodb_lock_wait_timeout = 5";

impl ClassicStore {
    async fn open(&self, during: &'static str) -> Result<MySqlConnection> {
        let opened = MySqlConnection::connect_with(&self.options).await;
        let mut connection = opened.map_err(failed(during))?;
        run(&mut connection, during, SETTINGS).await?;
        Ok(connection)
    }

    async fn begin(&self, during: &'static str) -> Result<Tx> {
        let session = self.sessions.lend(during, async || self.open(during).await);
        let mut tx = Tx {
            session: session.await?,
            during,
        };
        run(tx.session.connection()?, during, BEGIN).await?;
        Ok(tx)
    }
}

impl Tx {
    async fn commit(mut self) -> Result<()> {
        run(self.session.connection()?, self.during, COMMIT).await?;
        self.session.give_back();
        Ok(())
    }

    /// One statement. A list goes in as JSON, and `JSON_TABLE` makes rows of it.
    async fn run(&mut self, sql: impl Into<String>, lists: &[&str]) -> Result<Vec<MySqlRow>> {
        let mut query = sqlx::query(AssertSqlSafe(sql.into()));
        for list in lists {
            query = query.bind(*list);
        }
        let rows = query.fetch_all(self.session.connection()?).await;
        rows.map_err(failed(self.during))
    }

    async fn number(&mut self, sql: impl Into<String>) -> Result<Option<i64>> {
        let rows = self.run(sql, &[]).await?;
        let number = rows.first().map(|row| row.try_get(0)).transpose();
        number.map(Option::flatten).map_err(failed(self.during))
    }

    /// The leases and the members, under a lock; and the time, asked once they are locked: that may have taken a while.
    ///
    /// All rows, in one order, so that nobody waits in a circle. Who changes leases or members holds all of them.
    async fn leases(&mut self, lock: &str) -> Result<(LeaseTable, StoreMillis)> {
        let sql = format!("SELECT shard, owner, epoch, until FROM outbox_lease ORDER BY shard {lock}");
        let leases = self.run(sql, &[]).await?;
        let members = self.run("SELECT relay, until FROM outbox_relay", &[]).await?;
        let now = self.number(format!("SELECT {NOW}")).await?.unwrap_or_default();
        let table = read_leases(&leases, &members).map_err(failed(self.during))?;
        Ok((table, now))
    }

    async fn write_leases(&mut self, table: &LeaseTable) -> Result<()> {
        let leases = table.leases.iter().map(|(shard, row)| {
            let owner = row.owner.as_ref().map(RelayId::as_str);
            json!([shard.0, owner, row.epoch, row.until])
        });
        let leases = json!(leases.collect::<Vec<_>>()).to_string();
        let members = table.members.iter();
        let members = members.map(|(relay, until)| json!([relay.as_str(), until]));
        let members = json!(members.collect::<Vec<_>>()).to_string();
        let sql = "REPLACE INTO outbox_lease (shard, owner, epoch, until) SELECT s, o, e, u FROM JSON_TABLE(?, '$[*]' \
                   COLUMNS (s SMALLINT PATH '$[0]', o VARCHAR(255) PATH '$[1]', e BIGINT PATH '$[2]', \
                   u BIGINT PATH '$[3]')) j";
        self.run(sql, &[&leases]).await?;
        self.run("DELETE FROM outbox_relay", &[]).await?;
        let sql = "INSERT INTO outbox_relay (relay, until) SELECT r, u FROM JSON_TABLE(?, '$[*]' \
                   COLUMNS (r VARCHAR(255) PATH '$[0]', u BIGINT PATH '$[1]')) j";
        self.run(sql, &[&members]).await.map(drop)
    }

    /// Marks rows by their ids, never by their status: a row that was not read is not marked, whenever it appears. Each is
    /// looked up by the primary key, whatever the server believes of the table: one that is nearly empty would be
    /// read whole, and would wait there for the open rows of producers.
    async fn mark(&mut self, delivered: &str) -> Result<()> {
        let sql = format!(
            "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (s SMALLINT PATH '$[0]', i BIGINT PATH '$[1]', \
             m CHAR(32) PATH '$[2]')) j STRAIGHT_JOIN outbox o FORCE INDEX (PRIMARY) ON o.id = j.i \
             SET o.status = 'processed' WHERE {} = j.s AND {} = UNHEX(j.m)",
            shard(),
            message_id()
        );
        self.run(sql, &[delivered]).await.map(drop)
    }

    async fn write_holds(&mut self, changes: &HoldChanges<'_>, now: StoreMillis) -> Result<()> {
        let name = |name: HoldName<'_>| json!([name.shard.0, name.scope, hex(name.key), name.message]);
        let cleared: Vec<_> = changes.cleared().map(name).collect();
        let columns = "s SMALLINT PATH '$[0]', c CHAR(7) PATH '$[1]', k VARCHAR(2048) PATH '$[2]', \
                       m BIGINT PATH '$[3]'";
        if !cleared.is_empty() {
            let sql = format!(
                "DELETE h FROM JSON_TABLE(?, '$[*]' COLUMNS ({columns})) j STRAIGHT_JOIN outbox_hold h \
                 FORCE INDEX (PRIMARY) ON h.shard = j.s AND h.scope = CAST(j.c AS BINARY) AND h.`key` = UNHEX(j.k) \
                 AND h.message = j.m"
            );
            self.run(sql, &[&json!(cleared).to_string()]).await?;
        }
        let put = changes.put().map(|(name, hold)| {
            let (parked, due_in) = hold.state.stored();
            let (head, due) = (hold.head, now.saturating_add(due_in));
            json!([
                name.shard.0,
                name.scope,
                hex(name.key),
                name.message,
                head.position.0,
                hex(head.id.as_bytes()),
                hold.attempts,
                i64::from(parked),
                due,
                hex(hold.reason.as_bytes()),
            ])
        });
        let put: Vec<_> = put.collect();
        if !put.is_empty() {
            let sql = format!(
                "REPLACE INTO outbox_hold (shard, scope, `key`, message, head, head_id, attempts, parked, due, reason) \
                 SELECT s, c, UNHEX(k), m, h, UNHEX(i), a, p, d, CONVERT(UNHEX(r) USING utf8mb4) \
                 FROM JSON_TABLE(?, '$[*]' COLUMNS ({columns}, h BIGINT PATH '$[4]', i CHAR(32) PATH '$[5]', \
                 a BIGINT PATH '$[6]', p BIGINT PATH '$[7]', d BIGINT PATH '$[8]', r TEXT PATH '$[9]')) j"
            );
            self.run(sql, &[&json!(put).to_string()]).await?;
        }
        Ok(())
    }
}

fn read_leases(leases: &[MySqlRow], members: &[MySqlRow]) -> sqlx::Result<LeaseTable> {
    let mut table = LeaseTable::default();
    for row in leases {
        let lease = LeaseRow {
            owner: row.try_get::<Option<String>, _>(1)?.map(RelayId::new),
            epoch: row.try_get(2)?,
            until: row.try_get(3)?,
        };
        table.leases.insert(read_shard(row, 0)?, lease);
    }
    for row in members {
        table
            .members
            .insert(RelayId::new(row.try_get::<String, _>(0)?), row.try_get(1)?);
    }
    Ok(table)
}

fn read_hold(row: &MySqlRow) -> sqlx::Result<Hold> {
    let scope = match row.try_get::<Vec<u8>, _>(1)?.as_slice() {
        b"topic" => HoldScope::Topic(TOPIC.into()),
        b"key" => HoldScope::Key(OrderKey {
            topic: TOPIC.into(),
            key: row.try_get::<Vec<u8>, _>(2)?.into(),
        }),
        _ => HoldScope::Message,
    };
    let state = if row.try_get(6)? {
        HoldState::Parked
    } else {
        let left: i64 = row.try_get(7)?;
        HoldState::Retrying {
            due_in: Duration::from_millis(left.max(0).unsigned_abs()),
        }
    };
    Ok(Hold {
        shard: read_shard(row, 0)?,
        scope,
        head: RecordRef {
            position: Position(row.try_get(3)?),
            id: MessageId::from_bytes(read_id(row, 4)?),
        },
        attempts: u32::try_from(row.try_get::<i64, _>(5)?).unwrap_or(u32::MAX),
        state,
        reason: row.try_get(8)?,
    })
}

fn read_shard(row: &MySqlRow, column: usize) -> sqlx::Result<Shard> {
    let shard: i64 = row.try_get(column)?;
    u16::try_from(shard)
        .map(Shard)
        .map_err(|error| sqlx::Error::Decode(error.into()))
}

fn read_id(row: &MySqlRow, column: usize) -> sqlx::Result<[u8; 16]> {
    let bytes: Vec<u8> = row.try_get(column)?;
    <[u8; 16]>::try_from(bytes).map_err(|_| sqlx::Error::Decode("an id has 16 bytes".into()))
}

/// Runs a text of one statement or several.
async fn run(connection: &mut MySqlConnection, during: &'static str, sql: impl Into<String>) -> Result<()> {
    let done = sqlx::raw_sql(AssertSqlSafe(sql.into())).execute(connection).await;
    done.map(drop).map_err(failed(during))
}

/// The kind decides what the relay does: it repeats what lost a race, or was cut off, at once; all else loudly.
fn failed(during: &'static str) -> impl FnOnce(sqlx::Error) -> Error {
    move |error| {
        let said = error.as_database_error();
        let said = said.and_then(|error| error.try_downcast_ref::<MySqlDatabaseError>());
        let (kind, text) = match said.map(MySqlDatabaseError::number) {
            Some(1205 | 1213 | 1020) => (ErrorKind::Conflict, "another session was first"),
            Some(1044 | 1045 | 1142 | 1143) => (ErrorKind::Denied, "the server refuses this account"),
            Some(1054 | 1146) => (ErrorKind::Schema, "a table is not as this store knows it"),
            Some(_) => (ErrorKind::Unexpected, "the server refuses"),
            None => (ErrorKind::Unavailable, "the server does not answer as it should"),
        };
        Error::new(kind, during, text).with_source(error)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Values with commas between them.
fn list(values: impl Iterator<Item = impl Display>) -> String {
    values
        .map(|value| value.to_string())
        .collect::<Vec<_>>()
        .join(",")
}
