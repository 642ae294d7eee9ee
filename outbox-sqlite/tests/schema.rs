//! Making the schema, opening it, and what is wrong with files in the wild.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::fs;
use std::process::Command;
use std::thread;

use common::{Place, message};
use outbox_core::{ErrorKind, Ordering, OutboxStore};
use outbox_sqlite::rusqlite::Connection;
use outbox_sqlite::{Identifier, SqliteConfig, SqliteOutbox, SqliteStore, migrate, migration_sql};

fn kind(config: &SqliteConfig) -> ErrorKind {
    let error = SqliteStore::open(config.clone()).unwrap_err();
    println!("{error:?}");
    error.kind()
}

#[test]
fn a_missing_file_is_not_made_by_opening_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = SqliteConfig::new(dir.path().join("none.db"));
    let error = SqliteStore::open(config.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema);
    assert!(
        error.to_string().contains("run migrate") && error.to_string().contains("none.db"),
        "{error}"
    );
    assert!(!config.path.exists());
}

#[test]
fn a_file_without_an_outbox_says_to_migrate() {
    let dir = tempfile::tempdir().unwrap();
    let config = SqliteConfig::new(dir.path().join("app.db"));
    Connection::open(&config.path)
        .unwrap()
        .execute_batch("CREATE TABLE orders (id)")
        .unwrap();
    assert_eq!(kind(&config), ErrorKind::Schema);
    // An empty file is an empty database.
    let empty = SqliteConfig::new(dir.path().join("empty.db"));
    fs::write(&empty.path, b"").unwrap();
    assert_eq!(kind(&empty), ErrorKind::Schema);
}

#[test]
fn a_file_that_is_no_database_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let config = SqliteConfig::new(dir.path().join("notes.txt"));
    fs::write(&config.path, "a text that is long enough. ".repeat(200)).unwrap();
    assert_eq!(kind(&config), ErrorKind::Corrupt);
    assert_eq!(migrate(&config).unwrap_err().kind(), ErrorKind::Corrupt);

    let directory = SqliteConfig::new(dir.path());
    assert!(migrate(&directory).is_err() && SqliteStore::open(directory).is_err());
}

#[test]
fn a_read_only_file_is_refused_at_once() {
    let place = Place::new();
    let config = place.config.clone();
    drop(place.connect()); // the last connection removes the WAL
    let shown = fs::metadata(&config.path).unwrap().permissions();
    let mut closed = shown.clone();
    closed.set_readonly(true);
    fs::set_permissions(&config.path, closed).unwrap();
    if fs::OpenOptions::new().write(true).open(&config.path).is_ok() {
        println!("not applicable: this user may write to everything");
        return;
    }
    assert_eq!(kind(&config), ErrorKind::Denied);
    assert_eq!(migrate(&config).unwrap_err().kind(), ErrorKind::Denied);
    fs::set_permissions(&config.path, shown).unwrap();
}

#[test]
fn migrating_twice_changes_nothing() {
    for ordering in [Ordering::Insert, Ordering::Sequenced] {
        let place = Place::with(|config| config.ordering = ordering);
        place.enqueue(&message("t", Some("k"), "p"));
        let again = migrate(&place.config).unwrap();
        assert_eq!((again.from, again.to), (Some(1), 1));
        let count: i64 = place
            .connect()
            .query_row("SELECT count(*) FROM outbox", [], |row| row.get(0))
            .unwrap();
        assert_eq!(count, 1);
    }
}

#[test]
fn migrating_from_many_connections_at_once_makes_one_outbox() {
    for _ in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        let config = SqliteConfig::new(dir.path().join("app.db"));
        let made: usize = thread::scope(|scope| {
            let all: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| migrate(&config).unwrap().from.is_none()))
                .collect();
            all.into_iter()
                .map(|made| usize::from(made.join().unwrap()))
                .sum()
        });
        assert_eq!(made, 1);
        SqliteStore::open(config).unwrap();
    }
}

/// Run by the test below in processes of their own.
#[test]
#[ignore = "a part of migrating_from_several_processes_makes_one_outbox"]
fn migrate_in_this_process() {
    migrate(&SqliteConfig::new(std::env::var("OUTBOX_TEST_FILE").unwrap())).unwrap();
}

#[test]
fn migrating_from_several_processes_makes_one_outbox() {
    let dir = tempfile::tempdir().unwrap();
    let config = SqliteConfig::new(dir.path().join("app.db"));
    let children: Vec<_> = (0..4)
        .map(|_| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "migrate_in_this_process"])
                .env("OUTBOX_TEST_FILE", &config.path)
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    SqliteStore::open(config).unwrap();
}

