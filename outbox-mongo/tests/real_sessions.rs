//! What happens to calls when the network, the server or the caller gives up, on a real server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

mod common;
#[path = "../../tests/proxy/mod.rs"]
mod proxy;
#[path = "common/server.rs"]
mod server;
#[path = "../../tests/trouble/mod.rs"]
mod trouble;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Place, delivered, message, records, request, variable};
use outbox_core::{
    ErrorKind, LeaseRequest, Membership, MemorySink, Message, OutboxStore, Reader, Relay, RelayConfig,
    RelayId, Settlement, Subject,
};
use outbox_mongo::mongodb::bson::{Bson, Document, doc};
use outbox_mongo::{MongoConfig, MongoStore, migrate};
use proxy::Proxy;
use server::OwnServer;
use trouble::{EACH, KEYS, asking_again, assert_in_order, dropped_after, lease_request};

/// Host and port in the server's URL.
fn address() -> String {
    let url = variable("OUTBOX_TEST_MONGO");
    let rest = url.strip_prefix("mongodb://").unwrap();
    rest.split('/').next().unwrap().to_owned()
}

/// A place whose store is behind a proxy, and whose producers are not.
async fn behind_proxy(adjust: impl FnOnce(&mut MongoConfig)) -> (Proxy, Place) {
    let proxy = Proxy::before(address()).await;
    let mut place = Place::new().await;
    let url = format!(
        "mongodb://127.0.0.1:{}/{}?directConnection=true",
        proxy.port(),
        place.database
    );
    let mut config = MongoConfig::new(url);
    adjust(&mut config);
    place.store = MongoStore::connect(config).await.unwrap();
    (proxy, place)
}

/// Ten messages, fetched, and the settlement that delivers them.
async fn ten_messages(place: &Place) -> Settlement {
    let ten: Vec<Message> = (0..10)
        .map(|number| message("orders", Some(&number.to_string()), "placed"))
        .collect();
    place.enqueue(&ten).await;
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    let (records, _) = records(reader.fetch(&request(&owned, 100)).await.unwrap());
    assert_eq!(records.len(), 10);
    place.settlement(delivered(&owned, &records))
}

/// So long from the server's own time.
fn from_now(span: Duration) -> Document {
    let millis = i64::try_from(span.as_millis()).unwrap();
    doc! { "$dateAdd": { "startDate": "$$NOW", "unit": "millisecond", "amount": millis } }
}

/// Each call ends in time although nobody answers, and works again afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_network_fails_each_call_in_time() {
    let (proxy, place) = behind_proxy(|config| {
        config.statement_timeout = Duration::from_secs(2);
        config.connect_timeout = Duration::from_secs(2);
    })
    .await;
    let settlement = ten_messages(&place).await;
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    proxy.blackhole(true);
    let begin = Instant::now();
    let (settled, fetched, stats) = tokio::join!(
        place.store.settle(&settlement),
        async { reader.fetch(&request(&owned, 100)).await.map(drop) },
        place.store.stats(),
    );
    for error in [settled.unwrap_err(), fetched.unwrap_err(), stats.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    }
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    proxy.blackhole(false);
    proxy.lose();
    let settled = common::until(Duration::from_secs(30), async || {
        place.store.settle(&settlement).await.ok()
    })
    .await;
    assert_eq!(settled.unwrap().lost, []);
    let stats = common::until(Duration::from_secs(30), async || place.store.stats().await.ok()).await;
    assert_eq!(stats.unwrap().backlog.value(), 0);
}

/// A settlement whose result is not known is repeated, and changes nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_of_unknown_outcome_is_repeated_without_harm() {
    // In each place of its conversation once.
    for cut in 1..=12 {
        for arrives in [true, false] {
            let (proxy, place) = behind_proxy(|_| {}).await;
            let settlement = ten_messages(&place).await;
            proxy.cut_at(cut, arrives);
            let first = place.store.settle(&settlement).await;
            proxy.disarm();
            if let Err(error) = first {
                assert!(error.is_retryable(), "{error:?}");
            }
            let again = common::until(Duration::from_secs(30), async || {
                place.store.settle(&settlement).await.ok()
            });
            assert_eq!(again.await.unwrap().lost, []);
            let left = place.collection("").count_documents(doc! {}).await.unwrap();
            assert_eq!(left, 0, "cut at {cut}");
        }
    }
}

