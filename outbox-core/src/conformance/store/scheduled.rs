//! Scheduled delivery: not before its time, in order, fenced.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, LONG, Relay, SHORT, eventually, sorted, texts};
use crate::error::ErrorKind;
use crate::lease::Membership;
use crate::message::Message;
use crate::scheduled::{Promotion, Scheduled};
use crate::store::OutboxStore;

/// A message that is not due is neither fetched nor promoted; once due it is promoted, then fetched.
pub async fn scheduled_waits<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let start = Instant::now();
    let due = bench.database_now(&mut owner).await + SHORT;
    bench
        .commit(&[at(&bench, "a", "planned", due), bench.keyed("a", "now")])
        .await;
    let promotion = promote(&owner, 10).await;
    if start.elapsed() < SHORT - SHORT / 4 {
        assert_eq!(
            promotion.promoted, 0,
            "it is not due yet, by the database's clock"
        );
        assert!(
            promotion
                .next_in
                .is_some_and(|next| !next.is_zero() && next <= SHORT),
            "the time until the next one is due must be told: {promotion:?}"
        );
        assert_eq!(
            texts(&owner.drain().await),
            ["now"],
            "what is not due must not be fetched, and must not hold its key up"
        );
    }
    eventually!(
        promote(&owner, 10).await.promoted == 1,
        "a message that has become due must be promoted"
    );
    assert!(
        start.elapsed() >= SHORT - Duration::from_millis(50),
        "it was promoted {:?} after it was planned for in {SHORT:?}",
        start.elapsed()
    );
    assert!(
        texts(&owner.drain().await).contains(&"planned".to_owned()),
        "what was promoted must be fetched"
    );
    assert_eq!(
        promote(&owner, 10).await,
        Promotion::default(),
        "nothing is planned any more: nothing to promote, nothing next"
    );
}

/// Of messages that are due together those with the earlier time come first.
pub async fn scheduled_in_order<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let due = bench.database_now(&mut owner).await + SHORT;
    let times = [4_u64, 1, 3, 5, 2];
    for number in times {
        let time = due + Duration::from_millis(10 * number);
        bench.commit(&[at(&bench, "a", &format!("{number}"), time)]).await;
    }
    tokio::time::sleep(SHORT + Duration::from_millis(200)).await;
    let mut promoted = 0;
    eventually!(
        {
            promoted += promote(&owner, 2).await.promoted;
            promoted == times.len()
        },
        "only {promoted} of {} due messages were promoted",
        times.len()
    );
    assert_eq!(
        texts(&owner.drain().await),
        ["1", "2", "3", "4", "5"],
        "positions are given at promotion, in the order of the times"
    );
}

/// A relay that lost a shard promotes nothing of it, and is told.
pub async fn scheduled_is_fenced<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut old = bench.owner("old").await;
    let due = bench.database_now(&mut old).await + Duration::from_secs(1);
    bench.commit(&[at(&bench, "a", "planned", due)]).await;
    let stale = old.owned.clone();
    old.release_all(Membership::Stays).await;
    let mut new = bench.owner("new").await;
    let until = Instant::now() + Duration::from_millis(1_500);
    while Instant::now() < until {
        let promotion = power(&*old.store).promote(&old.id, &stale, 10).await.unwrap();
        assert_eq!(
            (promotion.promoted, promotion.lost.len()),
            (0, stale.len()),
            "a relay whose epochs are over must promote nothing, and every shard is lost"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(new.next(10).await.is_empty(), "nothing may have been promoted");
    eventually!(
        promote(&new, 10).await.promoted == 1,
        "the owner must be able to promote it"
    );
    assert_eq!(texts(&new.drain().await), ["planned"]);
}

/// A promotion moves at most as many as it is told, and says that more is due now.
pub async fn scheduled_keeps_limit<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let due = bench.database_now(&mut owner).await + Duration::from_secs(1);
    let messages: Vec<_> = (0..5)
        .map(|number| at(&bench, &format!("key-{number}"), &format!("{number}"), due))
        .collect();
    bench.commit(&messages).await;
    eventually!(
        bench.store.stats().await.unwrap().scheduled == 5,
        "what is not promoted counts as scheduled"
    );
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    let first = promote(&owner, 2).await;
    assert_eq!(first.promoted, 2, "five are due, two were asked for");
    assert_eq!(
        first.next_in,
        Some(Duration::ZERO),
        "three more are due now: the time until the next is zero"
    );
    assert_eq!(promote(&owner, 10).await.promoted, 3, "the rest is due");
    assert_eq!(sorted(&owner.drain().await), ["0", "1", "2", "3", "4"]);
}

/// A time that has passed is no time: the message goes at once.
pub async fn scheduled_in_the_past_goes_at_once<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let now = bench.database_now(&mut owner).await;
    bench.commit(&[at(&bench, "a", "past", now - LONG)]).await;
    let mut seen = owner.drain().await;
    // A store may leave it to the next promotion.
    eventually!(
        {
            promote(&owner, 10).await;
            seen.extend(owner.drain().await);
            !seen.is_empty()
        },
        "what is due already must come"
    );
    assert_eq!(texts(&seen), ["past"], "what is due already must come");
}

/// What is planned in a transaction that is rolled back never comes.
pub async fn scheduled_rolls_back<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let due = bench.database_now(&mut owner).await + Duration::from_millis(200);
    let tx = bench.open(&[at(&bench, "a", "planned", due)]).await;
    bench.harness.rollback(tx).await;
    assert_eq!(bench.store.stats().await.unwrap().scheduled, 0);
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(promote(&owner, 10).await.promoted, 0, "it was rolled back");
    assert!(owner.next(10).await.is_empty());
}

/// A store without scheduled delivery refuses a message that is not to go yet.
pub async fn scheduled_is_refused_without<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut tx = bench.harness.begin().await;
    let message = at(&bench, "a", "planned", SystemTime::now() + LONG);
    let refused = bench.harness.enqueue(&mut tx, &[message]).await;
    assert_eq!(
        refused.map_err(|error| error.kind()),
        Err(ErrorKind::Unsupported),
        "a store without scheduled delivery must refuse what is not to go yet: neither send it early nor keep it"
    );
    bench.harness.rollback(tx).await;
}

fn at<H: StoreHarness>(bench: &Bench<H>, key: &str, text: &str, time: SystemTime) -> Message {
    let mut parts = bench.keyed(key, text).into_parts();
    parts.deliver_at = Some(time);
    Message::from_stored(parts)
}

fn power(store: &dyn OutboxStore) -> &dyn Scheduled {
    store
        .scheduled()
        .unwrap_or_else(|| panic!("whether a store has scheduled delivery must not change"))
}

/// Promotes what is due of an owner's shards.
fn promote(owner: &Relay, limit: usize) -> impl Future<Output = Promotion> + Send + use<> {
    let (store, id, owned) = (owner.store.clone(), owner.id.clone(), owner.owned.clone());
    async move { power(&*store).promote(&id, &owned, limit).await.unwrap() }
}
