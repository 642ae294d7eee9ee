//! What a database must do for the relay.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::dead::DeadLetters;
use crate::error::Result;
use crate::fetch::{FetchRequest, Fetched};
use crate::hold::{Hold, Parking};
use crate::inspect::Inspection;
use crate::lease::{LeaseRequest, Leases, Membership, RelayId};
use crate::retention::Retention;
use crate::scheduled::Scheduled;
use crate::settle::{Settled, Settlement};
use crate::shard::{Epoch, OwnedShard, Shard};
use crate::wake::WakeUp;

/// Reads batches, leases shards and records outcomes, all fenced by the shards' epochs.
///
/// # Contract
/// The names in parentheses are the scenarios of the conformance suite that prove the clause.
///
/// - A message **MUST** become visible to readers with the commit of its producer's transaction, not before, and
///   never after a rollback (`commit_makes_visible`, `rollback_leaves_nothing`, `nothing_visible_before_commit`).
///   Messages of one transaction keep their order, a call that is refused writes nothing, and large transactions are
///   like small ones (`transaction_keeps_order`, `refused_call_writes_nothing`, `huge_transaction_flows`).
/// - What [`Capabilities`] say **MUST** hold, for good; what a store cannot hold it **MUST** refuse at enqueue, with
///   [`crate::ErrorKind::Unsupported`] or [`crate::ErrorKind::Invalid`], never drop or change it
///   (`capabilities_are_constant`, `what_cannot_be_held_is_refused`, `scheduled_is_refused_without`,
///   `deaths_are_refused_without_dead_letters`, `no_archive_without_retention`).
/// - What it can hold it **MUST** give back as it was, whatever the bytes, whole (`bytes_survive`,
///   `messages_survive`, `largest_survive`, `headers_survive`, `content_type_survives`, `no_key_is_not_an_empty_key`,
///   `tombstone_is_not_empty`, `hostile_keys_are_held`), with the database's time and no attempts
///   (`records_are_fresh`). Ids need not be unique (`ids_need_not_be_unique`).
/// - Under [`Ordering::Sequenced`] each key **MUST** count its messages from 1, without gaps, in the order of commits
///   (`sequence_has_no_gaps`, `sequence_counts_by_topic`, `sequence_survives_rollback`, `sequence_is_commit_order`);
///   nothing else has a number (`keyless_have_no_sequence`), and none is given twice (`sequence_goes_on_after_death`).
/// - A shard **MUST** have at most one owner; ownership, epochs and expiry are decided by the database's clock
///   (`lease_is_exclusive`, `lease_expires`, `lease_renews`, `lease_release_frees`, `release_needs_epoch`,
///   `lease_tells_time_left`). Taking a shard, also one's own after it expired or was released, **MUST** raise its
///   epoch (`epoch_grows_with_owner`). A relay gets what it wants, if it is free, and gives up only what it releases;
///   members are counted until they leave or expire (`lease_takes_what_is_wanted`, `lease_gives_nothing_up`,
///   `want_zero_only_joins`, `leases_can_be_shared`, `membership_expires`).
/// - [`settle`](Self::settle) **MUST** change nothing for a shard whose epoch is no longer held, not even when the
///   take-over happens meanwhile, and everything or nothing for each other shard (`settle_is_fenced`,
///   `settle_is_fenced_after_expiry`, `settle_needs_owner`, `settle_excludes_take_over`,
///   `settle_is_partial_across_shards`). It removes what it names, by shard, position and id, and nothing else
///   (`settle_removes_delivered`, `settle_takes_any_subset`, `settle_matches_position_and_id`). Repeating a settlement
///   **MUST** change nothing more, and what is not there (any more) is no error (`settle_repeats`,
///   `settle_of_nothing`, `settlements_run_side_by_side`).
/// - A hold **MUST** be kept until it is replaced or cleared, whoever asks, with its attempts as they were put and
///   the time that is left by the database's clock (`hold_is_durable`, `hold_put_replaces`, `hold_clear_removes`,
///   `hold_clears_with_delivery`, `hold_due_runs_down`, `holds_are_of_asked_shards`, `keyless_holds_stand_apart`).
/// - [`stats`](Self::stats) **MUST** tell what is so (`stats_count_backlog`, `stats_tell_age`, `stats_count_holds`,
///   `stats_tell_leases`), and a hint may come or not but **MUST NOT** hold anybody up (`wake_up_can_be_dropped`).
/// - No method works row by row; each has a bounded number of round trips, whatever the size of the batch.
///
/// # Cancel safety
/// Every future **MUST** be safe to drop at any point: no transaction stays open, no connection returns to a pool
/// in the middle of one, and what was done is done wholly or not at all. The scenario
/// `dropped_calls_do_no_harm` tries it.
///
/// # Errors
/// [`crate::ErrorKind`] decides what the relay does: retryable kinds are retried with backoff; the others as well,
/// but loudly, because a relay that stops delivers nothing.
///
/// # Example
/// What a relay does, once round. A complete store is in the facade's `examples/2_custom_store.rs`, and the one line
/// that proves it in its `tests/custom_store.rs`.
///
/// ```
/// # use std::time::Duration;
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// use outbox_core::{FetchRequest, Fetched, LeaseRequest, MemoryStore, Message, OutboxStore, RelayId};
/// use outbox_core::{Settlement, ShardSettlement};
///
/// # let store = MemoryStore::default();
/// # let mut tx = store.begin();
/// # store.enqueue(&mut tx, &Message::builder("orders").build()?).await?;
/// # tx.commit();
/// let relay = RelayId::unique("relay");
/// let lease = LeaseRequest { relay: relay.clone(), want: 8, ttl: Duration::from_secs(10) };
/// let shards = store.lease(&lease).await?.held;
/// let request = FetchRequest { shards: shards.clone(), max_rows: 100, max_bytes: 1 << 20, ..FetchRequest::default() };
/// let Fetched::Batch { records, .. } = store.reader().await?.fetch(&request).await? else { panic!("reset") };
///
/// let owned = shards.iter().find(|owned| owned.shard == records[0].shard).expect("it was asked for");
/// let mut part = ShardSettlement::new(owned.shard, owned.epoch);
/// part.delivered.push(records[0].reference());
/// let settled = store.settle(&Settlement { relay, shards: vec![part] }).await?;
/// assert!(settled.lost.is_empty() && store.pending().is_empty());
/// # Ok(()) }
/// ```
#[async_trait]
pub trait OutboxStore: Send + Sync + fmt::Debug + 'static {
    /// What this store, as it is configured, can hold and do. Constant for the store's lifetime.
    fn capabilities(&self) -> Capabilities;

    /// Renews the relay's membership and the leases it still holds, and takes free or expired shards until it has
    /// [`LeaseRequest::want`]. Never takes a shard away from a live owner, nor gives one up: see `release`.
    async fn lease(&self, request: &LeaseRequest) -> Result<Leases>;

    /// Frees shards that are held under exactly these epochs, and ends the membership when `membership` says so.
    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()>;

    /// The holds of these shards.
    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>>;

    /// A new reader, with a connection of its own and no memory.
    async fn reader(&self) -> Result<Box<dyn Reader>>;

    /// Records what became of messages, fenced; says which shards were no longer held and thus left unchanged.
    async fn settle(&self, settlement: &Settlement) -> Result<Settled>;

    /// The state of the outbox, for people and metrics. Cheap: it may estimate.
    async fn stats(&self) -> Result<Stats>;

    /// Dead letters, if the store keeps them. Without them a message that cannot be delivered parks its key.
    fn dead_letters(&self) -> Option<&dyn DeadLetters>;

    /// Scheduled delivery, if the store has it.
    fn scheduled(&self) -> Option<&dyn Scheduled>;

    /// The archive of delivered messages, if the store is configured to keep them.
    fn retention(&self) -> Option<&dyn Retention>;

    /// Parked keys and topics as operators see them, if the store lets them be resumed.
    fn parking(&self) -> Option<&dyn Parking>;

    /// The facts about a message, a key or a topic, if the store can look them up.
    fn inspection(&self) -> Option<&dyn Inspection>;

    /// A hint that there may be work, if the store has one cheaper than polling.
    fn wake_up(&self) -> Option<Box<dyn WakeUp>>;
}

