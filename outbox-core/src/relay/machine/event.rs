//! What the machine is told, what it wants done, and what it wants known.

use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::fetch::{FetchRequest, Fetched, Record};
use crate::hold::Hold;
use crate::lease::{Leases, Membership};
use crate::scheduled::Promotion;
use crate::settle::{Settled, Settlement};
use crate::shard::{OwnedShard, Shard};
use crate::sink::{Outcome, Reason};

/// Numbers the batches handed to the sink.
pub(crate) type BatchId = u64;

/// Something that happened. Each answers a [`Command`], but for `Wake` and `Shutdown`.
#[derive(Debug)]
pub(crate) enum Event {
    /// The leases were renewed, or not. `sent` is when the request left: time is counted from there.
    Leased {
        sent: Duration,
        result: Result<Leases, Error>,
    },
    /// Shards were released, or not.
    Released { result: Result<(), Error> },
    /// The holds of shards were read, or not.
    HoldsLoaded { result: Result<Vec<Hold>, Error> },
    /// The reader answered; after an error it is gone.
    Fetched { result: Result<Fetched, Error> },
    /// The sink took the batch and would take another.
    Accepted { batch: BatchId },
    /// The outcome of each record of a batch, in order; none when the sink never took it over wholly.
    Outcomes {
        batch: BatchId,
        outcomes: Option<Vec<Outcome>>,
    },
    /// The sink dropped what it had; all outcomes have been or will be told.
    Purged,
    /// The sink was rebuilt, or not.
    Rebuilt { result: Result<(), Error> },
    /// The destination answered, or not.
    Probed { result: Result<(), Error> },
    /// The settlement was committed, or its result is not known.
    Settled { result: Result<Settled, Error> },
    /// Due messages were promoted, or not.
    Promoted { result: Result<Promotion, Error> },
    /// There may be work.
    Wake,
    /// Stop: hand nothing more over, wait for what the sink has, settle, release.
    Shutdown,
}

/// Something to do. At most one of each kind is under way, but for `Publish`, whose receipts may be open.
#[derive(Debug)]
pub(crate) enum Command {
    /// Renew; have `want` shards in all.
    Lease { want: u16 },
    /// Give shards up.
    Release {
        shards: Vec<OwnedShard>,
        membership: Membership,
    },
    /// Read the holds of these shards.
    LoadHolds { shards: Vec<OwnedShard> },
    /// Read, with a new reader when there is none.
    Fetch { request: Arc<FetchRequest> },
    /// Hand over.
    Publish { batch: BatchId, records: Vec<Record> },
    /// Give up an unfinished hand-over and drop all that the sink has.
    Purge,
    /// Rebuild the sink.
    Rebuild,
    /// Ask whether the destination is there.
    Probe,
    /// Write back.
    Settle { settlement: Arc<Settlement> },
    /// Promote due messages.
    Promote { shards: Vec<OwnedShard> },
}

/// Something that people and metrics should know. The machine itself neither logs nor counts.
#[derive(Debug, Clone)]
pub(crate) enum Note {
    /// A shard is now owned.
    ShardGained(OwnedShard),
    /// A shard is no longer owned: released, expired or taken.
    ShardLost { shard: Shard, why: &'static str },
    /// A settlement, or part of it, was refused because the epoch had changed.
    Fenced(Shard),
    /// A batch was handed over.
    Published { records: usize },
    /// A message was delivered; how long after its enqueueing is known to the driver.
    Outcome {
        topic: Arc<str>,
        class: &'static str,
        count: u64,
    },
    /// A message will be tried again.
    Retrying {
        what: String,
        attempts: u32,
        pause: Duration,
        reason: Reason,
    },
    /// A message was given up.
    Dead {
        what: String,
        attempts: u32,
        reason: Reason,
    },
    /// A key or keyless message waits for an operator.
    Parked {
        what: String,
        attempts: u32,
        reason: Reason,
    },
    /// A topic is held.
    TopicHeld {
        topic: Arc<str>,
        pause: Duration,
        reason: Reason,
    },
    /// A topic flows again.
    TopicFlows { topic: Arc<str> },
    /// Nothing can go through the sink.
    SinkDown { reason: Reason, pause: Duration },
    /// The sink takes messages again.
    SinkUp,
    /// The reader said that the server is another one.
    Reset { reason: String },
    /// A call of the store failed and will be repeated.
    StoreFailed {
        operation: &'static str,
        error: Arc<Error>,
        pause: Duration,
    },
    /// The store or the sink broke its contract; nothing was lost, but someone should know.
    ContractBroken { who: &'static str, what: &'static str },
}
