//! Connections on bad networks and servers in trouble: whatever is interrupted, nothing is half done, and nothing that
//! was said to be done is not.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;
#[path = "../../tests/proxy/mod.rs"]
mod proxy;
#[path = "common/server.rs"]
mod server;
#[path = "../../tests/trouble/mod.rs"]
mod trouble;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Place, delivered, message, request, unique, until, url};
use outbox_core::{
    DeadLetterQuery, Death, ErrorKind, HoldChange, LeaseRequest, Membership, MemorySink, Message, MessageId,
    Ordering, OutboxStore, OwnedShard, Record, Relay, RelayConfig, RelayId, Settlement,
};
use outbox_postgres::sqlx::postgres::{PgPool, PgPoolOptions};
use outbox_postgres::sqlx::{self, AssertSqlSafe, Executor};
use outbox_postgres::{PostgresConfig, PostgresStore, begin, migrate};
use proxy::Proxy;
use server::Server;
use trouble::{EACH, KEYS, address, asking_again, assert_in_order, dropped_after, hold, lease_request};

/// The administrator through a proxy, which has to see what is said, under a name by which the sessions are found.
fn through(proxy: &Proxy, name: &str) -> String {
    format!(
        "postgres://postgres@127.0.0.1:{}/postgres?sslmode=disable&application_name={name}",
        proxy.port()
    )
}

/// An outbox of one shard whose store is behind a proxy.
async fn behind_proxy(adjust: impl FnOnce(&mut PostgresConfig)) -> (Proxy, Place, String) {
    let proxy = Proxy::before(address(&url())).await;
    let name = unique("app");
    let place = Place::with(|config| {
        config.url = through(&proxy, &name).into();
        config.shards = 1;
        adjust(config);
    })
    .await;
    (proxy, place, name)
}

/// How many sessions of this name are in a transaction, or at work.
async fn busy(place: &Place, name: &str) -> i64 {
    place
        .number(&format!(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}' AND state <> 'idle'"
        ))
        .await
}

async fn all_idle(place: &Place, name: &str) {
    until(Duration::from_secs(20), async || {
        (busy(place, name).await == 0).then_some(())
    })
    .await
    .expect("no session is left in a transaction");
}

const ROUNDS: usize = 20;

