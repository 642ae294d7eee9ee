//! A store is what it says it is.

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, PATIENCE};
use crate::error::ErrorKind;
use crate::message::Message;
use crate::store::{Capabilities, Count, OutboxStore};

/// Capabilities and powers do not change, from handle to handle and from call to call.
pub async fn capabilities_are_constant<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let say = |store: &dyn OutboxStore| -> (Capabilities, [bool; 4]) {
        (
            store.capabilities(),
            [
                store.dead_letters().is_some(),
                store.scheduled().is_some(),
                store.retention().is_some(),
                store.parking().is_some(),
            ],
        )
    };
    let first = say(&*bench.store);
    assert!(first.0.shards >= 1, "a store has at least one shard");
    assert!(!first.0.name.is_empty(), "a store has a name");
    bench.commit(&[bench.keyed("a", "1")]).await;
    let mut owner = bench.owner("owner").await;
    owner.drain().await;
    assert_eq!(
        say(&*bench.store),
        first,
        "capabilities must not change while the store is used"
    );
    assert_eq!(say(&*bench.harness.store()), first, "nor from handle to handle");
}

/// What a store says that it cannot hold, it refuses at enqueue, where the producer can react.
pub async fn what_cannot_be_held_is_refused<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let start = || Message::builder(bench.topic(0)).payload("\"x\"");
    let can = &bench.can;
    let bytes = || start().payload(&b"\xff\x00"[..]);
    let cases = [
        (can.keys, "a key", start().key("a")),
        (
            can.fixed_topic.is_none(),
            "another topic",
            Message::builder("another-topic").payload("\"x\""),
        ),
        (can.headers, "headers", start().header("a", "b")),
        (
            can.content_types,
            "a content type",
            start().content_type("text/plain"),
        ),
        (can.tombstones, "a tombstone", Message::builder(bench.topic(0))),
        (can.any_bytes, "bytes that are no JSON", bytes()),
    ];
    for (_, what, builder) in cases.into_iter().filter(|(held, ..)| !held) {
        let mut tx = bench.harness.begin().await;
        let refused = bench.harness.enqueue(&mut tx, &[builder.build().unwrap()]).await;
        let kind = refused.map_err(|error| error.kind());
        assert!(
            matches!(kind, Err(ErrorKind::Unsupported | ErrorKind::Invalid)),
            "the store says that it cannot hold {what}: it must refuse such a message, not drop a part of it: {kind:?}"
        );
        bench.harness.rollback(tx).await;
    }
}

/// Without an archive nothing is archived.
pub async fn no_archive_without_retention<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 3)).await;
    owner.drain().await;
    let stats = bench.store.stats().await.unwrap();
    if bench.store.retention().is_none() {
        assert_eq!(
            stats.processed.value(),
            0,
            "a store that cannot purge its archive must not keep one: it would grow for ever"
        );
    } else if let Count::Exact(processed) = stats.processed {
        assert_eq!(processed, 3, "the archive must count what was delivered");
    }
}

/// A hint that never comes, or comes for nothing, is allowed; one that blocks the relay is not.
pub async fn wake_up_can_be_dropped<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let Some(mut wake_up) = bench.store.wake_up() else {
        panic!("whether a store gives hints must not change");
    };
    for round in 0..5 {
        let soon = std::time::Duration::from_millis(20);
        let _ = tokio::time::timeout(soon, wake_up.wait()).await;
        bench.commit(&[bench.keyed("a", &format!("{round}"))]).await;
        let drained = tokio::time::timeout(PATIENCE, owner.drain()).await;
        assert_eq!(
            drained.map(|records| records.len()).ok(),
            Some(1),
            "waiting for a hint must not keep anybody from working"
        );
    }
}
