//! Failures of single messages and topics.

use super::super::harness::{SinkFault, SinkHarness};
use super::super::kit::text;
use super::{Bench, classes, outcomes};
use crate::sink::Outcome;

/// A message that can never go is reported so, does not arrive, and harms no other.
pub async fn poison_is_alone<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let poison = bench.harness.poison("poison").await.unwrap();
    let poison = bench.wrap(poison);
    let mut records = bench.series("a", 3);
    records.push(poison.clone());
    records.extend(bench.series("b", 3));
    records.push(bench.record(0, None, "keyless"));
    let outcomes = bench.send(&records).await;
    for (record, outcome) in records.iter().zip(&outcomes) {
        let expected = if record.position == poison.position {
            "poison"
        } else {
            "delivered"
        };
        assert_eq!(
            outcome.as_str(),
            expected,
            "one message that can never go must be reported as poison, and harm no other: {outcomes:?}"
        );
    }
    let arrived = bench.harness.delivered().await;
    assert_eq!(arrived.len(), 7, "the others must arrive, the poison must not");
    let again = bench.send(&[poison]).await;
    assert_eq!(
        classes(&again),
        ["poison"],
        "what can never go is poison each time"
    );
}

/// Behind a poisoned message nothing of its key that the sink already has is delivered.
pub async fn failure_stops_key<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let poison = bench.harness.poison("a").await.unwrap();
    let poison = bench.wrap(poison);
    stops_key(&mut bench, poison, "poison").await;
}

/// Behind a message that is to be retried nothing of its key that the sink already has is delivered.
pub async fn retry_stops_key<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let head = bench.record(0, Some("a"), "a0");
    bench.inject(SinkFault::Refuse, Some(&head)).await;
    stops_key(&mut bench, head.clone(), "retry").await;
    bench.send_all(&[head]).await;
}

/// A sink that goes on behind a failure must not ask for retries: what followed has passed already.
pub async fn retry_needs_stopping<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let records = bench.series("a", 3);
    bench.inject(SinkFault::Refuse, Some(&records[0])).await;
    let outcomes = bench.send(&records).await;
    assert!(
        !classes(&outcomes).contains(&"retry"),
        "a sink that does not stop a key at a failure must retry within, in order, or report another class: {outcomes:?}"
    );
}

/// A topic that takes nothing is reported so; others flow.
pub async fn blocked_topic_lets_others_flow<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    bench.inject(SinkFault::Block, None).await;
    let records: Vec<_> = (0..10)
        .map(|number| bench.record(number % 2, Some(&format!("key-{number}")), &format!("{number}")))
        .collect();
    let outcomes = bench.send(&records).await;
    for (number, outcome) in outcomes.iter().enumerate() {
        let expected = if number % 2 == 1 {
            "topic_blocked"
        } else {
            "delivered"
        };
        assert_eq!(
            outcome.as_str(),
            expected,
            "the second topic takes nothing: its messages are topic_blocked, the others must go: {outcomes:?}"
        );
    }
    let arrived: Vec<String> = bench.harness.delivered().await.iter().map(text).collect();
    assert_eq!(arrived.len(), 5, "{arrived:?}");
}

/// Behind a message whose topic is blocked nothing of its key that the sink already has is delivered, though the topic takes
/// messages again.
pub async fn blocked_topic_stops_key<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let key: Vec<_> = (1..=3)
        .map(|number| bench.record(1, Some("a"), &format!("a{number}")))
        .collect();
    let others = bench.series("b", 2);
    bench.inject(SinkFault::Block, None).await;
    let first = bench.publish(&[key[0].clone(), others[0].clone()]).await;
    bench.inject(SinkFault::Heal, None).await;
    let second = bench
        .publish(&[key[1].clone(), others[1].clone(), key[2].clone()])
        .await;
    // Only now whoever published can know of the first one.
    let first = outcomes(first, 2).await;
    let second = outcomes(second, 3).await;
    let ahead = [&first[0], &second[0], &second[2]]
        .into_iter()
        .take_while(|outcome| **outcome == Outcome::Delivered)
        .count();
    assert_eq!(
        bench.arrived("a").await.len(),
        ahead,
        "a topic was blocked and takes messages again: what follows of a key must wait until it is heard that one of the \
         key was refused: {first:?}, {second:?}"
    );
    assert_eq!(
        (first[1].as_str(), second[1].as_str()),
        ("delivered", "delivered"),
        "one topic is blocked, and others must go: {first:?}, {second:?}"
    );
    bench.send_all(&key[ahead..]).await;
    bench.expect_no_gap("a", 3).await;
}

/// After a broken sink was rebuilt everything can be sent again, without a gap.
pub async fn broken_is_rebuilt<H: SinkHarness>() {
    let mut bench = Bench::<H>::fresh().await;
    let records = bench.series("a", 6);
    bench.inject(SinkFault::Break, Some(&records[2])).await;
    let first = bench.publish(&records[..4]).await;
    let second = bench.publish(&records[4..]).await;
    let first = outcomes(first, 4).await;
    let second = outcomes(second, 2).await;
    assert!(
        classes(&first).contains(&"broken"),
        "a sink that cannot go on must say so, or it is never rebuilt: {first:?}"
    );
    let delivered: Vec<bool> = first
        .iter()
        .chain(&second)
        .map(|outcome| *outcome == Outcome::Delivered)
        .collect();
    let ahead = delivered.iter().take_while(|delivered| **delivered).count();
    assert!(
        ahead <= 2 && !delivered[ahead..].contains(&true),
        "behind the message that broke it nothing of its key may be delivered: {first:?}, {second:?}"
    );
    bench.sink.purge().await;
    bench.inject(SinkFault::Heal, None).await;
    if let Err(error) = bench.sink.rebuild().await {
        panic!("the destination is well, so a rebuild must succeed: {error:?}");
    }
    bench.send_all(&records[ahead..]).await;
    bench.expect_no_gap("a", 6).await;
}

/// Two records behind `head`, one of them in the next batch, must be skipped; sent again they arrive.
async fn stops_key<H: SinkHarness>(bench: &mut Bench<H>, head: crate::Record, class: &str) {
    let others = bench.series("b", 2);
    let behind = bench.series("a", 2);
    let first = [head, others[0].clone(), behind[0].clone()];
    let second = [behind[1].clone(), others[1].clone()];
    let first = bench.publish(&first).await;
    let second = bench.publish(&second).await;
    let first = outcomes(first, 3).await;
    let second = outcomes(second, 2).await;
    assert_eq!(
        (classes(&first), classes(&second)),
        (vec![class, "delivered", "skipped"], vec!["skipped", "delivered"]),
        "the sink says that it stops a key at a failure: what it already has of the key must be skipped, and others go"
    );
    assert!(
        bench.arrived("a").await.is_empty(),
        "what was skipped must not arrive"
    );
    bench.send_all(&behind).await;
    bench.expect_no_gap("a", 2).await;
}
