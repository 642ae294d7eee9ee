//! What breaks a plain position cursor, each by hand on real servers: transactions that commit late with low positions,
//! in every way in which they can.
//!
//! Beside the reader under test a plain `id > last` reads the same table. Where it must lose or reorder something, the
//! test says so: otherwise the case would prove nothing.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Place, Server, delivered, fetch, in_flight, message, on_each_server, request, until};
use outbox_core::{
    Epoch, FetchRequest, Held, Membership, OutboxStore, OwnedShard, Position, Reader, Record, Reread,
    RereadScope,
};
use outbox_mysql::MysqlConfig;
use outbox_mysql::sqlx::mysql::MySqlConnection;
use outbox_mysql::sqlx::{self, AssertSqlSafe, Executor};

/// So long what is new is read anew, so that a test comes to the time after.
const MOMENT: Duration = Duration::from_millis(500);

on_each_server!(
    late_commit_with_successor,
    late_commit_without_successor,
    early_commit_within_the_lag,
    statement_stalled_between_its_rows,
    statement_longer_than_the_lag_is_found_by_the_sweep,
    fresh_table,
    savepoints_and_failed_statements,
    pages_of_two_snapshots,
    shards_lost_and_regained_between_two_fetches,
    few_shards_beside_others,
    positions_gone_back_are_found_by_the_sweep,
    settlement_of_unknown_outcome,
    key_blocked_before_a_large_backlog,
    rows_read_behind_a_key_that_blocks,
    open_row_of_a_key_that_is_held_meanwhile,
    long_transaction_of_thousands_of_rows,
    stress_loses_reorders_and_repeats_nothing,
);

/// The reader under test, and a plain one; nothing is ever settled unless a test says so.
struct Bench {
    place: Place,
    owned: Vec<OwnedShard>,
    reader: Box<dyn Reader>,
    /// What the reader returned, in order.
    records: Vec<Record>,
    held: Held,
    last: i64,
    plain: Vec<String>,
}

impl Bench {
    /// One whose reader has been at work for longer than the lag.
    async fn new(server: Server) -> Self {
        let mut bench = Self::with(server, |config| config.lag = MOMENT).await;
        bench.others(1).await;
        bench.fetch().await;
        bench.lag_passes().await;
        bench.deliver().await;
        bench
    }

    async fn with(server: Server, adjust: impl FnOnce(&mut MysqlConfig)) -> Self {
        let place = Place::with(server, adjust).await;
        Self {
            owned: place.lease().await,
            reader: place.store.reader().await.unwrap(),
            place,
            records: Vec::new(),
            held: Held::default(),
            last: i64::MIN,
            plain: Vec::new(),
        }
    }

    fn request(&self, reread: Vec<Reread>) -> FetchRequest {
        FetchRequest {
            in_flight: in_flight(&self.records),
            held: Arc::new(self.held.clone()),
            reread,
            ..request(&self.owned, 100)
        }
    }

    /// Reads all there is; says what is new.
    async fn read(&mut self, mut reread: Vec<Reread>) -> Vec<String> {
        let known = self.records.len();
        loop {
            let request = self.request(std::mem::take(&mut reread));
            let (records, more) = fetch(&mut self.reader, &request).await;
            self.records.extend(records);
            if !more {
                return payloads(&self.records[known..]);
            }
        }
    }

    /// Everything that was read is delivered.
    async fn deliver(&mut self) {
        let records = std::mem::take(&mut self.records);
        self.place.deliver(&self.owned, &records).await;
    }

    /// Both readers read; says what is new for the one under test.
    async fn fetch(&mut self) -> Vec<String> {
        let new = self.read(Vec::new()).await;
        let rows: Vec<(i64, Vec<u8>)> = sqlx::query_as(AssertSqlSafe(
            self.place
                .named("SELECT id, payload FROM {} WHERE id > ? ORDER BY id"),
        ))
        .bind(self.last)
        .fetch_all(&self.place.pool)
        .await
        .unwrap();
        for (position, payload) in rows {
            self.last = position;
            self.plain.push(String::from_utf8(payload).unwrap());
        }
        new
    }

