//! The one mapping from what the server and the driver say to what to do about it.

use std::fmt;

use mongodb::error::{
    Error as DriverError, ErrorKind as Driver, TRANSIENT_TRANSACTION_ERROR,
    UNKNOWN_TRANSACTION_COMMIT_RESULT, WriteFailure,
};
use outbox_core::{Error, ErrorKind, Result};

/// Names the operation that failed and classifies the error.
pub(crate) trait During<T> {
    fn during(self, operation: &'static str) -> Result<T>;
}

impl<T> During<T> for Result<T, DriverError> {
    fn during(self, operation: &'static str) -> Result<T> {
        self.map_err(|error| classify(operation, error))
    }
}

impl<T> During<T> for Result<T, mongodb::bson::raw::Error> {
    fn during(self, operation: &'static str) -> Result<T> {
        self.map_err(|error| Error::new(ErrorKind::Corrupt, operation, UNREADABLE).with_source(error))
    }
}

const UNREADABLE: &str = "a stored value cannot be understood; was it altered by hand?";

/// The error as the framework's own.
pub(crate) fn classify(operation: &'static str, error: DriverError) -> Error {
    let said = Said::of(error);
    let (kind, text) = explain(&said);
    let text = text.map_or_else(|| said.text.clone(), ToOwned::to_owned);
    let mut told = Error::new(kind, operation, text);
    if let Some(code) = said.code {
        told = told.with("code", code);
    }
    told.with_source(said)
}

/// The driver's own error in one of ours, with its labels, for the callbacks of the driver's transactions: it knows by them
/// what to try again. An error that is not the driver's becomes one of the driver's custom errors.
///
/// ```
/// use outbox_mongo::{Error, ErrorKind, driver_error};
///
/// let error = Error::new(ErrorKind::Invalid, "enqueue", "the message has 20000000 bytes, the limit is 998976");
/// assert!(driver_error(error).get_custom::<Error>().is_some());
/// ```
#[must_use]
pub fn driver_error(error: Error) -> DriverError {
    let said = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<Said>());
    match said {
        Some(said) => said.error.clone(),
        None => DriverError::custom(error),
    }
}

/// What was said. The driver's own words are kept for [`driver_error`] and never printed: they may quote documents.
struct Said {
    code: Option<i32>,
    text: String,
    error: DriverError,
}

impl Said {
    fn of(error: DriverError) -> Self {
        let (code, text) = match error.kind.as_ref() {
            // Not the server's own words, which may quote the whole command, with keys and reasons.
            Driver::Command(command) => (
                Some(command.code),
                format!("the server refused: {}", command.code_name),
            ),
            Driver::Write(WriteFailure::WriteError(write)) => (Some(write.code), REFUSED.to_owned()),
            Driver::Write(WriteFailure::WriteConcernError(concern)) => {
                (Some(concern.code), REFUSED.to_owned())
            }
            Driver::InsertMany(many) => {
                let write = many.write_errors.iter().flatten().next().map(|write| write.code);
                let concern = many.write_concern_error.as_ref().map(|concern| concern.code);
                (write.or(concern), REFUSED.to_owned())
            }
            Driver::Custom(custom) => match custom.downcast_ref::<Refused>() {
                Some(Refused(code)) => (Some(*code), REFUSED.to_owned()),
                None => (None, "the driver failed".to_owned()),
            },
            Driver::Io(io) => (None, io.to_string()),
            Driver::ServerSelection { message, .. } => (None, unreachable(message)),
            Driver::Authentication { message, .. }
            | Driver::ConnectionPoolCleared { message, .. }
            | Driver::DnsResolve { message, .. }
            | Driver::InvalidTlsConfig { message, .. }
            | Driver::IncompatibleServer { message, .. }
            | Driver::Transaction { message, .. } => (None, message.clone()),
            _ => (None, "the driver failed".to_owned()),
        };
        Self { code, text, error }
    }

    fn is(&self, label: &str) -> bool {
        self.error.contains_label(label)
    }
}

/// A write of a command that went through otherwise, as the driver's own error.
pub(crate) struct Refused(pub(crate) i32);

