//! How a real server carries out the two statements that run all the time: by the primary key, and at a cost of what
//! is returned, not of what waits. Here and not among the tests outside, because only here the texts are known.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use outbox_core::Identifier;
use sqlx::postgres::PgConnection;
use sqlx::{Connection, Executor};

use crate::config::PostgresConfig;
use crate::schema::migrate;
use crate::session::{Opening, Settings};
use crate::sql::{Sql, Statement, safe};

const SMALL: i64 = 2_000;
const LARGE: i64 = 200_000;
const STRIDE: i64 = 1_000;

/// An outbox of its own.
struct Place {
    config: PostgresConfig,
    sql: Sql,
    control: PgConnection,
}

impl Place {
    async fn new() -> Self {
        let url = std::env::var("OUTBOX_TEST_POSTGRES").unwrap_or_else(|_| {
            panic!("OUTBOX_TEST_POSTGRES is not set: run scripts/services start, then eval \"$(scripts/services env)\"")
        });
        let schema = format!("t_{}_{:08x}", std::process::id(), fastrand::u32(..));
        let config = PostgresConfig {
            schema: Identifier::new(&schema).unwrap(),
            ..PostgresConfig::new(url.clone())
        };
        migrate(&config).await.unwrap();
        Self {
            sql: Sql::new(&config),
            config,
            control: PgConnection::connect(&url).await.unwrap(),
        }
    }

    /// Rows of many keys, in all shards, so many in all.
    async fn fill(&mut self, upto: i64) {
        let outbox = crate::sql::table(&self.config);
        let text = format!(
            "INSERT INTO {outbox} (topic, key, payload) SELECT 't', (n % 5000)::text::bytea, 'payload' \
             FROM generate_series((SELECT count(*) FROM {outbox}) + 1, {upto}) n"
        );
        self.control.execute(safe(text)).await.unwrap();
    }

    async fn analyze(&mut self) {
        let text = format!("ANALYZE {}", crate::sql::table(&self.config));
        self.control.execute(safe(text)).await.unwrap();
    }

    /// Owns all shards; says so as the first arguments of a settlement.
    async fn fence(&mut self) -> String {
        let leases = format!("\"{}\".\"{}_lease\"", self.config.schema, self.config.prefix);
        let text = format!("UPDATE {leases} SET owner = 'relay', epoch = 1, until = 'infinity'");
        self.control.execute(safe(text)).await.unwrap();
        let list = |value: &str| format!("'{{{}}}'", vec![value; 64].join(","));
        let shards: Vec<String> = (0..64).map(|shard| shard.to_string()).collect();
        format!("'{{{}}}', {}, 'relay'", shards.join(","), list("1"))
    }

    /// The names of 500 messages, as further arguments.
    async fn named(&mut self) -> String {
        let text = format!(
            "SELECT format('%L, %L, %L', array_agg(shard), array_agg(id), array_agg(message_id)) FROM \
             (SELECT * FROM {} ORDER BY shard, id LIMIT 500) o",
            crate::sql::table(&self.config)
        );
        sqlx::query_scalar(safe(text))
            .fetch_one(&mut self.control)
            .await
            .unwrap()
    }

    async fn gone(mut self) {
        let text = format!("DROP SCHEMA \"{}\" CASCADE", self.config.schema);
        self.control.execute(safe(text)).await.unwrap();
    }

    /// A connection on which a statement is prepared.
    async fn prepared(&self, settings: Settings, statement: &Statement) -> PgConnection {
        let opening = Opening::new(&self.config, settings);
        let mut connection = opening.connect(&self.config, "plans").await.unwrap();
        connection
            .execute(safe(format!("PREPARE asked AS {statement:?}")))
            .await
            .unwrap();
        connection
    }
}

/// What the server did.
struct Carried {
    text: String,
    buffers: i64,
    rows: i64,
}

