//! `outbox demo`: the promise, shown and checked.
//!
//! Producers ([`shop`]) → outbox → [`relay`], killed half-way → Kafka ([`broker`]) → [`consumer`] with an inbox. All
//! note what they did; [`promise`] compares the notes.

mod broker;
mod consumer;
mod promise;
mod relay;
mod report;
mod shop;
mod stage;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox::OutboxStore;
use outbox::sqlite::SqliteStore;
use outbox::sqlite::rusqlite;
use tokio::runtime::Runtime;

use self::broker::Broker;
use self::promise::{Journal, Verdict};
use self::relay::Running;
use self::shop::Shop;
use self::stage::Progress;
use super::signals::Signals;
use crate::args::DemoArgs;
use crate::exit::{Answer, Code, Failure, Result};
use crate::output;

/// Which part of the effects has happened when the relay is killed.
const KILL_AT: f64 = 0.4;
/// When nothing happens for so long, nothing more will.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often the stage looks at the counts.
const TICK: Duration = Duration::from_millis(10);

pub(crate) fn run(args: &DemoArgs) -> Result<Answer> {
    let runtime = super::runtime()?;
    let progress = Arc::new(Progress::new(args.orders));
    stop_at_signal(&runtime, progress.clone())?;
    let directory = tempfile::Builder::new()
        .prefix("outbox-demo-")
        .tempdir()
        .map_err(|error| {
            Failure::new(Code::Unavailable, format!("make a temporary folder: {error}")).because(&error)
        })?;
    let broker = Broker::start(args.kafka.as_deref(), &runtime)?;

    let played = play(args, directory.path(), &broker, &runtime, &progress);
    // Whatever happened: all threads end, the bars go, nothing is left behind.
    progress.stop();
    progress.close();
    let took = progress.elapsed();
    let mock = broker.is_mock();
    broker.close(&runtime);
    runtime.shutdown_background();

    if let Some(signal) = progress.interrupted() {
        return Ok(Answer::Interrupted(signal));
    }
    let verdict = played?;
    if args.json {
        report::json(&verdict, args, took)?;
    } else {
        report::table(&verdict, mock, took)?;
    }
    Ok(if verdict.kept { Answer::Yes } else { Answer::No })
}

/// The whole play. When the user has had enough it hurries to its end, where all threads have ended.
fn play(
    args: &DemoArgs,
    directory: &Path,
    broker: &Broker,
    runtime: &Runtime,
    progress: &Arc<Progress>,
) -> Result<Verdict> {
    let shop = Shop::open(directory, &broker.topic)?;
    let store = SqliteStore::open(shop.config.clone())?;
    let consumer = consumer::start(directory, broker, progress)?;
    let first = Running::start("first", &shop.config, &broker.servers)?;
    progress.say(format!(
        "{} producers place {} orders of {} customers in SQLite; about 1 in 20 rolls back",
        shop::PRODUCERS,
        args.orders,
        args.keys
    ));
    progress.say(format!(
        "a relay publishes to {}; a consumer with an inbox keeps books",
        broker.describe()
    ));
    let producers = shop.place(args.orders, args.keys, progress);

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a part of a u32"
    )]
    let kill_at = (f64::from(args.orders) * KILL_AT) as u64;
    wait_until(progress, || progress.effects() >= kill_at);
    first.kill()?;
    progress.say(format!(
        "the relay is {} after {} orders; producers go on",
        output::alarming_on_stderr("KILLED"),
        progress.effects()
    ));
    let second = Running::start("second", &shop.config, &broker.servers)?;
    progress.say(format!(
        "a second relay starts and waits until the dead one's lease of {} s has run out",
        relay::LEASE.as_secs()
    ));
    wait_until(progress, || owns(runtime, &store, &second));
    progress.say("it has taken over, and delivers again what may not have arrived");

    let placed = shop::join(producers)?;
    progress.committed(placed.committed.len());
    progress.say(format!(
        "all orders are placed: {} committed, {} rolled back",
        placed.committed.len(),
        placed.rolled_back.len()
    ));
    let expected = placed.committed.len() as u64;
    wait_until(progress, || progress.effects() >= expected);
    second.stop_in_order()?;
    progress.say("the relay stops in order; the consumer reads to the end of the topic");
    progress.finish();
    let consumed = consumer
        .join()
        .map_err(|_| Failure::new(Code::Unexpected, "the consumer of the demo panicked"))??;
    let journal = Journal {
        committed: placed.committed,
        rolled_back: placed.rolled_back,
        deliveries: consumed.deliveries,
        dropped: consumed.dropped,
        shop: shop.books()?,
        consumer: consumed.books,
        left: runtime.block_on(store.stats())?.backlog.value(),
    };
    Ok(journal.verdict())
}

/// Waits for something, but not when there are no more effects, nor when the user has had enough: what is missing
/// then is found in the end.
fn wait_until(progress: &Progress, mut happened: impl FnMut() -> bool) {
    let mut effects = progress.effects();
    let mut since = Instant::now();
    while !happened() && !progress.stopping() && since.elapsed() < PATIENCE {
        std::thread::sleep(TICK);
        if progress.effects() != effects {
            effects = progress.effects();
            since = Instant::now();
        }
    }
}

/// Whether this relay owns the outbox.
fn owns(runtime: &Runtime, store: &SqliteStore, relay: &Running) -> bool {
    runtime.block_on(store.stats()).is_ok_and(|stats| {
        stats
            .leases
            .iter()
            .any(|lease| lease.owner.as_ref() == Some(&relay.id))
    })
}

/// Ends the play early, and the process at the second signal.
fn stop_at_signal(runtime: &Runtime, progress: Arc<Progress>) -> Result<()> {
    let _guard = runtime.enter();
    let mut signals = Signals::listen().map_err(|error| {
        Failure::new(Code::Unexpected, format!("listen for signals: {error}")).because(&error)
    })?;
    runtime.spawn(async move {
        progress.interrupt(signals.next().await);
        let signal = signals.next().await;
        std::process::exit(128 + i32::from(signal));
    });
    Ok(())
}

fn sqlite_failed(what: &str, error: &rusqlite::Error) -> Failure {
    Failure::new(Code::Unavailable, format!("{what}: {error}"))
}
