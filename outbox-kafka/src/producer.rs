//! librdkafka's producers and the threads that serve them.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use outbox_core::{Error, ErrorKind, Reason};
use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::producer::{BaseProducer, Producer as _, PurgeConfig};

use crate::config::{NO_EMPTY_KEY, Redactor};
use crate::context::{Context, GAPLESS};
use crate::error;
use crate::firsts::Firsts;
use crate::refused::Refused;
use crate::suspects::Suspects;
use crate::topics;
use crate::tracker::{Closing, Silence, Tracker};

pub(crate) type Client = BaseProducer<Context>;

/// What producers are made from.
#[derive(Clone)]
pub(crate) struct Recipe {
    pub(crate) config: ClientConfig,
    pub(crate) redactor: Redactor,
    pub(crate) suspects: Suspects,
    pub(crate) refused: Refused,
    /// After so long a silence the destination is out.
    pub(crate) silence: Duration,
    /// The same when the client has said that nobody can go.
    pub(crate) silence_after_error: Duration,
}

/// How messages travel to the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// In batches. When one is refused, nothing that comes after it is written: librdkafka calls it gapless.
    Fast,
    /// One message a request, so that each is accepted or refused for itself, and of each key one after the other.
    Careful,
}

/// A producer from its making to its end; after a failure or a purge it is never used again.
pub(crate) struct Producer {
    recipe: Recipe,
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) fast: Arc<Client>,
    /// Made when it is needed, which is rare.
    careful: Option<Arc<Client>>,
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer")
            .field("closing", &self.tracker.closing())
            .field("open", &self.tracker.open())
            .field("careful", &self.careful.is_some())
            .finish_non_exhaustive()
    }
}

impl Producer {
    pub(crate) fn new(recipe: &Recipe) -> outbox_core::Result<Self> {
        let tracker = Tracker::new(recipe.refused.clone());
        Ok(Self {
            fast: start(recipe, Lane::Fast, &tracker)?,
            recipe: recipe.clone(),
            tracker,
            careful: None,
        })
    }

    /// A topic may be another one from now on.
    pub(crate) fn forget(&self, topic: &str) {
        for client in [Some(&self.fast), self.careful.as_ref()].into_iter().flatten() {
            client.client().context().firsts.forget(topic);
        }
    }

    pub(crate) fn careful(&mut self) -> outbox_core::Result<Arc<Client>> {
        if let Some(careful) = &self.careful {
            return Ok(careful.clone());
        }
        let careful = start(&self.recipe, Lane::Careful, &self.tracker)?;
        Ok(self.careful.insert(careful).clone())
    }
}

fn start(recipe: &Recipe, lane: Lane, tracker: &Arc<Tracker>) -> outbox_core::Result<Arc<Client>> {
    let mut config = recipe.config.clone();
    match lane {
        Lane::Fast => config.set(GAPLESS, "true"),
        Lane::Careful => config.set("batch.num.messages", "1"),
    };
    let (scatters, partition) = NO_EMPTY_KEY;
    let context = Context {
        lane,
        empty_key: (config.get("partitioner") == Some(scatters)).then_some(partition),
        tracker: tracker.clone(),
        redactor: recipe.redactor.clone(),
        suspects: recipe.suspects.clone(),
        client: OnceLock::new(),
        dropped: AtomicBool::new(false),
        // What follows a message that came to nothing must not go before it has been sent again, and here librdkafka does not
        // see to that.
        firsts: match lane {
            Lane::Fast => Firsts::default(),
            Lane::Careful => Firsts::one_by_one(),
        },
    };
    let client = Client::from_config_and_context(&config, context)
        .map_err(|error| error::configuration(&error, &recipe.redactor))?;
    let client = Arc::new(client);
    // It has none yet.
    let _ = client.client().context().client.set(Arc::downgrade(&client));
    tracker.lane_starts();
    let thread = thread::Builder::new().name("outbox-kafka".into()).spawn({
        let (client, tracker, recipe) = (client.clone(), tracker.clone(), recipe.clone());
        move || serve(client, lane, &tracker, &recipe)
    });
    match thread {
        Ok(_) => Ok(client),
        Err(error) => {
            tracker.lane_is_purged();
            tracker.lane_ends();
            Err(Error::new(
                ErrorKind::Unavailable,
                "make kafka producer",
                "no thread could be started",
            )
            .with_source(error))
        }
    }
}

/// How long one call serves events before the other things are looked at.
const SLICE: Duration = Duration::from_millis(50);
/// How long the question may take why messages wait; reports are not served meanwhile.
const ASK: Duration = Duration::from_secs(2);
/// How long acknowledgements of what is on its way are waited for.
const DRAIN: Duration = Duration::from_secs(1);
/// How long the reports of purged messages are waited for: they need nobody but librdkafka's own threads.
const PURGED: Duration = Duration::from_secs(1);

/// Serves delivery reports, watches for silence, purges when the producer is closed, and destroys the client, which
/// may block, when everybody else has let go of it.
fn serve(client: Arc<Client>, lane: Lane, tracker: &Tracker, recipe: &Recipe) {
    let mut purged = false;
    let mut watch = Watch::new();
    // Nobody can get a new reference once this thread has the only one.
    while Arc::strong_count(&client) > 1 {
        client.poll(SLICE);
        // One of the two watches for both.
        if lane == Lane::Fast {
            watch.look(&client, tracker, recipe);
        }
        if !purged && tracker.is_closed() {
            purge(&client, tracker);
            tracker.lane_is_purged();
            purged = true;
        }
    }
    // Purges and serves the last reports as well.
    drop(client);
    if !purged {
        tracker.lane_is_purged();
    }
    tracker.lane_ends();
}

