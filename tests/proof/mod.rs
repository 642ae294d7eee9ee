//! The end-to-end proof: what a writer did is compared with what arrived.
//!
//! A writer says to a log what it is about to commit and what became of it; a reader takes everything out of the
//! topic; the oracle, which is pure, compares the two. Anybody can prove an outbox of their own with it: bring a
//! [`writer::Producer`] for the database and fill in an [`oracle::Run`].
//!
//! The letters are those of the oracle's report:
//!
//! | | law |
//! |---|---|
//! | I1 | no loss: what was committed arrived, or is a dead letter |
//! | I2 | no phantom: what was rolled back did not arrive, and what arrived is what was written, byte for byte |
//! | I3 | order: of each key no record comes before its predecessor has |
//! | I4 | repeats: none without a fault, and few after one |
//! | I5 | effects: through the inbox each message counts once |
//! | I6 | liveness: in the end nothing waits and nobody owns anything |
//! | I7 | resources: connections, memory and files of the relays are as they were, and no transaction stood open idle |
//!
//! A commit without an answer is unknown to the writer, not to the database: whoever can ask it afterwards says so with
//! [`writer::resolve`], and then the laws hold for those messages as for all others.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

pub(crate) mod oracle;
pub(crate) mod report;
pub(crate) mod stamp;
mod walk;
pub(crate) mod writer;
