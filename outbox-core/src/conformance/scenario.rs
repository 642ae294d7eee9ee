//! One scenario: its name, what it needs, how it is run, and the report of those that were not.

use std::fmt;

use futures::future::BoxFuture;

use super::harness::{SinkFault, SinkHarness, StoreHarness};
use crate::store::{Ordering, OutboxStore};

/// One scenario of a suite, for harnesses of type `H`.
///
/// ```
/// use outbox_core::conformance::{Scenario, StoreNeed};
///
/// fn line(scenario: &Scenario<StoreNeed>) -> String {
///     format!("{}::{} needs {:?}", scenario.theme, scenario.name, scenario.needs)
/// }
/// ```
pub struct Scenario<N: 'static> {
    /// Its name, as in the contracts of the traits.
    pub name: &'static str,
    /// The file that it stands in.
    pub theme: &'static str,
    /// What must be true of a store or a sink for it to make sense.
    pub needs: &'static [N],
    /// Runs it; panics when it fails.
    pub run: fn() -> BoxFuture<'static, ()>,
}

/// What a scenario needs of a store.
///
/// ```
/// use outbox_core::conformance::StoreNeed;
///
/// let store = outbox_core::MemoryStore::default();
/// assert_eq!(StoreNeed::DeadLetters.missing(&store, true), None);
/// assert_eq!(StoreNeed::Retention.missing(&store, true), Some("it keeps no archive"));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreNeed {
    /// Messages may have keys.
    Keys,
    /// Any topic can be stored.
    Topics,
    /// Headers are stored.
    Headers,
    /// Content types are stored.
    ContentTypes,
    /// A tombstone stays one.
    Tombstones,
    /// Bytes are kept as they are.
    AnyBytes,
    /// The producer's ids are stored.
    MessageIds,
    /// There are several shards.
    Shards,
    /// The order is [`Ordering::Insert`].
    Insert,
    /// The order is [`Ordering::Sequenced`].
    Sequenced,
    /// Several transactions can be open at once.
    Concurrent,
    /// Dead letters are kept.
    DeadLetters,
    /// Dead letters are not kept.
    NoDeadLetters,
    /// Messages can be scheduled.
    Scheduled,
    /// Messages cannot be scheduled.
    NoScheduled,
    /// Delivered messages are archived.
    Retention,
    /// Parked keys can be resumed.
    Parking,
    /// Messages, keys and topics can be inspected.
    Inspection,
    /// Commits give a hint.
    WakeUp,
}

/// What a scenario needs of a sink.
///
/// ```
/// use outbox_core::conformance::{SinkHarness, SinkNeed};
///
/// async fn can_be_parked<H: SinkHarness>(harness: &H) -> bool {
///     SinkNeed::StopsKey.missing(harness).await.is_none()
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SinkNeed {
    /// The harness can make the destination refuse a message once.
    Refuse,
    /// The harness can block a topic.
    Block,
    /// The harness can begin and end an outage.
    Outage,
    /// The harness can break the sink.
    Break,
    /// The harness can delay what is sent.
    Delay,
    /// There are messages that the destination never takes.
    Poison,
    /// The sink stops a key at a failure.
    StopsKey,
    /// The sink goes on behind a failure.
    GoesOn,
}

