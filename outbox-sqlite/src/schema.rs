//! Making the schema, and checking that it is what this version works with.

use std::thread;
use std::time::{Duration, Instant};

use outbox_core::{Error, ErrorKind, Migrated, Ordering, Result};
use rusqlite::{Connection, OpenFlags, OptionalExtension};

use crate::config::SqliteConfig;
use crate::error::During;
use crate::sql::{self, TABLE_EXISTS, VERSION};
use crate::worker::{connect, write};

const DURING: &str = "migrate";
const CHECK: &str = "check schema";

/// Makes the outbox, the file included, or brings it to this version; changes nothing where it is already.
///
/// Safe to run from several processes at once, and beside a running relay. It blocks.
///
/// ```
/// use outbox_sqlite::{SqliteConfig, migrate};
///
/// # let dir = tempfile::tempdir().unwrap();
/// let config = SqliteConfig::new(dir.path().join("app.db"));
/// assert_eq!(migrate(&config)?.from, None);
/// assert_eq!(migrate(&config)?.from, Some(1));
/// # Ok::<(), outbox_sqlite::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Schema`] when the outbox is of a newer version, was made with another ordering, or a table of that
/// name exists that is none of ours; others as SQLite gives them.
pub fn migrate(config: &SqliteConfig) -> Result<Migrated> {
    config.check()?;
    let mut connection = connect(
        config,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE,
    )?;
    writable(&connection, config)?;
    write_ahead(&connection, config)?;

    let transaction = write(&mut connection, DURING)?;
    let from = version(&transaction, config)?;
    if from.is_none() {
        transaction
            .execute_batch(&sql::migration(config))
            .during(DURING)
            .map_err(|error| error.with("prefix", &config.prefix))?;
    }
    transaction.commit().during(DURING)?;
    check(&connection, config)?;

    if from.is_none() {
        // From now on the main file alone tells that there is an outbox, whatever becomes of its `-wal`. A busy
        // checkpoint is made later by somebody else.
        connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            .during(DURING)?;
    }
    Ok(Migrated { from, to: VERSION })
}

/// The statements that make this outbox in an empty place, for teams with migrations of their own. To be run in one
/// transaction, on a database in WAL mode.
///
/// ```
/// let sql = outbox_sqlite::migration_sql(&outbox_sqlite::SqliteConfig::default());
/// assert!(sql.contains("CREATE TABLE \"outbox\""));
/// ```
#[must_use]
pub fn migration_sql(config: &SqliteConfig) -> String {
    sql::migration(config)
}

/// Whether the outbox is there, of this version and ordering, and what the relay relies on still holds.
pub(crate) fn check(connection: &Connection, config: &SqliteConfig) -> Result<()> {
    let schema = |text: String| {
        Error::new(ErrorKind::Schema, CHECK, text)
            .with("path", config.path.display())
            .with("prefix", &config.prefix)
    };
    writable(connection, config)?;
    let found = version(connection, config)?;
    if found != Some(VERSION) {
        return Err(schema("there is no outbox of this prefix: run migrate".into()));
    }
    let stored: Option<String> = connection
        .prepare_cached(&sql::Sql::new(&config.prefix).meta)
        .and_then(|mut statement| statement.query_row(["ordering"], |row| row.get(0)).optional())
        .during(CHECK)?;
    let expected = sql::ordering(config.ordering);
    if stored.as_deref() != Some(expected) {
        return Err(schema(format!(
            "the outbox was made with the ordering \"{}\" and is opened with \"{expected}\": configure the former, or \
             make another outbox under a new prefix",
            stored.unwrap_or_default(),
        )));
    }
    // In a database of UTF-16 a text literal has other bytes than the producer wrote.
    let encoding: String = connection
        .query_row("PRAGMA main.encoding", [], |row| row.get(0))
        .during(CHECK)?;
    if encoding != "UTF-8" {
        return Err(Error::new(
            ErrorKind::Unsupported,
            CHECK,
            "the database stores text as UTF-16, which would change keys and payloads; only UTF-8 is supported",
        )
        .with("encoding", encoding));
    }
    // Positions must never be given twice, and numbers must be given by the trigger.
    let table: String = definition(connection, "table", config.prefix.as_str())?;
    if !table.to_ascii_uppercase().contains("AUTOINCREMENT") {
        return Err(schema(
            "the outbox table has lost its AUTOINCREMENT; make it anew as migration_sql says".into(),
        ));
    }
    let numbered = !definition(connection, "trigger", &format!("{}_number", config.prefix))?.is_empty();
    if numbered != (config.ordering == Ordering::Sequenced) {
        return Err(schema(
            "the trigger that numbers messages is missing, or there under the wrong ordering".into(),
        ));
    }
    Ok(())
}

fn definition(connection: &Connection, kind: &str, name: &str) -> Result<String> {
    connection
        .prepare_cached("SELECT sql FROM main.sqlite_schema WHERE type = ?1 AND name = ?2 COLLATE NOCASE")
        .and_then(|mut statement| statement.query_row([kind, name], |row| row.get(0)).optional())
        .map(Option::unwrap_or_default)
        .during(CHECK)
}

/// The version that is there, which is not above ours.
fn version(connection: &Connection, config: &SqliteConfig) -> Result<Option<i64>> {
    let exists: bool = connection
        .query_row(TABLE_EXISTS, [format!("{}_meta", config.prefix)], |row| {
            row.get(0)
        })
        .during(CHECK)?;
    if !exists {
        return Ok(None);
    }
    let stored: Option<String> = connection
        .query_row(&sql::Sql::new(&config.prefix).meta, ["version"], |row| row.get(0))
        .optional()
        .during(CHECK)?;
    let version = stored.as_deref().and_then(|text| text.parse().ok());
    match version {
        Some(version) if version <= VERSION => Ok(Some(version)),
        Some(version) => Err(Error::new(
            ErrorKind::Schema,
            CHECK,
            "the outbox was made by a newer version of this crate: upgrade the program",
        )
        .with("found", version)
        .with("known", VERSION)),
        None => Err(Error::new(
            ErrorKind::Schema,
            CHECK,
            "the table of the outbox's version is there, but names no version: was it made by hand?",
        )
        .with("prefix", &config.prefix)),
    }
}

fn writable(connection: &Connection, config: &SqliteConfig) -> Result<()> {
    if connection.is_readonly("main").during(CHECK)? {
        return Err(Error::new(
            ErrorKind::Denied,
            CHECK,
            "the database is read-only: check the permissions of the file and of its directory",
        )
        .with("path", config.path.display()));
    }
    Ok(())
}

/// Switches to write-ahead logging, in which readers and the writer do not wait for each other.
///
/// SQLite does not wait by itself when several connections switch at once.
fn write_ahead(connection: &Connection, config: &SqliteConfig) -> Result<()> {
    let until = Instant::now() + config.busy_timeout;
    loop {
        let switched = connection.query_row("PRAGMA main.journal_mode = WAL", [], |row| {
            row.get::<_, String>(0)
        });
        match switched {
            Ok(mode) if mode.eq_ignore_ascii_case("wal") => return Ok(()),
            Ok(mode) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    DURING,
                    "this database cannot use write-ahead logging; is it on a network file system?",
                )
                .with("journal_mode", mode));
            }
            Err(rusqlite::Error::SqliteFailure(failure, _))
                if failure.code == rusqlite::ErrorCode::DatabaseBusy && Instant::now() < until =>
            {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error).during(DURING),
        }
    }
}
