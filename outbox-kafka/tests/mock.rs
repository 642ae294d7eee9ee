//! Against librdkafka's mock cluster: which error becomes which outcome, and what happens next.
//!
//! The mock is not faithful for sequence numbers: order and loss are proven on a real broker.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use std::time::{Duration, Instant};

use common::rdkafka::Message as _;
use common::rdkafka::mocking::MockCluster;
use common::rdkafka::producer::DefaultProducerContext;
use common::rdkafka::types::{RDKafkaApiKey as Api, RDKafkaRespErr as Error};
use common::{asking, count, deliver, payloads, publish, quick, read_all, record, text, within};
use outbox_core::{Message, Outcome, Sink};
use outbox_kafka::{KafkaConfig, KafkaSink};

type Cluster = MockCluster<'static, DefaultProducerContext>;

fn cluster() -> Cluster {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("t", 4, 1).unwrap();
    cluster.create_topic("other", 4, 1).unwrap();
    cluster
}

fn sink(cluster: &Cluster) -> KafkaSink {
    KafkaSink::new(&quick(cluster.bootstrap_servers())).unwrap()
}

fn one() -> Vec<outbox_core::Record> {
    vec![text("t", "k", "v")]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_pass_is_hidden() {
    let passing = [
        Error::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
        Error::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        Error::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
        Error::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
        Error::RD_KAFKA_RESP_ERR__TRANSPORT,
        Error::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART,
        Error::RD_KAFKA_RESP_ERR_KAFKA_STORAGE_ERROR,
    ];
    for error in passing {
        let cluster = cluster();
        let mut sink = sink(&cluster);
        assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
        cluster.request_errors(Api::Produce, &[error]);
        assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered], "{error:?}");
    }
}

/// A broker that knows nothing of a producer takes whatever comes first. librdkafka believes then that it also has the
/// requests before that, which it refused for a moment.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_never_took_is_not_delivered_and_nothing_of_its_key_goes_before() {
    let passing = [
        (Error::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION, 1),
        (Error::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION, 20),
        (Error::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART, 3),
        (Error::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS, 3),
    ];
    for (error, keys) in passing {
        let cluster = cluster();
        cluster.create_topic("one", 1, 1).unwrap();
        let config = quick(cluster.bootstrap_servers()).option("batch.num.messages", "1");
        let mut sink = KafkaSink::new(&config).unwrap();
        cluster
            .broker_round_trip_time(1, Duration::from_millis(50))
            .unwrap();
        cluster.request_errors(Api::Produce, &[error]);
        let batch: Vec<_> = (0..20)
            .map(|n| text("one", &(n % keys).to_string(), n.to_string()))
            .collect();
        let (outcomes, _) = deliver(&mut sink, batch).await;
        assert_eq!(outcomes, vec![Outcome::Delivered; 20], "{error:?}");
        let arrived = payloads(&read_all(&cluster.bootstrap_servers(), "one"));
        for key in 0..keys {
            let mut seen = Vec::new();
            for n in arrived.iter().map(|text| text.parse::<i32>().unwrap()) {
                if n % keys == key && !seen.contains(&n) {
                    seen.push(n);
                }
            }
            let all: Vec<i32> = (0..20).filter(|n| n % keys == key).collect();
            assert_eq!(seen, all, "{error:?}, {keys} keys: {arrived:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_refuses_is_poison_and_the_next_message_is_fine() {
    let refusals = [
        Error::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE,
        Error::RD_KAFKA_RESP_ERR_INVALID_RECORD,
        Error::RD_KAFKA_RESP_ERR_POLICY_VIOLATION,
    ];
    for error in refusals {
        let cluster = cluster();
        let mut sink = sink(&cluster);
        // Refused once as a batch and once for itself.
        cluster.request_errors(Api::Produce, &[error, error]);
        let (outcomes, purges) = deliver(&mut sink, one()).await;
        assert!(
            matches!(outcomes[0], Outcome::Poison(_)),
            "{error:?}: {outcomes:?}"
        );
        assert_eq!(purges, 1, "{error:?}");
        assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered], "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forbidden_topic_is_blocked_and_others_flow() {
    let refusals = [
        Error::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED,
        // Of this machine's clock, which has nothing to do with the message.
        Error::RD_KAFKA_RESP_ERR_INVALID_TIMESTAMP,
    ];
    for error in refusals {
        let cluster = cluster();
        let mut sink = sink(&cluster);
        cluster.request_errors(Api::Produce, &[error]);
        let (outcomes, _) = deliver(&mut sink, one()).await;
        let Outcome::TopicBlocked(reason) = &outcomes[0] else {
            panic!("{error:?}: {outcomes:?}");
        };
        assert!(reason.as_str().contains("topic t"), "{reason}");
        let (outcomes, _) = deliver(&mut sink, vec![text("other", "k", "v")]).await;
        assert_eq!(outcomes, [Outcome::Delivered], "{error:?}");
    }
}

/// Each goes for itself then, and librdkafka goes on behind a refusal.
#[tokio::test(flavor = "multi_thread")]
async fn behind_a_refusal_of_the_topic_only_what_is_on_the_wire_goes_on() {
    let refusals = [
        Error::RD_KAFKA_RESP_ERR_INVALID_TIMESTAMP,
        Error::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED,
    ];
    for error in refusals {
        let cluster = cluster();
        let mut sink = sink(&cluster);
        let poison = Error::RD_KAFKA_RESP_ERR_POLICY_VIOLATION;
        cluster.request_errors(Api::Produce, &[poison, poison]);
        deliver(&mut sink, one()).await;

        cluster
            .broker_round_trip_time(1, Duration::from_millis(100))
            .unwrap();
        cluster.request_errors(Api::Produce, &[error]);
        let batch = (0..200).map(|n| text("t", "k", n.to_string())).collect();
        let outcomes = publish(&mut sink, batch).await;
        let classes = count(&outcomes);
        assert_eq!(outcomes[0].as_str(), "topic_blocked", "{error:?}: {classes:?}");
        // Five requests go at a time, and their answers make room for five more before anybody can say no.
        let delivered = classes.get("delivered").copied().unwrap_or(0);
        assert!(delivered < 10, "{error:?}: {classes:?}");
        assert_eq!(
            classes["topic_blocked"],
            200 - delivered,
            "{error:?}: {classes:?}"
        );
        // Nobody has to purge for this.
        assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered], "{error:?}");
    }
}

