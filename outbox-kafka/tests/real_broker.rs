//! Against a real broker: bytes, order, topics that come and go, shutdown.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

mod common;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use common::rdkafka::Message as _;
use common::rdkafka::admin::AdminOptions;
use common::{
    admin, asking, broker, count, create_topic, deliver, fresh_name, new_topic, publish, quick, read_all,
    record, text, threads, within,
};
use outbox_core::{Headers, Message, MessageId, Outcome, Sink};
use outbox_kafka::{KafkaConfig, KafkaSink, ReceivedMessage, message_id};

fn sink() -> KafkaSink {
    KafkaSink::new(&quick(broker())).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_arrive_as_they_were_enqueued() {
    let topic = new_topic(1, &[]).await;
    let id = MessageId::new();
    let builder = || Message::builder(topic.as_str());
    let mut first = record(
        builder()
            .id(id)
            .key(vec![0, 0xff])
            .payload(vec![0xfe, 0, b'\n'])
            .content_type("application/octet-stream")
            .header(
                "traceparent",
                "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            )
            .header("raw", vec![0xff, 0x00])
            .header("é", "")
            .header("raw", "again"),
    );
    first.key_seq = Some(7);
    let batch = vec![
        first,
        record(builder().key("tombstone")),
        record(builder().key("").payload("")),
        record(builder().payload("keyless")),
        record(builder().key("big").payload(vec![b'x'; 999_000])),
        record((0..1_000).fold(builder(), |builder, n| {
            builder.header(format!("h{n}"), n.to_string())
        })),
    ];
    let mut sink = sink();
    assert_eq!(
        publish(&mut sink, batch.clone()).await,
        vec![Outcome::Delivered; 6]
    );

    let found = read_all(&broker(), &topic);
    assert_eq!(found.len(), 6);
    for record in &batch {
        let message = &record.message;
        let raw = found
            .iter()
            .find(|raw| message_id(*raw).unwrap() == message.id())
            .unwrap();
        let received = ReceivedMessage::read(raw).unwrap();
        assert_eq!(received.key.as_ref(), message.key());
        assert_eq!(received.payload.as_ref(), message.payload());
        assert_eq!(received.content_type.as_deref(), message.content_type());
        assert_eq!(&received.headers, message.headers());
        assert_eq!(received.key_seq, record.key_seq);
        assert_eq!(received.topic, topic);
    }
    // Null and empty are different things in Kafka.
    assert_eq!((found[1].payload(), found[2].payload()), (None, Some(&b""[..])));
    assert_eq!((found[2].key(), found[3].key()), (Some(&b""[..]), None));
    assert_eq!(ReceivedMessage::read(&found[3]).unwrap().headers, Headers::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_key_is_in_order_through_pipelined_batches() {
    let topic = new_topic(6, &[]).await;
    let mut sink = sink();
    let mut receipts = Vec::new();
    for batch in 0..40 {
        let records = (0..500)
            .map(|n| {
                let number = batch * 500 + n;
                text(&topic, &(number % 50).to_string(), (number / 50).to_string())
            })
            .collect();
        receipts.push(within(10, sink.publish(records)).await);
    }
    for receipt in receipts {
        assert_eq!(
            within(10, receipt.outcomes()).await,
            vec![Outcome::Delivered; 500]
        );
    }
    let mut next: HashMap<Vec<u8>, u32> = HashMap::new();
    for message in read_all(&broker(), &topic) {
        let next = next.entry(message.key().unwrap().to_vec()).or_default();
        assert_eq!(message.payload().unwrap(), next.to_string().as_bytes());
        *next += 1;
    }
    assert_eq!(next.len(), 50);
    assert!(next.values().all(|count| *count == 400));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_topic_is_blocked_at_once_until_it_is_made() {
    let (topic, other) = (fresh_name(), new_topic(1, &[]).await);
    let mut sink = KafkaSink::new(&asking(broker())).unwrap();
    let batch = vec![
        text(&topic, "k", "1"),
        text(&other, "k", "1"),
        text(&topic, "k", "2"),
    ];
    let outcomes = publish(&mut sink, batch.clone()).await;
    let classes: Vec<_> = outcomes.iter().map(Outcome::as_str).collect();
    assert_eq!(
        classes,
        ["topic_blocked", "delivered", "topic_blocked"],
        "{outcomes:?}"
    );
    create_topic(&topic, 1, &[]).await;
    assert_eq!(publish(&mut sink, batch).await, vec![Outcome::Delivered; 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_deleted_under_way_is_blocked_and_flows_when_it_is_made_again() {
    let (topic, other) = (new_topic(1, &[]).await, new_topic(1, &[]).await);
    let mut sink = sink();
    let both = |n: u32| vec![text(&topic, "k", n.to_string()), text(&other, "k", n.to_string())];
    assert_eq!(publish(&mut sink, both(1)).await, vec![Outcome::Delivered; 2]);
    let deleted = admin(&broker())
        .delete_topics(&[&topic], &AdminOptions::new())
        .await
        .unwrap();
    deleted.into_iter().for_each(|result| drop(result.unwrap()));
    let (outcomes, _) = deliver(&mut sink, both(2)).await;
    let classes: Vec<_> = outcomes.iter().map(Outcome::as_str).collect();
    assert_eq!(classes, ["topic_blocked", "delivered"], "{outcomes:?}");
    create_topic(&topic, 1, &[]).await;
    // librdkafka may still answer from what it knew, for a moment.
    for attempt in 0.. {
        let (outcomes, _) = deliver(&mut sink, both(3)).await;
        if outcomes == vec![Outcome::Delivered; 2] {
            break;
        }
        assert!(attempt < 10, "{outcomes:?}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_topics_are_asked_for_together() {
    let mut topics = Vec::new();
    for _ in 0..25 {
        topics.push(new_topic(1, &[]).await);
    }
    topics.push(fresh_name());
    let mut sink = sink();
    let batch = topics.iter().map(|topic| text(topic, "k", "v")).collect();
    let outcomes = publish(&mut sink, batch).await;
    assert_eq!(count(&outcomes), [("delivered", 25), ("topic_blocked", 1)].into());
    assert!(matches!(outcomes[25], Outcome::TopicBlocked(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_and_drops_leave_no_thread_behind() {
    let topic = new_topic(1, &[]).await;
    for round in 0..5 {
        let mut sink = KafkaSink::new(&KafkaConfig::new(broker())).unwrap();
        assert_eq!(
            publish(&mut sink, vec![text(&topic, "k", "v")]).await,
            [Outcome::Delivered]
        );
        let receipts = [
            sink.publish((0..5_000).map(|_| text(&topic, "k", "v")).collect())
                .await,
            sink.publish((0..5_000).map(|_| text(&topic, "k", "v")).collect())
                .await,
        ];
        if round % 2 == 0 {
            within(5, sink.purge()).await;
        }
        drop(sink);
        for receipt in receipts {
            assert_eq!(within(5, receipt.outcomes()).await.len(), 5_000);
        }
    }
    // The other tests of this process have clients of their own, which end as well.
    let end = Instant::now() + Duration::from_secs(60);
    while threads() > 0 {
        assert!(Instant::now() < end, "{} threads are left", threads());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_dropped_half_way_is_undone_by_the_purge() {
    let topic = new_topic(1, &[]).await;
    let config = quick(broker()).option("queue.buffering.max.messages", "20");
    let mut sink = KafkaSink::new(&config).unwrap();
    for _ in 0..20 {
        let batch = (0..500).map(|n| text(&topic, "k", n.to_string())).collect();
        let _ = tokio::time::timeout(Duration::from_millis(8), sink.publish(batch)).await;
        within(5, sink.purge()).await;
        let before = read_all(&broker(), &topic).len();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(
            read_all(&broker(), &topic).len(),
            before,
            "something left after the purge"
        );
    }
    assert_eq!(
        publish(&mut sink, vec![text(&topic, "k", "v")]).await,
        [Outcome::Delivered]
    );
}