/// Every operation of the store's, dropped at each of its waits on a slow network.
#[tokio::test(flavor = "multi_thread")]
async fn dropped_futures_leave_nothing_half_done() {
    let (proxy, place, name) = behind_proxy(|config| config.max_connections = 20).await;
    // Of each round its own keys: for a full settlement two messages, for the others one.
    let mut messages = Vec::new();
    for round in 0..ROUNDS {
        for kind in ["full-dead", "simple", "parked", "dead", "discarded"] {
            messages.push(message("t", Some(&format!("{kind}-{round}")), kind));
        }
        messages.push(message(
            "t",
            Some(&format!("full-dead-{round}")),
            "full-delivered",
        ));
    }
    place.enqueue(&messages).await;
    let owned = place.lease().await;
    let records: Vec<Record> = place.fetch(10_000).await;
    let record = |kind: &str, round: usize, payload: &str| -> Record {
        let key = format!("{kind}-{round}");
        records
            .iter()
            .find(|record| {
                record.message.key().unwrap().as_ref() == key.as_bytes()
                    && record.message.payload().unwrap().as_ref() == payload.as_bytes()
            })
            .unwrap()
            .clone()
    };
    // What the operators' calls find.
    let mut prepared = delivered(&owned, &[]);
    prepared.push(outbox_core::ShardSettlement::new(owned[0].shard, owned[0].epoch));
    for round in 0..ROUNDS {
        let parked = record("parked", round, "parked");
        prepared[0].holds.push(HoldChange::Put(hold(&parked)));
        for kind in ["dead", "discarded"] {
            prepared[0].dead.push(Death {
                record: record(kind, round, kind).reference(),
                attempts: 1,
                reason: "no".into(),
            });
        }
    }
    place.store.settle(&place.settlement(prepared)).await.unwrap();
    for _ in 0..ROUNDS {
        place
            .sql("INSERT INTO {_scheduled} (topic, key, deliver_at) VALUES ('t', 'scheduled', now())")
            .await;
    }

    proxy.delay(Duration::from_millis(30));
    let place = Arc::new(place);
    let mut said_ok: Vec<(String, MessageId)> = Vec::new();
    let mut tasks = tokio::task::JoinSet::new();
    for kind in [
        "lease",
        "release",
        "holds",
        "simple",
        "full-dead",
        "promote",
        "stats",
        "list",
        "dead",
        "discarded",
        "parked",
        "fetch",
        "migrate",
        "begin",
    ] {
        let (place, owned) = (Arc::clone(&place), owned.clone());
        let records: Vec<Record> = (0..ROUNDS)
            .flat_map(|round| match kind {
                "simple" | "dead" | "discarded" | "parked" => vec![record(kind, round, kind)],
                "full-dead" => vec![record(kind, round, kind), record(kind, round, "full-delivered")],
                _ => Vec::new(),
            })
            .collect();
        let producers = PgPoolOptions::new()
            .max_connections(2)
            .connect_lazy(&through(&proxy, &name))
            .unwrap();
        tasks.spawn(async move {
            let mut ok = Vec::new();
            for round in 0..ROUNDS {
                let done = operation(kind, round, &place, &owned, &records, &producers);
                if let Some(id) = dropped_after(round + 1, done).await.flatten() {
                    ok.push((kind.to_owned(), id));
                }
            }
            ok
        });
    }
    while let Some(ok) = tasks.join_next().await {
        said_ok.extend(ok.unwrap());
    }
    all_idle(&place, &name).await;
    proxy.delay(Duration::ZERO);

    // What was said to be done is done.
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (kind, id) in &said_ok {
        *counts.entry(kind.as_str()).or_default() += 1;
        let (there, expected) = match kind.as_str() {
            "simple" => ("{}", 0),
            "full-dead" | "parked" => ("{_dead}", 1),
            "dead" | "discarded" => ("{_dead}", 0),
            _ => ("{}", 1),
        };
        let rows = place
            .number(&format!("SELECT count(*) FROM {there} WHERE message_id = '{id}'"))
            .await;
        assert_eq!(rows, expected, "{kind} {id}");
    }
    println!("completed: {counts:?}");
    for kind in ["simple", "full-dead", "parked", "dead", "discarded", "begin"] {
        let completed = counts.get(kind).copied().unwrap_or_default();
        assert!(completed > 0, "{kind} was never let go to its end: {counts:?}");
        assert!(completed < ROUNDS, "{kind} was never dropped: {counts:?}");
    }
    // Nothing is in two places or in none, and what belongs together went together.
    let everywhere = place
        .number(
            "SELECT count(*) FROM (SELECT message_id FROM {} UNION ALL SELECT message_id FROM {_dead}) m
             GROUP BY message_id HAVING count(*) > 1 UNION ALL SELECT 0 LIMIT 1",
        )
        .await;
    assert_eq!(everywhere, 0, "in two places");
    for round in 0..ROUNDS {
        let key = format!("convert_to('full-dead-{round}', 'UTF8')");
        let left = place
            .number(&format!("SELECT count(*) FROM {{}} WHERE key = {key}"))
            .await;
        let dead = place
            .number(&format!("SELECT count(*) FROM {{_dead}} WHERE key = {key}"))
            .await;
        let held = place
            .number(&format!("SELECT count(*) FROM {{_hold}} WHERE key = {key}"))
            .await;
        assert!(
            [(2, 0, 0), (0, 1, 1)].contains(&(left, dead, held)),
            "round {round}: {left} left, {dead} dead, {held} held"
        );
    }
    let scheduled = place.number("SELECT count(*) FROM {_scheduled}").await;
    let promoted = place
        .number("SELECT count(*) FROM {} WHERE key = 'scheduled'")
        .await;
    assert_eq!(scheduled + promoted, i64::try_from(ROUNDS).unwrap());
    // And everything goes on.
    assert_eq!(
        place.store.stats().await.unwrap().parked,
        u64::try_from(place.number("SELECT count(*) FROM {_hold} WHERE parked").await).unwrap()
    );
}