    fn plain_misses(&self, payload: &str) {
        assert!(
            !self.plain.iter().any(|plain| plain == payload),
            "a plain cursor finds {payload} too: the case proves nothing"
        );
    }

    /// Up to which position the reader reads nothing anew.
    fn floor(&self) -> i64 {
        let told = format!("{:?}", self.reader);
        let (_, rest) = told.split_once("floor: ").unwrap();
        let end = rest.find([',', ' ']).unwrap();
        rest[..end].parse().unwrap()
    }

    /// How often within the lag the reader has looked at what is not committed.
    fn looks(&self) -> usize {
        let told = format!("{:?}", self.reader);
        let (_, drawn) = told.split_once("drawn: [").unwrap();
        let (drawn, _) = drawn.split_once(']').unwrap();
        drawn.matches("Instant").count()
    }

    /// Reads until what is stored now is not read anew any more; nothing else comes meanwhile.
    async fn lag_passes(&mut self) {
        let newest = self.place.number("SELECT MAX(id) FROM {}").await;
        let end = Instant::now() + Duration::from_secs(60);
        while self.floor() < newest {
            assert!(Instant::now() < end, "the reader stays at {}", self.floor());
            assert!(self.fetch().await.is_empty());
            tokio::time::sleep(MOMENT / 20).await;
        }
    }

    /// A producer with a transaction of its own.
    async fn producer(&self) -> Producer {
        let mut connection = self.place.connect().await;
        connection.execute("START TRANSACTION").await.unwrap();
        Producer {
            connection,
            insert: self.place.named("INSERT INTO {} (topic, `key`, payload) VALUES"),
        }
    }

    /// Others go on, each in a transaction of its own.
    async fn others(&self, count: usize) {
        for index in 0..count {
            let text = format!(
                "INSERT INTO {{}} (topic, `key`, payload) VALUES ('t', 'other-{}', 'other')",
                index % 7
            );
            self.place.sql(&text).await;
        }
    }

    /// How many the reader remembers as pending or wanted: all that could grow.
    fn size(&self) -> usize {
        format!("{:?}", self.reader).len()
    }
}

struct Producer {
    connection: MySqlConnection,
    insert: String,
}

impl Producer {
    async fn run(&mut self, text: &str) {
        self.connection
            .execute(AssertSqlSafe(text.to_owned()))
            .await
            .unwrap();
    }

    async fn insert(&mut self, key: &str, payload: &str) {
        let text = format!("{} ('t', '{key}', '{payload}')", self.insert);
        self.run(&text).await;
    }

    async fn commit(mut self) {
        self.run("COMMIT").await;
    }
}

fn payloads(records: &[Record]) -> Vec<String> {
    let text = |record: &Record| String::from_utf8(record.message.payload().unwrap().to_vec()).unwrap();
    records.iter().map(text).collect()
}

/// Those that are not `other`.
fn named(payloads: &[String]) -> Vec<&str> {
    let named = payloads.iter().map(String::as_str);
    named.filter(|payload| *payload != "other").collect()
}

async fn late_commit_with_successor(server: Server) {
    let mut bench = Bench::new(server).await;
    let mut late = bench.producer().await;
    late.insert("k", "first").await;
    bench.others(5).await;
    assert_eq!(bench.fetch().await.len(), 5);
    bench.lag_passes().await;
    late.commit().await;
    let mut successor = bench.producer().await;
    successor.insert("k", "second").await;
    successor.commit().await;
    assert_eq!(bench.fetch().await, ["first", "second"]);
    bench.plain_misses("first");
}