#[test]
fn the_ordering_is_fixed_when_the_outbox_is_made() {
    let place = Place::new();
    let other = SqliteConfig {
        ordering: Ordering::Sequenced,
        ..place.config
    };
    let error = SqliteStore::open(other.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema);
    assert!(
        error.to_string().contains("another outbox under a new prefix"),
        "{error}"
    );
    assert_eq!(migrate(&other).unwrap_err().kind(), ErrorKind::Schema);
}

#[test]
fn a_newer_schema_is_refused() {
    let place = Place::new();
    place
        .connect()
        .execute_batch("UPDATE outbox_meta SET value = '999' WHERE name = 'version'")
        .unwrap();
    for error in [
        SqliteStore::open(place.config.clone()).unwrap_err(),
        migrate(&place.config).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Schema);
        assert!(error.to_string().contains("newer"), "{error}");
    }
}

#[test]
fn what_the_relay_relies_on_is_checked() {
    for damage in [
        "DROP TRIGGER outbox_number",
        "DELETE FROM outbox_meta WHERE name = 'version'",
        "UPDATE outbox_meta SET value = 'one' WHERE name = 'version'",
        "DROP TABLE outbox_meta",
        "ALTER TABLE outbox RENAME TO other; CREATE TABLE outbox (id INTEGER PRIMARY KEY, topic)",
    ] {
        let place = Place::with(|config| config.ordering = Ordering::Sequenced);
        place.connect().execute_batch(damage).unwrap();
        assert_eq!(kind(&place.config), ErrorKind::Schema, "{damage}");
    }
}

#[test]
fn a_table_of_the_applications_own_is_never_touched() {
    let dir = tempfile::tempdir().unwrap();
    let config = SqliteConfig::new(dir.path().join("app.db"));
    let connection = Connection::open(&config.path).unwrap();
    connection
        .execute_batch("CREATE TABLE outbox_dead (mine); INSERT INTO outbox_dead VALUES (1)")
        .unwrap();
    let error = migrate(&config).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema);
    assert!(error.to_string().contains("another prefix"), "{error}");
    let tables: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .unwrap();
    assert_eq!(tables, 1, "all or nothing");
}

#[test]
fn text_in_utf_16_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = SqliteConfig::new(dir.path().join("app.db"));
    Connection::open(&config.path)
        .unwrap()
        .execute_batch("PRAGMA encoding = 'UTF-16'; CREATE TABLE t (a)")
        .unwrap();
    assert_eq!(migrate(&config).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn several_outboxes_share_a_file() {
    let place = Place::new();
    let other = place.config.clone().with_prefix("audit").unwrap();
    migrate(&other).unwrap();
    SqliteOutbox::new(&other)
        .unwrap()
        .enqueue(&place.connect(), &message("t", None, "p"))
        .unwrap();
    let store = SqliteStore::open(other).unwrap();
    assert_eq!(store.stats().await.unwrap().backlog.value(), 1);
    assert_eq!(place.store.stats().await.unwrap().backlog.value(), 0);
}

/// The WAL is part of the database: without it the last commits are gone, which is no fault that could be noticed;
/// what is left must be told as what it is.
#[tokio::test]
async fn a_removed_wal_leaves_an_outbox_that_opens() {
    let place = Place::new();
    let stolen = place.dir().join("stolen.db");
    let open = place.connect();
    place.outbox.enqueue(&open, &message("t", None, "p")).unwrap();
    fs::copy(&place.config.path, &stolen).unwrap();
    let store = SqliteStore::open(SqliteConfig::new(&stolen)).unwrap();
    assert_eq!(store.stats().await.unwrap().backlog.value(), 0);

    // A database whose schema was still in the WAL says so.
    let raw = place.dir().join("raw.db");
    let connection = Connection::open(&raw).unwrap();
    let config = SqliteConfig::new(&raw);
    connection
        .execute_batch(&format!(
            "PRAGMA journal_mode = WAL; BEGIN; {} COMMIT",
            migration_sql(&config)
        ))
        .unwrap();
    let stolen = place.dir().join("schemaless.db");
    fs::copy(&raw, &stolen).unwrap();
    assert_eq!(kind(&SqliteConfig::new(stolen)), ErrorKind::Schema);
}

#[tokio::test]
async fn dropped_tables_are_a_matter_of_schema_and_the_store_recovers() {
    let place = Place::new();
    place.lease().await;
    let connection = place.connect();
    connection
        .execute_batch("ALTER TABLE outbox_lease RENAME TO away")
        .unwrap();
    let error = place
        .store
        .release(&place.relay, &[], outbox_core::Membership::Leaves)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema, "{error:?}");
    assert!(error.to_string().contains("run migrate"));
    connection
        .execute_batch("ALTER TABLE away RENAME TO outbox_lease")
        .unwrap();
    place.lease().await;
}

