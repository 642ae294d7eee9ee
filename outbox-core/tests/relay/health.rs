//! What a probe is told.

use std::time::Duration;

use outbox_core::{
    Health, LeaseRequest, Membership, MemoryConfig, MemoryFault, MemorySink, Message, OutboxStore, Outcome,
    RelayId, Vitals,
};
use tokio::time::{Instant, sleep};

use crate::support::{Fault, MINUTE, Running, SECOND, Store, config, relay};

/// Waits until the vitals are so; panics when a minute was not enough.
async fn until(health: &Health, what: &str, so: impl Fn(&Vitals) -> bool) -> Vitals {
    let start = Instant::now();
    loop {
        let vitals = health.vitals();
        if so(&vitals) {
            return vitals;
        }
        assert!(start.elapsed() < MINUTE, "{what}: {vitals:?}");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn health_follows_store_and_sink() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let relay = relay("a", &store, &sink, config());
    let health = relay.health();
    assert_eq!(health.vitals(), Vitals::default(), "it does not run yet");
    let running = Running::start(relay);
    let vitals = until(&health, "it leases all shards", |vitals| vitals.shards == 8).await;
    assert!(vitals.store_failure.is_none() && vitals.sink_failure.is_none() && !vitals.stopping);

    store.script("fetch", vec![Fault::Error; 3]);
    until(&health, "a read that fails is told", |vitals| {
        vitals.store_failure.is_some()
    })
    .await;
    until(&health, "and forgotten with the next one", |vitals| {
        vitals.store_failure.is_none()
    })
    .await;

    // The leases run out, and it goes on to say since when.
    store.script("lease", vec![Fault::Error; 30]);
    let vitals = until(&health, "it is told how old the last lease is", |vitals| {
        vitals.leased_ago > Some(config().lease)
    })
    .await;
    assert!(vitals.store_failure.is_some_and(|failure| !failure.is_empty()));
    assert!(
        vitals.turned_ago < Some(SECOND * 11),
        "its loop goes round all the same"
    );
    until(&health, "it leases again", |vitals| {
        vitals.store_failure.is_none()
    })
    .await;

    sink.fail(MemoryFault::new(Outcome::Outage("the broker is away".into())).times(5));
    store
        .enqueue_message(&Message::builder("t").payload("1").build().unwrap())
        .await;
    let vitals = until(&health, "an outage is told", |vitals| {
        vitals.sink_failure.is_some()
    })
    .await;
    assert!(
        vitals
            .sink_failure
            .is_some_and(|failure| failure.contains("the broker is away"))
    );
    until(&health, "and forgotten when it is over", |vitals| {
        vitals.sink_failure.is_none()
    })
    .await;

    for operation in ["settle", "holds"] {
        sink.fail(MemoryFault::new(Outcome::Retry("not yet".into())).times(4));
        store.always(operation, Fault::Error);
        store.enqueue("t", Some("k"), "2").await;
        until(&health, operation, |vitals| vitals.store_failure.is_some()).await;
        sleep(SECOND * 5).await;
        assert!(
            health.vitals().store_failure.is_some(),
            "that others succeed meanwhile does not make up for {operation}"
        );
        store.always(operation, Fault::None);
        until(&health, operation, |vitals| vitals.store_failure.is_none()).await;
    }

    running.stop().await;
    assert!(health.vitals().stopping, "it was told to stop");
}

#[tokio::test(start_paused = true)]
async fn a_relay_whose_shards_are_anothers_has_no_failure_left_of_them() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let relay = relay("a", &store, &sink, config());
    let (id, health) = (relay.id().clone(), relay.health());
    let running = Running::start(relay);
    until(&health, "it leases", |vitals| vitals.shards == 8).await;
    store.always("fetch", Fault::Error);
    until(&health, "a read fails", |vitals| vitals.store_failure.is_some()).await;

    let request = |relay, want| LeaseRequest {
        relay,
        want,
        ttl: MINUTE * 60,
    };
    let held = store.memory.lease(&request(id.clone(), 8)).await.unwrap().held;
    store.memory.release(&id, &held, Membership::Stays).await.unwrap();
    let other = request(RelayId::new("other"), 8);
    assert_eq!(store.memory.lease(&other).await.unwrap().held.len(), 8);
    let vitals = until(&health, "it is told", |vitals| vitals.shards == 0).await;
    assert_eq!(vitals.store_failure, None);
    running.stop().await;
}
