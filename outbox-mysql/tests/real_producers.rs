//! Producers never wait for the relay, at the server's default isolation.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Place, Server, message, records, request};
use outbox_core::{MemorySink, Message, MessageId, OutboxStore, Relay};
use outbox_mysql::MysqlStore;
use outbox_mysql::sqlx::{AssertSqlSafe, Executor};

/// One test for each server.
macro_rules! on_both {
    ($($(#[$attribute:meta])* async fn $name:ident($server:ident: Server) $body:block)+) => {
        mod mysql {
            use super::*;
            $($(#[$attribute])* #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(Server::Mysql).await; })+
        }
        mod mariadb {
            use super::*;
            $($(#[$attribute])* #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(Server::Mariadb).await; })+
        }
        $(async fn $name($server: Server) $body)+
    };
}

const PRODUCERS: usize = 8;
const RELAYS: usize = 3;

/// For how long producers and relays meet.
fn duration() -> Duration {
    let seconds = std::env::var("OUTBOX_PROOF_SECONDS").ok();
    Duration::from_secs(seconds.and_then(|text| text.parse().ok()).unwrap_or(60))
}

/// What a producer saw.
#[derive(Default)]
struct Produced {
    committed: BTreeSet<MessageId>,
    rolled_back: BTreeSet<MessageId>,
    errors: Vec<String>,
}

/// Transactions of one to twenty messages, some rolled back, some held open; a lock that is not there within a second
/// is an error.
async fn produce(place: &Place, number: usize, end: Instant) -> Produced {
    let mut produced = Produced::default();
    let mut random = fastrand::Rng::with_seed(number as u64);
    let mut connection = place.connect().await;
    connection
        .execute("SET SESSION innodb_lock_wait_timeout = 1")
        .await
        .unwrap();
    while Instant::now() < end {
        // A key belongs to one producer: what it waits for is never another one.
        let messages: Vec<Message> = (0..random.usize(1..=20))
            .map(|n| {
                message(
                    "t",
                    (n % 4 > 0).then(|| format!("{number}-{}", n % 5)).as_deref(),
                    "payload",
                )
            })
            .collect();
        let ids = messages.iter().map(Message::id);
        let commit = random.u8(..10) > 0;
        let attempt: outbox_core::Result<()> = async {
            connection.execute("START TRANSACTION").await.unwrap();
            place.outbox.enqueue_many(&mut connection, &messages).await?;
            if random.u8(..5) == 0 {
                tokio::time::sleep(Duration::from_millis(random.u64(..100))).await;
            }
            let end = if commit { "COMMIT" } else { "ROLLBACK" };
            connection.execute(end).await.unwrap();
            Ok(())
        }
        .await;
        match attempt {
            Ok(()) if commit => produced.committed.extend(ids),
            Ok(()) => produced.rolled_back.extend(ids),
            Err(error) => {
                produced.errors.push(error.to_string());
                connection.execute("ROLLBACK").await.unwrap();
            }
        }
    }
    produced
}

on_both! {
    /// The table is nearly empty all the time, which is when a server would rather read it whole.
    async fn producers_meet_no_lock(server: Server) {
        let place = Arc::new(Place::new(server).await);
        let sink = MemorySink::new();
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let relays: Vec<_> = (0..RELAYS)
            .map(|_| {
                let relay = Relay::new(Arc::new(place.store.clone()), Box::new(sink.clone()));
                let mut stopped = stopped.clone();
                tokio::spawn(relay.run(async move {
                    let _ = stopped.wait_for(|stopped| *stopped).await;
                }))
            })
            .collect();
        let end = Instant::now() + duration();
        let producers: Vec<_> = (0..PRODUCERS)
            .map(|number| {
                let place = Arc::clone(&place);
                tokio::spawn(async move { produce(&place, number, end).await })
            })
            .collect();
        let mut all = Produced::default();
        for producer in producers {
            let produced = producer.await.unwrap();
            all.committed.extend(produced.committed);
            all.rolled_back.extend(produced.rolled_back);
            all.errors.extend(produced.errors);
        }
        assert_eq!(all.errors, Vec::<String>::new());
        let drained = common::until(Duration::from_secs(60), async || {
            (place.number("SELECT COUNT(*) FROM {}").await == 0).then_some(())
        });
        assert!(drained.await.is_some(), "the backlog is not drained");
        stop.send(true).unwrap();
        for relay in relays {
            relay.await.unwrap().unwrap();
        }
        let mut times = BTreeMap::<MessageId, usize>::new();
        for record in sink.delivered() {
            *times.entry(record.message.id()).or_default() += 1;
        }
        let delivered: BTreeSet<MessageId> = times.keys().copied().collect();
        println!("{} committed, {} rolled back", all.committed.len(), all.rolled_back.len());
        assert!(all.committed.len() > 1_000, "too few for a proof: {}", all.committed.len());
        assert!(delivered == all.committed, "lost or phantom");
        let twice = times.values().filter(|times| **times > 1).count();
        assert_eq!(twice, 0, "duplicates without a fault");
    }

    /// Rows of an open transaction lie between those that are settled.
    async fn a_settlement_waits_for_no_open_row(server: Server) {
        let place = Place::new(server).await;
        let mut open = place.connect().await;
        open.execute("START TRANSACTION").await.unwrap();
        for n in 0..20 {
            place.enqueue(&[message("t", Some(&format!("k{n}")), "committed")]).await;
            let later = message("t", Some(&format!("k{n}")), "open");
            place.outbox.enqueue(&mut open, &later).await.unwrap();
        }
        let store = impatient(&place).await;
        let owned = place.lease().await;
        let mut reader = store.reader().await.unwrap();
        let (read, _) = records(reader.fetch(&request(&owned, 100)).await.unwrap());
        assert_eq!(read.len(), 20);
        let parts = common::delivered(&owned, &read);
        let settled = store.settle(&place.settlement(parts)).await.unwrap();
        assert!(settled.lost.is_empty());
        open.execute("COMMIT").await.unwrap();
        let (read, _) = records(reader.fetch(&request(&owned, 100)).await.unwrap());
        assert_eq!(read.len(), 20, "and what was open comes");
    }

    /// And the other way round: what a settlement has deleted and not yet committed lies between new rows.
    async fn a_producer_waits_for_no_settlement(server: Server) {
        let place = Place::new(server).await;
        for n in 0..20 {
            place.enqueue(&[message("t", Some(&format!("k{n}")), "committed")]).await;
        }
        let mut settling = place.connect().await;
        settling
            .execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
            .await
            .unwrap();
        settling.execute("START TRANSACTION").await.unwrap();
        let delete = place.named("DELETE FROM {} WHERE id IN (SELECT id FROM (SELECT id FROM {} WHERE id % 2 = 0) x)");
        settling.execute(AssertSqlSafe(delete)).await.unwrap();
        let mut producer = place.connect().await;
        producer
            .execute("SET SESSION innodb_lock_wait_timeout = 1; START TRANSACTION")
            .await
            .unwrap();
        let messages: Vec<Message> = (0..100).map(|n| message("t", Some(&format!("k{n}")), "new")).collect();
        place.outbox.enqueue_many(&mut producer, &messages).await.unwrap();
        producer.execute("COMMIT").await.unwrap();
        settling.execute("COMMIT").await.unwrap();
        assert_eq!(place.number("SELECT COUNT(*) FROM {}").await, 110);
    }
}

/// The same outbox, with statements that wait a second at most.
async fn impatient(place: &Place) -> MysqlStore {
    let mut config = place.config.clone();
    config.statement_timeout = Duration::from_secs(1);
    MysqlStore::connect(config).await.unwrap()
}