/// Reads batches of undelivered messages of owned shards. Owns its connection and, if it has one, its cursor.
///
/// The relay throws a reader away on any error and asks the store for a new one.
///
/// # Contract
/// - **C1** Of each (topic, key), as of one snapshot, the records returned **MUST** be the lowest undelivered visible
///   ones that are not in flight, in order of position. A key may be left out wholly for now, as long as something
///   of it is in flight or others are returned (`fetch_orders_within_key`, `fetch_orders_across_fetches`,
///   `producers_beside_relay`, `random_schedules`, `late_commit_with_successor`, `late_commit_without_successor`,
///   `commit_below_the_newest`, `fresh_store_loses_nothing`, `rolled_back_gaps_stay_empty`,
///   `commits_in_reverse_lose_nothing`).
/// - **C2** It **MUST NOT** return what is in flight, held, or of a shard that was not asked for
///   (`fetch_leaves_out_in_flight`, `fetch_leaves_out_other_shards`, `hold_stops_key`, `hold_stops_key_of_topic_only`,
///   `hold_stops_topic`, `hold_stops_message_alone`, `keyless_flow_beside_holds`, `order_survives_retry`).
/// - **C3** Order between keys is free, but nothing starves: whatever arrives later, and however many records are
///   held, a record is returned within a number of fetches bounded by the eligible records at its commit
///   (`nothing_starves`, `held_key_lets_others_flow`).
/// - **C4** An empty batch with `more == false` **MUST** mean that nothing was eligible in that snapshot, keys with
///   something in flight aside (`empty_batch_means_nothing`).
/// - **C5** A cursor is for speed only: in memory, per shard **and epoch**, so that it restarts for a shard that was
///   lost and regained, even between two fetches. Where it passed over what was held it goes back as soon as that is
///   not held any more, below the position of a reread, too: only the reader knows what it passed over
///   (`regained_shard_restarts`, `regained_shard_goes_on`, `reader_can_be_replaced`, `take_over_rereads`,
///   `passed_over_comes_back`, `dropped_calls_do_no_harm`). What is wanted again comes again
///   (`reread_key`, `reread_message`, `reread_shard`).
/// - **C6** `in_flight` is what was read and is not known to be settled; the request's view is the one that counts
///   (`unknown_settlement_stays_out`).
/// - **C7** Memory **MUST NOT** grow with the backlog.
/// - **C8** When the server's identity changed or its numbers went back, it answers [`Fetched::Reset`].
/// - At most `max_rows` records; at most `max_bytes` bytes, except that the first record always passes
///   (`fetch_keeps_row_limit`, `fetch_keeps_byte_limit`).
///
/// The simple reader is correct by construction: *undelivered rows of my shards, not in flight, not held, oldest
/// first, limit n, in one statement*. It ignores `reread`. A faster one keeps the same contract.
///
/// # Cancel safety
/// A reader whose fetch was dropped half-way is thrown away like one that failed.
///
/// # Example
/// ```
/// # #[derive(Debug)] struct Rows(Vec<outbox_core::Record>);
/// use async_trait::async_trait;
/// use outbox_core::{FetchRequest, Fetched, Reader, Result};
///
/// /// Reads rows in memory, in order of position; the limit in bytes is left out for brevity.
/// #[async_trait]
/// impl Reader for Rows {
///     async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
///         let mut rows = self.0.iter().filter(|row| {
///             let (message, key) = (&row.message, row.message.order_key());
///             request.admits(row.shard, row.position, &message.topic().into(), key.as_ref())
///         });
///         let records = rows.by_ref().take(request.max_rows).cloned().collect();
///         Ok(Fetched::Batch { records, more: rows.next().is_some() })
///     }
/// }
/// ```
#[async_trait]
pub trait Reader: Send + fmt::Debug {
    /// Reads the next batch.
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched>;
}