async fn late_commit_without_successor(server: Server) {
    let mut bench = Bench::new(server).await;
    let mut late = bench.producer().await;
    late.insert("k", "only").await;
    bench.others(5).await;
    bench.fetch().await;
    bench.lag_passes().await;
    assert!(bench.fetch().await.is_empty());
    late.commit().await;
    assert_eq!(bench.fetch().await, ["only"]);
    assert!(bench.fetch().await.is_empty());
    bench.plain_misses("only");
}

/// The same while it is new.
async fn early_commit_within_the_lag(server: Server) {
    let mut bench = Bench::with(server, |_| {}).await;
    let mut late = bench.producer().await;
    late.insert("k", "only").await;
    bench.others(5).await;
    assert_eq!(bench.fetch().await.len(), 5);
    assert!(bench.fetch().await.is_empty());
    late.commit().await;
    assert_eq!(bench.fetch().await, ["only"]);
    bench.plain_misses("only");
}

/// A statement that has drawn all of its positions and stored one row, and waits for a lock before the next.
struct Stalled {
    gate: MySqlConnection,
    name: String,
    statement: tokio::task::JoinHandle<()>,
}

impl Stalled {
    async fn new(bench: &Bench) -> Self {
        let name = bench.place.database.clone();
        let mut gate = bench.place.connect().await;
        let closed = format!("DO GET_LOCK('{name}', 60)");
        gate.execute(AssertSqlSafe(closed)).await.unwrap();
        let mut producer = bench.producer().await;
        let text = format!(
            "{} ('t', 'a', 'one'), ('t', 'b', IF(GET_LOCK('{name}', 60), 'two', 'never')), ('t', 'b', 'three')",
            producer.insert
        );
        let statement = tokio::spawn(async move {
            producer.run(&text).await;
            producer.commit().await;
        });
        // Its first row is stored, and shows to who does not care for commits.
        let mut dirty = bench.place.connect().await;
        dirty
            .execute("SET SESSION TRANSACTION ISOLATION LEVEL READ UNCOMMITTED")
            .await
            .unwrap();
        let count = bench
            .place
            .named("SELECT COUNT(*) FROM {} WHERE payload IN ('one', 'two', 'three')");
        let stored = until(Duration::from_secs(30), async || {
            let stored: i64 = sqlx::query_scalar(AssertSqlSafe(count.clone()))
                .fetch_one(&mut dirty)
                .await
                .unwrap();
            (stored == 1).then_some(())
        });
        assert!(
            stored.await.is_some(),
            "the statement has not come to its second row"
        );
        Self {
            gate,
            name,
            statement,
        }
    }

    /// It goes on to its end.
    async fn commit(mut self) {
        let open = format!("DO RELEASE_LOCK('{}')", self.name);
        self.gate.execute(AssertSqlSafe(open)).await.unwrap();
        self.statement.await.unwrap();
    }
}

async fn statement_stalled_between_its_rows(server: Server) {
    let mut bench = Bench::with(server, |_| {}).await;
    let stalled = Stalled::new(&bench).await;
    bench.others(5).await;
    assert_eq!(bench.fetch().await.len(), 5);
    // Long enough for the reader to look past them, were it not for the lag.
    while bench.looks() < 4 {
        assert!(bench.fetch().await.is_empty());
        tokio::time::sleep(MOMENT / 20).await;
    }
    stalled.commit().await;
    assert_eq!(bench.fetch().await, ["one", "two", "three"]);
    bench.plain_misses("two");
}

/// The one premise is broken: what was not stored in time is passed over. So the lag is what the case above rests on, and
/// the sweep is there.
async fn statement_longer_than_the_lag_is_found_by_the_sweep(server: Server) {
    let mut bench = Bench::with(server, |config| {
        config.lag = MOMENT;
        config.sweep_interval = 16 * MOMENT;
    })
    .await;
    let begin = Instant::now();
    let stalled = Stalled::new(&bench).await;
    bench.others(5).await;
    assert_eq!(bench.fetch().await.len(), 5);
    bench.lag_passes().await;
    stalled.commit().await;
    let early = bench.fetch().await;
    // On a machine that stood still for so long the sweep came first.
    if begin.elapsed() < 16 * MOMENT {
        assert_eq!(early, ["one"]);
    }
    let found = until(Duration::from_secs(60), async || {
        let found = bench.fetch().await;
        (!found.is_empty()).then_some(found)
    });
    let found = if early.len() == 3 {
        early
    } else {
        found.await.unwrap()
    };
    assert!(
        found.ends_with(&["two".to_owned(), "three".to_owned()]),
        "{found:?}"
    );
}