async fn explain(connection: &mut PgConnection, arguments: &str) -> Carried {
    connection.execute("BEGIN").await.unwrap();
    let text = format!("EXPLAIN (ANALYZE, BUFFERS, TIMING off, SUMMARY off) EXECUTE asked({arguments})");
    let lines: Vec<String> = sqlx::query_scalar(safe(text))
        .fetch_all(&mut *connection)
        .await
        .unwrap();
    connection.execute("ROLLBACK").await.unwrap();
    let number = |text: &str, before: &str| -> i64 {
        let rest = text.split_once(before).map_or("0", |(_, rest)| rest);
        rest.split(|c: char| !c.is_ascii_digit())
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    let buffers = lines
        .iter()
        .find(|line| line.contains("Buffers: shared"))
        .unwrap();
    Carried {
        buffers: number(buffers, "hit=") + number(buffers, "read="),
        rows: number(&lines[0], "actual rows="),
        text: lines.join("\n"),
    }
}

impl Carried {
    /// The outbox is read by its primary key alone.
    fn is_by_key(&self) {
        let Self { text, .. } = self;
        assert!(text.contains("Index Scan using outbox_pkey"), "{text}");
        assert!(!text.contains("Bitmap"), "{text}");
        assert!(!text.contains("Seq Scan on outbox o"), "{text}");
        assert!(
            !text.contains("Hash Join") && !text.contains("Merge Join"),
            "{text}"
        );
    }
}

/// The arguments of a fetch that asks these shards, from a position, for so many rows each.
fn asking(below: i64, shards: i64, after: i64, quota: i64) -> String {
    asking_beside(&[], below, shards, after, quota)
}

/// The same while these topics are held.
fn asking_beside(topics: &[&str], below: i64, shards: i64, after: i64, quota: i64) -> String {
    let list = |value: &dyn Fn(i64) -> i64| {
        let values: Vec<String> = (0..shards).map(|shard| value(shard).to_string()).collect();
        format!("'{{{}}}'", values.join(","))
    };
    let nothing = |lists: usize| vec!["'{}'"; lists].join(", ");
    format!(
        "{below}, {}, '{{{}}}', {}, {}, {}, {}",
        nothing(5),
        topics.join(","),
        nothing(8),
        list(&|shard| shard),
        list(&|_| after),
        list(&|_| quota)
    )
}

#[tokio::test]
async fn fetch_costs_what_it_returns() {
    costs_what_it_returns(|sql| &sql.fetch, asking).await;
}

#[tokio::test]
async fn fetch_past_what_is_held_costs_what_it_returns_where_nothing_is() {
    costs_what_it_returns(
        |sql| &sql.fetch_past,
        |below, shards, after, quota| format!("{}, {STRIDE}", asking(below, shards, after, quota)),
    )
    .await;
}

async fn costs_what_it_returns(statement: fn(&Sql) -> &Statement, asking: fn(i64, i64, i64, i64) -> String) {
    let mut place = Place::new().await;
    // Prepared, planned and run while the table is empty: that plan must serve for ever.
    let mut early = place
        .prepared(Settings::reading(&place.config), statement(&place.sql))
        .await;
    for _ in 0..7 {
        explain(&mut early, &asking(i64::MIN, 64, i64::MIN, 16))
            .await
            .is_by_key();
    }
    let cases = [(64, 16), (8, 100), (1, 500)];
    place.fill(SMALL).await;
    let mut small = Vec::new();
    for (shards, quota) in cases {
        small.push(explain(&mut early, &asking(i64::MIN, shards, i64::MIN, quota)).await);
    }
    place.fill(LARGE).await;
    for analyzed in [false, true] {
        if analyzed {
            place.analyze().await;
        }
        let mut late = place
            .prepared(Settings::reading(&place.config), statement(&place.sql))
            .await;
        for connection in [&mut early, &mut late] {
            for ((shards, quota), small) in cases.into_iter().zip(&small) {
                let large = explain(connection, &asking(i64::MIN, shards, i64::MIN, quota)).await;
                large.is_by_key();
                assert!(!large.text.contains("Sort"), "{}", large.text);
                assert_eq!(large.rows, shards * quota + 1);
                // One page for each row, where before there were many on each, and a level more of the index.
                let bound = 3 * small.buffers + 2 * large.rows + 4 * shards;
                assert!(
                    large.buffers <= bound,
                    "{} pages, and {} when the table was small:\n{}",
                    large.buffers,
                    small.buffers,
                    large.text
                );
            }
            // Nothing new: a look at the end of each shard.
            let idle = explain(connection, &asking(LARGE, 64, i64::MAX, 16)).await;
            idle.is_by_key();
            assert_eq!(idle.rows, 1);
            assert!(idle.buffers <= 64 * 6, "{}", idle.text);
        }
    }
    place.gone().await;
}

/// Where a topic is blocked for long, millions of rows are passed over. A statement that did so at once would take longer
/// than it may, and so would each after it.
#[tokio::test]
async fn fetch_passes_no_more_than_a_stride() {
    let mut place = Place::new().await;
    place.fill(LARGE).await;
    let mut reader = place
        .prepared(Settings::reading(&place.config), &place.sql.fetch_past)
        .await;
    let asked = format!("{}, {STRIDE}", asking_beside(&["t"], i64::MIN, 1, i64::MIN, 500));
    for _ in 0..7 {
        let passed = explain(&mut reader, &asked).await;
        passed.is_by_key();
        assert_eq!(
            passed.rows, 2,
            "the server's, and where the scan stopped: {}",
            passed.text
        );
        // The shard has more, and each row may be on a page of its own.
        assert!(passed.buffers <= STRIDE + 100, "{}", passed.text);
    }
    place.gone().await;
}

#[tokio::test]
async fn settling_costs_what_it_settles() {
    let mut place = Place::new().await;
    let mut early = place
        .prepared(Settings::settling(&place.config), &place.sql.deliver)
        .await;
    let fence = place.fence().await;
    for _ in 0..7 {
        explain(&mut early, &format!("{fence}, '{{}}', '{{}}', '{{}}'"))
            .await
            .is_by_key();
    }
    let mut buffers = Vec::new();
    for rows in [SMALL, LARGE] {
        place.fill(rows).await;
        let mut late = place
            .prepared(Settings::settling(&place.config), &place.sql.deliver)
            .await;
        let named = place.named().await;
        for connection in [&mut early, &mut late] {
            let carried = explain(connection, &format!("{fence}, {named}")).await;
            carried.is_by_key();
            buffers.push(carried.buffers);
        }
    }
    // A level more of the index for each row, and its page written.
    assert!(buffers[2].max(buffers[3]) <= 3 * buffers[0], "{buffers:?}");
    place.gone().await;
}

/// As it mostly is: the relay keeps it empty, and the server, which counts rows now and then, takes it for one that stays
/// empty. Then a broker is away, and it is not.
#[tokio::test]
async fn a_table_that_was_analysed_while_it_was_empty_is_used_by_key() {
    let mut place = Place::new().await;
    let fence = place.fence().await;
    place.fill(LARGE / 10).await;
    for text in ["DELETE FROM", "VACUUM (ANALYZE)"] {
        let text = format!("{text} {}", crate::sql::table(&place.config));
        place.control.execute(safe(text)).await.unwrap();
    }
    let mut reader = place
        .prepared(Settings::reading(&place.config), &place.sql.fetch)
        .await;
    let mut settler = place
        .prepared(Settings::settling(&place.config), &place.sql.deliver)
        .await;
    place.fill(LARGE / 10).await;
    let named = place.named().await;
    // The server plans anew for the first five, and then keeps a plan.
    for _ in 0..7 {
        let fetched = explain(&mut reader, &asking(i64::MIN, 64, i64::MIN, 8)).await;
        fetched.is_by_key();
        assert_eq!(fetched.rows, 64 * 8 + 1);
        let settled = explain(&mut settler, &format!("{fence}, {named}")).await;
        settled.is_by_key();
        assert!(settled.buffers <= 500 * 12, "{}", settled.text);
        for Carried { text, .. } in [fetched, settled] {
            assert!(!text.contains("Removed by Join Filter"), "{text}");
        }
    }
    place.gone().await;
}
