//! The sink.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use outbox_core::{
    Error, ErrorKind, Outcome, Reason, Receipt, Record, Result, Sink, SinkCapabilities, check_topic,
};
use rdkafka::producer::Producer as _;

use crate::classify::Class;
use crate::config::KafkaConfig;
use crate::error;
use crate::handing::{Handing, Item};
use crate::producer::{Producer, Recipe};
use crate::refused::{Refused, Unheard};
use crate::suspects::Suspects;
use crate::topics::{self, Answers};
use crate::tracker::{Closing, Phase, Tracker, makes_purge};

/// Publishes to Kafka.
///
/// - Idempotent, every replica in sync acknowledges, and retries are librdkafka's own, in order and without end.
///   So it never answers [`Outcome::Retry`], and an outage burns no attempts.
/// - A message that librdkafka or the broker refuses for what it is, is [`Outcome::Poison`]; the key's successors go
///   on ([`SinkCapabilities::stops_key_at_failure`] is false).
/// - A topic that is unknown or forbidden is [`Outcome::TopicBlocked`], mostly before anything is sent; so is one that
///   refuses the time of this machine's clock. Nothing that follows of it goes out before the relay has heard.
/// - Silence is an outage: see [`KafkaConfig::outage_after`]. Its reason is what the client said last (wrong password,
///   unknown certificate, connection refused).
/// - After an outage, a fatal error or a purge the producer is thrown away and a new one made.
///
/// Dropping it does not block; what was not acknowledged by then may or may not have been written.
///
/// # Example
/// ```no_run
/// use outbox_kafka::{KafkaConfig, KafkaSink};
///
/// let sink = KafkaSink::new(&KafkaConfig::new("localhost:9092"))?;
/// # Ok::<(), outbox_core::Error>(())
/// ```
pub struct KafkaSink {
    recipe: Recipe,
    request_timeout: Duration,
    /// The one that takes messages; none after a purge, until somebody needs one.
    producer: Option<Producer>,
    /// The one that probes while `producer` is closed and waits for the purge. Becomes `producer` then.
    spare: Option<Producer>,
    /// Why no producer could be made, until the relay rebuilds.
    unmade: Option<Reason>,
    /// Topics that `producer` may be given messages for without asking, with their partitions.
    known: HashMap<Arc<str>, usize>,
    /// When it was asked last.
    asked: Instant,
    /// Topics whose messages go one by one by `producer`: those that were suspects when it was made, and are still. Of all
    /// others it may have messages in batches, which those that go one by one could overtake.
    suspects: Vec<Arc<str>>,
}

/// How long [`Sink::purge`] waits for librdkafka's threads, which may be stuck in the system's name resolution.
const PURGE_LIMIT: Duration = Duration::from_secs(5);
/// How long after the last question topics whose partitions are not known are asked for again.
const ASK_AGAIN: Duration = Duration::from_secs(30);

/// The configuration has passwords.
impl fmt::Debug for KafkaSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaSink")
            .field("producer", &self.producer)
            .field("known_topics", &self.known.len())
            .finish_non_exhaustive()
    }
}

/// OpenSSL takes itself apart when the process exits, under the hands of librdkafka's threads, which are not waited for:
/// one that is amid a handshake would crash, and a good exit would look like a bad one. Who initialises it first can keep
/// it from that; the system frees all of it anyway.
fn keep_openssl_until_exit() {
    #[cfg(feature = "ssl")]
    openssl_sys::init();
}

impl KafkaSink {
    /// A sink for these brokers. Does not wait for a connection.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) when the configuration is refused, by us or by librdkafka, naming the option;
    /// [`Unsupported`](ErrorKind::Unsupported) when it needs a feature that was not built in.
    pub fn new(config: &KafkaConfig) -> Result<Self> {
        keep_openssl_until_exit();
        let mut sink = Self {
            recipe: Recipe {
                config: config.prepare()?,
                redactor: config.redactor(),
                suspects: Suspects::default(),
                refused: Refused::default(),
                silence: config.outage_after,
                silence_after_error: config.outage_after_error,
            },
            request_timeout: config.request_timeout,
            producer: None,
            spare: None,
            unmade: None,
            known: HashMap::new(),
            asked: Instant::now(),
            suspects: Vec::new(),
        };
        // A wrong option shows here and not at the first message.
        sink.producer = Some(Producer::new(&sink.recipe)?);
        Ok(sink)
    }

    /// Makes sure that there is a producer, which may be closed.
    fn ensure_producer(&mut self) -> Result<()> {
        if self.producer.is_none() {
            self.known.clear();
            self.suspects = self.recipe.suspects.now(true);
            self.producer = Some(match self.spare.take() {
                Some(spare) if !spare.tracker.is_closed() => spare,
                _ => Producer::new(&self.recipe)?,
            });
        }
        Ok(())
    }