/// The relay hears of nothing but the topic, and need not purge.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_refused_while_a_batch_waits_for_room_can_be_tried_again() {
    let cluster = cluster();
    let config = quick(cluster.bootstrap_servers()).option("queue.buffering.max.messages", "10");
    let mut sink = KafkaSink::new(&config).unwrap();
    let poison = Error::RD_KAFKA_RESP_ERR_POLICY_VIOLATION;
    cluster.request_errors(Api::Produce, &[poison, poison]);
    deliver(&mut sink, one()).await;

    cluster
        .broker_round_trip_time(1, Duration::from_millis(20))
        .unwrap();
    cluster.request_errors(Api::Produce, &[Error::RD_KAFKA_RESP_ERR_INVALID_TIMESTAMP]);
    let batch = (0..200).map(|n| text("t", "k", n.to_string())).collect();
    let classes = count(&publish(&mut sink, batch).await);
    assert!(classes["topic_blocked"] > 100, "{classes:?}");
    assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fatal_error_is_broken_and_the_next_producer_works() {
    let cluster = cluster();
    let mut sink = sink(&cluster);
    assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
    cluster.request_errors(
        Api::Produce,
        &[Error::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER],
    );
    let outcomes = publish(&mut sink, one()).await;
    assert!(matches!(outcomes[0], Outcome::Broken(_)), "{outcomes:?}");
    // What the relay had already prepared must not overtake.
    let outcomes = publish(&mut sink, one()).await;
    assert!(matches!(outcomes[0], Outcome::Broken(_)), "{outcomes:?}");
    within(10, sink.purge()).await;
    within(10, sink.rebuild()).await.unwrap();
    assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
}

