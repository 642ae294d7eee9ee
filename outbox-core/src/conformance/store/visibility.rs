//! What becomes visible when: with the commit, not before, and however late it comes.

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, of_key, sorted, texts};
use crate::error::ErrorKind;

/// What was committed is fetched.
pub async fn commit_makes_visible<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    assert!(
        owner.next(10).await.is_empty(),
        "a fresh store must be empty: does each scenario get a store of its own?"
    );
    bench
        .commit(&[bench.keyed("a", "1"), bench.keyed("b", "2"), bench.keyless("3")])
        .await;
    assert_eq!(
        sorted(&owner.drain().await),
        ["1", "2", "3"],
        "every message of a committed transaction must be fetched, once"
    );
}

/// What is not committed is not fetched.
pub async fn nothing_visible_before_commit<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let tx = bench.open(&[bench.keyed("a", "1"), bench.keyless("2")]).await;
    assert!(
        owner.next(10).await.is_empty(),
        "the transaction is open, and its messages are fetched: enqueue must write in the caller's transaction"
    );
    bench.harness.commit(tx).await;
    assert_eq!(
        sorted(&owner.drain().await),
        ["1", "2"],
        "what was not visible before the commit must be fetched after it"
    );
}

/// What was rolled back is never fetched.
pub async fn rollback_leaves_nothing<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let tx = bench.open(&[bench.keyed("a", "1"), bench.keyless("2")]).await;
    bench.harness.rollback(tx).await;
    assert!(
        owner.next(10).await.is_empty(),
        "the transaction was rolled back, and its messages are fetched"
    );
    bench.commit(&[bench.keyed("a", "3")]).await;
    assert_eq!(
        texts(&owner.drain().await),
        ["3"],
        "a rollback must harm nothing that comes after it"
    );
}

/// Messages of one transaction keep their order, in one call and over several.
pub async fn transaction_keeps_order<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let messages = bench.series("a", 40);
    let mut tx = bench.open(&messages[..20]).await;
    for message in &messages[20..] {
        bench
            .harness
            .enqueue(&mut tx, std::slice::from_ref(message))
            .await
            .unwrap();
    }
    bench.harness.commit(tx).await;
    let drained = owner.drain().await;
    if bench.can.keys {
        assert_eq!(
            texts(&drained),
            messages.iter().map(super::super::kit::text).collect::<Vec<_>>(),
            "messages of one key must come in the order in which they were enqueued"
        );
    } else {
        assert_eq!(drained.len(), messages.len(), "each message must come once");
    }
}

/// A call that is refused writes nothing, and its transaction can go on.
pub async fn refused_call_writes_nothing<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let mut tx = bench.open(&[bench.keyless("before")]).await;
    let huge = bench.keyless(&"x".repeat(2_000_000));
    let refused = bench
        .harness
        .enqueue(&mut tx, &[bench.keyless("beside"), huge, bench.keyless("beside")])
        .await;
    let expected = match refused {
        // A store without limits may take it.
        Ok(()) => 5,
        Err(error) => {
            assert_eq!(
                error.kind(),
                ErrorKind::Invalid,
                "a message beyond the limits must be refused as invalid, so that the producer can react: {error}"
            );
            2
        }
    };
    bench
        .harness
        .enqueue(&mut tx, &[bench.keyless("after")])
        .await
        .unwrap();
    bench.harness.commit(tx).await;
    assert_eq!(
        owner.drain().await.len(),
        expected,
        "a refused call must write nothing, and what was enqueued before and after it must be there"
    );
}

