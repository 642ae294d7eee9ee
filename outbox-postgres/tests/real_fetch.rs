//! What breaks a plain position cursor, each by hand on a real server: transactions that commit late with low
//! positions, in every way in which they can.
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

use common::{Place, delivered, fetch, in_flight, message, request, until};
use outbox_core::{
    Epoch, FetchRequest, Fetched, Held, Membership, OutboxStore, OwnedShard, Position, Reader, Record,
    Reread, RereadScope,
};
use outbox_postgres::sqlx::postgres::PgConnection;
use outbox_postgres::sqlx::{self, AssertSqlSafe, Executor};

/// The reader under test, and a plain one; nothing is ever settled.
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
    async fn new() -> Self {
        Self::of(Place::new().await).await
    }

    async fn of(place: Place) -> Self {
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
        let rows: Vec<(i64, String)> = sqlx::query_as(AssertSqlSafe(
            self.place
                .named("SELECT id, convert_from(payload, 'UTF8') FROM {} WHERE id > $1 ORDER BY id"),
        ))
        .bind(self.last)
        .fetch_all(&self.place.pool)
        .await
        .unwrap();
        for (position, payload) in rows {
            self.last = position;
            self.plain.push(payload);
        }
        new
    }

    fn plain_misses(&self, payload: &str) {
        assert!(
            !self.plain.iter().any(|plain| plain == payload),
            "a plain cursor finds {payload} too: the case proves nothing"
        );
    }

    /// A producer with a transaction of its own.
    async fn producer(&self) -> Producer {
        let mut connection = self.place.connect().await;
        connection.execute("BEGIN").await.unwrap();
        Producer {
            connection,
            insert: self.place.named("INSERT INTO {} (topic, key, payload) VALUES"),
        }
    }

    /// Others go on, each in a transaction of its own.
    async fn others(&self, count: usize) {
        for index in 0..count {
            self.place
                .sql(&format!(
                    "INSERT INTO {{}} (topic, key, payload) VALUES ('t', 'other-{}', 'other')",
                    index % 7
                ))
                .await;
        }
    }
}

