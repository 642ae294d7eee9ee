//! The sink suite against a real broker.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

mod common;

use std::cell::RefCell;
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use async_trait::async_trait;
use common::rdkafka::admin::AdminOptions;
use common::{admin, broker, create_topic, messages, quick};
use outbox_core::conformance::{SinkFault, SinkHarness, TOPICS};
use outbox_core::{Message, MessageId, Sink};
use outbox_kafka::KafkaSink;
use tokio::sync::{Mutex, OwnedMutexGuard};

/// The suite's topics have fixed names, so the scenarios take turns.
static TURN: LazyLock<Arc<Mutex<()>>> = LazyLock::new(Arc::default);

type Turn = Arc<OwnedMutexGuard<()>>;

thread_local! {
    /// The turn of the scenario that runs on this thread: the suite makes more than one harness for one.
    static OWN: RefCell<Weak<OwnedMutexGuard<()>>> = RefCell::default();
}

/// Holds the turn from the first sink on.
#[derive(Default)]
struct Real {
    turn: std::sync::Mutex<Option<Turn>>,
}

async fn delete(topics: &[&str]) {
    let admin = admin(&broker());
    // An error is that of a topic that does not exist, which is what is wanted.
    let _ = admin.delete_topics(topics, &AdminOptions::new()).await.unwrap();
    for topic in topics {
        for _ in 0..100 {
            let metadata = admin
                .inner()
                .fetch_metadata(Some(topic), Duration::from_secs(5))
                .unwrap();
            if metadata.topics()[0].partitions().is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[async_trait]
impl SinkHarness for Real {
    async fn fresh() -> Self {
        Self::default()
    }

    async fn sink(&self) -> Box<dyn Sink> {
        let turn = if let Some(own) = OWN.with_borrow(Weak::upgrade) {
            own
        } else {
            let turn = Arc::new(TURN.clone().lock_owned().await);
            OWN.set(Arc::downgrade(&turn));
            delete(&TOPICS).await;
            for topic in TOPICS {
                create_topic(topic, 4, &[]).await;
            }
            turn
        };
        *self.turn.lock().unwrap() = Some(turn);
        Box::new(KafkaSink::new(&quick(broker())).unwrap())
    }

    async fn delivered(&self) -> Vec<Message> {
        let broker = broker();
        TOPICS
            .iter()
            .filter(|topic| common::exists(&broker, topic))
            .flat_map(|topic| messages(&broker, topic))
            .collect()
    }

    fn faults(&self) -> &'static [SinkFault] {
        // The others would disturb the tests that use the broker at the same time; the mock has them.
        &[SinkFault::Block]
    }

    async fn inject(&self, fault: SinkFault, _: MessageId) {
        match fault {
            SinkFault::Block => delete(&TOPICS[1..]).await,
            SinkFault::Heal => create_topic(TOPICS[1], 4, &[]).await,
            other => panic!("{other:?} is not among the faults of this harness"),
        }
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

outbox_core::sink_conformance!(Real, real, flavor = "multi_thread");
