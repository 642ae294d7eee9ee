//! Against a real broker with TLS, logins and access lists.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Operation, deliver, env, grant, login, new_topic, publish, quick, text, within};
use outbox_core::{ErrorKind, Outcome, Sink};
use outbox_kafka::{KafkaConfig, KafkaSink};

/// What a sink says when a busy broker has not come to its handshake yet. Then it is asked again, as a relay does.
const NOT_TOLD: [&str; 2] = ["and no error either", "the brokers do not answer"];

/// Messages go nowhere, the reason is told, and nothing hangs.
async fn assert_out(config: KafkaConfig, telling: &str, kind: ErrorKind) {
    let mut sink = KafkaSink::new(&config).unwrap();
    let not_told = |reason: &str| NOT_TOLD.iter().any(|words| reason.contains(words));
    let is_out = |outcomes: &[Outcome], words: &dyn Fn(&str) -> bool| {
        outcomes.iter().all(|outcome| match outcome {
            Outcome::Outage(reason) => words(reason.as_str()),
            other => panic!("{other:?}"),
        })
    };
    let outcomes = again(async || {
        let outcomes = publish(&mut sink, vec![text("t", "k", "v"); 10]).await;
        within(5, sink.purge()).await;
        (!is_out(&outcomes, &not_told)).then_some(outcomes)
    })
    .await;
    assert_eq!(outcomes.len(), 10);
    assert!(
        is_out(&outcomes, &|reason| reason.contains(telling)),
        "{outcomes:?}"
    );
    let error = again(async || {
        let error = within(10, sink.probe()).await.unwrap_err();
        (!not_told(&error.to_string())).then_some(error)
    })
    .await;
    assert!(error.to_string().contains(telling), "{error:?}");
    assert_eq!(error.kind(), kind);
}

/// What is told in one of ten attempts.
async fn again<T>(mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..10 {
        if let Some(told) = attempt().await {
            return told;
        }
    }
    panic!("nothing is told");
}

/// The broker learns of a grant a little later; then it knows of those that were made before, too.
async fn until_granted(topic: &str) {
    let mut sink = KafkaSink::new(&login()).unwrap();
    for _ in 0..50 {
        if publish(&mut sink, vec![text(topic, "k", "v")]).await == [Outcome::Delivered] {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("nothing may be written to {topic}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_without_grant_is_blocked_until_it_is_granted_while_another_flows() {
    let (granted, denied) = (new_topic(1, &[]).await, new_topic(1, &[]).await);
    grant(&granted, Operation::Write);
    until_granted(&granted).await;
    let mut sink = KafkaSink::new(&login()).unwrap();
    let batch = || vec![text(&denied, "k", "v"), text(&granted, "k", "v")];
    let outcomes = publish(&mut sink, batch()).await;
    let Outcome::TopicBlocked(reason) = &outcomes[0] else {
        panic!("{outcomes:?}");
    };
    assert!(reason.as_str().contains("authorization failed"), "{reason}");
    assert_eq!(outcomes[1], Outcome::Delivered);
    sink.probe().await.unwrap();

    grant(&denied, Operation::Write);
    until_granted(&denied).await;
    assert_eq!(
        publish(&mut sink, batch()).await,
        [Outcome::Delivered, Outcome::Delivered]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_may_be_seen_but_not_written_is_blocked_while_another_flows() {
    let (granted, seen) = (new_topic(1, &[]).await, new_topic(1, &[]).await);
    grant(&seen, Operation::Describe);
    grant(&granted, Operation::Write);
    until_granted(&granted).await;
    let mut sink = KafkaSink::new(&login()).unwrap();
    let batch: Vec<_> = (0..100)
        .flat_map(|n| {
            [
                text(&seen, "k", n.to_string()),
                text(&granted, "k", n.to_string()),
            ]
        })
        .collect();
    let (outcomes, purges) = deliver(&mut sink, batch).await;
    for pair in outcomes.chunks(2) {
        assert!(matches!(pair[0], Outcome::TopicBlocked(_)), "{pair:?}");
        assert_eq!(pair[1], Outcome::Delivered);
    }
    assert!(purges <= 1, "{purges}");
    // Each later attempt is refused for itself.
    let (outcomes, purges) = deliver(&mut sink, vec![text(&seen, "k", "0"), text(&granted, "k", "v")]).await;
    assert!(matches!(outcomes[0], Outcome::TopicBlocked(_)), "{outcomes:?}");
    assert_eq!((&outcomes[1], purges), (&Outcome::Delivered, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_an_outage_that_says_so() {
    assert_out(
        login().option("sasl.password", "wrong"),
        "uthentication",
        ErrorKind::Denied,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_authority_is_an_outage_that_says_so() {
    // The system's authorities do not know the tests' one.
    let mut config = login();
    config.options.remove("ssl.ca.location");
    assert_out(config, "certificate verify failed", ErrorKind::Unavailable).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_text_to_a_tls_port_is_an_outage() {
    assert_out(
        quick(env("OUTBOX_TEST_KAFKA_TLS")),
        "expect TLS",
        ErrorKind::Unavailable,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_go_unverified_only_when_the_danger_is_accepted() {
    let topic = new_topic(1, &[]).await;
    grant(&topic, Operation::Write);
    until_granted(&topic).await;
    let mut config = login();
    config.options.remove("ssl.ca.location");
    config.danger_accept_invalid_certificates = true;
    let mut sink = KafkaSink::new(&config).unwrap();
    assert_eq!(
        publish(&mut sink, vec![text(&topic, "k", "v")]).await,
        [Outcome::Delivered]
    );
}

#[test]
fn a_process_that_ends_amid_handshakes_ends_well() {
    for _ in 0..3 {
        // All at once, so that few get to their end undisturbed.
        let children: Vec<_> = (0..8)
            .map(|_| {
                Command::new(std::env::current_exe().unwrap())
                    .args(["--ignored", "--exact", "end_amid_handshakes"])
                    .stdout(Stdio::null())
                    .spawn()
                    .unwrap()
            })
            .collect();
        for mut child in children {
            let status = child.wait().unwrap();
            assert!(status.success(), "{status}");
        }
    }
}

#[tokio::test]
#[ignore = "part of a_process_that_ends_amid_handshakes_ends_well, in a process of its own"]
async fn end_amid_handshakes() {
    let mut config = login()
        .option("reconnect.backoff.ms", "1")
        .option("reconnect.backoff.max.ms", "1");
    // Each handshake fails, and the next begins at once.
    config.options.remove("ssl.ca.location");
    let _sinks: Vec<_> = (0..16).map(|_| KafkaSink::new(&config).unwrap()).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    std::process::exit(0);
}
