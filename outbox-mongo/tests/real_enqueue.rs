//! What producers do, through the library and with plain documents, on a real server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering as Memory};

use common::{Place, message, texts};
use outbox_core::{Message, MessageId, Ordering, OutboxStore, shard_of};
use outbox_mongo::mongodb::bson::oid::ObjectId;
use outbox_mongo::mongodb::bson::spec::BinarySubtype;
use outbox_mongo::mongodb::bson::{Binary, Document, Timestamp, doc};
use outbox_mongo::mongodb::error::Error as DriverError;
use outbox_mongo::{ErrorKind, MongoConfig, MongoOutbox, driver_error};

/// A document as a producer in another language writes it.
fn plain(topic: &str, key: &str, payload: &str) -> Document {
    let id = MessageId::new();
    let binary = |subtype, bytes: &[u8]| Binary {
        subtype,
        bytes: bytes.to_vec(),
    };
    let shard = shard_of(Some(key.as_bytes()), id, 64);
    doc! {
        "id": binary(BinarySubtype::Uuid, id.as_bytes()),
        "topic": topic,
        "flow": format!("{topic}/={key}"),
        "shard": i32::from(shard.0),
        "ts": Timestamp { time: 0, increment: 0 },
        "payload": binary(BinarySubtype::Generic, payload.as_bytes()),
        "headers": r#"{"trace": "abc"}"#,
        "content_type": "text/plain",
    }
}

#[tokio::test]
async fn without_a_transaction_nothing_is_written() {
    let place = Place::new().await;
    let mut session = place.client.start_session().await.unwrap();
    let placed = message("orders", Some("42"), "placed");
    let error = place.outbox.enqueue(&mut session, &placed).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("start_transaction"), "{error}");
    assert_eq!(place.store.stats().await.unwrap().backlog.value(), 0);
    // The session is as it was.
    session.start_transaction().await.unwrap();
    place.outbox.enqueue(&mut session, &placed).await.unwrap();
    session.commit_transaction().await.unwrap();
    assert_eq!(texts(&place.fetch(10).await), ["placed"]);
}

#[tokio::test]
async fn a_message_beyond_the_limits_leaves_the_transaction_usable() {
    let place = Place::with(|config| config.limits.max_message_bytes = 1_000).await;
    let mut session = place.begin().await;
    let large = message("orders", Some("42"), &"x".repeat(2_000));
    let both = [message("orders", Some("42"), "first"), large];
    let error = place.outbox.enqueue_many(&mut session, &both).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let good = message("orders", Some("42"), "second");
    place.outbox.enqueue(&mut session, &good).await.unwrap();
    session.commit_transaction().await.unwrap();
    assert_eq!(texts(&place.fetch(10).await), ["second"]);
}

/// The driver runs a callback again whose transaction was in somebody's way. It knows by the error's labels.
#[tokio::test(flavor = "multi_thread")]
async fn the_drivers_callback_may_run_again() {
    for ordering in [Ordering::Insert, Ordering::Sequenced] {
        let place = Place::with(|config| config.ordering = ordering).await;
        let orders = place.db().collection::<Document>("orders");
        orders.insert_one(doc! { "_id": 42, "total": 0 }).await.unwrap();
        let runs = Arc::new(AtomicUsize::new(0));
        let context = (place.outbox.clone(), orders.clone(), Arc::clone(&runs));
        let mut session = place.client.start_session().await.unwrap();
        session
            .start_transaction()
            .and_run(context, |session, (outbox, orders, runs)| {
                let (outbox, orders) = (outbox.clone(), orders.clone());
                let first = runs.fetch_add(1, Memory::SeqCst) == 0;
                Box::pin(async move {
                    // The snapshot is taken here.
                    orders.find_one(doc! { "_id": 42 }).session(&mut *session).await?;
                    if first {
                        orders
                            .update_one(doc! { "_id": 42 }, doc! { "$inc": { "total": 1 } })
                            .await?;
                    }
                    outbox
                        .enqueue(session, &message("orders", Some("42"), "placed"))
                        .await
                        .map_err(driver_error)?;
                    orders
                        .update_one(doc! { "_id": 42 }, doc! { "$inc": { "total": 10 } })
                        .session(session)
                        .await?;
                    Ok::<_, DriverError>(())
                })
            })
            .await
            .unwrap();
        assert_eq!(runs.load(Memory::SeqCst), 2, "the first run was in conflict");
        let records = place.fetch(10).await;
        assert_eq!(texts(&records), ["placed"], "one message of two runs");
        let number = (ordering == Ordering::Sequenced).then_some(1);
        assert_eq!(records[0].key_seq, number);
    }
}

