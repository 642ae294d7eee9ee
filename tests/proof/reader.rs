//! The reader: takes everything out of a Kafka topic, with a consumer that knows nothing of the outbox.
//!
//! Not part of `proof`, which needs no server: a test that has Kafka includes this file beside it.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

use std::cell::RefCell;
use std::time::{Duration, Instant};

use outbox::kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use outbox::kafka::rdkafka::error::KafkaResult;
use outbox::kafka::rdkafka::message::{BorrowedMessage, Headers, Message};
use outbox::kafka::rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::proof::oracle::Arrived;

/// All records of the topic from its beginning up to the ends that it has now, partition by partition.
pub(crate) fn read_topic(servers: &str, topic: &str) -> Vec<Arrived> {
    let reader = Reader::new(servers, topic);
    let mut arrived = Vec::new();
    for partition in &reader.partitions {
        reader.read(*partition, &mut arrived);
    }
    arrived
}

/// Counts the records that the topic has, each time it is called.
pub(crate) fn counter(servers: &str, topic: &str) -> impl Fn() -> i64 + use<> {
    let reader = Reader::new(servers, topic);
    move || {
        let ends = reader.partitions.iter().map(|partition| reader.ends(*partition));
        ends.map(|(begin, end)| end - begin).sum()
    }
}

struct Reader {
    servers: String,
    topic: String,
    consumer: RefCell<BaseConsumer>,
    partitions: Vec<i32>,
}

impl Reader {
    fn new(servers: &str, topic: &str) -> Self {
        let mut reader = Self {
            servers: servers.to_owned(),
            topic: topic.to_owned(),
            consumer: RefCell::new(consumer(servers)),
            partitions: Vec::new(),
        };
        reader.partitions = reader.ask(|consumer| {
            let metadata = consumer.fetch_metadata(Some(topic), ANSWER)?;
            let partitions = metadata.topics()[0].partitions().iter();
            Ok(partitions.map(|partition| partition.id()).collect())
        });
        reader
    }

    /// Asks again while a broker that was away does not know its own topics yet; by another consumer, lest it be the consumer
    /// that waits for something.
    fn ask<T>(&self, question: impl Fn(&BaseConsumer) -> KafkaResult<T>) -> T {
        let begin = Instant::now();
        loop {
            let answer = question(&self.consumer.borrow());
            match answer {
                Err(_) if begin.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(100));
                    self.consumer.replace(consumer(&self.servers));
                }
                answer => return answer.unwrap(),
            }
        }
    }

    /// Where the partition begins and ends.
    fn ends(&self, partition: i32) -> (i64, i64) {
        self.ask(|consumer| consumer.fetch_watermarks(&self.topic, partition, ANSWER))
    }

    fn read(&self, partition: i32, arrived: &mut Vec<Arrived>) {
        let (topic, (begin, end)) = (&self.topic, self.ends(partition));
        let consumer = self.consumer.borrow();
        let mut assignment = TopicPartitionList::new();
        assignment
            .add_partition_offset(topic, partition, Offset::Offset(begin))
            .unwrap();
        consumer.assign(&assignment).unwrap();
        let (mut next, mut progress) = (begin, Instant::now());
        while next < end {
            assert!(
                progress.elapsed() < PATIENCE,
                "{topic}/{partition} ends at {next}, expected {end}"
            );
            if let Some(message) = consumer.poll(Duration::from_millis(100)) {
                let message = message.unwrap();
                // What is left of another partition's assignment is not counted twice.
                if message.partition() == partition {
                    next = message.offset() + 1;
                    arrived.push(record(&message));
                    progress = Instant::now();
                }
            }
        }
    }
}

fn consumer(servers: &str) -> BaseConsumer {
    ClientConfig::new()
        .set("bootstrap.servers", servers)
        .set("group.id", "proof")
        .set("enable.auto.commit", "false")
        // It measures how soon something arrives, and must not be the one that comes late.
        .set("reconnect.backoff.max.ms", "100")
        .create()
        .unwrap()
}

fn record(message: &BorrowedMessage<'_>) -> Arrived {
    let headers = message.headers().into_iter().flat_map(Headers::iter);
    Arrived {
        partition: message.partition(),
        offset: message.offset(),
        key: message.key().map(<[u8]>::to_vec),
        payload: message.payload().map(<[u8]>::to_vec),
        headers: headers
            .map(|header| (header.key.to_owned(), header.value.unwrap_or_default().to_vec()))
            .collect(),
    }
}

/// How long the broker may be silent.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long one question may take, so that it is asked more than once.
const ANSWER: Duration = Duration::from_secs(5);