/// How messages of one key are ordered; chosen when the schema is made.
///
/// ```
/// use outbox_core::{MemoryConfig, MemoryStore, Ordering};
///
/// let config = MemoryConfig { ordering: Ordering::Sequenced, ..MemoryConfig::default() };
/// let store = MemoryStore::new(config);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ordering {
    /// Insert order, which is commit order when the producer locks its aggregate first.
    #[default]
    Insert,
    /// Commit order by construction, with a number per key without gaps, sent as the header `outbox-key-seq`.
    Sequenced,
}

/// What a store can hold and do. The conformance suite holds it to its word.
///
/// ```
/// use outbox_core::{MemoryStore, OutboxStore};
///
/// let can = MemoryStore::default().capabilities();
/// assert!(can.keys && can.any_bytes && can.fixed_topic.is_none());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// A name for people: `sqlite`, `postgres`.
    pub name: &'static str,
    /// How many shards, at least 1. Fixed when the schema is made.
    pub shards: u16,
    /// The order within a key.
    pub ordering: Ordering,
    /// Whether messages may have keys. Without keys there is no order.
    pub keys: bool,
    /// Whether any topic can be stored, or only this one.
    pub fixed_topic: Option<Arc<str>>,
    /// Whether headers are stored.
    pub headers: bool,
    /// Whether content types are stored.
    pub content_types: bool,
    /// Whether a message without a payload stays apart from one with an empty payload.
    pub tombstones: bool,
    /// Whether payloads, keys and header values are kept byte for byte. Otherwise payloads must be JSON and are kept as
    /// values, whose text may be written anew, and the rest must be text.
    pub any_bytes: bool,
    /// Whether the producer's message ids are stored, or ids are derived from positions.
    pub message_ids: bool,
}