/// Two transactions of one key: under `Sequenced` the second is in conflict, and says so as the driver would.
#[tokio::test]
async fn a_conflict_is_told_as_the_driver_tells_it() {
    let place = Place::with(|config| config.ordering = Ordering::Sequenced).await;
    place.enqueue(&[message("orders", Some("42"), "before")]).await;
    let (mut first, mut second) = (place.begin().await, place.begin().await);
    let placed = message("orders", Some("42"), "placed");
    place.outbox.enqueue(&mut first, &placed).await.unwrap();
    let error = place.outbox.enqueue(&mut second, &placed).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error:?}");
    let error = driver_error(error);
    assert!(error.contains_label("TransientTransactionError"), "{error}");
    first.commit_transaction().await.unwrap();
}

#[tokio::test]
async fn where_no_outbox_is_enqueueing_says_what_to_do() {
    let place = Place::new().await;
    let other = MongoConfig {
        prefix: outbox_mongo::Identifier::new("other").unwrap(),
        ..place.config.clone()
    };
    let outbox = MongoOutbox::new(&other).unwrap();
    let mut session = place.begin().await;
    let error = outbox
        .enqueue(&mut session, &message("orders", None, "placed"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema);
    assert!(error.to_string().contains("run migrate"), "{error}");
    session.abort_transaction().await.unwrap();
    let names = place.db().list_collection_names().await.unwrap();
    assert!(!names.contains(&"other".to_owned()), "{names:?}");
}

#[tokio::test]
async fn plain_documents_are_delivered_as_they_are() {
    let place = Place::new().await;
    let outbox = place.collection("");
    outbox
        .insert_one(plain("orders", "42", "placed, \"whole\" – 'as it is'\\\n"))
        .await
        .unwrap();
    let mut bare = plain("orders", "43", "");
    for field in ["payload", "headers", "content_type"] {
        bare.remove(field);
    }
    outbox.insert_one(bare).await.unwrap();
    let records = place.fetch(10).await;
    let of_key = |key: &str| {
        let found = records
            .iter()
            .find(|record| record.message.key().is_some_and(|own| own == key));
        found.unwrap()
    };
    let whole = of_key("42");
    assert_eq!(whole.defect, None);
    assert_eq!(
        whole.message.payload().unwrap(),
        "placed, \"whole\" – 'as it is'\\\n"
    );
    assert_eq!(whole.message.headers().get("trace").unwrap(), "abc");
    assert_eq!(whole.message.content_type(), Some("text/plain"));
    let bare = of_key("43");
    assert_eq!((bare.message.payload(), bare.defect.as_ref()), (None, None));
}

/// What nobody would ever read is refused, what only the reader understands becomes a record with a defect.
#[tokio::test]
async fn a_plain_document_that_would_be_lost_is_refused() {
    let place = Place::new().await;
    let outbox = place.collection("");
    for field in ["id", "topic", "flow", "shard", "ts"] {
        let mut lost = plain("orders", "42", "placed");
        lost.remove(field);
        let refused = outbox.insert_one(lost).await;
        assert!(refused.is_err(), "without {field} it would be lost");
        let mut wrong = plain("orders", "42", "placed");
        wrong.insert(field, 1.5);
        assert!(outbox.insert_one(wrong).await.is_err(), "{field} of another type");
    }
    let mut strange = plain("orders", "42", "placed");
    strange.insert("headers", "no JSON");
    outbox.insert_one(strange).await.unwrap();
    assert!(place.fetch(10).await[0].defect.is_some());
}

/// Order is the server's: the documents' own ids, which producers make by their clocks, may go back by hours.
#[tokio::test]
async fn order_does_not_rest_on_the_producers_clocks() {
    let place = Place::new().await;
    let outbox = place.collection("");
    let begin: u32 = 1_790_000_000;
    for number in 0..20_u32 {
        let mut document = plain("orders", "42", &number.to_string());
        let seconds = begin - 1_000 * number;
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&seconds.to_be_bytes());
        document.insert("_id", ObjectId::from_bytes(bytes));
        let mut session = place.begin().await;
        outbox.insert_one(document).session(&mut session).await.unwrap();
        session.commit_transaction().await.unwrap();
    }
    let expected: Vec<String> = (0..20).map(|number| number.to_string()).collect();
    let records = place.fetch(100).await;
    assert_eq!(texts(&records), expected);
    assert!(records.is_sorted_by_key(|record| record.position));
}

/// Messages of one transaction, and of transactions one after the other, keep their order; many are one command.
#[tokio::test]
async fn many_messages_keep_their_order() {
    let place = Place::with(|config| config.shards = 4).await;
    let all: Vec<Message> = (0..5_000)
        .map(|number| message("orders", Some(&format!("{}", number % 7)), &number.to_string()))
        .collect();
    for part in all.chunks(2_500) {
        place.enqueue(part).await;
    }
    let records = place.fetch(10_000).await;
    assert_eq!(records.len(), all.len());
    for key in 0..7 {
        let own: Vec<u32> = records
            .iter()
            .filter(|record| record.message.key().is_some_and(|own| *own == key.to_string()))
            .map(|record| texts(std::slice::from_ref(record))[0].parse().unwrap())
            .collect();
        assert!(own.is_sorted(), "key {key}");
    }
}
