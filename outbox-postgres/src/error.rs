//! The one mapping from what PostgreSQL and sqlx say to what to do about it.

use std::fmt;

use outbox_core::{Error, ErrorKind, Result};
use sqlx::postgres::PgDatabaseError;

/// Names the operation that failed and classifies the error.
pub(crate) trait During<T> {
    fn during(self, operation: &'static str) -> Result<T>;
}

impl<T> During<T> for sqlx::Result<T> {
    fn during(self, operation: &'static str) -> Result<T> {
        self.map_err(|error| classify(operation, error))
    }
}

/// The error as the framework's own.
pub(crate) fn classify(operation: &'static str, error: sqlx::Error) -> Error {
    match error {
        sqlx::Error::Database(database) => {
            let database = database.downcast_ref::<PgDatabaseError>();
            let said = Said {
                code: database.code().to_owned(),
                text: database.message().to_owned(),
                constraint: database.constraint().map(str::to_owned),
            };
            let (kind, remedy) = explain(&said);
            match remedy {
                Some(remedy) => Error::new(kind, operation, remedy).with("sqlstate", &said.code),
                None => Error::new(kind, operation, said.text.clone()).with("sqlstate", &said.code),
            }
            .with_source(said)
        }
        other => {
            let (kind, text) = explain_client(&other);
            Error::new(kind, operation, text).with_source(other)
        }
    }
}

/// What the server said, without the detail, which may quote a row and with it a payload.
#[derive(Debug)]
struct Said {
    code: String,
    text: String,
    constraint: Option<String>,
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.text, self.code)
    }
}

impl std::error::Error for Said {}

const UNTRUSTED: &str = "no trusted connection: does the server offer TLS, is its certificate valid for this host, is its \
                         CA known (sslrootcert), was this program built with TLS?";

fn explain_client(error: &sqlx::Error) -> (ErrorKind, &'static str) {
    match error {
        // What the TLS library refuses comes as such an error of the socket's.
        sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            (ErrorKind::Unavailable, UNTRUSTED)
        }
        sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::NotFound => (
            ErrorKind::Unavailable,
            "a file is not there: is the server up that should have made its socket, or is sslrootcert wrong?",
        ),
        sqlx::Error::Io(_) => (
            ErrorKind::Unavailable,
            "the connection to the server failed: is it up, are host and port right?",
        ),
        sqlx::Error::Tls(_) => (ErrorKind::Unavailable, UNTRUSTED),
        sqlx::Error::PoolTimedOut => (
            ErrorKind::Unavailable,
            "no connection became free in time: the server is slow or max_connections too low",
        ),
        sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => {
            (ErrorKind::Unavailable, "the connection was closed meanwhile")
        }
        sqlx::Error::BeginFailed => (
            ErrorKind::Unavailable,
            "no transaction could be begun on this connection",
        ),
        sqlx::Error::Protocol(_) => (
            ErrorKind::Unavailable,
            "the server's answer could not be understood, or the connection broke off in the middle of one",
        ),
        sqlx::Error::Configuration(_) | sqlx::Error::InvalidArgument(_) => {
            (ErrorKind::Invalid, "the connection is configured wrongly")
        }
        sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::Decode(_)
        | sqlx::Error::ColumnIndexOutOfBounds { .. } => (
            ErrorKind::Corrupt,
            "a stored value cannot be understood; was the schema altered?",
        ),
        _ => (ErrorKind::Unexpected, "an unexpected error of the driver"),
    }
}

