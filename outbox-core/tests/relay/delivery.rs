//! What goes right: order, time, an orderly end.

use std::collections::BTreeMap;
use std::time::Duration;

use outbox_core::{
    DeadLetters, MemoryConfig, MemorySink, Message, OnFailure, OutboxStore, Outcome, RelayConfig,
};
use tokio::time::{Instant, sleep, timeout};

use crate::support::{MINUTE, Running, SECOND, Store, config, delivered, relay, start, texts};

#[tokio::test(start_paused = true)]
async fn several_relays_deliver_in_order_and_once() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.set_latency(Duration::from_millis(3));
    let relays: Vec<_> = ["a", "b", "c"]
        .map(|name| start(name, &store, &sink, config()))
        .into_iter()
        .collect();
    for n in 0..50 {
        for key in 0..20 {
            store
                .enqueue("t", Some(&format!("k{key}")), format!("{key} {n}"))
                .await;
        }
        sleep(Duration::from_millis(20)).await;
    }
    delivered(&sink, 1_000, MINUTE).await;
    sleep(MINUTE).await;
    let mut next: BTreeMap<String, usize> = BTreeMap::new();
    for line in texts(&sink.delivered()) {
        let (key, n) = line.split_once(' ').unwrap();
        let next = next.entry(key.to_owned()).or_default();
        assert_eq!(n.parse::<usize>().unwrap(), *next, "key {key}");
        *next += 1;
    }
    assert!(store.memory.pending().is_empty());
    for relay in relays {
        relay.stop().await;
    }
    assert!(store.owners().await.is_empty());
    assert!(store.memory.stats().await.unwrap().relays.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_waker_wakes_at_once() {
    let config = RelayConfig {
        poll_idle: Duration::from_secs(30),
        ..config()
    };
    let quiet = MemoryConfig {
        wake_up: false,
        scheduled: false,
        ..MemoryConfig::default()
    };
    let (store, sink) = (Store::new(quiet), MemorySink::new());
    let relay = relay("a", &store, &sink, config);
    let waker = relay.waker();
    let running = Running::start(relay);
    sleep(MINUTE * 5).await;
    store.enqueue("t", None, "x").await;
    waker.wake();
    delivered(&sink, 1, Duration::from_millis(5)).await;
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn scheduled_messages_go_when_they_are_due() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let running = start("a", &store, &sink, config());
    let message = Message::builder("t")
        .payload("x")
        .deliver_at(store.memory.now() + SECOND * 5);
    store.enqueue_message(&message.build().unwrap()).await;
    sleep(Duration::from_millis(4_990)).await;
    assert!(sink.delivered().is_empty());
    delivered(&sink, 1, Duration::from_millis(1_100)).await;
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_archive_is_purged_faster_than_it_fills() {
    let archive = MemoryConfig {
        archive: true,
        ..MemoryConfig::default()
    };
    let (store, sink) = (Store::new(archive), MemorySink::new());
    let config = RelayConfig {
        retention: MINUTE * 60,
        ..config()
    };
    let running = start("a", &store, &sink, config);
    for n in 0..5_000 {
        store.enqueue("t", None, n.to_string()).await;
    }
    delivered(&sink, 5_000, MINUTE).await;
    sleep(MINUTE * 59).await;
    assert_eq!(store.memory.stats().await.unwrap().processed.value(), 5_000);
    sleep(MINUTE + SECOND * 15).await;
    assert_eq!(store.memory.stats().await.unwrap().processed.value(), 0);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_orderly_end_settles_and_releases() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.set_latency(SECOND * 2);
    let running = start("a", &store, &sink, config());
    store.enqueue("t", Some("k"), "1").await;
    sleep(SECOND).await;
    let begin = Instant::now();
    running.stop().await;
    assert!(begin.elapsed() <= SECOND * 2, "{:?}", begin.elapsed());
    assert_eq!(texts(&sink.delivered()), ["1"]);
    assert!(store.memory.pending().is_empty());
    assert!(store.owners().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_a_lease_that_was_asked_for_brings_to_a_relay_that_stops_is_released() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let running = start("a", &store, &sink, config());
    // The first only joins; the second takes the shards while the relay is told to stop.
    store.script(
        "lease",
        [
            crate::support::Fault::None,
            crate::support::Fault::Late(SECOND / 2),
        ],
    );
    sleep(SECOND / 4).await;
    running.stop().await;
    assert!(store.owners().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_end_waits_no_longer_than_the_grace() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.set_latency(MINUTE * 60);
    let running = start("a", &store, &sink, config());
    store.enqueue("t", Some("k"), "1").await;
    sleep(SECOND).await;
    let begin = Instant::now();
    running.stop().await;
    assert!(begin.elapsed() >= SECOND * 10);
    assert!(begin.elapsed() <= SECOND * 11, "{:?}", begin.elapsed());
    assert_eq!(store.memory.pending().len(), 1);
    assert!(store.owners().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_end_does_not_wait_for_a_store_that_is_silent() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let running = start("a", &store, &sink, config());
    sleep(SECOND).await;
    for operation in ["lease", "release", "settle", "fetch", "holds", "stats"] {
        store.always(operation, crate::support::Fault::Hang);
    }
    store.enqueue("t", Some("k"), "1").await;
    let begin = Instant::now();
    running.stop().await;
    assert!(begin.elapsed() <= SECOND * 13, "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn dropping_run_stops_everything() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.set_latency(SECOND);
    for n in 0..100 {
        store.enqueue("t", Some("k"), n.to_string()).await;
    }
    let run = relay("a", &store, &sink, config()).run(std::future::pending());
    assert!(timeout(SECOND / 2, run).await.is_err());
    assert_eq!(store.handles(), 1);
    let calls = store.all_calls();
    sleep(MINUTE).await;
    assert_eq!(store.all_calls(), calls);
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_though_keys_are_parked() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.fail(outbox_core::MemoryFault::new(Outcome::Poison("no".into())).key("bad"));
    for n in 0..10 {
        store.enqueue("t", Some("bad"), format!("bad {n}")).await;
        store.enqueue("t", Some("good"), n.to_string()).await;
    }
    let config = RelayConfig {
        on_failure: OnFailure::Park,
        ..config()
    };
    let drain = relay("a", &store, &sink, config).drain(std::future::pending());
    timeout(MINUTE, drain).await.unwrap().unwrap();
    assert_eq!(sink.delivered().len(), 10);
    assert_eq!(store.memory.pending().len(), 10);
    assert!(store.owners().await.is_empty());
    assert!(
        DeadLetters::list(&store.memory, &outbox_core::DeadLetterQuery::default())
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_when_others_have_delivered_what_is_theirs() {
    // Of one shard the other has all, and nothing but its looking keeps the drain awake.
    for shards in [8, 1] {
        let sharded = MemoryConfig {
            shards,
            ..MemoryConfig::default()
        };
        let (store, sink) = (Store::new(sharded), MemorySink::new());
        sink.set_latency(SECOND * 5);
        let other = start("a", &store, &sink, config());
        sleep(SECOND).await;
        store.enqueue("t", Some("k"), "1").await;
        sleep(SECOND / 2).await;
        let (begin, before) = (Instant::now(), store.calls("stats"));
        let drain = relay("b", &store, &MemorySink::new(), config()).drain(std::future::pending());
        timeout(MINUTE, drain).await.unwrap().unwrap();
        let took = begin.elapsed();
        assert_eq!(texts(&sink.delivered()), ["1"]);
        assert!((SECOND * 4..SECOND * 6).contains(&took), "{took:?}");
        let looks = store.calls("stats") - before;
        assert!(
            (20..=35).contains(&looks),
            "it looks five times a second: {looks} of {shards} shards"
        );
        other.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_does_not_end_while_others_have_something_left() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.set_latency(MINUTE);
    let other = start("a", &store, &sink, config());
    sleep(SECOND).await;
    store.enqueue("t", Some("k"), "1").await;
    sleep(SECOND / 2).await;
    let drain = relay("b", &store, &MemorySink::new(), config()).drain(std::future::pending());
    assert!(timeout(SECOND * 50, drain).await.is_err());
    other.kill().await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_though_keys_that_another_owns_are_parked() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.fail(outbox_core::MemoryFault::new(Outcome::Poison("no".into())));
    for n in 0..20 {
        store.enqueue("t", Some(&format!("k{n}")), "bad").await;
    }
    let parking = RelayConfig {
        on_failure: OnFailure::Park,
        ..config()
    };
    let other = start("a", &store, &sink, parking.clone());
    sleep(SECOND * 5).await;
    assert_eq!(store.memory.stats().await.unwrap().parked, 20);
    let drain = relay("b", &store, &sink, parking).drain(std::future::pending());
    timeout(MINUTE, drain).await.unwrap().unwrap();
    assert_eq!(store.owners().await.keys().collect::<Vec<_>>(), ["a"]);
    other.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_delivers_what_was_scheduled_and_is_due_by_now() {
    // With and without others before it, for which it would look anyway.
    for others in [0, 3] {
        let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
        let scheduled = async |payload: &str, ahead| {
            let message = Message::builder("t")
                .payload(payload.to_owned())
                .deliver_at(std::time::SystemTime::now() + ahead);
            store.enqueue_message(&message.build().unwrap()).await;
        };
        scheduled("soon", SECOND * 2).await;
        scheduled("late", MINUTE * 60).await;
        sleep(SECOND * 3).await;
        for _ in 0..others {
            store.enqueue("t", None, "now").await;
        }
        let drain = relay("a", &store, &sink, config()).drain(std::future::pending());
        timeout(MINUTE, drain).await.unwrap().unwrap();
        let delivered = texts(&sink.delivered());
        assert_eq!(delivered.len(), others + 1);
        assert!(delivered.contains(&"soon".to_owned()), "{delivered:?}");
    }
}

/// The end of a drain is as orderly as any other: it gives up what does not answer.
#[tokio::test(start_paused = true)]
async fn a_drain_that_has_nothing_left_ends_though_the_store_does_not_answer() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let other = start("a", &store, &sink, config());
    sleep(SECOND).await;
    let one = RelayConfig {
        grace: SECOND,
        ..config()
    };
    let relay = relay("b", &store, &sink, one);
    let health = relay.health();
    store.always("release", crate::support::Fault::Hang);
    let drain = relay.drain(std::future::pending());
    timeout(SECOND * 10, drain).await.unwrap().unwrap();
    assert!(health.vitals().stopping);
    other.kill().await;
}

#[tokio::test(start_paused = true)]
async fn one_relay_of_many_looks_after_the_whole_outbox_every_ten_seconds() {
    let archive = MemoryConfig {
        archive: true,
        ..MemoryConfig::default()
    };
    let (store, sink) = (Store::new(archive), MemorySink::new());
    let relays = ["a", "b", "c"].map(|name| start(name, &store, &sink, config()));
    sleep(SECOND * 20).await;
    for (operation, fault) in [
        ("stats", crate::support::Fault::None),
        ("purge", crate::support::Fault::None),
        ("stats", crate::support::Fault::Error),
        ("purge", crate::support::Fault::Error),
        ("stats", crate::support::Fault::Late(SECOND * 15)),
        ("purge", crate::support::Fault::Late(SECOND * 15)),
    ] {
        store.always(operation, fault);
        sleep(SECOND * 30).await;
        let before = store.calls(operation);
        sleep(SECOND * 120).await;
        let calls = store.calls(operation) - before;
        // A call that takes longer than that is not joined by a second one.
        let expected = if matches!(fault, crate::support::Fault::Late(_)) {
            6..=9
        } else {
            11..=13
        };
        assert!(expected.contains(&calls), "{operation} {fault:?}: {calls}");
    }
    for relay in relays {
        relay.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_relay_without_the_first_shard_looks_after_nothing() {
    let archive = MemoryConfig {
        archive: true,
        ..MemoryConfig::default()
    };
    let (store, sink) = (Store::new(archive), MemorySink::new());
    // It only joins: its second renewal, which would bring it shards, never succeeds.
    store.script("lease", [crate::support::Fault::None]);
    store.always("lease", crate::support::Fault::Error);
    let running = start("a", &store, &sink, config());
    sleep(MINUTE).await;
    assert_eq!((store.calls("stats"), store.calls("purge")), (0, 0));
    running.stop().await;
}

/// A sink that answers nothing, not even a purge.
#[derive(Debug)]
struct Deaf;

#[async_trait::async_trait]
impl outbox_core::Sink for Deaf {
    fn capabilities(&self) -> outbox_core::SinkCapabilities {
        outbox_core::SinkCapabilities {
            name: "deaf",
            stops_key_at_failure: true,
        }
    }

    async fn publish(&mut self, _: Vec<outbox_core::Record>) -> outbox_core::Receipt {
        std::future::pending().await
    }

    async fn probe(&mut self) -> outbox_core::Result<()> {
        std::future::pending().await
    }

    async fn purge(&mut self) {
        std::future::pending().await
    }

    async fn rebuild(&mut self) -> outbox_core::Result<()> {
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn an_end_does_not_wait_for_a_sink_that_is_deaf() {
    let store = Store::new(MemoryConfig::default());
    let running = Running::start(
        outbox_core::Relay::new(std::sync::Arc::new(store.clone()), Box::new(Deaf)).with_config(config()),
    );
    store.enqueue("t", Some("k"), "1").await;
    sleep(SECOND).await;
    let begin = Instant::now();
    running.stop().await;
    assert!(begin.elapsed() <= SECOND * 13, "{:?}", begin.elapsed());
}
