//! The command line.

use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// Shows, runs and operates a transactional outbox.
#[derive(Debug, Parser)]
#[command(name = "outbox", version, after_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Args {
    /// Show the whole chain of causes when something fails
    #[arg(long, short, global = true, help_heading = GLOBAL)]
    pub(crate) verbose: bool,

    #[command(flatten)]
    pub(crate) log: LogArgs,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What goes to the log.
#[derive(Debug, ClapArgs)]
pub(crate) struct LogArgs {
    /// What to log, to stderr: a level or targets with levels, such as info,librdkafka=debug [env: RUST_LOG]
    #[arg(long, value_name = "FILTER", global = true, help_heading = GLOBAL)]
    pub(crate) log: Option<String>,

    /// How to write the log: text, lines for people; or json, an object a line
    #[arg(
        long,
        value_name = "FORMAT",
        global = true,
        help_heading = GLOBAL,
        hide_possible_values = true,
        default_value = "text",
        env = "OUTBOX_LOG_FORMAT"
    )]
    pub(crate) log_format: LogFormat,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the promise being kept, with nothing to install
    ///
    /// Producers place orders in an SQLite database, each with its message in one transaction; some roll back. A
    /// relay publishes the messages to Kafka, is killed half-way and started again. A consumer with an inbox adds
    /// them up in a database of its own. In the end every part of the promise is checked against what happened.
    #[command(after_help = DEMO_EXAMPLES)]
    Demo(DemoArgs),

    /// Prove the relay in simulated worlds, in which everything goes wrong that can
    ///
    /// Relays, producers, a database and a destination in one thread, on a clock that jumps from event to event. Everything
    /// is drawn from a seed: who is killed, stands still or loses an answer, what the destination refuses or forgets. Then
    /// all heals, and nothing may be lost, invented, out of order or left behind. The same seed gives the same world.
    #[command(after_help = SIMULATE_EXAMPLES)]
    Simulate(SimulateArgs),

    /// Run a relay: publish what the outbox has, until told to stop
    ///
    /// SIGTERM or SIGINT stops it in order: nothing more is handed over, what is under way is settled, the shards are
    /// released. A second signal stops it at once, which loses nothing, but delivers unsettled messages again.
    #[command(after_help = RELAY_EXAMPLES)]
    Relay(RelayArgs),

    /// Show the state of the outbox: backlog, failures, leases, relays
    #[command(after_help = STATUS_EXAMPLES)]
    Status(StatusArgs),

    /// Tell why a message, a key or a topic is still here, and what to do about it
    ///
    /// A message's id finds it wherever it stands: in the outbox, scheduled, in the archive, in the dead letters. Ids
    /// need not be unique; all places are told. There is no index on them, so the oldest messages of the outbox are
    /// searched, as many as --search says.
    #[command(after_help = EXPLAIN_EXAMPLES)]
    Explain(ExplainArgs),

    /// Try what is parked again, from the first attempt: the short way to `outbox parked resume`
    #[command(after_help = RESUME_EXAMPLES)]
    Resume(ParkedChoice),

    /// Make the outbox's tables, or bring them up to date
    #[command(after_help = MIGRATE_EXAMPLES)]
    Migrate(MigrateArgs),

    /// Inspect, requeue and discard dead letters: messages that could not be delivered
    #[command(subcommand, after_help = DEAD_EXAMPLES)]
    Dead(DeadCommand),

    /// Inspect, resume and bury parked keys: they wait because their first message could not be delivered
    #[command(subcommand, after_help = PARKED_EXAMPLES)]
    Parked(ParkedCommand),

    /// Check a configuration, or print an example of one
    #[command(subcommand, after_help = CONFIG_EXAMPLES)]
    Config(ConfigCommand),
}

/// Where the configuration is.
#[derive(Debug, ClapArgs)]
pub(crate) struct ConfigArgs {
    /// The configuration file. Without one, the environment alone: OUTBOX_STORE__TYPE=sqlite and so on
    #[arg(long, short, value_name = "FILE", env = "OUTBOX_CONFIG")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DemoArgs {
    /// How many orders to place
    #[arg(long, value_name = "N", default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub(crate) orders: u32,

