//! Where messages go.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::FutureExt;
use futures::future::BoxFuture;

use crate::error::Result;
use crate::fetch::Record;

/// Publishes batches of records to a destination.
///
/// # Contract
/// The names in parentheses are the scenarios of the sink suite that prove the clause.
///
/// - Batches are handed over one after the other; what the sink accepts goes out, **per topic and key, in the order
///   it was handed over**, also across batches whose receipts are still open (`order_within_key`,
///   `order_across_batches`, `order_under_pressure`), whole and each once (`content_arrives`,
///   `no_repetition_without_fault`). A receipt that is dropped changes nothing (`dropped_receipt_does_no_harm`).
/// - A receipt **MUST** give exactly one outcome a record, in the batch's order (`one_outcome_each`,
///   `outcomes_are_in_order`).
/// - `Delivered` **MUST** mean durably accepted by the destination (`delivered_is_durable`).
/// - After `Outage`, `Unknown` or `Broken` none of the key's successors that the sink already has is delivered
///   until the relay has called [`purge`](Self::purge) (`outage_stops_key`). After `TopicBlocked` none is until its
///   receipt has resolved, whatever the topic takes by then: they are `TopicBlocked`, `Skipped` or `Unknown`
///   (`blocked_topic_stops_key`). With [`SinkCapabilities::stops_key_at_failure`] neither after `Poison` and `Retry`:
///   they are `Skipped` (`failure_stops_key`, `retry_stops_key`). The sink
///   "already has" what was handed over, that is for which `publish` was first polled, before the failure's receipt
///   resolved; the relay never begins a hand-over between hearing of a failure and deciding upon it.
/// - A sink without that capability **MUST NOT** answer `Retry` (`retry_needs_stopping`).
/// - After [`purge`](Self::purge) every open receipt **MUST** resolve promptly, and nothing handed over before may
///   leave the process any more (`purge_resolves_everything`, `purge_of_nothing_does_no_harm`). A publish that was
///   dropped half-way is over with it (`publish_can_be_dropped`).
/// - One message that cannot be sent **MUST NOT** harm the others (`poison_is_alone`), nor one topic
///   (`blocked_topic_lets_others_flow`).
/// - When nobody can go, no message is to blame, and [`probe`](Self::probe) **MUST** say so at once
///   (`outage_blames_nobody`). A sink that is `Broken` works again after [`rebuild`](Self::rebuild), and a rebuild
///   that was not needed does no harm (`broken_is_rebuilt`, `rebuild_does_no_harm`).
///
/// # Cancel safety
/// `publish` may be dropped half-way; the relay then calls `purge` and takes all of the batch as unknown. The other
/// methods may be dropped and called again.
///
/// # Example
/// ```
/// use async_trait::async_trait;
/// use outbox_core::{Outcome, Receipt, Record, Result, Sink, SinkCapabilities};
///
/// /// Prints each message's topic and is done with it.
/// #[derive(Debug)]
/// struct Printer;
///
/// #[async_trait]
/// impl Sink for Printer {
///     fn capabilities(&self) -> SinkCapabilities {
///         SinkCapabilities { name: "printer", stops_key_at_failure: true }
///     }
///
///     async fn publish(&mut self, batch: Vec<Record>) -> Receipt {
///         batch.iter().for_each(|record| println!("{}", record.message.topic()));
///         Receipt::ready(vec![Outcome::Delivered; batch.len()])
///     }
///
///     async fn probe(&mut self) -> Result<()> {
///         Ok(())
///     }
///
///     async fn purge(&mut self) {}
///
///     async fn rebuild(&mut self) -> Result<()> {
///         Ok(())
///     }
/// }
/// ```
#[async_trait]
pub trait Sink: Send + fmt::Debug + 'static {
    /// What this sink can do. Constant for its lifetime.
    fn capabilities(&self) -> SinkCapabilities;

    /// Takes a batch over. Ready when the next batch may be handed over; the receipt resolves when the outcome of
    /// every record is known. Waiting for room is waiting here: back-pressure.
    async fn publish(&mut self, batch: Vec<Record>) -> Receipt;

    /// Whether the destination can be reached and would take messages. Called while publishing pauses.
    async fn probe(&mut self) -> Result<()>;

    /// Drops what was handed over and has not left, and resolves all open receipts.
    async fn purge(&mut self);

    /// Makes the sink usable again after [`Outcome::Broken`].
    async fn rebuild(&mut self) -> Result<()>;
}

