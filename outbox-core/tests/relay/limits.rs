//! What is bounded stays so.

use outbox_core::{MemoryConfig, MemorySink, RelayConfig};
use tokio::time::{Instant, sleep};

use crate::support::{MINUTE, SECOND, Store, config, delivered, start};

#[tokio::test(start_paused = true)]
async fn the_rate_is_kept() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let config = RelayConfig {
        rate_limit: Some(50),
        ..config()
    };
    for n in 0..500 {
        store.enqueue("t", None, n.to_string()).await;
    }
    let begin = Instant::now();
    let running = start("a", &store, &sink, config);
    delivered(&sink, 500, MINUTE).await;
    let took = begin.elapsed();
    assert!((SECOND * 9..SECOND * 11).contains(&took), "{took:?}");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn windows_and_batches_are_kept_in_rows_and_bytes() {
    let (store, sink) = (Store::new(MemoryConfig::default()), MemorySink::new());
    let config = RelayConfig {
        batch_rows: 10,
        window_rows: 30,
        batch_bytes: 2_000,
        window_bytes: 4_000,
        ..config()
    };
    sink.set_latency(SECOND);
    for n in 0..200 {
        store.enqueue("t", None, format!("{n:0400}")).await;
    }
    store.enqueue("t", None, "x".repeat(10_000)).await;
    let running = start("a", &store, &sink, config);
    delivered(&sink, 201, MINUTE * 5).await;
    sleep(SECOND * 5).await;
    let mut large = 0;
    for (rows, in_flight, bytes) in store.requests() {
        assert!(rows <= 10 && rows + in_flight <= 30, "{rows} {in_flight}");
        // One that is larger than a batch comes alone.
        if bytes > 2_000 {
            large += 1;
            assert!((10_000..10_100).contains(&bytes), "{bytes}");
        }
    }
    assert_eq!(large, 1);
    // At most four thousand bytes and one read are on their way, for a second: ten messages or so.
    assert!(
        store.requests().iter().filter(|(.., bytes)| *bytes > 0).count() >= 40,
        "{:?}",
        store.requests()
    );
    running.stop().await;
}
