//! Settling: fenced, all or nothing a shard, exact, repeatable.

use std::sync::Arc;
use std::time::Duration;

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, LONG, Plan, Relay, SHORT, eventually, retrying, sorted, text, texts};
use crate::fetch::{Record, RecordRef};
use crate::lease::Membership;
use crate::settle::Settlement;
use crate::shard::Position;
use crate::store::OutboxStore;

/// What was settled as delivered is gone, for every reader.
pub async fn settle_removes_delivered<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.keyed("a", "1"), bench.keyless("2")]).await;
    let records = owner.drain_without_settling().await;
    assert_eq!(records.len(), 2);
    // Committed after the read: it must not go with them.
    bench.commit(&[bench.keyed("a", "3"), bench.keyless("4")]).await;
    owner.deliver(&records).await;
    owner.reader = owner.store.reader().await.unwrap();
    assert_eq!(
        sorted(&owner.drain().await),
        ["3", "4"],
        "a settlement must remove exactly what it names: neither leave it nor take what came after the read"
    );
}

/// Any subset of a batch can be settled; the rest stays.
pub async fn settle_takes_any_subset<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let messages: Vec<_> = (0..6).map(|number| bench.keyless(&format!("{number}"))).collect();
    bench.commit(&messages).await;
    let records = owner.drain_without_settling().await;
    let (some, others): (Vec<_>, Vec<_>) = records
        .into_iter()
        .partition(|record| ["1", "4"].contains(&text(&record.message).as_str()));
    owner.deliver(&some).await;
    owner.in_flight.clear();
    owner.reader = owner.store.reader().await.unwrap();
    assert_eq!(
        sorted(&owner.drain().await),
        sorted(&others),
        "a settlement must remove exactly what it names"
    );
}

/// After a take-over the old owner's settlement changes nothing and says so.
pub async fn settle_is_fenced<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut old = bench.owner("old").await;
    bench
        .commit(&[bench.keyed("a", "1"), bench.keyed("b", "2"), bench.keyless("3")])
        .await;
    let records = old.drain_without_settling().await;
    let stale = stale_plan(&bench, &old, &records);
    old.release_all(Membership::Stays).await;
    let mut new = bench.owner("new").await;
    expect_nothing_changed(&old.store, &mut new, stale, "another relay owns the shards").await;

    // The same relay, but a later epoch: it may have read something else meanwhile.
    let records = new.in_flight.clone();
    let stale = stale_plan(&bench, &new, &records);
    new.release_all(Membership::Stays).await;
    new.lease_all(LONG).await;
    let handle = bench.harness.store();
    expect_nothing_changed(&handle, &mut new, stale, "the epoch is over").await;
}

/// The same when the lease ended by itself and another relay has taken it.
pub async fn settle_is_fenced_after_expiry<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut old = bench.relay("old").await;
    bench
        .commit(&[bench.keyed("a", "1"), bench.keyed("b", "2"), bench.keyless("3")])
        .await;
    old.lease_all(SHORT).await;
    let records = old.drain_without_settling().await;
    let stale = stale_plan(&bench, &old, &records);
    let mut new = bench.relay("new").await;
    eventually!(
        new.lease_all(LONG).await.held.len() == usize::from(bench.can.shards),
        "a lease that is not renewed must end"
    );
    expect_nothing_changed(&old.store, &mut new, stale, "the lease ended and was taken").await;
}

/// A shard that was lost stays as it is; the others of the same settlement are settled.
pub async fn settle_is_partial_across_shards<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut old = bench.owner("old").await;
    let (records, one, _) = bench.on_two_shards(&mut old).await;
    let lost: Vec<_> = old
        .owned
        .iter()
        .copied()
        .filter(|owned| owned.shard == one.shard)
        .collect();
    let plan = records
        .iter()
        .fold(old.plan(), |plan, record| plan.delivered(record));
    old.store
        .release(&old.id, &lost, Membership::Stays)
        .await
        .unwrap();
    let mut new = bench.relay("new").await;
    new.lease_all(LONG).await;
    let settled = old.store.settle(&plan.settlement()).await.unwrap();
    assert_eq!(
        settled.lost,
        [one.shard],
        "exactly the shards whose epoch is no longer held must be returned as lost"
    );
    let of_lost: Vec<Record> = records
        .iter()
        .filter(|record| record.shard == one.shard)
        .cloned()
        .collect();
    assert_eq!(
        sorted(&new.drain().await),
        sorted(&of_lost),
        "a lost shard must stay unchanged"
    );
    old.release_all(Membership::Leaves).await;
    let mut last = bench.relay("last").await;
    last.lease_all(LONG).await;
    assert!(
        last.next(10).await.is_empty(),
        "the shards that were held must be settled all the same"
    );
}

