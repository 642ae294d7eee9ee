//! What a sink is told, and what it must not be told.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use outbox_core::Result;
use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use serde::{Deserialize, Deserializer};

use crate::error::invalid;

/// Where Kafka is and how to talk to it.
///
/// ```
/// use outbox_kafka::KafkaConfig;
///
/// let config = KafkaConfig::new("kafka-1:9093,kafka-2:9093")
///     .option("security.protocol", "SASL_SSL")
///     .option("sasl.mechanism", "SCRAM-SHA-512")
///     .option("sasl.username", "relay")
///     .option("sasl.password", "hunter2")
///     .option("compression.type", "lz4");
/// assert!(!format!("{config:?}").contains("hunter2"));
/// ```
///
/// In a file, options may be quoted or not, and numbers and booleans as they are:
///
/// ```toml
/// bootstrap_servers = "kafka-1:9093,kafka-2:9093"
/// outage_after = "15s"
///
/// [options]
/// "security.protocol" = "SASL_SSL"
/// sasl.mechanism = "SCRAM-SHA-512"
/// socket.timeout.ms = 30000
/// ```
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KafkaConfig {
    /// The brokers to ask first: `host:port`, separated by commas. Default: empty, which is refused.
    pub bootstrap_servers: String,
    /// [Options of librdkafka's](https://github.com/confluentinc/librdkafka/blob/v2.12.1/CONFIGURATION.md) by their
    /// names there: TLS, SASL, compression, batching. Those on which the sink's promises rest are refused. Default:
    /// none.
    #[serde(deserialize_with = "options")]
    pub options: BTreeMap<String, String>,
    /// After so long without any acknowledgement while messages wait for one, the destination is out. Default: 10 s.
    #[serde(deserialize_with = "outbox_core::human::deserialize")]
    pub outage_after: Duration,
    /// The same when the client has already said that no broker can be reached or let us in. Shorter interruptions
    /// are left to librdkafka, which gets over them in order. Default: 2 s.
    #[serde(deserialize_with = "outbox_core::human::deserialize")]
    pub outage_after_error: Duration,
    /// How long a probe, or the question whether a topic exists, may take. Default: 5 s.
    #[serde(deserialize_with = "outbox_core::human::deserialize")]
    pub request_timeout: Duration,
    /// Accepts any certificate of anybody's and so gives up what TLS is for. Default: false.
    pub danger_accept_invalid_certificates: bool,
}

impl Default for KafkaConfig {
    fn default() -> Self {
        Self {
            bootstrap_servers: String::new(),
            options: BTreeMap::new(),
            outage_after: Duration::from_secs(10),
            outage_after_error: Duration::from_secs(2),
            request_timeout: Duration::from_secs(5),
            danger_accept_invalid_certificates: false,
        }
    }
}

impl KafkaConfig {
    /// The default configuration for these brokers.
    #[must_use]
    pub fn new(bootstrap_servers: impl Into<String>) -> Self {
        Self {
            bootstrap_servers: bootstrap_servers.into(),
            ..Self::default()
        }
    }

    /// Sets an option of librdkafka's.
    #[must_use]
    pub fn option(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.options.insert(name.into(), value.into());
        self
    }

    /// Whether the sink would take this configuration; also done by [`KafkaSink::new`](crate::KafkaSink::new).
    ///
    /// # Errors
    /// [`Invalid`](outbox_core::ErrorKind::Invalid), naming the option, its value unless it may be secret, and why.
    ///
    /// # Example
    /// ```
    /// use outbox_kafka::KafkaConfig;
    ///
    /// let error = KafkaConfig::new("localhost:9092").option("acks", "1").validate().unwrap_err();
    /// assert!(error.to_string().contains("acks"));
    /// ```
    pub fn validate(&self) -> Result<()> {
        self.prepare().map(drop)
    }

    pub(crate) fn redactor(&self) -> Redactor {
        Redactor::new(&self.options)
    }

