//! What librdkafka calls back.

use std::sync::Arc;

use outbox_core::{Outcome, Reason};
use rdkafka::ClientContext;
use rdkafka::Message;
use rdkafka::config::RDKafkaLogLevel as Level;
use rdkafka::error::KafkaError;
use rdkafka::producer::{DeliveryResult, ProducerContext};
use rdkafka::types::RDKafkaErrorCode as Code;

use crate::classify::{Class, classify};
use crate::config::Redactor;
use crate::producer::Lane;
use crate::suspects::Suspects;
use crate::tracker::{Closing, Tracker, outcome};

pub(crate) struct Context {
    pub(crate) lane: Lane,
    pub(crate) suspects: Suspects,
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) redactor: Redactor,
}

impl ClientContext for Context {
    fn log(&self, level: Level, facility: &str, line: &str) {
        let line = self.redactor.apply(line);
        match level {
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
            Code::Fatal if reason.contains("gap-less") => {
                self.tracker
                    .close(Closing::new(Class::Unknown, reason).draining());
            }
            Code::Fatal => self.tracker.close(Closing::new(Class::Broken, reason).draining()),
            Code::Authentication | Code::SaslAuthenticationFailed | Code::SSL => {
                self.tracker.trouble(reason, 2, true);
            }
            // It says only how many brokers there are; what the single one said tells more.
            Code::AllBrokersDown => self.tracker.trouble(reason, 0, true),
            _ => self.tracker.trouble(reason, 1, false),
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, number: usize) {
        let outcome = match result {
            // The offset may be unknown (-1001): a retry that the broker recognized as such has none.
            Ok(_) => Outcome::Delivered,
            Err((error, message)) => self.failure(error, message.topic()),
        };
        if self.lane == Lane::Careful {
            self.tracker.out_of_careful();
        }
        self.tracker.report(number, outcome);
    }
}

impl Context {
    fn failure(&self, error: &KafkaError, topic: &str) -> Outcome {
        let code = error.rdkafka_error_code().unwrap_or(Code::Fail);
        let class = classify(code);
        let reason = Reason::from(format!("{code} (topic {topic})"));
        let closing = self.tracker.closing();
        match (class, self.lane) {
            (Class::Poison, Lane::Careful) => {
                self.suspects.add(topic);
                Outcome::Poison(reason)
            }
            // It may have been refused for another one's sake; which one, the careful lane will show.
            (Class::Poison, Lane::Fast) => {
                self.suspects.add(topic);
                self.close(Class::Unknown, reason)
            }
            (Class::TopicBlocked, lane) => {
                // Found out by the broker and not before: that was a refusal, and closed the producer.
                if lane == Lane::Careful || closing.is_some() {
                    self.suspects.add(topic);
                }
                Outcome::TopicBlocked(reason)
            }
            // What follows must not go before this one has.
            (Class::Outage | Class::Unknown | Class::Broken, _) => self.close(class, reason),
        }
    }

    /// The outcome with which the producer is closed, now or before.
    fn close(&self, class: Class, reason: Reason) -> Outcome {
        self.tracker
            .close(Closing::new(class, reason.as_str()).draining());
        self.tracker
            .closing()
            .map_or_else(|| outcome(class, reason), |closing| closing.outcome())
    }
}
