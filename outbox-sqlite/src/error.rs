//! The one mapping from what SQLite says to what to do about it.

use std::borrow::Cow;

use outbox_core::{Error, ErrorKind, Result};
use rusqlite::ErrorCode;
use rusqlite::ffi;

/// Names the operation that failed and classifies the error.
pub(crate) trait During<T> {
    fn during(self, operation: &'static str) -> Result<T>;
}

impl<T> During<T> for rusqlite::Result<T> {
    fn during(self, operation: &'static str) -> Result<T> {
        self.map_err(|error| classify(operation, error))
    }
}

/// The error as the framework's own.
pub(crate) fn classify(operation: &'static str, error: rusqlite::Error) -> Error {
    let (kind, text) = explain(&error);
    let text = match text {
        Some(text) => text.into(),
        // Constraints name what they mean. Statements are ours and values are bound: SQLite's texts hold no data.
        None => match &error {
            rusqlite::Error::SqlInputError { msg, .. } => Cow::Owned(msg.clone()),
            error => Cow::Owned(error.to_string()),
        },
    };
    // Whole statements are of no use to anybody who reads the error.
    let source = match error {
        rusqlite::Error::SqlInputError { error, msg, .. } => rusqlite::Error::SqliteFailure(error, Some(msg)),
        other => other,
    };
    Error::new(kind, operation, text).with_source(source)
}

fn explain(error: &rusqlite::Error) -> (ErrorKind, Option<&'static str>) {
    let (code, extended, message) = match error {
        rusqlite::Error::SqliteFailure(failure, message) => (
            failure.code,
            failure.extended_code,
            message.as_deref().unwrap_or_default(),
        ),
        rusqlite::Error::SqlInputError { error, msg, .. } => (error.code, error.extended_code, msg.as_str()),
        rusqlite::Error::FromSqlConversionFailure(..)
        | rusqlite::Error::IntegralValueOutOfRange(..)
        | rusqlite::Error::Utf8Error(..)
        | rusqlite::Error::InvalidColumnType(..) => {
            return (
                ErrorKind::Corrupt,
                Some("a stored value cannot be understood; was it written by hand?"),
            );
        }
        rusqlite::Error::InvalidPath(_) | rusqlite::Error::NulError(_) => {
            return (ErrorKind::Invalid, Some("the path cannot be a file name"));
        }
        _ => return (ErrorKind::Unexpected, None),
    };
    match code {
        ErrorCode::DatabaseBusy if extended == ffi::SQLITE_BUSY_SNAPSHOT => (
            ErrorKind::Conflict,
            Some("the transaction began by reading and somebody wrote since: begin it IMMEDIATE, repeat it"),
        ),
        ErrorCode::DatabaseBusy => (
            ErrorKind::Conflict,
            Some("another connection held the write lock for longer than the busy timeout"),
        ),
        ErrorCode::DatabaseLocked => (
            ErrorKind::Conflict,
            Some("another statement of the same connection or cache is in the way"),
        ),
        ErrorCode::SchemaChanged => (
            ErrorKind::Conflict,
            Some("the schema changed meanwhile; repeat it"),
        ),
        ErrorCode::ReadOnly => (
            ErrorKind::Denied,
            Some("the database is read-only: check the permissions of the file and of its directory"),
        ),
        ErrorCode::PermissionDenied | ErrorCode::AuthorizationForStatementDenied => {
            (ErrorKind::Denied, Some("access to the database was refused"))
        }
        ErrorCode::CannotOpen => (
            ErrorKind::Unavailable,
            Some(
                "the database cannot be opened: check the path, the permissions of the file and its directory, \
                 and the limit of open files",
            ),
        ),
        ErrorCode::DiskFull => (
            ErrorKind::Unavailable,
            Some("the disk or the database is full: make room, then it goes on by itself"),
        ),
        ErrorCode::SystemIoFailure => (
            ErrorKind::Unavailable,
            Some("reading or writing the database file failed: check the disk and the system's log"),
        ),
        ErrorCode::FileLockingProtocolFailed => (
            ErrorKind::Unavailable,
            Some("locking the file failed; SQLite does not work on network file systems"),
        ),
        ErrorCode::OutOfMemory => (ErrorKind::Unavailable, Some("SQLite got no memory")),
        ErrorCode::OperationInterrupted | ErrorCode::OperationAborted => {
            (ErrorKind::Unavailable, Some("the statement was interrupted"))
        }
        ErrorCode::NotADatabase => (
            ErrorKind::Corrupt,
            Some("the file is no SQLite database, or an encrypted one: is the path right?"),
        ),
        ErrorCode::DatabaseCorrupt => (
            ErrorKind::Corrupt,
            Some("the database is damaged: stop writing, run PRAGMA integrity_check, restore a backup"),
        ),
        ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch => (ErrorKind::Invalid, None),
        ErrorCode::TooBig => (
            ErrorKind::Invalid,
            Some("a value is larger than SQLite can store"),
        ),
        // SQLite has no code of its own for these.
        _ if [
            "no such table",
            "no such column",
            "no such view",
            "has no column named",
        ]
        .iter()
        .any(|text| message.contains(text)) =>
        {
            (
                ErrorKind::Schema,
                Some("the outbox is not there, or not as this version made it: run migrate"),
            )
        }
        _ if message.contains("already exists") => (
            ErrorKind::Schema,
            Some("a table of such a name exists that is none of ours: choose another prefix"),
        ),
        _ => (ErrorKind::Unexpected, None),
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    fn kind(code: i32) -> ErrorKind {
        let failure = rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
        classify("test", failure).kind()
    }

    #[test]
    fn codes_are_classified_by_remedy() {
        for (code, expected) in [
            (ffi::SQLITE_BUSY, ErrorKind::Conflict),
            (ffi::SQLITE_BUSY_SNAPSHOT, ErrorKind::Conflict),
            (ffi::SQLITE_LOCKED, ErrorKind::Conflict),
            (ffi::SQLITE_READONLY, ErrorKind::Denied),
            (ffi::SQLITE_PERM, ErrorKind::Denied),
            (ffi::SQLITE_CANTOPEN, ErrorKind::Unavailable),
            (ffi::SQLITE_FULL, ErrorKind::Unavailable),
            (ffi::SQLITE_IOERR, ErrorKind::Unavailable),
            (ffi::SQLITE_IOERR_FSYNC, ErrorKind::Unavailable),
            (ffi::SQLITE_NOTADB, ErrorKind::Corrupt),
            (ffi::SQLITE_CORRUPT, ErrorKind::Corrupt),
            (ffi::SQLITE_CONSTRAINT_CHECK, ErrorKind::Invalid),
            (ffi::SQLITE_TOOBIG, ErrorKind::Invalid),
        ] {
            assert_eq!(kind(code), expected, "{code}");
        }
    }

    #[test]
    fn a_missing_table_is_a_matter_of_schema_and_the_source_is_kept() {
        let connection = rusqlite::Connection::open_in_memory().unwrap();
        connection.execute_batch("CREATE TABLE t (a)").unwrap();
        for sql in [
            "SELECT 1 FROM nowhere",
            "INSERT INTO t (no) VALUES (1)",
            "SELECT no FROM t",
        ] {
            let error = connection.prepare(sql).map(drop).during("test").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Schema, "{error:?}");
            assert!(error.to_string().contains("run migrate"));
            assert!(error.source().is_some());
        }
    }
}
