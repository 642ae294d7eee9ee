//! Many connections and processes on one file: nobody is told that the database is busy, nothing is lost.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Place, fetch, in_flight, message, request};
use outbox_core::{
    DeadLetterQuery, Death, FetchRequest, LeaseRequest, Message, OutboxStore, Position, RelayId,
    ShardSettlement, WakeUp,
};
use outbox_sqlite::rusqlite::{Connection, TransactionBehavior};
use outbox_sqlite::{SqliteConfig, SqliteOutbox, SqliteStore};

/// How a part of a test runs in a process of its own.
fn process(name: &str, config: &SqliteConfig, number: usize) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", name])
        .env("OUTBOX_TEST_FILE", &config.path)
        .env("OUTBOX_TEST_NUMBER", number.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn of_this_process() -> (SqliteConfig, usize) {
    let config = SqliteConfig::new(std::env::var("OUTBOX_TEST_FILE").unwrap());
    (
        config,
        std::env::var("OUTBOX_TEST_NUMBER").unwrap().parse().unwrap(),
    )
}

const EACH: usize = 300;

/// A producer: a business row and a message in each transaction, as the documentation says.
#[test]
#[ignore = "a part of four_processes_share_a_file and others"]
fn produce_in_this_process() {
    let (config, number) = of_this_process();
    let outbox = SqliteOutbox::new(&config).unwrap();
    let mut connection = Connection::open(&config.path).unwrap();
    for count in 0..EACH {
        let tx = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .unwrap();
        tx.execute(
            "INSERT INTO business VALUES (?1, ?2)",
            [number.to_string(), count.to_string()],
        )
        .unwrap();
        let message = message("t", Some(&number.to_string()), &format!("{number}/{count}"));
        outbox.enqueue(&tx, &message).unwrap();
        tx.commit().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn four_processes_share_a_file() {
    let place = Place::new();
    place
        .connect()
        .execute_batch("CREATE TABLE business (a, b)")
        .unwrap();
    let mut producers: Vec<Child> = (0..3)
        .map(|number| process("produce_in_this_process", &place.config, number))
        .collect();

    // This process is the relay; each error would fail the test.
    let mut reader = place.store.reader().await.unwrap();
    let mut next: BTreeMap<String, usize> = BTreeMap::new();
    let mut delivered = 0;
    let deadline = Instant::now() + Duration::from_secs(60);
    while delivered < 3 * EACH {
        assert!(Instant::now() < deadline, "{delivered} delivered");
        let owned = place.lease().await;
        let (records, _) = fetch(&mut reader, &request(owned, 50)).await;
        for record in &records {
            let payload = record.message.payload().unwrap();
            let (key, count) = std::str::from_utf8(payload).unwrap().split_once('/').unwrap();
            let expected = next.entry(key.to_owned()).or_default();
            assert_eq!(count.parse::<usize>().unwrap(), *expected, "order within {key}");
            *expected += 1;
        }
        delivered += records.len();
        place.deliver(owned, &records).await;
    }
    for producer in &mut producers {
        assert!(producer.wait().unwrap().success(), "a producer met an error");
    }
    assert_eq!(place.store.stats().await.unwrap().backlog.value(), 0);
}

/// A relay until it is killed.
#[tokio::test]
#[ignore = "a part of killed_processes_lose_nothing"]
async fn relay_in_this_process() {
    let (config, number) = of_this_process();
    let store = SqliteStore::open(config.clone()).unwrap();
    let relay = RelayId::new(format!("relay-{number}"));
    let log = Connection::open(&config.path).unwrap();
    let mut reader = store.reader().await.unwrap();
    loop {
        let lease = LeaseRequest {
            relay: relay.clone(),
            want: 1,
            ttl: Duration::from_millis(200),
        };
        let Some(owned) = store.lease(&lease).await.unwrap().held.first().copied() else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        let (records, _) = fetch(&mut reader, &request(owned, 20)).await;
        // The sink is a table without an index; what is written twice stands twice.
        for record in &records {
            let payload = record.message.payload().unwrap();
            log.execute(
                "INSERT INTO sink (payload) VALUES (?1)",
                [std::str::from_utf8(payload).unwrap()],
            )
            .unwrap();
        }
        let mut part = ShardSettlement::new(owned.shard, owned.epoch);
        part.delivered = records.iter().map(outbox_core::Record::reference).collect();
        let settlement = outbox_core::Settlement {
            relay: relay.clone(),
            shards: vec![part],
        };
        store.settle(&settlement).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_processes_lose_nothing() {
    let place = Place::new();
    place
        .connect()
        .execute_batch(
            "CREATE TABLE business (a, b); CREATE TABLE sink (number INTEGER PRIMARY KEY, payload)",
        )
        .unwrap();
    let mut producers: Vec<Child> = (0..2)
        .map(|number| process("produce_in_this_process", &place.config, number))
        .collect();
    for number in 0..10 {
        let mut relay = process("relay_in_this_process", &place.config, number);
        tokio::time::sleep(Duration::from_millis(150)).await;
        relay.kill().unwrap();
        relay.wait().unwrap();
    }
    for producer in &mut producers {
        assert!(producer.wait().unwrap().success());
    }
    let mut last = process("relay_in_this_process", &place.config, 99);
    let deadline = Instant::now() + Duration::from_secs(60);
    while place.store.stats().await.unwrap().backlog.value() > 0 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    last.kill().unwrap();
    last.wait().unwrap();

    let connection = place.connect();
    let intact: String = connection
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap();
    assert_eq!(intact, "ok");
    let sent: Vec<String> = connection
        .prepare("SELECT payload FROM sink ORDER BY number")
        .unwrap()
        .query_map([], |row| row.get(0))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    let mut next: BTreeMap<String, usize> = BTreeMap::new();
    for payload in &sent {
        let (key, count) = payload.split_once('/').unwrap();
        let (count, expected) = (
            count.parse::<usize>().unwrap(),
            next.entry(key.to_owned()).or_default(),
        );
        // First deliveries are in order and without a gap; what comes again was sent before.
        assert!(count <= *expected, "{payload} before {expected}");
        *expected = (*expected).max(count + 1);
    }
    assert_eq!(next.into_values().collect::<Vec<_>>(), [EACH, EACH]);
}

#[tokio::test]
async fn a_commit_on_any_connection_wakes() {
    let place = Place::new();
    let mut wake_up = place.store.wake_up().unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let connection = place.connect();
    for _ in 0..3 {
        let quiet = tokio::time::timeout(Duration::from_millis(50), wake_up.wait()).await;
        assert!(quiet.is_err(), "woken for nothing");
        place
            .outbox
            .enqueue(&connection, &message("t", None, "p"))
            .unwrap();
        tokio::time::timeout(Duration::from_secs(2), wake_up.wait())
            .await
            .unwrap();
    }
    place
        .connect()
        .execute_batch("CREATE TABLE business (a, b)")
        .unwrap();
    wake(&mut wake_up).await;
    let mut child = process("produce_in_this_process", &place.config, 0);
    wake(&mut wake_up).await;
    child.wait().unwrap();
}

async fn wake(wake_up: &mut Box<dyn WakeUp>) {
    tokio::time::timeout(Duration::from_secs(5), wake_up.wait())
        .await
        .unwrap();
}

/// A dropped future leaves no transaction open, whenever it is dropped, and the connection goes on working.
#[tokio::test(flavor = "multi_thread")]
async fn dropped_futures_leave_nothing_open() {
    let place = Place::with(|config| config.busy_timeout = Duration::from_millis(500));
    for number in 0..40 {
        place.enqueue(&message("t", None, &number.to_string()));
    }
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    let lease = LeaseRequest {
        relay: place.relay.clone(),
        want: 1,
        ttl: Duration::from_secs(60),
    };
    for round in 0..200_u64 {
        let patience = Duration::from_micros(round * 5);
        let part = ShardSettlement {
            delivered: vec![],
            ..ShardSettlement::new(owned.shard, owned.epoch)
        };
        let settlement = place.settlement(part);
        let request = request(owned, 10);
        match round % 4 {
            0 => drop(tokio::time::timeout(patience, place.store.lease(&lease)).await),
            1 => drop(tokio::time::timeout(patience, place.store.settle(&settlement)).await),
            2 => drop(tokio::time::timeout(patience, place.store.stats()).await),
            _ => drop(tokio::time::timeout(patience, reader.fetch(&request)).await),
        }
        // A writer finds no lock but a passing one.
        place.connect().execute_batch("BEGIN IMMEDIATE; COMMIT").unwrap();
    }
    let mut fresh = place.store.reader().await.unwrap();
    assert_eq!(fetch(&mut fresh, &request(owned, 100)).await.0.len(), 40);
}

#[tokio::test]
async fn a_writer_that_does_not_let_go_is_a_conflict_after_the_timeout() {
    let place = Place::with(|config| config.busy_timeout = Duration::from_millis(200));
    let blocker = place.connect();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let start = Instant::now();
    let request = LeaseRequest {
        relay: place.relay.clone(),
        want: 1,
        ttl: Duration::from_secs(60),
    };
    let error = place.store.lease(&request).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    assert!(start.elapsed() >= Duration::from_millis(200));
    // Readers do not wait for writers.
    assert_eq!(place.store.stats().await.unwrap().backlog.value(), 0);
    blocker.execute_batch("ROLLBACK").unwrap();
    place.lease().await;
}

#[tokio::test]
async fn a_deferred_transaction_that_lost_its_race_says_what_to_do() {
    let place = Place::new();
    let mut connection = place.connect();
    let tx = connection.transaction().unwrap();
    tx.query_row("SELECT count(*) FROM outbox", [], |_| Ok(()))
        .unwrap();
    place.enqueue(&message("t", None, "p"));
    let error = place.outbox.enqueue(&tx, &message("t", None, "p")).unwrap_err();
    assert!(error.to_string().contains("IMMEDIATE"), "{error}");
    assert!(error.is_retryable());
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_requeues_count_each_letter_once() {
    let place = Place::new();
    for number in 0..100 {
        place.enqueue(&message("t", Some("k"), &number.to_string()));
    }
    let owned = place.lease().await;
    let records = place.fetch(100).await;
    let mut part = ShardSettlement::new(owned.shard, owned.epoch);
    part.dead = records
        .iter()
        .map(|record| Death {
            record: record.reference(),
            attempts: 3,
            reason: "no".into(),
        })
        .collect();
    place.store.settle(&place.settlement(part)).await.unwrap();

    let references: Vec<_> = records.iter().map(outbox_core::Record::reference).collect();
    let all: Vec<_> = (0..4)
        .map(|_| {
            let store = SqliteStore::open(place.config.clone()).unwrap();
            let references = references.clone();
            tokio::spawn(async move {
                let letters = store.dead_letters().unwrap();
                let mut counted = 0;
                for reference in references {
                    counted += letters.requeue(&[reference]).await.unwrap();
                }
                counted
            })
        })
        .collect();
    let mut counted = 0;
    for one in all {
        counted += one.await.unwrap();
    }
    assert_eq!(counted, 100);
    let again = place.fetch(1000).await;
    let ids: BTreeSet<_> = again.iter().map(|record| record.message.id()).collect();
    assert_eq!((again.len(), ids.len()), (100, 100));
    assert!(again[0].position > Position(100));
    let query = DeadLetterQuery::default();
    assert!(
        place
            .store
            .dead_letters()
            .unwrap()
            .list(&query)
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn enqueueing_many_is_all_or_none() {
    let place = Place::new();
    let mut connection = place.connect();
    connection
        .execute_batch(
            "CREATE TABLE business (a);
             CREATE TRIGGER refuse BEFORE INSERT ON outbox WHEN NEW.topic = 'refused'
             BEGIN SELECT RAISE(ABORT, 'no'); END",
        )
        .unwrap();
    let large = Message::builder("t").payload(vec![0; 2_000_000]).build().unwrap();
    let fine = || message("t", None, "p");
    for bad in [large, message("refused", None, "p")] {
        let tx = connection.transaction().unwrap();
        tx.execute("INSERT INTO business VALUES (1)", []).unwrap();
        place
            .outbox
            .enqueue_many(&tx, &[fine(), bad, fine()])
            .unwrap_err();
        // The transaction is usable, and holds nothing of the call.
        place.outbox.enqueue(&tx, &fine()).unwrap();
        tx.commit().unwrap();
    }
    let business: i64 = connection
        .query_row("SELECT count(*) FROM business", [], |row| row.get(0))
        .unwrap();
    assert_eq!(business, 2);
    assert_eq!(place.fetch(10).await.len(), 2);
    // Without a transaction as well.
    place
        .outbox
        .enqueue_many(&connection, &[fine(), message("refused", None, "p")])
        .unwrap_err();
    assert_eq!(place.fetch(10).await.len(), 2);
    place.outbox.enqueue_many(&connection, &[]).unwrap();
    assert!(connection.is_autocommit());
}

/// What is in flight is left out, also when it is much.
#[tokio::test]
async fn much_in_flight_is_left_out() {
    let place = Place::new();
    let all: Vec<Message> = (0..5_000)
        .map(|number| message("t", None, &number.to_string()))
        .collect();
    place.outbox.enqueue_many(&place.connect(), &all).unwrap();
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    let (first, _) = fetch(&mut reader, &request(owned, 4_000)).await;
    let mut fresh = place.store.reader().await.unwrap();
    let asked = FetchRequest {
        in_flight: in_flight(&first),
        ..request(owned, 4_000)
    };
    let (rest, more) = fetch(&mut fresh, &asked).await;
    assert_eq!((rest.len(), more), (1_000, false));
    assert_eq!(rest[0].position, Position(4_001));
}