/// A message that commits late, with its key's next one already waiting behind it, comes before that one.
pub async fn late_commit_with_successor<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    // The producer has locked its aggregate: nobody else enqueues for the key until it commits.
    let late = bench.open(&[bench.keyed("late", "late1")]).await;
    let others: Vec<_> = bench
        .neighbours("late", 8)
        .iter()
        .map(|key| bench.keyed(key, "other"))
        .collect();
    bench.commit(&others).await;
    assert_eq!(
        owner.drain().await.len(),
        8,
        "others must flow past an open transaction"
    );
    bench.harness.commit(late).await;
    bench.commit(&[bench.keyed("late", "late2")]).await;
    assert_eq!(
        of_key(&owner.drain().await, "late"),
        ["late1", "late2"],
        "a message whose transaction commits late has a low position: a cursor that has passed it loses it"
    );
}

/// A message that commits late and is the last of its key is fetched all the same.
pub async fn late_commit_without_successor<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let late = bench.open(&[bench.keyed("late", "late")]).await;
    for key in bench.neighbours("late", 5) {
        bench.commit(&[bench.keyed(&key, "other")]).await;
        assert_eq!(
            owner.drain().await.len(),
            1,
            "others must flow past an open transaction"
        );
    }
    assert!(owner.next(10).await.is_empty(), "nothing else is committed yet");
    bench.harness.commit(late).await;
    assert_eq!(
        texts(&owner.drain().await),
        ["late"],
        "nothing ever follows this message: only a reader that comes back for late commits finds it"
    );
}

/// Of two transactions the one that began first commits first, but draws the higher position.
pub async fn commit_below_the_newest<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.keyed("warm", "warm")]).await;
    assert_eq!(owner.drain().await.len(), 1);
    let near = bench.neighbours("second", 1).swap_remove(0);
    let mut first = bench.harness.begin().await;
    let second = bench.open(&[bench.keyed("second", "second")]).await;
    bench
        .harness
        .enqueue(&mut first, &[bench.keyed(&near, "first")])
        .await
        .unwrap();
    bench.harness.commit(first).await;
    assert_eq!(texts(&owner.drain().await), ["first"]);
    bench.harness.commit(second).await;
    assert_eq!(
        texts(&owner.drain().await),
        ["second"],
        "the newest completed transaction is no bound: a newer one may hold a lower position"
    );
}

/// The very first position of a store may commit late, too.
pub async fn fresh_store_loses_nothing<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let first = bench.open(&[bench.keyed("first", "first")]).await;
    assert!(owner.next(10).await.is_empty());
    let near = bench.neighbours("first", 1).swap_remove(0);
    bench.commit(&[bench.keyed(&near, "second")]).await;
    assert_eq!(texts(&owner.drain().await), ["second"]);
    bench.harness.commit(first).await;
    assert_eq!(
        texts(&owner.drain().await),
        ["first"],
        "a reader that saw the store before its first message must not begin above it"
    );
}

/// Positions of transactions that were rolled back are gaps, which stay empty and hold nobody up.
pub async fn rolled_back_gaps_stay_empty<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    for round in 0..10 {
        let gone = bench
            .open(&[bench.keyed("gone", "gone"), bench.keyless("gone")])
            .await;
        let kept = bench.open(&[bench.keyed("kept", &format!("kept{round}"))]).await;
        if round % 2 == 0 {
            bench.harness.rollback(gone).await;
            bench.harness.commit(kept).await;
        } else {
            bench.harness.commit(kept).await;
            bench.harness.rollback(gone).await;
        }
        assert_eq!(
            texts(&owner.drain().await),
            [format!("kept{round}")],
            "what was committed must flow beside what is rolled back, and nothing else"
        );
    }
}

/// Many transactions that commit in the reverse order of their positions lose nothing.
pub async fn commits_in_reverse_lose_nothing<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let mut open = Vec::new();
    for number in 0..16 {
        let key = format!("key-{number}");
        open.push((bench.open(&[bench.keyed(&key, &key)]).await, key));
    }
    while let Some((tx, key)) = open.pop() {
        bench.harness.commit(tx).await;
        assert_eq!(
            texts(&owner.drain().await),
            [key],
            "each commit must be fetched, whatever was fetched above its position"
        );
    }
}
