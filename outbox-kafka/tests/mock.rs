//! Against librdkafka's mock cluster: which error becomes which outcome, and that order survives.
//!
//! The mock is not faithful for sequence numbers; order and loss are proven on a real broker.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use common::{payloads, publish, quick, read_all, text};
use outbox_core::{Outcome, Sink};
use outbox_kafka::KafkaSink;
use rdkafka::mocking::MockCluster;

use common::rdkafka;

fn cluster(topic: &str) -> MockCluster<'static, rdkafka::producer::DefaultProducerContext> {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic(topic, 4, 1).unwrap();
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_keeps_the_order() {
    let cluster = cluster("t");
    let config = quick(cluster.bootstrap_servers()).option("queue.buffering.max.messages", "20");
    let mut sink = KafkaSink::new(&config).unwrap();
    let batch = (0..2_000).map(|n| text("t", "one", n.to_string())).collect();
    assert_eq!(publish(&mut sink, batch).await, vec![Outcome::Delivered; 2_000]);
    let expected: Vec<String> = (0..2_000).map(|n| n.to_string()).collect();
    assert_eq!(payloads(&read_all(&cluster.bootstrap_servers(), "t")), expected);
    sink.purge().await;
}