/// Whoever drops a call anywhere finds everything done, or nothing.
#[tokio::test(flavor = "multi_thread")]
async fn dropped_futures_leave_nothing_half_done() {
    let place = Place::new().await;
    for polls in 1..=20 {
        let settlement = ten_messages(&place).await;
        let settled = dropped_after(polls, place.store.settle(&settlement)).await;
        // What the driver aborts for whoever dropped a transaction, it aborts soon.
        let again = place.store.settle(&settlement).await.unwrap();
        assert_eq!(again.lost, [], "{settled:?}");
        let left = place.collection("").count_documents(doc! {}).await.unwrap();
        assert_eq!(left, 0, "after {polls} polls");

        let mut session = place.begin().await;
        let one = message("orders", Some("42"), "placed");
        let enqueued = dropped_after(polls, place.outbox.enqueue(&mut session, &one)).await;
        drop(session);
        if enqueued.is_none() {
            let count = async || {
                let left = place.collection("").count_documents(doc! {}).await.unwrap();
                (left == 0).then_some(())
            };
            let gone = common::until(Duration::from_secs(10), count).await;
            assert!(gone.is_some(), "a transaction that was dropped wrote something");
        }
    }
}

/// What a relay leaves open that is gone, the one that takes over ends: the server itself would wait for a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_a_relay_that_is_gone_holds_nobody_up() {
    let mut open = 0;
    for polls in 1..=20 {
        let place = Place::new().await;
        let settlement = ten_messages(&place).await;
        // Its leases are over soon; a renewal would not shorten them.
        let soon = vec![doc! { "$set": { "until": from_now(Duration::from_millis(500)) } }];
        let leases = place.collection("_lease");
        leases.update_many(doc! { "owner": "relay" }, soon).await.unwrap();
        let settled = dropped_after(polls, place.store.settle(&settlement)).await;
        open += usize::from(settled.is_none());
        let heir = MongoStore::connect(place.config.clone()).await.unwrap();
        let begin = Instant::now();
        let all = common::until(Duration::from_secs(50), async || {
            let held = heir.lease(&lease_request("heir")).await.ok()?.held;
            (held.len() == 64).then_some(held)
        });
        let owned = all.await.unwrap();
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "{:?} after {polls} polls",
            begin.elapsed()
        );
        let mut reader = heir.reader().await.unwrap();
        let (records, _) = records(reader.fetch(&request(&owned, 100)).await.unwrap());
        let settlement = Settlement {
            relay: RelayId::new("heir"),
            shards: delivered(&owned, &records),
        };
        assert_eq!(heir.settle(&settlement).await.unwrap().lost, []);
        assert_eq!(place.collection("").count_documents(doc! {}).await.unwrap(), 0);
    }
    assert!(open > 3, "only {open} settlements were dropped");
}

