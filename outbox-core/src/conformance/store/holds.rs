//! Holds: what waits stays out, and the note of it is kept.

use std::time::Duration;

use super::super::harness::StoreHarness;
use super::super::kit::{
    Bench, LONG, SHORT, eventually, hold, numbered, of_key, order_key, retrying, sorted, texts,
};
use crate::fetch::Record;
use crate::hold::{Hold, HoldScope, HoldState};
use crate::lease::Membership;
use crate::sink::Reason;

/// Nothing of a held key is returned; once it is let go, all of it is, in order.
pub async fn hold_stops_key<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 4)).await;
    let head = owner.next(1).await.swap_remove(0);
    let hold = retrying(&head, 1);
    owner.hold(hold.clone()).await;
    bench
        .commit(&[bench.keyed("a", "a5"), bench.keyed("b", "b1")])
        .await;
    assert_eq!(
        texts(&owner.drain().await),
        ["b1"],
        "of a held key nothing may come, neither its head nor what follows; other keys must"
    );
    owner.unhold(&hold).await;
    assert_eq!(
        texts(&owner.drain().await),
        numbered("a", 5),
        "a key that is let go must come again from its head, in order"
    );
}

/// A key is held within its topic: the same key of another topic flows.
pub async fn hold_stops_key_of_topic_only<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.message(0, Some("a"), "held")]).await;
    let head = owner.next(1).await.swap_remove(0);
    owner.hold(retrying(&head, 1)).await;
    bench
        .commit(&[
            bench.message(0, Some("a"), "behind"),
            bench.message(1, Some("a"), "other topic"),
        ])
        .await;
    assert_eq!(
        texts(&owner.drain().await),
        ["other topic"],
        "the ordering domain is topic and key together"
    );
}

/// Nothing of a held topic is returned, keyed or keyless, on any shard.
pub async fn hold_stops_topic<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.message(0, None, "probe")]).await;
    let head = owner.next(1).await.swap_remove(0);
    let hold = Hold {
        scope: HoldScope::Topic(bench.topic(0)),
        ..retrying(&head, 1)
    };
    owner.hold(hold.clone()).await;
    let key = |topic, number: usize| {
        let key = bench.can.keys.then(|| format!("key-{number}"));
        bench.message(topic, key.as_deref(), &format!("topic-{topic}"))
    };
    let messages: Vec<_> = (0..20)
        .flat_map(|number| [key(0, number), key(1, number)])
        .collect();
    bench.commit(&messages).await;
    bench
        .commit(&[
            bench.message(0, None, "topic-0"),
            bench.message(1, None, "topic-1"),
        ])
        .await;
    assert_eq!(
        texts(&owner.drain().await),
        vec!["topic-1"; 21],
        "a held topic must be held on every shard, and others must flow"
    );
    owner.unhold(&hold).await;
    assert_eq!(
        owner.drain().await.len(),
        22,
        "a topic that is let go must come again"
    );
}

/// A keyless message that waits holds up nobody but itself.
pub async fn hold_stops_message_alone<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.keyless("held")]).await;
    let head = owner.next(1).await.swap_remove(0);
    let hold = retrying(&head, 1);
    owner.hold(hold.clone()).await;
    let others: Vec<_> = (0..20)
        .map(|number| bench.keyless(&format!("{number:02}")))
        .collect();
    bench.commit(&others).await;
    assert_eq!(
        sorted(&owner.drain().await),
        (0..20).map(|number| format!("{number:02}")).collect::<Vec<_>>(),
        "a keyless message that waits must stay out, and no other with it"
    );
    owner.unhold(&hold).await;
    assert_eq!(
        texts(&owner.drain().await),
        ["held"],
        "let go, it must come again"
    );
}

/// Keyless messages flow while keys are held.
pub async fn keyless_flow_beside_holds<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.keyed("a", "held")]).await;
    let head = owner.next(1).await.swap_remove(0);
    owner.hold(retrying(&head, 1)).await;
    bench
        .commit(&[bench.keyless("keyless"), bench.keyed("b", "keyed")])
        .await;
    assert_eq!(
        sorted(&owner.drain().await),
        ["keyed", "keyless"],
        "a comparison of NULL with the held keys is neither true nor false: mind NOT IN"
    );
}