    /// librdkafka's configuration, checked and completed.
    pub(crate) fn prepare(&self) -> Result<ClientConfig> {
        if self.bootstrap_servers.trim().is_empty() {
            return Err(
                invalid("no broker is given, expected host:port".into()).with("field", "bootstrap_servers")
            );
        }
        for (field, value) in [
            ("outage_after", self.outage_after),
            ("outage_after_error", self.outage_after_error),
            ("request_timeout", self.request_timeout),
        ] {
            if !(MIN_TIME..=MAX_TIME).contains(&value) {
                return Err(invalid("expected 100ms to 1h".into())
                    .with("field", field)
                    .with("value", humantime::format_duration(value)));
            }
        }
        let mut client = ClientConfig::new();
        for (name, value) in DEFAULTS {
            client.set(*name, *value);
        }
        for (name, value) in &self.options {
            refuse(name, value)?;
            for [alias, canonical] in ALIASES {
                if name == alias {
                    client.remove(canonical);
                }
            }
            client.set(name, value);
        }
        for forced in FORCED {
            for name in forced.names {
                client.remove(name);
            }
            if !forced.own_default {
                client.set(forced.names[0], forced.value);
            }
        }
        self.check_sizes(&client)?;
        self.prepare_security(&mut client)?;
        client.set("bootstrap.servers", &self.bootstrap_servers);
        // Lines are filtered again by the subscriber; `debug` options would be pointless without their lines.
        client.set_log_level(if client.get("debug").is_some() {
            RDKafkaLogLevel::Debug
        } else {
            RDKafkaLogLevel::Info
        });
        Ok(client)
    }

    /// Values with which some messages, or all, would never go. What is no number librdkafka refuses by itself.
    fn check_sizes(&self, client: &ClientConfig) -> Result<()> {
        let number = |name| client.get(name)?.trim().parse::<f64>().ok();
        // One of the two is given, or none.
        let [alias, canonical] = ALIASES[0];
        let linger = if client.get(alias).is_some() {
            alias
        } else {
            canonical
        };
        if let Some(pause) = number(linger)
            && pause >= self.outage_after.as_secs_f64() * 1_000.0
        {
            return Err(invalid(
                "a batch that is waited for so long passes for an outage, expected less than outage_after"
                    .into(),
            )
            .with("option", linger)
            .with("value", pause));
        }
        let (queue, message) = ("queue.buffering.max.kbytes", "message.max.bytes");
        if let (Some(room), Some(most)) = (number(queue), number(message))
            && most > room * 1_024.0
        {
            return Err(invalid(format!(
                "a message of {message} would never find room, expected {message} / 1024 at least"
            ))
            .with("option", queue)
            .with("value", room));
        }
        Ok(())
    }

    /// Options that would be ignored in silence, and with them what they were to protect, are refused.
    fn prepare_security(&self, client: &mut ClientConfig) -> Result<()> {
        let protocol = client
            .get("security.protocol")
            .unwrap_or("plaintext")
            .to_ascii_lowercase();
        let (tls, sasl) = (protocol.ends_with("ssl"), protocol.starts_with("sasl_"));
        for name in self.options.keys() {
            let (ignored, expected) = if !sasl && name.starts_with("sasl.") {
                (
                    true,
                    if tls {
                        "SASL_SSL"
                    } else {
                        "SASL_SSL or SASL_PLAINTEXT"
                    },
                )
            } else {
                let about_tls = name.starts_with("ssl.") || name == VERIFICATION;
                (
                    !tls && about_tls,
                    if sasl { "SASL_SSL" } else { "SSL or SASL_SSL" },
                )
            };
            if ignored {
                return Err(invalid(format!(
                    "this option has no effect under this security.protocol, expected {expected}"
                ))
                .with("option", name)
                .with("security.protocol", &protocol));
            }
        }
        if sasl && !tls {
            tracing::warn!("SASL_PLAINTEXT: credentials and messages cross the network without encryption");
        }
        if !tls {
            return Ok(());
        }
        let given = |name: &str, value: &str| {
            self.options
                .get(name)
                .is_some_and(|given| given.trim().eq_ignore_ascii_case(value))
        };
        if self.danger_accept_invalid_certificates {
            tracing::warn!("danger_accept_invalid_certificates: the broker's certificate is not verified");
            client.set(VERIFICATION, "false");
        } else {
            let off = [
                (VERIFICATION, "false"),
                (VERIFICATION, "f"),
                (VERIFICATION, "0"),
                (HOST_CHECK, "none"),
            ];
            for (name, value) in off {
                if given(name, value) {
                    return Err(invalid(
                        "anybody could pass for the broker; if that is meant, set danger_accept_invalid_certificates"
                            .into(),
                    )
                    .with("option", name)
                    .with("value", value));
                }
            }
        }
        // Without this, some builds of OpenSSL look for the system's certificates where there are none.
        if !self.options.keys().any(|name| name.starts_with("ssl.ca.")) {
            client.set("ssl.ca.location", "probe");
        }
        Ok(())
    }
}

