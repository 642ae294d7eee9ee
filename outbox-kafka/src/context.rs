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
use crate::tracker::{Closing, Tracker, outcome};

pub(crate) struct Context {
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
            Code::Fatal => self.tracker.close(Closing::new(Class::Broken, reason)),
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
        match result {
            // The offset may be unknown (-1001): a retry that the broker recognized as such has none.
            Ok(_) => self.tracker.report(number, Outcome::Delivered),
            Err((error, message)) => {
                let outcome = self.failure(error, message.topic());
                self.tracker.report(number, outcome);
            }
        }
    }
}

impl Context {
    fn failure(&self, error: &KafkaError, topic: &str) -> Outcome {
        let code = error.rdkafka_error_code().unwrap_or(Code::Fail);
        let purged = matches!(code, Code::PurgeQueue | Code::PurgeInflight);
        if let Some(closing) = self.tracker.closing()
            && (purged || classify(code) == Class::Broken)
        {
            return closing.outcome();
        }
        let class = classify(code);
        let reason = Reason::from(format!("{code} (topic {topic})"));
        if !matches!(class, Class::Poison | Class::TopicBlocked) {
            // What follows must not go before this one has.
            self.tracker.close(Closing {
                class,
                reason: reason.clone(),
            });
        }
        outcome(class, reason)
    }
}