async fn fresh_table(server: Server) {
    let mut bench = Bench::with(server, |config| config.lag = MOMENT).await;
    assert!(bench.fetch().await.is_empty());
    let mut late = bench.producer().await;
    late.insert("k", "first").await;
    assert!(bench.fetch().await.is_empty());
    bench.others(1).await;
    assert_eq!(bench.fetch().await, ["other"]);
    bench.lag_passes().await;
    late.commit().await;
    assert_eq!(bench.fetch().await, ["first"]);
    bench.plain_misses("first");
}

async fn savepoints_and_failed_statements(server: Server) {
    let mut bench = Bench::new(server).await;
    let mut late = bench.producer().await;
    // At REPEATABLE READ MySQL locks the gap that a rolled-back insert leaves, and whoever inserts waits for the end of
    // this transaction.
    late.run("ROLLBACK; SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED; START TRANSACTION")
        .await;
    late.insert("k", "before").await;
    late.run("SAVEPOINT one").await;
    late.insert("k", "rolled back").await;
    late.run("ROLLBACK TO SAVEPOINT one").await;
    late.insert("k", "after").await;
    let failed = format!("{} (NULL, 'k', 'failed')", late.insert);
    assert!(late.connection.execute(AssertSqlSafe(failed)).await.is_err());
    late.insert("k", "last").await;
    let mut never = bench.producer().await;
    never.insert("k", "never").await;
    bench.others(5).await;
    assert_eq!(bench.fetch().await.len(), 5);
    bench.lag_passes().await;
    never.run("ROLLBACK").await;
    assert!(bench.fetch().await.is_empty());
    late.commit().await;
    assert_eq!(bench.fetch().await, ["before", "after", "last"]);
    bench.plain_misses("after");
}

/// The rest of a batch is read in another snapshot, in which more of the same key has appeared below.
async fn pages_of_two_snapshots(server: Server) {
    let mut bench = Bench::new(server).await;
    let mut late = bench.producer().await;
    late.insert("k", "early").await;
    bench.others(30).await;
    let page = FetchRequest {
        max_rows: 10,
        ..bench.request(Vec::new())
    };
    let (records, more) = fetch(&mut bench.reader, &page).await;
    assert!(more && records.len() == 10);
    bench.records.extend(records);
    late.commit().await;
    let mut successor = bench.producer().await;
    successor.insert("k", "later").await;
    successor.commit().await;
    let rest = bench.read(Vec::new()).await;
    assert_eq!(named(&rest), ["early", "later"]);
    assert_eq!(bench.records.len(), 32);
}

/// Another relay had the shards meanwhile; this reader was never told.
async fn shards_lost_and_regained_between_two_fetches(server: Server) {
    let mut bench = Bench::new(server).await;
    bench.others(10).await;
    assert_eq!(bench.fetch().await.len(), 10);
    bench.lag_passes().await;
    let store = &bench.place.store;
    store
        .release(&bench.place.relay, &bench.owned, Membership::Stays)
        .await
        .unwrap();
    let before: Vec<Epoch> = bench.owned.iter().map(|owned| owned.epoch).collect();
    bench.owned = bench.place.lease().await;
    assert!(
        bench
            .owned
            .iter()
            .zip(before)
            .all(|(owned, before)| owned.epoch > before)
    );
    // Nothing was settled, and nothing of it is in flight any more.
    bench.records.clear();
    assert_eq!(bench.fetch().await.len(), 10);
}