/// One operation; the message of which it says that something was done to it.
async fn operation(
    kind: &str,
    round: usize,
    place: &Place,
    owned: &[OwnedShard],
    records: &[Record],
    producers: &PgPool,
) -> Option<MessageId> {
    let store = &place.store;
    match kind {
        "lease" => drop(store.lease(&lease_request("relay")).await.unwrap()),
        "release" => store
            .release(&RelayId::new("other"), &[], Membership::Leaves)
            .await
            .unwrap(),
        "holds" => drop(store.holds(owned).await.unwrap()),
        "stats" => drop(store.stats().await.unwrap()),
        "list" => drop(
            store
                .dead_letters()
                .unwrap()
                .list(&DeadLetterQuery::default())
                .await
                .unwrap(),
        ),
        "promote" => drop(
            store
                .scheduled()
                .unwrap()
                .promote(&place.relay, owned, 1)
                .await
                .unwrap(),
        ),
        "fetch" => {
            let mut reader = store.reader().await.unwrap();
            drop(reader.fetch(&request(owned, 100)).await.unwrap());
        }
        "migrate" => drop(migrate(&place.config).await.unwrap()),
        "simple" => {
            let record = &records[round];
            let parts = delivered(owned, std::slice::from_ref(record));
            let settled = store.settle(&place.settlement(parts)).await.unwrap();
            assert!(settled.lost.is_empty());
            return Some(record.message.id());
        }
        "full-dead" => {
            let (dead, record) = (&records[2 * round], &records[2 * round + 1]);
            let mut parts = delivered(owned, std::slice::from_ref(record));
            parts[0].dead.push(Death {
                record: dead.reference(),
                attempts: 1,
                reason: "no".into(),
            });
            parts[0].holds.push(HoldChange::Put(hold(record)));
            let settled = store.settle(&place.settlement(parts)).await.unwrap();
            assert!(settled.lost.is_empty());
            return Some(dead.message.id());
        }
        "dead" => {
            let record = &records[round];
            let letters = store.dead_letters().unwrap();
            assert_eq!(letters.requeue(&[record.reference()]).await.unwrap(), 1);
            return Some(record.message.id());
        }
        "discarded" => {
            let record = &records[round];
            let letters = store.dead_letters().unwrap();
            assert_eq!(letters.discard(&[record.reference()]).await.unwrap(), 1);
            return Some(record.message.id());
        }
        "parked" => {
            let parking = store.parking().unwrap();
            drop(parking.parked(100).await.unwrap());
            let record = &records[round];
            assert!(parking.bury(&hold(record).reference()).await.unwrap());
            return Some(record.message.id());
        }
        _ => {
            let mut tx = begin(producers).await.unwrap();
            let message = message("t", Some("begun"), "p");
            place.outbox.enqueue(&mut tx, &message).await.unwrap();
            tx.commit().await.unwrap();
            return Some(message.id());
        }
    }
    None
}