/// Knowing an epoch is not owning the shard.
pub async fn settle_needs_owner<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.keyed("a", "1")]).await;
    let records = owner.next(1).await;
    let mut stranger = bench.relay("stranger").await;
    stranger.lease_all(LONG).await;
    let forged = Settlement {
        relay: stranger.id.clone(),
        ..plan_delivered(&owner, &records).settlement()
    };
    let settled = stranger.store.settle(&forged).await.unwrap();
    assert_eq!(
        settled.lost,
        [records[0].shard],
        "the epoch is right, the relay is not"
    );
    owner.in_flight.clear();
    owner.reader = owner.store.reader().await.unwrap();
    assert_eq!(
        texts(&owner.drain().await),
        ["1"],
        "a stranger's settlement must change nothing"
    );
}

/// Repeating a settlement changes nothing more, whatever came in between.
pub async fn settle_repeats<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench
        .commit(&[bench.keyed("a", "1"), bench.keyed("b", "2"), bench.keyless("3")])
        .await;
    let records = owner.drain_without_settling().await;
    let deaths = owner.store.dead_letters().is_some();
    let mut plan = owner.plan().delivered(&records[0]).put(retrying(&records[2], 2));
    plan = match deaths {
        true => plan.dead(&records[1], 1, "poison"),
        false => plan.delivered(&records[1]),
    };
    let settlement = plan.settlement();
    for round in 0..3 {
        let settled = owner.store.settle(&settlement).await.unwrap();
        assert!(
            settled.lost.is_empty(),
            "repeating a settlement of owned shards must succeed"
        );
        let holds = owner.holds().await;
        assert_eq!(
            holds.iter().map(|hold| hold.attempts).collect::<Vec<_>>(),
            [2],
            "a repeated settlement must leave the one hold as it is"
        );
        if let Some(dead) = owner.store.dead_letters() {
            let letters = dead.list(&crate::dead::DeadLetterQuery::default()).await.unwrap();
            assert_eq!(
                letters.len(),
                1,
                "a repeated settlement must not bury a message twice"
            );
        }
        bench.commit(&[bench.keyed("a", &format!("new {round}"))]).await;
    }
    owner.reader = owner.store.reader().await.unwrap();
    owner.in_flight.clear();
    let held = texts(&records[2..]).swap_remove(0);
    assert_eq!(
        sorted(&owner.drain().await),
        [held.as_str(), "new 0", "new 1", "new 2"],
        "a repeated settlement must not touch what was enqueued meanwhile"
    );
}

/// A message is settled when shard, position and id are all its own.
pub async fn settle_matches_position_and_id<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 2)).await;
    let records = owner.drain_without_settling().await;
    let [one, two] = [records[0].clone(), records[1].clone()];
    let mut wrong = vec![
        ("another message's id", one.position, two.message.id(), one.shard),
        (
            "another position",
            Position(one.position.0 + 1_000_000),
            one.message.id(),
            one.shard,
        ),
    ];
    if let Some(other) = owner.owned.iter().find(|owned| owned.shard != one.shard) {
        wrong.push(("another shard", one.position, one.message.id(), other.shard));
    }
    for (what, position, id, shard) in wrong {
        let mut settlement = owner
            .plan()
            .delivered(&Record { shard, ..one.clone() })
            .settlement();
        settlement.shards[0].delivered = vec![RecordRef { position, id }];
        let settled = owner.store.settle(&settlement).await.unwrap();
        assert!(
            settled.lost.is_empty(),
            "what does not match is not an error, it is settled already"
        );
        owner.in_flight.clear();
        owner.reader = owner.store.reader().await.unwrap();
        let left = owner.drain_without_settling().await;
        assert_eq!(
            left.len(),
            2,
            "a settlement under {what} removed a message: match shard, position and id"
        );
    }
}

