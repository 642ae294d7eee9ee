//! The store of `examples/4_classic_table`, proven on MySQL and MariaDB (`OUTBOX_TEST_MYSQL`, `OUTBOX_TEST_MARIADB`): by the
//! conformance suite, and that the table is left as it is.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

#[path = "../examples/4_classic_table/store.rs"]
mod store;

use std::sync::Arc;
use std::time::Duration;

use outbox::conformance::{CONTENT, StoreHarness};
use outbox::{
    Error, ErrorKind, FetchRequest, Fetched, Held, LeaseRequest, Limits, MemorySink, Message, OutboxStore,
    Outcome, OwnedShard, Record, Relay, RelayId, Result, Settlement, ShardSettlement,
};
use serde_json::{Value, json};
use sqlx::mysql::{MySqlPool, MySqlPoolOptions};
use sqlx::{AssertSqlSafe, Connection, Executor, MySql, MySqlConnection, QueryBuilder, Transaction};
use store::{CLASSIC, ClassicStore, TOPIC};

// ---- The suite. A harness for a table of your own is what follows, and no more.

/// A database of its own with the classic table in it.
struct Place {
    store: ClassicStore,
    /// For producers, who come with the server's own settings.
    pool: MySqlPool,
    server: String,
    url: String,
    database: String,
    /// The table before the store first saw it.
    made: String,
}

/// What a producer writes. The table has a column for the payload alone: what it cannot say is refused here.
async fn insert(tx: &mut MySqlConnection, messages: &[Message]) -> Result<()> {
    for message in messages {
        Limits::default().check(message)?;
        let payload = message
            .payload()
            .and_then(|payload| serde_json::from_slice::<Value>(payload).ok());
        let key = payload
            .as_ref()
            .and_then(|payload| payload.get("order_id")?.as_str());
        let held = message.topic() == TOPIC
            && payload.is_some()
            && message.key().map(AsRef::as_ref) == key.map(str::as_bytes)
            && message.headers().is_empty()
            && message.content_type().is_none()
            && message.deliver_at().is_none();
        if !held {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "enqueue",
                "the table has no column for it",
            ));
        }
    }
    for messages in messages.chunks(1_000) {
        let mut insert = QueryBuilder::<MySql>::new("INSERT INTO outbox (payload) ");
        insert.push_values(messages, |mut row, message| {
            row.push_bind(
                message
                    .payload()
                    .map(|payload| String::from_utf8_lossy(payload).into_owned()),
            );
        });
        insert.build().execute(&mut *tx).await.unwrap();
    }
    Ok(())
}

macro_rules! harness {
    ($name:ident, $variable:literal) => {
        struct $name(Place);

        #[rustfmt::skip]
        #[async_trait::async_trait]
        impl StoreHarness for $name {
            type Tx = Transaction<'static, MySql>;
            async fn fresh() -> Self { Self(Place::new($variable).await) }
            fn store(&self) -> Arc<dyn OutboxStore> { Arc::new(self.0.store.clone()) }
            async fn begin(&self) -> Self::Tx { self.0.pool.begin().await.unwrap() }
            async fn enqueue(&self, tx: &mut Self::Tx, messages: &[Message]) -> Result<()> { insert(tx, messages).await }
            async fn commit(&self, tx: Self::Tx) { tx.commit().await.unwrap(); }
            async fn rollback(&self, tx: Self::Tx) { tx.rollback().await.unwrap(); }
            fn concurrent_transactions(&self) -> bool { true }
            fn fit(&self, message: Message) -> Message { fit(message) }
        }
    };
}

/// The key goes where the store looks for it.
fn fit(message: Message) -> Message {
    let mut parts = message.into_parts();
    if let (Some(key), Some(payload)) = (&parts.key, &parts.payload) {
        let content: Value = serde_json::from_slice(payload).unwrap();
        let payload = json!({ "order_id": String::from_utf8_lossy(key), CONTENT: content });
        parts.payload = Some(payload.to_string().into());
    }
    Message::from_stored(parts)
}

harness!(OnMysql, "OUTBOX_TEST_MYSQL");
harness!(OnMariadb, "OUTBOX_TEST_MARIADB");

outbox::store_conformance!(OnMysql, mysql_conformance);
outbox::store_conformance!(OnMariadb, mariadb_conformance);

