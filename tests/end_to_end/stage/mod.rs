//! What a test of the program stands on: an application's database, a fresh topic, relays as processes.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

pub(crate) mod clocks;
pub(crate) mod database;
pub(crate) mod disk;
pub(crate) mod kafka;
pub(crate) mod relay;
pub(crate) mod sampler;
pub(crate) mod services;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outbox::{DeadLetterQuery, Ordering as Order, OutboxStore, RelayId, Stats};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use self::clocks::Clocks;
use self::database::Database;
use self::disk::Disk;
use self::relay::{Relay, Usage};
use crate::proof::oracle::{Ending, Limits, Run};
use crate::proof::report::Report;
use crate::proof::stamp::LARGEST;
use crate::proof::writer::{Load, WriterLog, resolve, unknown};
use crate::proxy::Proxy;
use crate::reader::{counter, read_topic};

/// How relays are configured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Relays {
    pub(crate) lease: Duration,
    pub(crate) grace: Duration,
    pub(crate) rate_limit: Option<u32>,
    /// Most records in flight.
    pub(crate) window: usize,
    /// More settings of the store and of the sink, as lines of their configuration.
    pub(crate) store: &'static str,
    pub(crate) sink: &'static str,
    /// Whether they log in as a user to whom nothing is granted.
    pub(crate) login: bool,
}

/// What a stage has beyond a database, a broker and a topic.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Props {
    /// A network between the relays and the database that can be made a bad one.
    pub(crate) network: bool,
    /// Relays whose clocks can be set.
    pub(crate) clocks: bool,
    /// A disk of so many MiB for the database.
    pub(crate) disk: Option<u32>,
    /// A topic that takes no records larger than [`LARGEST`].
    pub(crate) narrow: bool,
    /// A topic that is made later.
    pub(crate) topic_later: bool,
}

impl Default for Relays {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(10),
            grace: Duration::from_secs(10),
            rate_limit: None,
            window: WINDOW,
            store: "",
            sink: "",
            login: false,
        }
    }
}

/// Where a configuration's server is, as `host:port`; none of a file.
fn address(configuration: &str) -> Option<String> {
    let (_, place) = configuration.split_once("://")?;
    let authority = place.split(['/', '?', '"']).next()?;
    Some(authority.rsplit('@').next()?.to_owned())
}

/// How many records a relay has in flight at most.
pub(crate) const WINDOW: usize = 800;

/// One application: its database, its outbox, its topic.
pub(crate) struct Stage<D: Database> {
    // In the order in which they go: connections, what they lead to, what they need.
    store: Box<dyn OutboxStore>,
    pub(crate) database: D,
    network: Option<Proxy>,
    clocks: Option<Clocks>,
    disk: Option<Disk>,
    runtime: Runtime,
    folder: TempDir,
    servers: String,
    topic: String,
    started: AtomicUsize,
    /// What the relays kept after a fault and should have given back.
    kept: Mutex<Vec<String>>,
}

impl<D: Database> Stage<D> {
    /// An empty stage.
    pub(crate) fn new(servers: &str, relays: Relays) -> Self {
        Self::with(servers, relays, Props::default())
    }

