//! What people are told.

use std::time::Duration;

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, LONG, eventually, hold, retrying};
use crate::hold::{Hold, HoldScope, HoldState};
use crate::lease::Membership;
use crate::store::Count;

/// The backlog counts what is undelivered, in flight or held, and nothing else.
pub async fn stats_count_backlog<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let backlog = async |expected: u64| {
        let stats = bench.store.stats().await.unwrap();
        match stats.backlog {
            Count::Exact(backlog) => assert_eq!(backlog, expected, "the backlog is what is undelivered"),
            Count::AtLeast(backlog) => assert!(
                backlog <= expected && (backlog == 0) == (expected == 0),
                "there are {expected} undelivered messages, not at least {backlog}"
            ),
            Count::About(_) => {}
        }
    };
    backlog(0).await;
    bench.commit(&bench.series("a", 5)).await;
    let tx = bench.open(&[bench.keyed("b", "gone")]).await;
    bench.harness.rollback(tx).await;
    backlog(5).await;
    let records = owner.next(2).await;
    backlog(5).await;
    owner.hold(retrying(&records[0], 1)).await;
    backlog(5).await;
    owner.deliver(&records[..1]).await;
    backlog(4).await;
    let stats = bench.store.stats().await.unwrap();
    assert_eq!((stats.dead, stats.scheduled), (0, 0));
    if bench.store.dead_letters().is_some() && records.len() > 1 {
        owner.settle(owner.plan().dead(&records[1], 1, "poison")).await;
        backlog(3).await;
        assert_eq!(
            bench.store.stats().await.unwrap().dead,
            1,
            "dead letters are counted apart"
        );
    }
}

/// The oldest age is that of the oldest undelivered message, and none when there is none.
pub async fn stats_tell_age<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let age = async || bench.store.stats().await.unwrap().oldest_age;
    assert_eq!(age().await, None, "nothing is undelivered, so nothing is old");
    bench.commit(&[bench.keyed("a", "1")]).await;
    let second = Duration::from_secs(1);
    eventually!(
        age().await.is_some_and(|age| age >= second),
        "an undelivered message must grow older, by the database's clock"
    );
    owner.drain().await;
    assert_eq!(age().await, None, "what is delivered counts no more");
    bench.commit(&[bench.keyed("a", "2")]).await;
    let fresh = age().await;
    assert!(
        fresh.is_some_and(|age| age < Duration::from_secs(30)),
        "a message that was just enqueued is not {fresh:?} old"
    );
}

/// Holds are counted by their state.
pub async fn stats_count_holds<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench
        .commit(&[bench.keyed("a", "1"), bench.keyed("b", "2"), bench.keyless("3")])
        .await;
    let records = owner.drain_without_settling().await;
    owner.hold(retrying(&records[0], 1)).await;
    owner.hold(hold(&records[1], 1, HoldState::Parked)).await;
    owner.hold(retrying(&records[2], 1)).await;
    let topic = Hold {
        scope: HoldScope::Topic(bench.topic(0)),
        ..hold(&records[0], 1, HoldState::Parked)
    };
    owner.hold(topic.clone()).await;
    let stats = bench.store.stats().await.unwrap();
    assert_eq!(
        (stats.retrying, stats.parked),
        (2, 2),
        "two wait for a retry, two for an operator"
    );
    owner.unhold(&topic).await;
    let stats = bench.store.stats().await.unwrap();
    assert_eq!(
        (stats.retrying, stats.parked),
        (2, 1),
        "what is cleared counts no more"
    );
}

/// Leases and members are told as they are.
pub async fn stats_tell_leases<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let mut idle = bench.relay("idle").await;
    idle.lease(0, LONG).await;
    let stats = bench.store.stats().await.unwrap();
    assert_eq!(
        stats.leases.len(),
        usize::from(bench.can.shards),
        "each shard has a lease"
    );
    for lease in &stats.leases {
        assert_eq!(lease.owner.as_ref(), Some(&owner.id), "a shard's owner is told");
        assert!(
            owner
                .owned
                .iter()
                .any(|owned| (owned.shard, owned.epoch) == (lease.shard, lease.epoch)),
            "a shard's epoch is told: {lease:?}"
        );
        assert!(lease.time_left <= LONG && lease.time_left > LONG / 2, "{lease:?}");
    }
    let mut relays = stats.relays;
    relays.sort_unstable();
    assert_eq!(
        relays,
        [idle.id.clone(), owner.id.clone()],
        "both members are told"
    );
    idle.release_all(Membership::Leaves).await;
    owner.release_all(Membership::Leaves).await;
    let stats = bench.store.stats().await.unwrap();
    assert!(stats.relays.is_empty(), "who left is no member");
    assert!(
        stats
            .leases
            .iter()
            .all(|lease| lease.owner.is_none() && lease.time_left.is_zero()),
        "free shards have no owner: {:?}",
        stats.leases
    );
}
