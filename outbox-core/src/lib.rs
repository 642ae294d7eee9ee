#![doc = include_str!("../README.md")]

mod clock;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod cursor;
mod database;
mod dead;
mod enqueue;
mod error;
mod explain;
mod fetch;
mod headers;
mod hold;
pub mod human;
mod identifier;
mod inbox;
mod inspect;
mod lease;
mod lend;
mod memory;
mod message;
pub mod metrics;
mod relay;
mod retention;
mod scheduled;
mod settle;
mod shard;
#[cfg(feature = "sim")]
pub mod sim;
mod sink;
mod store;
mod stored;
mod wake;

pub use clock::{Clock, MonotonicClock};
pub use database::{Migrated, Role, check_store, is_loopback};
pub use dead::{DeadLetter, DeadLetterQuery, DeadLetters};
pub use enqueue::Enqueue;
pub use error::{Error, ErrorKind, Result};
pub use explain::{Cause, Explained, Explanation, explain};
pub use fetch::{FetchMode, FetchRequest, Fetched, Held, Record, RecordRef, Reread, RereadScope};
pub use headers::Headers;
pub use hold::{Hold, HoldChange, HoldChanges, HoldName, HoldRef, HoldScope, HoldState, Parking};
pub use identifier::Identifier;
pub use inbox::{Inbox, MIN_INBOX_AGE, Receive, check_age};
pub use inspect::{Facts, Inspection, MAX_PLACES, Place, Standing, Subject};
pub use lease::{LeaseRequest, LeaseRow, LeaseTable, Leases, Membership, RelayId, StoreMillis, millis};
pub use lend::{Lender, Lent, within};
pub use memory::{MemoryConfig, MemoryFault, MemoryInbox, MemorySink, MemoryStore, MemoryTransaction};
pub use message::{
    Limits, MAX_KEY_BYTES, MAX_TOPIC_LENGTH, Message, MessageBuilder, MessageId, OrderKey, Parts,
    RESERVED_HEADER_PREFIX, check_topic, is_reserved_header,
};
pub use relay::{Backoff, Health, OnFailure, Relay, RelayConfig, Vitals};
pub use retention::Retention;
pub use scheduled::{Promotion, Scheduled};
pub use settle::{Death, Settled, Settlement, ShardSettlement};
pub use shard::{Epoch, OwnedShard, Position, Shard, shard_of};
pub use sink::{Outcome, Reason, Receipt, Sink, SinkCapabilities};
pub use store::{Capabilities, Count, LeaseStatus, Ordering, OutboxStore, Reader, Stats};
pub use stored::{StoredMessage, StoredMessages};
pub use wake::{WakeUp, Waker};