/// Who owns few shards reads these alone, and what is pending in them alone.
async fn few_shards_beside_others(server: Server) {
    let mut bench = Bench::new(server).await;
    let mut late = bench.producer().await;
    for key in 0..40 {
        late.insert(&format!("k{key}"), "late").await;
    }
    let keys: Vec<_> = (0..40)
        .map(|key| message("t", Some(&format!("o{key}")), "early"))
        .collect();
    bench.place.enqueue(&keys).await;
    let all = bench.owned.clone();
    bench.owned.truncate(8);
    let own = |key: &str| {
        let id = outbox_core::MessageId::from_bytes([0; 16]);
        let shard = outbox_core::shard_of(Some(key.as_bytes()), id, 64);
        all[..8].iter().any(|owned| owned.shard == shard)
    };
    let own = |kind: char| (0..40).filter(|key| own(&format!("{kind}{key}"))).count();
    assert!(own('k') > 0 && own('o') > 0);
    assert_eq!(bench.fetch().await.len(), own('o'));
    bench.lag_passes().await;
    late.commit().await;
    assert_eq!(bench.fetch().await, vec!["late"; own('k')]);
    // With the others it begins anew.
    bench.owned.clone_from(&all);
    assert_eq!(bench.fetch().await.len(), 80 - own('o') - own('k'));
}

/// Somebody emptied the table in a way that makes positions begin anew.
async fn positions_gone_back_are_found_by_the_sweep(server: Server) {
    let mut bench = Bench::with(server, |config| {
        config.lag = MOMENT;
        config.sweep_interval = 4 * MOMENT;
    })
    .await;
    bench.others(10).await;
    bench.fetch().await;
    bench.lag_passes().await;
    bench.records.clear();
    bench.place.sql("TRUNCATE TABLE {}").await;
    bench.others(3).await;
    let found = until(Duration::from_secs(60), async || {
        let found = bench.fetch().await;
        (!found.is_empty()).then_some(found.len())
    });
    assert_eq!(found.await, Some(3));
    // From then on it reads as before.
    bench.others(2).await;
    assert_eq!(bench.fetch().await.len(), 2);
}

/// The settlement went through and the relay was not told: it stays in flight, and is settled again.
async fn settlement_of_unknown_outcome(server: Server) {
    let mut bench = Bench::new(server).await;
    let mut late = bench.producer().await;
    late.insert("k", "late").await;
    bench.others(4).await;
    bench.fetch().await;
    bench.lag_passes().await;
    let settlement = bench.place.settlement(delivered(&bench.owned, &bench.records));
    bench.place.store.settle(&settlement).await.unwrap();
    late.commit().await;
    assert_eq!(bench.fetch().await, ["late"]);
    bench.place.store.settle(&settlement).await.unwrap();
    assert!(bench.fetch().await.is_empty());
    assert_eq!(bench.place.number("SELECT COUNT(*) FROM {}").await, 1);
}

