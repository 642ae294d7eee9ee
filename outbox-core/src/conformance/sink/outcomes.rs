//! What a receipt says, and what it means.

use super::super::harness::{SinkHarness, TOPICS};
use super::super::kit::{PATIENCE, text};
use super::{Bench, classes};
use crate::message::Message;
use crate::sink::Outcome;

/// A receipt has one outcome a record, in the batch's order, whatever the batch's size.
pub async fn one_outcome_each<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    for count in [0, 1, 2, 25] {
        let records = bench.series(&format!("key-{count}-"), count);
        bench.send_all(&records).await;
    }
}

/// The outcomes stand in the batch's order: that of a poisoned message at its place.
pub async fn outcomes_are_in_order<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let poison = bench.harness.poison("poison").await.unwrap();
    let mut records = bench.series("a", 2);
    let poison = bench.wrap(poison);
    records.insert(1, poison);
    records.extend(bench.series("b", 2));
    assert_eq!(
        classes(&bench.send(&records).await),
        ["delivered", "poison", "delivered", "delivered", "delivered"],
        "each outcome must stand where its record stood in the batch"
    );
}

/// What is reported as delivered is at the destination by then.
pub async fn delivered_is_durable<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    for round in 0..5 {
        let records = bench.series(&format!("round-{round}-"), 10);
        let outcomes = bench.send(&records).await;
        let arrived: Vec<String> = bench.harness.delivered().await.iter().map(text).collect();
        for (record, outcome) in records.iter().zip(outcomes) {
            assert!(
                outcome != Outcome::Delivered || arrived.contains(&text(&record.message)),
                "{} was reported as delivered and is not at the destination: wait for its acknowledgement",
                text(&record.message)
            );
        }
    }
}

/// Without faults each message arrives once.
pub async fn no_repetition_without_fault<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    for round in 0..3 {
        let mut records = bench.series(&format!("key-{round}-"), 5);
        records.push(bench.record(1, None, &format!("keyless-{round}")));
        bench.send_all(&records).await;
    }
    let mut arrived: Vec<String> = bench.harness.delivered().await.iter().map(text).collect();
    arrived.sort_unstable();
    let all = arrived.len();
    arrived.dedup();
    assert_eq!((all, arrived.len()), (18, 18), "each message must arrive, once");
}

/// Topic, key, payload, headers, content type and id arrive as they were given.
pub async fn content_arrives<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let start = || Message::builder(TOPICS[0]);
    let messages = [
        start().key("key").payload("payload"),
        start().key(&b"\xff\x00"[..]).payload(&b"\x00\xfe"[..]),
        start().key("").payload("empty key"),
        start().payload("no key"),
        start().key("tombstone"),
        start().key("empty").payload(""),
        Message::builder(TOPICS[1]).key("key").payload("other topic"),
        start()
            .payload("headers")
            .header("a", "1")
            .header("b", &b"\xff"[..])
            .header("a", "2"),
        start().payload("{}").content_type("application/json"),
    ]
    .map(|builder| builder.build().unwrap());
    for message in messages {
        let record = bench.wrap(message.clone());
        bench.send_all(&[record]).await;
        let delivered = bench.harness.delivered().await;
        let arrived = delivered.iter().find(|own| own.id() == message.id());
        let arrived = arrived.unwrap_or_else(|| {
            panic!("{message:?} did not arrive, or not with its id, by which consumers drop copies")
        });
        assert_eq!(arrived.topic(), message.topic());
        assert_eq!(arrived.key(), message.key(), "none is not empty: {message:?}");
        assert_eq!(
            arrived.payload(),
            message.payload(),
            "none is not empty: {message:?}"
        );
        assert_eq!(arrived.content_type(), message.content_type(), "{message:?}");
        // The framework's own may stand beside them.
        let mut rest = arrived.headers().iter();
        assert!(
            message.headers().iter().all(|own| rest.any(|found| found == own)),
            "headers must arrive in order, repeated names included: {:?} became {:?}",
            message.headers(),
            arrived.headers()
        );
    }
}

/// A receipt that is dropped changes nothing for those that follow.
pub async fn dropped_receipt_does_no_harm<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let records = bench.series("a", 20);
    drop(bench.publish(&records[..10]).await);
    bench.send_all(&records[10..]).await;
    let start = tokio::time::Instant::now();
    while bench.arrived("a").await.len() < 20 && start.elapsed() < PATIENCE {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    bench.expect_no_gap("a", 20).await;
}
