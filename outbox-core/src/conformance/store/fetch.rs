//! What a fetch may return: limits, order, what stays out.

use std::time::Duration;

use tokio::time::Instant;

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, LONG, PATIENCE, numbered, of_key, sorted, texts};
use crate::fetch::Record;
use crate::lease::Membership;

/// A batch has at most `max_rows` records.
pub async fn fetch_keeps_row_limit<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 10)).await;
    let others: Vec<_> = (0..10)
        .map(|number| bench.keyed(&format!("other-{number}"), "other"))
        .collect();
    bench.commit(&others).await;
    let mut seen = 0;
    for limit in [1, 2, 3, 7, 100, 100] {
        let records = owner.next(limit).await;
        assert!(
            records.len() <= limit,
            "{} records came where at most {limit} were asked for",
            records.len()
        );
        seen += records.len();
        owner.deliver(&records).await;
    }
    assert_eq!(
        seen + owner.drain().await.len(),
        20,
        "what a limit cut off must come with later fetches"
    );
}

/// A batch has at most `max_bytes` bytes, but its first record always passes.
pub async fn fetch_keeps_byte_limit<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let body = "x".repeat(1_000);
    let messages: Vec<_> = (0..12)
        .map(|number| bench.keyed(&format!("key-{}", number % 4), &format!("{body}{number}")))
        .collect();
    bench.commit(&messages).await;
    owner.max_bytes = 2_600;
    let records = owner.next(100).await;
    let bytes: usize = records.iter().map(|record| record.message.size()).sum();
    assert!(
        (1..=2).contains(&records.len()) && bytes <= 2_600,
        "{} records of {bytes} bytes came where 2600 bytes allow two: cut the batch before the record that is too much",
        records.len()
    );
    owner.deliver(&records).await;
    owner.max_bytes = 1;
    let alone = owner.next(100).await;
    assert_eq!(
        alone.len(),
        1,
        "the first record must pass however large it is, or it stays for ever; and it must pass alone"
    );
    owner.deliver(&alone).await;
    assert_eq!(
        owner.drain().await.len(),
        12 - records.len() - 1,
        "what the limit cut off must come with later fetches"
    );
}

/// Within a batch, records of a key are in order.
pub async fn fetch_orders_within_key<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    interleaved(&bench, 5, 12).await;
    let records = owner.drain().await;
    for key in ["k0", "k1", "k2", "k3", "k4"] {
        assert_eq!(
            of_key(&records, key),
            numbered(key, 12),
            "a key's records must be in order"
        );
        let positions: Vec<_> = records
            .iter()
            .filter(|record| record.message.key().is_some_and(|own| own == key.as_bytes()))
            .map(|record| record.position)
            .collect();
        assert!(
            positions.is_sorted(),
            "within a key, positions must grow in the order of insertion: {positions:?}"
        );
    }
}

/// Batch after batch, with earlier ones in flight and with earlier ones settled, records of a key are in order.
pub async fn fetch_orders_across_fetches<H: StoreHarness>() {
    for settle_at_once in [true, false] {
        let bench = Bench::<H>::fresh().await;
        let mut owner = bench.owner("owner").await;
        interleaved(&bench, 5, 12).await;
        let mut seen: Vec<Record> = Vec::new();
        while seen.len() < 60 {
            let records = owner.next(3).await;
            if settle_at_once || records.is_empty() {
                // A reader may leave a key out while something of it is in flight.
                let in_flight = owner.in_flight.clone();
                assert!(
                    !in_flight.is_empty(),
                    "{} of 60 records came, and then nothing, though nothing is in flight",
                    seen.len()
                );
                owner.deliver(&in_flight).await;
            }
            seen.extend(records);
        }
        for key in ["k0", "k1", "k2", "k3", "k4"] {
            assert_eq!(
                of_key(&seen, key),
                numbered(key, 12),
                "each fetch must go on with the lowest of a key that is neither delivered nor in flight"
            );
        }
    }
}

