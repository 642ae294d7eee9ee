//! How fast an outbox in a file is drained, and what held messages cost: `cargo bench -p outbox-sqlite`.
//!
//! Prints a table; figures of one machine compare with each other, not with those of another.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a program for developers"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_core::{
    FetchRequest, Fetched, Held, LeaseRequest, Message, OrderKey, OutboxStore, OwnedShard, Position, Reader,
    Record, RelayId, Reread, RereadScope, Settlement, Shard, ShardSettlement,
};
use outbox_sqlite::rusqlite::{Connection, TransactionBehavior, params};
use outbox_sqlite::{FetchMode, SqliteConfig, SqliteOutbox, SqliteStore, Synchronous, migrate};

const ROWS: usize = 100_000;

#[tokio::main]
async fn main() {
    println!("{ROWS} messages of 1 KiB, fetch and settle in turn");
    println!("| fetch | synchronous | archive | batch | rows/s | fetch ms | settle ms |");
    println!("|---|---|---|---|---|---|---|");
    for (fetch, synchronous, archive, batch) in [
        (FetchMode::Rescan, Synchronous::Normal, false, 500),
        (FetchMode::Rescan, Synchronous::Normal, false, 1000),
        (FetchMode::Cursor, Synchronous::Normal, false, 500),
        (FetchMode::Cursor, Synchronous::Normal, false, 1000),
        (FetchMode::Cursor, Synchronous::Full, false, 500),
        (FetchMode::Cursor, Synchronous::Full, false, 1000),
        (FetchMode::Cursor, Synchronous::Normal, true, 1000),
    ] {
        drain(fetch, synchronous, archive, batch).await;
    }
    beside_a_producer().await;
    behind_a_held_key().await;
    deletes();
}

struct Place {
    config: SqliteConfig,
    store: SqliteStore,
    relay: RelayId,
    _dir: tempfile::TempDir,
}

impl Place {
    fn new(adjust: impl FnOnce(&mut SqliteConfig)) -> Self {
        let dir = tempfile::tempdir_in(std::env::current_dir().unwrap()).unwrap();
        let mut config = SqliteConfig::new(dir.path().join("app.db"));
        adjust(&mut config);
        migrate(&config).unwrap();
        Self {
            store: SqliteStore::open(config.clone()).unwrap(),
            config,
            relay: RelayId::new("bench"),
            _dir: dir,
        }
    }

    fn fill(&self, key: impl Fn(usize) -> String, count: usize) {
        let outbox = SqliteOutbox::new(&self.config).unwrap();
        let mut connection = Connection::open(&self.config.path).unwrap();
        for chunk in 0..count.div_ceil(1000) {
            let tx = connection.transaction().unwrap();
            for number in 0..1000.min(count - chunk * 1000) {
                let message = Message::builder("orders")
                    .key(key(number))
                    .payload(vec![b'x'; 1024])
                    .build()
                    .unwrap();
                outbox.enqueue(&tx, &message).unwrap();
            }
            tx.commit().unwrap();
        }
    }

    async fn lease(&self) -> OwnedShard {
        let request = LeaseRequest {
            relay: self.relay.clone(),
            want: 1,
            ttl: Duration::from_secs(600),
        };
        self.store.lease(&request).await.unwrap().held[0]
    }

    async fn settle(&self, owned: OwnedShard, records: &[Record]) {
        let mut part = ShardSettlement::new(owned.shard, owned.epoch);
        part.delivered = records.iter().map(Record::reference).collect();
        let settlement = Settlement {
            relay: self.relay.clone(),
            shards: vec![part],
        };
        self.store.settle(&settlement).await.unwrap();
    }
}

fn request(owned: OwnedShard, max_rows: usize, held: &Arc<Held>) -> FetchRequest {
    FetchRequest {
        shards: vec![owned],
        held: Arc::clone(held),
        max_rows,
        max_bytes: 64 << 20,
        ..FetchRequest::default()
    }
}

async fn fetch(reader: &mut Box<dyn Reader>, request: &FetchRequest) -> Vec<Record> {
    match reader.fetch(request).await.unwrap() {
        Fetched::Batch { records, .. } => records,
        Fetched::Reset { reason } => panic!("{reason}"),
    }
}

async fn drain(mode: FetchMode, synchronous: Synchronous, archive: bool, batch: usize) {
    let place = Place::new(|config| {
        config.fetch = mode;
        config.synchronous = synchronous;
        config.archive = archive;
    });
    place.fill(|number| format!("key-{}", number % 100), ROWS);
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    let asked = request(owned, batch, &Arc::default());
    let (mut fetching, mut settling) = (Duration::ZERO, Duration::ZERO);
    let (mut rounds, start) = (0, Instant::now());
    loop {
        let before = Instant::now();
        let records = fetch(&mut reader, &asked).await;
        fetching += before.elapsed();
        if records.is_empty() {
            break;
        }
        let before = Instant::now();
        place.settle(owned, &records).await;
        settling += before.elapsed();
        rounds += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "| {mode:?} | {synchronous:?} | {archive} | {batch} | {:.0} | {:.2} | {:.2} |",
        100_000.0 / seconds,
        fetching.as_secs_f64() * 1e3 / f64::from(rounds),
        settling.as_secs_f64() * 1e3 / f64::from(rounds),
    );
}

