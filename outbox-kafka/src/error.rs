//! librdkafka's errors as the framework's.

use outbox_core::{Error, ErrorKind};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode as Code;

use crate::classify::{Class, classify};
use crate::config::Redactor;

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

/// A request that failed; `reason` is what the error callback said meanwhile.
pub(crate) fn request(operation: &'static str, error: KafkaError, reason: Option<String>) -> Error {
    let kind = match error.rdkafka_error_code() {
        Some(
            Code::Authentication
            | Code::SaslAuthenticationFailed
            | Code::TopicAuthorizationFailed
            | Code::ClusterAuthorizationFailed,
        ) => ErrorKind::Denied,
        Some(code) if classify(code) == Class::Broken => ErrorKind::Unexpected,
        _ => ErrorKind::Unavailable,
    };
    Error::new(
        kind,
        operation,
        reason.unwrap_or_else(|| "the brokers do not answer".into()),
    )
    .with_source(error)
}
