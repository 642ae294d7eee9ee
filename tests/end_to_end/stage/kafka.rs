//! Kafka for the proof: the shared broker, and topics.

use std::fmt::Write as _;

use outbox::MessageId;
use outbox::kafka::rdkafka::ClientConfig;
use outbox::kafka::rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use outbox::kafka::rdkafka::client::DefaultClientContext;

use crate::grant::Operation;

/// The broker that all tests share.
pub(crate) fn broker() -> String {
    std::env::var("OUTBOX_TEST_KAFKA").unwrap_or_else(|_| {
        panic!("OUTBOX_TEST_KAFKA is not set: run scripts/services start kafka; eval \"$(scripts/services env kafka)\"")
    })
}

/// A name for a topic that nothing else has.
pub(crate) fn topic_name() -> String {
    format!("proof-{}", MessageId::new())
}

/// Makes a topic, which may refuse records larger than so many bytes.
pub(crate) async fn new_topic(servers: &str, topic: &str, partitions: i32, largest: Option<usize>) {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", servers)
        .create()
        .unwrap();
    let largest = largest.map(|bytes| bytes.to_string());
    let mut new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
    if let Some(largest) = &largest {
        new = new.set("max.message.bytes", largest);
    }
    let made = admin.create_topics([&new], &AdminOptions::new()).await.unwrap();
    made.into_iter().for_each(|made| drop(made.unwrap()));
}

/// Where, and with which settings of the sink, a user logs in to whom nothing is granted.
#[allow(dead_code, reason = "for faults")]
pub(crate) fn login() -> (String, String) {
    let options = [
        ("security.protocol", "SASL_SSL".to_owned()),
        ("sasl.mechanism", "SCRAM-SHA-512".to_owned()),
        ("sasl.username", variable("USER")),
        ("sasl.password", variable("PASSWORD")),
        ("ssl.ca.location", variable("CA")),
    ];
    let mut lines = String::from("[sink.options]\n");
    for (name, value) in options {
        let _ = writeln!(lines, "{name:?} = {value:?}");
    }
    (variable("TLS"), lines)
}

fn variable(name: &str) -> String {
    let name = format!("OUTBOX_TEST_KAFKA_{name}");
    std::env::var(&name)
        .unwrap_or_else(|_| panic!("{name} is not set: eval \"$(scripts/services env kafka)\""))
}

/// Grants that user to write to the topic.
#[allow(dead_code, reason = "for faults")]
pub(crate) fn grant(servers: &str, topic: &str) {
    crate::grant::grant(servers, &variable("USER"), topic, Operation::Write);
}
