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
    ErrorKind, LeaseRequest, MemorySink, Message, OutboxStore, Relay, RelayConfig, RelayId, Settlement,
};
use outbox_mongo::mongodb::bson::doc;
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
        let short = LeaseRequest {
            ttl: Duration::from_millis(500),
            ..lease_request("relay")
        };
        place.store.lease(&short).await.unwrap();
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