/// A settlement and a take-over at the same time: either the settlement is first, or it is lost.
pub async fn settle_excludes_take_over<H: StoreHarness>() {
    const ROUNDS: u64 = 40;
    let bench = Bench::<H>::fresh().await;
    let handle = bench.harness.store();
    for round in 0..ROUNDS {
        let mut old = bench.owner(&format!("old-{round}")).await;
        bench.commit(&bench.series("a", 3)).await;
        let records = old.drain_without_settling().await;
        let settlement = plan_delivered(&old, &records).settlement();
        let mut new = bench.relay(&format!("new-{round}")).await;
        let settle = async {
            tokio::time::sleep(Duration::from_micros((round % 5) * 300)).await;
            old.store.settle(&settlement).await.unwrap()
        };
        let take_over = async {
            tokio::time::sleep(Duration::from_micros((round / 5) * 200)).await;
            handle
                .release(&old.id, &old.owned, Membership::Leaves)
                .await
                .unwrap();
            // A shard that is being settled may be passed over until that is done.
            while new.owned.len() < usize::from(bench.can.shards) {
                new.lease_all(LONG).await;
            }
            new.drain_without_settling().await
        };
        let (settled, found) = tokio::join!(settle, take_over);
        if settled.lost.is_empty() {
            assert!(
                found.is_empty(),
                "a settlement succeeded after its shard was taken over, in round {round}: the check of the epoch must \
                 exclude a take-over until the settlement is committed (lock the lease's row, or write it)"
            );
        } else {
            assert_eq!(
                found.len(),
                3,
                "a settlement said that its shard was lost, and changed it all the same"
            );
        }
        new.deliver(&found).await;
        new.release_all(Membership::Leaves).await;
    }
}

/// Settlements of one relay may run side by side.
pub async fn settlements_run_side_by_side<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let messages: Vec<_> = (0..40)
        .map(|number| bench.keyed(&format!("key-{number}"), &format!("{number}")))
        .collect();
    bench.commit(&messages).await;
    let records = owner.drain_without_settling().await;
    let handle = bench.harness.store();
    let parts: Vec<_> = records
        .chunks(10)
        .map(|part| plan_delivered(&owner, part).settlement())
        .collect();
    let settled = futures::future::join_all(parts.iter().map(|part| async {
        loop {
            match handle.settle(part).await {
                Ok(settled) => return settled,
                Err(error) => assert!(
                    error.is_retryable(),
                    "a race must end as a conflict, not as {error:?}"
                ),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }))
    .await;
    assert!(settled.iter().all(|settled| settled.lost.is_empty()));
    owner.in_flight.clear();
    owner.reader = owner.store.reader().await.unwrap();
    assert!(owner.next(10).await.is_empty(), "all four settlements must count");
}

/// A settlement of nothing is no error.
pub async fn settle_of_nothing<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let owner = bench.owner("owner").await;
    let settled = owner.store.settle(&owner.plan().settlement()).await.unwrap();
    assert!(settled.lost.is_empty());
}

/// A settlement of all kinds, to be refused as a whole.
fn stale_plan<H: StoreHarness>(bench: &Bench<H>, old: &Relay, records: &[Record]) -> Plan {
    let plan = old.plan().delivered(&records[0]).put(retrying(&records[2], 3));
    match bench.store.dead_letters() {
        Some(_) => plan.dead(&records[1], 1, "poison"),
        None => plan.delivered(&records[1]),
    }
}

async fn expect_nothing_changed(old: &Arc<dyn OutboxStore>, new: &mut Relay, stale: Plan, why: &str) {
    let settlement = stale.settlement();
    let mut settled = old.settle(&settlement).await.unwrap();
    settled.lost.sort_unstable();
    let shards: Vec<_> = settlement.shards.iter().map(|part| part.shard).collect();
    assert_eq!(
        settled.lost, shards,
        "{why}: every shard of the settlement must be returned as lost"
    );
    new.in_flight.clear();
    new.reader = new.store.reader().await.unwrap();
    assert_eq!(
        new.drain_without_settling().await.len(),
        3,
        "{why}: what the old owner settles must stay"
    );
    assert!(
        new.holds().await.is_empty(),
        "{why}: the old owner's hold must not be kept"
    );
    let stats = new.store.stats().await.unwrap();
    assert_eq!(stats.dead, 0, "{why}: the old owner's death must not be kept");
}

fn plan_delivered(relay: &Relay, records: &[Record]) -> Plan {
    records
        .iter()
        .fold(relay.plan(), |plan, record| plan.delivered(record))
}
