//! Leases: one owner a shard, by the database's clock.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, LONG, SHORT, eventually};
use crate::lease::{Membership, RelayId};
use crate::shard::OwnedShard;

/// While a relay holds a shard, no other gets it; of many that ask at once, one gets it.
pub async fn lease_is_exclusive<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut relays = Vec::new();
    for number in 0..6 {
        relays.push(bench.relay(&format!("relay-{number}")).await);
    }
    let all = futures::future::join_all(relays.iter_mut().map(|relay| relay.lease_all(LONG))).await;
    let held: Vec<OwnedShard> = all.into_iter().flat_map(|leases| leases.held).collect();
    let shards: BTreeSet<_> = held.iter().map(|owned| owned.shard).collect();
    assert_eq!(held.len(), shards.len(), "a shard has two owners: {held:?}");
    assert_eq!(
        shards.len(),
        usize::from(bench.can.shards),
        "six relays wanted all shards; each shard must have gone to one of them"
    );
    let mut late = bench.relay("late").await;
    assert!(
        late.lease_all(LONG).await.held.is_empty(),
        "a shard was taken from an owner whose lease has an hour to run: which clock decides?"
    );
}

/// A lease that is not renewed ends, by the database's clock, and not earlier.
pub async fn lease_expires<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut first = bench.relay("first").await;
    let mut second = bench.relay("second").await;
    let start = Instant::now();
    first.lease_all(SHORT).await;
    eventually!(
        second.lease_all(LONG).await.held.len() == usize::from(bench.can.shards),
        "a lease of {SHORT:?} that is not renewed must end, so that another relay can take the shards"
    );
    assert!(
        start.elapsed() >= SHORT - Duration::from_millis(50),
        "a lease of {SHORT:?} ended after {:?}",
        start.elapsed()
    );
    assert!(
        first.lease(0, SHORT).await.held.is_empty(),
        "an owner must be told that it lost its shards"
    );
}

/// A lease that is renewed goes on under its epoch.
pub async fn lease_renews<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.relay("owner").await;
    let held = owner.lease_all(SHORT).await.held;
    let mut other = bench.relay("other").await;
    let start = Instant::now();
    let mut renewed = start;
    while start.elapsed() < 2 * SHORT {
        tokio::time::sleep(SHORT / 8).await;
        let leases = owner.lease_all(SHORT).await;
        // A machine that stood still for so long proves nothing.
        if renewed.elapsed() < SHORT / 2 {
            assert_eq!(
                leases.held, held,
                "a lease that is renewed in time goes on under its epoch"
            );
        }
        renewed = Instant::now();
        let stolen = other.lease_all(SHORT).await;
        if renewed.elapsed() < SHORT / 2 && leases.held == held {
            assert!(stolen.held.is_empty(), "a lease that is renewed must not end");
        }
    }
}

/// Shards that are released are free at once.
pub async fn lease_release_frees<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut first = bench.owner("first").await;
    let mut second = bench.relay("second").await;
    first.release_all(Membership::Stays).await;
    let leases = second.lease_all(LONG).await;
    assert_eq!(
        leases.held.len(),
        usize::from(bench.can.shards),
        "released shards must be free at once"
    );
    assert_eq!(
        leases.relays, 2,
        "a relay that releases shards and stays is still a member"
    );
}

/// A release names the epochs that it gives up: others' and older ones stay as they are.
pub async fn release_needs_epoch<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let old = owner.owned.clone();
    owner.release_all(Membership::Stays).await;
    let new = owner.lease_all(LONG).await.held;
    owner
        .store
        .release(&owner.id, &old, Membership::Stays)
        .await
        .unwrap();
    let stranger = RelayId::new("stranger");
    owner
        .store
        .release(&stranger, &new, Membership::Leaves)
        .await
        .unwrap();
    let mut other = bench.relay("other").await;
    assert!(
        other.lease_all(LONG).await.held.is_empty(),
        "a release under an old epoch, or by another relay, must free nothing"
    );
    assert_eq!(
        owner.lease_all(LONG).await.held,
        new,
        "and its owner must not notice"
    );
}