/// A blocked key costs the others nothing, whatever lies behind it, and letting it go starves nobody.
async fn key_blocked_before_a_large_backlog(server: Server) {
    const BEHIND: usize = 100_000;
    let mut bench = Bench::with(server, |config| config.lag = MOMENT).await;
    // Longer than the test takes on a machine that is busy.
    bench.place.sql("UPDATE {_lease} SET until = '2100-01-01'").await;
    bench
        .place
        .enqueue(&[message("t", Some("blocked"), "head")])
        .await;
    assert_eq!(bench.read(Vec::new()).await, ["head"]);
    let head = bench.records.pop().unwrap();
    let key = head.message.order_key().unwrap();
    bench.held.keys.insert((head.shard, key.clone()));
    for portion in 0..BEHIND / 10_000 {
        let rows: Vec<String> = (1..=10_000)
            .map(|n| format!("('t','blocked','{}')", portion * 10_000 + n))
            .collect();
        let text = format!(
            "INSERT INTO {{}} (topic, `key`, payload) VALUES {}",
            rows.join(",")
        );
        bench.place.sql(&text).await;
    }

    // While it is blocked. What is new is passed over each time; what is older, never again.
    assert!(bench.read(Vec::new()).await.is_empty());
    bench.lag_passes().await;
    let examined = rows_read(&bench).await;
    for _ in 0..21 {
        bench.others(7).await;
        assert_eq!(bench.read(Vec::new()).await.len(), 7);
        bench.deliver().await;
    }
    let examined = rows_read(&bench).await - examined;
    let bound = i64::try_from(BEHIND / 2).unwrap();
    assert!(examined < bound, "{examined} rows were read for 147 messages");
    assert!(bench.size() < 30_000, "the reader keeps {} bytes", bench.size());

    // And when it is let go.
    let mut reread = vec![Reread {
        shard: head.shard,
        scope: RereadScope::Key(key),
        from: head.position,
    }];
    let (mut seen, mut missing) = (Vec::new(), 0);
    for _ in 0..30 {
        bench.others(7).await;
        missing += 7;
        let asked = FetchRequest {
            reread: std::mem::take(&mut reread),
            ..request(&bench.owned, 1_000)
        };
        let (records, more) = fetch(&mut bench.reader, &asked).await;
        assert!(more);
        let all = payloads(&records);
        let blocked: Vec<&str> = named(&all);
        missing -= all.len() - blocked.len();
        seen.extend(blocked.iter().map(|payload| (*payload).to_owned()));
        bench.place.deliver(&bench.owned, &records).await;
        assert!(missing <= 14, "{missing} of the others wait");
    }
    assert!(seen.len() > 5_000, "only {} of the key", seen.len());
    assert_eq!(seen[0], "head");
    let numbers: Vec<usize> = seen[1..].iter().map(|payload| payload.parse().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>());
    assert!(bench.size() < 30_000, "the reader keeps {} bytes", bench.size());
}

/// How many rows of the outbox the server has read so far, for whomever: its own count, not a matter of time.
async fn rows_read(bench: &Bench) -> i64 {
    let text = format!(
        "SELECT CAST(COUNT_READ AS SIGNED) FROM performance_schema.table_io_waits_summary_by_table \
         WHERE OBJECT_SCHEMA = '{}' AND OBJECT_NAME = 'outbox'",
        bench.place.database
    );
    bench.place.number(&text).await
}

/// The relay drops what it had read behind a head that fails, and asks for it again with the head.
async fn rows_read_behind_a_key_that_blocks(server: Server) {
    let mut bench = Bench::new(server).await;
    let mut late = bench.producer().await;
    late.insert("x", "before").await;
    let keyed: Vec<_> = (1..=5)
        .map(|n| message("t", Some("k"), &format!("k{n}")))
        .collect();
    bench.place.enqueue(&keyed).await;
    assert_eq!(bench.fetch().await, ["k1", "k2", "k3", "k4", "k5"]);
    bench.lag_passes().await;
    // Its head fails; all of it is dropped.
    let head = bench.records[0].clone();
    let key = head.message.order_key().unwrap();
    bench.records.clear();
    bench.held.keys.insert((head.shard, key.clone()));
    assert!(bench.fetch().await.is_empty());
    bench.place.enqueue(&[message("t", Some("k"), "k6")]).await;
    late.insert("k", "k7").await;
    late.commit().await;
    assert_eq!(bench.fetch().await, ["before"]);
    bench.lag_passes().await;
    bench.held = Held::default();
    let reread = Reread {
        shard: head.shard,
        scope: RereadScope::Key(key),
        from: head.position,
    };
    let rest = bench.read(vec![reread]).await;
    assert_eq!(rest, ["k1", "k2", "k3", "k4", "k5", "k6", "k7"]);
}