    /// An empty stage with these props.
    pub(crate) fn with(servers: &str, relays: Relays, props: Props) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let disk = props.disk.map(|size| Disk::mount(folder.path(), size).unwrap());
        let database = D::make(disk.as_ref().map_or(folder.path(), Disk::folder), &runtime);
        let network = address(&database.configuration())
            .filter(|_| props.network)
            .map(|server| runtime.block_on(Proxy::before(server)));
        let stage = Self {
            store: database.store(),
            database,
            network,
            disk,
            clocks: props.clocks.then(|| Clocks::new(folder.path())),
            runtime,
            folder,
            servers: servers.to_owned(),
            topic: kafka::topic_name(),
            started: AtomicUsize::new(0),
            kept: Mutex::default(),
        };
        stage.configure(relays);
        if !props.topic_later {
            stage.make_topic(props.narrow.then_some(LARGEST));
        }
        stage
    }

    /// Makes the topic that messages go to.
    pub(crate) fn make_topic(&self, largest: Option<usize>) {
        self.runtime
            .block_on(kafka::new_topic(&self.servers, &self.topic, 6, largest));
    }

    /// How relays are configured that start from now on.
    pub(crate) fn configure(&self, relays: Relays) {
        std::fs::write(self.file("relay.toml"), self.configuration(relays)).unwrap();
    }

    fn configuration(&self, relays: Relays) -> String {
        let rate_limit = relays
            .rate_limit
            .map_or(String::new(), |rate| format!("rate_limit = {rate}"));
        let (servers, sink) = if relays.login {
            kafka::login()
        } else {
            (self.servers.clone(), relays.sink.to_owned())
        };
        format!(
            r#"
            [store]
            {}
            {}
            [sink]
            type = "kafka"
            bootstrap_servers = {:?}
            {}
            [relay]
            lease = "{}ms"
            grace = "{}ms"
            batch_rows = {}
            window_rows = {}
            {rate_limit}
            "#,
            self.through_the_network(),
            relays.store,
            servers,
            sink,
            relays.lease.as_millis(),
            relays.grace.as_millis(),
            relays.window.div_ceil(4),
            relays.window,
        )
    }

    /// The part `[store]` of the relays' configuration.
    fn through_the_network(&self) -> String {
        let configuration = self.database.configuration();
        let (Some(network), Some(server)) = (&self.network, address(&configuration)) else {
            return configuration;
        };
        let place = format!("127.0.0.1:{}", network.port());
        self.database.configuration_by(&server, &place)
    }

    /// What is between the relays and the database.
    #[allow(dead_code, reason = "for faults")]
    pub(crate) fn network(&self) -> &Proxy {
        self.network.as_ref().unwrap()
    }

    /// The disk that the database is on.
    #[allow(dead_code, reason = "for faults")]
    pub(crate) fn disk(&self) -> &Disk {
        self.disk.as_ref().unwrap()
    }

    /// The relays' clocks.
    #[allow(dead_code, reason = "for faults")]
    pub(crate) fn clocks(&self) -> &Clocks {
        self.clocks.as_ref().unwrap()
    }

    /// Grants the user that relays log in as to write to the topic.
    #[allow(dead_code, reason = "for faults")]
    pub(crate) fn grant_topic(&self) {
        kafka::grant(&self.servers, &self.topic);
    }

    /// Counts what has arrived, each time it is called.
    pub(crate) fn arrivals(&self) -> impl Fn() -> i64 + use<D> {
        counter(&self.servers, &self.topic)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The load that the environment asks for, by default one that suits continuous integration.
    pub(crate) fn load(&self, spread: Duration) -> Load {
        Load {
            topic: self.topic.clone(),
            messages: from_environment("OUTBOX_PROOF_MESSAGES", 10_000 / D::FEWER as usize),
            keys: from_environment("OUTBOX_PROOF_KEYS", KEYS),
            producers: from_environment("OUTBOX_PROOF_PRODUCERS", 8),
            rollback_each: 20,
            hold_each: D::HOLD_EACH,
            hold: Duration::from_millis(500),
            poison_each: 0,
            spread,
        }
    }

    /// Writes the load, and logs it.
    pub(crate) fn write(&self, load: &Load) {
        let log = WriterLog::open(&self.file("writer.log"));
        load.write(&log, || self.database.producer());
    }

    /// Starts a relay.
    pub(crate) fn relay(&self) -> Relay {
        self.relay_with("")
    }

    /// Starts one with this in `FAILPOINTS`.
    pub(crate) fn relay_with(&self, failpoints: &str) -> Relay {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let mut environment = vec![("FAILPOINTS", failpoints.to_owned())];
        environment.extend(self.clocks.iter().flat_map(Clocks::environment));
        Relay::start(&self.file("relay.toml"), self.relay_log(number), environment)
    }

    fn relay_log(&self, number: usize) -> PathBuf {
        self.file(&format!("relay-{number}.log"))
    }

    /// The state of the outbox. Connections that a fault has broken are found out by using them.
    pub(crate) fn stats(&self) -> Stats {
        let mut last = None;
        let stats = until(Duration::from_secs(10), || {
            let stats = self.runtime.block_on(self.store.stats());
            stats.map_err(|error| last = Some(error)).ok()
        });
        stats.unwrap_or_else(|| panic!("the outbox does not tell its state: {last:?}"))
    }

    /// How many messages wait.
    pub(crate) fn backlog(&self) -> u64 {
        self.database.backlog()
    }

    /// How often a relay began to work on the same shard, at most, by all relays' logs; each time but the first it may
    /// repeat something.
    pub(crate) fn beginnings(&self) -> usize {
        let mut begun: HashMap<String, usize> = HashMap::new();
        for number in 0..self.started.load(Ordering::Relaxed) {
            let log = std::fs::read_to_string(self.relay_log(number)).unwrap();
            for line in log.lines().filter(|line| line.contains("shard gained")) {
                let shard = line.split(' ').find(|word| word.starts_with("shard="));
                *begun.entry(shard.unwrap().to_owned()).or_default() += 1;
            }
        }
        begun.into_values().max().unwrap_or(0)
    }

    /// How many shards the outbox has.
    pub(crate) fn shards(&self) -> usize {
        usize::from(self.store.capabilities().shards)
    }

    /// How many shards each of the relays owns.
    pub(crate) fn owned(&self, relays: &[Relay]) -> Vec<usize> {
        let owners: Vec<RelayId> = self
            .stats()
            .leases
            .into_iter()
            .filter_map(|lease| lease.owner)
            .collect();
        let owned = |relay: &Relay| {
            let process = format!("-{}-", relay.pid());
            owners
                .iter()
                .filter(|owner| owner.as_str().contains(&process))
                .count()
        };
        relays.iter().map(owned).collect()
    }

    /// Which of the relays owns the outbox, or most of it.
    pub(crate) fn owner(&self, relays: &[Relay]) -> Option<usize> {
        let owned = self.owned(relays);
        let most = (0..relays.len()).max_by_key(|relay| owned[*relay])?;
        (owned[most] > 0).then_some(most)
    }

    /// Does something at a moment at which a relay has delivered messages and, very likely, waits to settle them:
    /// the test holds settlements back.
    pub(crate) fn before_settlement(&self, work: impl FnOnce()) {
        let count = self.arrivals();
        self.database.hold_settlements(|| {
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
            (self.backlog() == 0).then_some(())
        });
        if drained.is_none() {
            let logs: String = relays.iter().map(|relay| relay.log()).collect();
            panic!(
                "the backlog does not shrink to nothing: {:?}\n{logs}",
                self.stats()
            );
        }
    }

    /// What each of the relays takes of the system, when it has done something and has nothing left to do.
    pub(crate) fn usage(&self, relays: &mut [Relay]) -> Vec<Option<Usage>> {
        let load = self.load(Duration::ZERO);
        self.write(&Load {
            messages: load.messages / 10,
            ..load
        });
        self.wait_until_drained(relays);
        relays.iter().map(Relay::usage).collect()
    }

    /// I7: after the faults no relay takes more of the system than the one that took most before: meanwhile another one
    /// may do the work, and who stood by has neither a reader nor a broker.
    pub(crate) fn compare_usage(&self, before: &[Option<Usage>], relays: &mut [Relay]) {
        let mut now = Vec::new();
        let given_back = until(Duration::from_secs(10), || {
            now = relays.iter().map(Relay::usage).collect();
            let most =
                |usage: &[Option<Usage>], of: fn(&Usage) -> usize| usage.iter().flatten().map(of).max();
            let resident = |usage: &Usage| usage.resident;
            let files = |usage: &Usage| usage.files;
            // A pool may have grown since.
            let files_allowed = most(before, files).map(|files| files + D::CONNECTIONS + RETURNED_BROKER);
            let resident_allowed = most(before, resident).map(|resident| resident + resident / 2 + GROWTH);
            (most(&now, files) <= files_allowed && most(&now, resident) <= resident_allowed).then_some(())
        });
        say(&format!("usage before the faults {before:?}, after them {now:?}"));
        if given_back.is_none() {
            let mut kept = self.kept.lock().unwrap();
            kept.push(format!("before the faults {before:?}, after them {now:?}"));
            for relay in relays {
                say(&relay.files().join("\n"));
            }
        }
    }

    /// I7: what of the database is not as it has to be while so many relays run.
    fn check_connections(&self, relays: usize) {
        let allowed = relays * D::CONNECTIONS;
        let mut open = 0;
        let closed = until(Duration::from_secs(10), || {
            open = self.database.connections();
            (open <= allowed).then_some(())
        });
        let mut kept = self.kept.lock().unwrap();
        if closed.is_none() {
            kept.push(format!(
                "{relays} relays have {open} connections, allowed {allowed}"
            ));
        }
    }

    /// I7: no relay kept a transaction open while it did something else.
    fn check_transactions(&self) {
        let (idle, after) = self.database.idle_in_transaction();
        if idle > MOST_IDLE {
            let mut kept = self.kept.lock().unwrap();
            kept.push(format!(
                "a relay kept a transaction open for {idle:?} and did nothing in it after: {after}"
            ));
        }
    }

    /// What is left.
    pub(crate) fn ending(&self) -> Ending {
        let stats = self.stats();
        Ending {
            backlog: self.backlog(),
            held: stats.retrying + stats.parked,
            scheduled: stats.scheduled,
            owned_shards: stats.leases.iter().filter(|lease| lease.owner.is_some()).count(),
            relays: stats.relays.len(),
        }
    }

    /// Ends the relays in order, reads everything and lets the oracle judge.
    pub(crate) fn judge(&self, title: &str, relays: Vec<Relay>, limits: Limits) -> Report {
        self.check_connections(relays.len());
        for relay in relays {
            let log = relay.log();
            let (status, _) = relay.terminate();
            assert!(status.success(), "a relay ended with {status}:\n{log}");
        }
        self.check_connections(0);
        self.check_transactions();
        // Those that were killed count as members until their time is over.
        until(Duration::from_secs(15), || {
            (self.ending() == Ending::default()).then_some(())
        });
        let arrived = read_topic(&self.servers, &self.topic);
        let dead = self.runtime.block_on(async {
            let letters = self.store.dead_letters().unwrap();
            let all = DeadLetterQuery {
                limit: 100_000,
                ..DeadLetterQuery::default()
            };
            letters.list(&all).await.unwrap()
        });
        let mut written = WriterLog::read(&self.file("writer.log"));
        let unknown = unknown(&written);
        let committed = self.database.committed(&unknown);
        resolve(&mut written, &committed);
        let run = Run {
            topic: self.topic.clone(),
            written,
            effects: Some(self.database.consume(&arrived)),
            arrived,
            dead: dead.into_iter().map(|letter| letter.record.id).collect(),
            ending: Some(self.ending()),
            sequenced: self.store.capabilities().ordering == Order::Sequenced,
            resources: self.kept.lock().unwrap().clone(),
            limits,
        };
        let report = run.judge();
        let doubts = match unknown.len() {
            0 => String::new(),
            all => format!(", {} of {all} without an answer committed", committed.len()),
        };
        say(&format!(
            "{title}, {} beginnings{doubts}\n{report}",
            self.beginnings()
        ));
        report
    }
}

/// What a failed test leaves behind tells why.
impl<D: Database> Drop for Stage<D> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.folder.disable_cleanup(true);
            say(&format!(
                "logs and files are kept in {}",
                self.folder.path().display()
            ));
        }
    }
}

/// For how long a transaction may stand open idle: a relay goes on at once, on a busy machine as well.
const MOST_IDLE: Duration = Duration::from_millis(50);

/// The ends of the pipe of one more thread that librdkafka keeps once a broker has come back: as many after nine kills as
/// after three.
const RETURNED_BROKER: usize = 2;

/// By how much a relay's memory may grow, in KiB, beside half of what it was: allocators keep some.
const GROWTH: usize = 16 * 1024;

/// Tests take turns, each from its first server to its last: the figures of two that share the machine mean nothing.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

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

/// How many keys there are, unless the environment says otherwise.
#[allow(dead_code, reason = "each store's tests use a part of it")]
pub(crate) const KEYS: usize = 500;

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
