//! A librdkafka producer and the thread that serves it.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use outbox_core::{Error, ErrorKind, Result};
use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::producer::{BaseProducer, Producer as _, PurgeConfig};

use crate::classify::Class;
use crate::config::Redactor;
use crate::context::Context;
use crate::error;
use crate::tracker::{Phase, Tracker};

/// How long a silence is an outage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) silence: Duration,
    pub(crate) after_error: Duration,
}

/// A producer from its making to its end; after a failure or a purge it is never used again.
///
/// Its thread serves delivery reports, watches for silence, purges when it is closed, and destroys the client, which
/// may block, when everybody else has let go of it.
pub(crate) struct Producer {
    pub(crate) client: Arc<BaseProducer<Context>>,
    pub(crate) tracker: Arc<Tracker>,
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer")
            .field("closing", &self.tracker.closing())
            .field("open", &self.tracker.open())
            .finish_non_exhaustive()
    }
}

impl Producer {
    pub(crate) fn new(config: &ClientConfig, redactor: &Redactor, patience: Patience) -> Result<Self> {
        let tracker = Tracker::new();
        let context = Context {
            tracker: tracker.clone(),
            redactor: redactor.clone(),
        };
        let client = BaseProducer::from_config_and_context(config, context)
            .map_err(|error| error::configuration(&error, redactor))?;
        let client = Arc::new(client);
        thread::Builder::new()
            .name("outbox-kafka".into())
            .spawn({
                let (client, tracker) = (client.clone(), tracker.clone());
                move || serve(client, &tracker, patience)
            })
            .map_err(|error| {
                Error::new(
                    ErrorKind::Unavailable,
                    "make kafka producer",
                    "no thread could be started",
                )
                .with_source(error)
            })?;
        Ok(Self { client, tracker })
    }
}

/// How long one call serves events before the other things are looked at.
const SLICE: Duration = Duration::from_millis(50);
/// How long reports of what is on its way are waited for after a fatal error, which says nothing about the brokers.
const DRAIN: Duration = Duration::from_secs(1);
/// How long the reports of purged messages are waited for: they need nobody but librdkafka's own threads.
const PURGED: Duration = Duration::from_secs(1);

fn serve(client: Arc<BaseProducer<Context>>, tracker: &Tracker, patience: Patience) {
    let mut purged = false;
    // Nobody can get a new reference once this thread has the only one.
    while Arc::strong_count(&client) > 1 {
        client.poll(SLICE);
        if let Some(closing) = tracker.silent(patience.silence, patience.after_error) {
            tracing::warn!(reason = %closing.reason, "kafka is out");
            tracker.close(closing);
        }
        if tracker.is_closed() && !purged {
            purge(&client, tracker);
            purged = true;
        }
    }
    drop(client);
    tracker.resolve_all();
    tracker.advance(Phase::Gone);
}

/// Drops what the producer has and resolves its receipts.
fn purge(client: &BaseProducer<Context>, tracker: &Tracker) {
    tracker.settle_in();
    client.purge(PurgeConfig::default().queue());
    if tracker
        .closing()
        .is_some_and(|closing| closing.class == Class::Broken)
    {
        serve_until_resolved(client, tracker, DRAIN);
    }
    client.purge(PurgeConfig::default().queue().inflight());
    serve_until_resolved(client, tracker, PURGED);
    tracker.resolve_all();
}

fn serve_until_resolved(client: &BaseProducer<Context>, tracker: &Tracker, limit: Duration) {
    let end = Instant::now() + limit;
    while tracker.open() > 0 && Instant::now() < end {
        client.poll(Duration::from_millis(5));
    }
}
