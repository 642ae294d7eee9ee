//! Parked keys: seen, resumed, buried.

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, hold, retrying, texts};
use super::dead::list;
use crate::dead::DeadLetterQuery;
use crate::error::ErrorKind;
use crate::hold::{Hold, HoldScope, HoldState, Parking};
use crate::store::OutboxStore;

/// Parked holds are listed, oldest head first, and no others.
pub async fn parked_is_listed<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    for text in ["1", "2", "3", "4"] {
        bench.commit(&[bench.keyed(text, text)]).await;
    }
    let mut records = owner.drain_without_settling().await;
    records.sort_by_key(|record| record.position);
    owner.hold(retrying(&records[0], 1)).await;
    for record in [&records[3], &records[1], &records[2]] {
        owner.hold(hold(record, 4, HoldState::Parked)).await;
    }
    let parked = parking(&*owner.store).parked(10).await.unwrap();
    assert_eq!(
        parked.iter().map(|hold| hold.head).collect::<Vec<_>>(),
        records[1..]
            .iter()
            .map(crate::Record::reference)
            .collect::<Vec<_>>(),
        "what is parked must be listed, oldest head first, and what is retried must not"
    );
    assert!(
        parked
            .iter()
            .all(|hold| hold.attempts == 4 && hold.state == HoldState::Parked && hold.reason == "it hiccups"),
        "a parked hold must be listed as it was put: {parked:?}"
    );
    assert_eq!(
        parking(&*owner.store).parked(2).await.unwrap(),
        parked[..2],
        "a limit cuts off the youngest"
    );
}

/// A parked hold that is resumed is tried again at once, from the first attempt; twice it cannot be resumed.
pub async fn parked_resumes<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.keyed("a", "1"), bench.keyless("2")]).await;
    let records = owner.drain_without_settling().await;
    for record in &records {
        let note = hold(record, 4, HoldState::Parked);
        owner.hold(note.clone()).await;
        let power = bench.harness.store();
        assert!(
            parking(&*power).resume(&note.reference()).await.unwrap(),
            "what is parked can be resumed"
        );
        assert!(
            !parking(&*power).resume(&note.reference()).await.unwrap(),
            "what is no longer parked cannot be resumed"
        );
        assert!(parking(&*power).parked(10).await.unwrap().is_empty());
        let left = owner.holds().await;
        let own = left.iter().find(|hold| hold.head == record.reference());
        assert!(
            own.is_none_or(|hold| {
                hold.attempts == 0 && matches!(hold.state, HoldState::Retrying { due_in } if due_in.is_zero())
            }),
            "a resumed hold is gone, or due now with no attempts: {own:?}"
        );
    }
    owner.held = crate::fetch::Held::default();
    owner.reader = owner.store.reader().await.unwrap();
    assert_eq!(
        owner.drain().await.len(),
        2,
        "what is resumed is still in the outbox"
    );
}

/// A parked head that is buried becomes a dead letter, and its key goes on.
pub async fn parked_is_buried<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench
        .commit(&[bench.keyed("a", "1"), bench.keyed("a", "2")])
        .await;
    let head = owner.next(1).await.swap_remove(0);
    let note = hold(&head, 4, HoldState::Parked);
    owner.hold(note.clone()).await;
    let power = parking(&*bench.store);
    assert!(
        power.bury(&note.reference()).await.unwrap(),
        "what is parked can be buried"
    );
    assert!(
        !power.bury(&note.reference()).await.unwrap(),
        "it is buried already"
    );
    assert!(
        !power.resume(&note.reference()).await.unwrap(),
        "what is buried cannot be resumed"
    );
    assert!(owner.holds().await.is_empty(), "the hold goes with its head");
    let letters = list(&*bench.store, &DeadLetterQuery::default()).await;
    assert_eq!(
        letters
            .iter()
            .map(|letter| (letter.record, letter.attempts, letter.reason.as_str()))
            .collect::<Vec<_>>(),
        [(head.reference(), 4, "it hiccups")],
        "the head must be a dead letter, with what the hold knew of it"
    );
    owner.held = crate::fetch::Held::default();
    owner.in_flight.clear();
    owner.reader = owner.store.reader().await.unwrap();
    assert_eq!(
        texts(&owner.drain().await).len(),
        1,
        "what followed it must go on"
    );
}

/// What is not parked is neither resumed nor buried.
pub async fn only_parked_is_resumed<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.keyed("a", "1")]).await;
    let head = owner.next(1).await.swap_remove(0);
    let note = retrying(&head, 2);
    let power = parking(&*bench.store);
    assert!(
        !power.resume(&note.reference()).await.unwrap(),
        "there is no hold at all"
    );
    owner.hold(note.clone()).await;
    assert!(
        !power.resume(&note.reference()).await.unwrap(),
        "it waits for a retry, not for an operator"
    );
    if bench.store.dead_letters().is_some() {
        assert!(
            !power.bury(&note.reference()).await.unwrap(),
            "it waits for a retry"
        );
    }
    let holds = owner.holds().await;
    assert_eq!(holds.len(), 1, "the hold must stay");
    assert_eq!(holds[0].attempts, 2, "as it was");
}

/// A topic cannot be buried: it has no head of its own.
pub async fn parked_topic_is_not_buried<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.keyed("a", "1")]).await;
    let head = owner.next(1).await.swap_remove(0);
    let note = Hold {
        scope: HoldScope::Topic(bench.topic(0)),
        ..hold(&head, 1, HoldState::Parked)
    };
    owner.hold(note.clone()).await;
    let power = parking(&*bench.store);
    let error = power.bury(&note.reference()).await.map_err(|error| error.kind());
    assert_eq!(
        error,
        Err(ErrorKind::Unsupported),
        "a topic has no head of its own to be buried"
    );
    assert!(
        power.resume(&note.reference()).await.unwrap(),
        "but it can be resumed"
    );
}

fn parking(store: &dyn OutboxStore) -> &dyn Parking {
    store
        .parking()
        .unwrap_or_else(|| panic!("whether a store has parking must not change"))
}
