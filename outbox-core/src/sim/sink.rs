//! The destination as a relay sees it: its own producer, with acknowledgements that come late or not at all.

use std::sync::Arc;

use async_trait::async_trait;

use super::stage::Stage;
use crate::error::Result;
use crate::fetch::Record;
use crate::memory::MemorySink;
use crate::sink::{Outcome, Receipt, Sink, SinkCapabilities};

/// A relay's producer.
#[derive(Debug)]
pub(super) struct Producer {
    stage: Hidden,
    sink: MemorySink,
}

/// Not for anybody's eyes.
struct Hidden(Arc<Stage>);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

impl Producer {
    /// One of a relay's, and what stands behind it: what is under way there goes on without the relay.
    pub(super) fn new(stage: &Arc<Stage>, relay: u32, goes_on: bool) -> (Self, MemorySink) {
        let sink = if goes_on {
            MemorySink::going_on()
        } else {
            MemorySink::new()
        };
        sink.set_latency(stage.millis(0..30));
        if stage.happens(300) {
            sink.set_capacity(stage.draw(|random| random.usize(1..30)));
        }
        let judging = Arc::clone(stage);
        sink.judge_by(move |record| judge(&judging, &record, relay, goes_on));
        let producer = Self {
            stage: Hidden(Arc::clone(stage)),
            sink: sink.clone(),
        };
        (producer, sink)
    }
}

/// What becomes of a record that is to leave.
fn judge(stage: &Stage, record: &Record, relay: u32, goes_on: bool) -> Outcome {
    let id = record.message.id();
    let name = || stage.ledger().name(id);
    let (rates, down, blocked, poison) = {
        let weather = stage.weather();
        (
            weather.rates,
            weather.broker_down,
            weather.blocked.contains(record.message.topic()),
            weather.poison.contains(&id),
        )
    };
    if down {
        stage.note(format_args!("outage: {}", name()));
        return Outcome::Outage("nobody home".into());
    }
    if blocked {
        stage.note(format_args!("blocked: {}", name()));
        return Outcome::TopicBlocked("forbidden".into());
    }
    if poison {
        stage.fault("poison", name());
        stage.ledger().refuse(id);
        return Outcome::Poison("indigestible".into());
    }
    // A sink that goes on with the key must not answer so.
    if !goes_on && stage.strikes(rates.retry) {
        stage.fault("retry", name());
        stage.ledger().refuse(id);
        return Outcome::Retry("later".into());
    }
    let (broken, unknown) = (stage.strikes(rates.broken), stage.strikes(rates.unknown));
    if broken || unknown {
        stage.fault(if broken { "broken" } else { "unknown" }, name());
        // It may have been written all the same.
        if stage.happens(500) {
            arrive(stage, record, relay);
        }
        return if broken {
            Outcome::Broken("fatal".into())
        } else {
            Outcome::Unknown("no acknowledgement".into())
        };
    }
    arrive(stage, record, relay);
    Outcome::Delivered
}

fn arrive(stage: &Stage, record: &Record, relay: u32) {
    let name = stage.ledger().name(record.message.id());
    stage.note(format_args!(
        "{} arrives by relay-{relay}: {name}",
        record.position.0
    ));
    let wall = stage.wall();
    stage.ledger().arrive(record, relay, wall);
}

#[async_trait]
impl Sink for Producer {
    fn capabilities(&self) -> SinkCapabilities {
        self.sink.capabilities()
    }

    async fn publish(&mut self, batch: Vec<Record>) -> Receipt {
        let receipt = self.sink.publish(batch).await;
        // Acknowledgements overtake one another: they are of different partitions. Until it is heard, a failure stops
        // the key, so that nothing may come between its being heard by the sink and by the relay.
        let pause = self.stage.0.millis(0..60);
        Receipt::pending(async move {
            tokio::time::sleep(pause).await;
            receipt.outcomes().await
        })
    }

    async fn probe(&mut self) -> Result<()> {
        self.stage.0.pause(0..10).await;
        if self.stage.0.weather().broker_down {
            self.sink.begin_outage("nobody home");
        } else {
            self.sink.end_outage();
        }
        self.sink.probe().await
    }

    async fn purge(&mut self) {
        self.sink.purge().await;
    }

    async fn rebuild(&mut self) -> Result<()> {
        self.stage.0.pause(0..50).await;
        self.sink.rebuild().await
    }
}