impl StoreNeed {
    /// Why a store, as its harness drives it, does not meet the need; none when it does.
    #[must_use]
    pub fn missing(self, store: &dyn OutboxStore, concurrent: bool) -> Option<&'static str> {
        let can = store.capabilities();
        let (met, why) = match self {
            Self::Keys => (can.keys, "its messages have no keys"),
            Self::Topics => (can.fixed_topic.is_none(), "its topic is fixed"),
            Self::Headers => (can.headers, "it stores no headers"),
            Self::ContentTypes => (can.content_types, "it stores no content types"),
            Self::Tombstones => (can.tombstones, "it stores no tombstones"),
            Self::AnyBytes => (can.any_bytes, "it stores JSON only"),
            Self::MessageIds => (can.message_ids, "its message ids are derived, not the producer's"),
            Self::Shards => (can.shards > 1, "it has one shard"),
            Self::Insert => (can.ordering == Ordering::Insert, "its keys are numbered"),
            Self::Sequenced => (can.ordering == Ordering::Sequenced, "its keys are not numbered"),
            Self::Concurrent => (concurrent, "it has one writer at a time"),
            Self::DeadLetters => (store.dead_letters().is_some(), "it keeps no dead letters"),
            Self::NoDeadLetters => (store.dead_letters().is_none(), "it keeps dead letters"),
            Self::Scheduled => (store.scheduled().is_some(), "it has no scheduled delivery"),
            Self::NoScheduled => (store.scheduled().is_none(), "it has scheduled delivery"),
            Self::Retention => (store.retention().is_some(), "it keeps no archive"),
            Self::Parking => (store.parking().is_some(), "its parked keys cannot be resumed"),
            Self::Inspection => (store.inspection().is_some(), "it cannot be inspected"),
            Self::WakeUp => (store.wake_up().is_some(), "it gives no hints"),
        };
        (!met).then_some(why)
    }
}

impl SinkNeed {
    /// Why a sink, as its harness drives it, does not meet the need; none when it does.
    pub async fn missing<H: SinkHarness>(self, harness: &H) -> Option<&'static str> {
        let can = |fault| harness.faults().contains(&fault);
        let stops = harness.sink().await.capabilities().stops_key_at_failure;
        let (met, why) = match self {
            Self::Refuse => (
                can(SinkFault::Refuse),
                "its harness cannot make it refuse a message once",
            ),
            Self::Block => (can(SinkFault::Block), "its harness cannot block a topic"),
            Self::Outage => (can(SinkFault::Outage), "its harness cannot begin an outage"),
            Self::Break => (can(SinkFault::Break), "its harness cannot break it"),
            Self::Delay => (can(SinkFault::Delay), "its harness cannot delay what is sent"),
            Self::Poison => (
                harness.poison("key").await.is_some(),
                "its harness knows no message that is never taken",
            ),
            Self::StopsKey => (stops, "it goes on behind a failure, and says so"),
            Self::GoesOn => (!stops, "it stops a key at a failure"),
        };
        (!met).then_some(why)
    }
}

/// All scenarios of the store suite.
///
/// ```
/// use outbox_core::conformance::store_scenarios;
/// # use outbox_core::conformance::broken::BrokenStore as Mine; // any harness
///
/// let names: Vec<_> = store_scenarios::<Mine>().iter().map(|scenario| scenario.name).collect();
/// assert!(names.contains(&"settle_is_fenced"));
/// ```
#[must_use]
pub fn store_scenarios<H: StoreHarness>() -> Vec<Scenario<StoreNeed>> {
    crate::__for_each_store_scenario!([super::list::collect_stores][H])
}

/// All scenarios of the sink suite.
///
/// ```
/// use outbox_core::conformance::sink_scenarios;
/// # use outbox_core::conformance::broken::BrokenSink as Mine; // any harness
///
/// let names: Vec<_> = sink_scenarios::<Mine>().iter().map(|scenario| scenario.name).collect();
/// assert!(names.contains(&"order_within_key"));
/// ```
#[must_use]
pub fn sink_scenarios<H: SinkHarness>() -> Vec<Scenario<SinkNeed>> {
    crate::__for_each_sink_scenario!([super::list::collect_sinks][H])
}

/// Runs one scenario of the store suite, or prints why it does not apply.
///
/// # Panics
/// When the store fails it, and when there is no scenario of this name.
///
/// # Example
/// ```
/// use outbox_core::conformance::{StoreHarness, prove_store};
///
/// /// One scenario alone, under the author's own runtime.
/// async fn fenced<H: StoreHarness>() {
///     prove_store::<H>("settle_is_fenced").await;
/// }
/// ```
pub async fn prove_store<H: StoreHarness>(name: &str) {
    let scenario = find(store_scenarios::<H>(), name);
    match not_applicable_to_store(&H::fresh().await, &scenario) {
        Some(why) => println!("not applicable: {why}"),
        None => (scenario.run)().await,
    }
}