/// Names that have broken quoting elsewhere, each in several surroundings: refused, or harmless.
#[test]
fn hostile_identifiers_are_refused_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let connection = Connection::open(&path).unwrap();
    connection
        .execute_batch("CREATE TABLE canary (a); INSERT INTO canary VALUES ('alive')")
        .unwrap();

    let hostile = [
        "",
        " ",
        "a b",
        "a-b",
        "a.b",
        "a;b",
        "a,b",
        "a'b",
        "a\"b",
        "a`b",
        "a]b",
        "[a",
        "a\\b",
        "a/b",
        "a\0b",
        "a\nb",
        "a\rb",
        "a\tb",
        "a(b",
        "a)b",
        "a*b",
        "a%b",
        "a?b",
        "a?1b",
        "a:b",
        "a@b",
        "a$b",
        "a#b",
        "a{b",
        "a}b",
        "a|b",
        "a=b",
        "a<b",
        "a>b",
        "a+b",
        "a~b",
        "a^b",
        "a&b",
        "a!b",
        "--",
        "/*",
        "*/",
        "1a",
        "9",
        "ä",
        "а",
        "ｏutbox",
        "out\u{200b}box",
        "\u{202e}xobtuo",
        "💥",
        "İ",
        "ſ",
        "K",
        "main.outbox",
        "temp.x",
        "pg_catalog.x",
        "x\"; DROP TABLE canary; --",
        "x'; DROP TABLE canary; --",
        "x`; DROP TABLE canary; --",
        "x]; DROP TABLE canary; --",
        "x\" (a); DROP TABLE canary; --",
        "\"",
        "\"\"",
        "'",
        "''",
        ";",
        "{prefix}",
        "{now}",
        "{ordering}",
        "sqlite",
        "SQLITE",
        "sqlite_master",
        "sqlite_sequence",
        "SQLite_x",
        "%s",
        "${x}",
    ];
    let reserved = [
        "select",
        "table",
        "order",
        "group",
        "index",
        "from",
        "where",
        "drop",
        "values",
        "null",
        "default",
        "trigger",
        "view",
        "rowid",
        "oid",
        "_rowid_",
        "main",
        "temp",
        "_",
        "__",
        "A",
        "z9",
        "true",
        "outbox_outbox",
    ];
    let mut corpus: Vec<String> = Vec::new();
    for name in hostile {
        corpus.extend([
            name.to_owned(),
            format!("x{name}"),
            format!("{name}x"),
            format!("{name}\"; --"),
        ]);
    }
    corpus.extend(reserved.map(str::to_owned));
    corpus.extend([40, 41, 42, 64, 1000, 100_000].map(|length| "a".repeat(length)));
    assert!(corpus.len() >= 200, "{}", corpus.len());

    let mut accepted = 0;
    for name in &corpus {
        let quoted = serde_json::to_string(name).unwrap();
        let parsed = serde_json::from_str::<Identifier>(&quoted);
        let Ok(prefix) = Identifier::new(name) else {
            assert!(parsed.is_err(), "{name:?}");
            continue;
        };
        let legal = name.len() <= 63
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        assert!(legal, "{name:?}");
        accepted += 1;
        let config = SqliteConfig {
            prefix,
            ordering: Ordering::Sequenced,
            ..SqliteConfig::new(&path)
        };
        if config.prefix.as_str().len() > Identifier::MAX_PREFIX_BYTES {
            assert_eq!(migrate(&config).unwrap_err().kind(), ErrorKind::Invalid);
            continue;
        }
        if let Err(error) = migrate(&config) {
            // "a" has a table of the name that "a_sequence" would have.
            assert_eq!(error.kind(), ErrorKind::Schema, "{name}: {error:?}");
            continue;
        }
        SqliteOutbox::new(&config)
            .unwrap()
            .enqueue(&connection, &message("t", Some("k"), "p"))
            .unwrap();
        SqliteStore::open(config).unwrap();
    }
    assert!(accepted >= reserved.len());
    let canary: String = connection
        .query_row("SELECT a FROM canary", [], |row| row.get(0))
        .unwrap();
    assert_eq!(canary, "alive");
}

/// What comes with a message never becomes SQL.
#[tokio::test]
async fn hostile_messages_are_data() {
    let place = Place::new();
    for text in [
        "'; DROP TABLE outbox; --",
        "\"; DROP TABLE outbox; --",
        "x' OR '1'='1",
        "?1",
        "\0",
    ] {
        let message = outbox_core::Message::builder("t")
            .key(text.to_owned())
            .payload(text.to_owned())
            .header("h", text.to_owned())
            .content_type("a/b")
            .build()
            .unwrap();
        place.enqueue(&message);
    }
    let records = place.fetch(10).await;
    assert_eq!(records.len(), 5);
    assert!(
        records
            .iter()
            .all(|record| record.message.key() == record.message.payload())
    );
}