/// A hold is there, whole, for the next owner.
pub async fn hold_is_durable<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench
        .commit(&[bench.keyed("a", "1"), bench.keyed("b", "2"), bench.keyless("3")])
        .await;
    let records = owner.drain_without_settling().await;
    assert_eq!(records.len(), 3);
    let states = [
        (1, HoldState::Retrying { due_in: LONG }),
        (4_000_000_000, HoldState::Parked),
        (0, HoldState::Retrying { due_in: LONG }),
    ];
    let mut expected = Vec::new();
    for (record, (attempts, state)) in records.iter().zip(states) {
        let reason = format!("'{}\"\\ ü\n", "ä".repeat(Reason::MAX_BYTES / 2 - 10));
        let hold = Hold {
            reason,
            ..hold(record, attempts, state)
        };
        owner.hold(hold.clone()).await;
        expected.push(hold);
    }
    expected.push(Hold {
        scope: HoldScope::Topic(bench.topic(0)),
        ..retrying(&records[0], 7)
    });
    owner.hold(expected[3].clone()).await;
    owner.release_all(Membership::Leaves).await;
    let mut next = bench.owner("next").await;
    let mut found = next.holds().await;
    assert_eq!(
        found.len(),
        4,
        "each hold must be found by the shard's next owner: {found:?}"
    );
    for hold in &mut found {
        if let HoldState::Retrying { due_in } = &mut hold.state {
            assert!(
                *due_in <= LONG && *due_in > LONG - Duration::from_secs(120),
                "a hold that is due in an hour must come back due in an hour, not in {due_in:?}"
            );
            *due_in = LONG;
        }
        assert!(
            expected.contains(hold),
            "a hold must come back as it was put, attempts, head and reason included: {hold:?}"
        );
    }
}

/// A hold that is put again takes the place of the one before; attempts are absolute.
pub async fn hold_put_replaces<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench
        .commit(&[bench.keyed("a", "a1"), bench.keyed("a", "a2"), bench.keyless("b")])
        .await;
    let records = owner.drain_without_settling().await;
    let find = |wanted: &str| {
        let mut own = records
            .iter()
            .filter(|record| texts(&[(*record).clone()]) == [wanted]);
        own.next().unwrap().clone()
    };
    for scope in [&find("a1"), &find("b")] {
        owner.hold(retrying(scope, 1)).await;
        owner.hold(hold(scope, 3, HoldState::Parked)).await;
        let holds = owner.holds().await;
        let own: Vec<_> = holds
            .iter()
            .filter(|hold| hold.head == scope.reference())
            .collect();
        assert_eq!(
            own.len(),
            1,
            "there is one hold a scope: put must replace it: {holds:?}"
        );
        assert_eq!(
            (own[0].attempts, own[0].state),
            (3, HoldState::Parked),
            "the later hold counts, and its attempts as they are, not added up"
        );
    }
    if bench.can.keys {
        // The head was delivered or buried, and the next one fails: the same key, another head.
        let next = find("a2");
        owner.hold(retrying(&next, 1)).await;
        let holds = owner.holds().await;
        let own: Vec<_> = holds
            .iter()
            .filter(|hold| hold.scope == HoldScope::Key(order_key(&next)))
            .collect();
        assert_eq!(own.len(), 1, "a key has one hold, whatever its head: {holds:?}");
        assert_eq!(own[0].head, next.reference(), "the later head counts");
    }
}

/// A hold that is cleared is gone, alone; clearing it again does no harm.
pub async fn hold_clear_removes<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench
        .commit(&[bench.keyed("a", "a1"), bench.keyed("b", "b1"), bench.keyless("c")])
        .await;
    let records = owner.drain_without_settling().await;
    for record in &records {
        owner.hold(retrying(record, 1)).await;
    }
    for (index, record) in records.iter().enumerate() {
        for _ in 0..2 {
            owner
                .settle(owner.plan().clear(retrying(record, 1).reference()))
                .await;
            assert_eq!(
                owner.holds().await.len(),
                records.len() - index - 1,
                "clear must remove the hold that it names, and no other"
            );
        }
    }
}