/// What a producer that commits durably every 2 ms notices of a relay at full speed.
async fn beside_a_producer() {
    println!("\na producer's transaction (one row, one message, FULL)");
    for batch in [0, 200, 500, 1000] {
        let place = Place::new(|_| {});
        place.fill(|number| number.to_string(), 60_000);
        let config = place.config.clone();
        let producer = std::thread::spawn(move || {
            let outbox = SqliteOutbox::new(&config).unwrap();
            let mut connection = Connection::open(&config.path).unwrap();
            connection.execute_batch("CREATE TABLE business (a)").unwrap();
            let mut latencies: Vec<Duration> = (0..400)
                .map(|number| {
                    std::thread::sleep(Duration::from_millis(2));
                    let start = Instant::now();
                    let tx = connection
                        .transaction_with_behavior(TransactionBehavior::Immediate)
                        .unwrap();
                    tx.execute("INSERT INTO business VALUES (?1)", [number]).unwrap();
                    let message = Message::builder("orders").payload("p").build().unwrap();
                    outbox.enqueue(&tx, &message).unwrap();
                    tx.commit().unwrap();
                    start.elapsed()
                })
                .collect();
            latencies.sort();
            latencies
        });
        let owned = place.lease().await;
        let mut reader = place.store.reader().await.unwrap();
        let asked = request(owned, batch.max(1), &Arc::default());
        while batch > 0 && !producer.is_finished() {
            let records = fetch(&mut reader, &asked).await;
            place.settle(owned, &records).await;
        }
        let latencies = producer.join().unwrap();
        println!(
            "relay's batch {batch}: p50 {:?}, p99 {:?}, worst {:?}",
            latencies[200], latencies[396], latencies[399]
        );
    }
}

/// 300,000 messages of one held key, and one other message at a time.
async fn behind_a_held_key() {
    const TAIL: usize = 300_000;
    println!("\n{TAIL} messages of a held key");
    for mode in [FetchMode::Rescan, FetchMode::Cursor] {
        let place = Place::new(|config| config.fetch = mode);
        place.fill(|_| "hot".to_owned(), TAIL);
        let owned = place.lease().await;
        let mut reader = place.store.reader().await.unwrap();
        let key = OrderKey {
            topic: "orders".into(),
            key: "hot".into(),
        };
        let mut held = Held::default();
        held.keys.insert((Shard(0), key.clone()));
        let asked = request(owned, 1000, &Arc::new(held));
        let start = Instant::now();
        assert!(fetch(&mut reader, &asked).await.is_empty());
        println!("{mode:?}: first fetch, past all of them: {:?}", start.elapsed());
        let mut worst = Duration::ZERO;
        for _ in 0..10 {
            place.fill(|_| "other".to_owned(), 1);
            let start = Instant::now();
            let records = fetch(&mut reader, &asked).await;
            worst = worst.max(start.elapsed());
            assert_eq!(records.len(), 1);
            place.settle(owned, &records).await;
        }
        println!("{mode:?}: another key's message, worst of 10 fetches: {worst:?}");

        let mut asked = request(owned, 1000, &Arc::default());
        asked.reread = vec![Reread {
            shard: Shard(0),
            scope: RereadScope::Key(key),
            from: Position(1),
        }];
        let (mut worst, mut count, start) = (Duration::ZERO, 0, Instant::now());
        loop {
            let before = Instant::now();
            let records = fetch(&mut reader, &asked).await;
            worst = worst.max(before.elapsed());
            asked.reread.clear();
            if records.is_empty() {
                break;
            }
            count += records.len();
            place.settle(owned, &records).await;
        }
        println!(
            "{mode:?}: released, all {count} in {:?}, worst fetch {worst:?}",
            start.elapsed()
        );
    }
}

/// A prepared statement in a loop against one statement over a list.
fn deletes() {
    println!("\ndeleting 1000 rows of 1 KiB, by position and id");
    for joined in [false, true, false, true] {
        let place = Place::new(|_| {});
        place.fill(|number| number.to_string(), 20_000);
        let mut connection = Connection::open(&place.config.path).unwrap();
        connection.pragma_update(None, "synchronous", "NORMAL").unwrap();
        let names: Vec<(i64, Vec<u8>)> = connection
            .prepare("SELECT id, message_id FROM outbox ORDER BY id")
            .unwrap()
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        let start = Instant::now();
        for chunk in names.chunks(1000) {
            let tx = connection.transaction().unwrap();
            if joined {
                let list: Vec<_> = chunk.iter().map(|(position, id)| (position, hex(id))).collect();
                let deleted = tx
                    .prepare_cached(
                        "DELETE FROM outbox WHERE (id, hex(message_id)) IN \
                         (SELECT value ->> 0, value ->> 1 FROM json_each(?1))",
                    )
                    .unwrap()
                    .execute([serde_json::to_string(&list).unwrap()])
                    .unwrap();
                assert_eq!(deleted, chunk.len());
            } else {
                let mut delete = tx
                    .prepare_cached("DELETE FROM outbox WHERE id = ?1 AND message_id = ?2")
                    .unwrap();
                for (position, id) in chunk {
                    delete.execute(params![position, id]).unwrap();
                }
            }
            tx.commit().unwrap();
        }
        let name = if joined {
            "one statement over JSON"
        } else {
            "in a loop"
        };
        println!("{name}: {:.2} ms", start.elapsed().as_secs_f64() * 1e3 / 20.0);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}
