//! Reading batches.

use std::sync::Arc;

use async_trait::async_trait;
use outbox_core::{FetchRequest, Fetched, Ordering, Reader, Record, Result};
use rusqlite::params;

use crate::config::SqliteConfig;
use crate::error::During;
use crate::operate::bound;
use crate::row::{Rows, SHARD};
use crate::sql::Sql;
use crate::worker::Worker;

#[derive(Debug)]
pub(crate) struct SqliteReader {
    worker: Worker,
    sql: Arc<Sql>,
    sequenced: bool,
}

impl SqliteReader {
    pub(crate) fn start(config: &Arc<SqliteConfig>, sql: &Arc<Sql>) -> Result<Self> {
        Ok(Self {
            worker: Worker::start("reader", Arc::clone(config))?,
            sql: Arc::clone(sql),
            sequenced: config.ordering == Ordering::Sequenced,
        })
    }
}

#[async_trait]
impl Reader for SqliteReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        if !request.shards.iter().any(|owned| owned.shard == SHARD) {
            return Ok(Fetched::Batch {
                records: Vec::new(),
                more: false,
            });
        }
        let flying = request.in_flight.iter().map(|flight| flight.position.0);
        let held = request.held.messages.iter().map(|(_, position)| position.0);
        let passed = numbers(flying.chain(held));
        let topics = texts(request.held.topics.iter().map(|topic| topic.to_string()));
        let keys = texts(
            request
                .held
                .keys
                .iter()
                .map(|(_, key)| name(&key.topic, &key.key)),
        );
        let (sql, mut rows) = (Arc::clone(&self.sql), Rows::new(self.sequenced));
        let (max_rows, max_bytes) = (request.max_rows, request.max_bytes);
        self.worker
            .run("fetch", move |connection, _| {
                let transaction = connection.transaction().during("fetch")?;
                let mut statement = transaction.prepare_cached(&sql.fetch).during("fetch")?;
                let mut found = statement
                    .query(params![
                        i64::MIN,
                        passed,
                        topics,
                        keys,
                        None::<String>,
                        bound(max_rows)
                    ])
                    .during("fetch")?;
                let mut records: Vec<Record> = Vec::new();
                let (mut size, mut more) = (0, false);
                while let Some(row) = found.next().during("fetch")? {
                    let record = rows.record(row).during("fetch")?;
                    size += record.message.size();
                    if size > max_bytes && !records.is_empty() {
                        more = true;
                        break;
                    }
                    records.push(record);
                }
                more |= records.len() >= max_rows;
                Ok(Fetched::Batch { records, more })
            })
            .await
    }
}

/// Numbers as one JSON parameter; none when there are none.
fn numbers(values: impl Iterator<Item = i64>) -> Option<String> {
    let list: Vec<String> = values.map(|value| value.to_string()).collect();
    (!list.is_empty()).then(|| format!("[{}]", list.join(",")))
}

fn texts(values: impl Iterator<Item = String>) -> Option<String> {
    let list: Vec<String> = values.collect();
    (!list.is_empty()).then(|| serde_json::Value::from(list).to_string())
}

/// A key as the statement compares it: a legal topic has no slash.
fn name(topic: &str, key: &[u8]) -> String {
    use std::fmt::Write;
    let mut name = format!("{topic}/");
    for byte in key {
        let _ = write!(name, "{byte:02X}");
    }
    name
}
