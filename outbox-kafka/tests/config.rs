//! What a configuration may say, and that secrets are never told.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outbox_core::{ErrorKind, Message, Position, Record, Shard, Sink};
use outbox_kafka::{KafkaConfig, KafkaSink};

fn with(options: &[(&str, &str)]) -> KafkaConfig {
    options
        .iter()
        .fold(KafkaConfig::new("localhost:1"), |config, (name, value)| {
            config.option(*name, *value)
        })
}

fn refused(options: &[(&str, &str)]) -> String {
    let error = KafkaSink::new(&with(options)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
    error.to_string()
}

#[test]
fn what_the_promises_rest_on_cannot_be_changed() {
    let forced = [
        ("enable.idempotence", "false"),
        ("acks", "1"),
        ("acks", "0"),
        ("request.required.acks", "1"),
        ("message.timeout.ms", "30000"),
        ("delivery.timeout.ms", "30000"),
        ("retries", "5"),
        ("message.send.max.retries", "0"),
        ("queuing.strategy", "lifo"),
        ("delivery.report.only.error", "true"),
        ("transactional.id", "x"),
        ("enable.gapless.guarantee", "false"),
        ("bootstrap.servers", "elsewhere:9092"),
        ("metadata.broker.list", "elsewhere:9092"),
        ("partitioner", "random"),
        ("linger.ms", "10000"),
        ("queue.buffering.max.ms", "60000"),
        ("message.max.bytes", "100000000"),
    ];
    for (name, value) in forced {
        let error = refused(&[(name, value)]);
        let named = match name {
            "message.max.bytes" => "queue.buffering.max.kbytes",
            name => name,
        };
        assert!(error.contains(&format!("option: {named:?}")), "{error}");
    }
    let error = refused(&[("acks", "1")]);
    assert_eq!(
        error,
        "configure kafka sink: this option is always \"all\": delivered means that every replica in sync has it \
         (option: \"acks\", value: \"1\")"
    );
}

#[test]
fn what_is_forced_may_be_said_again() {
    KafkaSink::new(&with(&[
        ("enable.idempotence", "TRUE"),
        ("acks", "-1"),
        ("delivery.timeout.ms", "0"),
        ("queuing.strategy", "fifo"),
        ("partitioner", "consistent_random"),
        ("queue.buffering.max.ms", "5"),
        ("compression.type", "lz4"),
    ]))
    .unwrap();
}

#[test]
fn options_that_librdkafka_does_not_know_are_named() {
    let error = refused(&[("no.such.option", "1")]);
    assert!(error.contains("no.such.option"), "{error}");
    let error = refused(&[("linger.ms", "soon")]);
    assert!(error.contains("linger.ms"), "{error}");
}

#[test]
fn protection_is_never_dropped_in_silence() {
    let plain_logins = [
        &[("security.protocol", "PLAINTEXT"), ("sasl.username", "relay")][..],
        &[("sasl.mechanism", "PLAIN")],
        &[("security.protocol", "ssl"), ("sasl.password", "secret")],
        &[("ssl.ca.location", "/ca.pem")],
        &[
            ("security.protocol", "SASL_PLAINTEXT"),
            ("ssl.ca.location", "/ca.pem"),
        ],
        &[("enable.ssl.certificate.verification", "true")],
    ];
    for options in plain_logins {
        assert!(refused(options).contains("has no effect under this security.protocol"));
    }
    for weaker in [
        ("enable.ssl.certificate.verification", "false"),
        ("enable.ssl.certificate.verification", "F"),
        ("enable.ssl.certificate.verification", "0"),
        ("ssl.endpoint.identification.algorithm", "none"),
    ] {
        let error = refused(&[("security.protocol", "SSL"), weaker]);
        assert!(error.contains("danger_accept_invalid_certificates"), "{error}");
    }
}

#[test]
fn fields_have_ranges() {
    let check = |config: KafkaConfig| config.validate().unwrap_err().to_string();
    assert!(check(KafkaConfig::default()).contains("bootstrap_servers"));
    assert!(check(KafkaConfig::new(" ")).contains("bootstrap_servers"));
    let error = check(KafkaConfig {
        outage_after: Duration::ZERO,
        ..KafkaConfig::new("localhost:1")
    });
    assert!(
        error.contains("outage_after") && error.contains("100ms to 1h"),
        "{error}"
    );
}

#[test]
fn a_file_may_quote_names_or_not() {
    let config: KafkaConfig = toml::from_str(
        r#"
        bootstrap_servers = "localhost:1"
        outage_after = "15s"

        [options]
        "compression.type" = "lz4"
        linger.ms = 3
        socket.keepalive.enable = false
        "#,
    )
    .unwrap();
    assert_eq!(config.outage_after, Duration::from_secs(15));
    let options: Vec<_> = config
        .options
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    assert_eq!(
        options,
        [
            ("compression.type", "lz4"),
            ("linger.ms", "3"),
            ("socket.keepalive.enable", "false")
        ]
    );
    assert!(toml::from_str::<KafkaConfig>("no_such_field = 1").is_err());
    assert!(toml::from_str::<KafkaConfig>("outage_after = \"soon\"").is_err());
}

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Every text that a sink gives away: what it prints of itself, its errors, its outcomes, its log at the finest.
#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_never_told() {
    let captured = Captured::default();
    let writer = captured.clone();
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .init();
    let mut told = String::new();

    let options = [
        ("security.protocol", "SASL_SSL"),
        ("sasl.mechanism", "PLAIN"),
        ("sasl.username", "canary-name"),
        ("sasl.password", "canary-password"),
        ("ssl.key.password", "canary-passphrase"),
        ("debug", "all"),
    ];
    let config = KafkaConfig {
        outage_after: Duration::from_secs(1),
        outage_after_error: Duration::from_millis(500),
        request_timeout: Duration::from_secs(1),
        ..with(&options)
    };
    told += &format!("{config:?}");
    let mut sink = KafkaSink::new(&config).unwrap();
    told += &format!("{sink:?}");
    let record = Record {
        shard: Shard(0),
        position: Position(0),
        key_seq: None,
        attempts: 0,
        message: Message::builder("t")
            .key("canary-key")
            .payload("canary-payload")
            .header("h", "canary-header")
            .build()
            .unwrap(),
        defect: None,
    };
    told += &format!("{:?}", sink.publish(vec![record]).await.outcomes().await);
    told += &format!("{sink:?}");
    sink.purge().await;
    told += &format!("{:?}", sink.probe().await.unwrap_err());

    // Wrong secrets end up in librdkafka's errors.
    for (name, value) in [
        (
            "ssl.key.pem",
            "-----BEGIN PRIVATE KEY-----\ncanary-key-pem-canary\n-----END PRIVATE KEY-----",
        ),
        ("sasl.oauthbearer.config", "canary oauth"),
        ("sasl.oauthbearer.client.secret", "canary-client-secret"),
        ("sasl.password", "canary\0nul"),
        ("sasl.jaas.config", "password=canary"),
    ] {
        let config = with(&options).option(name, value);
        told += &format!("{config:?}");
        match KafkaSink::new(&config) {
            Ok(sink) => told += &format!("{sink:?}"),
            Err(error) => told += &format!("{error} {error:?}"),
        }
    }
    told += &String::from_utf8_lossy(&captured.0.lock().unwrap());
    assert!(told.contains("librdkafka"), "the log was not captured");
    if let Some(at) = told.find("canary") {
        let around = told.floor_char_boundary(at.saturating_sub(100))..told.ceil_char_boundary(at + 100);
        panic!("{}", &told[around]);
    }
}