/// Of the driver's whole picture of the servers, why the first of them does not answer.
fn unreachable(message: &str) -> String {
    let why = message
        .split_once("Error: Kind: ")
        .and_then(|(_, rest)| rest.split_once(", labels"));
    match why {
        Some((why, _)) => format!("no server answers that takes writes: {why}"),
        None => message.to_owned(),
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        match self.code {
            Some(code) => write!(f, " ({code})"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Said {}

const REFUSED: &str = "the server refused a write";

/// A unique index refused a document.
const DUPLICATE: i32 = 11_000;
/// A validator refused a document.
const INVALID_DOCUMENT: i32 = 121;
/// Transactions on a server that knows none.
const NO_TRANSACTIONS: i32 = 20;

/// What is said of a server that stands alone.
pub(crate) const STANDALONE: &str = "a server that stands alone has no transactions: run it as a replica set, which may \
                                     have one member (mongod --replSet rs0, then rs.initiate())";

/// Whether a transaction is worth another try as a whole.
pub(crate) fn is_transient(error: &DriverError) -> bool {
    error.contains_label(TRANSIENT_TRANSACTION_ERROR)
}

/// The numbers are those of MongoDB's list of errors.
fn explain(said: &Said) -> (ErrorKind, Option<&'static str>) {
    if let Some(code) = said.code {
        match code {
            NO_TRANSACTIONS => (ErrorKind::Unsupported, Some(STANDALONE)),
            13 => (
                ErrorKind::Denied,
                Some("this account may not do that: grant it the role that grant_script makes"),
            ),
            18 => (
                ErrorKind::Denied,
                Some("the server refused the login: are user, password and authSource right?"),
            ),
            INVALID_DOCUMENT => (
                ErrorKind::Invalid,
                Some(
                    "the collection's validator refused a document: was the outbox made by another version?",
                ),
            ),
            10_334 | 17_419 | 17_420 | 2_108_600 => (
                ErrorKind::Invalid,
                Some("the message is too large for a document, which has at most 16 MiB"),
            ),
            // Write conflicts, aborted transactions, locks that were not had in time, two upserts of one document.
            24 | 112 | 225 | 244 | 246 | 251 | 267 | DUPLICATE => (
                ErrorKind::Conflict,
                Some("another transaction was in the way: run the whole transaction again"),
            ),
            50 | 262 => (
                ErrorKind::Unavailable,
                Some("the command took longer than it may: than statement_timeout, or a part of the lease"),
            ),
            // No primary, shutting down, not enough members for a majority.
            6 | 7 | 43 | 64 | 79 | 89 | 91 | 100 | 134 | 237 | 239 | 133 | 189 | 9_001 | 10_058 | 10_107
            | 11_600 | 11_601 | 11_602 | 13_435 | 13_436 => (
                ErrorKind::Unavailable,
                Some("no primary with a majority answers: is the replica set healthy?"),
            ),
            26 | 48 => (
                ErrorKind::Schema,
                Some("a collection is missing, or is none of ours: run migrate"),
            ),
            _ if said.is(TRANSIENT_TRANSACTION_ERROR) || said.is(UNKNOWN_TRANSACTION_COMMIT_RESULT) => {
                (ErrorKind::Unavailable, None)
            }
            _ => (ErrorKind::Unexpected, None),
        }
    } else {
        explain_client(&said.error)
    }
}

fn explain_client(error: &DriverError) -> (ErrorKind, Option<&'static str>) {
    match error.kind.as_ref() {
        Driver::Authentication { .. } => (
            ErrorKind::Denied,
            Some("the server refused the login: are user, password and authSource right?"),
        ),
        Driver::Io(io) if io.kind() == std::io::ErrorKind::InvalidData => (
            ErrorKind::Unavailable,
            Some(
                "no trusted connection: does the server offer TLS, is its certificate valid for this host, is its CA \
                 known (tlsCAFile)?",
            ),
        ),
        Driver::Io(_) | Driver::ConnectionPoolCleared { .. } => (
            ErrorKind::Unavailable,
            Some("the connection to the server failed: is it up, are host and port right?"),
        ),
        Driver::ServerSelection { .. } | Driver::DnsResolve { .. } => (ErrorKind::Unavailable, None),
        Driver::InvalidTlsConfig { .. } | Driver::InvalidArgument { .. } => {
            (ErrorKind::Invalid, Some("the connection is configured wrongly"))
        }
        Driver::IncompatibleServer { .. } | Driver::SessionsNotSupported => (ErrorKind::Unsupported, None),
        Driver::Transaction { .. } => (ErrorKind::Unsupported, None),
        Driver::BsonDeserialization(_) | Driver::InvalidResponse { .. } => {
            (ErrorKind::Corrupt, Some(UNREADABLE))
        }
        Driver::Shutdown => (ErrorKind::Unavailable, Some("the client was shut down")),
        _ => (ErrorKind::Unexpected, Some("an unexpected error of the driver")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_told_and_not_the_whole_picture() {
        let message = "Server selection timeout: No available servers. Topology: { Type: Unknown, Servers: [ { Address: \
                       db:1, Type: Unknown, Error: Kind: I/O error: Connection refused (os error 111), labels: {}, source: \
                       None } ] }";
        assert_eq!(
            unreachable(message),
            "no server answers that takes writes: I/O error: Connection refused (os error 111)"
        );
        assert_eq!(unreachable("no primary"), "no primary");
    }

    #[test]
    fn errors_of_others_reach_the_driver_whole() {
        let error = Error::new(ErrorKind::Invalid, "enqueue", "too large");
        let custom = driver_error(error);
        let told = custom.get_custom::<Error>().unwrap();
        assert_eq!(told.to_string(), "enqueue: too large");
        let said = classify("settle", DriverError::custom(Refused(112)));
        assert_eq!(said.kind(), ErrorKind::Conflict);
        assert!(driver_error(said).get_custom::<Refused>().is_some());
    }
}