/// Times `begin` out on a slow network; says how many writes after it were said to be done and were not.
async fn lost_after_timeouts(how: impl AsyncFn(&PgPool)) -> usize {
    let (proxy, place, name) = behind_proxy(|_| {}).await;
    place
        .sql(&format!("CREATE TABLE {} (a int)", place.table("_business")))
        .await;
    let mut lost = 0;
    for number in 0..20 {
        let pool = PgPoolOptions::new()
            .max_connections(1)
            // Or it would be asking whether the connection lives while the time runs out.
            .test_before_acquire(false)
            .connect(&through(&proxy, &name))
            .await
            .unwrap();
        proxy.delay(Duration::from_millis(30));
        how(&pool).await;
        let insert = format!("INSERT INTO {} VALUES ({number})", place.table("_business"));
        sqlx::query(AssertSqlSafe(insert)).execute(&pool).await.unwrap();
        proxy.delay(Duration::ZERO);
        pool.close().await;
        let there = place
            .number(&format!(
                "SELECT count(*) FROM {} WHERE a = {number}",
                place.table("_business")
            ))
            .await;
        lost += usize::from(there == 0);
    }
    lost
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_whose_beginning_was_dropped_swallows_no_later_write() {
    const SHORT: Duration = Duration::from_millis(10);
    let ours = lost_after_timeouts(async |pool| {
        assert!(tokio::time::timeout(SHORT, begin(pool)).await.is_err());
    })
    .await;
    assert_eq!(ours, 0, "writes that were said to be done are gone");
    // That the driver's own does is why ours exists. Once it no longer does, ours can go.
    let theirs = lost_after_timeouts(async |pool| {
        assert!(tokio::time::timeout(SHORT, pool.begin()).await.is_err());
    })
    .await;
    println!("the driver's own begin lost {theirs} of 20 writes");
    assert!(
        theirs > 0,
        "sqlx is mended: `outbox_postgres::begin` is not needed any more"
    );
}

/// A settlement whose answer was lost may be committed. Repeated, it changes nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_of_unknown_outcome_is_repeated_without_harm() {
    for full in [false, true] {
        let (proxy, place, _) = behind_proxy(|config| config.ordering = Ordering::Sequenced).await;
        let messages: Vec<Message> = (0..10)
            .map(|number| message("t", Some("k"), &number.to_string()))
            .collect();
        place.enqueue(&messages).await;
        let relay = RelayId::new("relay-of-an-unknown-outcome");
        let owned = place
            .store
            .lease(&lease_request(relay.as_str()))
            .await
            .unwrap()
            .held;
        let mut reader = place.store.reader().await.unwrap();
        let (records, _) = common::fetch(&mut reader, &request(&owned, 10_000)).await;
        let mut parts = delivered(&owned, &records[..4]);
        if full {
            parts[0].dead.push(Death {
                record: records[4].reference(),
                attempts: 3,
                reason: "no".into(),
            });
            parts[0].holds.push(HoldChange::Put(hold(&records[5])));
        }
        let settlement = Settlement { relay, shards: parts };
        // Statements are prepared when they are first run, and the cut shall hit the run.
        let nothing = Settlement {
            shards: delivered(&owned, &[]),
            ..settlement.clone()
        };
        place.store.settle(&nothing).await.unwrap();
        // Whatever it changes, it is one statement, and the relay's name is a parameter of it.
        proxy.cut_after(b"relay-of-an-unknown-outcome");
        let error = place.store.settle(&settlement).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        assert_eq!(proxy.cuts(), 1);
        let left = if full { 5 } else { 6 };
        until(Duration::from_secs(10), async || {
            (place.number("SELECT count(*) FROM {}").await == left).then_some(())
        })
        .await
        .expect("the server had it and committed");

        for _ in 0..3 {
            let settled = place.store.settle(&settlement).await.unwrap();
            assert!(settled.lost.is_empty());
        }
        assert_eq!(place.number("SELECT count(*) FROM {}").await, left);
        assert_eq!(
            place.number("SELECT count(*) FROM {_dead}").await,
            i64::from(full)
        );
        assert_eq!(
            place.number("SELECT count(*) FROM {_hold}").await,
            i64::from(full)
        );
    }
}