/// librdkafka drops what it has then, and the reports of that say nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_producer_that_may_not_begin_is_broken_and_says_why() {
    let cluster = cluster();
    cluster.request_errors(
        Api::InitProducerId,
        &[Error::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED],
    );
    let mut sink = sink(&cluster);
    let outcomes = publish(&mut sink, one()).await;
    let Outcome::Broken(reason) = &outcomes[0] else {
        panic!("{outcomes:?}");
    };
    assert!(reason.as_str().contains("authoriz"), "{reason}");
    sink.purge().await;
    sink.rebuild().await.unwrap();
    assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_locally_is_alone() {
    let cluster = cluster();
    let mut sink = sink(&cluster);
    let mut broken = text("t", "k", "broken");
    broken.defect = Some("the row cannot be read".into());
    let mut parts = text("t", "k", "bad name").message.into_parts();
    parts.topic = "no topic".into();
    let mut misnamed = text("t", "k", "bad name");
    misnamed.message = Message::from_stored(parts);
    let batch = vec![
        text("t", "k", "first"),
        record(Message::builder("t").key("k").payload(vec![0; 1_000_001])),
        broken,
        misnamed,
        text("t", "k", "last"),
    ];
    let outcomes = publish(&mut sink, batch).await;
    let classes: Vec<_> = outcomes.iter().map(Outcome::as_str).collect();
    assert_eq!(classes, ["delivered", "poison", "poison", "poison", "delivered"]);
    assert_eq!(
        payloads(&read_all(&cluster.bootstrap_servers(), "t")),
        ["first", "last"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_keeps_the_order() {
    let cluster = cluster();
    let config = quick(cluster.bootstrap_servers()).option("queue.buffering.max.messages", "20");
    let mut sink = KafkaSink::new(&config).unwrap();
    let batch = (0..2_000).map(|n| text("t", "one", n.to_string())).collect();
    assert_eq!(publish(&mut sink, batch).await, vec![Outcome::Delivered; 2_000]);
    let expected: Vec<String> = (0..2_000).map(|n| n.to_string()).collect();
    assert_eq!(payloads(&read_all(&cluster.bootstrap_servers(), "t")), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_broker_is_an_outage_within_seconds_and_recovers() {
    let cluster = cluster();
    let mut sink = sink(&cluster);
    assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
    sink.probe().await.unwrap();

    cluster.broker_down(1).unwrap();
    let outcomes = publish(
        &mut sink,
        (0..100).map(|n| text("t", "k", n.to_string())).collect(),
    )
    .await;
    assert!(
        outcomes
            .iter()
            .all(|outcome| matches!(outcome, Outcome::Outage(_))),
        "{outcomes:?}"
    );
    within(5, sink.probe()).await.unwrap_err();
    // Still the outage, as long as the relay has not purged.
    assert!(matches!(publish(&mut sink, one()).await[0], Outcome::Outage(_)));
    within(5, sink.purge()).await;

    // A new producer that finds nobody says so as well, and why.
    let outcomes = publish(&mut sink, one()).await;
    let Outcome::Outage(reason) = &outcomes[0] else {
        panic!("{outcomes:?}");
    };
    assert!(reason.as_str().contains("Connection refused"), "{reason}");
    within(5, sink.purge()).await;
    let error = within(5, sink.probe()).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");

    cluster.broker_up(1).unwrap();
    let end = Instant::now() + Duration::from_secs(15);
    while let Err(error) = sink.probe().await {
        assert!(Instant::now() < end, "{error:?}");
    }
    let (outcomes, _) = deliver(&mut sink, one()).await;
    assert_eq!(outcomes, [Outcome::Delivered]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_interruption_is_hidden() {
    let cluster = cluster();
    let mut sink = KafkaSink::new(&KafkaConfig::new(cluster.bootstrap_servers())).unwrap();
    assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
    cluster.broker_down(1).unwrap();
    let receipt = sink.publish(one()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    cluster.broker_up(1).unwrap();
    assert_eq!(within(10, receipt.outcomes()).await, [Outcome::Delivered]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_broker_is_not_out() {
    let cluster = cluster();
    cluster.broker_round_trip_time(1, Duration::from_secs(2)).unwrap();
    let mut sink = KafkaSink::new(&KafkaConfig::new(cluster.bootstrap_servers())).unwrap();
    let batch = (0..100).map(|n| text("t", &n.to_string(), "v")).collect();
    assert_eq!(publish(&mut sink, batch).await, vec![Outcome::Delivered; 100]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_without_leader_blocks_its_topic_only() {
    let cluster = cluster();
    let mut sink = KafkaSink::new(&asking(cluster.bootstrap_servers())).unwrap();
    // Not while messages are under way: the mock dies of a message for a partition that it leads no more.
    for partition in 0..4 {
        cluster.partition_leader("t", partition, None).unwrap();
    }
    let outcomes = publish(&mut sink, vec![text("t", "k", "2"), text("other", "k", "3")]).await;
    let Outcome::TopicBlocked(reason) = &outcomes[0] else {
        panic!("{outcomes:?}");
    };
    assert!(reason.as_str().contains("no leader"), "{reason}");
    assert_eq!(outcomes[1], Outcome::Delivered);
    for partition in 0..4 {
        cluster.partition_leader("t", partition, Some(1)).unwrap();
    }
    assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_resolves_everything_and_nothing_leaves_afterwards() {
    let cluster = cluster();
    let mut sink = KafkaSink::new(&KafkaConfig::new(cluster.bootstrap_servers())).unwrap();
    assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
    cluster.broker_down(1).unwrap();
    let mut receipts = Vec::new();
    for batch in 0..3 {
        let records = (0..100).map(|n| text("t", "k", format!("{batch}/{n}"))).collect();
        receipts.push(sink.publish(records).await);
    }
    within(5, sink.purge()).await;
    for receipt in receipts {
        let outcomes = within(1, receipt.outcomes()).await;
        assert_eq!(outcomes.len(), 100);
        assert!(
            outcomes
                .iter()
                .all(|outcome| matches!(outcome, Outcome::Unknown(_))),
            "{outcomes:?}"
        );
    }
    cluster.broker_up(1).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        publish(&mut sink, vec![text("t", "k", "after")]).await,
        [Outcome::Delivered]
    );
    assert_eq!(
        payloads(&read_all(&cluster.bootstrap_servers(), "t")),
        ["v", "after"]
    );
}

/// As one with fewer replicas in sync than it needs: the broker refuses without end, librdkafka tries without end, and the
/// brokers have nothing against it when they are asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_takes_nothing_is_blocked_while_another_flows() {
    let cluster = cluster();
    let mut sink = sink(&cluster);
    // All is well at first, so that the partitions are known.
    assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
    cluster
        .topic_error("t", Error::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS)
        .unwrap();
    let is_blocked = |outcome: &Outcome| matches!(outcome, Outcome::TopicBlocked(reason) if reason.as_str().contains("min.insync.replicas"));
    sink.rebuild().await.unwrap();
    // Of one key two: the second waits for the first, and the batch with it.
    let batch = vec![text("t", "k", "1"), text("other", "k", "1"), text("t", "k", "2")];
    let (outcomes, _) = deliver(&mut sink, batch).await;
    assert!(
        is_blocked(&outcomes[0]) && is_blocked(&outcomes[2]),
        "{outcomes:?}"
    );
    assert_eq!(outcomes[1], Outcome::Delivered);

    // One alone, as it is probed, beside others that flow.
    let probe = sink.publish(one()).await;
    let mut probe = tokio::spawn(probe.outcomes());
    let others_flow_until_it_is_told = async {
        loop {
            let (outcomes, _) = deliver(&mut sink, vec![text("other", "k", "2")]).await;
            assert_eq!(outcomes, [Outcome::Delivered]);
            if let Ok(outcomes) = tokio::time::timeout(Duration::from_millis(100), &mut probe).await {
                return outcomes.unwrap();
            }
        }
    };
    let outcomes = within(60, others_flow_until_it_is_told).await;
    assert!(is_blocked(&outcomes[0]), "{outcomes:?}");

    cluster
        .topic_error("t", Error::RD_KAFKA_RESP_ERR_NO_ERROR)
        .unwrap();
    let (outcomes, _) = deliver(&mut sink, one()).await;
    assert_eq!(outcomes, [Outcome::Delivered]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_purge_keeps_the_producer() {
    let cluster = cluster();
    let mut sink = sink(&cluster);
    assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
    let kept = format!("{sink:?}");
    assert!(kept.contains("producer: Some"), "{kept}");
    sink.purge().await;
    assert_eq!(format!("{sink:?}"), kept);
    assert_eq!(publish(&mut sink, one()).await, [Outcome::Delivered]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_empty_key_has_a_partition_whatever_the_partitioner() {
    let cluster = cluster();
    for partitioner in [
        "murmur2_random",
        "consistent_random",
        "fnv1a_random",
        "consistent",
    ] {
        let config = quick(cluster.bootstrap_servers()).option("partitioner", partitioner);
        let mut sink = KafkaSink::new(&config).unwrap();
        let batch: Vec<_> = (0..20).map(|n| text(partitioner, "", n.to_string())).collect();
        assert_eq!(publish(&mut sink, batch).await, vec![Outcome::Delivered; 20]);
        let found = read_all(&cluster.bootstrap_servers(), partitioner);
        let partitions: std::collections::BTreeSet<i32> = found.iter().map(|raw| raw.partition()).collect();
        assert_eq!(partitions.len(), 1, "{partitioner}: {partitions:?}");
    }
}

/// Java's `Utils.murmur2` of these keys, from Kafka's own tests, as its partitioner uses it.
#[tokio::test(flavor = "multi_thread")]
async fn keys_go_where_java_clients_put_them() {
    let hashes = [
        ("21", -973_932_308_i32),
        ("foobar", -790_332_482),
        ("a-little-bit-long-string", -985_981_536),
        ("a-little-bit-longer-string", -1_486_304_829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
        ("abc", 479_470_107),
    ];
    let cluster = cluster();
    let partitions = 97;
    cluster.create_topic("many", partitions, 1).unwrap();
    let mut sink = sink(&cluster);
    let batch = hashes.iter().map(|(key, _)| text("many", key, *key)).collect();
    assert_eq!(publish(&mut sink, batch).await, vec![Outcome::Delivered; 6]);
    for message in read_all(&cluster.bootstrap_servers(), "many") {
        let key = message.key().unwrap();
        let (_, hash) = hashes.iter().find(|(own, _)| own.as_bytes() == key).unwrap();
        assert_eq!(message.partition(), (hash & 0x7fff_ffff) % partitions, "{key:?}");
    }
}
