//! The store and the sink in memory pass their suites, the store in several configurations.

#![cfg(feature = "conformance")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a harness may fail its test")]

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::conformance::{SinkFault, SinkHarness, StoreHarness, TOPICS};
use outbox_core::{
    MemoryConfig, MemoryFault, MemorySink, MemoryStore, MemoryTransaction, Message, MessageId, Ordering,
    OutboxStore, Outcome, Result, Sink,
};

macro_rules! harness {
    ($name:ident, $config:expr) => {
        struct $name(MemoryStore);

        #[async_trait]
        impl StoreHarness for $name {
            type Tx = MemoryTransaction;

            async fn fresh() -> Self {
                Self(MemoryStore::new($config))
            }

            fn store(&self) -> Arc<dyn OutboxStore> {
                Arc::new(self.0.clone())
            }

            async fn begin(&self) -> MemoryTransaction {
                self.0.begin()
            }

            async fn enqueue(&self, tx: &mut MemoryTransaction, messages: &[Message]) -> Result<()> {
                self.0.enqueue_many(tx, messages).await
            }

            async fn commit(&self, tx: MemoryTransaction) {
                tx.commit();
            }

            async fn rollback(&self, tx: MemoryTransaction) {
                tx.rollback();
            }

            fn concurrent_transactions(&self) -> bool {
                true
            }
        }
    };
}

harness!(EightShards, MemoryConfig::default());
harness!(
    OneShard,
    MemoryConfig {
        shards: 1,
        ..MemoryConfig::default()
    }
);
harness!(
    Sequenced,
    MemoryConfig {
        ordering: Ordering::Sequenced,
        ..MemoryConfig::default()
    }
);
harness!(
    Archiving,
    MemoryConfig {
        archive: true,
        ..MemoryConfig::default()
    }
);
harness!(
    WithoutPowers,
    MemoryConfig {
        shards: 64,
        dead_letters: false,
        scheduled: false,
        parking: false,
        wake_up: false,
        ..MemoryConfig::default()
    }
);

outbox_core::store_conformance!(EightShards, eight_shards, start_paused = true);
outbox_core::store_conformance!(OneShard, one_shard, start_paused = true);
outbox_core::store_conformance!(Sequenced, sequenced, start_paused = true);
outbox_core::store_conformance!(Archiving, archiving, start_paused = true);
outbox_core::store_conformance!(WithoutPowers, without_powers, start_paused = true);
// Real time and threads, as users of the macro have them.
outbox_core::store_conformance!(EightShards, on_threads, flavor = "multi_thread");

struct Memory(MemorySink);

#[async_trait]
impl SinkHarness for Memory {
    async fn fresh() -> Self {
        Self(MemorySink::new())
    }

    async fn sink(&self) -> Box<dyn Sink> {
        Box::new(self.0.clone())
    }

    async fn delivered(&self) -> Vec<Message> {
        self.0
            .delivered()
            .into_iter()
            .map(|record| record.message)
            .collect()
    }

    fn faults(&self) -> &'static [SinkFault] {
        use SinkFault::{Block, Break, Delay, Outage, Refuse};
        &[Refuse, Block, Outage, Break, Delay]
    }

    async fn inject(&self, fault: SinkFault, message: MessageId) {
        let script = |outcome| self.0.fail(MemoryFault::new(outcome).id(message).times(1));
        match fault {
            SinkFault::Refuse => script(Outcome::Retry("refused".into())),
            SinkFault::Break => script(Outcome::Broken("broken".into())),
            SinkFault::Block => {
                let blocked = Outcome::TopicBlocked("blocked".into());
                self.0.fail(MemoryFault::new(blocked).topic(TOPICS[1]));
            }
            SinkFault::Outage => self.0.begin_outage("nobody home"),
            SinkFault::Heal => {
                self.0.end_outage();
                self.0.clear_faults();
            }
            SinkFault::Delay => self.0.set_latency(Duration::from_millis(200)),
            other => panic!("{other:?} is not among the faults of this harness"),
        }
    }

    async fn poison(&self, key: &'static str) -> Option<Message> {
        let message = Message::builder(TOPICS[0])
            .key(key)
            .payload("poison")
            .build()
            .unwrap();
        let poison = Outcome::Poison("it can never go".into());
        self.0.fail(MemoryFault::new(poison).id(message.id()));
        Some(message)
    }
}

outbox_core::sink_conformance!(Memory, memory_sink, start_paused = true);

/// The same of a sink that goes on with a key, which must not answer that it wants a message again.
struct GoingOn(Memory);

#[async_trait]
impl SinkHarness for GoingOn {
    async fn fresh() -> Self {
        Self(Memory(MemorySink::going_on()))
    }

    async fn sink(&self) -> Box<dyn Sink> {
        self.0.sink().await
    }

    async fn delivered(&self) -> Vec<Message> {
        self.0.delivered().await
    }

    fn faults(&self) -> &'static [SinkFault] {
        use SinkFault::{Block, Break, Delay, Outage};
        &[Block, Outage, Break, Delay]
    }

    async fn inject(&self, fault: SinkFault, message: MessageId) {
        self.0.inject(fault, message).await;
    }

    async fn poison(&self, key: &'static str) -> Option<Message> {
        self.0.poison(key).await
    }
}

outbox_core::sink_conformance!(GoingOn, going_on_sink, start_paused = true);