/// The network says nothing any more: no call hangs, and each says that it will be worth trying again.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_network_fails_each_call_in_time() {
    let (proxy, place, _) = behind_proxy(|config| {
        config.statement_timeout = Duration::from_millis(500);
        config.connect_timeout = Duration::from_secs(1);
    })
    .await;
    place.enqueue(&[message("t", Some("k"), "p")]).await;
    let owned = place.store.lease(&lease_request("relay")).await.unwrap().held;
    let mut reader = place.store.reader().await.unwrap();
    let (records, _) = common::fetch(&mut reader, &request(&owned, 10)).await;
    let settlement = place.settlement(delivered(&owned, &records));
    proxy.blackhole(true);
    let start = Instant::now();
    let asked = request(&owned, 10);
    let lease = lease_request("relay");
    let (lease, fetch, settle, stats, reader_again) = tokio::join!(
        place.store.lease(&lease),
        reader.fetch(&asked),
        place.store.settle(&settlement),
        place.store.stats(),
        place.store.reader(),
    );
    for error in [
        lease.unwrap_err(),
        fetch.unwrap_err(),
        settle.unwrap_err(),
        stats.unwrap_err(),
        reader_again.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    }
    // The server's half second, five more, and one to connect.
    assert!(start.elapsed() < Duration::from_secs(9), "{:?}", start.elapsed());
    proxy.blackhole(false);
    until(Duration::from_secs(10), async || {
        place.store.lease(&lease_request("relay")).await.ok()
    })
    .await
    .expect("it goes on by itself");
    place.store.settle(&settlement).await.unwrap();
    assert_eq!(place.number("SELECT count(*) FROM {}").await, 0);
}

