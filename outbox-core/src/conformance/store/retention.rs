//! The archive of delivered messages.

use std::time::Duration;

use tokio::time::Instant;

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, LONG, eventually};
use crate::retention::Retention;
use crate::store::{Count, OutboxStore};

/// What is delivered is archived with its settlement, once; what is refused or dead is not.
pub async fn retention_archives<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 3)).await;
    let records = owner.drain_without_settling().await;
    expect_processed(&*bench.store, 0).await;
    let plan = owner.plan().delivered(&records[0]).delivered(&records[1]);
    for _ in 0..2 {
        owner.settle(plan.clone()).await;
        expect_processed(&*bench.store, 2).await;
    }
    if bench.store.dead_letters().is_some() {
        owner.settle(owner.plan().dead(&records[2], 1, "poison")).await;
        expect_processed(&*bench.store, 2).await;
    }
}

/// A purge removes what is older than it is told, at most as much as it is told.
pub async fn retention_purges_old_only<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("old", 5)).await;
    owner.drain().await;
    let archive = power(&*bench.store);
    assert_eq!(
        archive.purge(LONG, 100).await.unwrap(),
        0,
        "nothing is an hour old"
    );
    tokio::time::sleep(Duration::from_secs(2)).await;
    let start = Instant::now();
    bench.commit(&bench.series("new", 2)).await;
    owner.drain().await;
    let age = Duration::from_millis(1_500);
    assert_eq!(
        archive.purge(age, 2).await.unwrap(),
        2,
        "five are old enough, two were asked for"
    );
    let rest = archive.purge(age, 100).await.unwrap();
    if start.elapsed() < age {
        assert_eq!(rest, 3, "three more are old enough, and two are too young");
        expect_processed(&*bench.store, 2).await;
    }
    let mut purged = 2 + rest;
    eventually!(
        {
            purged += archive.purge(Duration::from_millis(1), 100).await.unwrap();
            purged == 7
        },
        "in the end all seven are old enough; {purged} were purged"
    );
    expect_processed(&*bench.store, 0).await;
}

async fn expect_processed(store: &dyn OutboxStore, expected: u64) {
    if let Count::Exact(processed) = store.stats().await.unwrap().processed {
        assert_eq!(
            processed, expected,
            "the archive must hold what was delivered, each message once"
        );
    }
}

fn power(store: &dyn OutboxStore) -> &dyn Retention {
    store
        .retention()
        .unwrap_or_else(|| panic!("whether a store has an archive must not change"))
}