/// It commits while its key is held, long after its position was passed.
async fn open_row_of_a_key_that_is_held_meanwhile(server: Server) {
    let mut bench = Bench::new(server).await;
    let mut late = bench.producer().await;
    late.insert("k", "open").await;
    bench.place.enqueue(&[message("t", Some("k"), "head")]).await;
    assert_eq!(bench.fetch().await, ["head"]);
    bench.lag_passes().await;
    let head = bench.records.pop().unwrap();
    let key = head.message.order_key().unwrap();
    bench.held.keys.insert((head.shard, key.clone()));
    assert!(bench.fetch().await.is_empty());
    late.commit().await;
    assert!(bench.fetch().await.is_empty());
    bench.others(1).await;
    assert_eq!(bench.fetch().await, ["other"]);
    bench.lag_passes().await;
    bench.held = Held::default();
    let reread = Reread {
        shard: head.shard,
        scope: RereadScope::Key(key),
        from: head.position,
    };
    assert_eq!(bench.read(vec![reread]).await, ["open", "head"]);
}

/// A long transaction with many rows costs the others nothing, and its rows come when it ends.
async fn long_transaction_of_thousands_of_rows(server: Server) {
    let mut bench = Bench::new(server).await;
    let mut long = bench.producer().await;
    for portion in 0..5 {
        let rows: Vec<String> = (0..1_000)
            .map(|n| format!("('t','long-{}','{}')", n % 10, portion * 1_000 + n))
            .collect();
        let text = format!("{} {}", long.insert, rows.join(","));
        long.run(&text).await;
    }
    for round in 0..100 {
        bench
            .place
            .enqueue(&[message("t", Some("k"), "other"), message("t", None, "other")])
            .await;
        assert_eq!(bench.read(Vec::new()).await.len(), 2, "in round {round}");
        bench.deliver().await;
    }
    bench.others(1).await;
    bench.fetch().await;
    bench.lag_passes().await;
    bench.deliver().await;
    long.insert("long-0", "last").await;
    long.commit().await;
    let all = bench.fetch().await;
    assert_eq!(all.len(), 5_001);
    assert_eq!(all[5_000], "last");
    let of_key = all[..5_000].iter().map(|n| n.parse::<usize>().unwrap());
    assert!(of_key.filter(|n| n % 10 == 3).is_sorted());
    bench.deliver().await;
    bench.fetch().await;
    assert!(bench.size() < 60_000, "the reader keeps {} bytes", bench.size());
}

/// Producers in every mood beside a reader whose settlements come when they come.
async fn stress_loses_reorders_and_repeats_nothing(server: Server) {
    let wanted: usize =
        std::env::var("OUTBOX_STRESS_MESSAGES").map_or(10_000, |messages| messages.parse().unwrap());
    let place = Arc::new(Place::with(server, |config| config.lag = 2 * MOMENT).await);
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    let producers: Vec<_> = (0..8)
        .map(|number| tokio::spawn(produce(Arc::clone(&place), number, wanted / 8)))
        .collect();

    let mut flying: BTreeMap<Position, Record> = BTreeMap::new();
    let mut got: Vec<String> = Vec::new();
    let mut committed: Option<Vec<String>> = None;
    let mut producers = Some(tokio::spawn(async {
        let mut all = Vec::new();
        for producer in producers {
            all.extend(producer.await.unwrap());
        }
        all
    }));
    let (settled, mut settlements) = tokio::sync::mpsc::unbounded_channel::<Vec<Position>>();
    let mut progress = Instant::now();
    loop {
        if let Some(all) = producers.take_if(|all| all.is_finished()) {
            committed = Some(all.await.unwrap());
        }
        while let Ok(positions) = settlements.try_recv() {
            for position in positions {
                flying.remove(&position);
            }
        }
        let records: Vec<Record> = flying.values().cloned().collect();
        let asked = FetchRequest {
            in_flight: in_flight(&records),
            ..request(&owned, 500)
        };
        let (records, _) = fetch(&mut reader, &asked).await;
        if !records.is_empty() {
            progress = Instant::now();
            got.extend(payloads(&records));
            flying.extend(records.iter().map(|record| (record.position, record.clone())));
            let (place, owned, settled) = (Arc::clone(&place), owned.clone(), settled.clone());
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(fastrand::u64(..50))).await;
                place.deliver(&owned, &records).await;
                let _ = settled.send(records.iter().map(|record| record.position).collect());
            });
        } else if committed.as_ref().is_some_and(|all| all.len() <= got.len())
            || (committed.is_some() && progress.elapsed() > Duration::from_secs(5))
        {
            break;
        }
    }

    let committed: BTreeSet<String> = committed.unwrap().into_iter().collect();
    let distinct: BTreeSet<String> = got.iter().cloned().collect();
    assert_eq!(got.len(), distinct.len(), "duplicates");
    let lost: Vec<&String> = committed.difference(&distinct).collect();
    assert!(lost.is_empty(), "{} are lost: {lost:?}", lost.len());
    assert_eq!(distinct.len(), committed.len(), "what was rolled back came");
    let mut latest: BTreeMap<&str, i64> = BTreeMap::new();
    for payload in &got {
        let mut parts = payload.split('/');
        let (how, key, number) = (
            parts.next().unwrap(),
            parts.next().unwrap(),
            parts.next().unwrap(),
        );
        if how == "locked" {
            let number = number.parse().unwrap();
            let before = latest.insert(key, number).unwrap_or_default();
            assert!(before < number, "{payload} comes after {before}");
        }
    }
}