/// What a sink can do.
///
/// ```
/// use outbox_core::{MemorySink, Sink};
///
/// let can = MemorySink::new().capabilities();
/// assert!(can.stops_key_at_failure);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SinkCapabilities {
    /// A name for people: `kafka`.
    pub name: &'static str,
    /// Whether, when a message is refused for what it is, none of its key's successors that the sink already has is
    /// delivered.
    ///
    /// Kafka's producer delivers what follows a refused message. With `false` the relay has one message a key in
    /// flight when keys are to be parked.
    pub stops_key_at_failure: bool,
}

/// What became of one message.
///
/// ```
/// use outbox_core::Outcome;
///
/// /// What an HTTP destination's answer means.
/// fn outcome(status: u16) -> Outcome {
///     match status {
///         200..=299 => Outcome::Delivered,
///         404 => Outcome::TopicBlocked("there is no such endpoint".into()),
///         400..=499 => Outcome::Poison(format!("refused with {status}").into()),
///         _ => Outcome::Retry(format!("failed with {status}").into()),
///     }
/// }
/// assert_eq!(outcome(503).as_str(), "retry");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The destination has it, durably.
    Delivered,
    /// This message can never go. Burns no retry: a dead letter at once, or its key parks.
    Poison(Reason),
    /// This message, later. Burns an attempt.
    Retry(Reason),
    /// Its topic is unknown or forbidden. The topic is held and probed, others flow; burns no attempt.
    TopicBlocked(Reason),
    /// Nobody can go. Publishing pauses and probes; burns no attempt.
    Outage(Reason),
    /// It may or may not have been written; it will be sent again.
    Unknown(Reason),
    /// The sink itself is unusable and must be rebuilt; the message may or may not have been written.
    Broken(Reason),
    /// It was not sent because a predecessor of its key was not.
    Skipped,
}

impl Outcome {
    /// The class in a word, for metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Poison(_) => "poison",
            Self::Retry(_) => "retry",
            Self::TopicBlocked(_) => "topic_blocked",
            Self::Outage(_) => "outage",
            Self::Unknown(_) => "unknown",
            Self::Broken(_) => "broken",
            Self::Skipped => "skipped",
        }
    }
}

/// What a sink says about a failure, for people: cheap to clone, at most [`Reason::MAX_BYTES`] long, no payloads.
///
/// ```
/// use outbox_core::Reason;
///
/// let reason: Reason = "message too large".into();
/// assert_eq!(reason.as_str(), "message too large");
/// assert_eq!(Reason::from("x".repeat(5_000)).as_str().len(), Reason::MAX_BYTES);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason(Arc<str>);

impl Reason {
    /// Longer texts are cut, so that holds and dead letters stay small.
    pub const MAX_BYTES: usize = 1_000;

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<T: AsRef<str>> From<T> for Reason {
    fn from(text: T) -> Self {
        let text = text.as_ref();
        Self(text[..text.floor_char_boundary(Self::MAX_BYTES)].into())
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Resolves to the outcome of every record of a batch, in its order.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use outbox_core::{Outcome, Receipt};
///
/// let (acknowledge, acknowledged) = tokio::sync::oneshot::channel();
/// let receipt = Receipt::pending(async move {
///     // The destination's answer, which may never come.
///     vec![acknowledged.await.unwrap_or(Outcome::Unknown("the connection was cut".into()))]
/// });
/// acknowledge.send(Outcome::Delivered).unwrap();
/// assert_eq!(receipt.outcomes().await, [Outcome::Delivered]);
/// # }
/// ```
pub struct Receipt(BoxFuture<'static, Vec<Outcome>>);

impl Receipt {
    /// A receipt that is known at once.
    #[must_use]
    pub fn ready(outcomes: Vec<Outcome>) -> Self {
        Self(std::future::ready(outcomes).boxed())
    }

    /// A receipt that comes later.
    pub fn pending(outcomes: impl Future<Output = Vec<Outcome>> + Send + 'static) -> Self {
        Self(outcomes.boxed())
    }

    /// Waits for the outcomes.
    pub async fn outcomes(self) -> Vec<Outcome> {
        self.0.await
    }
}

impl fmt::Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Receipt")
    }
}