/// A firewall forgets connections, and tells nobody: also those that are on their way back to the pool.
#[tokio::test(flavor = "multi_thread")]
async fn forgotten_connections_are_replaced() {
    let (proxy, place, _) = behind_proxy(|config| {
        config.statement_timeout = Duration::from_millis(500);
        config.connect_timeout = Duration::from_secs(2);
        config.max_connections = 2;
    })
    .await;
    for _ in 0..3 {
        until(Duration::from_secs(20), async || {
            place.store.lease(&lease_request("relay")).await.ok()
        })
        .await
        .expect("it goes on with a new connection");
        proxy.delay(Duration::from_millis(30));
        place.store.lease(&lease_request("relay")).await.unwrap();
        proxy.lose();
        proxy.delay(Duration::ZERO);
    }
    until(Duration::from_secs(20), async || {
        place.store.lease(&lease_request("relay")).await.ok()
    })
    .await
    .expect("it goes on with a new connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_waits_for_a_lock_ends_in_time() {
    let place = Place::with(|config| {
        config.statement_timeout = Duration::from_millis(500);
        config.max_connections = 2;
    })
    .await;
    place.enqueue(&[message("t", Some("k"), "p")]).await;
    let owned = place.lease().await;
    let records = place.fetch(10_000).await;
    let settlement = place.settlement(delivered(&owned, &records));
    let mut blocker = begin(&place.pool).await.unwrap();
    blocker
        .execute(AssertSqlSafe(place.named("SELECT * FROM {_lease} FOR UPDATE")))
        .await
        .unwrap();
    for _ in 0..2 {
        let start = Instant::now();
        for error in [
            place.store.lease(&lease_request("relay")).await.unwrap_err(),
            place.store.settle(&settlement).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
            assert!(error.to_string().contains("statement_timeout"), "{error}");
        }
        let taken = start.elapsed();
        assert!(
            (Duration::from_millis(900)..Duration::from_secs(4)).contains(&taken),
            "{taken:?}"
        );
        // Who only reads does not wait.
        place.store.stats().await.unwrap();
    }
    blocker.rollback().await.unwrap();
    place.lease().await;
    place.store.settle(&settlement).await.unwrap();
    assert_eq!(place.number("SELECT count(*) FROM {}").await, 0);
}

/// A producer that repeats what failed, or may have: the number is the key's next one in a table of its own.
async fn produce(place: Arc<Place>, key: usize) {
    let mut number = 0;
    let deadline = Instant::now() + Duration::from_secs(60);
    while number < EACH {
        assert!(Instant::now() < deadline, "no server for a minute");
        let attempt = async {
            let mut tx = begin(&place.pool).await?;
            let own = format!(
                "UPDATE {} SET next = next + 1 WHERE key = {key} RETURNING next",
                place.table("_business")
            );
            let next: i32 = sqlx::query_scalar(AssertSqlSafe(own))
                .fetch_one(&mut *tx)
                .await
                .map_err(|_| outbox_core::Error::new(ErrorKind::Unavailable, "count", "no"))?;
            let payload = (next - 1).to_string();
            let message = message("t", Some(&key.to_string()), &payload);
            place.outbox.enqueue(&mut tx, &message).await?;
            tx.commit()
                .await
                .map_err(|_| outbox_core::Error::new(ErrorKind::Unavailable, "commit", "no"))?;
            Ok::<_, outbox_core::Error>(usize::try_from(next).unwrap())
        };
        match attempt.await {
            Ok(next) => number = next,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_goes_on_by_itself_after_crashes_of_the_server() {
    let server = Server::start("synchronous_commit = on");
    let place = Place::at(server.url(), |config| {
        config.connect_timeout = Duration::from_secs(2);
        config.shards = 4;
    })
    .await;
    place
        .sql(&format!(
            "CREATE TABLE {0} (key int, next int); INSERT INTO {0} SELECT n, 0 FROM generate_series(0, {1}) n",
            place.table("_business"),
            KEYS - 1
        ))
        .await;
    let place = Arc::new(place);
    let sink = MemorySink::new();
    let relay = Relay::new(Arc::new(place.store.clone()), Box::new(sink.clone())).with_config(RelayConfig {
        lease: Duration::from_secs(2),
        ..asking_again(Duration::from_millis(500))
    });
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(relay.run(async { drop(stopped.await) }));
    let producing: Vec<_> = (0..KEYS)
        .map(|key| tokio::spawn(produce(Arc::clone(&place), key)))
        .collect();
    for round in 1..=3 {
        tokio::time::timeout(Duration::from_secs(60), sink.wait_for(round * 100))
            .await
            .unwrap();
        server.stop("immediate");
        server.again();
    }
    for one in producing {
        one.await.unwrap();
    }
    until(Duration::from_secs(60), async || {
        let stats = place.store.stats().await.ok()?;
        (stats.backlog.value() == 0).then_some(())
    })
    .await
    .expect("everything is delivered");
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
    assert_in_order(&sink.delivered(), KEYS, EACH);
    let stats = place.store.stats().await.unwrap();
    assert_eq!((stats.dead, stats.retrying, stats.parked), (0, 0, 0));
}

/// The relay goes on with the key then: were it undone, what was before would come behind.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_given_up_stays_so_when_the_server_crashes_at_once() {
    let server = Server::start("wal_writer_delay = 10s");
    for archive in [false, true] {
        let place = Place::at(server.url(), |config| config.archive = archive).await;
        place
            .enqueue(&[message("t", Some("k"), "1"), message("t", Some("k"), "2")])
            .await;
        let owned = place.lease().await;
        let records = place.fetch(10_000).await;
        let mut parts = delivered(&owned, &records[1..]);
        let part = parts.iter_mut().find(|part| !part.delivered.is_empty()).unwrap();
        part.dead.push(Death {
            record: records[0].reference(),
            attempts: 1,
            reason: "no".to_owned(),
        });
        place.store.settle(&place.settlement(parts)).await.unwrap();
        server.stop("immediate");
        server.again();
        let stats = until(Duration::from_secs(30), async || place.store.stats().await.ok());
        let stats = stats.await.unwrap();
        assert_eq!((stats.dead, stats.backlog.value()), (1, 0), "archive: {archive}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_that_waits_for_a_producer_leaves_the_leases_to_be_renewed() {
    let place = Place::with(|config| config.ordering = Ordering::Sequenced).await;
    place.enqueue(&[message("t", Some("k"), "1")]).await;
    let due = Message::builder("t").key("k").payload("due");
    let ahead = std::time::SystemTime::now() + Duration::from_secs(3_600);
    place.enqueue(&[due.deliver_at(ahead).build().unwrap()]).await;
    place
        .sql(&place.named("UPDATE {_scheduled} SET deliver_at = now()"))
        .await;
    let owned = place.lease().await;

    let mut producer = begin(&place.pool).await.unwrap();
    place
        .outbox
        .enqueue(&mut producer, &message("t", Some("k"), "2"))
        .await
        .unwrap();
    let scheduled = place.store.scheduled().unwrap();
    let renewals = async {
        let mut slowest = Duration::ZERO;
        for _ in 0..10 {
            let begin = Instant::now();
            place.lease().await;
            slowest = slowest.max(begin.elapsed());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        slowest
    };
    let (promotion, slowest) = tokio::join!(scheduled.promote(&place.relay, &owned, 10), renewals);
    assert_eq!(promotion.unwrap_err().kind(), ErrorKind::Conflict);
    assert!(slowest < place.config.statement_timeout / 2, "{slowest:?}");
    producer.commit().await.unwrap();
    let promotion = scheduled.promote(&place.relay, &owned, 10).await.unwrap();
    assert_eq!(promotion.promoted, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_comes_last_does_not_shorten_the_lease() {
    let place = Place::new().await;
    let renew = async |ttl| {
        let request = LeaseRequest {
            ttl,
            ..lease_request("relay")
        };
        place.store.lease(&request).await.unwrap()
    };
    renew(Duration::from_secs(60)).await;
    renew(Duration::from_secs(1)).await;
    let leases = place.store.stats().await.unwrap().leases;
    assert!(
        leases
            .iter()
            .all(|lease| lease.time_left > Duration::from_secs(30)),
        "{leases:?}"
    );
}

/// A standby does not tell which transactions are open; and what it has may be gone after a failover.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_refused() {
    let server = Server::start("");
    let place = Place::at(server.url(), |config| {
        config.connect_timeout = Duration::from_secs(2)
    })
    .await;
    place.enqueue(&[message("t", Some("k"), "p")]).await;
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    let asked = request(&owned, 10_000);
    assert_eq!(common::fetch(&mut reader, &asked).await.0.len(), 1);
    place.pool.close().await;

    server.stop("fast");
    let signal = server.data().join("standby.signal");
    std::fs::write(&signal, "").unwrap();
    server.own(&signal);
    server.again();
    for error in [
        PostgresStore::connect(place.config.clone()).await.unwrap_err(),
        migrate(&place.config).await.unwrap_err(),
        reader.fetch(&asked).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    }
    let error = PostgresStore::connect(place.config.clone()).await.unwrap_err();
    assert!(error.to_string().contains("standby"), "{error}");
    // A store that was connected before does not check again; its readers and leases do.
    let error = match place.store.reader().await {
        Ok(mut reader) => reader.fetch(&asked).await.unwrap_err(),
        Err(error) => error,
    };
    assert!(error.to_string().contains("primary"), "{error}");
    let error = until(Duration::from_secs(10), async || {
        let error = place.store.lease(&lease_request("relay")).await.unwrap_err();
        error.to_string().contains("standby").then_some(error)
    })
    .await
    .expect("told why");
    assert_eq!(error.kind(), ErrorKind::Unavailable);

    // Promoted, it is a server as any other; what the reader knew is void.
    server.stop("fast");
    std::fs::remove_file(&signal).unwrap();
    server.again();
    let mut reader = place.store.reader().await.unwrap();
    assert_eq!(common::fetch(&mut reader, &asked).await.0.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_cuts_is_survived_by_a_relay() {
    let (proxy, place, _) = behind_proxy(|config| {
        config.shards = 4;
        config.connect_timeout = Duration::from_secs(2);
    })
    .await;
    let sink = MemorySink::new();
    let relay = Relay::new(Arc::new(place.store.clone()), Box::new(sink.clone()))
        .with_config(asking_again(Duration::from_millis(200)));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(relay.run(async { drop(stopped.await) }));
    for number in 0..EACH {
        for key in 0..KEYS {
            place
                .enqueue(&[message("t", Some(&key.to_string()), &number.to_string())])
                .await;
        }
        if number % 10 == 0 {
            proxy.cut();
        }
    }
    tokio::time::timeout(Duration::from_secs(60), sink.wait_for(KEYS * EACH))
        .await
        .unwrap();
    until(Duration::from_secs(30), async || {
        (place.number("SELECT count(*) FROM {}").await == 0).then_some(())
    })
    .await
    .expect("everything is settled");
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
    assert_in_order(&sink.delivered(), KEYS, EACH);
}