impl Place {
    async fn new(variable: &str) -> Self {
        let server = std::env::var(variable).unwrap_or_else(|_| {
            panic!("{variable} is not set: run scripts/services start, then eval \"$(scripts/services env)\"")
        });
        let database = format!("classic_{}_{:08x}", std::process::id(), fastrand::u32(..));
        let mut connection = MySqlConnection::connect(&server).await.unwrap();
        let made = format!("CREATE DATABASE {database}");
        connection.execute(AssertSqlSafe(made)).await.unwrap();
        let url = format!("{}/{database}", server.rsplit_once('/').unwrap().0);
        let pool = MySqlPoolOptions::new()
            .max_connections(20)
            .connect(&url)
            .await
            .unwrap();
        pool.execute(CLASSIC).await.unwrap();
        let made = table(&pool).await;
        Self {
            store: ClassicStore::connect(&url).await.unwrap(),
            pool,
            server,
            url,
            database,
            made,
        }
    }

    async fn sql(&self, sql: &str) {
        self.pool.execute(AssertSqlSafe(sql.to_owned())).await.unwrap();
    }

    /// Ids and statuses.
    async fn rows(&self) -> Vec<(i64, String)> {
        sqlx::query_as("SELECT id, CAST(status AS CHAR) FROM outbox ORDER BY id")
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }

    async fn insert(&self, payload: &Value) {
        insert_row(&mut self.pool.acquire().await.unwrap(), payload).await;
    }

    /// Runs a relay until nothing is left that can go; the ids of what it delivered.
    async fn drain(&self, sink: &MemorySink) -> Vec<i64> {
        let before = sink.delivered().len();
        let relay = Relay::new(Arc::new(self.store.clone()), Box::new(sink.clone()));
        let drained = tokio::time::timeout(Duration::from_secs(60), relay.drain(std::future::pending()));
        drained.await.expect("the relay comes to an end").unwrap();
        let mut ids: Vec<i64> = sink.delivered()[before..]
            .iter()
            .map(|record| record.position.0)
            .collect();
        ids.sort_unstable();
        ids
    }
}

/// A relay in slow motion.
struct Slow {
    id: RelayId,
    store: ClassicStore,
    owned: Vec<OwnedShard>,
}

impl Slow {
    async fn new(place: &Place) -> Self {
        let (id, store) = (RelayId::new("slow"), place.store.clone());
        let ttl = Duration::from_secs(60);
        let request = LeaseRequest {
            relay: id.clone(),
            want: u16::MAX,
            ttl,
        };
        let owned = store.lease(&request).await.unwrap().held;
        Self { id, store, owned }
    }

    async fn fetch(&self) -> Vec<Record> {
        self.fetch_beside(Held::default()).await
    }

    async fn fetch_beside(&self, held: Held) -> Vec<Record> {
        let request = FetchRequest {
            shards: self.owned.clone(),
            held: Arc::new(held),
            max_rows: 100,
            max_bytes: 1 << 20,
            ..FetchRequest::default()
        };
        match self.store.reader().await.unwrap().fetch(&request).await.unwrap() {
            Fetched::Batch { records, .. } => records,
            Fetched::Reset { reason } => panic!("reset: {reason}"),
        }
    }

    async fn settle(&self, records: &[Record]) {
        let part = |owned: &OwnedShard| {
            let own = records.iter().filter(|record| record.shard == owned.shard);
            let delivered = own.map(Record::reference).collect();
            ShardSettlement {
                delivered,
                ..ShardSettlement::new(owned.shard, owned.epoch)
            }
        };
        let shards = self.owned.iter().map(part).collect();
        let settlement = Settlement {
            relay: self.id.clone(),
            shards,
        };
        assert!(self.store.settle(&settlement).await.unwrap().lost.is_empty());
    }
}

fn positions(records: &[Record]) -> Vec<i64> {
    records.iter().map(|record| record.position.0).collect()
}

/// As an application does it.
async fn insert_row(connection: &mut MySqlConnection, payload: &Value) {
    let insert = sqlx::query("INSERT INTO outbox (payload) VALUES (?)").bind(payload.to_string());
    insert.execute(connection).await.unwrap();
}

/// How the table is made, but for the next id.
async fn table(pool: &MySqlPool) -> String {
    let row: (String, String) = sqlx::query_as("SHOW CREATE TABLE outbox")
        .fetch_one(pool)
        .await
        .unwrap();
    let words = row
        .1
        .split(' ')
        .filter(|word| !word.starts_with("AUTO_INCREMENT="));
    words.collect::<Vec<_>>().join(" ")
}

impl Drop for Place {
    fn drop(&mut self) {
        let (server, database) = (self.server.clone(), self.database.clone());
        // The test's own runtime may be at its end.
        let cleaning = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async move {
                let mut connection = MySqlConnection::connect(&server).await?;
                // Whatever a test that failed has left open holds this up.
                let dropped = format!("SET lock_wait_timeout = 10; DROP DATABASE IF EXISTS {database}");
                connection.execute(AssertSqlSafe(dropped)).await?;
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
            })
        });
        let _ = cleaning.join();
    }
}

