//! The sink suite against librdkafka's mock cluster.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use async_trait::async_trait;
use common::rdkafka::mocking::MockCluster;
use common::rdkafka::producer::DefaultProducerContext;
use common::rdkafka::types::{RDKafkaApiKey as Api, RDKafkaRespErr as Error};
use common::{messages, quick};
use outbox_core::conformance::{SinkFault, SinkHarness, TOPICS};
use outbox_core::{Message, MessageId, Sink};
use outbox_kafka::KafkaSink;

struct Mock {
    servers: String,
    /// The second topic cannot be read either then.
    blocked: AtomicBool,
    cluster: Mutex<Cluster>,
}

/// The mock cluster is a pointer for Rust, so it lives on a thread of its own and takes orders.
struct Cluster(std::sync::mpsc::Sender<Order>);

/// More requests than an idempotent producer ever has under way.
const IN_FLIGHT: usize = 10;

enum Order {
    Down,
    Heal,
    Delay,
    Break,
    BlockTopic,
}

impl Cluster {
    fn start() -> (Self, String) {
        let (orders, inbox) = std::sync::mpsc::channel();
        let (told, servers) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let cluster: MockCluster<'static, DefaultProducerContext> = MockCluster::new(1).unwrap();
            for topic in TOPICS {
                cluster.create_topic(topic, 4, 1).unwrap();
            }
            told.send(cluster.bootstrap_servers()).unwrap();
            for order in inbox {
                match order {
                    Order::Down => cluster.broker_down(1).unwrap(),
                    Order::Heal => {
                        cluster
                            .topic_error(TOPICS[1], Error::RD_KAFKA_RESP_ERR_NO_ERROR)
                            .unwrap();
                        cluster.clear_request_errors(Api::Produce);
                        cluster.broker_up(1).unwrap();
                    }
                    Order::Delay => cluster
                        .broker_round_trip_time(1, Duration::from_millis(200))
                        .unwrap(),
                    // As on a real broker: where one request broke the sequence, those that follow break it, too.
                    Order::Break => cluster.request_errors(
                        Api::Produce,
                        &[Error::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER; IN_FLIGHT],
                    ),
                    Order::BlockTopic => cluster
                        .topic_error(TOPICS[1], Error::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED)
                        .unwrap(),
                }
            }
        });
        (Self(orders), servers.recv().unwrap())
    }
}

#[async_trait]
impl SinkHarness for Mock {
    async fn fresh() -> Self {
        let (cluster, servers) = Cluster::start();
        Self {
            servers,
            blocked: AtomicBool::new(false),
            cluster: Mutex::new(cluster),
        }
    }

    async fn sink(&self) -> Box<dyn Sink> {
        Box::new(KafkaSink::new(&quick(&*self.servers)).unwrap())
    }

    async fn delivered(&self) -> Vec<Message> {
        let readable = if self.blocked.load(Relaxed) { 1 } else { 2 };
        TOPICS[..readable]
            .iter()
            .flat_map(|topic| messages(&self.servers, topic))
            .collect()
    }

    fn faults(&self) -> &'static [SinkFault] {
        // librdkafka retries by itself what passes, so nothing can be refused once.
        &[
            SinkFault::Block,
            SinkFault::Outage,
            SinkFault::Delay,
            SinkFault::Break,
        ]
    }

    async fn inject(&self, fault: SinkFault, _: MessageId) {
        let order = match fault {
            SinkFault::Block => Order::BlockTopic,
            SinkFault::Outage => Order::Down,
            SinkFault::Heal => Order::Heal,
            SinkFault::Break => Order::Break,
            SinkFault::Delay => Order::Delay,
            other => panic!("{other:?} is not among the faults of this harness"),
        };
        match order {
            Order::BlockTopic => self.blocked.store(true, Relaxed),
            Order::Heal => self.blocked.store(false, Relaxed),
            Order::Down | Order::Delay | Order::Break => {}
        }
        self.cluster.lock().unwrap().0.send(order).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    async fn poison(&self, key: &'static str) -> Option<Message> {
        Some(
            Message::builder(TOPICS[0])
                .key(key)
                .payload(vec![0; 1_000_001])
                .build()
                .unwrap(),
        )
    }
}

outbox_core::sink_conformance!(Mock, mock, flavor = "multi_thread");
