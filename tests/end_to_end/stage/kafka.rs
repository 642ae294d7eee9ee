//! Kafka for the proof: the shared broker, and topics.

use outbox::MessageId;
use outbox::kafka::rdkafka::ClientConfig;
use outbox::kafka::rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use outbox::kafka::rdkafka::client::DefaultClientContext;

/// The broker that all tests share.
pub(crate) fn broker() -> String {
    std::env::var("OUTBOX_TEST_KAFKA").unwrap_or_else(|_| {
        panic!("OUTBOX_TEST_KAFKA is not set: run scripts/services start kafka; eval \"$(scripts/services env kafka)\"")
    })
}

/// Makes a topic of a name of its own.
pub(crate) async fn new_topic(servers: &str, partitions: i32) -> String {
    let topic = format!("proof-{}", MessageId::new());
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", servers)
        .create()
        .unwrap();
    let new = NewTopic::new(&topic, partitions, TopicReplication::Fixed(1));
    let made = admin.create_topics([&new], &AdminOptions::new()).await.unwrap();
    made.into_iter().for_each(|made| drop(made.unwrap()));
    topic
}
