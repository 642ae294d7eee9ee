//! What the tests of the sink share.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

#[path = "../../../tests/grant/mod.rs"]
mod grants;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use outbox_core::{Message, MessageBuilder, Outcome, Parts, Position, Record, Shard, Sink};
use outbox_kafka::{KafkaConfig, KafkaSink, ReceivedMessage};
use rdkafka::ClientConfig;
use rdkafka::Message as _;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::OwnedMessage;
use rdkafka::{Offset, TopicPartitionList};

pub(crate) use grants::Operation;
pub use outbox_kafka::rdkafka;

/// A stored record of the message.
pub fn record(message: MessageBuilder) -> Record {
    Record {
        shard: Shard(0),
        position: Position(0),
        key_seq: None,
        attempts: 0,
        message: message.build().unwrap(),
        defect: None,
    }
}

/// A record of `topic` and `key` with the text `payload`.
pub fn text(topic: &str, key: &str, payload: impl Into<String>) -> Record {
    record(
        Message::builder(topic)
            .key(key.to_owned())
            .payload(payload.into()),
    )
}

/// A configuration with which faults are noticed fast.
pub fn quick(servers: impl Into<String>) -> KafkaConfig {
    KafkaConfig {
        outage_after: Duration::from_secs(3),
        outage_after_error: Duration::from_secs(1),
        request_timeout: Duration::from_secs(3),
        ..KafkaConfig::new(servers)
    }
}

/// A configuration with which a silence tells nothing while a test waits: what is wrong has to be asked for.
pub fn asking(servers: impl Into<String>) -> KafkaConfig {
    KafkaConfig {
        outage_after: Duration::from_secs(120),
        ..quick(servers)
    }
}

/// Publishes and waits; panics when there is no answer for half a minute.
pub async fn publish(sink: &mut KafkaSink, batch: Vec<Record>) -> Vec<Outcome> {
    within(30, async { sink.publish(batch).await.outcomes().await }).await
}

/// Publishes as a relay does: what is not known to be settled is sent again, in order, after a purge. Says how often.
pub async fn deliver(sink: &mut KafkaSink, batch: Vec<Record>) -> (Vec<Outcome>, usize) {
    let mut outcomes = vec![Outcome::Skipped; batch.len()];
    let mut left: Vec<usize> = (0..batch.len()).collect();
    for purges in 0..20 {
        let again = left.iter().map(|index| batch[*index].clone()).collect();
        for (index, outcome) in left.iter().zip(publish(sink, again).await) {
            outcomes[*index] = outcome;
        }
        left.retain(|index| {
            matches!(
                outcomes[*index],
                Outcome::Unknown(_) | Outcome::Outage(_) | Outcome::Broken(_)
            )
        });
        if left.is_empty() {
            return (outcomes, purges);
        }
        sink.purge().await;
    }
    panic!("never settled: {:?}", outcomes[left[0]]);
}

/// How many there are of each class.
pub fn count(outcomes: &[Outcome]) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for outcome in outcomes {
        *counts.entry(outcome.as_str()).or_default() += 1;
    }
    counts
}

pub async fn within<T>(seconds: u64, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(seconds), future)
        .await
        .unwrap_or_else(|_| panic!("no answer within {seconds} s"))
}

/// Everything in the partitions of a topic, by partition and offset.
pub fn read_all(servers: &str, topic: &str) -> Vec<OwnedMessage> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", servers)
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .create()
        .unwrap();
    let metadata = consumer
        .fetch_metadata(Some(topic), Duration::from_secs(10))
        .unwrap();
    let mut assignment = TopicPartitionList::new();
    let mut left = 0;
    for partition in metadata.topics()[0].partitions() {
        let (low, high) = consumer
            .fetch_watermarks(topic, partition.id(), Duration::from_secs(10))
            .unwrap();
        if low < high {
            left += high - low;
            assignment
                .add_partition_offset(topic, partition.id(), Offset::Offset(low))
                .unwrap();
        }
    }
    consumer.assign(&assignment).unwrap();
    let mut messages = Vec::new();
    let end = Instant::now() + Duration::from_secs(20);
    while left > 0 {
        assert!(Instant::now() < end, "{left} messages of {topic} do not come");
        if let Some(message) = consumer.poll(Duration::from_millis(100)) {
            messages.push(message.unwrap().detach());
            left -= 1;
        }
    }
    messages.sort_by_key(|message| (message.partition(), message.offset()));
    messages
}