    /// How many customers place them: order is kept per customer
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) keys: u32,

    /// Use this Kafka, in a topic made for the purpose, instead of a mock within the process
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) kafka: Option<String>,

    /// Print the result as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct SimulateArgs {
    /// How many worlds [default: 1000, or 1 with --seed]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub(crate) seeds: Option<u64>,

    /// The first seed [default: 0]
    #[arg(long, value_name = "SEED")]
    pub(crate) seed: Option<u64>,

    /// Print what happens in the one world of --seed, line by line
    #[arg(long, requires = "seed", conflicts_with_all = ["seeds", "json"])]
    pub(crate) trace: bool,

    /// Worlds in which nothing goes wrong: then nothing may arrive twice either
    #[arg(long)]
    pub(crate) calm: bool,

    /// How many threads [default: as many as there are cores]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZero<u16>>,

    /// Print the result as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct RelayArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,

    /// Stop when nothing is left that could be delivered now; the answer is no (1) when something remains
    #[arg(long)]
    pub(crate) drain: bool,

    /// Serve /metrics, /health/live and /health/ready over HTTP here: a port of this machine's own, or an address
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<String>,

    /// Allow --listen an address that others can reach; anybody there may read what is served
    #[arg(long)]
    pub(crate) listen_public: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,

    /// Print one JSON object; with --watch one a line
    #[arg(long)]
    pub(crate) json: bool,

    /// Show it again every so often, 100ms or more, until interrupted
    #[arg(long, short, value_name = "INTERVAL", num_args = 0..=1, default_missing_value = "2s", value_parser = interval)]
    pub(crate) watch: Option<Duration>,

    /// Answer no (1) when the oldest undelivered message is older than this
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) max_age: Option<Duration>,

    /// Answer no (1) when there are more dead letters than this
    #[arg(long, value_name = "N")]
    pub(crate) max_dead: Option<u64>,
}

#[derive(Debug, ClapArgs)]
#[command(group = clap::ArgGroup::new("subject").args(["message", "topic"]).required(true))]
pub(crate) struct ExplainArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,

    /// A message, by its id
    #[arg(long, value_name = "ID")]
    pub(crate) message: Option<String>,

    /// A topic, or with --key one of its keys
    #[arg(long)]
    pub(crate) topic: Option<String>,

    /// A key of the topic
    #[arg(long, requires = "topic")]
    pub(crate) key: Option<String>,

    /// The key is given in hexadecimal
    #[arg(long, requires = "key")]
    pub(crate) hex: bool,

    /// Search at most so many messages, the oldest first
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    pub(crate) search: usize,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,

    /// Print the statements that make the outbox, and change nothing
    #[arg(long, conflicts_with = "json")]
    pub(crate) print: bool,

    /// Print what to grant to the role that enqueues and consumes, and change nothing
    #[arg(long, value_name = "ROLE", conflicts_with = "json")]
    pub(crate) print_grants_to_producer: Option<String>,

    /// Print what to grant to the role that runs relays and operates, and change nothing
    #[arg(long, value_name = "ROLE", conflicts_with = "json")]
    pub(crate) print_grants_to_relay: Option<String>,

    /// Print what was done as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeadCommand {
    /// List dead letters, oldest first
    #[command(after_help = DEAD_EXAMPLES)]
    List {
        #[command(flatten)]
        config: ConfigArgs,
        /// Only those of this topic
        #[arg(long)]
        topic: Option<String>,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
        /// Print one JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Show one dead letter as one JSON object, its payload included
    #[command(after_help = DEAD_EXAMPLES)]
    Show {
        #[command(flatten)]
        config: ConfigArgs,
        /// The message's id
        #[arg(value_name = "MESSAGE_ID")]
        id: String,
    },
    /// Put dead letters back at the end of the outbox: they are delivered out of their first order
    #[command(after_help = DEAD_EXAMPLES)]
    Requeue(DeadChoice),
    /// Delete dead letters for good
    #[command(after_help = DEAD_EXAMPLES)]
    Discard {
        #[command(flatten)]
        choice: DeadChoice,
        #[command(flatten)]
        consent: Consent,
    },
}

