//! The README's table of stores says what the stores themselves say. Needs all servers (`OUTBOX_TEST_POSTGRES`,
//! `OUTBOX_TEST_MYSQL`, `OUTBOX_TEST_MONGO`).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use outbox::mongo::{MongoConfig, MongoStore, mongodb};
use outbox::mysql::sqlx::{AssertSqlSafe, Connection, Executor, MySqlConnection, PgConnection};
use outbox::mysql::{MysqlConfig, MysqlStore};
use outbox::postgres::{Identifier, PostgresConfig, PostgresStore};
use outbox::sqlite::{SqliteConfig, SqliteStore};
use outbox::{Capabilities, OutboxStore};

fn server(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run scripts/services start, then eval \"$(scripts/services env)\"")
    })
}

fn unique() -> String {
    format!("t_{}_{:08x}", std::process::id(), fastrand::u32(..))
}

/// The row of a store that was opened with its defaults, an archive and whatever else it has to be asked for.
fn row(title: &str, store: &dyn OutboxStore) -> String {
    let can = store.capabilities();
    let whole = Capabilities::all(can.name, can.shards, can.ordering);
    assert_eq!(can, whole, "what a store cannot hold has to be told in the table");
    let said = |has: bool| if has { "yes" } else { "no" };
    format!(
        "| {title} | `{}` | {} | {} | {} | {} | {} | {} | {} |",
        can.name,
        can.shards,
        said(store.scheduled().is_some()),
        said(store.retention().is_some()),
        said(store.dead_letters().is_some()),
        said(store.parking().is_some()),
        said(store.inspection().is_some()),
        said(store.wake_up().is_some()),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_of_stores_is_true() {
    let readme = include_str!("../README.md");
    let expect = |row: String| assert!(readme.contains(&row), "the README should have the line\n{row}");
    let name = unique();

    let folder = tempfile::tempdir().unwrap();
    let config = SqliteConfig {
        archive: true,
        ..SqliteConfig::new(folder.path().join("app.db"))
    };
    outbox::sqlite::migrate(&config).unwrap();
    expect(row("SQLite", &SqliteStore::open(config).unwrap()));

    let url = server("OUTBOX_TEST_POSTGRES");
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let config = PostgresConfig {
        schema: Identifier::new(&name).unwrap(),
        archive: true,
        ..PostgresConfig::new(url)
    };
    outbox::postgres::migrate(&config).await.unwrap();
    let store = PostgresStore::connect(config).await.unwrap();
    expect(row("PostgreSQL", &store));
    let dropped = format!("DROP SCHEMA {name} CASCADE");
    connection.execute(AssertSqlSafe(dropped)).await.unwrap();

    let url = server("OUTBOX_TEST_MYSQL");
    let (place, _) = url.rsplit_once('/').unwrap();
    let mut connection = MySqlConnection::connect(&url).await.unwrap();
    let made = format!("CREATE DATABASE {name}");
    connection.execute(AssertSqlSafe(made)).await.unwrap();
    let config = MysqlConfig {
        archive: true,
        ..MysqlConfig::new(format!("{place}/{name}"))
    };
    outbox::mysql::migrate(&config).await.unwrap();
    let store = MysqlStore::connect(config).await.unwrap();
    expect(row("MySQL, MariaDB", &store));
    let dropped = format!("DROP DATABASE {name}");
    connection.execute(AssertSqlSafe(dropped)).await.unwrap();

    let url = server("OUTBOX_TEST_MONGO");
    let (place, _) = url.rsplit_once('/').unwrap();
    let config = MongoConfig {
        archive: true,
        change_stream: true,
        ..MongoConfig::new(format!("{place}/{name}"))
    };
    outbox::mongo::migrate(&config).await.unwrap();
    let store = MongoStore::connect(config).await.unwrap();
    expect(row("MongoDB", &store));
    let client = mongodb::Client::with_uri_str(&url).await.unwrap();
    client.database(&name).drop().await.unwrap();
}