/// What is in flight is not returned, not even by a reader that has never seen it.
pub async fn fetch_leaves_out_in_flight<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let messages: Vec<_> = (0..10)
        .map(|number| bench.keyless(&format!("{number}")))
        .collect();
    bench.commit(&messages).await;
    let first = owner.next(4).await;
    for fresh_reader in [false, true] {
        if fresh_reader {
            owner.reader = owner.store.reader().await.unwrap();
            // The others are wanted once more; the first ones stay in flight.
            owner.in_flight.clone_from(&first);
        }
        let mut rest = Vec::new();
        loop {
            let records = owner.next(4).await;
            if records.is_empty() {
                break;
            }
            rest.extend(records);
            assert!(
                rest.len() <= 10,
                "what is in flight must not be returned again: the request lists it"
            );
        }
        let mut all = texts(&first);
        all.extend(texts(&rest));
        all.sort_unstable();
        assert_eq!(
            all,
            (0..10).map(|number| number.to_string()).collect::<Vec<_>>(),
            "in flight and returned together must be everything, once"
        );
    }
}

/// Records of shards that were not asked for are not returned.
pub async fn fetch_leaves_out_other_shards<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut one = bench.relay("one").await;
    one.lease(bench.can.shards / 2, LONG).await;
    let mut two = bench.relay("two").await;
    two.lease_all(LONG).await;
    let messages: Vec<_> = (0..100)
        .map(|number| bench.keyed(&format!("key-{number}"), &format!("{number}")))
        .collect();
    bench.commit(&messages).await;
    let mut all = 0;
    for relay in [&mut one, &mut two] {
        let records = relay.drain().await;
        for record in &records {
            assert!(
                relay.owned.iter().any(|owned| owned.shard == record.shard),
                "a record of shard {} came, which was not asked for",
                record.shard
            );
        }
        all += records.len();
    }
    assert_eq!(
        all, 100,
        "two relays that own all shards between them must get everything, once"
    );
}

/// An empty batch without `more` means that nothing is eligible: whoever fetches one by one misses nothing.
pub async fn empty_batch_means_nothing<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    for round in 0..3 {
        interleaved(&bench, 3, 4).await;
        let keyless: Vec<_> = (0..5).map(|number| bench.keyless(&format!("{number}"))).collect();
        bench.commit(&keyless).await;
        assert_eq!(
            owner.drain_by(1).await.len(),
            17,
            "in round {round} an empty batch said that nothing is eligible, but something was"
        );
    }
}

/// A reader can be replaced at any time: a fresh one returns what is undelivered and not in flight.
pub async fn reader_can_be_replaced<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    interleaved(&bench, 3, 10).await;
    let delivered = owner.next(9).await;
    owner.deliver(&delivered).await;
    owner.next(6).await;
    // As after a crash: nothing is known of what was in flight.
    owner.in_flight.clear();
    owner.reader = owner.store.reader().await.unwrap();
    let mut seen = delivered;
    seen.extend(owner.drain_by(4).await);
    for key in ["k0", "k1", "k2"] {
        assert_eq!(
            of_key(&seen, key),
            numbered(key, 10),
            "a fresh reader must begin with the lowest undelivered record of each key"
        );
    }
}

/// A shard that was lost and regained between two fetches starts anew, under its new epoch.
pub async fn regained_shard_restarts<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 6)).await;
    bench.commit(&[bench.keyless("keyless")]).await;
    let before = owner.drain_without_settling().await;
    owner.release_all(Membership::Stays).await;
    owner.lease_all(LONG).await;
    let again = owner.drain().await;
    assert_eq!(
        sorted(&again),
        sorted(&before),
        "nothing was delivered and nothing is in flight under the new epoch: a cursor must be kept per shard and epoch"
    );
    assert!(
        !bench.can.keys || of_key(&again, "a") == numbered("a", 6),
        "and the order is the same"
    );
}

/// Another relay has delivered some of a shard meanwhile; its owner of before goes on where that one stopped.
pub async fn regained_shard_goes_on<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 6)).await;
    owner.drain_without_settling().await;
    owner.release_all(Membership::Stays).await;
    let mut other = bench.owner("other").await;
    let delivered = other.next(2).await;
    other.deliver(&delivered).await;
    bench.commit(&[bench.keyed("a", "a7")]).await;
    other.release_all(Membership::Leaves).await;
    owner.lease_all(LONG).await;
    let mut seen = texts(&delivered);
    seen.extend(texts(&owner.drain().await));
    seen.sort_unstable();
    assert_eq!(
        seen,
        numbered("a", 7),
        "between them the owners must get everything once: was a cursor kept over the loss of the shard?"
    );
}

