//! Outages and purges: nothing overtakes, nothing stays open, nothing leaves later.

use std::time::Duration;

use tokio::time::Instant;

use super::super::harness::{SinkFault, SinkHarness};
use super::super::kit::PATIENCE;
use super::{Bench, classes, outcomes};
use crate::sink::Outcome;

/// How long a sink may take to say that the destination cannot be reached, before it is purged.
const SILENCE: Duration = Duration::from_secs(5);

/// In an outage messages are neither lost nor blamed; after it they arrive in order.
pub async fn outage_blames_nobody<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let records = bench.series("a", 6);
    bench.send_all(&records[..1]).await;
    bench.inject(SinkFault::Outage, None).await;
    let first = bench.publish(&records[1..4]).await;
    let second = bench.publish(&records[4..]).await;
    expect_probe(&mut bench, false).await;
    let mut receipt = Box::pin(outcomes(first, 3));
    let early = tokio::time::timeout(SILENCE, &mut receipt).await;
    // Silence is allowed: the relay purges when it has had enough.
    bench.sink.purge().await;
    let first = match early {
        Ok(outcomes) => outcomes,
        Err(_) => receipt.await,
    };
    let second = outcomes(second, 2).await;
    for outcome in first.iter().chain(&second) {
        assert!(
            matches!(
                outcome,
                Outcome::Outage(_) | Outcome::Unknown(_) | Outcome::Broken(_) | Outcome::Skipped
            ),
            "when nobody can go, no message is to blame and none is delivered: {outcome:?}"
        );
    }
    bench.inject(SinkFault::Heal, None).await;
    expect_probe(&mut bench, true).await;
    if first
        .iter()
        .chain(&second)
        .any(|outcome| matches!(outcome, Outcome::Broken(_)))
    {
        bench.sink.rebuild().await.unwrap();
    }
    bench.send_all(&records[1..]).await;
    bench.expect_no_gap("a", 6).await;
}

/// What the sink is handed before the relay can know of an outage does not overtake what the outage hit.
pub async fn outage_stops_key<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let records = bench.series("a", 6);
    bench.inject(SinkFault::Outage, None).await;
    let first = bench.publish(&records[..3]).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    // The outage ends, and the first receipt is still open: the relay knows of nothing.
    bench.inject(SinkFault::Heal, None).await;
    let second = bench.publish(&records[3..]).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    bench.sink.purge().await;
    outcomes(first, 3).await;
    outcomes(second, 3).await;
    let arrived = bench.arrived("a").await;
    bench.expect_no_gap("a", arrived.len()).await;
    bench.send_all(&records).await;
    bench.expect_no_gap("a", 6).await;
}

/// After a purge every open receipt resolves, and nothing that was handed over before leaves any more.
pub async fn purge_resolves_everything<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    bench.inject(SinkFault::Delay, None).await;
    let records = bench.series("a", 30);
    let mut receipts = Vec::new();
    for batch in records.chunks(10) {
        receipts.push(bench.publish(batch).await);
    }
    let start = Instant::now();
    bench.sink.purge().await;
    for receipt in receipts {
        for outcome in outcomes(receipt, 10).await {
            assert!(
                matches!(
                    outcome,
                    Outcome::Delivered | Outcome::Unknown(_) | Outcome::Skipped
                ),
                "what was purged is delivered, unknown or skipped, and nobody is to blame: {outcome:?}"
            );
        }
    }
    assert!(
        start.elapsed() < PATIENCE / 2,
        "after a purge open receipts must resolve promptly, not after {:?}",
        start.elapsed()
    );
    let arrived = bench.arrived("a").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        bench.arrived("a").await,
        arrived,
        "after a purge nothing that was handed over before may leave any more: it would arrive behind its successors"
    );
    bench.send_all(&records).await;
    bench.expect_no_gap("a", 30).await;
}

/// A purge of an idle sink changes nothing.
pub async fn purge_of_nothing_does_no_harm<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let records = bench.series("a", 4);
    bench.sink.purge().await;
    bench.send_all(&records[..2]).await;
    bench.sink.purge().await;
    bench.send_all(&records[2..]).await;
    bench.expect_no_gap("a", 4).await;
    expect_probe(&mut bench, true).await;
}

/// A publish that is dropped half-way is over with the next purge.
pub async fn publish_can_be_dropped<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let records = bench.series("a", 200);
    for micros in [0, 50, 500, 5_000] {
        let publish = bench.sink.publish(records.clone());
        drop(tokio::time::timeout(Duration::from_micros(micros), publish).await);
        bench.sink.purge().await;
    }
    bench.send_all(&records).await;
    bench.expect_no_gap("a", 200).await;
}

/// A sink that was rebuilt though nothing was wrong works on.
pub async fn rebuild_does_no_harm<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let records = bench.series("a", 4);
    bench.send_all(&records[..2]).await;
    bench.sink.purge().await;
    bench.sink.rebuild().await.unwrap();
    let outcomes = bench.send(&records[2..]).await;
    assert_eq!(classes(&outcomes), ["delivered", "delivered"]);
    bench.expect_no_gap("a", 4).await;
}

/// Probes until the answer is the expected one.
async fn expect_probe<H: SinkHarness>(bench: &mut Bench<H>, reachable: bool) {
    let start = Instant::now();
    loop {
        let probed = tokio::time::timeout(PATIENCE, bench.sink.probe()).await;
        let probed = probed.unwrap_or_else(|_| panic!("a probe must not wait for the outage to end"));
        if probed.is_ok() == reachable {
            return;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "a probe must tell whether the destination can be reached; it is {reachable}, and the probe says {probed:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
