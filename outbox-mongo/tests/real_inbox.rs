//! The consumer's inbox in its own transactions, on a real server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::time::Duration;

use common::Place;
use outbox_core::{Enqueue, Inbox, Message, MessageId, Receive};
use outbox_mongo::mongodb::ClientSession;
use outbox_mongo::mongodb::bson::{DateTime, doc};
use outbox_mongo::{ErrorKind, MongoInbox, driver_error};

const HOUR: Duration = Duration::from_secs(3_600);

/// An inbox and a collection for effects.
async fn with_effects() -> (Place, MongoInbox) {
    let place = Place::new().await;
    let effects = place.collection("_effects");
    effects.insert_one(doc! { "_id": 1, "sum": 0_i64 }).await.unwrap();
    let inbox = MongoInbox::new(&place.config).unwrap();
    (place, inbox)
}

async fn effect(place: &Place, session: &mut ClientSession) -> outbox_mongo::mongodb::error::Result<()> {
    let once = doc! { "$inc": { "sum": 1_i64 } };
    let effects = place.collection("_effects");
    effects
        .update_one(doc! { "_id": 1 }, once)
        .session(session)
        .await
        .map(drop)
}

async fn effects(place: &Place) -> i64 {
    let effects = place.collection("_effects").find_one(doc! {}).await.unwrap();
    effects.unwrap().get_i64("sum").unwrap()
}

#[tokio::test]
async fn the_effect_happens_once_for_each_consumer() {
    let (place, inbox) = with_effects().await;
    let id = MessageId::new();
    for (consumer, expected) in [
        ("billing", Receive::Fresh),
        ("billing", Receive::Duplicate),
        ("shipping", Receive::Fresh),
    ] {
        let mut session = place.begin().await;
        assert_eq!(inbox.receive(&mut session, consumer, id).await.unwrap(), expected);
        if expected == Receive::Fresh {
            effect(&place, &mut session).await.unwrap();
        }
        session.commit_transaction().await.unwrap();
    }
    // What was rolled back was not handled.
    let other = MessageId::new();
    let mut session = place.begin().await;
    assert_eq!(
        inbox.receive(&mut session, "billing", other).await.unwrap(),
        Receive::Fresh
    );
    session.abort_transaction().await.unwrap();
    let mut session = place.begin().await;
    assert_eq!(
        inbox.receive(&mut session, "billing", other).await.unwrap(),
        Receive::Fresh
    );
    // And a duplicate leaves the transaction usable.
    assert_eq!(
        inbox.receive(&mut session, "billing", id).await.unwrap(),
        Receive::Duplicate
    );
    effect(&place, &mut session).await.unwrap();
    session.commit_transaction().await.unwrap();
    assert_eq!(effects(&place).await, 3);
}

#[tokio::test]
async fn what_would_note_wrongly_is_refused() {
    let (place, inbox) = with_effects().await;
    // Nor without a transaction, where the note would stay without the effect.
    let mut session = place.client.start_session().await.unwrap();
    let error = inbox
        .receive(&mut session, "billing", MessageId::new())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(
        place.collection("_inbox").count_documents(doc! {}).await.unwrap(),
        0
    );
    let mut session = place.begin().await;
    let long = "ü".repeat(256);
    let error = inbox
        .receive(&mut session, &long, MessageId::new())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let longest = &long[..long.len() - 2];
    let taken = inbox.receive(&mut session, longest, MessageId::new()).await;
    assert_eq!(taken.unwrap(), Receive::Fresh);
}

/// Of many copies at the same time one takes effect: the others are in its way, run again, and find it.
#[tokio::test(flavor = "multi_thread")]
async fn concurrent_copies_take_effect_once() {
    let (place, inbox) = with_effects().await;
    let place = std::sync::Arc::new(place);
    let id = MessageId::new();
    let copies = (0..8).map(|_| {
        let (place, inbox) = (std::sync::Arc::clone(&place), inbox.clone());
        tokio::spawn(async move {
            loop {
                let mut session = place.begin().await;
                let handled = async {
                    let received = inbox.receive(&mut session, "billing", id).await;
                    if received.map_err(driver_error)? == Receive::Fresh {
                        effect(&place, &mut session).await?;
                    }
                    session.commit_transaction().await
                };
                match handled.await {
                    Ok(()) => return,
                    Err(error) => assert!(error.contains_label("TransientTransactionError"), "{error}"),
                }
                tokio::time::sleep(Duration::from_millis(fastrand::u64(1..10))).await;
            }
        })
    });
    for copy in futures::future::join_all(copies).await {
        copy.unwrap();
    }
    assert_eq!(effects(&place).await, 1);
}

#[tokio::test]
async fn a_purge_forgets_only_what_is_old() {
    let (place, inbox) = with_effects().await;
    let notes = place.collection("_inbox");
    for number in 0..5 {
        let mut session = place.begin().await;
        let taken = inbox.receive(&mut session, "billing", MessageId::new()).await;
        assert_eq!(taken.unwrap(), Receive::Fresh);
        session.commit_transaction().await.unwrap();
        if number < 3 {
            // It was two hours ago.
            let then = DateTime::from_millis(DateTime::now().timestamp_millis() - 7_200_000);
            let old = doc! { "$set": { "at": then } };
            notes
                .update_one(doc! { "at": { "$gt": then } }, old)
                .await
                .unwrap();
        }
    }
    let purge = async |age, limit| {
        let mut session = place.begin().await;
        let purged = inbox.purge(&mut session, age, limit).await;
        session.commit_transaction().await.unwrap();
        purged
    };
    let error = purge(Duration::from_secs(60), 10).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(purge(HOUR, 0).await.unwrap(), 0);
    assert_eq!(purge(HOUR, 2).await.unwrap(), 2);
    assert_eq!(purge(HOUR, 10).await.unwrap(), 1);
    assert_eq!(purge(HOUR, 10).await.unwrap(), 0);
    assert_eq!(notes.count_documents(doc! {}).await.unwrap(), 2);
}

#[tokio::test]
async fn the_traits_work_on_the_drivers_own_session() {
    async fn handle<I, O>(inbox: &I, outbox: &O, session: &mut ClientSession, id: MessageId) -> Receive
    where
        I: Inbox<ClientSession>,
        O: Enqueue<ClientSession>,
    {
        let received = inbox.receive(session, "billing", id).await.unwrap();
        let reply = Message::builder("bills").key("42").build().unwrap();
        outbox.enqueue(session, &reply).await.unwrap();
        received
    }
    let (place, inbox) = with_effects().await;
    let mut session = place.begin().await;
    let received = handle(&inbox, &place.outbox, &mut session, MessageId::new()).await;
    assert_eq!(received, Receive::Fresh);
    session.commit_transaction().await.unwrap();
    assert_eq!(place.fetch(10).await.len(), 1);
}