/// A settlement of unknown outcome leaves its records in flight; repeating it does no harm.
pub async fn unknown_settlement_stays_out<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 3)).await;
    let records = owner.drain_without_settling().await;
    let plan = records
        .iter()
        .fold(owner.plan(), |plan, record| plan.delivered(record));
    // It was committed, but the answer got lost: what it settled counts as in flight.
    owner.store.settle(&plan.clone().settlement()).await.unwrap();
    bench.commit(&[bench.keyed("b", "b1")]).await;
    assert_eq!(
        texts(&owner.next(10).await),
        ["b1"],
        "in flight may name records that are gone; others must flow"
    );
    let settled = owner.settle(plan).await;
    assert!(
        settled.lost.is_empty(),
        "repeating a settlement that was committed must succeed"
    );
    bench.commit(&[bench.keyed("a", "a4")]).await;
    assert_eq!(texts(&owner.next(10).await), ["a4"]);
}

/// Producers and relay run at once; each key is delivered in order, without loss and without repetition.
pub async fn producers_beside_relay<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let producers = if bench.harness.concurrent_transactions() {
        4
    } else {
        1
    };
    const PAIRS: usize = 20;
    let produce = futures::future::join_all((0..producers).map(|producer| {
        let bench = &bench;
        async move {
            let key = format!("k{producer}");
            let texts = numbered(&key, 2 * PAIRS);
            for (round, pair) in texts.chunks(2).enumerate() {
                let tx = bench
                    .open(&[bench.keyed(&key, &pair[0]), bench.keyed(&key, &pair[1])])
                    .await;
                pause(round + producer).await;
                bench.harness.commit(tx).await;
                pause(round).await;
            }
        }
    }));
    let relay = async {
        let mut seen: Vec<Record> = Vec::new();
        let start = Instant::now();
        while seen.len() < producers * PAIRS * 2 {
            assert!(
                start.elapsed() < PATIENCE,
                "{} of {} messages came: a reader must find what commits while it reads",
                seen.len(),
                producers * PAIRS * 2
            );
            let records = owner.fetch(50).await.0;
            owner.deliver(&records).await;
            seen.extend(records);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        seen
    };
    let (_, seen) = tokio::join!(produce, relay);
    for producer in 0..producers {
        let key = format!("k{producer}");
        let own: Vec<String> = texts(&seen)
            .into_iter()
            .filter(|text| {
                text.strip_prefix(&key)
                    .is_some_and(|rest| rest.parse::<usize>().is_ok())
            })
            .collect();
        if bench.can.keys {
            assert_eq!(
                own,
                numbered(&key, 2 * PAIRS),
                "a batch must show each key as of one snapshot: were two reads put together?"
            );
        } else {
            assert_eq!(own.len(), 2 * PAIRS, "each message must come once");
        }
    }
}

/// Thousands of messages of one transaction flow in batches, in order.
pub async fn huge_transaction_flows<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let messages: Vec<_> = (0..5_000)
        .map(|number| {
            bench.keyed(
                &format!("k{}", number % 50),
                &format!("k{}-{number:04}", number % 50),
            )
        })
        .collect();
    bench.commit(&messages).await;
    let drained = owner.drain_by(1_000).await;
    assert_eq!(
        drained.len(),
        5_000,
        "every message of a large transaction must come, once"
    );
    for key in (0..50).map(|key| format!("k{key}")).filter(|_| bench.can.keys) {
        let own = of_key(&drained, &key);
        assert!(
            own.len() == 100 && own.is_sorted(),
            "key {key} came out of order: {own:?}"
        );
    }
}

/// Commits messages of several keys in turn, each in a transaction of its own.
async fn interleaved<H: StoreHarness>(bench: &Bench<H>, keys: usize, each: usize) {
    for number in 1..=each {
        for key in 0..keys {
            let key = format!("k{key}");
            bench
                .commit(&[bench.keyed(&key, &format!("{key}{number}"))])
                .await;
        }
    }
}

/// A short wait that differs from round to round.
async fn pause(round: usize) {
    let millis = u64::try_from(round % 4).unwrap_or_default();
    tokio::time::sleep(Duration::from_millis(millis)).await;
}
