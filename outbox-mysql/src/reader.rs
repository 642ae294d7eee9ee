//! Reading batches: one statement, on a connection of the reader's own.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::TryStreamExt;
use outbox_core::{FetchRequest, Fetched, Reader, Result, within};
use sqlx::mysql::MySqlConnection;

use crate::config::MysqlConfig;
use crate::error::During;
use crate::row::Rows;
use crate::session::Opening;
use crate::sql::{Passed, Sql, safe};

const DURING: &str = "fetch";

/// Who owns no more than one shard in so many reads each of them by itself.
const FEW: usize = 8;

/// A reader with a connection of its own, which is thrown away with it.
///
/// It reads from the start each time, and so is correct by construction: rows become visible in another order than they
/// were numbered.
pub(crate) struct MysqlReader {
    connection: MySqlConnection,
    opening: Opening,
    sql: Arc<Sql>,
    config: Arc<MysqlConfig>,
    /// How many rows the last batches had room for, when their bytes were the limit.
    rows: usize,
}

impl MysqlReader {
    pub(crate) async fn connect(config: &Arc<MysqlConfig>, sql: &Arc<Sql>) -> Result<Self> {
        let opening = Opening::new(config)?;
        Ok(Self {
            connection: opening.connect(DURING).await?,
            opening,
            sql: Arc::clone(sql),
            config: Arc::clone(config),
            rows: usize::MAX,
        })
    }

    async fn read(&mut self, request: &FetchRequest) -> Result<Fetched> {
        let most = request.max_rows.max(1).min(self.rows);
        let few = request.shards.len() * FEW <= usize::from(self.config.shards);
        let passed = Passed::new(&request.in_flight, &request.held);
        let script = self.sql.fetch(&request.shards, few, &passed, most);
        let mut stream = sqlx::raw_sql(safe(Arc::new(script))).fetch(&mut self.connection);
        let (mut rows, mut records, mut bytes, mut full) = (Rows::default(), Vec::new(), 0_usize, false);
        let mut seen = 0;
        while let Some(row) = stream.try_next().await.during(DURING)? {
            seen += 1;
            // What is beyond the limit is read off the wire and dropped.
            if full {
                continue;
            }
            let record = rows.record(&row, 0).during(DURING)?;
            bytes = bytes.saturating_add(record.message.size());
            full = bytes > request.max_bytes && !records.is_empty();
            if !full {
                records.push(record);
            }
        }
        self.rows = if full {
            records.len()
        } else {
            self.rows.saturating_mul(2)
        };
        Ok(Fetched::Batch {
            records,
            more: full || seen == most,
        })
    }
}

#[async_trait]
impl Reader for MysqlReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        if request.shards.is_empty() {
            return Ok(Fetched::Batch {
                records: Vec::new(),
                more: false,
            });
        }
        let limit = self.opening.limit();
        within(limit, DURING, self.read(request)).await
    }
}

impl fmt::Debug for MysqlReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MysqlReader").finish_non_exhaustive()
    }
}