/// Which dead letters.
#[derive(Debug, ClapArgs)]
pub(crate) struct DeadChoice {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,

    #[command(flatten)]
    pub(crate) which: Which,

    /// With --all: only those of this topic
    #[arg(long, requires = "all", conflicts_with = "ids")]
    pub(crate) topic: Option<String>,

    /// Print what was done as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ParkedCommand {
    /// List what is parked, oldest first
    #[command(after_help = PARKED_EXAMPLES)]
    List {
        #[command(flatten)]
        config: ConfigArgs,
        /// Only this topic and its keys; messages without a key are left out, their topic is not known here
        #[arg(long)]
        topic: Option<String>,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
        /// Print one JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Try parked messages again, from the first attempt
    #[command(after_help = PARKED_EXAMPLES)]
    Resume(ParkedChoice),
    /// Move parked messages to the dead letters and let their keys go on
    #[command(after_help = PARKED_EXAMPLES)]
    Bury {
        #[command(flatten)]
        choice: ParkedChoice,
        #[command(flatten)]
        consent: Consent,
    },
}

/// Some or all; what is parked goes by the ids of the messages that are waited for.
#[derive(Debug, ClapArgs)]
#[group(required = true, multiple = false)]
pub(crate) struct Which {
    /// The messages' ids
    #[arg(value_name = "MESSAGE_ID")]
    pub(crate) ids: Vec<String>,

    /// All of them
    #[arg(long)]
    pub(crate) all: bool,
}

/// Leave to do what cannot be undone to all at once.
#[derive(Debug, ClapArgs)]
pub(crate) struct Consent {
    /// With --all: do not ask; needed where there is no terminal to ask on
    #[arg(long)]
    pub(crate) yes: bool,
}

/// Which parked messages.
#[derive(Debug, ClapArgs)]
pub(crate) struct ParkedChoice {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,

    #[command(flatten)]
    pub(crate) which: Which,

    /// With --all: only this topic and its keys; messages without a key are left out, their topic is not known here
    #[arg(long, requires = "all", conflicts_with = "ids")]
    pub(crate) topic: Option<String>,

    /// Print what was done as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Check the configuration, and on request whether store and sink can be reached
    #[command(after_help = CONFIG_EXAMPLES)]
    Check {
        #[command(flatten)]
        config: ConfigArgs,
        /// Also open the store and probe the sink
        #[arg(long)]
        connect: bool,
    },
    /// Print an example with every setting, its default and what it is for
    #[command(after_help = CONFIG_EXAMPLES)]
    Example {
        /// For which store
        #[arg(long, value_enum, default_value = "sqlite")]
        store: ExampleStore,
    },
}

/// The stores of which there is an example.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ExampleStore {
    Sqlite,
    Postgres,
    Mysql,
    Mongo,
}

/// Under what the options stand that all commands have.
const GLOBAL: &str = "Options of all commands";

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; expected for example 5s, 250ms or 1h"))
}

