//! Numbers within a key: without gaps, in the order of commits.

use std::time::Duration;

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, Relay, order_key};
use crate::fetch::Record;

/// Under `Ordering::Sequenced` each key counts from 1 without a gap, in the order of positions.
pub async fn sequence_has_no_gaps<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let mut seen = Vec::new();
    for round in 0..5 {
        bench
            .commit(&[
                bench.keyed("a", &format!("a{round}")),
                bench.keyed("b", &format!("b{round}")),
                bench.keyed("a", &format!("a{round}+")),
            ])
            .await;
        // What is delivered counts on.
        if round % 2 == 0 {
            seen.extend(owner.drain().await);
        }
    }
    bench.commit(&bench.series("c", 6)).await;
    seen.extend(owner.drain().await);
    expect_numbers(&seen, "a", 1..=10);
    expect_numbers(&seen, "b", 1..=5);
    expect_numbers(&seen, "c", 1..=6);
}

/// Each topic has keys of its own.
pub async fn sequence_counts_by_topic<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    for topic in [0, 1, 0, 1] {
        bench.commit(&[bench.message(topic, Some("a"), "x")]).await;
    }
    let records = owner.drain().await;
    for topic in [bench.topic(0), bench.topic(1)] {
        let numbers: Vec<_> = records
            .iter()
            .filter(|record| order_key(record).topic == topic)
            .map(|record| record.key_seq)
            .collect();
        assert_eq!(
            numbers,
            [Some(1), Some(2)],
            "the same key of another topic counts by itself"
        );
    }
}

/// Numbers of transactions that were rolled back are given again.
pub async fn sequence_survives_rollback<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    for round in 0..4 {
        let gone = bench
            .open(&[bench.keyed("a", "gone"), bench.keyed("new", "gone")])
            .await;
        bench.harness.rollback(gone).await;
        bench.commit(&[bench.keyed("a", &format!("{round}"))]).await;
    }
    expect_numbers(&owner.drain().await, "a", 1..=4);
    bench.commit(&[bench.keyed("new", "first")]).await;
    expect_numbers(&owner.drain().await, "new", 1..=1);
}

/// Of two transactions on one key the second waits for the first: numbers, positions and commits are in one order.
pub async fn sequence_is_commit_order<H: StoreHarness>() {
    const PRODUCERS: usize = 4;
    const EACH: usize = 10;
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let produce = futures::future::join_all((0..PRODUCERS).map(|producer| {
        let bench = &bench;
        async move {
            let mut round = 0;
            while round < EACH {
                let mut tx = bench.harness.begin().await;
                // In one order, so that nobody waits in a circle; a store may still refuse one of them.
                let messages = [bench.keyed("a", "a"), bench.keyed("b", "b")];
                if let Err(error) = bench.harness.enqueue(&mut tx, &messages).await {
                    assert!(
                        error.is_retryable(),
                        "a race must end as a conflict, not as {error:?}"
                    );
                    bench.harness.rollback(tx).await;
                    continue;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
                if (round + producer) % 5 == 4 {
                    bench.harness.rollback(tx).await;
                } else {
                    bench.harness.commit(tx).await;
                }
                round += 1;
            }
        }
    }));
    let rolled_back = (0..PRODUCERS)
        .flat_map(|producer| (0..EACH).map(move |round| (round + producer) % 5 == 4))
        .filter(|gone| *gone)
        .count();
    let expected = 2 * (PRODUCERS * EACH - rolled_back);
    let relay = async {
        let mut seen = Vec::new();
        super::super::kit::eventually!(
            {
                seen.extend(take_some(&mut owner).await);
                seen.len() >= expected
            },
            "{} of {expected} messages came",
            seen.len()
        );
        seen
    };
    let (_, seen) = tokio::join!(produce, relay);
    let last = i64::try_from(expected / 2).unwrap_or_default();
    expect_numbers(&seen, "a", 1..=last);
    expect_numbers(&seen, "b", 1..=last);
}

/// Messages without a key have no number; without `Ordering::Sequenced` none has.
pub async fn keyless_have_no_sequence<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let sequenced = bench.can.ordering == crate::store::Ordering::Sequenced;
    bench
        .commit(&[
            bench.keyless("keyless"),
            bench.keyed("a", "keyed"),
            bench.keyless("keyless"),
        ])
        .await;
    for record in owner.drain().await {
        assert_eq!(
            record.key_seq.is_some(),
            sequenced && record.message.key().is_some(),
            "a number stands with messages that have a key, under Ordering::Sequenced: {record:?}"
        );
    }
}

/// The dead leave a hole; what comes later counts on.
pub async fn sequence_goes_on_after_death<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 3)).await;
    let records = owner.drain_without_settling().await;
    super::dead::bury(&mut owner, &records[1..2], 1, "poison").await;
    let requeued = super::dead::dead(&*bench.store)
        .requeue(&[records[1].reference()])
        .await
        .unwrap();
    assert_eq!(requeued, 1);
    bench.commit(&[bench.keyed("a", "a4")]).await;
    let later = owner.drain().await;
    assert_eq!(later.len(), 2);
    for record in later {
        assert!(
            record.key_seq.is_none_or(|number| number > 3),
            "a number is never given twice: what is requeued has a new one or none"
        );
    }
}

async fn take_some(owner: &mut Relay) -> Vec<Record> {
    let (records, _) = owner.fetch(7).await;
    owner.deliver(&records).await;
    records
}

fn expect_numbers(records: &[Record], key: &str, expected: std::ops::RangeInclusive<i64>) {
    let numbers: Vec<_> = records
        .iter()
        .filter(|record| record.message.key().is_some_and(|own| own == key.as_bytes()))
        .map(|record| record.key_seq)
        .collect();
    assert_eq!(
        numbers,
        expected.map(Some).collect::<Vec<_>>(),
        "key {key} must count without a gap, in the order of its records"
    );
}
