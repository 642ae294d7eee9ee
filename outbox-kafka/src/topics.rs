//! Whether topics can be written to, asked before their first message is handed over.
//!
//! librdkafka waits half a minute before it gives up on a topic that does not exist, and keeps the other messages of
//! the batch from being settled meanwhile; and were the topic made in that time, later messages could overtake those
//! that were given up.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_core::Reason;
use rdkafka::error::KafkaError;
use rdkafka::metadata::MetadataTopic;
use rdkafka::producer::Producer as _;
use rdkafka::types::RDKafkaErrorCode as Code;

use crate::classify::{Class, classify};
use crate::producer::Client;

/// What was found out about topics.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    /// How many partitions a topic has, or why it cannot be written to.
    pub(crate) topics: HashMap<Arc<str>, Result<usize, Reason>>,
    /// Why not all were answered.
    pub(crate) error: Option<KafkaError>,
}

/// From so many on, one question for all topics is cheaper than one each.
const MANY: usize = 20;

/// Asks the brokers; blocks for at most `timeout`.
pub(crate) fn ask(client: &Client, topics: &[Arc<str>], timeout: Duration) -> Answers {
    let end = Instant::now() + timeout;
    let mut answers = Answers::default();
    if topics.len() >= MANY {
        match client.client().fetch_metadata(None, timeout) {
            Ok(metadata) => {
                for found in metadata.topics() {
                    if let Some(topic) = topics.iter().find(|topic| ***topic == *found.name()) {
                        answers.topics.insert(topic.clone(), verdict(found));
                    }
                }
            }
            Err(error) => {
                answers.error = Some(error);
                return answers;
            }
        }
    }
    // Also those that the list of all topics does not have: only asked by name does the broker say why, or make them.
    for topic in topics {
        if answers.topics.contains_key(topic) {
            continue;
        }
        let left = end.saturating_duration_since(Instant::now());
        match client
            .client()
            .fetch_metadata(Some(topic), left.max(Duration::from_millis(1)))
        {
            Ok(metadata) => {
                if let Some(found) = metadata.topics().first() {
                    answers.topics.insert(topic.clone(), verdict(found));
                }
            }
            Err(error) => {
                answers.error = Some(error);
                return answers;
            }
        }
    }
    answers
}

/// So many that not all are known.
pub(crate) const UNKNOWN: usize = usize::MAX;

fn verdict(topic: &MetadataTopic) -> Result<usize, Reason> {
    if let Some(error) = topic.error() {
        let code = Code::from(error);
        // A topic that is being made has no leader yet: librdkafka waits for it.
        return if classify(code) == Class::TopicBlocked && code != Code::LeaderNotAvailable {
            Err(Reason::from(format!("{code} (topic {})", topic.name())))
        } else {
            Ok(UNKNOWN)
        };
    }
    let partitions = topic.partitions();
    match partitions.iter().find(|partition| partition.leader() < 0) {
        Some(partition) => Err(Reason::from(format!(
            "partition {} has no leader (topic {})",
            partition.id(),
            topic.name()
        ))),
        None if partitions.is_empty() => Ok(UNKNOWN),
        None => Ok(partitions.len()),
    }
}