    /// A producer may close without the relay's having to know: when the refusal that closed it blocked a topic, and all
    /// else was acknowledged. Nothing has to wait for a purge then.
    async fn replace_if_nobody_is_concerned(&mut self) {
        if let Some(producer) = &self.producer
            && producer.tracker.is_closed()
            && !producer.tracker.purge_is_due()
            && producer.tracker.reached(Phase::Resolved, PURGE_LIMIT).await
            && !producer.tracker.purge_is_due()
        {
            self.producer = None;
        }
    }

    /// Ends the producer and waits for that, but not for ever. Dropped half-way it can be called again.
    async fn discard(&mut self, why: &str) {
        let Some(producer) = &self.producer else {
            return;
        };
        let tracker = producer.tracker.clone();
        tracker.close(Closing::new(Class::Unknown, why));
        if !tracker.reached(Phase::Resolved, PURGE_LIMIT).await {
            tracing::warn!("the kafka producer does not end; its messages are taken as unknown");
            tracker.resolve_all();
        }
        // Its threads have the last references then, and destroy it.
        self.producer = None;
        if !tracker.reached(Phase::Gone, PURGE_LIMIT).await {
            tracing::warn!("the threads of a kafka producer have not ended yet");
        }
    }

    /// The receipt of a batch that comes too late for a producer.
    fn refuse(&self, topics: &[Arc<str>], unheard: Unheard, tracker: &Tracker) -> Receipt {
        let closing = tracker.closing();
        let outcome = |topic: &Arc<str>| {
            let outcome = match &closing {
                Some(closing) => closing.outcome(topic),
                None => Outcome::Skipped,
            };
            self.recipe
                .refused
                .note(topic, &outcome, &Arc::downgrade(&unheard));
            outcome
        };
        let outcomes: Vec<Outcome> = topics.iter().map(outcome).collect();
        if outcomes.iter().any(makes_purge) {
            tracker.make_purge_due();
        }
        Receipt::pending(async move {
            drop(unheard);
            outcomes
        })
    }

    /// Asks for topics that were not asked for before: those that cannot be written to, with the reason.
    async fn blocked_topics(&mut self, batch: &[Record]) -> Vec<(Arc<str>, Outcome)> {
        let Some(producer) = &self.producer else {
            return Vec::new();
        };
        for topic in producer.tracker.take_unwritable() {
            self.known.remove(&topic);
            producer.forget(&topic);
        }
        let again = self.asked.elapsed() >= ASK_AGAIN;
        let mut unknown: Vec<Arc<str>> = Vec::new();
        let mut last: &str = "";
        for record in batch {
            let topic = record.message.topic();
            // Most batches have few topics, and long runs of one.
            if topic != last
                && self
                    .known
                    .get(topic)
                    .is_none_or(|partitions| *partitions == topics::UNKNOWN && again)
                && !unknown.iter().any(|other| **other == *topic)
                && check_topic(topic).is_ok()
            {
                unknown.push(topic.into());
            }
            last = topic;
        }
        if unknown.is_empty() {
            return Vec::new();
        }
        self.asked = Instant::now();
        let (client, timeout) = (producer.fast.clone(), self.request_timeout);
        let asked = tokio::task::spawn_blocking(move || {
            let answers = topics::ask(&client, &unknown, timeout);
            (answers, unknown)
        });
        let Ok((Answers { topics, error }, unknown)) = asked.await else {
            return Vec::new();
        };
        if let Some(error) = error {
            tracing::debug!(%error, "topics could not be asked for");
            if let Some((_, reason)) = producer.tracker.last_trouble() {
                producer.tracker.close(Closing::new(Class::Outage, reason));
                return Vec::new();
            }
            // Only slow, it seems: librdkafka finds out by itself.
            let unanswered = unknown.into_iter().filter(|topic| !topics.contains_key(topic));
            self.known
                .extend(unanswered.map(|topic| (topic, topics::UNKNOWN)));
        }
        let mut blocked = Vec::new();
        for (topic, answer) in topics {
            match answer {
                Err(reason) => blocked.push((topic, Outcome::TopicBlocked(reason))),
                Ok(partitions) => {
                    self.known.insert(topic, partitions);
                }
            }
        }
        blocked
    }
}

#[async_trait]
impl Sink for KafkaSink {
    fn capabilities(&self) -> SinkCapabilities {
        SinkCapabilities {
            name: "kafka",
            stops_key_at_failure: false,
        }
    }

