//! What producers do, through the library and with plain documents, on a real server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering as Memory};

use common::{Place, delivered, message, records, request, texts};
use outbox_core::{DeadLetterQuery, Death, Message, MessageId, Ordering, OutboxStore, shard_of};
use outbox_mongo::mongodb::bson::oid::ObjectId;
use outbox_mongo::mongodb::bson::spec::BinarySubtype;
use outbox_mongo::mongodb::bson::{Binary, Bson, DateTime, Document, Timestamp, doc};
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
    // What would be found and never be settled, or be found by nobody.
    let bytes = |subtype, bytes: Vec<u8>| Bson::Binary(Binary { subtype, bytes });
    for (field, value) in [
        ("id", bytes(BinarySubtype::Generic, vec![1; 16])),
        ("id", bytes(BinarySubtype::UuidOld, vec![1; 16])),
        ("id", bytes(BinarySubtype::Uuid, vec![1; 3])),
        ("shard", Bson::Int32(64)),
    ] {
        let mut lost = plain("orders", "42", "placed");
        lost.insert(field, value.clone());
        // MongoDB refuses all of them. A server that orders binaries in another way lets some ids through, which die.
        if outbox.insert_one(lost).await.is_ok() {
            assert_eq!(field, "id", "{value}");
            let records = place.fetch(10).await;
            assert!(records[0].defect.is_some(), "{value}");
            outbox.delete_many(doc! {}).await.unwrap();
        }
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

/// What came past the validator dies once, whatever is wrong with it, and comes back as it was.
#[tokio::test]
async fn a_document_that_cannot_be_read_dies_alone_and_is_kept_as_it_is() {
    let place = Place::new().await;
    let outbox = place.collection("");
    let mut nameless = plain("orders", "42", "nameless");
    nameless.insert(
        "id",
        Bson::Binary(Binary {
            subtype: BinarySubtype::Generic,
            bytes: vec![1, 2, 3],
        }),
    );
    let mut textual = plain("orders", "43", "");
    textual.insert("payload", "as text");
    let mut elsewhere = plain("orders", "44", "elsewhere");
    elsewhere.insert("shard", (elsewhere.get_i32("shard").unwrap() + 1) % 64);
    for document in [nameless, textual, elsewhere] {
        let stored = outbox.insert_one(document).bypass_document_validation(true);
        stored.await.unwrap();
    }
    place.enqueue(&[message("orders", Some("45"), "good")]).await;
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    let (read, _) = records(reader.fetch(&request(&owned, 100)).await.unwrap());
    assert_eq!(read.iter().filter(|record| record.defect.is_some()).count(), 3);
    let mut parts = delivered(&owned, &read);
    for part in &mut parts {
        for record in std::mem::take(&mut part.delivered) {
            part.dead.push(Death {
                record,
                attempts: 0,
                reason: "it cannot be read".to_owned(),
            });
        }
    }
    place.store.settle(&place.settlement(parts)).await.unwrap();
    let stats = place.store.stats().await.unwrap();
    assert_eq!((stats.backlog.value(), stats.dead), (0, 4));
    let dead = place.store.dead_letters().unwrap();
    let letters: Vec<_> = dead.list(&DeadLetterQuery::default()).await.unwrap();
    let named: Vec<_> = letters.iter().map(|letter| letter.record).collect();
    assert_eq!(dead.requeue(&named).await.unwrap(), 4);
    let text = outbox
        .find_one(doc! { "flow": "orders/=43" })
        .await
        .unwrap()
        .unwrap();
    assert_eq!(text.get_str("payload"), Ok("as text"), "nothing of it was lost");
    let (read, _) = records(
        place
            .store
            .reader()
            .await
            .unwrap()
            .fetch(&request(&owned, 100))
            .await
            .unwrap(),
    );
    // In its own shard one of them is as good as any.
    assert_eq!(read.iter().filter(|record| record.defect.is_some()).count(), 2);
}

/// A message that somebody else has planned is promoted once, whatever its document is called.
#[tokio::test]
async fn a_plain_document_is_planned_once() {
    let place = Place::new().await;
    let mut planned = plain("reminders", "42", "soon");
    planned.remove("ts");
    planned.insert("_id", "a name of its own");
    planned.insert("due", DateTime::now());
    place.collection("_scheduled").insert_one(planned).await.unwrap();
    let owned = place.lease().await;
    let scheduled = place.store.scheduled().unwrap();
    let promoted = scheduled.promote(&place.relay, &owned, 10).await.unwrap();
    assert_eq!((promoted.promoted, promoted.next_in), (1, None));
    assert_eq!(texts(&place.fetch(10).await), ["soon"]);
}

/// Without a number it would be in no order.
#[tokio::test]
async fn a_plain_document_needs_its_number_where_messages_are_numbered() {
    let place = Place::with(|config| config.ordering = Ordering::Sequenced).await;
    let outbox = place.collection("");
    assert!(outbox.insert_one(plain("orders", "42", "placed")).await.is_err());
    let mut keyless = plain("orders", "42", "placed");
    let id = MessageId::new();
    keyless.insert(
        "id",
        Binary {
            subtype: BinarySubtype::Uuid,
            bytes: id.as_bytes().to_vec(),
        },
    );
    keyless.insert("flow", format!("orders/-{id}"));
    keyless.insert("shard", i32::from(shard_of(None, id, 64).0));
    outbox.insert_one(keyless).await.unwrap();
    assert_eq!(place.fetch(10).await[0].defect, None);
}