impl Capabilities {
    /// Those of a store that keeps all that there is to keep.
    ///
    /// ```
    /// use outbox_core::{Capabilities, MemoryStore, Ordering, OutboxStore};
    ///
    /// let can = MemoryStore::default().capabilities();
    /// assert_eq!(can, Capabilities::all("memory", can.shards, Ordering::Insert));
    /// ```
    #[must_use]
    pub const fn all(name: &'static str, shards: u16, ordering: Ordering) -> Self {
        Self {
            name,
            shards,
            ordering,
            keys: true,
            fixed_topic: None,
            headers: true,
            content_types: true,
            tombstones: true,
            any_bytes: true,
            message_ids: true,
        }
    }
}

/// A count that may be cheaper than exact.
///
/// ```
/// use outbox_core::Count;
///
/// assert_eq!(Count::AtLeast(10_000).to_string(), "≥ 10000");
/// assert_eq!(Count::About(512).value(), 512);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", content = "value", rename_all = "snake_case")]
pub enum Count {
    /// Counted.
    Exact(u64),
    /// Counted up to a bound: there are at least so many.
    AtLeast(u64),
    /// Estimated.
    About(u64),
}

impl Count {
    /// Of rows that were counted up to a bound.
    ///
    /// ```
    /// use outbox_core::Count;
    ///
    /// assert_eq!(Count::up_to(100, 7), Count::Exact(7));
    /// assert_eq!(Count::up_to(100, 100), Count::AtLeast(100));
    /// ```
    #[must_use]
    pub const fn up_to(bound: u64, rows: u64) -> Self {
        if rows < bound {
            Self::Exact(rows)
        } else {
            Self::AtLeast(rows)
        }
    }

    /// Of what was found by looking, at all that there is or not.
    ///
    /// ```
    /// use outbox_core::Count;
    ///
    /// assert_eq!(Count::found(7, true), Count::Exact(7));
    /// assert_eq!(Count::found(7, false), Count::AtLeast(7));
    /// ```
    #[must_use]
    pub const fn found(matching: u64, complete: bool) -> Self {
        if complete {
            Self::Exact(matching)
        } else {
            Self::AtLeast(matching)
        }
    }

    /// The number, however sure.
    #[must_use]
    pub const fn value(self) -> u64 {
        match self {
            Self::Exact(value) | Self::AtLeast(value) | Self::About(value) => value,
        }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(value) => write!(f, "{value}"),
            Self::AtLeast(value) => write!(f, "≥ {value}"),
            Self::About(value) => write!(f, "≈ {value}"),
        }
    }
}

/// The state of an outbox.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// use outbox_core::{MemoryStore, OutboxStore};
///
/// let stats = MemoryStore::default().stats().await?;
/// assert_eq!((stats.backlog.value(), stats.dead, stats.oldest_age), (0, 0, None));
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Undelivered messages, those held included, dead and scheduled ones not.
    pub backlog: Count,
    /// The age of the oldest of them.
    pub oldest_age: Option<Duration>,
    /// Keys, keyless messages and topics that wait for a retry.
    pub retrying: u64,
    /// Keys, keyless messages and topics that wait for an operator.
    pub parked: u64,
    /// Dead letters.
    pub dead: u64,
    /// Messages not yet due.
    pub scheduled: u64,
    /// Delivered messages kept in the archive.
    pub processed: Count,
    /// Each shard's lease.
    pub leases: Vec<LeaseStatus>,
    /// Relays whose membership has not expired.
    pub relays: Vec<RelayId>,
}

/// One shard's lease as people see it.
///
/// ```
/// use outbox_core::Stats;
///
/// fn orphans(stats: &Stats) -> usize {
///     stats.leases.iter().filter(|lease| lease.owner.is_none()).count()
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeaseStatus {
    /// The shard.
    pub shard: Shard,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its owner, when the lease has not expired.
    pub owner: Option<RelayId>,
    /// How long the lease still runs.
    pub time_left: Duration,
}
