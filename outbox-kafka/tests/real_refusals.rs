//! What a real broker refuses harms no other message.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use common::{broker, count, deliver, new_topic, payloads, quick, read_all, record, text};
use outbox_core::Message;
use outbox_kafka::KafkaSink;

/// The texts of each key, in their order, without repetitions.
fn assert_order(servers: &str, topic: &str, expected: &[(String, String)]) {
    let mut found: Vec<(String, String)> = Vec::new();
    for message in read_all(servers, topic) {
        use common::rdkafka::Message as _;
        let text = |bytes: Option<&[u8]>| String::from_utf8(bytes.unwrap_or_default().to_vec()).unwrap();
        let pair = (text(message.key()), text(message.payload()));
        if !found.contains(&pair) {
            found.push(pair);
        }
    }
    let by_key = |pairs: &[(String, String)]| {
        let mut pairs = pairs.to_vec();
        pairs.sort_by(|(one, _), (other, _)| one.cmp(other));
        pairs
    };
    assert_eq!(by_key(&found), by_key(expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_too_large_together_harms_no_message() {
    let topic = new_topic(1, &[("max.message.bytes", "10000")]).await;
    let mut sink = KafkaSink::new(&quick(broker())).unwrap();
    let pairs: Vec<(String, String)> = (0..200)
        .map(|n| ((n % 5).to_string(), format!("{n:01000}")))
        .collect();
    let batch = pairs
        .iter()
        .map(|(key, payload)| text(&topic, key, payload.as_str()))
        .collect();
    let (outcomes, purges) = deliver(&mut sink, batch).await;
    assert_eq!(count(&outcomes)["delivered"], 200);
    assert_eq!(purges, 1);
    assert_order(&broker(), &topic, &pairs);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_refused_message_is_poison_alone() {
    // A compacted topic takes no message without a key.
    let compacted = new_topic(1, &[("cleanup.policy", "compact")]).await;
    let other = new_topic(1, &[]).await;
    // Small requests, so that successors of the refused one are on their way behind it.
    let config = quick(broker()).option("batch.num.messages", "20");
    let mut sink = KafkaSink::new(&config).unwrap();
    let batch: Vec<_> = (0..400)
        .map(|n| match n {
            100 | 300 => record(Message::builder(compacted.as_str()).payload("keyless")),
            n if n % 2 == 0 => text(&compacted, &(n % 5).to_string(), n.to_string()),
            n => text(&other, &(n % 5).to_string(), n.to_string()),
        })
        .collect();
    let (outcomes, purges) = deliver(&mut sink, batch).await;
    assert!(
        matches!(outcomes[100], outbox_core::Outcome::Poison(_)),
        "{:?}",
        outcomes[100]
    );
    assert_eq!(count(&outcomes)["delivered"], 398);
    assert_eq!(count(&outcomes)["poison"], 2);
    assert_eq!(purges, 1);
    let pairs: Vec<(String, String)> = (0..400)
        .filter(|n| n % 2 == 0 && ![100, 300].contains(n))
        .map(|n| ((n % 5).to_string(), n.to_string()))
        .collect();
    assert_order(&broker(), &compacted, &pairs);
    assert_eq!(
        payloads(&read_all(&broker(), &other)).len(),
        200,
        "the other topic's messages were waited for, so that none is repeated"
    );

    // The next refusal concerns nobody else any more.
    let batch = vec![
        text(&compacted, "1", "before"),
        record(Message::builder(compacted.as_str()).payload("keyless")),
        text(&other, "1", "beside"),
        text(&compacted, "1", "after"),
    ];
    let (outcomes, purges) = deliver(&mut sink, batch).await;
    assert_eq!((count(&outcomes)["delivered"], purges), (3, 0));
}
