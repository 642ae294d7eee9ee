//! What librdkafka calls back.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use outbox_core::{Outcome, Reason};
use rdkafka::ClientContext;
use rdkafka::Message;
use rdkafka::config::RDKafkaLogLevel as Level;
use rdkafka::error::KafkaError;
use rdkafka::producer::{DeliveryResult, Producer as _, ProducerContext, PurgeConfig};
use rdkafka::types::RDKafkaErrorCode as Code;

use crate::classify::{Class, classify, is_local};
use crate::config::Redactor;
use crate::firsts::Firsts;
use crate::producer::{Client, Lane};
use crate::suspects::Suspects;
use crate::tracker::{Closing, Telling, Tracker, outcome};

/// What librdkafka has for an offset that no broker gave: `RD_KAFKA_OFFSET_INVALID`.
const NO_OFFSET: i64 = -1001;

/// The option with which nothing follows a refused batch.
pub(crate) const GAPLESS: &str = "enable.gapless.guarantee";

pub(crate) struct Context {
    pub(crate) lane: Lane,
    pub(crate) suspects: Suspects,
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) redactor: Redactor,
    /// Whose context it is.
    pub(crate) client: OnceLock<Weak<Client>>,
    /// Whether its queue was dropped.
    pub(crate) dropped: AtomicBool,
    pub(crate) firsts: Firsts,
    /// The partition of the empty key, where librdkafka would give its messages any.
    pub(crate) empty_key: Option<i32>,
}

impl ClientContext for Context {
    fn log(&self, level: Level, facility: &str, line: &str) {
        let line = self.redactor.apply(line);
        // Some reasons are only logged, such as plain text sent to a port for TLS.
        if facility == "FAIL" {
            let reason = line.split_once("]: ").map_or(line.as_str(), |(_, reason)| reason);
            if reason.contains("APIVERSION_QUERY") {
                // Cut off at the first word: the usual reason is that the two do not speak the same language.
                let reason = format!("{reason}; does the port expect TLS, or none?");
                self.tracker.trouble(Telling::Connection, &reason, false);
            } else {
                self.tracker.trouble(Telling::Connection, reason, false);
            }
        }
        // Ours, and meant.
        let ours = facility == "CONFWARN" && line.contains(GAPLESS)
            || facility == "FATAL" && line.contains("Gap-less");
        match level {
            _ if ours => tracing::debug!(target: "librdkafka", facility, "{line}"),
            Level::Emerg | Level::Alert | Level::Critical | Level::Error => {
                tracing::error!(target: "librdkafka", facility, "{line}");
            }
            Level::Warning => tracing::warn!(target: "librdkafka", facility, "{line}"),
            Level::Notice | Level::Info => tracing::info!(target: "librdkafka", facility, "{line}"),
            Level::Debug => tracing::debug!(target: "librdkafka", facility, "{line}"),
        }
    }

