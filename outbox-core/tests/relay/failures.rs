//! What goes wrong at the sink, and what becomes of the messages.

use std::time::Duration;

use outbox_core::{
    Backoff, MemoryConfig, MemoryFault, MemorySink, OnFailure, OutboxStore, Outcome, Parking, RelayConfig,
};
use tokio::time::sleep;

use crate::support::{MINUTE, SECOND, Store, config, delivered, start, texts};

fn parking() -> RelayConfig {
    RelayConfig {
        on_failure: OnFailure::Park,
        ..config()
    }
}

fn of(lines: &[String], prefix: &str) -> Vec<String> {
    lines
        .iter()
        .filter(|line| line.starts_with(prefix))
        .cloned()
        .collect()
}

#[tokio::test(start_paused = true)]
async fn a_message_is_tried_exactly_so_often_and_then_buried() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    // The fourth try of the first, had it one, would go through; the second goes through at its last.
    sink.fail(MemoryFault::new(Outcome::Retry("later".into())).key("a").times(4));
    sink.fail(MemoryFault::new(Outcome::Retry("later".into())).key("b").times(3));
    let config = RelayConfig {
        max_attempts: 4,
        ..config()
    };
    for line in ["a 1", "a 2", "b 1", "b 2"] {
        store.enqueue("t", Some(&line[..1]), line).await;
    }
    let running = start("a", &store, &sink, config);
    let lines = delivered(&sink, 3, MINUTE * 5).await;
    assert_eq!(of(&lines, "a"), ["a 2"]);
    assert_eq!(of(&lines, "b"), ["b 1", "b 2"]);
    assert_eq!(store.dead().await, [("a 1".to_owned(), 4)]);
    running.stop().await;
    assert_eq!(store.memory.stats().await.unwrap().retrying, 0);
}

#[tokio::test(start_paused = true)]
async fn attempts_survive_relays() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.fail(MemoryFault::new(Outcome::Retry("later".into())));
    let config = RelayConfig {
        max_attempts: 4,
        retry: Backoff {
            initial: SECOND * 60,
            max: SECOND * 60,
        },
        ..config()
    };
    store.enqueue("t", Some("a"), "1").await;
    for n in 0..40 {
        let running = start(&format!("relay-{n}"), &store, &sink, config.clone());
        sleep(SECOND * 20).await;
        if n % 2 == 0 {
            running.kill().await;
        } else {
            running.stop().await;
        }
    }
    assert_eq!(store.dead().await, [("1".to_owned(), 4)]);
}