// ---- What the suite does not ask: the table.

macro_rules! on_both {
    ($($(#[$attribute:meta])* async fn $name:ident($place:ident: Place) $body:block)+) => {
        mod mysql {
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(super::Place::new("OUTBOX_TEST_MYSQL").await).await; })+
        }
        mod mariadb {
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(super::Place::new("OUTBOX_TEST_MARIADB").await).await; })+
        }
        $($(#[$attribute])* async fn $name($place: Place) $body)+
    };
}

on_both! {
    /// Neither the table nor a row of it is changed, but for the status of what was delivered.
    async fn the_table_stays_as_it_is(place: Place) {
        type Row = (i64, String, i64);
        let rows = async || -> Vec<Row> {
            let sql = "SELECT id, CAST(payload AS CHAR), CAST(UNIX_TIMESTAMP(created_at) AS SIGNED) FROM outbox ORDER BY id";
            sqlx::query_as(sql).fetch_all(&place.pool).await.unwrap()
        };
        for number in 0..5 {
            place.insert(&json!({ "order_id": number, "event": "placed" })).await;
        }
        place.sql("UPDATE outbox SET created_at = '2020-02-02 20:20:20'").await;
        let before = rows().await;
        assert_eq!(place.drain(&MemorySink::new()).await, [1, 2, 3, 4, 5]);
        assert_eq!(rows().await, before);
        assert!(place.rows().await.iter().all(|(_, status)| status == "processed"));
        assert_eq!(table(&place.pool).await, place.made);
    }

    /// What was processed before the store came, or was settled by it, is not sent again, by whomever.
    async fn processed_rows_are_not_sent(place: Place) {
        place.insert(&json!({ "order_id": 1 })).await;
        place.sql("UPDATE outbox SET status = 'processed'").await;
        place.insert(&json!({ "order_id": 1 })).await;
        let sink = MemorySink::new();
        assert_eq!(place.drain(&sink).await, [2]);
        let mut place = place;
        place.store = ClassicStore::connect(&place.url).await.unwrap();
        assert_eq!(place.drain(&sink).await, [] as [i64; 0]);
    }

    /// An id that was drawn first and is committed last is neither lost nor marked with those around it.
    async fn a_late_commit_is_sent(place: Place) {
        let relay = Slow::new(&place).await;
        let mut late = place.pool.begin().await.unwrap();
        insert_row(&mut late, &json!({ "order_id": "late" })).await;
        place.insert(&json!({ "order_id": "other" })).await;
        let records = relay.fetch().await;
        assert_eq!(positions(&records), [2]);
        // It appears between the read and the mark.
        late.commit().await.unwrap();
        relay.settle(&records).await;
        assert_eq!(place.rows().await, [(1, "pending".into()), (2, "processed".into())]);
        assert_eq!(positions(&relay.fetch().await), [1]);
    }

    /// Rows of open transactions lie around those that are marked, in a table that is nearly empty.
    async fn open_transactions_hold_nobody_up(place: Place) {
        let relay = Slow::new(&place).await;
        let mut below = place.pool.begin().await.unwrap();
        insert_row(&mut below, &json!({ "order_id": 1 })).await;
        place.insert(&json!({ "order_id": 2 })).await;
        let mut above = place.pool.begin().await.unwrap();
        insert_row(&mut above, &json!({ "order_id": 3 })).await;
        let records = relay.fetch().await;
        assert_eq!(positions(&records), [2]);
        // Waiting for a lock would end with the lock's timeout, as an error.
        relay.settle(&records).await;
        below.commit().await.unwrap();
        above.commit().await.unwrap();
        assert_eq!(positions(&relay.fetch().await), [1, 3]);
    }

    /// What can never go waits, alone or with its key, and an operator ends that as the store says.
    async fn what_cannot_go_stops_only_its_key(place: Place) {
        place.insert(&json!({ "order_id": "a", "event": "poison" })).await;
        place.insert(&json!({ "order_id": "a", "event": "behind it" })).await;
        place.insert(&json!({ "order_id": "k".repeat(2_000) })).await;
        place.insert(&json!({ "order_id": "b" })).await;
        place.insert(&json!(["no object", "no key"])).await;
        let sink = MemorySink::new();
        sink.fail_next(Outcome::Poison("nobody takes it".into()));
        assert_eq!(place.drain(&sink).await, [4, 5]);
        let stats = place.store.stats().await.unwrap();
        assert_eq!((stats.parked, stats.retrying, stats.backlog.value()), (2, 0, 3));

        place.sql("UPDATE outbox SET status = 'processed' WHERE id = 1").await;
        place.sql("DELETE FROM outbox_hold WHERE parked AND head = 1").await;
        assert_eq!(place.drain(&sink).await, [2]);
        let left: Vec<_> = place.rows().await.into_iter().filter(|(_, status)| status == "pending").collect();
        assert_eq!(left, [(3, "pending".into())]);
    }

    /// What the server cannot send in one row waits with its key, and is not sent as something else.
    async fn what_is_too_large_waits(place: Place) {
        // The text that MySQL makes of this JSON is longer than the one that it took.
        let large = "INSERT INTO outbox (payload) \
                     VALUES (CONCAT('[', REPEAT('-2000000000,', @@max_allowed_packet DIV 12 - 10), '1]'))";
        place.sql(large).await;
        place.insert(&json!({ "order_id": 1 })).await;
        assert_eq!(place.drain(&MemorySink::new()).await, [2]);
        assert_eq!(place.store.stats().await.unwrap().parked, 1);
        assert_eq!(place.rows().await, [(1, "pending".into()), (2, "processed".into())]);
    }

    /// Keys are what the payload says, whatever their JSON type, and told apart by every byte.
    async fn keys_are_read_from_the_payload(place: Place) {
        for payload in [
            r#"{"order_id": "a"}"#, r#"{"order_id": "A"}"#, r#"{"order_id": "a "}"#, r#"{"order_id": ""}"#,
            r#"{"order_id": 42}"#, r#"{"order_id": "\u00fc\ud83e\udd80\"\\"}"#, r#"{"order_id": null}"#, "{}", "null",
        ] {
            sqlx::query("INSERT INTO outbox (payload) VALUES (?)").bind(payload).execute(&place.pool).await.unwrap();
        }
        let relay = Slow::new(&place).await;
        let records = relay.fetch().await;
        let key = |record: &Record| record.message.key().map(|key| String::from_utf8(key.to_vec()).unwrap());
        let keys: Vec<_> = records.iter().map(key).collect();
        let expected = [Some("a"), Some("A"), Some("a "), Some(""), Some("42"), Some("ü🦀\"\\"), None, None, None];
        assert_eq!(keys, expected.map(|key| key.map(str::to_owned)));
        for record in records.iter().filter(|record| record.message.key().is_some()) {
            let key = record.message.key().map(AsRef::as_ref);
            assert_eq!(record.shard, outbox::shard_of(key, record.message.id(), place.store.capabilities().shards));
            let mut held = Held::default();
        held.keys.insert((records[0].shard, records[0].message.order_key().unwrap()));
        assert_eq!(positions(&relay.fetch_beside(held).await), [2, 3, 4, 5, 6, 7, 8, 9]);
    }
    }

    /// The same row has the same id whoever reads it; another row that gets its number has not.
    async fn ids_are_stable(place: Place) {
        let relay = Slow::new(&place).await;
        let insert = "INSERT INTO outbox (payload, created_at) VALUES ('{}', '2020-02-02 20:20:20'), \
                      ('{}', '2020-02-02 20:20:20')";
        place.sql(insert).await;
        let ids = async || {
            let records = relay.fetch().await;
            assert_eq!(positions(&records), [1, 2]);
            records.iter().map(|record| record.message.id()).collect::<Vec<_>>()
        };
        let first = ids().await;
        assert_ne!(first[0], first[1]);
        assert_eq!(first[0].as_uuid().get_version_num(), 8);
        assert_eq!(ids().await, first);
        place.sql("TRUNCATE outbox").await;
        place.sql(&insert.replace("2020", "2021")).await;
        assert!(ids().await.iter().all(|id| !first.contains(id)));
    }

    /// A relay that is stopped within a transaction does not keep the others from its shards.
    async fn a_stopped_relay_keeps_no_lock(place: Place) {
        let mut stopped = MySqlConnection::connect(&place.url).await.unwrap();
        stopped.execute(store::BEGIN).await.unwrap();
        stopped.execute("SELECT * FROM outbox_lease FOR UPDATE").await.unwrap();
        let start = std::time::Instant::now();
        let ttl = Duration::from_secs(10);
        let request = LeaseRequest { relay: RelayId::new("next"), want: u16::MAX, ttl };
        loop {
            match place.store.lease(&request).await {
                Ok(leases) => break assert!(!leases.held.is_empty()),
                Err(error) => assert!(error.kind() == ErrorKind::Conflict, "{error:?}"),
            }
            assert!(start.elapsed() < Duration::from_secs(30), "the lock is kept");
        }
        assert!(stopped.ping().await.is_err());
    }
}
