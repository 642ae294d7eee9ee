//! What a scenario needs of an application's database.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use outbox::{MessageId, OutboxStore};
use tokio::runtime::Runtime;

use crate::proof::oracle::Arrived;
use crate::proof::writer::Producer;

/// An application's database: its own tables, the outbox and the inbox beside them. Dropping it takes it away.
pub(crate) trait Database: Sync {
    type Producer: Producer;

    /// Of how many messages one is written, unless the environment says otherwise: where the server is slow.
    const FEWER: u32 = 1;

    /// By how much leases, and pauses between kills, are longer than usual: where a server needs as long to answer.
    const SLOW: u32 = 1;

    /// One transaction of so many is held open for a while: seldom where all others have to wait.
    const HOLD_EACH: usize;

    /// What a relay's request has in it that settles messages and commits.
    #[allow(dead_code, reason = "for faults")]
    const COMMIT: &[u8] = b"COMMIT";

    /// How many connections a relay has open at most.
    const CONNECTIONS: usize;

    /// Makes an empty one, with what it needs in files in this folder.
    fn make(folder: &Path, runtime: &Runtime) -> Self;

    /// The part `[store]` of the relay's configuration.
    fn configuration(&self) -> String;

    /// The same, by way of another place than the server's, and readable there.
    fn configuration_by(&self, server: &str, place: &str) -> String {
        self.configuration().replace(server, place)
    }

    /// The store, to look at.
    fn store(&self) -> Box<dyn OutboxStore>;

    /// A producer with a connection of its own, called in the producer's own thread.
    fn producer(&self) -> Self::Producer;

    /// How many messages wait: counted, because a store may estimate.
    fn backlog(&self) -> u64;

    /// Which of these messages, of transactions whose commit had no answer, were committed: as the application's own
    /// tables tell it.
    fn committed(&self, unknown: &[MessageId]) -> BTreeSet<MessageId>;

    /// How many connections all relays together have open.
    fn connections(&self) -> usize;

    /// For how long at most a relay was seen to keep a transaction open and do nothing in it, and after
    /// which statement.
    fn idle_in_transaction(&self) -> (Duration, String);

    /// Does something while every settlement waits that has not yet looked at its lease. Renewals may wait as well,
    /// reading must not.
    ///
    /// With a server, what waits there goes on there afterwards, even if the relay that asked for it stands still: what
    /// is to be refused has to be held until its lease is over.
    fn hold_settlements(&self, work: impl FnOnce());

    /// A consumer with an inbox that handles [`interrupted`] batches and adds up the numbers of each key. Gives the sums.
    fn consume(&self, arrived: &[Arrived]) -> BTreeMap<String, u64>;
}

/// A database that is a server of the stage's own.
#[allow(dead_code, reason = "a file is none")]
pub(crate) trait Killable: Database {
    /// Ends it at once, as a crash does.
    fn kill(&self);

    /// Brings it back, with what was committed.
    fn restart(&self);
}

/// What a consumer handles in one transaction.
#[derive(Debug)]
pub(crate) struct Batch<'a> {
    pub(crate) records: &'a [Arrived],
    /// Whether it lives to commit.
    pub(crate) commit: bool,
}

/// A consumer's life: it reads the topic from the beginning twice, and is interrupted now and then in the middle of a
/// transaction.
pub(crate) fn interrupted(arrived: &[Arrived]) -> impl Iterator<Item = Batch<'_>> {
    let twice = arrived.chunks(100).chain(arrived.chunks(100));
    twice.flat_map(|records| {
        let interrupted = (fastrand::u8(0..10) == 0).then_some(&records[..records.len() / 2]);
        let batch = |(records, commit)| Batch { records, commit };
        interrupted
            .map(|half| (half, false))
            .into_iter()
            .chain([(records, true)])
            .map(batch)
    })
}