    async fn publish(&mut self, batch: Vec<Record>) -> Receipt {
        if batch.is_empty() {
            return Receipt::ready(Vec::new());
        }
        let (unheard, _open) = self.recipe.refused.begin();
        self.replace_if_nobody_is_concerned().await;
        if self.unmade.is_none()
            && let Err(error) = self.ensure_producer()
        {
            self.unmade = Some(error.to_string().into());
        }
        // Until the relay has heard of it, nothing may go by a producer that can be made after all.
        if let Some(reason) = &self.unmade {
            return Receipt::ready(vec![Outcome::Broken(reason.clone()); batch.len()]);
        }
        for (topic, outcome) in self.blocked_topics(&batch).await {
            self.recipe
                .refused
                .note(&topic, &outcome, &Arc::downgrade(&unheard));
        }
        let Some(producer) = &mut self.producer else {
            return Receipt::ready(vec![Outcome::Skipped; batch.len()]);
        };
        let tracker = producer.tracker.clone();
        if let Some(closing) = breaks() {
            tracker.close(closing);
        }
        let messages = batch.len();
        let items: Vec<Item> = batch.into_iter().map(Item::new).collect();
        let topics: Vec<Arc<str>> = items.iter().map(|item| item.parts.topic.clone()).collect();
        // The relay has not seen yet that an earlier batch failed; what follows must not overtake it.
        if tracker.is_closed() {
            return self.refuse(&topics, unheard, &tracker);
        }
        if !self.suspects.is_empty() {
            let suspects = self.recipe.suspects.now(tracker.careful_is_empty());
            self.suspects.retain(|topic| suspects.contains(topic));
        }
        let careful = if self.suspects.is_empty() {
            None
        } else {
            match producer.careful() {
                Ok(careful) => Some(careful),
                Err(error) => {
                    tracker.close(Closing::new(Class::Broken, error.to_string()));
                    return self.refuse(&topics, unheard, &tracker);
                }
            }
        };
        let (first, outcomes) = match tracker.register(topics, &unheard) {
            Ok(registered) => registered,
            Err(topics) => return self.refuse(&topics, unheard, &tracker),
        };
        let handing = Handing {
            tracker: &tracker,
            fast: &producer.fast,
            careful: careful.as_deref(),
            suspects: &self.suspects,
            refused: &self.recipe.refused,
            known: &self.known,
        };
        handing.all((first..).zip(items).collect()).await;
        Receipt::pending(async move {
            let outcomes = outcomes.await.unwrap_or_else(|_| {
                vec![Outcome::Unknown("the producer ended without a word".into()); messages]
            });
            drop(unheard);
            outcomes
        })
    }

    async fn probe(&mut self) -> Result<()> {
        self.ensure_producer()?;
        let usable = |producer: &Option<Producer>| {
            producer
                .as_ref()
                .filter(|producer| !producer.tracker.is_closed())
                .map(|producer| (producer.fast.clone(), producer.tracker.clone()))
        };
        let found = usable(&self.producer).or_else(|| usable(&self.spare));
        let (client, tracker) = match found {
            Some(found) => found,
            None => {
                let spare = Producer::new(&self.recipe)?;
                let found = (spare.fast.clone(), spare.tracker.clone());
                self.spare = Some(spare);
                found
            }
        };
        // A question about one topic is small; all topics of a cluster may be many.
        let topic = self.known.keys().next().cloned();
        let timeout = self.request_timeout;
        let asked = tokio::task::spawn_blocking(move || {
            client
                .client()
                .fetch_metadata(topic.as_deref(), timeout)
                .map(drop)
        });
        match asked.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error::request("probe kafka", error, tracker.last_trouble())),
            Err(error) => Err(Error::new(
                ErrorKind::Unavailable,
                "probe kafka",
                "the runtime is shutting down",
            )
            .with_source(error)),
        }
    }

    async fn purge(&mut self) {
        // One that has nothing can go on.
        let idle = |producer: &Producer| !producer.tracker.is_closed() && producer.tracker.open() == 0;
        if !self.producer.as_ref().is_some_and(idle) {
            self.discard("dropped by the relay").await;
        }
        self.recipe.refused.forget();
    }

    async fn rebuild(&mut self) -> Result<()> {
        self.discard("the producer is made anew").await;
        self.recipe.refused.forget();
        self.unmade = None;
        self.ensure_producer()
    }
}

/// The producer ends here as by a fatal error, when a test wants it to: `FAILPOINTS="producer=5*off->1*return->off"`,
/// at the batch after the fifth.
#[cfg(feature = "failpoints")]
fn breaks() -> Option<Closing> {
    fail::fail_point!("producer", |_| Some(
        Closing::new(Class::Broken, "a failpoint").draining()
    ));
    None
}

#[cfg(not(feature = "failpoints"))]
const fn breaks() -> Option<Closing> {
    None
}