#[tokio::test(start_paused = true)]
async fn poison_is_buried_at_once_and_its_key_goes_on() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.fail(
        MemoryFault::new(Outcome::Poison("too large".into()))
            .key("a")
            .times(1),
    );
    for n in 1..=5 {
        store.enqueue("t", Some("a"), n.to_string()).await;
    }
    let running = start("a", &store, &sink, config());
    assert_eq!(delivered(&sink, 4, SECOND).await, ["2", "3", "4", "5"]);
    assert_eq!(store.dead().await, [("1".to_owned(), 1)]);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_parked_key_waits_for_an_operator() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.fail(MemoryFault::new(Outcome::Poison("no".into())).key("a").times(2));
    let running = start("a", &store, &sink, parking());
    for n in 1..=3 {
        store.enqueue("t", Some("a"), n.to_string()).await;
    }
    store.enqueue("t", Some("b"), "b").await;
    assert_eq!(delivered(&sink, 1, SECOND).await, ["b"]);
    sleep(MINUTE * 60).await;
    assert_eq!(texts(&sink.delivered()), ["b"]);

    // Resumed, it fails once more, and parks again.
    let hold = store.memory.parked(10).await.unwrap().remove(0);
    assert!(store.memory.resume(&hold.reference()).await.unwrap());
    sleep(SECOND * 10).await;
    assert_eq!(texts(&sink.delivered()), ["b"]);
    let hold = store.memory.parked(10).await.unwrap().remove(0);
    assert_eq!(hold.attempts, 1);

    assert!(store.memory.bury(&hold.reference()).await.unwrap());
    assert_eq!(delivered(&sink, 3, SECOND * 5).await, ["b", "2", "3"]);
    assert_eq!(store.dead().await, [("1".to_owned(), 1)]);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_message_without_a_key_blocks_nothing() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let running = start("a", &store, &sink, parking());
    sink.fail_next(Outcome::Poison("no".into()));
    for n in 1..=5 {
        store.enqueue("t", None, n.to_string()).await;
    }
    delivered(&sink, 4, SECOND).await;
    assert_eq!(store.memory.parked(10).await.unwrap().len(), 1);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_blocked_topic_holds_nothing_else_and_flows_again() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.fail(MemoryFault::new(Outcome::TopicBlocked("forbidden".into())).topic("bad"));
    let running = start("a", &store, &sink, config());
    for n in 1..=30 {
        store
            .enqueue("bad", Some(["x", "y"][n % 2]), format!("bad {n}"))
            .await;
        store.enqueue("good", Some("x"), n.to_string()).await;
    }
    delivered(&sink, 30, SECOND).await;
    sleep(MINUTE * 60).await;
    assert_eq!(sink.delivered().len(), 30);
    assert!(store.dead().await.is_empty());
    sink.clear_faults();
    let lines = delivered(&sink, 60, MINUTE + SECOND).await;
    let wanted: Vec<String> = (1..=30).step_by(2).map(|n| format!("bad {n}")).collect();
    let odd: Vec<String> = of(&lines, "bad")
        .into_iter()
        .filter(|line| wanted.contains(line))
        .collect();
    assert_eq!(odd, wanted);
    running.stop().await;
    assert_eq!(store.memory.stats().await.unwrap().retrying, 0);
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_an_hour_costs_no_attempt() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let config = RelayConfig {
        max_attempts: 1,
        ..config()
    };
    sink.begin_outage("nobody home");
    let running = start("a", &store, &sink, config);
    for n in 1..=20 {
        store.enqueue("t", Some("a"), n.to_string()).await;
    }
    sleep(MINUTE * 60).await;
    let stats = store.memory.stats().await.unwrap();
    assert_eq!((stats.dead, stats.retrying, stats.parked), (0, 0, 0));
    sink.end_outage();
    let all: Vec<String> = (1..=20).map(|n| n.to_string()).collect();
    assert_eq!(delivered(&sink, 20, SECOND * 11).await, all);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_unknown_is_delivered_again_in_order() {
    for fault in [
        Outcome::Unknown("no answer".into()),
        Outcome::Broken("fatal".into()),
    ] {
        let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
        sink.fail(MemoryFault::new(fault).key("a").times(2).written());
        for n in 1..=4 {
            store.enqueue("t", Some("a"), n.to_string()).await;
        }
        let running = start("a", &store, &sink, config());
        assert_eq!(
            delivered(&sink, 6, SECOND * 5).await,
            ["1", "1", "1", "2", "3", "4"]
        );
        sleep(SECOND).await;
        assert!(store.memory.pending().is_empty());
        running.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_row_that_makes_no_sense_is_buried_alone() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.set_latency(Duration::from_millis(50));
    store.defect("2");
    store.defect("x");
    for n in 1..=3 {
        store.enqueue("t", Some("a"), n.to_string()).await;
    }
    store.enqueue("t", None, "x").await;
    let running = start("a", &store, &sink, config());
    assert_eq!(delivered(&sink, 2, SECOND).await, ["1", "3"]);
    let mut dead = store.dead().await;
    dead.sort();
    assert_eq!(dead, [("2".to_owned(), 1), ("x".to_owned(), 1)]);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_row_that_makes_no_sense_parks_its_key_behind_its_predecessors() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    store.defect("2");
    for n in 1..=3 {
        store.enqueue("t", Some("a"), n.to_string()).await;
    }
    // The first fails while the second is already here.
    sink.set_latency(Duration::from_millis(50));
    sink.fail(MemoryFault::new(Outcome::Retry("later".into())).times(1));
    let running = start("a", &store, &sink, parking());
    assert_eq!(delivered(&sink, 1, SECOND * 5).await, ["1"]);
    sleep(SECOND * 5).await;
    assert_eq!(texts(&sink.delivered()), ["1"]);
    assert_eq!(store.memory.parked(10).await.unwrap().len(), 1);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn too_many_that_wait_hold_their_topic_and_nothing_else() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    sink.fail(MemoryFault::new(Outcome::Poison("no".into())).topic("bad"));
    let config = RelayConfig {
        max_holds: 20,
        batch_rows: 10,
        window_rows: 20,
        poll_idle: SECOND,
        ..parking()
    };
    let running = start("a", &store, &sink, config);
    for n in 0..200 {
        // Without keys: each waits by itself.
        store.enqueue("bad", None, format!("bad {n}")).await;
    }
    for n in 0..50 {
        store.enqueue("good", Some("k"), n.to_string()).await;
    }
    delivered(&sink, 50, MINUTE).await;
    let parked = store.memory.stats().await.unwrap().parked;
    assert!((20..=60).contains(&parked), "{parked}");
    // An hour does not fill the store with notes, nor the relay with memories of them.
    sleep(MINUTE * 60).await;
    let parked = store.memory.stats().await.unwrap().parked;
    assert!(parked <= 60, "{parked}");
    sink.clear_faults();
    for _ in 0..20 {
        for hold in store.memory.parked(1_000).await.unwrap() {
            assert!(store.memory.resume(&hold.reference()).await.unwrap());
        }
        sleep(MINUTE).await;
    }
    assert_eq!(sink.delivered().len(), 250);
    running.stop().await;
}
