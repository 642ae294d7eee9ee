//! The one mapping from what the server and sqlx say to what to do about it.

use std::fmt;

use outbox_core::{Error, ErrorKind, Result};
use sqlx::mysql::MySqlDatabaseError;

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
            let database = database.downcast_ref::<MySqlDatabaseError>();
            let said = Said {
                code: database.number(),
                text: database.message().to_owned(),
            };
            let (kind, remedy) = explain(&said);
            match remedy {
                Some(remedy) => Error::new(kind, operation, remedy).with("code", said.code),
                None => Error::new(kind, operation, said.text.clone()).with("code", said.code),
            }
            .with_source(said)
        }
        other => {
            let (kind, text) = explain_client(&other);
            Error::new(kind, operation, text).with_source(other)
        }
    }
}

/// What the server said.
#[derive(Debug)]
struct Said {
    code: u16,
    text: String,
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.text, self.code)
    }
}

impl std::error::Error for Said {}

const UNTRUSTED: &str = "no trusted connection: does the server offer TLS, is its certificate valid for this host, is its \
                         CA known (ssl-ca), was this program built with TLS?";

fn explain_client(error: &sqlx::Error) -> (ErrorKind, &'static str) {
    match error {
        // What the TLS library refuses comes as such an error of the socket's.
        sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            (ErrorKind::Unavailable, UNTRUSTED)
        }
        sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::NotFound => (
            ErrorKind::Unavailable,
            "a file is not there: is the server up that should have made its socket, or is ssl-ca wrong?",
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

/// The numbers are those of both servers' lists of errors.
fn explain(said: &Said) -> (ErrorKind, Option<&'static str>) {
    if matches!(said.code, CHECK | MARIADB_CHECK) && said.text.contains("_use_enqueue_procedure") {
        return (
            ErrorKind::Invalid,
            Some(
                "this outbox numbers its messages: enqueue through the library or the procedure, not by INSERT",
            ),
        );
    }
    match said.code {
        1213 => (
            ErrorKind::Conflict,
            Some("deadlock with another session: repeat the transaction"),
        ),
        1205 => (ErrorKind::Conflict, Some("a lock was not available in time")),
        1020 => (
            ErrorKind::Conflict,
            Some("a row was changed since the transaction's snapshot: repeat the transaction"),
        ),
        1317 | 1969 | 3024 => (
            ErrorKind::Unavailable,
            Some("the statement was cancelled, most likely because it took too long"),
        ),
        1053 | 1077 | 1079 | 1927 | 2013 | 3032 | 4031 => (
            ErrorKind::Unavailable,
            Some("the server is stopping or in offline mode, or has closed this connection"),
        ),
        1021 | 1114 => (
            ErrorKind::Unavailable,
            Some("the server's disk is full: make room, then it goes on by itself"),
        ),
        1040 | 1203 | 1226 => (
            ErrorKind::Unavailable,
            Some("the server has no connection left: raise its max_connections, or lower ours"),
        ),
        1129 => (
            ErrorKind::Unavailable,
            Some("the server blocks this host after many connection errors: run FLUSH HOSTS there"),
        ),
        1290 | 1792 | 1836 | 1874 => (
            ErrorKind::Unavailable,
            Some("the server takes no writes: is it a replica, or read_only set?"),
        ),
        1153 => (
            ErrorKind::Invalid,
            Some(
                "the message is larger than the server takes: raise its max_allowed_packet, or lower our limits",
            ),
        ),
        1044 | 1142 | 1143 | 1227 | 1370 => (
            ErrorKind::Denied,
            Some("the account lacks a right: run the GRANT statements for this role (see `grant_sql`)"),
        ),
        1045 | 1130 | 1698 | 1820 | 2061 => (
            ErrorKind::Denied,
            Some("the server refused user or password, or connections from here"),
        ),
        1049 => (
            ErrorKind::Invalid,
            Some("there is no database of this name: is the URL right?"),
        ),
        1146 | 1054 | 1305 => (
            ErrorKind::Schema,
            Some("the outbox is not there, or not as this version made it: run migrate"),
        ),
        1050 | 1304 => (
            ErrorKind::Schema,
            Some("a table or procedure of such a name exists that is none of ours: choose another prefix"),
        ),
        1048 | 1062 | 1264 | 1265 | 1292 | 1366 | 1406 | 1452 | CHECK | MARIADB_CHECK => {
            (ErrorKind::Invalid, None)
        }
        1030 | 1034 | 1712 => (ErrorKind::Corrupt, None),
        _ => (ErrorKind::Unexpected, None),
    }
}

const CHECK: u16 = 3819;
const MARIADB_CHECK: u16 = 4025;

/// Whether a unique key has the row already.
pub(crate) fn is_duplicate(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .and_then(|error| error.try_downcast_ref::<MySqlDatabaseError>())
        .is_some_and(|error| error.number() == 1062)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(code: u16) -> ErrorKind {
        explain(&Said {
            code,
            text: String::new(),
        })
        .0
    }

    #[test]
    fn codes_are_classified_by_remedy() {
        for (code, expected) in [
            (1213, ErrorKind::Conflict),
            (1205, ErrorKind::Conflict),
            (1020, ErrorKind::Conflict),
            (1053, ErrorKind::Unavailable),
            (1040, ErrorKind::Unavailable),
            (1114, ErrorKind::Unavailable),
            (1290, ErrorKind::Unavailable),
            (1874, ErrorKind::Unavailable),
            (3032, ErrorKind::Unavailable),
            (3024, ErrorKind::Unavailable),
            (1969, ErrorKind::Unavailable),
            (1045, ErrorKind::Denied),
            (1142, ErrorKind::Denied),
            (1146, ErrorKind::Schema),
            (1050, ErrorKind::Schema),
            (1049, ErrorKind::Invalid),
            (1153, ErrorKind::Invalid),
            (3819, ErrorKind::Invalid),
            (4025, ErrorKind::Invalid),
            (1644, ErrorKind::Unexpected),
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
