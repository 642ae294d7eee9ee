//! The application's side in SQLite: a producer that counts, and a consumer that sums.

use std::collections::BTreeMap;
use std::time::Duration;

use outbox::sqlite::rusqlite::{Connection, Transaction, TransactionBehavior, params};
use outbox::sqlite::{SqliteConfig, SqliteInbox, SqliteOutbox};
use outbox::{Message, Receive};

use crate::proof::oracle::Arrived;
use crate::proof::stamp::Stamp;
use crate::proof::writer::{End, Producer};

/// Makes the application's own tables beside the outbox.
pub(super) fn make_tables(config: &SqliteConfig) {
    outbox::sqlite::migrate(config).unwrap();
    connect(config)
        .execute_batch("CREATE TABLE number (key TEXT PRIMARY KEY, last INTEGER); CREATE TABLE effect (key TEXT PRIMARY KEY, sum INTEGER)")
        .unwrap();
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

/// Does something while nobody can write.
pub(super) fn locked<T>(config: &SqliteConfig, work: impl FnOnce() -> T) -> T {
    let mut connection = connect(config);
    let tx = begin(&mut connection);
    let done = work();
    tx.rollback().unwrap();
    done
}

/// One producer and its connection.
pub(super) struct SqliteProducer {
    connection: Connection,
    outbox: SqliteOutbox,
}

impl SqliteProducer {
    pub(super) fn connect(config: &SqliteConfig) -> Self {
        Self {
            connection: connect(config),
            outbox: SqliteOutbox::new(config).unwrap(),
        }
    }
}

impl Producer for SqliteProducer {
    fn transact(
        &mut self,
        keys: &[String],
        message: &mut dyn FnMut(&str, u64) -> Message,
        wait: Duration,
        commit: bool,
    ) -> End {
        let tx = begin(&mut self.connection);
        for key in keys {
            let last: i64 = tx
                .prepare_cached(
                    "INSERT INTO number VALUES (?1, 1) ON CONFLICT DO UPDATE SET last = last + 1 RETURNING last",
                )
                .and_then(|mut count| count.query_row([key], |row| row.get(0)))
                .unwrap();
            self.outbox
                .enqueue(&tx, &message(key, last.unsigned_abs()))
                .unwrap();
        }
        std::thread::sleep(wait);
        if !commit {
            tx.rollback().unwrap();
            return End::RolledBack;
        }
        match tx.commit() {
            Ok(()) => End::Committed,
            Err(_) => End::Unknown,
        }
    }
}

/// A consumer that reads the topic from the beginning twice, is interrupted in the middle of transactions, and adds
/// up the numbers of each key. Gives the sums.
pub(super) fn consume(config: &SqliteConfig, arrived: &[Arrived]) -> BTreeMap<String, u64> {
    let inbox = SqliteInbox::new(config).unwrap();
    let mut connection = connect(config);
    for _ in 0..2 {
        for batch in arrived.chunks(100) {
            if fastrand::u8(0..10) == 0 {
                let tx = begin(&mut connection);
                apply(&tx, &inbox, &batch[..batch.len() / 2]);
                tx.rollback().unwrap();
            }
            let tx = begin(&mut connection);
            apply(&tx, &inbox, batch);
            tx.commit().unwrap();
        }
    }
    let mut sums = connection.prepare("SELECT key, sum FROM effect").unwrap();
    let row =
        |row: &outbox::sqlite::rusqlite::Row<'_>| Ok((row.get(0)?, row.get::<_, i64>(1)?.unsigned_abs()));
    sums.query_map([], row).unwrap().map(Result::unwrap).collect()
}

/// First the note, then the effect.
fn apply(tx: &Transaction<'_>, inbox: &SqliteInbox, batch: &[Arrived]) {
    for stamp in batch
        .iter()
        .filter_map(|record| Stamp::read(record.payload.as_deref()?))
    {
        if inbox.receive(tx, "sums", stamp.id).unwrap() == Receive::Fresh {
            tx.prepare_cached("INSERT INTO effect VALUES (?1, ?2) ON CONFLICT DO UPDATE SET sum = sum + ?2")
                .and_then(|mut add| add.execute(params![stamp.key, stamp.n.cast_signed()]))
                .unwrap();
        }
    }
}