/// Commits about `count` messages; says which.
async fn produce(place: Arc<Place>, number: usize, count: usize) -> Vec<String> {
    // Most lock their key, as producers do that care for order.
    let locks = number < 6;
    let counters = place.named("{_sequence}");
    let mut connection = place.connect().await;
    let mut committed = Vec::new();
    while committed.len() < count {
        let key = format!("key-{}", fastrand::usize(..200));
        let rows = fastrand::usize(1..=8);
        let rolls_back = fastrand::usize(..20) == 0;
        let pause = match fastrand::usize(..100) {
            0 => fastrand::u64(..500),
            1..=20 => fastrand::u64(..5),
            _ => 0,
        };
        connection.execute("START TRANSACTION").await.unwrap();
        let mut last = fastrand::i64(1_000_000_000..);
        if locks {
            // The counter is the aggregate: its row is locked until the transaction ends.
            let count = format!(
                "INSERT INTO {counters} (topic, `key`, last) VALUES ('t', '{key}', {rows}) \
                 ON DUPLICATE KEY UPDATE last = last + {rows}"
            );
            connection.execute(AssertSqlSafe(count)).await.unwrap();
            let query = format!("SELECT last FROM {counters} WHERE topic = 't' AND `key` = '{key}'");
            last = sqlx::query_scalar(AssertSqlSafe(query))
                .fetch_one(&mut connection)
                .await
                .unwrap();
        }
        let how = if locks { "locked" } else { "free" };
        let written: Vec<String> = (0..i64::try_from(rows).unwrap())
            .rev()
            .map(|row| format!("{how}/{key}/{}", last - row))
            .collect();
        // One statement for all of them, or one each.
        let portion = if fastrand::bool() { rows } else { 1 };
        for (index, portion) in written.chunks(portion).enumerate() {
            if index > 0 && pause > 0 {
                tokio::time::sleep(Duration::from_millis(pause / 2)).await;
            }
            let values: Vec<String> = portion
                .iter()
                .map(|payload| format!("('t', '{key}', '{payload}')"))
                .collect();
            let text = format!(
                "INSERT INTO {{}} (topic, `key`, payload) VALUES {}",
                values.join(",")
            );
            connection
                .execute(AssertSqlSafe(place.named(&text)))
                .await
                .unwrap();
        }
        if pause > 0 {
            tokio::time::sleep(Duration::from_millis(pause / 2)).await;
        }
        if rolls_back {
            connection.execute("ROLLBACK").await.unwrap();
        } else {
            connection.execute("COMMIT").await.unwrap();
            committed.extend(written);
        }
    }
    committed
}