    fn stats_raw(&self, statistics: &[u8]) {
        tracing::debug!(target: "librdkafka::stats", "{}", String::from_utf8_lossy(statistics));
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let Some(code) = error.rdkafka_error_code() else {
            return;
        };
        let reason = self.redactor.apply(reason);
        tracing::debug!(?code, reason, "the client reports an error");
        match code {
            // A refusal in the fast lane comes as a fatal error as well, but nothing is broken but this client.
            Code::GaplessGuarantee => {
                self.tracker
                    .close(Closing::new(Class::Unknown, &reason).draining());
                if let Some(topic) = refused_topic(&reason) {
                    self.suspects.add(topic);
                }
            }
            // A fatal error comes with the code of its cause, and is told before what librdkafka drops because of it.
            code if classify(code) == Class::Broken => {
                self.tracker.close(Closing::new(Class::Broken, reason).draining());
            }
            Code::Authentication | Code::SaslAuthenticationFailed | Code::ClusterAuthorizationFailed => {
                self.tracker.trouble(Telling::Denied, &reason, true);
            }
            Code::SSL => self.tracker.trouble(Telling::Certificate, &reason, true),
            Code::AllBrokersDown => self.tracker.trouble(Telling::Number, &reason, true),
            _ => self.tracker.trouble(Telling::Connection, &reason, false),
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, number: usize) {
        let outcome = match result {
            Ok(message) if message.offset() == NO_OFFSET => {
                // Nobody has said that it was written. librdkafka takes it for written when what follows it was: but a
                // broker that knows nothing of the producer accepts that after it has refused this one.
                let topic = message.topic();
                let reason = format!("acknowledged without its place in the topic {topic}");
                self.close(Class::Unknown, reason.into(), topic)
            }
            Ok(_) => Outcome::Delivered,
            Err((error, message)) => self.failure(error, message.topic(), number),
        };
        let (Ok(message) | Err((_, message))) = result;
        let taken = (outcome == Outcome::Delivered).then(|| message.partition());
        self.firsts.told(message.topic(), message.key(), taken);
        if self.lane == Lane::Careful {
            self.tracker.leave_careful();
        }
        self.tracker.report(number, outcome);
    }
}

impl Context {
    fn failure(&self, error: &KafkaError, topic: &str, number: usize) -> Outcome {
        let code = error.rdkafka_error_code().unwrap_or(Code::Fail);
        let class = classify(code);
        let hint = match code {
            Code::InvalidTimestamp => "; is this machine's clock right?",
            _ => "",
        };
        let reason = Reason::from(format!("{code} (topic {topic}{hint})"));
        match (class, self.lane) {
            // We purge only what is closed already, so this is librdkafka's own doing, after a fatal error.
            _ if code == Code::PurgeQueue => {
                let told = self.tracker.last_trouble().map(|(_, reason)| reason.into());
                self.close(Class::Broken, told.unwrap_or(reason), topic)
            }
            (Class::Poison, Lane::Careful) => {
                self.suspects.add(topic);
                Outcome::Poison(reason)
            }
            // It may have been refused for another one's sake; which one, the careful lane will show.
            (Class::Poison, Lane::Fast) => {
                let outcome = self.close(Class::Unknown, reason, topic);
                self.suspects.add(topic);
                outcome
            }
            (Class::TopicBlocked, lane) => {
                // Elsewhere it becomes a suspect, if at all, by the fatal error that tells of a refusal.
                if lane == Lane::Careful {
                    self.suspects.add(topic);
                }
                self.tracker.note_unwritable(topic);
                let outcome = Outcome::TopicBlocked(reason.clone());
                let has_successors = self.tracker.refuse_topic(number, topic, &outcome);
                // The topic may take what follows, which must not go before this one has. What librdkafka itself ends, it
                // ends for all of the topic.
                if has_successors && !is_local(code) {
                    let blocked = HashMap::from([(topic.into(), reason)]);
                    self.tracker.close(Closing::blocked(blocked));
                    // Once: a refusal may be told for each of thousands of messages.
                    if !self.dropped.swap(true, Ordering::Relaxed) {
                        self.drop_queue();
                    }
                }
                outcome
            }
            // What follows must not go before this one has.
            (Class::Outage | Class::Unknown | Class::Broken, _) => self.close(class, reason, topic),
        }
    }

    /// At once, and not only when all that has happened meanwhile is told.
    fn drop_queue(&self) {
        if let Some(client) = self.client.get().and_then(Weak::upgrade) {
            self.tracker.settle_in();
            client.purge(PurgeConfig::default().queue());
        }
    }

    /// The outcome with which the producer is closed, now or before.
    fn close(&self, class: Class, reason: Reason, topic: &str) -> Outcome {
        self.tracker
            .close(Closing::new(class, reason.as_str()).draining());
        self.tracker
            .closing()
            .map_or_else(|| outcome(class, reason), |closing| closing.outcome(topic))
    }
}

/// The topic in librdkafka's sentence about a refusal, which is the only place where it stands. What we purged ourselves
/// while it was under way comes in the same words, and nobody has refused it.
fn refused_topic(reason: &str) -> Option<&str> {
    let (_, rest) = reason.split_once("ProduceRequest for ")?;
    let (topic, rest) = rest.split_once(" [")?;
    (!rest.contains(" failed: Local: ")).then_some(topic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refused_topic_is_found_in_the_sentence() {
        let reason = "Fatal error: Local: Gap-less ordering would not be guaranteed if proceeding: ProduceRequest for \
                      orders.v1 [12] with 3 message(s) failed: Broker: Policy violation (broker 1 PID{Id:1,Epoch:0}, \
                      base seq 0): unable to satisfy gap-less guarantee";
        assert_eq!(refused_topic(reason), Some("orders.v1"));
        let purged = reason.replace("Broker: Policy violation", "Local: Purged in flight");
        assert_eq!(refused_topic(&purged), None);
        assert_eq!(refused_topic("something else"), None);
    }
}
