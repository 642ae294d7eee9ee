//! What an author writes so that the suites can drive a store or a sink.

use std::sync::Arc;

use async_trait::async_trait;

use crate::error::Result;
use crate::message::{Message, MessageId};
use crate::sink::Sink;
use crate::store::OutboxStore;

/// The topics that the suites use, where topics are free. A sink's destination must know them; they are not to be
/// created by sending to them.
pub const TOPICS: [&str; 2] = ["conformance-a", "conformance-b"];

/// How the suite gets a store and what a producer does with it.
#[async_trait]
pub trait StoreHarness: Send + Sync + Sized + 'static {
    /// A producer's open transaction.
    type Tx: Send;

    /// A store of its own for one scenario: fresh, empty, migrated. Whatever must outlive the scenario (a temporary
    /// directory, a database to be dropped) lives in the harness.
    async fn fresh() -> Self;

    /// The store; may be a new handle, with connections of its own, each time.
    fn store(&self) -> Arc<dyn OutboxStore>;

    /// Opens a producer's transaction.
    async fn begin(&self) -> Self::Tx;

    /// Enqueues messages in it, in this order. Errors are the store's own.
    async fn enqueue(&self, tx: &mut Self::Tx, messages: &[Message]) -> Result<()>;

    /// Commits it.
    async fn commit(&self, tx: Self::Tx);

    /// Rolls it back.
    async fn rollback(&self, tx: Self::Tx);

    /// Whether several transactions can have enqueued messages while all are open. False for a database with one
    /// writer.
    fn concurrent_transactions(&self) -> bool;
}

/// How the suite gets a sink, looks at its destination and makes it fail.
#[async_trait]
pub trait SinkHarness: Send + Sync + Sized + 'static {
    /// A destination of its own for one scenario: empty, and knowing the [`TOPICS`].
    async fn fresh() -> Self;

    /// A sink to this destination.
    async fn sink(&self) -> Box<dyn Sink>;

    /// What is durably at the destination, in order within each topic and key.
    async fn delivered(&self) -> Vec<Message>;

    /// The kinds of faults that [`inject`](Self::inject) can bring about. The suite does not run what needs others,
    /// and says so.
    fn faults(&self) -> &'static [SinkFault];

    /// Brings a fault about before the suite publishes: on `message`, or for the whole destination.
    async fn inject(&self, fault: SinkFault, message: MessageId);

    /// A message of the first topic and this key that the destination will never take, however often it is sent;
    /// none if there is no such thing.
    async fn poison(&self, key: &'static str) -> Option<Message>;
}

/// A fault that the sink suite asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SinkFault {
    /// The next attempt to send the message fails, the one after that succeeds ([`crate::Outcome::Retry`]).
    Refuse,
    /// The second of the [`TOPICS`] takes nothing ([`crate::Outcome::TopicBlocked`]).
    Block,
    /// The destination cannot be reached ([`crate::Outcome::Outage`], or silence until a purge).
    Outage,
    /// The end of an outage. A harness that lists [`SinkFault::Outage`] can end it, too.
    Heal,
    /// The sink breaks when the message is sent ([`crate::Outcome::Broken`]).
    Break,
    /// Sending takes a while from now on, at least 100 ms: so that something is under way when it is purged.
    Delay,
}