const VERIFICATION: &str = "enable.ssl.certificate.verification";
const HOST_CHECK: &str = "ssl.endpoint.identification.algorithm";
const MIN_TIME: Duration = Duration::from_millis(100);
const MAX_TIME: Duration = Duration::from_secs(3_600);

/// Values of options that are not secret are shown; all others may be.
impl fmt::Debug for KafkaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Shown<'a>(&'a BTreeMap<String, String>);
        impl fmt::Debug for Shown<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let shown = |name: &str, value| if HARMLESS.contains(&name) { value } else { "***" };
                f.debug_map()
                    .entries(
                        self.0
                            .iter()
                            .map(|(name, value)| (name, shown(name, value.as_str()))),
                    )
                    .finish()
            }
        }
        f.debug_struct("KafkaConfig")
            .field("bootstrap_servers", &self.bootstrap_servers)
            .field("options", &Shown(&self.options))
            .field("outage_after", &self.outage_after)
            .field("outage_after_error", &self.outage_after_error)
            .field("request_timeout", &self.request_timeout)
            .field(
                "danger_accept_invalid_certificates",
                &self.danger_accept_invalid_certificates,
            )
            .finish()
    }
}

/// Ours where librdkafka's own would not do.
const DEFAULTS: &[(&str, &str)] = &[
    ("client.id", "outbox"),
    // The relay hands over whole batches and waits for them: lingering at their end only delays.
    ("linger.ms", "0"),
    // librdkafka's own is 1 GiB.
    ("queue.buffering.max.kbytes", "65536"),
    // The partition of a key is then the one that Java clients choose.
    ("partitioner", "murmur2_random"),
    ("socket.keepalive.enable", "true"),
    // librdkafka's own is 10 s, which turns an interruption of one second into an outage.
    ("reconnect.backoff.max.ms", "1000"),
];

/// Other names of options that have a default here.
const ALIASES: &[[&str; 2]] = &[["queue.buffering.max.ms", "linger.ms"]];

/// An option on which a promise of the sink's rests.
struct Forced {
    /// The option, then its aliases.
    names: &'static [&'static str],
    value: &'static str,
    /// Other ways to say the same.
    same: &'static [&'static str],
    /// Whether it is librdkafka's own default: then it is not set, because librdkafka warns of setting some.
    own_default: bool,
    why: &'static str,
}

const FORCED: &[Forced] = &[
    Forced {
        names: &["enable.idempotence"],
        value: "true",
        same: &["1", "t"],
        own_default: false,
        why: "without it a retry puts a message behind its successors",
    },
    Forced {
        names: &["acks", "request.required.acks"],
        value: "all",
        same: &["-1"],
        own_default: false,
        why: "delivered means that every replica in sync has it",
    },
    Forced {
        names: &["message.timeout.ms", "delivery.timeout.ms"],
        value: "0",
        same: &[],
        own_default: false,
        why: "the successors of a message that timed out would overtake it; see outage_after",
    },
    Forced {
        names: &["message.send.max.retries", "retries"],
        value: "2147483647",
        same: &[],
        own_default: true,
        why: "the successors of a message that was given up would overtake it",
    },
    Forced {
        names: &["queuing.strategy"],
        value: "fifo",
        same: &[],
        own_default: true,
        why: "messages of a key must leave in order",
    },
    Forced {
        names: &["delivery.report.only.error"],
        value: "false",
        same: &["0", "f"],
        own_default: true,
        why: "a message without a report is never settled",
    },
];

/// The partitioner that has a place for each key but the empty one, and what place `consistent` has for that.
pub(crate) const NO_EMPTY_KEY: (&str, i32) = ("consistent_random", 0);

