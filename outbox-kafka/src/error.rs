//! librdkafka's errors as the framework's.

use outbox_core::{Error, ErrorKind};
use rdkafka::error::KafkaError;

use crate::config::Redactor;
use crate::tracker::Telling;

/// A client that could not be made.
///
/// The source is not kept: [`KafkaError`] prints the value of the option, which may be the password.
pub(crate) fn configuration(error: &KafkaError, redactor: &Redactor) -> Error {
    let error = match error {
        KafkaError::ClientConfig(_, text, option, _) => invalid(redactor.apply(text)).with("option", option),
        KafkaError::ClientCreation(text) => invalid(redactor.apply(text)),
        KafkaError::Nul(_) => invalid("an option has a NUL character".into()),
        other => {
            return Error::new(
                ErrorKind::Unexpected,
                OPERATION,
                redactor.apply(&other.to_string()),
            );
        }
    };
    // Kept out of the common message, because the remedy is another one: build differently.
    if error.to_string().contains("not available at build time") {
        return Error::new(
            ErrorKind::Unsupported,
            OPERATION,
            format!(
                "{error}; enable the cargo feature `ssl` (TLS, SASL), `gssapi` or `zstd` of outbox-kafka"
            ),
        );
    }
    error
}

pub(crate) const OPERATION: &str = "configure kafka sink";

pub(crate) fn invalid(text: String) -> Error {
    Error::new(ErrorKind::Invalid, OPERATION, text)
}

/// A request that failed, and what the client said meanwhile.
pub(crate) fn request(
    operation: &'static str,
    error: KafkaError,
    trouble: Option<(Telling, String)>,
) -> Error {
    let kind = match trouble {
        Some((Telling::Denied, _)) => ErrorKind::Denied,
        _ => ErrorKind::Unavailable,
    };
    let reason = trouble.map_or("the brokers do not answer".into(), |(_, reason)| reason);
    Error::new(kind, operation, reason).with_source(error)
}
