//! Per topic and key in order, in one batch and across batches.

use super::super::harness::SinkHarness;
use super::super::kit::numbered;
use super::{Bench, outcomes};

/// Records of one batch arrive in its order within each key.
pub async fn order_within_key<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let (a, b) = (bench.series("a", 30), bench.series("b", 30));
    let mixed: Vec<_> = a.into_iter().zip(b).flat_map(|(a, b)| [a, b]).collect();
    bench.send_all(&mixed).await;
    for key in ["a", "b"] {
        assert_eq!(
            bench.arrived(key).await,
            numbered(key, 30),
            "records of a key must arrive in the order of the batch, each once"
        );
    }
}

/// Batches that are handed over while receipts are open arrive one after the other within each key.
pub async fn order_across_batches<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let records = bench.series("a", 60);
    let mut receipts = Vec::new();
    for batch in records.chunks(10) {
        receipts.push(bench.publish(batch).await);
    }
    for receipt in receipts {
        outcomes(receipt, 10).await;
    }
    assert_eq!(
        bench.arrived("a").await,
        numbered("a", 60),
        "batches must arrive in the order in which they were handed over"
    );
}

/// Thousands of records of one key that are handed over without a pause keep their order: back-pressure waits, it
/// does not reorder.
pub async fn order_under_pressure<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let records = bench.series("a", 3_000);
    let mut receipts = Vec::new();
    for batch in records.chunks(500) {
        receipts.push(bench.publish(batch).await);
    }
    for receipt in receipts {
        outcomes(receipt, 500).await;
    }
    let arrived = bench.arrived("a").await;
    assert_eq!(arrived.len(), 3_000, "each record must arrive once");
    assert!(
        arrived == numbered("a", 3_000),
        "a full queue must make the caller wait; what is put aside must not be overtaken"
    );
}
