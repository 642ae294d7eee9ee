//! How real servers carry out the statements that run all the time: by an index, row by row that is named, however
//! full the table is and whatever is open in it. Here and not among the tests outside, because only here the texts are
//! known.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_core::cursor::{Cursor, Found, Intake, Pending, Plan, Reach, Span};
use outbox_core::{
    Death, Epoch, FetchMode, FetchRequest, Held, Hold, HoldChange, HoldRef, HoldScope, HoldState, OrderKey,
    OwnedShard, Position, RecordRef, RelayId, Reread, RereadScope, Settlement, Shard, ShardSettlement,
};
use sqlx::mysql::MySqlConnection;
use sqlx::{Connection, Executor, Row};

use crate::config::MysqlConfig;
use crate::schema::migrate;
use crate::sql::{Asking, Barred, Sql, safe};

/// An outbox of its own, and a transaction that is open in it.
struct Place {
    database: String,
    config: MysqlConfig,
    sql: Sql,
    control: MySqlConnection,
    open: MySqlConnection,
}

impl Place {
    async fn new(variable: &str, rows: usize) -> Self {
        let url = std::env::var(variable).unwrap_or_else(|_| {
            panic!("{variable} is not set: run scripts/services start, then eval \"$(scripts/services env)\"")
        });
        let database = format!("t_{}_{:08x}", std::process::id(), fastrand::u32(..));
        let mut control = MySqlConnection::connect(&url).await.unwrap();
        let make = format!("CREATE DATABASE `{database}`; USE `{database}`");
        control.execute(safe(Arc::new(make))).await.unwrap();
        let (server, _) = url.rsplit_once('/').unwrap();
        let config = MysqlConfig::new(format!("{server}/{database}"));
        migrate(&config).await.unwrap();
        let fill = format!(
            "INSERT INTO outbox (topic, `key`, payload) SELECT 't', CONCAT('k', j.n % 5000), 'payload' \
             FROM JSON_TABLE('[{}]', '$[*]' COLUMNS (n FOR ORDINALITY)) j",
            vec!["0"; rows].join(",")
        );
        control.execute(safe(Arc::new(fill))).await.unwrap();
        control.execute("ANALYZE TABLE outbox").await.unwrap();
        let mut open = MySqlConnection::connect(&format!("{server}/{database}"))
            .await
            .unwrap();
        open.execute(
            "START TRANSACTION; INSERT INTO outbox (topic, `key`, payload) VALUES ('t', 'open', '')",
        )
        .await
        .unwrap();
        Self {
            database,
            sql: Sql::new(&config),
            config,
            control,
            open,
        }
    }

    /// Index and kind of access for each table of a statement, and whether anything is sorted.
    async fn plan(&mut self, statement: &str) -> (Vec<(String, String, String)>, bool) {
        let explain = format!("EXPLAIN FORMAT=TRADITIONAL {statement}");
        let rows = sqlx::raw_sql(safe(Arc::new(explain.clone())))
            .fetch_all(&mut self.control)
            .await
            .unwrap_or_else(|error| panic!("{error}: {explain}"));
        let text = |row: &sqlx::mysql::MySqlRow, name: &str| {
            row.try_get_unchecked::<Option<String>, _>(name)
                .unwrap()
                .unwrap_or_default()
        };
        let sorted = rows.iter().any(|row| text(row, "Extra").contains("filesort"));
        let accesses = rows
            .iter()
            .map(|row| {
                let table = Some(text(row, "table")).filter(|table| !table.is_empty());
                let table = table.unwrap_or_else(|| text(row, "Extra"));
                (table, text(row, "type"), text(row, "key"))
            })
            .collect();
        (accesses, sorted)
    }

    /// Each row of `table` that a script of a settlement names is looked up by the primary key.
    async fn looks_up(&mut self, script: &str, begin: &str, table: &str) {
        let statement = script
            .split("; ")
            .find(|part| part.starts_with(begin))
            .unwrap()
            .to_owned();
        let (plan, _) = self.plan(&statement).await;
        let found = plan.iter().find(|(name, ..)| name == table);
        let (_, access, index) = found.unwrap_or_else(|| panic!("{begin}: {plan:?}")).clone();
        assert_eq!(index, "PRIMARY", "{begin}: {plan:?}");
        assert!(
            ["eq_ref", "ref", "const", "range"].contains(&access.as_str()),
            "{begin}: {plan:?}"
        );
    }

