//! The simulation: real relays in a world of which everything is drawn from one seed.
//!
//! Relays, producers, a database and a destination run in one thread, on a clock that stands still whenever anybody works
//! and jumps when all wait. Transactions become visible late, and as one of the real databases shows them; answers are
//! lost, requests arrive when whoever sent them is gone; relays are killed, stand still for longer than their leases and go
//! on, or have clocks that jump; the destination refuses messages and topics, loses acknowledgements, goes down and
//! breaks. Then everything heals, and the world is judged:
//!
//! | | law |
//! |---|---|
//! | I1 | no loss: what was committed arrived, or is a dead letter |
//! | I2 | no phantom: nothing arrived that was not committed by then, and what arrived is what was written, byte for byte |
//! | I3 | order: of each key nothing came before its predecessor had |
//! | I4 | repeats: none without a fault, and never more than what a relay has in its hands |
//! | I6 | liveness: in the end nothing waits, and nobody owns anything |
//! | I7 | resources: no task outlives its relay |
//!
//! The same seed gives the same world, down to the last event: see [`Summary::trace`]. Here is one, and what it came to:
//!
//! ```
//! let summary = outbox_core::sim::Simulation::new(42).run()?;
//! assert!(summary.arrived > 0);
//! # Ok::<(), outbox_core::sim::Violation>(())
//! ```
//!
//! [`Simulation::run_on`] has a store of yours in the place of the database: one in memory, as a server's answers come
//! when they come and no seed brings them back.

mod ledger;
mod line;
mod process;
mod producer;
mod reader;
mod server;
mod sink;
mod stage;
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use self::server::Server;
use self::stage::Stage;
use crate::conformance::StoreHarness;

/// One world, of one seed.
///
/// ```
/// use outbox_core::sim::Simulation;
///
/// // Without faults nothing arrives twice.
/// let summary = Simulation::new(7).calm().run()?;
/// assert_eq!((summary.duplicates, summary.faults.len()), (0, 0));
/// # Ok::<(), outbox_core::sim::Violation>(())
/// ```
#[derive(Debug, Clone, Copy)]
#[must_use = "a simulation does nothing until it is run"]
pub struct Simulation {
    seed: u64,
    calm: bool,
    traced: bool,
}

/// What became of a world in which every law held.
///
/// ```
/// use outbox_core::sim::Simulation;
///
/// let summary = Simulation::new(1).run()?;
/// assert!(summary.committed <= summary.arrived + summary.dead);
/// # Ok::<(), outbox_core::sim::Violation>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Summary {
    /// The seed.
    pub seed: u64,
    /// A hash of everything that happened, in its order.
    pub trace: u64,
    /// How the store shows what is committed.
    pub visibility: &'static str,
    /// Messages that were committed.
    pub committed: u64,
    /// Messages that arrived, each time counted.
    pub arrived: u64,
    /// Of those, the ones that had arrived before.
    pub duplicates: u64,
    /// Dead letters.
    pub dead: u64,
    /// What went wrong, and how often.
    pub faults: BTreeMap<&'static str, u64>,
    /// How long it took by the world's clock, in milliseconds.
    pub millis: u64,
    /// What happened, line by line, when it was asked for: see [`Simulation::traced`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<String>,
}

/// A law that was broken.
///
/// ```
/// use outbox_core::sim::{Simulation, Violation};
///
/// fn report(violation: &Violation) {
///     eprintln!("{violation}"); // says how to see it again
///     for line in Simulation::new(violation.seed).traced().run().err().iter().flat_map(|again| &again.lines) {
///         eprintln!("{line}");
///     }
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Violation {
    /// The seed.
    pub seed: u64,
    /// Which law: `I1` and so on.
    pub law: &'static str,
    /// What was found.
    pub what: String,
    /// With what it is seen again.
    pub again: String,
    /// What had happened, line by line, when it was asked for: see [`Simulation::traced`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            seed,
            law,
            what,
            again,
            ..
        } = self;
        write!(f, "seed {seed} breaks {law}: {what}; see it again with: {again}")
    }
}

impl std::error::Error for Violation {}

/// What the wall clocks of a simulated world show in the beginning.
const DAWN: Duration = Duration::from_secs(1_800_000_000);

impl Simulation {
    /// The world of this seed, in which things go wrong.
    pub const fn new(seed: u64) -> Self {
        Self {
            seed,
            calm: false,
            traced: false,
        }
    }

    /// Nothing goes wrong.
    pub const fn calm(mut self) -> Self {
        self.calm = true;
        self
    }

    /// Writes down what happens, which takes longer.
    pub const fn traced(mut self) -> Self {
        self.traced = true;
        self
    }

    /// Runs it. Not from within an asynchronous runtime: it has one of its own.
    ///
    /// # Errors
    /// The first law that was broken.
    pub fn run(self) -> Result<Summary, Violation> {
        self.play(async {
            let dawn = SystemTime::UNIX_EPOCH + DAWN;
            let stage = Arc::new(Stage::new(self, dawn));
            let server = Server::new(Arc::clone(&stage), dawn);
            let again = format!(
                "outbox simulate --seed {}{} --trace",
                self.seed,
                if self.calm { " --calm" } else { "" }
            );
            (stage, server.visibility(), again, server)
        })
    }

    /// Runs it on a store of yours, which must work within one thread and take its time from tokio. Not from within an
    /// asynchronous runtime.
    ///
    /// ```
    /// use outbox_core::conformance::StoreHarness;
    /// use outbox_core::conformance::broken::{BrokenStore, StoreFlaw, with_store_flaw};
    /// use outbox_core::sim::Simulation;
    ///
    /// // One that settles all that it sees is soon found out.
    /// let fresh = || with_store_flaw(StoreFlaw::NaiveMark, BrokenStore::fresh());
    /// assert!((0..100).any(|seed| Simulation::new(seed).run_on(fresh).is_err()));
    /// ```
    ///
    /// # Errors
    /// The first law that was broken.
    pub fn run_on<H: StoreHarness, F: Future<Output = H>>(
        self,
        fresh: impl FnOnce() -> F,
    ) -> Result<Summary, Violation> {
        self.play(async {
            let harness = fresh().await;
            // The store's clock is as old as the world.
            let stage = Arc::new(Stage::new(self, SystemTime::now()));
            (
                stage,
                "its own",
                format!("Simulation::new({}) on this store", self.seed),
                harness,
            )
        })
    }

    fn play<H: StoreHarness>(
        self,
        begin: impl Future<Output = (Arc<Stage>, &'static str, String, H)>,
    ) -> Result<Summary, Violation> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build();
        let runtime = runtime.map_err(|error| Violation {
            seed: self.seed,
            law: "I0",
            what: format!("there is no runtime to be had: {error}"),
            again: "a machine that has more to give".to_owned(),
            lines: Vec::new(),
        })?;
        runtime.block_on(async {
            let (stage, visibility, again, harness) = begin.await;
            world::play(Arc::new(harness), &stage, visibility, again).await
        })
    }
}

#[cfg(test)]
mod tests;
