//! What people and machines see.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{Arc, Mutex};

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use outbox_core::{MemoryConfig, MemoryFault, MemorySink, Message, OnFailure, Outcome, RelayConfig};
use tokio::time::sleep;

use crate::support::{Fault, MINUTE, SECOND, Store, config, start};

/// The names in the documentation, which is the contract.
fn documented() -> BTreeSet<String> {
    include_str!("../../src/metrics.rs")
        .split('`')
        .filter(|word| word.starts_with("outbox_"))
        .map(str::to_owned)
        .collect()
}

/// A life with everything in it that a relay reports.
async fn eventful() {
    let archive = MemoryConfig {
        archive: true,
        ..MemoryConfig::default()
    };
    let (store, sink) = (Store::new(archive), MemorySink::new());
    let first = start("a", &store, &sink, config());
    sleep(SECOND).await;
    let send = async |topic: &str, key: &str| {
        let message = Message::builder(topic)
            .key(format!("canary-{key}"))
            .header("canary-name", "canary-value")
            .payload("canary-payload");
        store.enqueue_message(&message.build().unwrap()).await;
        sleep(SECOND * 3).await;
    };
    send("t", "fine").await;
    for outcome in [
        Outcome::Poison("no".into()),
        Outcome::Retry("later".into()),
        Outcome::TopicBlocked("forbidden".into()),
        Outcome::Outage("down".into()),
        Outcome::Unknown("silent".into()),
        Outcome::Broken("fatal".into()),
    ] {
        sink.fail(MemoryFault::new(outcome).times(1));
        send("t", "k").await;
    }
    for operation in ["lease", "holds", "fetch", "settle", "stats"] {
        store.script(operation, [Fault::Error]);
        send("t", "k").await;
    }
    // Late by so much that another one has the shards.
    store.script("settle", [Fault::Late(SECOND * 20)]);
    send("t", "late").await;
    store.script("lease", vec![Fault::Error; 30]);
    sleep(SECOND * 10).await;
    let second = start("b", &store, &sink, config());
    sleep(MINUTE).await;
    first.stop().await;
    second.stop().await;

    let config = RelayConfig {
        on_failure: OnFailure::Park,
        ..config()
    };
    let third = start("c", &store, &sink, config);
    sink.fail(MemoryFault::new(Outcome::Poison("no".into())).times(1));
    send("t", "parked").await;
    sleep(MINUTE).await;
    third.stop().await;
}

#[tokio::test(start_paused = true)]
async fn metrics_have_the_documented_names() {
    let recorder = DebuggingRecorder::new();
    let snapshots = recorder.snapshotter();
    let guard = metrics::set_default_local_recorder(&recorder);
    eventful().await;
    drop(guard);
    let recorded: BTreeSet<String> = snapshots
        .snapshot()
        .into_vec()
        .into_iter()
        // Counters begin at nought: what has not happened in this life is not covered by it.
        .filter(|(.., value)| !matches!(value, DebugValue::Counter(0)))
        .map(|(key, ..)| key.key().name().to_owned())
        .collect();
    let mut missing = documented();
    for name in &recorded {
        assert!(missing.remove(name), "{name} is not documented");
    }
    // These take a store or a sink that is another one, or breaks its contract.
    let rare = [
        "outbox_contract_breaches_total",
        "outbox_resets_total",
        "outbox_sweep_surplus_total",
    ];
    assert_eq!(missing, rare.map(str::to_owned).into());
}

#[tokio::test(start_paused = true)]
async fn the_gauge_of_owned_shards_goes_down_with_a_relay_that_stops() {
    let recorder = DebuggingRecorder::new();
    let snapshots = recorder.snapshotter();
    let guard = metrics::set_default_local_recorder(&recorder);
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let running = start("a", &store, &sink, config());
    sleep(SECOND).await;
    running.stop().await;
    drop(guard);
    assert_eq!(gauge(&snapshots, "outbox_shards_owned"), "Gauge(0.0)");
}

fn gauge(snapshots: &Snapshotter, name: &str) -> String {
    let values = snapshots.snapshot().into_vec();
    let value = values.iter().find(|(key, ..)| key.key().name() == name);
    value.map(|(.., value)| format!("{value:?}")).unwrap_or_default()
}

#[tokio::test(start_paused = true)]
async fn a_relay_tells_of_the_whole_outbox_no_longer_than_it_looks_at_it() {
    let recorder = DebuggingRecorder::new();
    let snapshots = recorder.snapshotter();
    let guard = metrics::set_default_local_recorder(&recorder);
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let running = start("a", &store, &sink, config());
    sleep(SECOND).await;
    assert_eq!(gauge(&snapshots, "outbox_dead"), "Gauge(0.0)");
    store.always("lease", Fault::Error);
    sleep(MINUTE).await;
    assert_eq!(gauge(&snapshots, "outbox_dead"), "Gauge(NaN)");
    store.always("lease", Fault::None);
    sleep(MINUTE).await;
    assert_eq!(gauge(&snapshots, "outbox_dead"), "Gauge(0.0)");
    running.stop().await;
    drop(guard);
}

/// Keeps what is logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_of_a_message_is_logged() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    // For all threads: what other tests log meanwhile must be just as silent, and a subscriber of one thread misses
    // what others have looked at before it.
    tracing::subscriber::set_global_default(subscriber).unwrap();
    eventful().await;
    let logged = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert!(logged.contains("dead letter"), "{logged}");
    assert!(logged.contains("parked"), "{logged}");
    // A relay that stops gives its shards up. That is no reason to warn anybody.
    assert!(logged.contains("shard given up"), "{logged}");
    assert!(!logged.contains("canary"), "{logged}");
}
