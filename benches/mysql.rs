//! What a run does on MySQL or MariaDB that it does nowhere else.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use outbox::postgres::sqlx::mysql::MySqlPool;
use outbox::postgres::sqlx::{AssertSqlSafe, Row, query, raw_sql};

use crate::ledger::{DIGITS, Flow};
use crate::place::Store;
use crate::results::{Mysql, Outcome};
use crate::stage::say;

/// So many transactions whose rows wait to be purged are no load.
const FEW: i64 = 100;
/// How long the purge is waited for: others on the server may keep it from ending.
const PATIENCE: Duration = Duration::from_secs(60);

/// One of the two servers can be given as the other, and a figure carries the store's name.
pub(crate) async fn check(pool: &MySqlPool, store: Store) -> Outcome<()> {
    let server = describe(pool).await?;
    let is = server.product();
    if is.to_lowercase() != store.name() {
        return Err(format!("the server is {is}, and not {}", store.name()).into());
    }
    if server.flush_log_at_trx_commit != "1" {
        return Err(
            "a server whose commits do not last (innodb_flush_log_at_trx_commit) is not measured".into(),
        );
    }
    Ok(())
}

/// What the server says of itself.
pub(crate) async fn describe(pool: &MySqlPool) -> Outcome<Mysql> {
    let rows = raw_sql("SHOW GLOBAL VARIABLES").fetch_all(pool).await?;
    let mut told: HashMap<String, String> = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<Outcome<_>>()?;
    let mut value = |name: &str| told.remove(name).unwrap_or_default();
    let buffers: u64 = value("innodb_buffer_pool_size").parse()?;
    Ok(Mysql {
        version: value("version"),
        flush_log_at_trx_commit: value("innodb_flush_log_at_trx_commit"),
        log_bin: value("log_bin"),
        sync_binlog: value("sync_binlog"),
        doublewrite: value("innodb_doublewrite"),
        buffer_pool: format!("{}M", buffers >> 20),
        performance_schema: value("performance_schema"),
    })
}

/// Enqueues messages in order, in one transaction.
pub(crate) async fn fill(
    pool: &MySqlPool,
    table: &str,
    topic: &str,
    flow: Flow,
    numbers: RangeInclusive<i64>,
) -> Outcome<()> {
    let (from, to) = numbers.into_inner();
    let Flow { size, keys, apart } = flow;
    let rest = size - DIGITS;
    // Nobody follows the log, which would be half of the work. The connection is not used for anything else.
    let mut connection = pool.acquire().await?.detach();
    // Each server has its own name for how deep a recursion may go.
    let settings = format!(
        "SET SESSION sql_log_bin = 0; \
         SET SESSION /*!80000 cte_max_recursion_depth = {0} */ /*M! max_recursive_iterations = {0} */",
        to - from + 1
    );
    raw_sql(AssertSqlSafe(settings)).execute(&mut connection).await?;
    let text = format!(
        "INSERT INTO {table} (topic, `key`, payload) \
         WITH RECURSIVE numbers (n) AS (SELECT {from} UNION ALL SELECT n + 1 FROM numbers WHERE n < {to}) \
         SELECT ?, CAST(CASE WHEN n < {apart} THEN {keys} ELSE n % {keys} END AS CHAR), \
                CONCAT(LPAD(n, {DIGITS}, '0'), REPEAT('x', {rest})) \
           FROM numbers ORDER BY n"
    );
    query(AssertSqlSafe(text))
        .bind(topic)
        .persistent(false)
        .execute(&mut connection)
        .await?;
    Ok(())
}

/// Counts all tables, lets deleted rows be purged, and has pages written.
pub(crate) async fn calm(pool: &MySqlPool, database: &str) -> Outcome<()> {
    let text = "SELECT table_name FROM information_schema.tables WHERE table_schema = ? AND table_type = 'BASE TABLE'";
    let tables: Vec<String> = query(text)
        .bind(database)
        .fetch_all(pool)
        .await?
        .iter()
        .map(|row| Ok(format!("`{database}`.`{}`", row.try_get::<String, _>(0)?)))
        .collect::<Outcome<_>>()?;
    let tables = tables.join(", ");
    raw_sql(AssertSqlSafe(format!("ANALYZE TABLE {tables}")))
        .execute(pool)
        .await?;
    until_purged(pool).await?;
    let mut connection = pool.acquire().await?.detach();
    let flush = format!("SET SESSION lock_wait_timeout = 1; FLUSH TABLES {tables} FOR EXPORT; UNLOCK TABLES");
    // Fails where a transaction is held that has written to them: then they are as the server leaves them.
    let _ = raw_sql(AssertSqlSafe(flush)).execute(&mut connection).await;
    Ok(())
}

async fn until_purged(pool: &MySqlPool) -> Outcome<()> {
    let begin = Instant::now();
    loop {
        let text = "SELECT count FROM information_schema.innodb_metrics WHERE name = 'trx_rseg_history_len'";
        let waiting: i64 = query(text).fetch_one(pool).await?.try_get(0)?;
        if waiting <= FEW {
            return Ok(());
        }
        if begin.elapsed() > PATIENCE {
            say(&format!(
                "{waiting} transactions are not purged, and it begins nevertheless"
            ));
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Drops a run's database and all whose names begin with its name and an underscore, whoever is still in one.
pub(crate) async fn drop_all(pool: &MySqlPool, run: &str) -> Outcome<()> {
    let others = format!("{run}_");
    let ours = |name: &str| name == run || name.starts_with(&others);
    let sessions = query("SELECT id, db FROM information_schema.processlist WHERE db IS NOT NULL");
    for row in sessions.fetch_all(pool).await? {
        // Signed in one server and unsigned in the other.
        let (id, database): (u64, String) = (row.try_get_unchecked(0)?, row.try_get(1)?);
        if ours(&database) {
            // Who has gone by now is gone.
            let _ = raw_sql(AssertSqlSafe(format!("KILL {id}"))).execute(pool).await;
        }
    }
    let databases = query("SELECT schema_name FROM information_schema.schemata");
    for row in databases.fetch_all(pool).await? {
        let name: String = row.try_get(0)?;
        if ours(&name) {
            let text = format!("DROP DATABASE `{name}`");
            raw_sql(AssertSqlSafe(text)).execute(pool).await?;
        }
    }
    Ok(())
}