    /// Reading goes through an index in its order, and sorts nothing but what the shards of few gave.
    async fn reads_in_order(&mut self) {
        let reads = |mut plan: Vec<(String, String, String)>| {
            plan.retain(|(table, ..)| table == "o");
            plan.into_iter()
                .map(|(_, access, index)| (access, index))
                .collect::<Vec<_>>()
        };
        // The wide part after what is pending, a lane and a single, and before them what lies behind the ends of both; then the
        // first fetch ever, which has only the wide part.
        let (wide, held) = (request(64), &request(64).held);
        let barred = Barred::new(held);
        let mut asking = Asking {
            plan: &plan(&wide, true),
            low: 50,
            floor: 0,
            owned: &wide.shards,
            few: false,
            barred: &barred,
        };
        let (found, sorted) = self.plan(&self.sql.fetch(&asking)).await;
        let indexes: Vec<String> = reads(found.clone()).into_iter().map(|(_, index)| index).collect();
        assert_eq!(
            indexes,
            [
                "PRIMARY",
                "PRIMARY",
                "PRIMARY",
                "outbox_shard",
                "PRIMARY",
                "PRIMARY"
            ],
            "{found:?}"
        );
        assert!(!sorted, "{found:?}");
        let first = plan(&wide, false);
        asking.plan = &first;
        let (found, sorted) = self.plan(&self.sql.fetch(&asking)).await;
        assert_eq!(reads(found.clone()).len(), 2, "{found:?}");
        assert!(
            reads(found.clone()).iter().all(|(_, index)| index == "PRIMARY") && !sorted,
            "{found:?}"
        );

        let few = request(2);
        let first = plan(&few, false);
        asking = Asking {
            plan: &first,
            owned: &few.shards,
            few: true,
            ..asking
        };
        let (found, _) = self.plan(&self.sql.fetch(&asking)).await;
        let indexes: Vec<String> = reads(found.clone()).into_iter().map(|(_, index)| index).collect();
        assert_eq!(indexes, ["PRIMARY", "outbox_shard", "outbox_shard"], "{found:?}");
    }

    /// What is looked at, with the eyes of a dirty read, is a part of the primary key.
    async fn looks_in_order(&mut self) {
        let wide = request(64);
        let plan = plan(&wide, true);
        let barred = Barred::new(&wide.held);
        let asking = Asking {
            plan: &plan,
            low: 50,
            floor: 0,
            owned: &wide.shards,
            few: false,
            barred: &barred,
        };
        let spans = [None, Some(0)].map(|lane| Span {
            lane,
            above: 10,
            upto: 90,
        });
        let mut pending = Pending::new(Duration::from_millis(1));
        let (now, then) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        let look = pending.look(&plan, Vec::new(), &[], now).unwrap();
        pending.learn(
            look,
            Found {
                top: Some(100),
                ..Found::default()
            },
            now,
        );
        let look = pending.look(&plan, spans.to_vec(), &[], then).unwrap();
        assert_eq!(look.spans.len(), 2);
        let script = self.sql.look(&look, &asking);
        let (_, statement) = script.split_once("; ").unwrap();
        let (found, sorted) = self.plan(statement).await;
        let own: Vec<_> = found.iter().filter(|(table, ..)| table == "o").collect();
        assert!(
            own.len() == 3 && own.iter().all(|(.., index)| index == "PRIMARY") && !sorted,
            "{found:?}"
        );
        // The first, for the highest position, may be the whole index, where most of the table lies above.
        assert!(
            own[1..].iter().all(|(_, access, _)| access == "range"),
            "{found:?}"
        );
    }

    /// Nothing that a settlement does waits for the row of an open transaction, which stands right behind the others.
    async fn settles_beside_an_open_insert(&mut self) {
        let leased = "UPDATE outbox_lease SET owner = 'relay', epoch = 1, until = '2100-01-01'; \
                      SET SESSION innodb_lock_wait_timeout = 1; \
                      SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED";
        self.control.execute(leased).await.unwrap();
        let ids: Vec<(i64, Vec<u8>)> =
            sqlx::query_as("SELECT id, message_id FROM outbox ORDER BY id LIMIT 1000")
                .fetch_all(&mut self.control)
                .await
                .unwrap();
        let record = |(id, message): (i64, Vec<u8>)| RecordRef {
            position: Position(id),
            id: outbox_core::MessageId::from_bytes(message.try_into().unwrap()),
        };
        let mut named = settlement();
        named.shards[0].delivered = ids.into_iter().map(record).collect();
        let expected = named.shards[0].delivered.len();
        let others = (1..64).map(|shard| ShardSettlement::new(Shard(shard), Epoch(1)));
        named.shards.extend(others);
        let script = self
            .sql
            .settle(&named)
            .replace("COMMIT", "SELECT COUNT(*) FROM outbox; ROLLBACK");
        let count = async |control: &mut MySqlConnection| -> i64 {
            sqlx::query_scalar("SELECT COUNT(*) FROM outbox")
                .fetch_one(control)
                .await
                .unwrap()
        };
        let before = count(&mut self.control).await;
        let answers = sqlx::raw_sql(safe(Arc::new(script)))
            .fetch_all(&mut self.control)
            .await
            .unwrap();
        let left: i64 = answers.last().unwrap().get_unchecked(0);
        assert_eq!(before - left, i64::try_from(expected).unwrap());
        assert_eq!(count(&mut self.control).await, before);
    }