/// How often to look: each look asks the database.
fn interval(text: &str) -> Result<Duration, String> {
    const SHORTEST: Duration = Duration::from_millis(100);
    let interval = duration(text)?;
    if interval < SHORTEST {
        return Err("each look asks the database: expected 100ms or more".to_owned());
    }
    Ok(interval)
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done; the answer is yes
  1  the answer is no: a promise did not hold, the outbox is not empty, a limit is passed
  2  the command line or the configuration is wrong
  3  the database, the broker or the output cannot be reached: the same command may succeed later
  4  schema, permissions or data are not as they must be: somebody has to act
  5  something unexpected, very likely a defect

Begin with `outbox demo`, then `outbox config example > outbox.toml`.";

const DEMO_EXAMPLES: &str = "\
Examples:
  outbox demo
  outbox demo --orders 20000 --keys 200
  outbox demo --kafka localhost:9092      a real broker; the topic is deleted afterwards
  outbox demo --json | jq .kept

Exit code 1 when any part of the promise did not hold.";

const SIMULATE_EXAMPLES: &str = "\
Examples:
  outbox simulate
  outbox simulate --seeds 1000000
  outbox simulate --seed 42 --trace | less      one world, line by line
  outbox simulate --calm
  outbox simulate --json | jq .faults

Exit code 1 when a law was broken; what is printed says how to see it again.";

const RELAY_EXAMPLES: &str = "\
Examples:
  outbox relay --config outbox.toml
  outbox relay --config outbox.toml --drain          stops when the outbox is empty
  outbox relay --config outbox.toml --log-format json --log info,librdkafka=debug
  outbox relay --config outbox.toml --listen 9090    then: curl localhost:9090/health/ready
  outbox relay --config outbox.toml --listen 0.0.0.0:9090 --listen-public
  OUTBOX_RELAY__LEASE=30s OUTBOX_SINK__OPTIONS__SASL_PASSWORD=... outbox relay --config outbox.toml

Every setting can be given in the environment, which has the last word: OUTBOX_SECTION__FIELD.";

const STATUS_EXAMPLES: &str = "\
Examples:
  outbox status --config outbox.toml
  outbox status --config outbox.toml --watch         every 2 s; --watch 500ms
  outbox status --config outbox.toml --json | jq .backlog
  outbox status --config outbox.toml --max-age 5m --max-dead 0      for a probe: exit code 1 when exceeded";

const EXPLAIN_EXAMPLES: &str = "\
Examples:
  outbox explain --config outbox.toml --message 018f3f2e-7c1a-7000-8000-000000000001
  outbox explain --config outbox.toml --topic orders --key 42
  outbox explain --config outbox.toml --topic orders --key ff00 --hex
  outbox explain --config outbox.toml --topic orders
  outbox explain --config outbox.toml --topic orders --key 42 --json | jq .places[].causes

Exit code 1 when it is not here: nothing of it is undelivered, and a message is in no other place either.";

const RESUME_EXAMPLES: &str = "\
Examples:
  outbox resume --config outbox.toml 018f3f2e-7c1a-7000-8000-000000000001
  outbox resume --config outbox.toml --all

What is parked goes by the message that failed: `outbox parked list` shows it, `outbox explain` says why.
Exit code 1 when one of the named messages is not parked (any more).";

const MIGRATE_EXAMPLES: &str = "\
Examples:
  outbox migrate --config outbox.toml
  outbox migrate --config outbox.toml --print        the SQL, for migrations of your own
  outbox migrate --config outbox.toml --print-grants-to-producer shop --print-grants-to-relay outbox_relay

Safe to run again, from several machines at once, and beside running relays.";

const DEAD_EXAMPLES: &str = "\
Examples:
  outbox dead list --config outbox.toml --topic orders
  outbox dead show --config outbox.toml 018f3f2e-7c1a-7000-8000-000000000001
  outbox dead requeue --config outbox.toml 018f3f2e-7c1a-7000-8000-000000000001
  outbox dead requeue --config outbox.toml --all --topic orders
  outbox dead discard --config outbox.toml --all          asks first
  outbox dead discard --config outbox.toml --all --yes    for scripts

Exit code 1 when one of the named messages is not there (any more), or the answer to the question was no.";

const PARKED_EXAMPLES: &str = "\
Examples:
  outbox parked list --config outbox.toml --topic orders
  outbox parked resume --config outbox.toml --all
  outbox parked bury --config outbox.toml 018f3f2e-7c1a-7000-8000-000000000001
  outbox parked bury --config outbox.toml --all --topic orders          asks first
  outbox parked bury --config outbox.toml --all --topic orders --yes    for scripts

Exit code 1 when one of the named messages is not parked (any more), or the answer to the question was no.";

const CONFIG_EXAMPLES: &str = "\
Examples:
  outbox config example > outbox.toml
  outbox config example --store postgres > outbox.toml
  outbox config check --config outbox.toml
  outbox config check --config outbox.toml --connect";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
