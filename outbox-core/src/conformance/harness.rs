//! What an author writes so that the suites can drive a store or a sink.

use std::sync::Arc;

use async_trait::async_trait;

use crate::error::Result;
use crate::message::{Message, MessageId};
use crate::sink::Sink;
use crate::store::OutboxStore;

/// The topics that the suites use, where topics are free. A sink's destination must know them; they are not to be
/// created by sending to them.
///
/// ```
/// use outbox_core::conformance::TOPICS;
///
/// // A harness creates them at the destination before its first scenario.
/// assert!(TOPICS.iter().all(|topic| outbox_core::check_topic(topic).is_ok()));
/// ```
pub const TOPICS: [&str; 2] = ["conformance-a", "conformance-b"];

/// Where [`StoreHarness::fit`] puts the suite's payload when it needs the payload for more.
///
/// ```
/// use outbox_core::conformance::CONTENT;
///
/// let payload = serde_json::json!({ "order_id": "42", CONTENT: "placed" });
/// assert_eq!(payload["content"], "placed");
/// ```
pub const CONTENT: &str = "content";

/// How the suite gets a store and what a producer does with it.
///
/// # Example
/// The [module's documentation](crate::conformance) has one for the store in memory. What goes with the scenario is
/// a field:
///
/// ```
/// use std::sync::Arc;
/// use outbox_core::conformance::StoreHarness;
/// # use outbox_core::{MemoryStore as MyStore, MemoryTransaction as MyTransaction};
/// use outbox_core::{Message, OutboxStore, Result};
/// # struct Directory;
/// # impl Directory { fn new() -> Self { Self } }
/// # fn open(_: &Directory) -> MyStore { MyStore::default() }
///
/// struct Mine {
///     store: MyStore,
///     /// Removed when the harness is dropped, after the scenario.
///     directory: Directory,
/// }
///
/// #[async_trait::async_trait]
/// impl StoreHarness for Mine {
///     type Tx = MyTransaction;
///     async fn fresh() -> Self {
///         let directory = Directory::new();
///         Self { store: open(&directory), directory }
///     }
///     fn store(&self) -> Arc<dyn OutboxStore> { Arc::new(self.store.clone()) }
///     async fn begin(&self) -> MyTransaction { self.store.begin() }
///     async fn enqueue(&self, tx: &mut MyTransaction, messages: &[Message]) -> Result<()> {
///         self.store.enqueue_many(tx, messages).await
///     }
///     async fn commit(&self, tx: MyTransaction) { tx.commit() }
///     async fn rollback(&self, tx: MyTransaction) { tx.rollback() }
///     fn concurrent_transactions(&self) -> bool { true }
/// }
/// ```
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

    /// A message of the suite's, whose payload is JSON or none, as a producer of this store would write it. As it is, unless
    /// the table has no column for the key and takes it from the payload: then the payload becomes an object with the
    /// key in its place and what it was as its member [`CONTENT`]. Nothing but the payload may differ.
    ///
    /// ```
    /// use outbox_core::Message;
    /// use outbox_core::conformance::CONTENT;
    /// use serde_json::{Value, json};
    ///
    /// fn fit(message: Message) -> Message {
    ///     let mut parts = message.into_parts();
    ///     let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ///     let content: Option<Value> = parts.payload.and_then(|payload| serde_json::from_slice(&payload).ok());
    ///     let payload = json!({ "order_id": parts.key.as_deref().map(text), CONTENT: content });
    ///     parts.payload = Some(payload.to_string().into());
    ///     Message::from_stored(parts)
    /// }
    /// let message = Message::builder("orders").key("42").payload("\"placed\"").build()?;
    /// let payload: Value = serde_json::from_slice(fit(message).payload().unwrap())?;
    /// assert_eq!(payload, json!({ "order_id": "42", CONTENT: "placed" }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn fit(&self, message: Message) -> Message {
        message
    }
}

/// How the suite gets a sink, looks at its destination and makes it fail.
///
/// ```
/// use outbox_core::conformance::{SinkFault, SinkHarness};
/// use outbox_core::{MemorySink, Message, MessageId, Sink};
///
/// struct Mine(MemorySink);
///
/// #[async_trait::async_trait]
/// impl SinkHarness for Mine {
///     async fn fresh() -> Self { Self(MemorySink::new()) }
///     async fn sink(&self) -> Box<dyn Sink> { Box::new(self.0.clone()) }
///     async fn delivered(&self) -> Vec<Message> {
///         self.0.delivered().into_iter().map(|record| record.message).collect()
///     }
///     fn faults(&self) -> &'static [SinkFault] { &[SinkFault::Outage] }
///     async fn inject(&self, fault: SinkFault, _: MessageId) {
///         match fault {
///             SinkFault::Outage => self.0.begin_outage("nobody home"),
///             _ => self.0.end_outage(),
///         }
///     }
///     async fn poison(&self, _: &'static str) -> Option<Message> { None } // it takes everything
/// }
///
/// outbox_core::sink_conformance!(Mine);
/// # fn main() {}
/// ```
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
///
/// ```
/// use outbox_core::conformance::SinkFault;
/// use outbox_core::{MemoryFault, MemorySink, MessageId, Outcome};
///
/// fn inject(sink: &MemorySink, fault: SinkFault, message: MessageId) {
///     match fault {
///         SinkFault::Refuse => sink.fail(MemoryFault::new(Outcome::Retry("refused".into())).id(message).times(1)),
///         SinkFault::Outage => sink.begin_outage("nobody home"),
///         SinkFault::Heal => sink.end_outage(),
///         other => panic!("{other:?} is not among the faults of this harness"),
///     }
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SinkFault {
    /// The next attempt to send the message fails, the one after that succeeds ([`crate::Outcome::Retry`]).
    Refuse,
    /// The second of the [`TOPICS`] takes nothing ([`crate::Outcome::TopicBlocked`]).
    Block,
    /// The destination cannot be reached ([`crate::Outcome::Outage`], or silence until a purge).
    Outage,
    /// The destination is well again, with all of its topics. A harness that lists [`SinkFault::Block`],
    /// [`SinkFault::Outage`] or [`SinkFault::Break`] can heal, too.
    Heal,
    /// The sink breaks when the message is sent ([`crate::Outcome::Broken`]): it goes on only when it was rebuilt.
    Break,
    /// Sending takes a while from now on, at least 100 ms: so that something is under way when it is purged.
    Delay,
}
