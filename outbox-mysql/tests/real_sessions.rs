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

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Place, Server, delivered, message, on_each_server, request, unique, until};
use outbox_core::{
    DeadLetterQuery, Death, Epoch, Error, ErrorKind, HoldChange, LeaseRequest, LeaseStatus, Membership,
    MemorySink, Message, MessageId, Ordering, OutboxStore, OwnedShard, Position, Record, RecordRef, Relay,
    RelayConfig, RelayId, Result, Settlement, Shard, ShardSettlement, Subject,
};
use outbox_mysql::secrecy::ExposeSecret;
use outbox_mysql::sqlx::mysql::{MySqlPool, MySqlPoolOptions};
use outbox_mysql::sqlx::{self, AssertSqlSafe, Connection, Executor, MySqlConnection};
use outbox_mysql::{MysqlConfig, MysqlStore, begin, migrate};
use proxy::Proxy;
use server::OwnServer;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use trouble::{EACH, KEYS, address, asking_again, assert_in_order, dropped_after, hold, lease_request};

on_each_server!(
    a_promotion_that_waits_for_a_producer_leaves_the_leases_to_be_renewed,
    a_renewal_that_comes_last_does_not_shorten_the_lease,
    dropped_futures_leave_nothing_half_done,
    a_connection_that_is_cut_fails_the_call_and_no_other,
    an_answer_that_breaks_off_is_no_answer,
    a_transaction_whose_beginning_was_dropped_swallows_no_later_write,
    a_statement_that_was_dropped_may_keep_its_connection,
    a_settlement_of_unknown_outcome_is_repeated_without_harm,
    a_settlement_is_repeated_while_the_first_still_runs,
    a_silent_network_fails_each_call_in_time,
    forgotten_connections_are_replaced,
    a_statement_that_waits_for_a_lock_ends_in_time,
    a_settlement_waits_for_no_lease_of_others,
    a_deadlock_is_none_of_the_callers_business,
    a_relay_goes_on_by_itself_after_crashes_of_the_server,
    a_server_that_takes_no_writes_is_waited_for,
    a_network_that_cuts_is_survived_by_a_relay,
);

/// The same place through a proxy, which has to see what is said.
fn through(proxy: &Proxy, direct: &str) -> String {
    let proxied = format!("127.0.0.1:{}", proxy.port());
    format!(
        "{}?ssl-mode=DISABLED",
        direct.replacen(address(direct), &proxied, 1)
    )
}

/// An outbox of one shard whose store is behind a proxy.
async fn behind_proxy(server: Server, adjust: impl FnOnce(&mut MysqlConfig)) -> (Proxy, Place) {
    let proxy = Proxy::before(address(&server.url())).await;
    let place = Place::with(server, |config| {
        config.url = through(&proxy, config.url.expose_secret()).into();
        config.shards = 1;
        adjust(config);
    })
    .await;
    (proxy, place)
}

/// Nobody is in a transaction of this place's, or at work, but who asks.
async fn all_idle(place: &Place) {
    // Not from `innodb_trx`, which grows old while it is watched.
    let busy = format!(
        "SELECT COUNT(*) FROM performance_schema.threads t LEFT JOIN performance_schema.events_transactions_current e \
             ON e.thread_id = t.thread_id AND e.state = 'ACTIVE' AND e.autocommit = 'NO' \
         WHERE t.processlist_db = '{}' AND t.processlist_id <> CONNECTION_ID() \
             AND (t.processlist_command <> 'Sleep' OR e.thread_id IS NOT NULL)",
        place.database
    );
    until(Duration::from_secs(20), async || {
        (place.number(&busy).await == 0).then_some(())
    })
    .await
    .expect("no session is left in a transaction");
}

