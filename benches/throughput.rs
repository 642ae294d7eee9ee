//! A first look at throughput: how fast a backlog drains, and what a message costs the relay in CPU.
//!
//! Systems take turns within one run, because this machine and yours drift; medians and ranges are printed, with the
//! settings. Against Kafka the end is read off the topic's end offsets, never off the relay. Nothing is asserted.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench prints what it measured"
)]

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use outbox::kafka::rdkafka::ClientConfig;
use outbox::kafka::rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use outbox::kafka::rdkafka::client::DefaultClientContext;
use outbox::kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use outbox::kafka::rdkafka::mocking::MockCluster;
use outbox::kafka::rdkafka::producer::{FutureProducer, FutureRecord};
use outbox::kafka::{KafkaConfig, KafkaSink};
use outbox::sqlite::rusqlite::{Connection, params};
use outbox::sqlite::{SqliteConfig, SqliteOutbox, SqliteStore, migrate};
use outbox::{MemorySink, MemoryStore, Message, OutboxStore, Relay, Sink};

const PARTITIONS: i32 = 6;

#[derive(Parser)]
struct Options {
    /// Messages in each backlog.
    #[arg(long, default_value_t = 100_000)]
    messages: u32,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 1024)]
    payload: usize,
    /// Keys.
    #[arg(long, default_value_t = 10_000)]
    keys: u32,
    /// Rounds; the first one warms up and does not count.
    #[arg(long, default_value_t = 4)]
    rounds: usize,
    /// A broker; without one the real server's part is left out.
    #[arg(long, env = "OUTBOX_TEST_KAFKA")]
    kafka: Option<String>,
    /// Passed by cargo bench.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One round of one system.
struct Sample {
    messages: u32,
    wall: Duration,
    cpu: Duration,
}

type Error = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let options = Options::parse();
    let mut table: Vec<(&str, Vec<Sample>)> = Vec::new();
    for round in 0..options.rounds {
        for (name, sample) in one_round(&options).await? {
            eprintln!("round {round}: {name}: {:.0} messages/s", rate(&sample));
            if round == 0 {
                table.push((name, Vec::new()));
            } else if let Some((_, samples)) = table.iter_mut().find(|(own, _)| *own == name) {
                samples.push(sample);
            }
        }
    }
    print(&options, &table);
    Ok(())
}

/// Every system once.
async fn one_round(options: &Options) -> Result<Vec<(&'static str, Sample)>, Error> {
    let mut samples = vec![("memory to memory", memory_to_memory(options).await?)];
    {
        let mock = MockCluster::new(1)?;
        mock.create_topic("bench", PARTITIONS, 1)?;
        let sample = memory_to_kafka(options, &mock.bootstrap_servers()).await?;
        samples.push(("memory to mock Kafka", sample));
    }
    if let Some(brokers) = &options.kafka {
        samples.push(("SQLite to real Kafka", sqlite_to_kafka(options, brokers).await?));
        samples.push(("the same, one by one", one_by_one(options, brokers).await?));
    }
    Ok(samples)
}

async fn memory_to_memory(options: &Options) -> Result<Sample, Error> {
    let store = memory_backlog(options).await?;
    let sink = MemorySink::new();
    let (start, cpu) = (Instant::now(), cpu());
    relay(store, Box::new(sink.clone()))
        .drain(std::future::pending())
        .await?;
    let sample = Sample {
        messages: options.messages,
        wall: start.elapsed(),
        cpu: self::cpu() - cpu,
    };
    assert_eq!(sink.delivered().len(), options.messages as usize);
    Ok(sample)
}

async fn memory_to_kafka(options: &Options, brokers: &str) -> Result<Sample, Error> {
    let store = memory_backlog(options).await?;
    drain(
        relay(store, Box::new(KafkaSink::new(&KafkaConfig::new(brokers))?)),
        options.messages,
        brokers,
        "bench",
    )
    .await
}

async fn sqlite_to_kafka(options: &Options, brokers: &str) -> Result<Sample, Error> {
    let topic = fresh_topic(brokers).await?;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let config = sqlite_backlog(folder.path(), options, options.messages, &topic)?;
    let sink = KafkaSink::new(&KafkaConfig::new(brokers))?;
    drain(
        relay(Arc::new(SqliteStore::open(config)?), Box::new(sink)),
        options.messages,
        brokers,
        &topic,
    )
    .await
}

/// What people write first: read one, send it, wait, delete it. On fewer messages, as it takes its time.
async fn one_by_one(options: &Options, brokers: &str) -> Result<Sample, Error> {
    let messages = options.messages.min(2_000);
    let topic = fresh_topic(brokers).await?;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let config = sqlite_backlog(folder.path(), options, messages, &topic)?;
    let connection = Connection::open(&config.path)?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("acks", "all")
        .set("linger.ms", "0")
        .create()?;
    let (start, cpu) = (Instant::now(), cpu());
    loop {
        let next = connection
            .prepare_cached("SELECT id, key, payload FROM outbox ORDER BY id LIMIT 1")?
            .query_row([], |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, Vec<u8>>(1)?,
                    row.get::<_, Vec<u8>>(2)?,
                ))
            });
        let Ok((id, key, payload)) = next else { break };
        let record = FutureRecord::to(&topic).key(&key).payload(&payload);
        producer
            .send(record, Duration::from_secs(30))
            .await
            .map_err(|(error, _)| error)?;
        connection
            .prepare_cached("DELETE FROM outbox WHERE id = ?1")?
            .execute(params![id])?;
    }
    Ok(Sample {
        messages,
        wall: start.elapsed(),
        cpu: self::cpu() - cpu,
    })
}