/// The payloads as text.
pub fn payloads(messages: &[OwnedMessage]) -> Vec<String> {
    messages
        .iter()
        .map(|message| String::from_utf8(message.payload().unwrap_or_default().to_vec()).unwrap())
        .collect()
}

/// How many threads of librdkafka's and ours this process has.
pub fn threads() -> usize {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.starts_with("rdk:") || name.starts_with("outbox-kafka"))
        .count()
}

/// The real broker that the tests talk to as administrator.
pub fn broker() -> String {
    env("OUTBOX_TEST_KAFKA")
}

/// A variable that scripts/services gives.
pub fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run scripts/services start && eval \"$(scripts/services env)\"")
    })
}

pub fn admin(servers: &str) -> AdminClient<DefaultClientContext> {
    ClientConfig::new()
        .set("bootstrap.servers", servers)
        .create()
        .unwrap()
}

/// Makes a topic of a name of its own on the real broker.
pub async fn new_topic(partitions: i32, config: &[(&str, &str)]) -> String {
    let name = fresh_name();
    create_topic(&name, partitions, config).await;
    name
}

pub fn fresh_name() -> String {
    format!("test-{}", outbox_core::MessageId::new())
}

pub async fn create_topic(name: &str, partitions: i32, config: &[(&str, &str)]) {
    let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
    for (option, value) in config {
        topic = topic.set(option, value);
    }
    let admin = admin(&broker());
    for result in admin.create_topics(&[topic], &AdminOptions::new()).await.unwrap() {
        result.unwrap();
    }
    // Answered by the controller; the broker itself learns a little later.
    for _ in 0..100 {
        let metadata = admin
            .inner()
            .fetch_metadata(Some(name), Duration::from_secs(5))
            .unwrap();
        if metadata.topics()[0].partitions().len() == usize::try_from(partitions).unwrap() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{name} was not made");
}

/// Grants the test user an operation on a topic.
pub(crate) fn grant(topic: &str, operation: Operation) {
    grants::grant(&broker(), &env("OUTBOX_TEST_KAFKA_USER"), topic, operation);
}

/// The configuration with which the test user logs in over TLS.
pub fn login() -> KafkaConfig {
    quick(env("OUTBOX_TEST_KAFKA_TLS"))
        .option("security.protocol", "SASL_SSL")
        .option("sasl.mechanism", "SCRAM-SHA-512")
        .option("sasl.username", env("OUTBOX_TEST_KAFKA_USER"))
        .option("sasl.password", env("OUTBOX_TEST_KAFKA_PASSWORD"))
        .option("ssl.ca.location", env("OUTBOX_TEST_KAFKA_CA"))
}

/// A topic's messages as their producers enqueued them.
pub fn messages(servers: &str, topic: &str) -> Vec<Message> {
    read_all(servers, topic)
        .iter()
        .map(|record| {
            let received = ReceivedMessage::read(record).unwrap();
            Message::from_stored(Parts {
                id: received.id,
                topic: received.topic.into(),
                key: received.key,
                payload: received.payload,
                headers: received.headers,
                content_type: received.content_type.map(Into::into),
                created_at: None,
                deliver_at: None,
            })
        })
        .collect()
}

pub fn exists(servers: &str, topic: &str) -> bool {
    let metadata = admin(servers)
        .inner()
        .fetch_metadata(Some(topic), Duration::from_secs(5))
        .unwrap();
    !metadata.topics()[0].partitions().is_empty()
}