    async fn gone(mut self) {
        self.open.execute("ROLLBACK").await.unwrap();
        let drop = format!("DROP DATABASE `{}`", self.database);
        self.control.execute(safe(Arc::new(drop))).await.unwrap();
    }
}

fn owned(shards: u16) -> Vec<OwnedShard> {
    let owned = |shard| OwnedShard {
        shard: Shard(shard),
        epoch: Epoch(1),
    };
    (0..shards).map(owned).collect()
}

/// What a busy relay asks for.
fn request(shards: u16) -> FetchRequest {
    let key = |key: &'static str| OrderKey {
        topic: "t".into(),
        key: key.into(),
    };
    FetchRequest {
        shards: owned(shards),
        in_flight: (2..=100).map(|id| (Shard(0), Position(id))).collect(),
        held: Arc::new(Held {
            topics: [Arc::from("held")].into(),
            keys: [(Shard(0), key("k1"))].into(),
            ..Held::default()
        }),
        reread: vec![
            Reread {
                shard: Shard(1),
                scope: RereadScope::Key(key("k2")),
                from: Position(20),
            },
            Reread {
                shard: Shard(1),
                scope: RereadScope::Message,
                from: Position(1),
            },
        ],
        max_rows: 500,
        max_bytes: 1 << 20,
    }
}

/// The plan of a first fetch, or of one that has been at the end, with all that can be in it.
fn plan(request: &FetchRequest, later: bool) -> Plan {
    let mut cursor = Cursor::joint(FetchMode::Cursor, Duration::from_secs(60));
    let start = || Reach::above(i64::MIN);
    if !later {
        return cursor.plan(request, start());
    }
    let first = FetchRequest {
        reread: Vec::new(),
        ..request.clone()
    };
    let plan = cursor.plan(&first, start());
    cursor.conclude(&plan, &Intake::new(&plan), i64::MIN);
    cursor.plan(
        request,
        Reach {
            lowest: 50,
            pending: vec![(5, 5), (7, 9)],
            known: vec![(60, 70), (80, 95)],
        },
    )
}

/// Names everything that a settlement can name.
fn settlement() -> Settlement {
    let record = |position: i64| RecordRef {
        position: Position(position),
        id: outbox_core::MessageId::from_bytes([1; 16]),
    };
    let key = HoldScope::Key(OrderKey {
        topic: "t".into(),
        key: "k1".into(),
    });
    Settlement {
        relay: RelayId::new("relay"),
        shards: vec![ShardSettlement {
            delivered: (1..=10).map(record).collect(),
            dead: vec![Death {
                record: record(11),
                attempts: 1,
                reason: "why".into(),
            }],
            holds: vec![
                HoldChange::Put(Hold {
                    shard: Shard(0),
                    scope: key,
                    head: record(12),
                    attempts: 1,
                    state: HoldState::Parked,
                    reason: "why".into(),
                }),
                HoldChange::Clear(HoldRef {
                    shard: Shard(0),
                    scope: HoldScope::Topic("t".into()),
                    head: record(13),
                }),
            ],
            ..ShardSettlement::new(Shard(0), Epoch(1))
        }],
    }
}

async fn everything_is_looked_up(variable: &str) {
    for rows in [1, 200, 20_000] {
        let mut place = Place::new(variable, rows).await;
        place
            .control
            .execute("SET @outbox_now = UTC_TIMESTAMP(6), @outbox_held = 1")
            .await
            .unwrap();

        // The leases of most shards: those of the others are let alone, too.
        let mut named = settlement();
        named
            .shards
            .extend((1..50).map(|shard| ShardSettlement::new(Shard(shard), Epoch(1))));
        let script = place.sql.settle(&named);
        for (begin, table) in [
            ("SELECT COUNT(*)", "l"),
            ("DELETE o FROM `outbox`", "o"),
            ("DELETE o FROM JSON_TABLE", "o"),
            ("INSERT INTO `outbox_dead`", "o"),
            ("DELETE h", "h"),
        ] {
            place.looks_up(&script, begin, table).await;
        }
        let archive = MysqlConfig {
            archive: true,
            ..place.config.clone()
        };
        let script = Sql::new(&archive).settle(&settlement());
        place
            .looks_up(&script, "INSERT INTO `outbox_processed`", "o")
            .await;
        let due: Vec<(Shard, i64)> = (1..=10).map(|id| (Shard(0), id)).collect();
        let script = place.sql.promote("relay", &owned(1), &due);
        place.looks_up(&script, "DELETE o", "o").await;

        place.settles_beside_an_open_insert().await;
        place.reads_in_order().await;
        place.looks_in_order().await;
        place.gone().await;
    }
}

#[tokio::test]
async fn everything_is_looked_up_by_mysql() {
    everything_is_looked_up("OUTBOX_TEST_MYSQL").await;
}

#[tokio::test]
async fn everything_is_looked_up_by_mariadb() {
    everything_is_looked_up("OUTBOX_TEST_MARIADB").await;
}