/// Whoever takes a shard raises its epoch, also the owner of before.
pub async fn epoch_grows_with_owner<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut one = bench.relay("one").await;
    let mut two = bench.relay("two").await;
    let mut last = one.lease_all(LONG).await.held;
    one.release_all(Membership::Stays).await;
    for (step, relay) in [("another owner", &mut two), ("the first owner", &mut one)] {
        let held = relay.lease_all(LONG).await.held;
        assert!(
            grew(&last, &held),
            "{step} took free shards: each epoch must grow: {last:?}, {held:?}"
        );
        last = held;
        relay.release_all(Membership::Stays).await;
    }
    // The same owner, after its own release and after its own expiry.
    let held = one.lease_all(SHORT).await.held;
    assert!(
        grew(&last, &held),
        "the owner of before took its shards again: {last:?}, {held:?}"
    );
    last = held;
    eventually!(
        {
            tokio::time::sleep(SHORT + SHORT / 4).await;
            grew(&last, &one.lease_all(SHORT).await.held)
        },
        "an owner that comes back after its lease ended must get a new epoch: somebody may have owned it meanwhile"
    );
}

/// A relay gets as many shards as it wants, if so many are free, and never more.
pub async fn lease_takes_what_is_wanted<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut one = bench.relay("one").await;
    for want in 1..=bench.can.shards.min(5) {
        assert_eq!(
            one.lease(want, LONG).await.held.len(),
            usize::from(want),
            "`want` is how many shards the relay wants in all"
        );
    }
    let leases = one.lease(u16::MAX, LONG).await;
    assert_eq!(
        leases.held.len(),
        usize::from(bench.can.shards),
        "there are no more than all"
    );
    let distinct: BTreeSet<_> = leases.held.iter().map(|owned| owned.shard).collect();
    assert_eq!(distinct.len(), leases.held.len(), "each shard stands once");
}

/// A lease gives nothing up: a relay that wants fewer shards keeps them until it releases them.
pub async fn lease_gives_nothing_up<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let before = owner.owned.clone();
    for want in [1, 0] {
        assert_eq!(
            owner.lease(want, LONG).await.held,
            before,
            "a relay that wants less must release what it can, once nothing of it is in flight"
        );
    }
}

/// A relay that wants nothing becomes a member and takes nothing.
pub async fn want_zero_only_joins<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut shy = bench.relay("shy").await;
    let leases = shy.lease(0, LONG).await;
    assert!(leases.held.is_empty(), "whoever wants 0 shards must get none");
    assert_eq!(leases.relays, 1, "whoever asks counts itself");
    let mut other = bench.relay("other").await;
    let leases = other.lease_all(LONG).await;
    assert_eq!(leases.relays, 2, "a member without shards counts as a relay");
    assert_eq!(leases.held.len(), usize::from(bench.can.shards));
}

/// Relays that join and leave can share the shards fairly, by what the store tells them.
pub async fn leases_can_be_shared<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let shards = bench.can.shards;
    let mut one = bench.owner("one").await;
    let mut two = bench.relay("two").await;
    assert!(two.lease(0, LONG).await.held.is_empty());
    let relays = one.lease(shards, LONG).await.relays;
    assert_eq!(relays, 2, "the first must learn that a second is there");
    let share = shards.div_ceil(relays);
    let surplus = one.owned.split_off(usize::from(share));
    one.store
        .release(&one.id, &surplus, Membership::Stays)
        .await
        .unwrap();
    assert_eq!(
        two.lease(share, LONG).await.held.len(),
        surplus.len(),
        "what the first gave up, the second must get"
    );
    assert_eq!(one.lease(share, LONG).await.held.len(), usize::from(share));
    two.release_all(Membership::Leaves).await;
    let leases = one.lease(shards, LONG).await;
    assert_eq!(leases.relays, 1, "a relay that left must not count any more");
    assert_eq!(
        leases.held.len(),
        usize::from(shards),
        "what a relay that left had, the other must get"
    );
}

/// A relay that is silent for longer than its membership lasts does not count any more.
pub async fn membership_expires<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut silent = bench.relay("silent").await;
    silent.lease(0, SHORT).await;
    let mut other = bench.relay("other").await;
    eventually!(
        other.lease(1, LONG).await.relays == 1,
        "a relay that crashed must stop counting after its {SHORT:?}"
    );
}

/// The time left is what the leases still have, at most what was asked for.
pub async fn lease_tells_time_left<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.relay("owner").await;
    for ttl in [LONG, SHORT] {
        let left = owner.lease_all(ttl).await.time_left;
        assert!(
            left <= ttl && left > ttl / 2,
            "leases that were just renewed for {ttl:?} have {left:?} left"
        );
    }
}

/// Whether the same shards are held, each under a higher epoch.
fn grew(before: &[OwnedShard], after: &[OwnedShard]) -> bool {
    before.len() == after.len()
        && before.iter().all(|old| {
            after
                .iter()
                .any(|new| new.shard == old.shard && new.epoch > old.epoch)
        })
}
