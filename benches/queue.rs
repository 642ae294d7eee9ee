//! The table of the baselines, what most people write first, in each server that has one.

use std::borrow::Cow;

use outbox::MessageId;
use outbox::postgres::sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlRow};
use outbox::postgres::sqlx::postgres::{PgConnection, PgRow};
use outbox::postgres::sqlx::{AssertSqlSafe, ConnectOptions, Connection, Row, query, raw_sql};

use crate::place::Spec;
use crate::results::Outcome;

pub(crate) const QUEUE: &str = "queue";

/// Makes the table, with the one index that claims need.
pub(crate) fn table(spec: &Spec) -> Outcome<String> {
    let queue = spec.table(QUEUE);
    match spec {
        Spec::Postgres { .. } => Ok(format!(
            "CREATE TABLE {queue} (id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY, \
             message_id uuid NOT NULL DEFAULT gen_random_uuid(), topic text NOT NULL, key bytea, payload bytea, \
             created_at timestamptz NOT NULL DEFAULT clock_timestamp(), claimed_at timestamptz, processed_at timestamptz); \
             CREATE INDEX ON {queue} (id) WHERE processed_at IS NULL"
        )),
        Spec::Mysql { .. } => Ok(format!(
            "CREATE TABLE {queue} (id BIGINT AUTO_INCREMENT PRIMARY KEY, \
             message_id BINARY(16) NOT NULL DEFAULT (UNHEX(REPLACE(UUID(), '-', ''))), topic VARCHAR(249) NOT NULL, \
             `key` VARBINARY(1024), payload LONGBLOB, created_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)), \
             claimed_at DATETIME(6), processed_at DATETIME(6), KEY waiting (processed_at, id)) ENGINE = InnoDB"
        )),
        Spec::Mongo { .. } | Spec::Sqlite { .. } | Spec::Memory { .. } => {
            Err("this needs a server of SQL".into())
        }
    }
}

/// What a baseline does in a database.
pub(crate) trait Queue: Sized {
    type Row;

    async fn open(spec: &Spec) -> Outcome<Self>;

    /// Notes that so many rows are taken and reads them, in their order.
    async fn claim(&mut self, rows: i64) -> Outcome<Vec<Self::Row>>;

    /// Begins a transaction, and locks and reads so many rows in it, in their order.
    async fn lock(&mut self, rows: i64) -> Outcome<Vec<Self::Row>>;

    /// Notes that all of these rows are sent, in one statement.
    async fn mark(&mut self, rows: &[Self::Row]) -> Outcome<()>;

    /// Ends the transaction of [`lock`](Self::lock).
    async fn commit(&mut self) -> Outcome<()>;

    fn waiting(row: &Self::Row) -> Outcome<Waiting<'_>>;
}

/// What is sent of a row.
pub(crate) struct Waiting<'r> {
    pub(crate) message_id: Cow<'r, str>,
    pub(crate) topic: &'r str,
    pub(crate) key: &'r [u8],
    pub(crate) payload: &'r [u8],
}

pub(crate) struct PostgresQueue {
    connection: PgConnection,
    claim: String,
    lock: String,
    mark: String,
}

impl Queue for PostgresQueue {
    type Row = PgRow;

    async fn open(spec: &Spec) -> Outcome<Self> {
        const COLUMNS: &str = "id, message_id::text, topic, key, payload";
        let Spec::Postgres { url, .. } = spec else {
            return Err("this needs PostgreSQL".into());
        };
        let queue = spec.table(QUEUE);
        Ok(Self {
            connection: PgConnection::connect(url).await?,
            // With an array and not with a join, which is planned for an empty table where that was its normal state, and
            // then compares every row with every other.
            claim: format!(
                "UPDATE {queue} SET claimed_at = clock_timestamp() WHERE id = ANY (ARRAY(SELECT id FROM {queue} \
                 WHERE processed_at IS NULL AND (claimed_at IS NULL OR claimed_at < clock_timestamp() - interval '1 minute') \
                 ORDER BY id FOR UPDATE SKIP LOCKED LIMIT $1)) RETURNING {COLUMNS}"
            ),
            lock: format!(
                "SELECT {COLUMNS} FROM {queue} WHERE processed_at IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED"
            ),
            mark: format!("UPDATE {queue} SET processed_at = clock_timestamp() WHERE id = ANY($1)"),
        })
    }

    async fn claim(&mut self, rows: i64) -> Outcome<Vec<PgRow>> {
        let claim = query(AssertSqlSafe(self.claim.clone())).bind(rows);
        let mut batch = claim.fetch_all(&mut self.connection).await?;
        // What RETURNING returns has no order.
        batch.sort_by_key(|row| row.try_get::<i64, _>(0).unwrap_or_default());
        Ok(batch)
    }