/// What closes the producer when the destination is out, or a topic holds everything up.
///
/// Messages that wait while others flow may belong to a topic that was deleted, to a partition without a leader, or to one
/// with too few replicas in sync. librdkafka would wait with them, and with it the receipts of whole batches.
struct Watch {
    asked: Instant,
    /// The topics that the brokers had nothing against when they were last asked, each with its oldest message that waited.
    waited: HashMap<Arc<str>, usize>,
}

impl Watch {
    fn new() -> Self {
        Self {
            asked: Instant::now(),
            waited: HashMap::new(),
        }
    }

    fn look(&mut self, client: &Client, tracker: &Tracker, recipe: &Recipe) {
        let silence = tracker.silent(recipe.silence, recipe.silence_after_error);
        if let Some(silence) = &silence
            && silence.explained
        {
            close_as_out(tracker, silence);
            return;
        }
        if self.asked.elapsed() < recipe.silence || tracker.is_closed() {
            return;
        }
        let waiting = tracker.waiting_topics(recipe.silence);
        if waiting.is_empty() {
            return;
        }
        let topics: Vec<Arc<str>> = waiting.keys().cloned().collect();
        let answers = topics::ask(client, &topics, ASK).topics;
        self.asked = Instant::now();
        let nobody_answers = answers.is_empty();
        let blocked = self.judge(&waiting, answers);
        if !blocked.is_empty() {
            tracing::warn!(topics = ?blocked.keys(), "topics have become unwritable with messages under way");
            tracker.close(Closing::blocked(blocked));
        } else if let Some(silence) = &silence
            && nobody_answers
        {
            close_as_out(tracker, silence);
        }
    }

    /// The topics that hold things up, of those that wait, each with its oldest message.
    fn judge(
        &mut self,
        waiting: &HashMap<Arc<str>, usize>,
        answers: HashMap<Arc<str>, Result<usize, Reason>>,
    ) -> HashMap<Arc<str>, Reason> {
        let waited = std::mem::take(&mut self.waited);
        let mut blocked = HashMap::new();
        for (topic, answer) in answers {
            let Some(oldest) = waiting.get(&topic) else {
                continue;
            };
            if let Err(reason) = answer {
                blocked.insert(topic, reason);
            } else if waited.get(&topic) == Some(oldest) {
                let reason = format!(
                    "the brokers answer and acknowledge nothing; has it min.insync.replicas in sync? (topic {topic})"
                );
                blocked.insert(topic, reason.into());
            } else {
                // The broker may have come back just now. If it still waits when they are asked again, it is the topic.
                self.waited.insert(topic, *oldest);
            }
        }
        blocked
    }
}

/// The destination is out: nothing of what is open will be acknowledged.
fn close_as_out(tracker: &Tracker, silence: &Silence) {
    tracing::warn!(reason = %silence.closing.reason, "kafka is out");
    tracker.close(silence.closing.clone());
}

/// Drops what the client has.
fn purge(client: &Client, tracker: &Tracker) {
    tracker.settle_in();
    if tracker.closing().is_some_and(|closing| closing.drain) {
        // What is to be tried again must not go out either.
        serve_until_empty(client, DRAIN, || client.purge(PurgeConfig::default().queue()));
    }
    // More than once: what moves from one of librdkafka's threads to another is in neither's hands.
    serve_until_empty(client, PURGED, || {
        client.purge(PurgeConfig::default().queue().inflight())
    });
}

fn serve_until_empty(client: &Client, limit: Duration, before: impl Fn()) {
    let end = Instant::now() + limit;
    while client.in_flight_count() > 0 && Instant::now() < end {
        before();
        client.poll(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(topics: &[(&str, usize)]) -> HashMap<Arc<str>, usize> {
        topics
            .iter()
            .map(|(topic, oldest)| ((*topic).into(), *oldest))
            .collect()
    }

    #[test]
    fn a_topic_that_the_brokers_have_nothing_against_is_blocked_when_it_waits_on_after_their_answer() {
        let mut watch = Watch::new();
        let well = || HashMap::from([("stuck".into(), Ok(1)), ("slow".into(), Ok(1))]);
        let blocked = watch.judge(&waiting(&[("stuck", 1), ("slow", 2)]), well());
        assert!(blocked.is_empty(), "{blocked:?}");
        let blocked = watch.judge(&waiting(&[("stuck", 1), ("slow", 3)]), well());
        assert_eq!(blocked.into_keys().collect::<Vec<_>>(), ["stuck".into()]);
        // Nobody has answered in between: it starts anew.
        assert!(watch.judge(&waiting(&[("slow", 3)]), HashMap::new()).is_empty());
        assert!(watch.judge(&waiting(&[("slow", 3)]), well()).is_empty());
    }

    #[test]
    fn a_topic_that_the_brokers_refuse_is_blocked_at_once() {
        let answers = HashMap::from([("gone".into(), Err("unknown".into())), ("well".into(), Ok(1))]);
        let blocked = Watch::new().judge(&waiting(&[("gone", 1), ("well", 2)]), answers);
        assert_eq!(blocked, HashMap::from([("gone".into(), "unknown".into())]));
    }
}