struct Producer {
    connection: PgConnection,
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

#[tokio::test]
async fn late_commit_with_successor() {
    let mut bench = Bench::new().await;
    let mut late = bench.producer().await;
    late.insert("k", "first").await;
    bench.others(5).await;
    assert_eq!(bench.fetch().await.len(), 5);
    late.commit().await;
    let mut successor = bench.producer().await;
    successor.insert("k", "second").await;
    successor.commit().await;
    assert_eq!(bench.fetch().await, ["first", "second"]);
    bench.plain_misses("first");
}

#[tokio::test]
async fn late_commit_without_successor() {
    let mut bench = Bench::new().await;
    let mut late = bench.producer().await;
    late.insert("k", "only").await;
    bench.others(5).await;
    bench.fetch().await;
    assert!(bench.fetch().await.is_empty());
    late.commit().await;
    assert_eq!(bench.fetch().await, ["only"]);
    assert!(bench.fetch().await.is_empty());
    bench.plain_misses("only");
}

/// The snapshot's `xmax` is the last *completed* number and one: a transaction above it may have drawn already.
#[tokio::test]
async fn low_position_above_the_snapshot() {
    let mut bench = Bench::new().await;
    let (mut a, mut b) = (bench.producer().await, bench.producer().await);
    a.run("SELECT pg_current_xact_id()").await;
    b.insert("b", "above").await;
    a.insert("a", "below").await;
    a.commit().await;
    assert_eq!(bench.fetch().await, ["below"]);
    b.commit().await;
    assert_eq!(bench.fetch().await, ["above"]);
    bench.plain_misses("above");
}

/// The server draws a position for each row as it arrives, long before the client is done.
#[tokio::test]
async fn copy_with_a_stalled_client() {
    let mut bench = Bench::new().await;
    let mut connection = bench.place.connect().await;
    let text = bench.place.named("COPY {} (topic, key, payload) FROM STDIN");
    let mut copy = connection.copy_in_raw(&text).await.unwrap();
    // Enough for the server not to wait for more before it looks at the first row.
    let rows = format!("t\tk\tcopied\nt\tk\t{}\n", "x".repeat(100_000));
    copy.send(rows.as_bytes()).await.unwrap();
    let drawn = until(Duration::from_secs(20), async || {
        let query = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {_id_seq}";
        (bench.place.number(query).await > 0).then_some(())
    });
    assert!(drawn.await.is_some(), "the server has not drawn a position");
    bench.others(5).await;
    assert_eq!(bench.fetch().await.len(), 5);
    bench.fetch().await;
    copy.finish().await.unwrap();
    let copied = bench.fetch().await;
    assert_eq!((copied.len(), copied[0].as_str()), (2, "copied"));
    bench.plain_misses("copied");
}

/// A sequence that was never used says 1, as one does whose first number was drawn.
#[tokio::test]
async fn fresh_sequence() {
    let mut bench = Bench::new().await;
    assert!(bench.fetch().await.is_empty());
    let mut first = bench.producer().await;
    first.insert("k", "first").await;
    bench.others(1).await;
    // The transaction is known to this snapshot, and to none before.
    assert_eq!(bench.fetch().await, ["other"]);
    first.commit().await;
    assert_eq!(bench.fetch().await, ["first"]);
    bench.plain_misses("first");
}

#[tokio::test]
async fn savepoints_and_failed_statements() {
    let mut bench = Bench::new().await;
    let mut late = bench.producer().await;
    late.run("SAVEPOINT one").await;
    late.insert("k", "kept").await;
    late.run("SAVEPOINT two").await;
    late.insert("k", "undone").await;
    late.run("ROLLBACK TO SAVEPOINT two").await;
    bench.others(3).await;
    bench.fetch().await;
    late.run("RELEASE SAVEPOINT one").await;
    let block = format!(
        "DO $$ BEGIN {insert} ('t', 'k', 'failed'); PERFORM 1 / 0; \
         EXCEPTION WHEN division_by_zero THEN {insert} ('t', 'k', 'handled'); END $$",
        insert = late.insert
    );
    late.run(&block).await;
    bench.others(3).await;
    bench.fetch().await;
    late.insert("k", "last").await;
    late.commit().await;
    assert_eq!(bench.fetch().await, ["kept", "handled", "last"]);
    bench.plain_misses("kept");
}

#[tokio::test]
async fn prepared_transaction() {
    let mut bench = Bench::new().await;
    let gid = common::unique("prepared");
    let mut late = bench.producer().await;
    late.insert("k", "prepared").await;
    late.run(&format!("PREPARE TRANSACTION '{gid}'")).await;
    drop(late);
    bench.others(3).await;
    bench.fetch().await;
    assert!(bench.fetch().await.is_empty());
    bench.place.sql(&format!("COMMIT PREPARED '{gid}'")).await;
    assert_eq!(bench.fetch().await, ["prepared"]);
    bench.plain_misses("prepared");
}

/// The rest of a batch is read in another snapshot, in which more of the same key has appeared below.
#[tokio::test]
async fn pages_of_two_snapshots() {
    let mut bench = Bench::new().await;
    let mut late = bench.producer().await;
    late.insert("k", "early").await;
    bench.others(30).await;
    let page = FetchRequest {
        max_rows: 10,
        ..bench.request(Vec::new())
    };
    let (records, more) = fetch(&mut bench.reader, &page).await;
    assert!(more && !records.is_empty());
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
#[tokio::test]
async fn shards_lost_and_regained_between_two_fetches() {
    let mut bench = Bench::new().await;
    bench.others(10).await;
    assert_eq!(bench.fetch().await.len(), 10);
    assert!(bench.fetch().await.is_empty());
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

#[tokio::test]
async fn sequence_gone_back_is_a_reset() {
    let mut bench = Bench::new().await;
    bench.others(10).await;
    bench.fetch().await;
    bench.place.sql("SELECT setval('{_id_seq}', 3)").await;
    let request = bench.request(Vec::new());
    match bench.reader.fetch(&request).await.unwrap() {
        Fetched::Reset { reason } => assert!(reason.contains("10 to 3"), "{reason}"),
        Fetched::Batch { .. } => panic!("the reader has not noticed"),
    }
    // A new one begins anew.
    bench.reader = bench.place.store.reader().await.unwrap();
    bench.records.clear();
    assert_eq!(bench.fetch().await.len(), 10);
}

/// The settlement went through and the relay was not told: it stays in flight, and is settled again.
#[tokio::test]
async fn settlement_of_unknown_outcome() {
    let mut bench = Bench::new().await;
    let mut late = bench.producer().await;
    late.insert("k", "late").await;
    bench.others(4).await;
    bench.fetch().await;
    let settlement = bench.place.settlement(delivered(&bench.owned, &bench.records));
    bench.place.store.settle(&settlement).await.unwrap();
    late.commit().await;
    assert_eq!(bench.fetch().await, ["late"]);
    bench.place.store.settle(&settlement).await.unwrap();
    assert!(bench.fetch().await.is_empty());
    assert_eq!(bench.place.number("SELECT count(*) FROM {}").await, 1);
}

/// A blocked key costs the others nothing, whatever lies behind it, and letting it go starves nobody.
#[tokio::test]
async fn key_blocked_before_a_large_backlog() {
    const BEHIND: usize = 300_000;
    let mut bench = Bench::new().await;
    // Longer than the test takes on a machine that is busy.
    bench.place.sql("UPDATE {_lease} SET until = 'infinity'").await;
    bench
        .place
        .enqueue(&[message("t", Some("blocked"), "head")])
        .await;
    assert_eq!(bench.read(Vec::new()).await, ["head"]);
    let head = bench.records.pop().unwrap();
    let key = head.message.order_key().unwrap();
    bench.held.keys.insert((head.shard, key.clone()));
    bench
        .place
        .sql(&format!(
            "INSERT INTO {{}} (topic, key, payload) SELECT 't', 'blocked', n::text::bytea FROM generate_series(1, {BEHIND}) n"
        ))
        .await;

    // While it is blocked. The first look passes over all of it once, and so does one after a transaction that was
    // open then; what comes later is read as if it were not there.
    assert!(bench.read(Vec::new()).await.is_empty());
    let mut times = Vec::new();
    for _ in 0..21 {
        bench.others(7).await;
        let begin = Instant::now();
        assert_eq!(bench.read(Vec::new()).await.len(), 7);
        times.push(begin.elapsed());
        bench.deliver().await;
    }
    times.sort_unstable();
    assert!(times[10] < Duration::from_millis(100), "{times:?}");
    let size = format!("{:?}", bench.reader).len();
    assert!(size < 30_000, "the reader keeps {size} bytes");

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
    let size = format!("{:?}", bench.reader).len();
    assert!(size < 30_000, "the reader keeps {size} bytes");
}

/// The relay drops what it had read behind a head that fails, and asks for it again with the head.
#[tokio::test]
async fn rows_read_behind_a_key_that_blocks() {
    let mut bench = Bench::new().await;
    let mut late = bench.producer().await;
    late.insert("x", "before").await;
    let keyed: Vec<_> = (1..=5)
        .map(|n| message("t", Some("k"), &format!("k{n}")))
        .collect();
    bench.place.enqueue(&keyed).await;
    assert_eq!(bench.fetch().await, ["k1", "k2", "k3", "k4", "k5"]);
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
    bench.held = Held::default();
    let reread = Reread {
        shard: head.shard,
        scope: RereadScope::Key(key),
        from: head.position,
    };
    let rest = bench.read(vec![reread]).await;
    assert_eq!(rest, ["k1", "k2", "k3", "k4", "k5", "k6", "k7"]);
}

/// A long transaction that has written costs the others nothing, and its rows come when it ends.
#[tokio::test]
async fn long_writing_transaction_beside_thousands() {
    let mut bench = Bench::new().await;
    let mut long = bench.producer().await;
    long.insert("long", "long").await;
    for round in 0..300 {
        bench
            .place
            .sql("INSERT INTO {} (topic, key, payload) SELECT 't', ('k' || n)::bytea, 'other' FROM generate_series(1, 10) n")
            .await;
        assert_eq!(bench.read(Vec::new()).await.len(), 10, "in round {round}");
        bench.deliver().await;
    }
    let size = format!("{:?}", bench.reader).len();
    assert!(size < 60_000, "the reader keeps {size} bytes");
    long.insert("long", "longer").await;
    long.commit().await;
    assert_eq!(bench.fetch().await, ["long", "longer"]);
}

/// Producers in every mood beside a reader whose settlements come when they come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stress_loses_reorders_and_repeats_nothing() {
    let wanted: usize =
        std::env::var("OUTBOX_STRESS_MESSAGES").map_or(20_000, |messages| messages.parse().unwrap());
    let place = Arc::new(Place::new().await);
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
        let mut text = "BEGIN;".to_owned();
        let rows = fastrand::usize(1..=8);
        let rolls_back = fastrand::usize(..20) == 0;
        let pause = match fastrand::usize(..100) {
            0 => fastrand::u64(..500),
            1..=20 => fastrand::u64(..5),
            _ => 0,
        };
        if locks {
            // The counter is the aggregate: its row is locked until the transaction ends.
            text.push_str(&format!(
                "INSERT INTO {counters} AS s (topic, key, last) VALUES ('t', '{key}', {rows}) \
                 ON CONFLICT (topic, key) DO UPDATE SET last = s.last + excluded.last;"
            ));
        }
        connection.execute(AssertSqlSafe(text)).await.unwrap();
        let last: i64 = if locks {
            let query = format!("SELECT last FROM {counters} WHERE topic = 't' AND key = '{key}'");
            sqlx::query_scalar(AssertSqlSafe(query))
                .fetch_one(&mut connection)
                .await
                .unwrap()
        } else {
            fastrand::i64(1_000_000_000..)
        };
        let mut written = Vec::new();
        for row in (0..i64::try_from(rows).unwrap()).rev() {
            let how = if locks { "locked" } else { "free" };
            let payload = format!("{how}/{key}/{}", last - row);
            connection
                .execute(AssertSqlSafe(place.named(&format!(
                    "INSERT INTO {{}} (topic, key, payload) VALUES ('t', '{key}', '{payload}')"
                ))))
                .await
                .unwrap();
            if row > 0 && pause > 0 {
                tokio::time::sleep(Duration::from_millis(pause / 2)).await;
            }
            written.push(payload);
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
