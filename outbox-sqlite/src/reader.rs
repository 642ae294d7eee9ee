//! Reading batches: from where the reader stopped, or from the start each time.

use std::collections::HashSet;
use std::fmt::Write;
use std::sync::Arc;

use async_trait::async_trait;
use outbox_core::{Epoch, FetchMode, FetchRequest, Fetched, Held, Ordering, Reader, Record, Reread, Result};
use rusqlite::{Connection, Transaction, params};

use crate::config::SqliteConfig;
use crate::cursor::Cursor;
use crate::error::During;
use crate::operate::bound;
use crate::row::{Rows, SHARD};
use crate::sql::Sql;
use crate::worker::{FileId, Worker};

const DURING: &str = "fetch";

/// A reader with a connection of its own. A fetch is one read transaction, open only while rows are read.
#[derive(Debug)]
pub(crate) struct SqliteReader {
    worker: Worker,
    sql: Arc<Sql>,
    config: Arc<SqliteConfig>,
    /// What the last fetch left. It travels with the job, and is gone when a fetch failed or was dropped: the next
    /// one starts anew, which is always safe.
    memory: Option<Memory>,
    /// The relay hands over the same set until it changes.
    barred: Arc<Barred>,
}

/// What a reader remembers between fetches.
#[derive(Debug)]
struct Memory {
    mark: Mark,
    cursor: Option<Cursor>,
}

/// What must not go back.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mark {
    file: FileId,
    /// Given to the outbox when it was made.
    identity: String,
    /// The last position that was given.
    last: i64,
}

impl SqliteReader {
    pub(crate) fn start(config: &Arc<SqliteConfig>, sql: &Arc<Sql>) -> Result<Self> {
        Ok(Self {
            worker: Worker::start("reader", Arc::clone(config))?,
            sql: Arc::clone(sql),
            config: Arc::clone(config),
            memory: None,
            barred: Arc::default(),
        })
    }
}

#[async_trait]
impl Reader for SqliteReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        let Some(owned) = request.shards.iter().find(|owned| owned.shard == SHARD) else {
            if let Some(memory) = &mut self.memory {
                memory.cursor = None;
            }
            return Ok(Fetched::Batch {
                records: Vec::new(),
                more: false,
            });
        };
        if !Arc::ptr_eq(&self.barred.held, &request.held) {
            self.barred = Arc::new(Barred::new(&request.held));
        }
        let wanted = Wanted {
            epoch: owned.epoch,
            in_flight: request
                .in_flight
                .iter()
                .filter(|(shard, _)| *shard == SHARD)
                .map(|(_, position)| position.0)
                .collect(),
            barred: Arc::clone(&self.barred),
            reread: request
                .reread
                .iter()
                .filter(|reread| reread.shard == SHARD)
                .cloned()
                .collect(),
            max_rows: request.max_rows.max(1),
            max_bytes: request.max_bytes,
        };
        let (sql, config, memory) = (
            Arc::clone(&self.sql),
            Arc::clone(&self.config),
            self.memory.take(),
        );
        let (fetched, memory) = self
            .worker
            .run(DURING, move |connection, file| {
                fetch(connection, file, &sql, &config, wanted, memory)
            })
            .await?;
        self.memory = memory;
        Ok(fetched)
    }
}

fn fetch(
    connection: &mut Connection,
    file: FileId,
    sql: &Sql,
    config: &SqliteConfig,
    wanted: Wanted,
    memory: Option<Memory>,
) -> Result<(Fetched, Option<Memory>)> {
    let transaction = connection.transaction().during(DURING)?;
    let (last, identity): (i64, String) = transaction
        .prepare_cached(&sql.mark)
        .and_then(|mut statement| statement.query_row([&sql.table], |row| Ok((row.get(0)?, row.get(1)?))))
        .during(DURING)?;
    let mark = Mark { file, identity, last };
    if let Some(memory) = &memory
        && let Some(reason) = mark.differs(&memory.mark)
    {
        return Ok((Fetched::Reset { reason }, None));
    }

    let scan = Scan {
        transaction: &transaction,
        sql,
        wanted: &wanted,
        last,
    };
    let mut rows = Rows::new(config.ordering == Ordering::Sequenced);
    let mut batch = Batch::new(wanted.max_rows, wanted.max_bytes);
    let mut cursor = memory
        .and_then(|memory| memory.cursor)
        .filter(|cursor| cursor.epoch() == wanted.epoch)
        .unwrap_or_else(|| Cursor::new(wanted.epoch, &wanted.barred.held, config.sweep_interval));
    let more = match config.fetch {
        FetchMode::Rescan => {
            scan.onward(i64::MIN, None, &mut rows, &mut batch)
                .during(DURING)?
                .1
        }
        FetchMode::Cursor => cursor
            .fetch(&scan, config.sweep_interval, &mut rows, &mut batch)
            .during(DURING)?,
    };
    let memory = Memory {
        mark,
        cursor: Some(cursor),
    };
    Ok((
        Fetched::Batch {
            records: batch.records,
            more,
        },
        Some(memory),
    ))
}