/// A message that is delivered and its hold that is cleared go together; what follows in the key comes.
pub async fn hold_clears_with_delivery<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 3)).await;
    let head = owner.next(1).await.swap_remove(0);
    let note = retrying(&head, 1);
    owner.hold(note.clone()).await;
    owner.held = crate::fetch::Held::default();
    owner
        .settle(owner.plan().delivered(&head).clear(note.reference()))
        .await;
    assert!(
        owner.holds().await.is_empty(),
        "the hold must go with the settlement that clears it"
    );
    owner.reader = owner.store.reader().await.unwrap();
    let rest = owner.drain().await;
    assert_eq!(
        sorted(&rest),
        ["a2", "a3"],
        "the head is delivered, the rest must come"
    );
}

/// The time until a hold is due runs by the database's clock, down to zero.
pub async fn hold_due_runs_down<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.keyed("a", "1")]).await;
    let head = owner.next(1).await.swap_remove(0);
    owner
        .hold(hold(&head, 1, HoldState::Retrying { due_in: SHORT }))
        .await;
    let due_in = |holds: Vec<Hold>| match holds.first().map(|hold| hold.state) {
        Some(HoldState::Retrying { due_in }) => due_in,
        other => panic!("the hold must be there, retrying, until it is cleared; there is {other:?}"),
    };
    let first = due_in(owner.holds().await);
    assert!(
        first <= SHORT,
        "a hold must not be due later than it was put: {first:?}"
    );
    eventually!(
        due_in(owner.holds().await).is_zero(),
        "the time until a hold is due must run down to zero"
    );
}

/// Only the holds of the shards that are asked for are returned.
pub async fn holds_are_of_asked_shards<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let (_, one, other) = bench.on_two_shards(&mut owner).await;
    owner.hold(retrying(&one, 1)).await;
    owner.hold(retrying(&other, 1)).await;
    let only: Vec<_> = owner
        .owned
        .iter()
        .copied()
        .filter(|owned| owned.shard == one.shard)
        .collect();
    let holds = owner.store.holds(&only).await.unwrap();
    assert_eq!(
        holds.iter().map(|hold| hold.head).collect::<Vec<_>>(),
        [one.reference()],
        "only holds of the shards that were asked for may be returned"
    );
    assert!(
        owner.store.holds(&[]).await.unwrap().is_empty(),
        "no shards, no holds"
    );
}

/// Keyless messages of one shard are held side by side.
pub async fn keyless_holds_stand_apart<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    // So many that two are on one shard.
    let count = usize::from(bench.can.shards) + 1;
    let messages: Vec<_> = (0..count)
        .map(|number| bench.keyless(&format!("{number}")))
        .collect();
    bench.commit(&messages).await;
    let records: Vec<Record> = owner.drain_without_settling().await;
    let plan = records
        .iter()
        .fold(owner.plan(), |plan, record| plan.put(retrying(record, 1)));
    owner.settle(plan).await;
    assert_eq!(
        owner.holds().await.len(),
        count,
        "a keyless message's hold is named by its position: two of one shard must not replace each other"
    );
}

/// A head that failed does not let its successors pass, whoever owns the shard.
pub async fn order_survives_retry<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut first = bench.owner("first").await;
    bench.commit(&bench.series("a", 4)).await;
    let records = first.next(10).await;
    let mut note = retrying(&records[0], 1);
    first.hold(note.clone()).await;
    assert!(
        first.next(10).await.is_empty(),
        "the key waits: what was read behind its head must not come either"
    );
    first.release_all(Membership::Leaves).await;
    let mut second = bench.owner("second").await;
    for hold in second.holds().await {
        note = hold.clone();
        second.heed(&hold);
    }
    assert!(
        second.next(10).await.is_empty(),
        "the next owner heeds the hold that it loaded"
    );
    second.unhold(&note).await;
    assert_eq!(
        of_key(&second.drain().await, "a"),
        numbered("a", 4),
        "after the retry the key must come in order, from its head"
    );
}
