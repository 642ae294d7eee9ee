//! librdkafka's producers and the threads that serve them.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use outbox_core::{Error, ErrorKind, Result};
use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::producer::{BaseProducer, Producer as _, PurgeConfig};

use crate::config::Redactor;
use crate::context::{Context, GAPLESS};
use crate::error;
use crate::firsts::Firsts;
use crate::refused::Refused;
use crate::suspects::Suspects;
use crate::topics;
use crate::tracker::{Closing, Tracker};

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
    /// One message a request, so that each is accepted or refused for itself.
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
    pub(crate) fn new(recipe: &Recipe) -> Result<Self> {
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

    pub(crate) fn careful(&mut self) -> Result<Arc<Client>> {
        if let Some(careful) = &self.careful {
            return Ok(careful.clone());
        }
        let careful = start(&self.recipe, Lane::Careful, &self.tracker)?;
        Ok(self.careful.insert(careful).clone())
    }
}

fn start(recipe: &Recipe, lane: Lane, tracker: &Arc<Tracker>) -> Result<Arc<Client>> {
    let mut config = recipe.config.clone();
    match lane {
        Lane::Fast => config.set(GAPLESS, "true"),
        Lane::Careful => config.set("batch.num.messages", "1"),
    };
    let context = Context {
        lane,
        tracker: tracker.clone(),
        redactor: recipe.redactor.clone(),
        suspects: recipe.suspects.clone(),
        client: OnceLock::new(),
        dropped: AtomicBool::new(false),
        firsts: Firsts::default(),
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
    let mut asked = Instant::now();
    // Nobody can get a new reference once this thread has the only one.
    while Arc::strong_count(&client) > 1 {
        client.poll(SLICE);
        // One of the two watches for both.
        if lane == Lane::Fast {
            watch(&client, tracker, recipe, &mut asked);
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

/// Closes the producer when the destination is out.
fn watch(client: &Client, tracker: &Tracker, recipe: &Recipe, asked: &mut Instant) {
    match tracker.silent(recipe.silence, recipe.silence_after_error) {
        Some(silence) if silence.explained || !close_if_topics_are_blocked(client, tracker, recipe) => {
            tracing::warn!(reason = %silence.closing.reason, "kafka is out");
            tracker.close(silence.closing);
        }
        Some(_) => {}
        None if asked.elapsed() >= recipe.silence => {
            *asked = Instant::now();
            close_if_topics_are_blocked(client, tracker, recipe);
        }
        None => {}
    }
}

/// Messages that wait while others flow may belong to a topic that was deleted, or to a partition without a leader.
/// librdkafka would wait with them, and with it the receipts of whole batches. Whether that was so.
fn close_if_topics_are_blocked(client: &Client, tracker: &Tracker, recipe: &Recipe) -> bool {
    let waiting = tracker.waiting_topics(recipe.silence);
    if waiting.is_empty() || tracker.is_closed() {
        return false;
    }
    let blocked: HashMap<_, _> = topics::ask(client, &waiting, ASK)
        .topics
        .into_iter()
        .filter_map(|(topic, answer)| Some((topic, answer.err()?)))
        .collect();
    if blocked.is_empty() {
        return false;
    }
    tracing::warn!(topics = ?blocked.keys(), "topics have become unwritable with messages under way");
    tracker.close(Closing::blocked(blocked));
    true
}

/// Drops what the client has.
fn purge(client: &Client, tracker: &Tracker) {
    tracker.settle_in();
    if tracker.closing().is_some_and(|closing| closing.drain) {
        // What is to be tried again must not go out either.
        serve_until_empty(client, DRAIN, || client.purge(PurgeConfig::default().queue()));
    }
    client.purge(PurgeConfig::default().queue().inflight());
    serve_until_empty(client, PURGED, || ());
}

fn serve_until_empty(client: &Client, limit: Duration, before: impl Fn()) {
    let end = Instant::now() + limit;
    while client.in_flight_count() > 0 && Instant::now() < end {
        before();
        client.poll(Duration::from_millis(5));
    }
}