impl Mark {
    /// Why what was known of `before` is void.
    fn differs(&self, before: &Self) -> Option<String> {
        if self.file != before.file || self.identity != before.identity {
            return Some("the database file was replaced by another one".to_owned());
        }
        (self.last < before.last).then(|| {
            format!(
                "positions went back from {} to {}: the file was restored",
                before.last, self.last
            )
        })
    }
}

/// What a fetch asks for, of the only shard.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) epoch: Epoch,
    pub(crate) in_flight: HashSet<i64>,
    pub(crate) barred: Arc<Barred>,
    pub(crate) reread: Vec<Reread>,
    max_rows: usize,
    max_bytes: usize,
}

/// What is held, and as the statement's parameters.
#[derive(Debug, Default)]
pub(crate) struct Barred {
    pub(crate) held: Arc<Held>,
    topics: Option<String>,
    keys: Option<String>,
}

impl Barred {
    fn new(held: &Arc<Held>) -> Self {
        let keys = held
            .keys
            .iter()
            .filter(|(shard, _)| *shard == SHARD)
            .map(|(_, key)| name(&key.topic, &key.key));
        Self {
            topics: list(held.topics.iter().map(ToString::to_string)),
            keys: list(keys),
            held: Arc::clone(held),
        }
    }
}

/// A batch that fills up.
#[derive(Debug)]
pub(crate) struct Batch {
    records: Vec<Record>,
    bytes: usize,
    /// How far it may be filled now; not beyond the request's limits.
    pub(crate) max_rows: usize,
    pub(crate) max_bytes: usize,
}

impl Batch {
    fn new(max_rows: usize, max_bytes: usize) -> Self {
        Self {
            records: Vec::new(),
            bytes: 0,
            max_rows,
            max_bytes,
        }
    }

    /// How many more records it takes.
    pub(crate) fn room(&self) -> usize {
        self.max_rows.saturating_sub(self.records.len())
    }

    /// Takes a record, if it fits. The first one always fits.
    pub(crate) fn take(&mut self, record: Record) -> bool {
        let bytes = self.bytes.saturating_add(record.message.size());
        let fits = self.records.is_empty() || (self.room() > 0 && bytes <= self.max_bytes);
        if fits {
            self.bytes = bytes;
            self.records.push(record);
        }
        fits
    }
}

/// One fetch's snapshot and what is wanted of it.
#[derive(Debug)]
pub(crate) struct Scan<'t> {
    pub(crate) transaction: &'t Transaction<'t>,
    pub(crate) sql: &'t Sql,
    pub(crate) wanted: &'t Wanted,
    /// The last position that was given.
    pub(crate) last: i64,
}

impl Scan<'_> {
    /// Takes what lies after a position and is neither in flight nor held, oldest first, in one statement. Says how
    /// far that went, and whether a limit cut it off.
    ///
    /// From the first position on it is the simple exact reader.
    pub(crate) fn onward(
        &self,
        after: i64,
        keys_apart: Option<String>,
        rows: &mut Rows,
        batch: &mut Batch,
    ) -> rusqlite::Result<(i64, bool)> {
        let room = batch.room();
        if room == 0 {
            return Ok((after, true));
        }
        let held = &self.wanted.barred.held.messages;
        let passed = self
            .wanted
            .in_flight
            .iter()
            .copied()
            .chain(held.iter().map(|(_, position)| position.0))
            .filter(|position| *position > after);
        let barred = &self.wanted.barred;
        let mut statement = self.transaction.prepare_cached(&self.sql.fetch)?;
        let mut found = statement.query(params![
            after,
            numbers(passed),
            barred.topics,
            barred.keys,
            keys_apart,
            bound(room)
        ])?;
        let (mut taken, mut end) = (0, after);
        while let Some(row) = found.next()? {
            let record = rows.record(row)?;
            let position = record.position.0;
            if !batch.take(record) {
                return Ok((end, true));
            }
            end = position;
            taken += 1;
        }
        // Nothing is left behind up to the last position given, be it held or in flight.
        Ok(if taken == room {
            (end, true)
        } else {
            (end.max(self.last), false)
        })
    }
}

/// Positions as one JSON parameter; none when there are none, which costs nothing.
fn numbers(values: impl Iterator<Item = i64>) -> Option<String> {
    let mut text = String::new();
    for value in values {
        text.push(if text.is_empty() { '[' } else { ',' });
        let _ = write!(text, "{value}");
    }
    (!text.is_empty()).then(|| text + "]")
}

/// Texts as one JSON parameter; none when there are none.
pub(crate) fn list(values: impl Iterator<Item = String>) -> Option<String> {
    let list: Vec<String> = values.collect();
    (!list.is_empty()).then(|| serde_json::Value::from(list).to_string())
}

/// A key as the statement compares it; no topic has a slash.
pub(crate) fn name(topic: &str, key: &[u8]) -> String {
    let mut name = format!("{topic}/");
    for byte in key {
        let _ = write!(name, "{byte:02X}");
    }
    name
}
