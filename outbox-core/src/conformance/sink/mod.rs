//! The scenarios of the sink suite, by theme.

pub mod failure;
pub mod order;
pub mod outage;
pub mod outcomes;

use std::sync::Arc;

use super::harness::{SinkFault, SinkHarness, TOPICS};
use super::kit::{PATIENCE, text};
use crate::fetch::Record;
use crate::message::{Message, MessageId};
use crate::shard::{Position, Shard};
use crate::sink::{Outcome, Receipt, Sink};

/// A fresh destination with a sink, and records for it.
struct Bench<H: SinkHarness> {
    harness: H,
    sink: Box<dyn Sink>,
    last: i64,
}

impl<H: SinkHarness> Bench<H> {
    async fn fresh() -> Self {
        let harness = H::fresh().await;
        let sink = harness.sink().await;
        Self {
            harness,
            sink,
            last: 0,
        }
    }

    fn record(&mut self, topic: usize, key: Option<&str>, text: &str) -> Record {
        let builder = Message::builder(Arc::<str>::from(TOPICS[topic])).payload(text.to_owned());
        let message = match key {
            Some(key) => builder.key(key.to_owned()).build().unwrap(),
            None => builder.build().unwrap(),
        };
        self.wrap(message)
    }

    fn wrap(&mut self, message: Message) -> Record {
        self.last += 1;
        Record {
            shard: Shard(0),
            position: Position(self.last),
            key_seq: None,
            attempts: 0,
            message,
            defect: None,
        }
    }

    /// Records `key1` to `key<count>` of a key of the first topic.
    fn series(&mut self, key: &str, count: usize) -> Vec<Record> {
        (1..=count)
            .map(|number| self.record(0, Some(key), &format!("{key}{number}")))
            .collect()
    }

    async fn publish(&mut self, records: &[Record]) -> Receipt {
        let accepted = tokio::time::timeout(PATIENCE, self.sink.publish(records.to_vec())).await;
        accepted
            .unwrap_or_else(|_| panic!("publish waits for room, and there must be room within {PATIENCE:?}"))
    }

    /// Publishes and waits for the outcomes.
    async fn send(&mut self, records: &[Record]) -> Vec<Outcome> {
        let receipt = self.publish(records).await;
        outcomes(receipt, records.len()).await
    }

    /// Publishes what must arrive without any trouble.
    async fn send_all(&mut self, records: &[Record]) {
        let outcomes = self.send(records).await;
        assert_eq!(
            outcomes,
            vec![Outcome::Delivered; records.len()],
            "nothing is wrong with the destination any more, so everything must be delivered"
        );
    }

    async fn inject(&mut self, fault: SinkFault, record: Option<&Record>) {
        let id = record.map_or_else(MessageId::new, |record| record.message.id());
        self.harness.inject(fault, id).await;
    }

    /// What is at the destination of a key, in order.
    async fn arrived(&mut self, key: &str) -> Vec<String> {
        let delivered = self.harness.delivered().await;
        delivered
            .iter()
            .filter(|message| message.key().is_some_and(|own| own == key.as_bytes()))
            .map(text)
            .collect()
    }

    /// Each record of the key must have come after the one before it had come, repetitions aside.
    async fn expect_no_gap(&mut self, key: &str, count: usize) {
        let arrived = self.arrived(key).await;
        let mut high = 0;
        for text in &arrived {
            let number: usize = text[key.len()..].parse().unwrap();
            assert!(
                number <= high + 1,
                "{key}{number} arrived before {key}{}: a key must arrive in order, without a gap: {arrived:?}",
                high + 1
            );
            high = high.max(number);
        }
        assert_eq!(
            high, count,
            "all of the key must have arrived in the end: {arrived:?}"
        );
    }
}

/// Waits for a receipt, and checks that it has one outcome a record.
async fn outcomes(receipt: Receipt, records: usize) -> Vec<Outcome> {
    let outcomes = tokio::time::timeout(PATIENCE, receipt.outcomes()).await;
    let outcomes = outcomes
        .unwrap_or_else(|_| panic!("a receipt must resolve, and this one did not within {PATIENCE:?}"));
    assert_eq!(
        outcomes.len(),
        records,
        "a receipt must give exactly one outcome a record: {outcomes:?}"
    );
    outcomes
}

/// The class of each outcome.
fn classes(outcomes: &[Outcome]) -> Vec<&'static str> {
    outcomes.iter().map(Outcome::as_str).collect()
}