/// A relay goes on by itself when its server crashes and comes back, with all that was committed, in order.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_goes_on_by_itself_after_crashes_of_the_server() {
    let server = OwnServer::start(&[]).await;
    let config = MongoConfig {
        connect_timeout: Duration::from_secs(2),
        ..MongoConfig::new(server.url())
    };
    migrate(&config).await.unwrap();
    let store = MongoStore::connect(config.clone()).await.unwrap();
    let sink = MemorySink::new();
    let relay = Relay::new(Arc::new(store), Box::new(sink.clone())).with_config(RelayConfig {
        lease: Duration::from_secs(2),
        ..asking_again(Duration::from_millis(100))
    });
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(async move {
        relay
            .run(async {
                let _ = stopped.await;
            })
            .await
    });
    let outbox = outbox_mongo::MongoOutbox::new(&config).unwrap();
    let client = common::client(&server.url()).await;
    for round in 0..EACH {
        if round % 40 == 20 {
            server.kill();
            tokio::time::sleep(Duration::from_millis(300)).await;
            server.again().await;
        }
        let all: Vec<Message> = (0..KEYS)
            .map(|key| message("orders", Some(&key.to_string()), &round.to_string()))
            .collect();
        // Whether a commit that failed was done is seen by its messages.
        loop {
            let written = async {
                let mut session = client.start_session().await?;
                session.start_transaction().await?;
                outbox
                    .enqueue_many(&mut session, &all)
                    .await
                    .map_err(outbox_mongo::driver_error)?;
                session.commit_transaction().await
            };
            match written.await {
                Ok(()) => break,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
    // What a commit without an answer had written after all comes twice.
    let different = || {
        let name =
            |record: &outbox_core::Record| (record.message.key().cloned(), record.message.payload().cloned());
        sink.delivered().iter().map(name).collect::<BTreeSet<_>>().len()
    };
    let arrived = common::until(Duration::from_secs(60), async || {
        (different() == KEYS * EACH).then_some(())
    });
    assert!(arrived.await.is_some(), "{} arrived", different());
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
    assert_in_order(&sink.delivered(), KEYS, EACH);
}

/// A server of a test's own that fails as it is told to, and a store whose commands it knows from others'.
async fn failing() -> (OwnServer, Place) {
    let server = OwnServer::start(&["--enable-test-commands"]).await;
    let mut place = Place::at(&server.url(), |_| {}).await;
    let url = format!("{}?appName=relay", place.direct);
    place.store = MongoStore::connect(MongoConfig::new(url)).await.unwrap();
    (server, place)
}

/// How these commands of the store fail from now on.
async fn fails(place: &Place, mode: impl Into<Bson>, command: &str, how: Document) {
    let mut data = how;
    data.insert("failCommands", vec![command]);
    data.insert("appName", "relay");
    let fail = doc! { "configureFailPoint": "failCommand", "mode": mode.into(), "data": data };
    place.client.database("admin").run_command(fail).await.unwrap();
}

/// What was read in a snapshot is told to nobody when it cannot be confirmed: after a fail-over it may never have been.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_majority_confirms_is_told_to_nobody() {
    let (_server, place) = failing().await;
    let one = message("orders", Some("42"), "placed");
    place.enqueue(std::slice::from_ref(&one)).await;
    let (store, owned) = (&place.store, place.lease().await);
    let subject = Subject::Key(one.order_key().unwrap());
    // A server that goes, a majority that does not answer in time, a server that does not know the transaction.
    for (code, asked) in [
        (91_i32, "fetch"),
        (64, "fetch"),
        (251, "fetch"),
        (251, "lease"),
        (251, "holds"),
        (251, "inspect"),
    ] {
        let mut reader = reader_again(store).await;
        // The driver itself asks once more.
        let twice = doc! { "times": 2 };
        fails(&place, twice, "commitTransaction", doc! { "errorCode": code }).await;
        let told = match asked {
            "fetch" => reader.fetch(&request(&owned, 10)).await.map(drop),
            "lease" => store.lease(&lease_request("relay")).await.map(drop),
            "holds" => store.holds(&owned).await.map(drop),
            _ => {
                let inspection = store.inspection().unwrap();
                inspection.inspect(&subject, 10).await.map(drop)
            }
        };
        let error = told.expect_err(asked);
        assert!(error.is_retryable(), "{asked}: {error:?}");
        fails(&place, "off", "commitTransaction", doc! {}).await;
    }
    // The next one reads it again.
    let mut reader = reader_again(store).await;
    let (records, _) = records(reader.fetch(&request(&owned, 10)).await.unwrap());
    assert_eq!(records.len(), 1);
}

/// A reader, as soon as the driver has noticed that the server it was told to be going is there.
async fn reader_again(store: &MongoStore) -> Box<dyn Reader> {
    for _ in 0..20 {
        match store.reader().await {
            Err(error) if error.kind() == ErrorKind::Unavailable => {}
            reader => return reader.unwrap(),
        }
    }
    panic!("the driver does not find its server again");
}

/// A renewal that was given up, and is carried out when a later one has been, takes back nothing of it.
#[tokio::test]
async fn a_renewal_never_shortens_a_lease() {
    let place = Place::new().await;
    let (long, short) = (Duration::from_secs(600), Duration::from_secs(2));
    let lease = async |ttl| {
        let request = LeaseRequest {
            ttl,
            ..lease_request("relay")
        };
        place.store.lease(&request).await.unwrap()
    };
    let left = async || {
        let all = place.store.stats().await.unwrap().leases;
        all.iter().map(|lease| lease.time_left).min().unwrap()
    };
    let owned = lease(long).await;
    let again = lease(short).await;
    assert_eq!(again.held, owned.held);
    assert!(again.time_left <= short, "no more than was asked for");
    assert!(left().await > long / 2, "{:?}", left().await);
    let member = doc! { "_id": "relay", "$expr": { "$gt": ["$until", from_now(long / 2)] } };
    let members = place.collection("_lease");
    assert_eq!(members.count_documents(member).await.unwrap(), 1);
    // What was released is taken anew.
    let (relay, stays) = (RelayId::new("relay"), Membership::Stays);
    place.store.release(&relay, &owned.held, stays).await.unwrap();
    lease(short).await;
    assert!(left().await <= short, "{:?}", left().await);
}

/// What is left of a lease is read, not assumed: a relay counts on no more.
#[tokio::test(flavor = "multi_thread")]
async fn the_time_that_is_left_is_what_the_server_says() {
    let (_server, place) = failing().await;
    let owned = place.lease().await;
    let late = doc! { "blockConnection": true, "blockTimeMS": 1_000 };
    fails(&place, "alwaysOn", "aggregate", late).await;
    let again = place.store.lease(&lease_request("relay")).await.unwrap();
    assert_eq!(again.held, owned);
    let most = lease_request("relay").ttl - Duration::from_millis(900);
    assert!(again.time_left <= most, "{:?}", again.time_left);
}

/// A server that stands alone is refused, and told what to do about it.
#[tokio::test]
async fn a_server_that_stands_alone_is_refused() {
    let server = OwnServer::started(&["--standalone"]);
    let config = MongoConfig::new(server.url());
    let refused = common::until(Duration::from_secs(60), async || {
        let error = migrate(&config).await.unwrap_err();
        (error.kind() != ErrorKind::Unavailable).then_some(error)
    });
    let error = refused.await.unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
    assert!(error.to_string().contains("rs.initiate"), "{error}");
}

/// The change stream wakes; one that broke is opened again without anybody's doing.
#[tokio::test(flavor = "multi_thread")]
async fn the_change_stream_wakes_and_comes_back() {
    let server = OwnServer::start(&[]).await;
    let config = MongoConfig {
        change_stream: true,
        connect_timeout: Duration::from_secs(2),
        ..MongoConfig::new(server.url())
    };
    migrate(&config).await.unwrap();
    let store = MongoStore::connect(config.clone()).await.unwrap();
    let client = common::client(&server.url()).await;
    let outbox = outbox_mongo::MongoOutbox::new(&config).unwrap();
    let mut wake_up = store.wake_up().unwrap();
    for round in 0..2 {
        let (woken, enough) = tokio::sync::oneshot::channel::<()>();
        let waiting = tokio::spawn(async move {
            wake_up.wait().await;
            woken.send(()).unwrap();
            wake_up
        });
        if round == 1 {
            server.kill();
            server.again().await;
        }
        // It may be opened later than something is committed: hints are no promises.
        let committing = async {
            loop {
                let written = async {
                    let mut session = client.start_session().await?;
                    session.start_transaction().await?;
                    let one = message("orders", Some("42"), "placed");
                    let enqueued = outbox.enqueue(&mut session, &one).await;
                    enqueued.map_err(outbox_mongo::driver_error)?;
                    session.commit_transaction().await
                };
                let _: outbox_mongo::mongodb::error::Result<()> = written.await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            told = tokio::time::timeout(Duration::from_secs(60), enough) => told.unwrap().unwrap(),
            () = committing => {}
        }
        wake_up = waiting.await.unwrap();
    }
}
