//! Shards, epochs and positions: where a message stands and who may move it.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::message::MessageId;

/// The unit of ownership: `hash(key) mod N`, keyless messages by their id.
///
/// ```
/// use outbox_core::{MessageId, Shard, shard_of};
///
/// assert_eq!(shard_of(Some(b"42"), MessageId::new(), 64), Shard(52));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Shard(pub u16);

/// Counts the changes of a shard's owner; grows at each, and never goes back.
///
/// ```
/// use outbox_core::Epoch;
///
/// assert!(Epoch(8) > Epoch(7)); // the shard had another owner meanwhile
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub i64);

/// Where a store put a message: a 64-bit number per store, the order within a key.
///
/// ```
/// use outbox_core::Position;
///
/// assert!(Position::MIN < Position(1) && Position(1) < Position(2));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position(pub i64);

/// A shard and the epoch under which its owner holds it.
///
/// ```
/// use outbox_core::{Epoch, OwnedShard, Shard};
///
/// let owned = OwnedShard { shard: Shard(3), epoch: Epoch(7) };
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnedShard {
    /// The shard.
    pub shard: Shard,
    /// The epoch of the present ownership.
    pub epoch: Epoch,
}

/// The shard of a message: the first four bytes of the SHA-256 of its key as a big-endian number, modulo the number of
/// shards; of a keyless message the same of the 16 bytes of its id.
///
/// The same on every store and in plain SQL: `('x' || left(encode(sha256(key), 'hex'), 8))::bit(32)::bigint % 64`, or
/// `conv(left(sha2(key, 256), 8), 16, 10) % 64`. Not MD5, which would do as well: MySQL has it no more from 9.6 on, and
/// other servers may forbid it.
///
/// ```
/// use outbox_core::{MessageId, Shard, shard_of};
///
/// let id = MessageId::from_bytes([0; 16]);
/// assert_eq!(shard_of(Some(b"42"), id, 64), Shard(52));
/// assert_eq!(shard_of(Some(b""), id, 64), Shard(2));
/// assert_eq!(shard_of(None, id, 64), Shard(63));
/// assert_eq!(shard_of(Some(b"42"), id, 1), Shard(0));
/// ```
#[must_use]
pub fn shard_of(key: Option<&[u8]>, id: MessageId, shards: u16) -> Shard {
    if shards <= 1 {
        return Shard(0);
    }
    let digest = match key {
        Some(key) => Sha256::digest(key),
        None => Sha256::digest(id.as_bytes()),
    };
    let number = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
    Shard(u16::try_from(number % u32::from(shards)).unwrap_or_default())
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Position {
    /// Before every position.
    pub const MIN: Self = Self(i64::MIN);
    /// After every position.
    pub const MAX: Self = Self(i64::MAX);
}
