//! Several relays, and a store that fails.

use std::time::Duration;

use outbox_core::{MemoryConfig, MemorySink, OutboxStore, RelayConfig};
use tokio::time::{Instant, sleep};

use crate::support::{Fault, MINUTE, Running, SECOND, Store, config, delivered, relay, start, texts};

#[tokio::test(start_paused = true)]
async fn shards_are_shared_fairly_with_those_that_join_leave_and_die() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let first = start("a", &store, &sink, config());
    sleep(SECOND).await;
    assert_eq!(store.owners().await, [("a".to_owned(), 8)].into());
    let second = start("b", &store, &sink, config());
    sleep(SECOND * 3).await;
    assert_eq!(
        store.owners().await,
        [("a".to_owned(), 4), ("b".to_owned(), 4)].into()
    );
    let third = start("c", &store, &sink, config());
    sleep(SECOND * 4).await;
    let owners = store.owners().await;
    assert_eq!(owners.values().sum::<usize>(), 8);
    assert!(owners.values().all(|shards| *shards <= 3), "{owners:?}");
    third.stop().await;
    sleep(SECOND * 2).await;
    assert_eq!(
        store.owners().await,
        [("a".to_owned(), 4), ("b".to_owned(), 4)].into()
    );

    // A dead relay's shards are read again a second after its lease at the latest.
    second.kill().await;
    let begin = Instant::now();
    for n in 0..64 {
        store.enqueue("t", Some(&format!("k{n}")), n.to_string()).await;
    }
    delivered(&sink, 64, SECOND * 4).await;
    assert!(begin.elapsed() > SECOND);
    assert_eq!(store.owners().await, [("a".to_owned(), 8)].into());
    first.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_and_hangs_loses_nothing() {
    for operation in ["lease", "release", "holds", "reader", "fetch", "settle", "stats"] {
        for fault in [Fault::Error, Fault::Lost, Fault::Hang, Fault::Late(SECOND)] {
            let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
            let config = RelayConfig {
                call_timeout: SECOND * 2,
                ..config()
            };
            store.script(operation, [Fault::None, fault, fault, Fault::None, fault]);
            let running = start("a", &store, &sink, config);
            for n in 0..30 {
                store.enqueue("t", Some("k"), n.to_string()).await;
                sleep(Duration::from_millis(300)).await;
            }
            sleep(SECOND * 30).await;
            let mut high = 0;
            for line in texts(&sink.delivered()) {
                let n: usize = line.parse().unwrap();
                assert!(n <= high, "{operation} {fault:?}: {n} after {high}");
                high = high.max(n + 1);
            }
            assert_eq!(high, 30, "{operation} {fault:?}");
            assert!(store.memory.pending().is_empty(), "{operation} {fault:?}");
            running.stop().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn one_renewal_that_hangs_does_not_cost_the_lease() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let running = start("a", &store, &sink, config());
    sleep(SECOND * 10).await;
    store.script("lease", [Fault::Hang]);
    sleep(SECOND * 10).await;
    let leases = store.memory.stats().await.unwrap().leases;
    assert!(leases.iter().all(|lease| lease.epoch.0 == 1), "{leases:?}");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn reads_that_fail_are_repeated_with_growing_pauses_whatever_wakes() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let relay = relay("a", &store, &sink, config());
    let waker = relay.waker();
    let running = Running::start(relay);
    sleep(SECOND).await;
    store.always("fetch", Fault::Error);
    let before = store.calls("fetch");
    for _ in 0..60_000 {
        waker.wake();
        sleep(Duration::from_millis(1)).await;
    }
    let calls = store.calls("fetch") - before;
    assert!((5..60).contains(&calls), "{calls}");
    store.always("fetch", Fault::None);
    store.enqueue("t", None, "x").await;
    delivered(&sink, 1, SECOND * 11).await;
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_relay_is_quiet() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let running = start("a", &store, &sink, config());
    sleep(MINUTE).await;
    let before = store.all_calls();
    sleep(MINUTE).await;
    // A read every 50 ms, a renewal a second.
    let calls = store.all_calls() - before;
    assert!(calls <= 1_350, "{calls}");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_relay_that_was_late_purges_and_is_fenced() {
    let (store, sink, other) = (
        Store::new(MemoryConfig::default()),
        MemorySink::new(),
        MemorySink::new(),
    );
    let late = start("a", &store, &sink, config());
    sleep(SECOND).await;
    // Its renewals get no answer while its messages are on their way, and its settlement comes late.
    sink.set_latency(SECOND);
    store.script("settle", [Fault::Late(SECOND * 8)]);
    store.enqueue("t", Some("k"), "settled late").await;
    sleep(SECOND + Duration::from_millis(200)).await;
    sink.set_latency(MINUTE);
    store.enqueue("t", Some("l"), "purged").await;
    sleep(Duration::from_millis(10)).await;
    store.script("lease", vec![Fault::Error; 40]);
    sleep(SECOND * 3).await;
    let next = start("b", &store, &other, config());
    sleep(MINUTE * 2).await;
    store.always("lease", Fault::None);
    sleep(MINUTE).await;
    assert_eq!(texts(&sink.delivered())[0], "settled late");
    let mut again = texts(&other.delivered());
    again.extend(texts(&sink.delivered()));
    again.sort();
    assert!(again.contains(&"purged".to_owned()), "{again:?}");
    assert_eq!(
        again.iter().filter(|line| *line == "settled late").count(),
        2,
        "{again:?}"
    );
    assert_eq!(
        again.iter().filter(|line| *line == "purged").count(),
        1,
        "{again:?}"
    );
    assert!(store.memory.pending().is_empty());
    late.stop().await;
    next.stop().await;
}