fn explain(said: &Said) -> (ErrorKind, Option<&'static str>) {
    if said
        .constraint
        .as_deref()
        .is_some_and(|name| name.ends_with("_use_enqueue_function"))
    {
        return (
            ErrorKind::Invalid,
            Some(
                "this outbox numbers its messages: enqueue through the library or the SQL function, not by INSERT",
            ),
        );
    }
    let code = said.code.as_str();
    match code {
        "40001" => (
            ErrorKind::Conflict,
            Some("serialization failure: repeat the transaction"),
        ),
        "40P01" => (
            ErrorKind::Conflict,
            Some("deadlock with another session: repeat the transaction"),
        ),
        "55P03" => (ErrorKind::Conflict, Some("a lock was not available in time")),
        "57014" => (
            ErrorKind::Unavailable,
            Some("the statement was cancelled, most likely by statement_timeout"),
        ),
        "57P01" | "57P02" | "57P03" | "57P05" => (
            ErrorKind::Unavailable,
            Some("the server is starting, stopping or restarting"),
        ),
        "53100" => (
            ErrorKind::Unavailable,
            Some("the server's disk is full: make room, then it goes on by itself"),
        ),
        "53300" => (
            ErrorKind::Unavailable,
            Some("the server has no connection left: raise its max_connections, or lower ours"),
        ),
        "25006" => (
            ErrorKind::Unavailable,
            Some("the server takes no writes: is it a standby, or default_transaction_read_only set?"),
        ),
        "25P02" => (
            ErrorKind::Invalid,
            Some("an earlier statement of this transaction failed: roll back"),
        ),
        "42501" => (
            ErrorKind::Denied,
            Some("the role lacks a right: run the GRANT statements for this role (see `grant_sql`)"),
        ),
        "3D000" => (
            ErrorKind::Invalid,
            Some("there is no database of this name: is the URL right?"),
        ),
        "42P01" | "3F000" | "42703" | "42883" | "42704" => (
            ErrorKind::Schema,
            Some("the outbox is not there, or not as this version made it: run migrate"),
        ),
        "42P07" | "42723" => (
            ErrorKind::Schema,
            Some("a table or function of such a name exists that is none of ours: choose another prefix"),
        ),
        _ if code.starts_with("08") || code.starts_with("53") || code.starts_with("57") => {
            (ErrorKind::Unavailable, None)
        }
        _ if code.starts_with("28") => (
            ErrorKind::Denied,
            Some("the server refused user or password, or connections from here (pg_hba.conf)"),
        ),
        _ if code.starts_with("22") || code.starts_with("23") || code.starts_with("25") => {
            (ErrorKind::Invalid, None)
        }
        _ if code.starts_with("XX") => (ErrorKind::Corrupt, None),
        _ => (ErrorKind::Unexpected, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(code: &str) -> ErrorKind {
        explain(&Said {
            code: code.to_owned(),
            text: String::new(),
            constraint: None,
        })
        .0
    }

    #[test]
    fn codes_are_classified_by_remedy() {
        for (code, expected) in [
            ("08006", ErrorKind::Unavailable),
            ("57P01", ErrorKind::Unavailable),
            ("57014", ErrorKind::Unavailable),
            ("53300", ErrorKind::Unavailable),
            ("53100", ErrorKind::Unavailable),
            ("25006", ErrorKind::Unavailable),
            ("40001", ErrorKind::Conflict),
            ("40P01", ErrorKind::Conflict),
            ("28P01", ErrorKind::Denied),
            ("42501", ErrorKind::Denied),
            ("42P01", ErrorKind::Schema),
            ("42883", ErrorKind::Schema),
            ("23514", ErrorKind::Invalid),
            ("22P02", ErrorKind::Invalid),
            ("XX001", ErrorKind::Corrupt),
            ("P0001", ErrorKind::Unexpected),
        ] {
            assert_eq!(kind(code), expected, "{code}");
        }
    }

    #[test]
    fn the_driver_s_errors_are_classified_by_remedy() {
        let io = classify(
            "fetch",
            sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into()),
        );
        assert!(io.is_retryable());
        assert!(std::error::Error::source(&io).is_some());
        assert_eq!(
            classify("fetch", sqlx::Error::PoolTimedOut).kind(),
            ErrorKind::Unavailable
        );
    }
}