/// Options that are ours to set.
const REFUSED: &[(&str, &str)] = &[
    ("bootstrap.servers", "it is set by the field bootstrap_servers"),
    ("metadata.broker.list", "it is set by the field bootstrap_servers"),
    ("transactional.id", "the sink does not write in transactions"),
    (
        "enable.gapless.guarantee",
        "the sink sets it by itself, so that a refusal harms no other message",
    ),
];

fn refuse(name: &str, value: &str) -> Result<()> {
    for forced in FORCED {
        let same = |other: &&str| value.trim().eq_ignore_ascii_case(other);
        if forced.names.contains(&name) && !same(&forced.value) && !forced.same.iter().any(same) {
            return Err(invalid(format!(
                "this option is always {:?}: {}",
                forced.value, forced.why
            ))
            .with("option", name)
            .with("value", value));
        }
    }
    if name == "partitioner" && value.trim() == "random" {
        return Err(invalid(
            "this option cannot be random: messages of a key must go to one partition".into(),
        )
        .with("option", name));
    }
    match REFUSED.iter().find(|(refused, _)| *refused == name) {
        Some((_, why)) => Err(invalid(format!("this option cannot be given: {why}")).with("option", name)),
        None => Ok(()),
    }
}

/// Options whose values may be printed.
const HARMLESS: &[&str] = &[
    "batch.num.messages",
    "batch.size",
    "client.id",
    "client.rack",
    "compression.codec",
    "compression.level",
    "compression.type",
    "debug",
    "linger.ms",
    "max.in.flight",
    "max.in.flight.requests.per.connection",
    "message.max.bytes",
    "partitioner",
    "queue.buffering.max.kbytes",
    "queue.buffering.max.messages",
    "queue.buffering.max.ms",
    "reconnect.backoff.max.ms",
    "reconnect.backoff.ms",
    "sasl.mechanism",
    "sasl.mechanisms",
    "security.protocol",
    "socket.timeout.ms",
    "ssl.ca.location",
    "ssl.endpoint.identification.algorithm",
    "statistics.interval.ms",
];

/// Takes secrets out of whatever librdkafka says.
#[derive(Clone, Default)]
pub(crate) struct Redactor(Vec<String>);

impl Redactor {
    fn new(options: &BTreeMap<String, String>) -> Self {
        let secret = |name: &str| {
            const WORDS: [&str; 9] = [
                "password",
                "passphrase",
                "secret",
                "key.pem",
                "keystore",
                "token",
                "jaas",
                "config",
                "assertion",
            ];
            WORDS.iter().any(|word| name.contains(word)) && !name.ends_with("url")
        };
        let mut secrets: Vec<String> = options
            .iter()
            .filter(|(name, _)| secret(name))
            // A key is printed, if at all, line by line.
            .flat_map(|(_, value)| std::iter::once(value.trim()).chain(value.lines().map(str::trim)))
            .filter(|text| text.len() >= 3 && !text.starts_with("-----"))
            .map(str::to_owned)
            .collect();
        // A secret that contains another one goes first, whole.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        secrets.dedup();
        Self(secrets)
    }

    /// `text` without secrets.
    pub(crate) fn apply(&self, text: &str) -> String {
        self.0
            .iter()
            .fold(text.to_owned(), |text, secret| text.replace(secret, "***"))
    }
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Redactor")
    }
}

/// Options as a flat or nested map of strings, numbers and booleans.
fn options<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Node {
        Bool(bool),
        Integer(i64),
        Float(f64),
        Text(String),
        // An unquoted `linger.ms = 5` is a table in TOML.
        Map(BTreeMap<String, Node>),
    }

    fn flatten(prefix: &str, nodes: BTreeMap<String, Node>, flat: &mut BTreeMap<String, String>) {
        for (name, node) in nodes {
            let name = if prefix.is_empty() {
                name
            } else {
                format!("{prefix}.{name}")
            };
            let value = match node {
                Node::Bool(value) => value.to_string(),
                Node::Integer(value) => value.to_string(),
                Node::Float(value) => value.to_string(),
                Node::Text(value) => value,
                Node::Map(nodes) => {
                    flatten(&name, nodes, flat);
                    continue;
                }
            };
            flat.insert(name, value);
        }
    }

    let mut flat = BTreeMap::new();
    flatten("", BTreeMap::deserialize(deserializer)?, &mut flat);
    Ok(flat)
}