fn relay(store: Arc<dyn OutboxStore>, sink: Box<dyn Sink>) -> Relay {
    Relay::new(store, sink)
}

/// Runs a relay until the topic holds all messages.
async fn drain(relay: Relay, messages: u32, brokers: &str, topic: &str) -> Result<Sample, Error> {
    let (start, cpu) = (Instant::now(), cpu());
    let running = tokio::spawn(relay.drain(std::future::pending()));
    let arrived = tokio::task::spawn_blocking({
        let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
        move || until_arrived(&brokers, &topic, messages)
    });
    arrived.await?.map_err(|error| error.to_string())?;
    let sample = Sample {
        messages,
        wall: start.elapsed(),
        cpu: self::cpu() - cpu,
    };
    running.await??;
    Ok(sample)
}

/// Waits until the end offsets of a topic say that everything is there.
fn until_arrived(
    brokers: &str,
    topic: &str,
    messages: u32,
) -> Result<(), outbox::kafka::rdkafka::error::KafkaError> {
    let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", brokers).create()?;
    loop {
        let mut there = 0;
        for partition in 0..PARTITIONS {
            there += consumer
                .fetch_watermarks(topic, partition, Duration::from_secs(10))?
                .1;
        }
        if there >= i64::from(messages) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn backlog(options: &Options, messages: u32, topic: &str) -> Result<Vec<Message>, Error> {
    let payload = vec![b'x'; options.payload];
    let messages = (0..messages).map(|n| {
        let key = (n % options.keys.max(1)).to_string();
        Message::builder(topic)
            .key(key)
            .payload(payload.clone())
            .content_type("text/plain")
            .build()
    });
    Ok(messages.collect::<Result<_, _>>()?)
}

async fn memory_backlog(options: &Options) -> Result<Arc<MemoryStore>, Error> {
    let store = MemoryStore::default();
    let mut tx = store.begin();
    store
        .enqueue_many(&mut tx, &backlog(options, options.messages, "bench")?)
        .await?;
    tx.commit();
    Ok(Arc::new(store))
}

fn sqlite_backlog(
    folder: &Path,
    options: &Options,
    messages: u32,
    topic: &str,
) -> Result<SqliteConfig, Error> {
    let config = SqliteConfig::new(folder.join("bench.db"));
    migrate(&config)?;
    let outbox = SqliteOutbox::new(&config)?;
    let mut connection = Connection::open(&config.path)?;
    for part in backlog(options, messages, topic)?.chunks(1_000) {
        let tx = connection.transaction()?;
        outbox.enqueue_many(&tx, part)?;
        tx.commit()?;
    }
    Ok(config)
}

async fn fresh_topic(brokers: &str) -> Result<String, Error> {
    let topic = format!("bench-{}", outbox::MessageId::new());
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", brokers).create()?;
    let new = NewTopic::new(&topic, PARTITIONS, TopicReplication::Fixed(1));
    for result in admin.create_topics([&new], &AdminOptions::new()).await? {
        result.map_err(|(topic, error)| format!("{topic}: {error}"))?;
    }
    Ok(topic)
}

/// CPU time of this process, its clients of the broker and of the database included.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may contain anything but a closing parenthesis: utime and stime are fields 14 and 15.
    let ticks: u64 = stat
        .rsplit(')')
        .next()
        .into_iter()
        .flat_map(|rest| rest.split_whitespace().skip(11).take(2))
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    // Linux counts a hundred ticks a second for user space, whatever its own rate.
    Duration::from_millis(ticks * 10)
}

fn rate(sample: &Sample) -> f64 {
    f64::from(sample.messages) / sample.wall.as_secs_f64()
}

fn micros(sample: &Sample) -> f64 {
    sample.cpu.as_secs_f64() * 1e6 / f64::from(sample.messages)
}

fn print(options: &Options, table: &[(&str, Vec<Sample>)]) {
    let mut text = format!(
        "\n{} messages of {} bytes, {} keys, {} counted rounds, {} cores; median (least to most)\n\n{:<24}{:>34}{:>26}\n",
        options.messages,
        options.payload,
        options.keys,
        options.rounds.saturating_sub(1),
        std::thread::available_parallelism().map_or(0, usize::from),
        "",
        "messages/s",
        "CPU µs/message",
    );
    for (name, samples) in table {
        let (rates, costs) = (spread(samples, rate), spread(samples, micros));
        let _ = writeln!(
            text,
            "{name:<24}{:>34}{:>26}",
            format!("{:.0} ({:.0} to {:.0})", rates.1, rates.0, rates.2),
            format!("{:.1} ({:.1} to {:.1})", costs.1, costs.0, costs.2)
        );
    }
    println!("{text}");
}

/// Least, median and most.
fn spread(samples: &[Sample], of: fn(&Sample) -> f64) -> (f64, f64, f64) {
    let mut values: Vec<f64> = samples.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    match values.as_slice() {
        [] => (0.0, 0.0, 0.0),
        [.., most] => (values[0], values[values.len() / 2], *most),
    }
}
