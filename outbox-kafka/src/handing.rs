//! Handing a batch to librdkafka, of each key in order.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use outbox_core::{Outcome, Parts, Reason, Record, check_topic};
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseRecord, Producer as _};
use rdkafka::types::RDKafkaErrorCode as Code;

use crate::classify::{Class, classify};
use crate::firsts::Turn;
use crate::headers;
use crate::producer::Client;
use crate::refused::Refused;
use crate::topics;
use crate::tracker::{Closing, Tracker, outcome};

/// After so many messages others get their turn on the executor.
const YIELD_AFTER: usize = 256;

/// A message of a batch.
pub(crate) struct Item {
    pub(crate) parts: Parts,
    key_seq: Option<i64>,
    /// Why it can never be handed over.
    refusal: Option<Reason>,
}

impl Item {
    pub(crate) fn new(record: Record) -> Self {
        let parts = record.message.into_parts();
        Self {
            refusal: refusal(&parts, record.defect),
            key_seq: record.key_seq,
            parts,
        }
    }
}

/// A batch on its way to librdkafka.
pub(crate) struct Handing<'a> {
    pub(crate) tracker: &'a Tracker,
    pub(crate) fast: &'a Client,
    pub(crate) careful: Option<&'a Client>,
    pub(crate) suspects: &'a [Arc<str>],
    pub(crate) refused: &'a Refused,
    pub(crate) known: &'a HashMap<Arc<str>, usize>,
}

/// What came of offering a message.
enum Offered {
    Done,
    /// Its turn has not come.
    Later,
    /// The producer is closed: the rest is resolved with what is being purged.
    Closed,
}

impl Handing<'_> {
    /// Hands everything over, with its number, of each key in order. Those whose turn has not come wait and let others go.
    pub(crate) async fn all(&self, mut items: Vec<(usize, Item)>) {
        // A topic of which every message may go.
        let mut free: Arc<str> = "".into();
        loop {
            let mut waiting = Vec::new();
            let mut keys = HashSet::new();
            for (count, (number, item)) in items.into_iter().enumerate() {
                if count % YIELD_AFTER == YIELD_AFTER - 1 {
                    tokio::task::yield_now().await;
                }
                let name = || (item.parts.topic.clone(), item.parts.key.clone());
                if !keys.is_empty() && keys.contains(&name()) {
                    waiting.push((number, item));
                    continue;
                }
                match self.offer(number, &item, &mut free).await {
                    Offered::Done => {}
                    Offered::Later => {
                        keys.insert(name());
                        waiting.push((number, item));
                    }
                    Offered::Closed => return,
                }
            }
            if waiting.is_empty() {
                return;
            }
            items = waiting;
            self.tracker.room().await;
            if self.tracker.is_closed() {
                return;
            }
        }
    }

    async fn offer(&self, number: usize, item: &Item, free: &mut Arc<str>) -> Offered {
        let parts = &item.parts;
        let resolve = |outcome| self.tracker.resolve(number, outcome);
        if let Some(reason) = &item.refusal {
            resolve(Outcome::Poison(reason.clone()));
            return Offered::Done;
        }
        if let Some(reason) = self.refused.reason(&parts.topic) {
            resolve(Outcome::TopicBlocked(reason));
            return Offered::Done;
        }
        let careful = self.careful.filter(|_| self.suspects.contains(&parts.topic));
        let client = careful.unwrap_or(self.fast);
        let firsts = &client.client().context().firsts;
        if let Some(key) = &parts.key
            && *free != parts.topic
        {
            let partitions = self.known.get(&parts.topic).copied();
            match firsts.turn(&parts.topic, partitions.unwrap_or(topics::UNKNOWN), key) {
                Turn::Always => *free = parts.topic.clone(),
                Turn::Now => {}
                Turn::Later => return Offered::Later,
            }
        }
        if careful.is_some() {
            self.tracker.enter_careful();
        }
        let handed = hand_over(client, self.tracker, parts, item.key_seq, number).await;
        if careful.is_some() && !matches!(handed, Handed::Over) {
            self.tracker.leave_careful();
        }
        match handed {
            Handed::Over => Offered::Done,
            Handed::Refused(outcome) => {
                firsts.told(&parts.topic, parts.key.as_deref(), None);
                resolve(outcome);
                Offered::Done
            }
            Handed::Closed => Offered::Closed,
        }
    }
}

/// What came of handing a message to librdkafka.
enum Handed {
    Over,
    Refused(Outcome),
    Closed,
}

/// Hands a message over, waiting while the queue is full.
async fn hand_over(
    client: &Client,
    tracker: &Tracker,
    parts: &Parts,
    key_seq: Option<i64>,
    number: usize,
) -> Handed {
    let mut record = BaseRecord {
        topic: &parts.topic,
        partition: parts
            .key
            .as_ref()
            .filter(|key| key.is_empty())
            .and(client.client().context().empty_key),
        payload: parts.payload.as_deref(),
        key: parts.key.as_deref(),
        timestamp: None,
        headers: Some(headers::outgoing(parts, key_seq)),
        delivery_opaque: number,
    };
    loop {
        let attempt = tracker.unless_closed(|| match client.send(record) {
            Ok(()) => Attempt::Sent,
            Err((KafkaError::MessageProduction(Code::QueueFull), same)) => Attempt::Full(same),
            Err((error, _)) => Attempt::Failed(error.rdkafka_error_code().unwrap_or(Code::InvalidArgument)),
        });
        match attempt {
            None => return Handed::Closed,
            Some(Attempt::Sent) => return Handed::Over,
            // The same record again, before any other: rdkafka's own `send` lets others overtake it here.
            Some(Attempt::Full(same)) => record = same,
            Some(Attempt::Failed(code)) => {
                let class = classify(code);
                // Of a fatal error only the client knows the cause, if it has not told it yet.
                let (asked, redactor) = (client.client(), &client.client().context().redactor);
                let told = asked.fatal_error().map(|(_, cause)| redactor.apply(&cause));
                let told = told.unwrap_or_else(|| code.to_string());
                let reason = Reason::from(format!("{told} (topic {})", parts.topic));
                if class == Class::TopicBlocked {
                    tracker.note_unwritable(&parts.topic);
                }
                if matches!(class, Class::Poison | Class::TopicBlocked) {
                    return Handed::Refused(outcome(class, reason));
                }
                tracker.close(Closing::new(class, reason.as_str()).draining());
                return Handed::Closed;
            }
        }
        tracker.room().await;
    }
}

enum Attempt<'a> {
    Sent,
    Full(BaseRecord<'a, [u8], [u8], usize>),
    Failed(Code),
}

/// Why a message can never be handed over.
fn refusal(parts: &Parts, defect: Option<String>) -> Option<Reason> {
    if let Some(defect) = defect {
        return Some(defect.into());
    }
    if let Err(error) = check_topic(&parts.topic) {
        return Some(error.to_string().into());
    }
    None
}