    async fn lock(&mut self, rows: i64) -> Outcome<Vec<PgRow>> {
        // As with the relay, marks need not wait for the disk.
        raw_sql("BEGIN; SET LOCAL synchronous_commit = off")
            .execute(&mut self.connection)
            .await?;
        let lock = query(AssertSqlSafe(self.lock.clone())).bind(rows);
        Ok(lock.fetch_all(&mut self.connection).await?)
    }

    async fn mark(&mut self, rows: &[PgRow]) -> Outcome<()> {
        let ids: Vec<i64> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        let mark = query(AssertSqlSafe(self.mark.clone())).bind(ids);
        mark.execute(&mut self.connection).await?;
        Ok(())
    }

    async fn commit(&mut self) -> Outcome<()> {
        raw_sql("COMMIT").execute(&mut self.connection).await?;
        Ok(())
    }

    fn waiting(row: &PgRow) -> Outcome<Waiting<'_>> {
        Ok(Waiting {
            message_id: Cow::Borrowed(row.try_get(1)?),
            topic: row.try_get(2)?,
            key: row.try_get(3)?,
            payload: row.try_get(4)?,
        })
    }
}

/// Neither server has an `UPDATE` that returns rows: a claim is a transaction of two statements. Indexes are forced, as
/// who looks at the plans would do it: otherwise the primary key is walked over all rows that are marked.
pub(crate) struct MysqlQueue {
    connection: MySqlConnection,
    table: String,
    claim: String,
    lock: String,
}

impl MysqlQueue {
    async fn begin(&mut self, select: String, rows: i64) -> Outcome<Vec<MySqlRow>> {
        raw_sql("START TRANSACTION").execute(&mut self.connection).await?;
        let select = query(AssertSqlSafe(select)).bind(rows);
        Ok(select.fetch_all(&mut self.connection).await?)
    }

    /// Notes the time in a column of all of these rows, each looked up by its id.
    async fn note(&mut self, column: &str, rows: &[MySqlRow]) -> Outcome<()> {
        let mut ids: Vec<i64> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        let Some(&last) = ids.last() else { return Ok(()) };
        // Of few lengths, so that few statements are prepared.
        ids.resize(ids.len().next_power_of_two(), last);
        let places = vec!["?"; ids.len()].join(",");
        let text = format!(
            "UPDATE {} FORCE INDEX (PRIMARY) SET {column} = UTC_TIMESTAMP(6) WHERE id IN ({places})",
            self.table
        );
        let mut note = query(AssertSqlSafe(text));
        for id in ids {
            note = note.bind(id);
        }
        note.execute(&mut self.connection).await?;
        Ok(())
    }
}

impl Queue for MysqlQueue {
    type Row = MySqlRow;

    async fn open(spec: &Spec) -> Outcome<Self> {
        let Spec::Mysql { url, .. } = spec else {
            return Err("this needs MySQL or MariaDB".into());
        };
        let table = spec.table(QUEUE);
        // Statements with thousands of places are nothing to read.
        let options: MySqlConnectOptions = url.parse()?;
        let mut connection = options.disable_statement_logging().connect().await?;
        raw_sql("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
            .execute(&mut connection)
            .await?;
        let select = |condition: &str| {
            format!(
                "SELECT id, message_id, topic, `key`, payload FROM {table} FORCE INDEX (waiting) \
                 WHERE processed_at IS NULL {condition} ORDER BY id LIMIT ? FOR UPDATE SKIP LOCKED"
            )
        };
        Ok(Self {
            connection,
            claim: select("AND (claimed_at IS NULL OR claimed_at < UTC_TIMESTAMP(6) - INTERVAL 1 MINUTE)"),
            lock: select(""),
            table,
        })
    }

    async fn claim(&mut self, rows: i64) -> Outcome<Vec<MySqlRow>> {
        let batch = self.begin(self.claim.clone(), rows).await?;
        self.note("claimed_at", &batch).await?;
        self.commit().await?;
        Ok(batch)
    }

    async fn lock(&mut self, rows: i64) -> Outcome<Vec<MySqlRow>> {
        self.begin(self.lock.clone(), rows).await
    }

    async fn mark(&mut self, rows: &[MySqlRow]) -> Outcome<()> {
        self.note("processed_at", rows).await
    }

    async fn commit(&mut self) -> Outcome<()> {
        raw_sql("COMMIT").execute(&mut self.connection).await?;
        Ok(())
    }

    fn waiting(row: &MySqlRow) -> Outcome<Waiting<'_>> {
        let id = <[u8; 16]>::try_from(row.try_get::<&[u8], _>(1)?)?;
        Ok(Waiting {
            message_id: Cow::Owned(MessageId::from_bytes(id).to_string()),
            topic: row.try_get(2)?,
            key: row.try_get(3)?,
            payload: row.try_get(4)?,
        })
    }
}