/// So many sessions wait for a lock on something of this place's.
async fn wait_for_locks(place: &Place, sessions: i64) {
    let name = &place.database;
    let waiting = match place.server {
        Server::Mysql => format!(
            "SELECT COUNT(DISTINCT thread_id) FROM performance_schema.data_locks \
             WHERE lock_status = 'WAITING' AND object_schema = '{name}'"
        ),
        Server::Mariadb => format!(
            "SELECT COUNT(*) FROM information_schema.innodb_trx t JOIN information_schema.processlist p \
                 ON p.id = t.trx_mysql_thread_id WHERE t.trx_state = 'LOCK WAIT' AND p.db = '{name}'"
        ),
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while place.number(&waiting).await != sessions {
        assert!(Instant::now() < deadline, "{sessions} are to wait for a lock");
        // MariaDB tells a copy, which grows old while it is looked at more often.
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
}

const ROUNDS: usize = 20;

/// What there is to do, and what it is done to: each kind has messages of its own, of each round one key.
const KINDS: [&str; 19] = [
    "lease",
    "take",
    "release",
    "holds",
    "simple",
    "full-dead",
    "promote",
    "purge",
    "stats",
    "inspect",
    "list",
    "dead",
    "discarded",
    "parked",
    "resumed",
    "fetch",
    "connect",
    "migrate",
    "enqueue",
];

/// Of these, those that do something to a message.
const DOING: [&str; 7] = [
    "simple",
    "full-dead",
    "dead",
    "discarded",
    "parked",
    "resumed",
    "enqueue",
];

/// An outbox in which every operation has something to do, so often.
struct Stock {
    place: Place,
    owned: Vec<OwnedShard>,
    records: Vec<Record>,
}

/// Numbered and archived, where most is written.
async fn stock(server: Server) -> (Proxy, Stock) {
    let (proxy, place) = behind_proxy(server, |config| {
        config.max_connections = 20;
        config.ordering = Ordering::Sequenced;
        config.archive = true;
    })
    .await;
    // For a full settlement two messages of a key, for the others one.
    let mut messages = Vec::new();
    for round in 0..ROUNDS {
        for kind in [
            "full-dead",
            "cleared",
            "simple",
            "parked",
            "resumed",
            "dead",
            "discarded",
        ] {
            messages.push(message("t", Some(&format!("{kind}-{round}")), kind));
        }
        messages.push(message(
            "t",
            Some(&format!("full-dead-{round}")),
            "full-delivered",
        ));
    }
    let mut tx = begin(&place.pool).await.unwrap();
    place.outbox.enqueue_many(&mut tx, &messages).await.unwrap();
    tx.commit().await.unwrap();
    let owned = place.lease().await;
    let records = place.fetch(10_000).await;
    let stock = Stock {
        place,
        owned,
        records,
    };
    // What the operators' calls find.
    let mut prepared = delivered(&stock.owned, &[stock.record("full-dead", 0, "full-dead")]);
    prepared[0].delivered.clear();
    for round in 0..ROUNDS {
        for kind in ["parked", "resumed", "cleared"] {
            let held = hold(&stock.record(kind, round, kind));
            prepared[0].holds.push(HoldChange::Put(held));
        }
        for kind in ["dead", "discarded"] {
            prepared[0].dead.push(Death {
                record: stock.record(kind, round, kind).reference(),
                attempts: 1,
                reason: "no".into(),
            });
        }
    }
    let place = &stock.place;
    place.store.settle(&place.settlement(prepared)).await.unwrap();
    let planned = vec!["('t', 'scheduled', '2000-01-01')"; ROUNDS].join(",");
    let old =
        vec!["(0, UNHEX(REPLACE(UUID(), '-', '')), 'old', '2000-01-01', '2000-01-01')"; ROUNDS].join(",");
    place
        .sql(&format!(
            "INSERT INTO {{_scheduled}} (topic, `key`, deliver_at) VALUES {planned}; \
             INSERT INTO {{_processed}} (position, message_id, topic, created_at, processed_at) VALUES {old}"
        ))
        .await;
    (proxy, stock)
}

impl Stock {
    fn record(&self, kind: &str, round: usize, payload: &str) -> Record {
        let key = format!("{kind}-{round}");
        self.records
            .iter()
            .find(|record| {
                record.message.key().unwrap().as_ref() == key.as_bytes()
                    && record.message.payload().unwrap().as_ref() == payload.as_bytes()
            })
            .unwrap()
            .clone()
    }

    /// One operation; the message of which it says that something was done to it.
    async fn operation(&self, kind: &str, round: usize) -> Result<Option<MessageId>> {
        let (place, store, owned) = (&self.place, &self.place.store, &self.owned);
        match kind {
            "lease" => drop(store.lease(&lease_request("relay")).await?),
            // Nothing is free, but a relay may be over.
            "take" => drop(store.lease(&lease_request("other")).await?),
            "release" => {
                store
                    .release(&RelayId::new("third"), owned, Membership::Leaves)
                    .await?;
            }
            "holds" => drop(store.holds(owned).await?),
            "stats" => drop(store.stats().await?),
            "list" => {
                let letters = store.dead_letters().unwrap();
                drop(letters.list(&DeadLetterQuery::default()).await?);
            }
            "inspect" => {
                let record = self.record("full-dead", 0, "full-dead");
                let inspection = store.inspection().unwrap();
                let key = Subject::Key(record.message.order_key().unwrap());
                drop(inspection.inspect(&key, 1_000).await?);
                let message = Subject::Message(record.message.id());
                drop(inspection.inspect(&message, 1_000).await?);
            }
            "promote" => {
                let scheduled = store.scheduled().unwrap();
                let promotion = scheduled.promote(&place.relay, owned, 1).await?;
                assert!(promotion.lost.is_empty());
            }
            "purge" => {
                let day = Duration::from_secs(24 * 60 * 60);
                store.retention().unwrap().purge(day, 1).await?;
            }
            "fetch" => {
                let mut reader = store.reader().await?;
                drop(reader.fetch(&request(owned, 100)).await?);
            }
            "connect" => drop(MysqlStore::connect(place.config.clone()).await?),
            "migrate" => drop(migrate(&place.config).await?),
            "simple" => {
                let record = self.record(kind, round, kind);
                let parts = delivered(owned, std::slice::from_ref(&record));
                let settled = store.settle(&place.settlement(parts)).await?;
                assert!(settled.lost.is_empty());
                return Ok(Some(record.message.id()));
            }
            "full-dead" => {
                let dead = self.record(kind, round, kind);
                let record = self.record(kind, round, "full-delivered");
                let mut parts = delivered(owned, std::slice::from_ref(&record));
                parts[0].dead.push(Death {
                    record: dead.reference(),
                    attempts: 1,
                    reason: "no".into(),
                });
                let cleared = hold(&self.record("cleared", round, "cleared"));
                parts[0].holds.push(HoldChange::Clear(cleared.reference()));
                parts[0].holds.push(HoldChange::Put(hold(&record)));
                let settled = store.settle(&place.settlement(parts)).await?;
                assert!(settled.lost.is_empty());
                return Ok(Some(dead.message.id()));
            }
            "dead" => {
                let record = self.record(kind, round, kind);
                let letters = store.dead_letters().unwrap();
                assert_eq!(letters.requeue(&[record.reference()]).await?, 1);
                return Ok(Some(record.message.id()));
            }
            "discarded" => {
                let record = self.record(kind, round, kind);
                let letters = store.dead_letters().unwrap();
                assert_eq!(letters.discard(&[record.reference()]).await?, 1);
                return Ok(Some(record.message.id()));
            }
            "parked" => {
                let record = self.record(kind, round, kind);
                let parking = store.parking().unwrap();
                drop(parking.parked(100).await?);
                assert!(parking.bury(&hold(&record).reference()).await?);
                return Ok(Some(record.message.id()));
            }
            "resumed" => {
                let record = self.record(kind, round, kind);
                let parking = store.parking().unwrap();
                assert!(parking.resume(&hold(&record).reference()).await?);
                return Ok(Some(record.message.id()));
            }
            // On a connection that goes with it.
            _ => {
                let url = place.config.url.expose_secret();
                let connected = MySqlConnection::connect(url).await;
                let mut connection = connected.map_err(|error| failed("connect", &error))?;
                let begun = connection.execute("START TRANSACTION").await;
                begun.map_err(|error| failed("begin", &error))?;
                let message = message("t", Some("enqueued"), "p");
                place.outbox.enqueue(&mut connection, &message).await?;
                let committed = connection.execute("COMMIT").await;
                committed.map_err(|error| failed("commit", &error))?;
                return Ok(Some(message.id()));
            }
        }
        Ok(None)
    }

    /// What was said to be done is done; nothing is in two places or in none; what belongs together went together; and
    /// everything goes on.
    async fn check(&self, done: &[(&str, MessageId)]) {
        let place = &self.place;
        all_idle(place).await;
        for table in [
            "{}",
            "{_lease}",
            "{_relay}",
            "{_hold}",
            "{_dead}",
            "{_scheduled}",
            "{_processed}",
            "{_sequence}",
        ] {
            place
                .sql(&format!("SELECT * FROM {table} FOR UPDATE NOWAIT"))
                .await;
        }
        for (kind, id) in done {
            let (there, expected) = match *kind {
                "simple" => ("{_processed}", 1),
                "full-dead" | "parked" => ("{_dead}", 1),
                "dead" | "discarded" => ("{_dead}", 0),
                _ => ("{}", 1),
            };
            let id = hex(id.as_bytes());
            let rows = place
                .number(&format!(
                    "SELECT COUNT(*) FROM {there} WHERE message_id = X'{id}'"
                ))
                .await;
            assert_eq!(rows, expected, "{kind} {id}");
            if *kind == "resumed" {
                let parked =
                    format!("SELECT COUNT(*) FROM {{_hold}} WHERE head_message_id = X'{id}' AND parked");
                assert_eq!(place.number(&parked).await, 0, "{kind} {id}");
            }
        }
        let everywhere = "SELECT message_id, `key`, key_seq, topic FROM {} UNION ALL \
                          SELECT message_id, `key`, key_seq, topic FROM {_dead} UNION ALL \
                          SELECT message_id, `key`, key_seq, topic FROM {_processed} WHERE topic <> 'old'";
        for unique in ["message_id", "topic, `key`, key_seq"] {
            let twice = format!(
                "SELECT COUNT(*) FROM (SELECT 1 FROM ({everywhere}) m GROUP BY {unique} HAVING COUNT(*) > 1) twice"
            );
            assert_eq!(place.number(&twice).await, 0, "twice by {unique}");
        }
        for message in &self.records {
            let (id, key) = (
                hex(message.message.id().as_bytes()),
                message.message.key().unwrap(),
            );
            let there = format!("SELECT COUNT(*) FROM ({everywhere}) m WHERE message_id = X'{id}'");
            let there = place.number(&there).await;
            assert!(there == 1 || key.starts_with(b"discarded"), "{key:?} is gone");
        }
        let of = async |table: &str, key: String| {
            place
                .number(&format!("SELECT COUNT(*) FROM {table} WHERE `key` = '{key}'"))
                .await
        };
        for round in 0..ROUNDS {
            let key = || format!("full-dead-{round}");
            let full = (
                of("{}", key()).await,
                of("{_dead}", key()).await,
                of("{_processed}", key()).await,
                of("{_hold}", key()).await,
                of("{_hold}", format!("cleared-{round}")).await,
            );
            assert!(
                [(2, 0, 0, 0, 1), (0, 1, 1, 1, 0)].contains(&full),
                "round {round}: {full:?}"
            );
            let key = || format!("parked-{round}");
            let parked = (
                of("{}", key()).await,
                of("{_dead}", key()).await,
                of("{_hold}", key()).await,
            );
            assert!(
                [(1, 0, 1), (0, 1, 0)].contains(&parked),
                "round {round}: {parked:?}"
            );
        }
        let planned = place.number("SELECT COUNT(*) FROM {_scheduled}").await;
        let promoted = of("{}", "scheduled".to_owned()).await;
        assert_eq!(planned + promoted, i64::try_from(ROUNDS).unwrap());
        // Of what was never committed, no number was used.
        for key in ["enqueued", "scheduled"] {
            let last = place
                .number(&format!(
                    "SELECT COALESCE(MAX(last), 0) FROM {{_sequence}} WHERE `key` = '{key}'"
                ))
                .await;
            assert_eq!(of("{}", key.to_owned()).await, last, "{key}");
        }
        let owned = place.lease().await;
        assert_eq!(owned, self.owned, "nobody took the lease");
        let rest = place.fetch(10_000).await;
        place.deliver(&owned, &rest).await;
        assert_eq!(place.number("SELECT COUNT(*) FROM {}").await, 0);
    }
}

/// An error of the driver's as one of ours, for producers that try again.
fn failed(operation: &'static str, error: &sqlx::Error) -> Error {
    Error::new(ErrorKind::Unavailable, operation, error.to_string())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Every operation, dropped at each of its waits on a slow network.
async fn dropped_futures_leave_nothing_half_done(server: Server) {
    let (proxy, stock) = stock(server).await;
    stock
        .place
        .sql("INSERT INTO {_relay} (relay, until) VALUES ('over', '2000-01-01')")
        .await;
    proxy.delay(Duration::from_millis(30));
    let stock = Arc::new(stock);
    let mut tasks = tokio::task::JoinSet::new();
    for kind in KINDS {
        let stock = Arc::clone(&stock);
        tasks.spawn(async move {
            let mut done = Vec::new();
            for round in 0..ROUNDS {
                let operation = async { stock.operation(kind, round).await.unwrap() };
                if let Some(id) = dropped_after(round + 1, operation).await.flatten() {
                    done.push((kind, id));
                }
            }
            done
        });
    }
    let mut done = Vec::new();
    while let Some(of_one) = tasks.join_next().await {
        done.extend(of_one.unwrap());
    }
    proxy.delay(Duration::ZERO);
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (kind, _) in &done {
        *counts.entry(kind).or_default() += 1;
    }
    println!("completed: {counts:?}");
    for kind in DOING {
        let completed = counts.get(kind).copied().unwrap_or_default();
        assert!(completed > 0, "{kind} was never let go to its end: {counts:?}");
        assert!(completed < ROUNDS, "{kind} was never dropped: {counts:?}");
    }
    stock.check(&done).await;
}

/// Cut after, or before, the server has got each thing that an operation says, from the first greeting on.
async fn a_connection_that_is_cut_fails_the_call_and_no_other(server: Server) {
    let (proxy, stock) = stock(server).await;
    let mut done = Vec::new();
    for kind in KINDS {
        let mut round = 0;
        for arrives in [true, false] {
            for number in 1.. {
                if ["lease", "take"].contains(&kind) {
                    let over = "INSERT IGNORE INTO {_relay} (relay, until) VALUES ('over', '2000-01-01')";
                    stock.place.sql(over).await;
                }
                let cuts = proxy.cuts();
                proxy.cut_at(number, arrives);
                let answer = stock.operation(kind, round).await;
                proxy.disarm();
                round += 1;
                if proxy.cuts() == cuts {
                    done.extend(answer.unwrap().map(|id| (kind, id)));
                    println!("{kind} says {} things", number - 1);
                    assert!(number > 1, "{kind} was never cut");
                    break;
                }
                let error = answer.expect_err("it was cut, and says that it is done");
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{kind}: {error:?}");
                stock.place.store.lease(&lease_request("relay")).await.unwrap();
                stock
                    .place
                    .store
                    .settle(&stock.place.settlement(delivered(&stock.owned, &[])))
                    .await
                    .unwrap();
            }
        }
        assert!(
            round <= ROUNDS || kind == "enqueue" || !DOING.contains(&kind),
            "{kind} has taken {round} rounds"
        );
    }
    stock.check(&done).await;
}

/// Cut anywhere within what the server says.
async fn an_answer_that_breaks_off_is_no_answer(server: Server) {
    let (proxy, place) = behind_proxy(server, |_| {}).await;
    place
        .enqueue(&[message("t", Some("a"), "p"), message("t", Some("b"), "p")])
        .await;
    let owned = place.store.lease(&lease_request("relay")).await.unwrap().held;
    let mut reader = place.store.reader().await.unwrap();
    let (records, _) = common::fetch(&mut reader, &request(&owned, 10)).await;
    let mut parts = delivered(&owned, &records[..1]);
    parts[0].holds.push(HoldChange::Put(hold(&records[1])));
    let settlement = place.settlement(parts);
    for kind in ["lease", "settle", "holds", "stats", "fetch"] {
        // What the answer means, when there is one.
        // A reader returns each message once, so each call has a new one. The old ones are kept: a server may have a last
        // word for a connection that ends, which would be taken for an answer.
        let mut readers = vec![place.store.reader().await.unwrap()];
        let said = std::cell::Cell::new(0);
        let mut call = async || -> Result<String> {
            let before = proxy.answered();
            let answer = match kind {
                "lease" => format!("{:?}", place.store.lease(&lease_request("relay")).await?.held),
                "settle" => format!("{:?}", place.store.settle(&settlement).await?),
                "holds" => place.store.holds(&owned).await?.len().to_string(),
                "stats" => format!("{:?}", place.store.stats().await?.parked),
                _ => {
                    let reader = readers.last_mut().unwrap();
                    let fetched = reader.fetch(&request(&owned, 10)).await;
                    said.set(proxy.answered() - before);
                    proxy.disarm();
                    readers.push(place.store.reader().await.unwrap());
                    return Ok(common::records(fetched?).0.len().to_string());
                }
            };
            said.set(proxy.answered() - before);
            Ok(answer)
        };
        let expected = call().await.unwrap();
        assert_eq!(call().await.unwrap(), expected);
        let whole = said.get();
        println!("{kind}: {whole} bytes");
        let mut places = vec![0, whole - 1];
        while let Some(place) = places.pop() {
            let cuts = proxy.cuts();
            proxy.cut_back_after(place);
            let answer = call().await.map_err(|error| error.kind());
            proxy.disarm();
            // A number in it may have become shorter.
            let cut = place < whole - 1 || proxy.cuts() > cuts;
            let right = if cut {
                Err(ErrorKind::Unavailable)
            } else {
                Ok(expected.clone())
            };
            assert_eq!(answer, right, "{kind} after {place} bytes");
            assert_eq!(call().await.unwrap(), expected, "{kind} after {place} bytes");
            let next = place + fastrand::usize(1..=whole / 15);
            if place < whole - 1 && next < whole - 8 {
                places.push(next);
            }
        }
    }
}

const BEGUN: usize = 8;

/// Times `begin` out on a slow network; says how many writes after it were said to be done and were not.
async fn lost_after_timeouts(server: Server, how: impl AsyncFn(&MySqlPool)) -> usize {
    let (proxy, place) = behind_proxy(server, |_| {}).await;
    place
        .sql(&format!("CREATE TABLE {} (a INT)", place.table("_business")))
        .await;
    let mut lost = 0;
    for number in 0..BEGUN {
        let pool = MySqlPoolOptions::new()
            .max_connections(1)
            // Or it would be asking whether the connection lives while the time runs out.
            .test_before_acquire(false)
            .connect(place.config.url.expose_secret())
            .await
            .unwrap();
        proxy.delay(Duration::from_millis(30));
        how(&pool).await;
        let insert = format!("INSERT INTO {} VALUES ({number})", place.table("_business"));
        sqlx::query(AssertSqlSafe(insert)).execute(&pool).await.unwrap();
        proxy.delay(Duration::ZERO);
        pool.close().await;
        let there = format!(
            "SELECT COUNT(*) FROM {} WHERE a = {number}",
            place.table("_business")
        );
        lost += usize::from(place.number(&there).await == 0);
    }
    lost
}

async fn a_transaction_whose_beginning_was_dropped_swallows_no_later_write(server: Server) {
    const SHORT: Duration = Duration::from_millis(10);
    let ours = lost_after_timeouts(server, async |pool| {
        assert!(tokio::time::timeout(SHORT, begin(pool)).await.is_err());
    })
    .await;
    assert_eq!(ours, 0, "writes that were said to be done are gone");
    // That the driver's own does is why ours exists. Once it no longer does, ours can go.
    let theirs = lost_after_timeouts(server, async |pool| {
        assert!(tokio::time::timeout(SHORT, pool.begin()).await.is_err());
    })
    .await;
    println!("the driver's own begin lost {theirs} of {BEGUN} writes");
    assert!(
        theirs > 0,
        "sqlx is mended: `outbox_mysql::begin` is not needed any more"
    );
}

/// Drops a transaction at its first waits; says how many of the connections cannot be used any more.
async fn stuck_after_drops(server: Server, transaction: impl AsyncFn(&Arc<Place>, &MySqlPool)) -> usize {
    let (proxy, place) = behind_proxy(server, |config| config.ordering = Ordering::Sequenced).await;
    let place = Arc::new(place);
    let mut stuck = 0;
    for polls in 1..=8 {
        let pool = MySqlPoolOptions::new()
            .max_connections(1)
            .connect(place.config.url.expose_secret())
            .await
            .unwrap();
        proxy.delay(Duration::from_millis(10));
        dropped_after(polls, transaction(&place, &pool)).await;
        proxy.delay(Duration::ZERO);
        let again = tokio::time::timeout(Duration::from_secs(2), pool.acquire()).await;
        stuck += usize::from(again.is_err());
    }
    stuck
}

/// A statement that was dropped while it was prepared lets sqlx wait for ever for an answer that was read already, and
/// what its transaction has locked stays locked. So producers who may be cancelled have a task for a transaction.
async fn a_statement_that_was_dropped_may_keep_its_connection(server: Server) {
    let ours = stuck_after_drops(server, async |place, pool| {
        let (place, pool) = (Arc::clone(place), pool.clone());
        let transaction = tokio::spawn(async move {
            let mut tx = begin(&pool).await.unwrap();
            let message = message("t", Some("k"), "p");
            place.outbox.enqueue(&mut tx, &message).await.unwrap();
            tx.commit().await.unwrap();
        });
        transaction.await.unwrap();
    })
    .await;
    assert_eq!(ours, 0);
    let theirs = stuck_after_drops(server, async |_, pool| {
        let mut tx = begin(pool).await.unwrap();
        let statement = sqlx::query("SELECT ?, ?").bind(1).bind(2);
        statement.execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
    })
    .await;
    println!("of 8 dropped statements of the driver's own {theirs} keep their connection");
    assert!(
        theirs > 0,
        "sqlx is mended: producers may be dropped, and the documentation need not warn any more"
    );
}

/// Ten messages of one key, and what became of six of them: four are delivered, one is dead and one is held.
async fn ten_messages(place: &Place) -> Settlement {
    let messages: Vec<Message> = (0..10)
        .map(|number| message("t", Some("k"), &number.to_string()))
        .collect();
    let mut tx = begin(&place.pool).await.unwrap();
    place.outbox.enqueue_many(&mut tx, &messages).await.unwrap();
    tx.commit().await.unwrap();
    let owned = place.lease().await;
    let records = place.fetch(10_000).await;
    let mut parts = delivered(&owned, &records[..4]);
    parts[0].dead.push(Death {
        record: records[4].reference(),
        attempts: 3,
        reason: "no".into(),
    });
    parts[0].holds.push(HoldChange::Put(hold(&records[5])));
    place.settlement(parts)
}

/// That what became of them is written, once.
async fn assert_settled(place: &Place) {
    let archived = if place.config.archive { 4 } else { 0 };
    for (table, rows) in [
        ("{}", 5),
        ("{_processed}", archived),
        ("{_dead}", 1),
        ("{_hold}", 1),
    ] {
        let there = place.number(&format!("SELECT COUNT(*) FROM {table}")).await;
        assert_eq!(there, rows, "{table} {:?}", place.config);
    }
}

/// What a settlement begins with.
const SETTLING: &[u8] = b"START TRANSACTION";

/// A settlement whose answer was lost may be committed. Repeated, it changes nothing more.
async fn a_settlement_of_unknown_outcome_is_repeated_without_harm(server: Server) {
    for ordering in [Ordering::Insert, Ordering::Sequenced] {
        for archive in [false, true] {
            let (proxy, place) = behind_proxy(server, |config| {
                config.ordering = ordering;
                config.archive = archive;
            })
            .await;
            let settlement = ten_messages(&place).await;
            // It is one text, its COMMIT included: the server has all of it, or none.
            proxy.cut_after(SETTLING);
            let error = place.store.settle(&settlement).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
            assert_eq!(proxy.cuts(), 1);
            until(Duration::from_secs(10), async || {
                (place.number("SELECT COUNT(*) FROM {}").await == 5).then_some(())
            })
            .await
            .expect("the server had it and committed");
            assert_settled(&place).await;
            for _ in 0..3 {
                let settled = place.store.settle(&settlement).await.unwrap();
                assert!(settled.lost.is_empty());
                assert_settled(&place).await;
            }
        }
    }
}

/// The first, whose connection is gone, may still be waiting for something in the server when it is repeated: for the
/// lease, or for one of the messages.
async fn a_settlement_is_repeated_while_the_first_still_runs(server: Server) {
    for locked in [
        "SELECT * FROM {_lease} FOR UPDATE",
        "SELECT * FROM {} ORDER BY id LIMIT 1 FOR UPDATE",
    ] {
        for archive in [false, true] {
            let (proxy, place) = behind_proxy(server, |config| config.archive = archive).await;
            let settlement = ten_messages(&place).await;
            let mut blocker = begin(&place.pool).await.unwrap();
            blocker.execute(AssertSqlSafe(place.named(locked))).await.unwrap();
            proxy.cut_after(SETTLING);
            let error = place.store.settle(&settlement).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
            assert_eq!(proxy.cuts(), 1);
            let store = place.store.clone();
            let again = tokio::spawn(async move { store.settle(&settlement).await });
            wait_for_locks(&place, 2).await;
            blocker.rollback().await.unwrap();
            assert!(again.await.unwrap().unwrap().lost.is_empty());
            all_idle(&place).await;
            assert_settled(&place).await;
        }
    }
}

/// The network says nothing any more: no call hangs, and each says that it will be worth trying again.
async fn a_silent_network_fails_each_call_in_time(server: Server) {
    let (proxy, place) = behind_proxy(server, |config| {
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
    let calls = async {
        tokio::join!(
            place.store.lease(&lease),
            reader.fetch(&asked),
            place.store.settle(&settlement),
            place.store.stats(),
            place.store.reader(),
        )
    };
    let (lease, fetch, settle, stats, reader_again) = tokio::time::timeout(Duration::from_secs(20), calls)
        .await
        .unwrap();
    for error in [
        lease.unwrap_err(),
        fetch.unwrap_err(),
        settle.unwrap_err(),
        stats.unwrap_err(),
        reader_again.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    }
    // The server's half second, two more, and one to connect.
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    proxy.blackhole(false);
    until(Duration::from_secs(10), async || {
        place.store.lease(&lease_request("relay")).await.ok()
    })
    .await
    .expect("it goes on by itself");
    place.store.settle(&settlement).await.unwrap();
    assert_eq!(place.number("SELECT COUNT(*) FROM {}").await, 0);
}

/// A firewall forgets connections, and tells nobody: also those that are on their way back to the pool.
async fn forgotten_connections_are_replaced(server: Server) {
    let (proxy, place) = behind_proxy(server, |config| {
        config.statement_timeout = Duration::from_millis(500);
        config.connect_timeout = Duration::from_secs(2);
        config.max_connections = 2;
    })
    .await;
    for _ in 0..2 {
        proxy.delay(Duration::from_millis(30));
        place.store.lease(&lease_request("relay")).await.unwrap();
        proxy.lose();
        proxy.delay(Duration::ZERO);
        until(Duration::from_secs(20), async || {
            place.store.lease(&lease_request("relay")).await.ok()
        })
        .await
        .expect("it goes on with a new connection");
    }
}

/// Whoever has locked it: a session of the outbox's, of an operator's, or one that hangs.
async fn a_statement_that_waits_for_a_lock_ends_in_time(server: Server) {
    let place = Place::with(server, |config| {
        config.statement_timeout = Duration::from_millis(500);
        config.max_connections = 2;
    })
    .await;
    place.enqueue(&[message("t", Some("k"), "p")]).await;
    let owned = place.lease().await;
    let records = place.fetch(10_000).await;
    let settlement = place.settlement(delivered(&owned, &records));
    for (locked, lease_too) in [("{_lease}", true), ("{}", false)] {
        let mut blocker = begin(&place.pool).await.unwrap();
        let lock = place.named(&format!("SELECT * FROM {locked} FOR UPDATE"));
        blocker.execute(AssertSqlSafe(lock)).await.unwrap();
        for _ in 0..2 {
            let start = Instant::now();
            let mut errors = vec![place.store.settle(&settlement).await.unwrap_err()];
            let lease = place.store.lease(&lease_request("relay")).await;
            assert_eq!(lease.is_err(), lease_too);
            errors.extend(lease.err());
            let taken = start.elapsed();
            for error in &errors {
                println!("{locked}: {error:?}");
                // Which of its two limits ends the statement, each server decides in its own way.
                assert!(error.is_retryable(), "{error:?}");
            }
            // A server's limits of locks are whole seconds.
            let calls = u32::try_from(errors.len()).unwrap();
            assert!(taken > Duration::from_millis(400) * calls, "{taken:?}");
            assert!(taken < Duration::from_millis(2_600) * calls, "{taken:?}");
            // Who only reads does not wait.
            place.store.stats().await.unwrap();
        }
        blocker.rollback().await.unwrap();
    }
    place.lease().await;
    place.store.settle(&settlement).await.unwrap();
    assert_eq!(place.number("SELECT COUNT(*) FROM {}").await, 0);
}

/// Leases that are none of its own are let alone, even looked at: another relay may just be renewing them.
async fn a_settlement_waits_for_no_lease_of_others(server: Server) {
    let place = Place::with(server, |config| config.statement_timeout = Duration::from_secs(3)).await;
    place.enqueue(&[message("t", Some("k"), "p")]).await;
    let owned = place.lease().await;
    let records = place.fetch(10_000).await;
    // So many that a server might as well go through all leases.
    let message_in = records[0].shard;
    let is_named = |shard: Shard| shard == message_in || !shard.0.is_multiple_of(3);
    let mut parts = delivered(&owned, &records);
    let named = owned
        .iter()
        .filter(|lease| lease.shard != message_in && is_named(lease.shard));
    parts.extend(named.map(|lease| ShardSettlement::new(lease.shard, lease.epoch)));
    let mut renewing = begin(&place.pool).await.unwrap();
    for other in owned.iter().filter(|lease| !is_named(lease.shard)) {
        // One by one: a range would lock what lies between.
        let lock = place.named(&format!(
            "SELECT * FROM {{_lease}} WHERE shard = {} FOR UPDATE",
            other.shard
        ));
        renewing.execute(AssertSqlSafe(lock)).await.unwrap();
    }
    let settlement = place.settlement(parts);
    assert_eq!(place.store.settle(&settlement).await.unwrap().lost, []);
    renewing.rollback().await.unwrap();
    assert_eq!(place.number("SELECT COUNT(*) FROM {}").await, 0);
}

/// Two that lock the same rows in opposite orders: the server ends the one that has done less.
async fn a_deadlock_is_none_of_the_callers_business(server: Server) {
    for kind in ["lease", "release", "settle"] {
        let place = Place::with(server, |config| config.shards = 2).await;
        place
            .sql(&format!("CREATE TABLE {} (a INT)", place.table("_business")))
            .await;
        let messages: Vec<Message> = (0..10)
            .map(|key| message("t", Some(&key.to_string()), "p"))
            .collect();
        place.enqueue(&messages).await;
        let owned = place.lease().await;
        let records = place.fetch(100).await;
        let settlement = place.settlement(delivered(&owned, &records));
        assert_eq!(settlement.shards.len(), 2);
        let mut heavy = begin(&place.pool).await.unwrap();
        let insert = format!("INSERT INTO {} VALUES (1)", place.table("_business"));
        for _ in 0..50 {
            heavy.execute(AssertSqlSafe(insert.clone())).await.unwrap();
        }
        let lock = |shard: usize| {
            AssertSqlSafe(place.named(&format!(
                "SELECT * FROM {{_lease}} WHERE shard = {shard} FOR UPDATE"
            )))
        };
        heavy.execute(lock(1)).await.unwrap();
        let (store, relay) = (place.store.clone(), place.relay.clone());
        let call = tokio::spawn(async move {
            match kind {
                "lease" => assert_eq!(store.lease(&lease_request("relay")).await?.held.len(), 2),
                "release" => store.release(&relay, &owned, Membership::Leaves).await?,
                _ => assert!(store.settle(&settlement).await?.lost.is_empty()),
            }
            Ok::<_, Error>(())
        });
        // It has the first row and waits for the second.
        wait_for_locks(&place, 1).await;
        // That we get the first, while its transaction has not ended well, is the deadlock.
        heavy.execute(lock(0)).await.unwrap();
        assert!(!call.is_finished());
        heavy.commit().await.unwrap();
        call.await.unwrap().unwrap();
        let (left, held) = (
            place.number("SELECT COUNT(*) FROM {}").await,
            place
                .number("SELECT COUNT(*) FROM {_lease} WHERE owner IS NOT NULL")
                .await,
        );
        let expected = match kind {
            "lease" => (10, 2),
            "release" => (10, 0),
            _ => (0, 2),
        };
        assert_eq!((left, held), expected, "{kind}");
    }
}

/// A relay that runs, and its end.
struct Running {
    sink: MemorySink,
    stop: oneshot::Sender<()>,
    relay: JoinHandle<Result<()>>,
}

impl Running {
    fn start(store: MysqlStore, config: RelayConfig) -> Self {
        let sink = MemorySink::new();
        let relay = Relay::new(Arc::new(store), Box::new(sink.clone())).with_config(config);
        let (stop, stopped) = oneshot::channel::<()>();
        Self {
            sink,
            stop,
            relay: tokio::spawn(relay.run(async { drop(stopped.await) })),
        }
    }

    async fn sent(&self, messages: usize) {
        tokio::time::timeout(Duration::from_secs(60), self.sink.wait_for(messages))
            .await
            .unwrap();
    }

    /// What it has delivered, once nothing is left to do.
    async fn stop(self, place: &Place) -> Vec<Record> {
        until(Duration::from_secs(60), async || {
            (place.number("SELECT COUNT(*) FROM {}").await == 0).then_some(())
        })
        .await
        .expect("everything is settled");
        self.stop.send(()).unwrap();
        self.relay.await.unwrap().unwrap();
        self.sink.delivered()
    }
}

/// What producers have committed: each key's next number, and the ids.
async fn business(place: &Place) {
    let table = place.table("_business");
    let keys: Vec<String> = (0..KEYS).map(|key| format!("({key}, 0)")).collect();
    place
        .sql(&format!(
            "CREATE TABLE {table} (id INT PRIMARY KEY, next INT NOT NULL); \
             CREATE TABLE {} (message_id BINARY(16) PRIMARY KEY); INSERT INTO {table} VALUES {}",
            place.table("_committed"),
            keys.join(",")
        ))
        .await;
}

/// A producer that repeats what failed, or may have: the number is the key's next one in a table of its own.
async fn produce(place: Arc<Place>, key: usize) {
    let (business, committed) = (place.table("_business"), place.table("_committed"));
    let mut number = 0;
    let deadline = Instant::now() + Duration::from_secs(90);
    while number < EACH {
        assert!(Instant::now() < deadline, "no server for a minute");
        let attempt = async {
            let mut tx = begin(&place.pool).await?;
            let count = format!("UPDATE {business} SET next = next + 1 WHERE id = {key}");
            let counted = tx.execute(AssertSqlSafe(count)).await;
            counted.map_err(|error| failed("count", &error))?;
            let own = format!("SELECT next FROM {business} WHERE id = {key}");
            let next: i32 = sqlx::query_scalar(AssertSqlSafe(own))
                .fetch_one(&mut *tx)
                .await
                .map_err(|error| failed("count", &error))?;
            let message = message("t", Some(&key.to_string()), &(next - 1).to_string());
            place.outbox.enqueue(&mut tx, &message).await?;
            let note = format!("INSERT INTO {committed} VALUES (?)");
            sqlx::query(AssertSqlSafe(note))
                .bind(&message.id().as_bytes()[..])
                .execute(&mut *tx)
                .await
                .map_err(|error| failed("note", &error))?;
            tx.commit().await.map_err(|error| failed("commit", &error))?;
            Ok::<_, Error>(usize::try_from(next).unwrap())
        };
        match attempt.await {
            Ok(next) => number = next,
            Err(error) => {
                assert!(error.is_retryable(), "{error:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// Nothing is lost, nothing out of order, and nothing there that was never committed.
async fn assert_exact(place: &Place, delivered: &[Record]) {
    assert_in_order(delivered, KEYS, EACH);
    let committed: Vec<Vec<u8>> = sqlx::query_scalar(AssertSqlSafe(format!(
        "SELECT message_id FROM {}",
        place.table("_committed")
    )))
    .fetch_all(&place.pool)
    .await
    .unwrap();
    let committed: BTreeSet<Vec<u8>> = committed.into_iter().collect();
    let delivered: BTreeSet<Vec<u8>> = delivered
        .iter()
        .map(|record| record.message.id().as_bytes().to_vec())
        .collect();
    let lost = committed.difference(&delivered).count();
    let phantoms = delivered.difference(&committed).count();
    assert_eq!((lost, phantoms), (0, 0), "lost, and never committed");
}

async fn a_relay_goes_on_by_itself_after_crashes_of_the_server(server: Server) {
    let own = OwnServer::start(server).await;
    let place = Place::at(server, &own.url(), |config| {
        config.connect_timeout = Duration::from_secs(2);
        config.shards = 4;
    })
    .await;
    business(&place).await;
    let place = Arc::new(place);
    let running = Running::start(
        place.store.clone(),
        RelayConfig {
            lease: Duration::from_secs(2),
            ..asking_again(Duration::from_millis(500))
        },
    );
    // Whatever fails meanwhile is worth being tried again.
    let asking = tokio::spawn({
        let place = Arc::clone(&place);
        async move {
            loop {
                let (store, other) = (&place.store, RelayId::new("other"));
                let answers = [
                    store.release(&other, &[], Membership::Leaves).await.err(),
                    store.stats().await.err(),
                    store.reader().await.err(),
                    MysqlStore::connect(place.config.clone()).await.err(),
                ];
                for error in answers.into_iter().flatten() {
                    assert!(error.is_retryable(), "{error:?}");
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    let producing: Vec<_> = (0..KEYS)
        .map(|key| tokio::spawn(produce(Arc::clone(&place), key)))
        .collect();
    for round in 1..=4 {
        running.sent(round * 100).await;
        if round < 4 {
            own.crash();
        } else {
            own.stop().await;
        }
        own.again().await;
    }
    for one in producing {
        one.await.unwrap();
    }
    assert!(!asking.is_finished(), "{:?}", asking.await);
    asking.abort();
    let delivered = running.stop(&place).await;
    assert_exact(&place, &delivered).await;
    let stats = place.store.stats().await.unwrap();
    assert_eq!((stats.dead, stats.retrying, stats.parked), (0, 0, 0));
}

/// Administrators may write whatever is set, so the relay is nobody special.
async fn a_server_that_takes_no_writes_is_waited_for(server: Server) {
    let own = OwnServer::start(server).await;
    let mut administrator = MySqlConnection::connect(&own.url()).await.unwrap();
    let name = unique("u").to_lowercase();
    let account = format!("CREATE USER {name}@'%'; GRANT ALL ON `t\\_%`.* TO {name}@'%'");
    administrator.execute(AssertSqlSafe(account)).await.unwrap();
    let url = format!(
        "{}/information_schema",
        own.url().replacen("root", &name, 1).trim_end_matches("/mysql")
    );
    let place = Place::at(server, &url, |config| config.shards = 1).await;
    place
        .enqueue(&[message("t", Some("0"), "0"), message("t", Some("0"), "1")])
        .await;
    let config = RelayConfig {
        lease: Duration::from_secs(2),
        ..asking_again(Duration::from_millis(200))
    };
    let running = Running::start(place.store.clone(), config);
    running.sent(2).await;
    until(Duration::from_secs(20), async || {
        (place.number("SELECT COUNT(*) FROM {}").await == 0).then_some(())
    })
    .await
    .expect("everything is settled");

    let settings: &[&str] = match server {
        Server::Mysql => &["read_only", "super_read_only"],
        Server::Mariadb => &["read_only"],
    };
    let set = async |on: bool, administrator: &mut MySqlConnection| {
        for setting in settings {
            let set = format!("SET GLOBAL {setting} = {on}");
            administrator.execute(AssertSqlSafe(set)).await.unwrap();
        }
    };
    let mut reader = place.store.reader().await.unwrap();
    let owned = [OwnedShard {
        shard: Shard(0),
        epoch: Epoch(1),
    }];
    let asked = request(&owned, 10);
    common::fetch(&mut reader, &asked).await;
    set(true, &mut administrator).await;
    let store = &place.store;
    let mut part = ShardSettlement::new(Shard(0), Epoch(1));
    part.delivered.push(RecordRef {
        position: Position(1),
        id: MessageId::new(),
    });
    for error in [
        store.lease(&lease_request("other")).await.unwrap_err(),
        store
            .release(&place.relay, &owned, Membership::Leaves)
            .await
            .unwrap_err(),
        store.settle(&place.settlement(vec![part])).await.unwrap_err(),
        MysqlStore::connect(place.config.clone()).await.unwrap_err(),
        migrate(&place.config).await.unwrap_err(),
        // One that has been reading, and could go on: what it has would come from the new primary, in another order.
        reader.fetch(&asked).await.unwrap_err(),
    ] {
        println!("{error:?}");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        assert!(error.to_string().contains("replica"), "{error}");
    }
    let mut producer = place.connect().await;
    let refused = place
        .outbox
        .enqueue(&mut producer, &message("t", Some("0"), "2"))
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused:?}");
    // Who only looks may.
    store.stats().await.unwrap();
    until(Duration::from_secs(20), async || {
        (place
            .number("SELECT COUNT(*) FROM {_lease} WHERE until > UTC_TIMESTAMP(6)")
            .await
            == 0)
            .then_some(())
    })
    .await
    .expect("the relay's lease is over");
    assert!(!running.relay.is_finished());

    set(false, &mut administrator).await;
    place.enqueue(&[message("t", Some("0"), "2")]).await;
    running.sent(3).await;
    assert_in_order(&running.stop(&place).await, 1, 3);
}

async fn a_promotion_that_waits_for_a_producer_leaves_the_leases_to_be_renewed(server: Server) {
    let place = Place::with(server, |config| config.ordering = Ordering::Sequenced).await;
    let due = Message::builder("t").key("k").payload("due");
    let ahead = std::time::SystemTime::now() + Duration::from_secs(3_600);
    let mut producer = begin(&place.pool).await.unwrap();
    for message in [
        message("t", Some("k"), "1"),
        due.deliver_at(ahead).build().unwrap(),
    ] {
        place.outbox.enqueue(&mut producer, &message).await.unwrap();
    }
    producer.commit().await.unwrap();
    place
        .sql("UPDATE {_scheduled} SET deliver_at = UTC_TIMESTAMP(6)")
        .await;
    let owned = place.lease().await;

    let mut producer = begin(&place.pool).await.unwrap();
    let second = message("t", Some("k"), "2");
    place.outbox.enqueue(&mut producer, &second).await.unwrap();
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
    let error = promotion.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    assert!(slowest < place.config.statement_timeout / 2, "{slowest:?}");
    producer.commit().await.unwrap();
    let promotion = scheduled.promote(&place.relay, &owned, 10).await.unwrap();
    assert_eq!(promotion.promoted, 1);
}

async fn a_renewal_that_comes_last_does_not_shorten_the_lease(server: Server) {
    let place = Place::new(server).await;
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
    let longer = |lease: &LeaseStatus| lease.time_left > Duration::from_secs(30);
    assert!(leases.iter().all(longer), "{leases:?}");
}

async fn a_network_that_cuts_is_survived_by_a_relay(server: Server) {
    let (proxy, place) = behind_proxy(server, |config| {
        config.shards = 4;
        config.connect_timeout = Duration::from_secs(2);
    })
    .await;
    business(&place).await;
    let place = Arc::new(place);
    let running = Running::start(place.store.clone(), asking_again(Duration::from_millis(100)));
    let producing: Vec<_> = (0..KEYS)
        .map(|key| tokio::spawn(produce(Arc::clone(&place), key)))
        .collect();
    let mut cuts = 0;
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end || running.sink.delivered().len() < KEYS * EACH {
        tokio::time::sleep(Duration::from_millis(100)).await;
        proxy.cut();
        cuts += 1;
        assert!(cuts < 600, "nothing gets through");
    }
    for one in producing {
        one.await.unwrap();
    }
    let delivered = running.stop(&place).await;
    println!("{} sent, {cuts} cuts", delivered.len());
    assert_exact(&place, &delivered).await;
}
