//! What a test of the program stands on: an application's SQLite file, a fresh topic, relays as processes.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

mod database;
pub(crate) mod kafka;
pub(crate) mod relay;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outbox::sqlite::{SqliteConfig, SqliteStore};
use outbox::{DeadLetterQuery, OutboxStore, Stats};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use self::database::SqliteProducer;
use self::relay::Relay;
use crate::proof::oracle::{Ending, Limits, Run};
use crate::proof::report::Report;
use crate::proof::writer::{Load, WriterLog};
use crate::reader::{counter, read_topic};

/// How relays are configured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Relays {
    pub(crate) lease: Duration,
    pub(crate) grace: Duration,
    pub(crate) rate_limit: Option<u32>,
}

impl Default for Relays {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(10),
            grace: Duration::from_secs(10),
            rate_limit: None,
        }
    }
}

/// How many records a relay has in flight at most.
pub(crate) const WINDOW: usize = 800;

/// One application: its database, its outbox, its topic.
pub(crate) struct Stage {
    folder: TempDir,
    database: SqliteConfig,
    store: SqliteStore,
    runtime: Runtime,
    servers: String,
    topic: String,
    started: AtomicUsize,
    /// One at a time: the figures of two that share the machine mean nothing.
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    /// An empty stage.
    pub(crate) fn new(servers: &str, relays: Relays) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir().unwrap();
        let database = SqliteConfig::new(folder.path().join("app.db"));
        database::make_tables(&database);
        let runtime = Runtime::new().unwrap();
        let topic = runtime.block_on(kafka::new_topic(servers, 6));
        let stage = Self {
            store: SqliteStore::open(database.clone()).unwrap(),
            folder,
            database,
            runtime,
            servers: servers.to_owned(),
            topic,
            started: AtomicUsize::new(0),
            _turn: turn,
        };
        std::fs::write(stage.file("relay.toml"), stage.configuration(relays)).unwrap();
        stage
    }

    fn configuration(&self, relays: Relays) -> String {
        let rate_limit = relays
            .rate_limit
            .map_or(String::new(), |rate| format!("rate_limit = {rate}"));
        format!(
            r#"
            [store]
            type = "sqlite"
            path = {:?}
            [sink]
            type = "kafka"
            bootstrap_servers = {:?}
            [relay]
            lease = "{}ms"
            grace = "{}ms"
            batch_rows = {}
            window_rows = {WINDOW}
            {rate_limit}
            "#,
            self.database.path,
            self.servers,
            relays.lease.as_millis(),
            relays.grace.as_millis(),
            WINDOW / 4,
        )
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The load that the environment asks for, by default one that suits continuous integration.
    pub(crate) fn load(&self, spread: Duration) -> Load {
        Load {
            topic: self.topic.clone(),
            messages: from_environment("OUTBOX_PROOF_MESSAGES", 20_000),
            keys: from_environment("OUTBOX_PROOF_KEYS", 500),
            producers: from_environment("OUTBOX_PROOF_PRODUCERS", 8),
            rollback_each: 20,
            hold_each: 500,
            hold: Duration::from_millis(500),
            spread,
        }
    }

    /// Writes the load, and logs it.
    pub(crate) fn write(&self, load: &Load) {
        let log = WriterLog::open(&self.file("writer.log"));
        load.write(&log, || SqliteProducer::connect(&self.database));
    }

    /// Starts a relay.
    pub(crate) fn relay(&self) -> Relay {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        Relay::start(&self.file("relay.toml"), self.relay_log(number))
    }

    fn relay_log(&self, number: usize) -> PathBuf {
        self.file(&format!("relay-{number}.log"))
    }

    /// The state of the outbox.
    pub(crate) fn stats(&self) -> Stats {
        self.runtime.block_on(self.store.stats()).unwrap()
    }

    /// How often a relay began to work, by all relays' logs; each time but the first it may repeat something.
    pub(crate) fn beginnings(&self) -> usize {
        let logs = (0..self.started.load(Ordering::Relaxed)).map(|number| self.relay_log(number));
        logs.map(|log| {
            std::fs::read_to_string(log)
                .unwrap()
                .matches("shard gained")
                .count()
        })
        .sum()
    }

    /// Which of the relays owns the outbox.
    pub(crate) fn owner(&self, relays: &[Relay]) -> Option<usize> {
        let owner = self.stats().leases[0].owner.clone()?;
        let is_owner = |relay: &Relay| owner.as_str().contains(&format!("-{}-", relay.pid()));
        relays.iter().position(is_owner)
    }

    /// Does something at a moment at which a relay has delivered messages and, very likely, waits to settle them: the
    /// test has the database's lock.
    pub(crate) fn before_settlement(&self, work: impl FnOnce()) {
        let count = counter(&self.servers, &self.topic);
        database::locked(&self.database, || {
            let before = count();
            let delivered = until(Duration::from_secs(20), || (count() > before).then_some(()));
            assert!(delivered.is_some(), "nothing is delivered");
            // The broker's answer is under way to the relay as well.
            std::thread::sleep(Duration::from_millis(50));
            work();
        });
    }

    /// Waits until nothing is left to deliver.
    pub(crate) fn wait_until_drained(&self, relays: &mut [Relay]) {
        let drained = until(Duration::from_secs(120), || {
            relays.iter_mut().for_each(Relay::assert_alive);
            (self.stats().backlog.value() == 0).then_some(())
        });
        if drained.is_none() {
            let logs: String = relays.iter().map(|relay| relay.log()).collect();
            panic!(
                "the backlog does not shrink to nothing: {:?}\n{logs}",
                self.stats()
            );
        }
    }

    /// What is left.
    pub(crate) fn ending(&self) -> Ending {
        let stats = self.stats();
        Ending {
            backlog: stats.backlog.value(),
            held: stats.retrying + stats.parked,
            scheduled: stats.scheduled,
            owned_shards: stats.leases.iter().filter(|lease| lease.owner.is_some()).count(),
            relays: stats.relays.len(),
        }
    }

    /// Ends the relays in order, reads everything and lets the oracle judge.
    pub(crate) fn judge(&self, title: &str, relays: Vec<Relay>, limits: Limits) -> Report {
        for relay in relays {
            let log = relay.log();
            let (status, _) = relay.terminate();
            assert!(status.success(), "a relay ended with {status}:\n{log}");
        }
        // Those that were killed count as members until their time is over.
        until(Duration::from_secs(15), || {
            (self.ending() == Ending::default()).then_some(())
        });
        let arrived = read_topic(&self.servers, &self.topic);
        let dead = self.runtime.block_on(async {
            let letters = self.store.dead_letters().unwrap();
            letters.list(&DeadLetterQuery::default()).await.unwrap()
        });
        let run = Run {
            topic: self.topic.clone(),
            written: WriterLog::read(&self.file("writer.log")),
            effects: Some(database::consume(&self.database, &arrived)),
            arrived,
            dead: dead.into_iter().map(|letter| letter.record.id).collect(),
            ending: Some(self.ending()),
            limits,
        };
        let report = run.judge();
        say(&format!("{title}, {} beginnings\n{report}", self.beginnings()));
        report
    }
}

/// What a failed test leaves behind tells why.
impl Drop for Stage {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.folder.disable_cleanup(true);
            say(&format!(
                "database and logs are kept in {}",
                self.folder.path().display()
            ));
        }
    }
}

static TURN: Mutex<()> = Mutex::new(());

/// Asks until there is an answer, for so long at most.
pub(crate) fn until<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        let answer = ask();
        if answer.is_some() || Instant::now() > end {
            return answer;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A number that the environment may set.
pub(crate) fn from_environment(variable: &str, default: usize) -> usize {
    match std::env::var(variable) {
        Ok(value) => value
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {value:?}")),
        Err(_) => default,
    }
}

/// Tells people what happened; cargo shows it with `--nocapture` and on failure.
#[allow(clippy::print_stdout, reason = "the figures are what one runs the proof for")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}
