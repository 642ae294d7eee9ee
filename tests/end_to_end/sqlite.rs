//! The application's side in SQLite: a producer that counts, and a consumer that sums.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::Path;
use std::time::Duration;

use outbox::sqlite::rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior, params};
use outbox::sqlite::{SqliteConfig, SqliteInbox, SqliteOutbox, SqliteStore};
use outbox::{Message, MessageId, OutboxStore, Receive};
use tokio::runtime::Runtime;

use crate::proof::oracle::Arrived;
use crate::proof::writer::{End, Producer};
use crate::stage::database::{Database, interrupted};

/// One file.
#[derive(Debug)]
pub(crate) struct Sqlite(SqliteConfig);

impl Database for Sqlite {
    type Producer = SqliteProducer;

    /// There is one writer at a time.
    const HOLD_EACH: usize = 500;

    /// It is a file.
    const CONNECTIONS: usize = 0;

    fn make(folder: &Path, _: &Runtime) -> Self {
        let config = SqliteConfig::new(folder.join("app.db"));
        outbox::sqlite::migrate(&config).unwrap();
        connect(&config)
            .execute_batch("CREATE TABLE number (key TEXT PRIMARY KEY, last INTEGER); CREATE TABLE effect (key TEXT PRIMARY KEY, sum INTEGER)")
            .unwrap();
        Self(config)
    }

    fn configuration(&self) -> String {
        format!("type = \"sqlite\"\npath = {:?}", self.0.path)
    }

    fn store(&self) -> Box<dyn OutboxStore> {
        Box::new(SqliteStore::open(self.0.clone()).unwrap())
    }

    fn producer(&self) -> SqliteProducer {
        SqliteProducer {
            connection: connect(&self.0),
            outbox: SqliteOutbox::new(&self.0).unwrap(),
        }
    }

    fn backlog(&self) -> u64 {
        connect(&self.0)
            .query_row("SELECT count(*) FROM outbox", [], |row| row.get(0))
            .map(i64::unsigned_abs)
            .unwrap()
    }

    fn committed(&self, unknown: &[MessageId]) -> BTreeSet<MessageId> {
        assert!(unknown.is_empty(), "a commit to a file has an answer");
        BTreeSet::new()
    }

    fn connections(&self) -> usize {
        0
    }

    fn idle_in_transaction(&self) -> (Duration, String) {
        (Duration::ZERO, String::new())
    }

    /// Nobody can write.
    fn hold_settlements(&self, work: impl FnOnce()) {
        let mut connection = connect(&self.0);
        let tx = begin(&mut connection);
        work();
        tx.rollback().unwrap();
    }

    fn consume(&self, arrived: &[Arrived]) -> BTreeMap<String, u64> {
        let inbox = SqliteInbox::new(&self.0).unwrap();
        let mut connection = connect(&self.0);
        for batch in interrupted(arrived) {
            let tx = begin(&mut connection);
            for stamp in batch.records.iter().filter_map(Arrived::stamp) {
                // First the note, then the effect.
                if inbox.receive(&tx, "sums", stamp.id).unwrap() == Receive::Fresh {
                    tx.prepare_cached(
                        "INSERT INTO effect VALUES (?1, ?2) ON CONFLICT DO UPDATE SET sum = sum + ?2",
                    )
                    .and_then(|mut add| add.execute(params![stamp.key, stamp.n.cast_signed()]))
                    .unwrap();
                }
            }
            if batch.commit { tx.commit() } else { tx.rollback() }.unwrap();
        }
        let mut sums = connection.prepare("SELECT key, sum FROM effect").unwrap();
        let row =
            |row: &outbox::sqlite::rusqlite::Row<'_>| Ok((row.get(0)?, row.get::<_, i64>(1)?.unsigned_abs()));
        sums.query_map([], row).unwrap().map(Result::unwrap).collect()
    }
}

fn connect(config: &SqliteConfig) -> Connection {
    let connection = Connection::open(&config.path).unwrap();
    // Other producers hold transactions open on purpose.
    connection.busy_timeout(Duration::from_secs(60)).unwrap();
    connection
}

fn begin(connection: &mut Connection) -> Transaction<'_> {
    connection
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .unwrap()
}

/// One producer and its connection.
#[derive(Debug)]
pub(crate) struct SqliteProducer {
    connection: Connection,
    outbox: SqliteOutbox,
}

impl Producer for SqliteProducer {
    fn transact(
        &mut self,
        keys: &[String],
        message: &mut dyn FnMut(&str, u64) -> Message,
        wait: Duration,
        commit: bool,
    ) -> End {
        match self.attempt(keys, message, wait, commit) {
            Ok(end) => end,
            // Whatever was written is rolled back, by SQLite or with the transaction.
            Err(error) if is_full(&error) => End::RolledBack,
            Err(error) => panic!("a producer failed: {error}"),
        }
    }
}

impl SqliteProducer {
    fn attempt(
        &mut self,
        keys: &[String],
        message: &mut dyn FnMut(&str, u64) -> Message,
        wait: Duration,
        commit: bool,
    ) -> Result<End, Failure> {
        let tx = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        for key in keys {
            let last: i64 = tx
                .prepare_cached(
                    "INSERT INTO number VALUES (?1, 1) ON CONFLICT DO UPDATE SET last = last + 1 RETURNING last",
                )?
                .query_row([key], |row| row.get(0))?;
            self.outbox.enqueue(&tx, &message(key, last.unsigned_abs()))?;
        }
        std::thread::sleep(wait);
        if !commit {
            tx.rollback()?;
            return Ok(End::RolledBack);
        }
        tx.commit()?;
        Ok(End::Committed)
    }
}

type Failure = Box<dyn Error>;

/// Whether there is no room on the disk.
fn is_full(error: &Failure) -> bool {
    let mut next: Option<&(dyn Error + 'static)> = Some(&**error);
    while let Some(error) = next {
        let code = error
            .downcast_ref::<outbox::sqlite::rusqlite::Error>()
            .and_then(outbox::sqlite::rusqlite::Error::sqlite_error_code);
        if code == Some(ErrorCode::DiskFull) {
            return true;
        }
        next = error.source();
    }
    false
}
