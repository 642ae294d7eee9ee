use std::collections::BTreeMap;

use std::sync::Arc;

use async_trait::async_trait;

use super::server::{ServerTransaction, Visibility};
use super::*;
use crate::conformance::broken::{BrokenStore, StoreFlaw, with_store_flaw};
use crate::error::Result;
use crate::memory::MemoryStore;
use crate::message::Message;
use crate::store::OutboxStore;

/// `OUTBOX_SEED=n` replays one seed, `OUTBOX_SEEDS=n` runs so many.
fn seeds(usual: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    match number("OUTBOX_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("OUTBOX_SEEDS").unwrap_or(usual),
    }
}

#[test]
fn every_law_holds_whatever_happens() {
    let mut reached: BTreeMap<&'static str, u64> = BTreeMap::new();
    let seeds = seeds(10_000);
    let many = seeds.end - seeds.start > 100;
    for seed in seeds {
        match Simulation::new(seed).run() {
            Ok(summary) => {
                *reached.entry(summary.visibility).or_default() += 1;
                *reached.entry("duplicates").or_default() += summary.duplicates;
                *reached.entry("dead").or_default() += summary.dead;
                for (fault, times) in summary.faults {
                    *reached.entry(fault).or_default() += times;
                }
            }
            Err(violation) => {
                let again = Simulation::new(seed).traced().run().unwrap_err();
                println!("{}", again.lines.join("\n"));
                panic!("{violation}");
            }
        }
    }
    println!("{reached:#?}");
    if many {
        // A world that does not get there proves nothing.
        for what in [
            "rescan",
            "snapshots",
            "dirty reads",
            "one writer",
            "duplicates",
            "dead",
            "kill",
            "pause",
            "clock jump",
            "broker down",
            "store down",
            "store restarted",
            "topic blocked",
            "request lost",
            "answer lost",
            "request late",
            "poison",
            "retry",
            "unknown",
            "broken",
        ] {
            assert!(reached.get(what).is_some_and(|times| *times > 0), "never {what}");
        }
    }
}

/// Of 73748 the law was wrong: what a relay takes over and what it repeats for an answer that it lost are two repetitions.
#[test]
fn worlds_that_once_broke_a_law_keep_it() {
    for seed in [73_748, 108_479] {
        Simulation::new(seed).run().unwrap();
    }
}

#[test]
fn without_faults_nothing_arrives_twice() {
    for seed in seeds(100) {
        let summary = Simulation::new(seed).calm().run().unwrap();
        assert_eq!(summary.arrived, summary.committed, "seed {seed}");
    }
}

#[test]
fn a_seed_gives_the_same_world_each_time() {
    for seed in 0..50 {
        let once = Simulation::new(seed).traced().run().unwrap();
        let twice = Simulation::new(seed).traced().run().unwrap();
        for (one, other) in once.lines.iter().zip(&twice.lines) {
            assert_eq!(one, other, "seed {seed}");
        }
        assert_eq!(once, twice);
    }
}

/// The flaws that a world can show. What the others break, the conformance suite finds: a relay that keeps to the contract
/// does not come across it, or does no harm with it.
const FOUND: &[StoreFlaw] = &[
    StoreFlaw::PositionCursor,
    StoreFlaw::CursorToMaximum,
    StoreFlaw::TwoSnapshots,
    StoreFlaw::CursorSurvivesLoss,
    StoreFlaw::RereadIgnored,
    StoreFlaw::RowClaims,
    StoreFlaw::LargeRecordStuck,
    StoreFlaw::NaiveMark,
    StoreFlaw::RepeatRefused,
    StoreFlaw::LeaseNeverExpires,
    StoreFlaw::EpochStays,
    StoreFlaw::HoldsForgotten,
    StoreFlaw::KeylessHoldsShared,
    StoreFlaw::VisibleBeforeCommit,
    StoreFlaw::KeptOnRollback,
    StoreFlaw::Stranded,
    StoreFlaw::LossyUtf8,
    StoreFlaw::HeadersAsMap,
    StoreFlaw::EmptyIsNull,
    StoreFlaw::DeliverAtIgnored,
    StoreFlaw::GapOnRollback,
    StoreFlaw::PositionIsNumber,
    StoreFlaw::NumbersEverything,
    StoreFlaw::KeylessLost,
    StoreFlaw::ScheduledForgotten,
    StoreFlaw::ContentTypeLost,
    StoreFlaw::HeadersDropped,
];

#[test]
fn stores_that_are_broken_are_found_out() {
    for flaw in FOUND {
        let fresh = || with_store_flaw(*flaw, BrokenStore::fresh());
        let first = (0..1_000).find(|seed| Simulation::new(*seed).run_on(fresh).is_err());
        println!("{flaw:?}: {first:?}");
        assert!(first.is_some(), "{flaw:?} is not noticed");
    }
}

/// The simulated database is a store like any other, and proven like any other, in each way to show what is committed.
struct Proven<const VISIBILITY: usize>(Server);

#[async_trait]
impl<const VISIBILITY: usize> StoreHarness for Proven<VISIBILITY> {
    type Tx = ServerTransaction;

    async fn fresh() -> Self {
        let stage = Arc::new(Stage::new(Simulation::new(0).calm(), SystemTime::now()));
        Self(Server::like(
            stage,
            MemoryStore::default(),
            Visibility::ALL[VISIBILITY],
        ))
    }

    fn store(&self) -> Arc<dyn OutboxStore> {
        self.0.store()
    }

    async fn begin(&self) -> ServerTransaction {
        self.0.begin().await
    }

    async fn enqueue(&self, tx: &mut ServerTransaction, messages: &[Message]) -> Result<()> {
        self.0.enqueue(tx, messages).await
    }

    async fn commit(&self, tx: ServerTransaction) {
        self.0.commit(tx).await;
    }

    async fn rollback(&self, tx: ServerTransaction) {
        self.0.rollback(tx).await;
    }

    fn concurrent_transactions(&self) -> bool {
        self.0.concurrent_transactions()
    }
}

crate::store_conformance!(Proven<1>, snapshots, start_paused = true);
crate::store_conformance!(Proven<2>, dirty_reads, start_paused = true);
crate::store_conformance!(Proven<3>, one_writer, start_paused = true);
