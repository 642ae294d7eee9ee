//! Kafka: a mock within this process, or a real one with a topic of its own.

use std::time::{Duration, Instant};

use outbox::MessageId;
use outbox::kafka::rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use outbox::kafka::rdkafka::client::DefaultClientContext;
use outbox::kafka::rdkafka::error::KafkaError;
use outbox::kafka::rdkafka::mocking::MockCluster;
use outbox::kafka::rdkafka::producer::DefaultProducerContext;
use outbox::kafka::rdkafka::{ClientConfig, types::RDKafkaErrorCode};
use tokio::runtime::Runtime;

use crate::exit::{Code, Failure, Result};
use crate::output;

pub(super) struct Broker {
    pub(super) servers: String,
    pub(super) topic: String,
    kind: Kind,
}

enum Kind {
    /// Dropping it ends it.
    Mock(
        #[expect(dead_code, reason = "it lives as long as it is held")]
        MockCluster<'static, DefaultProducerContext>,
    ),
    Real(AdminClient<DefaultClientContext>),
}

/// More than one, so that only keys are in order and not the whole topic.
pub(super) const PARTITIONS: i32 = 6;
/// How long a real broker may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to look for one at all.
const REACH: Duration = Duration::from_secs(5);
/// What an acknowledgement takes in the mock, so that some are under way at any time.
const MOCK_ROUND_TRIP: Duration = Duration::from_millis(5);

impl Broker {
    pub(super) fn start(real: Option<&str>, runtime: &Runtime) -> Result<Self> {
        match real {
            None => Self::mock().map_err(|error| failed("start the mock broker", &error)),
            Some(servers) => Self::real(servers, runtime),
        }
    }

    fn mock() -> std::result::Result<Self, KafkaError> {
        const BROKERS: i32 = 3;
        let cluster = MockCluster::new(BROKERS)?;
        let topic = "orders".to_owned();
        cluster.create_topic(&topic, PARTITIONS, 3)?;
        for broker in 1..=BROKERS {
            cluster.broker_round_trip_time(broker, MOCK_ROUND_TRIP)?;
        }
        Ok(Self {
            servers: cluster.bootstrap_servers(),
            topic,
            kind: Kind::Mock(cluster),
        })
    }

    fn real(servers: &str, runtime: &Runtime) -> Result<Self> {
        let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
            .set("bootstrap.servers", servers)
            .create()
            .map_err(|error| failed("reach kafka", &error))?;
        let unreachable = |error: KafkaError| {
            failed("reach kafka", &error).hint(format!(
                "is a broker listening at {servers}, without TLS or login?"
            ))
        };
        admin.inner().fetch_metadata(None, REACH).map_err(unreachable)?;
        // Random, so that demos do not meet.
        let random = MessageId::new().to_string();
        let topic = format!("outbox-demo-{}", &random[random.len() - 12..]);
        // The broker's own default of replicas.
        let new = NewTopic::new(&topic, PARTITIONS, TopicReplication::Fixed(-1));
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        let made = runtime
            .block_on(admin.create_topics(&[new], &options))
            .map_err(unreachable)?;
        if let Some(Err((topic, code))) = made.into_iter().next() {
            return Err(refused("make the topic", &topic, code));
        }
        let broker = Self {
            servers: servers.to_owned(),
            topic,
            kind: Kind::Real(admin),
        };
        broker.wait_for_topic()?;
        Ok(broker)
    }

    /// The controller answers before all brokers know.
    fn wait_for_topic(&self) -> Result<()> {
        let Kind::Real(admin) = &self.kind else {
            return Ok(());
        };
        let until = Instant::now() + PATIENCE;
        loop {
            let found = admin
                .inner()
                .fetch_metadata(Some(&self.topic), PATIENCE)
                .map_err(|error| failed("reach kafka", &error))?;
            let led = found
                .topics()
                .iter()
                .flat_map(|topic| topic.partitions())
                .filter(|partition| partition.leader() >= 0)
                .count();
            if i32::try_from(led) == Ok(PARTITIONS) {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(Failure::new(
                    Code::Unavailable,
                    format!("make the topic: it has no leaders yet (topic: {:?})", self.topic),
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What it is, for people.
    pub(super) fn describe(&self) -> String {
        match self.kind {
            Kind::Mock(_) => "a mock Kafka in this process".to_owned(),
            Kind::Real(_) => format!("Kafka at {}", self.servers),
        }
    }

    pub(super) const fn is_mock(&self) -> bool {
        matches!(self.kind, Kind::Mock(_))
    }

    /// Leaves nothing behind.
    pub(super) fn close(self, runtime: &Runtime) {
        let Kind::Real(admin) = &self.kind else { return };
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        let deleted = runtime.block_on(admin.delete_topics(&[&self.topic], &options));
        let deleted = deleted.is_ok_and(|results| results.iter().all(std::result::Result::is_ok));
        if !deleted {
            output::notice(format!(
                "the topic {} could not be deleted; delete it by hand",
                self.topic
            ));
        }
    }
}

fn failed(what: &str, error: &KafkaError) -> Failure {
    Failure::new(Code::Unavailable, format!("{what}: {error}")).because(error)
}

fn refused(what: &str, topic: &str, code: RDKafkaErrorCode) -> Failure {
    Failure::new(Code::Refused, format!("{what}: {code} (topic: {topic:?})"))
}