/// Runs one scenario of the sink suite, or prints why it does not apply.
///
/// # Panics
/// When the sink fails it, and when there is no scenario of this name.
///
/// # Example
/// ```
/// use outbox_core::conformance::{SinkHarness, prove_sink};
///
/// /// One scenario alone, under the author's own runtime.
/// async fn ordered<H: SinkHarness>() {
///     prove_sink::<H>("order_within_key").await;
/// }
/// ```
pub async fn prove_sink<H: SinkHarness>(name: &str) {
    let scenario = find(sink_scenarios::<H>(), name);
    match not_applicable_to_sink(&H::fresh().await, &scenario).await {
        Some(why) => println!("not applicable: {why}"),
        None => (scenario.run)().await,
    }
}

/// Prints and returns the scenarios that do not apply to a store, each with the reason.
///
/// ```
/// use outbox_core::conformance::{StoreHarness, report_store};
///
/// /// Fails when a store that could do everything no longer does.
/// async fn everything_applies<H: StoreHarness>() {
///     assert_eq!(report_store::<H>().await, []);
/// }
/// ```
pub async fn report_store<H: StoreHarness>() -> Vec<(&'static str, &'static str)> {
    let harness = H::fresh().await;
    let all = store_scenarios::<H>();
    let missing = all
        .iter()
        .filter_map(|scenario| Some((scenario.name, not_applicable_to_store(&harness, scenario)?)))
        .collect();
    print_report(harness.store().capabilities().name, all.len(), missing)
}

/// Prints and returns the scenarios that do not apply to a sink, each with the reason.
///
/// ```
/// use outbox_core::conformance::{SinkHarness, report_sink};
///
/// /// Fails when a harness that could inject every fault no longer does.
/// async fn everything_applies<H: SinkHarness>() {
///     assert_eq!(report_sink::<H>().await, []);
/// }
/// ```
pub async fn report_sink<H: SinkHarness>() -> Vec<(&'static str, &'static str)> {
    let harness = H::fresh().await;
    let all = sink_scenarios::<H>();
    let mut missing = Vec::new();
    for scenario in &all {
        if let Some(why) = not_applicable_to_sink(&harness, scenario).await {
            missing.push((scenario.name, why));
        }
    }
    print_report(harness.sink().await.capabilities().name, all.len(), missing)
}

fn not_applicable_to_store<H: StoreHarness>(
    harness: &H,
    scenario: &Scenario<StoreNeed>,
) -> Option<&'static str> {
    let store = harness.store();
    scenario
        .needs
        .iter()
        .find_map(|need| need.missing(&*store, harness.concurrent_transactions()))
}

async fn not_applicable_to_sink<H: SinkHarness>(
    harness: &H,
    scenario: &Scenario<SinkNeed>,
) -> Option<&'static str> {
    for need in scenario.needs {
        if let Some(why) = need.missing(harness).await {
            return Some(why);
        }
    }
    None
}

fn find<N>(scenarios: Vec<Scenario<N>>, name: &str) -> Scenario<N> {
    scenarios
        .into_iter()
        .find(|scenario| scenario.name == name)
        .unwrap_or_else(|| panic!("there is no scenario {name}"))
}

fn print_report(
    name: &str,
    all: usize,
    missing: Vec<(&'static str, &'static str)>,
) -> Vec<(&'static str, &'static str)> {
    println!("{name}: {} of {all} scenarios apply", all - missing.len());
    for (scenario, why) in &missing {
        println!("not applicable: {scenario}: {why}");
    }
    missing
}

impl<N: fmt::Debug> fmt::Debug for Scenario<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scenario")
            .field("name", &self.name)
            .field("theme", &self.theme)
            .field("needs", &self.needs)
            .finish_non_exhaustive()
    }
}
