//! Producers in any language: plain SQL through the real `sqlite3` shell, bytes exact.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::process::{Command, Output};

use common::Place;
use outbox_core::{DeadLetterQuery, MessageId, Ordering, OutboxStore, Record};

fn shell(place: &Place, sql: &str) -> Output {
    Command::new("sqlite3")
        .arg("-bail")
        .arg(&place.config.path)
        .arg(sql)
        .output()
        .expect("the program sqlite3 is installed")
}

fn done(place: &Place, sql: &str) {
    let output = shell(place, sql);
    assert!(
        output.status.success(),
        "{sql}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn payload(record: &Record) -> &[u8] {
    record.message.payload().unwrap()
}

#[tokio::test]
async fn three_columns_are_enough() {
    let place = Place::new();
    done(
        &place,
        r#"INSERT INTO outbox (topic, key, payload) VALUES ('orders', '42', '{"a":1}')"#,
    );
    let record = &place.fetch(10).await[0];
    assert_eq!(record.message.topic(), "orders");
    assert_eq!(record.message.key().unwrap().as_ref(), b"42");
    assert_eq!(payload(record), br#"{"a":1}"#);
    assert_ne!(record.message.id(), MessageId::from_bytes([0; 16]));
    assert!(record.message.created_at().unwrap().elapsed().unwrap().as_secs() < 5);
    assert_eq!(record.defect, None);
}

#[tokio::test]
async fn bytes_are_exact() {
    let place = Place::new();
    let cases: [(&str, &[u8]); 9] = [
        ("'it''s \"quoted\"'", b"it's \"quoted\""),
        (r"'back\slash \n \x41 \\'", br"back\slash \n \x41 \\"),
        ("'line\nbreak\ttab'", b"line\nbreak\ttab"),
        ("'süß 日本 🦀'", "süß 日本 🦀".as_bytes()),
        ("x'006100ff00'", b"\0a\0\xff\0"),
        ("CAST(x'6100' AS TEXT)", b"a\0"),
        ("42", b"42"),
        ("''", b""),
        ("x''", b""),
    ];
    for (literal, _) in cases {
        done(
            &place,
            &format!("INSERT INTO outbox (topic, key, payload) VALUES ('t', {literal}, {literal})"),
        );
    }
    done(&place, "INSERT INTO outbox (topic) VALUES ('t')");
    let records = place.fetch(100).await;
    assert_eq!(records.len(), cases.len() + 1);
    for (record, (literal, expected)) in records.iter().zip(cases) {
        assert_eq!(payload(record), expected, "{literal}");
        assert_eq!(record.message.key().unwrap().as_ref(), expected, "{literal}");
        assert_eq!(record.defect, None);
    }
    assert!(records[9].message.key().is_none() && records[9].message.payload().is_none());
}

#[tokio::test]
async fn what_could_never_be_sent_is_refused_in_the_producers_transaction() {
    let place = Place::new();
    for columns in [
        "(topic) VALUES ('')",
        "(topic) VALUES (NULL)",
        "(topic) VALUES ('.')",
        "(topic) VALUES ('..')",
        "(topic) VALUES ('no spaces')",
        "(topic) VALUES ('ü')",
        "(topic) VALUES (x'6f')",
        "(topic) VALUES (CAST(x'6f006f' AS TEXT))",
        "(topic) VALUES (CAST(x'6fff' AS TEXT))",
        "(topic) VALUES (replace(hex(zeroblob(125)), '0', 'a'))",
        "(topic, key) VALUES ('t', zeroblob(1025))",
        "(topic, headers) VALUES ('t', '{')",
        "(topic, headers) VALUES ('t', '')",
        "(topic, content_type) VALUES ('t', '')",
        "(topic, content_type) VALUES ('t', x'00')",
        "(topic, message_id) VALUES ('t', 'abc')",
        "(topic, message_id) VALUES ('t', x'00')",
        "(topic, message_id) VALUES ('t', NULL)",
        "(topic, created_at) VALUES ('t', 'yesterday')",
    ] {
        let output = shell(&place, &format!("INSERT INTO outbox {columns}"));
        assert!(!output.status.success(), "{columns}");
    }
    done(
        &place,
        "INSERT INTO outbox (topic, key) VALUES (replace(hex(zeroblob(124)), '0', 'a') || 'a', zeroblob(1024))",
    );
    assert_eq!(place.fetch(10).await.len(), 1);
}

#[tokio::test]
async fn text_blob_and_number_are_one_key() {
    let place = Place::with(|config| config.ordering = Ordering::Sequenced);
    done(
        &place,
        "INSERT INTO outbox (topic, key) VALUES ('t', '42'), ('t', x'3432'), ('t', 42), ('u', '42'), ('t', NULL)",
    );
    let numbers: Vec<_> = place
        .fetch(10)
        .await
        .iter()
        .map(|record| record.key_seq)
        .collect();
    assert_eq!(numbers, [Some(1), Some(2), Some(3), Some(1), None]);

    let first = &place.fetch(1).await[0];
    let mut request = common::request(place.lease().await, 10);
    let mut held = outbox_core::Held::default();
    held.keys
        .insert((first.shard, first.message.order_key().unwrap()));
    request.held = held.into();
    let mut reader = place.store.reader().await.unwrap();
    let (others, _) = common::fetch(&mut reader, &request).await;
    assert_eq!(others.len(), 2);
}

#[tokio::test]
async fn numbers_have_no_gaps_whatever_the_statement_says() {
    let place = Place::with(|config| config.ordering = Ordering::Sequenced);
    for sql in [
        "INSERT INTO outbox (topic, key) VALUES ('t', 'k')",
        "INSERT OR IGNORE INTO outbox (topic, key) VALUES ('t', 'k')",
        "INSERT OR REPLACE INTO outbox (topic, key) VALUES ('t', 'k')",
        "INSERT OR ROLLBACK INTO outbox (topic, key) VALUES ('t', 'k')",
        "INSERT INTO outbox (topic, key, key_seq) VALUES ('t', 'k', 77)",
        "INSERT OR IGNORE INTO outbox (topic, key) VALUES ('no good', 'k')",
        "BEGIN; INSERT INTO outbox (topic, key) VALUES ('t', 'k'); ROLLBACK",
        "INSERT INTO outbox (topic, key) SELECT 't', 'k' FROM (VALUES (1), (2), (3))",
    ] {
        done(&place, sql);
    }
    let numbers: Vec<_> = place
        .fetch(20)
        .await
        .iter()
        .map(|record| record.key_seq)
        .collect();
    assert_eq!(numbers, (1..=8).map(Some).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_hand_written_number_means_nothing_without_numbering() {
    let place = Place::new();
    done(
        &place,
        "INSERT INTO outbox (topic, key, key_seq) VALUES ('t', 'k', 77)",
    );
    assert_eq!(place.fetch(1).await[0].key_seq, None);
}

#[tokio::test]
async fn bad_rows_are_defective_alone() {
    let place = Place::new();
    for sql in [
        r#"INSERT INTO outbox (topic, headers) VALUES ('t', '[1]')"#,
        r#"INSERT INTO outbox (topic, headers) VALUES ('t', '{"outbox-id": "spoof"}')"#,
        r#"INSERT INTO outbox (topic, headers) VALUES ('t', '{"a\r\nb": "x"}')"#,
        r#"INSERT INTO outbox (topic, headers) VALUES ('t', '{"": "x"}')"#,
        r#"INSERT INTO outbox (topic, headers) VALUES ('t', '[["a","\ud800"]]')"#,
        "INSERT INTO outbox (topic, content_type) VALUES ('t', 'a' || char(10))",
        "PRAGMA ignore_check_constraints = 1; INSERT INTO outbox (topic) VALUES ('no good')",
        "PRAGMA ignore_check_constraints = 1; INSERT INTO outbox (topic) VALUES (x'ff')",
        "PRAGMA ignore_check_constraints = 1; INSERT INTO outbox (topic, key) VALUES ('t', zeroblob(1025))",
        "PRAGMA ignore_check_constraints = 1; INSERT INTO outbox (topic, message_id) VALUES ('t', 'abc')",
        "PRAGMA ignore_check_constraints = 1; INSERT INTO outbox (topic, message_id) VALUES ('t', x'00')",
        "PRAGMA ignore_check_constraints = 1; INSERT INTO outbox (topic, headers) VALUES ('t', x'ff')",
    ] {
        done(&place, sql);
    }
    for created_at in [i64::MIN, -1, 253_402_300_799_000, i64::MAX] {
        done(
            &place,
            &format!("INSERT INTO outbox (topic, created_at) VALUES ('fine', {created_at})"),
        );
    }
    done(
        &place,
        r#"INSERT INTO outbox (topic, headers) VALUES ('fine', '{"a": "1"}')"#,
    );

    let owned = place.lease().await;
    let records = place.fetch(100).await;
    assert_eq!(records.len(), 17);
    let (good, bad): (Vec<Record>, Vec<Record>) =
        records.into_iter().partition(|record| record.defect.is_none());
    assert_eq!(good.len(), 5);
    assert!(good.iter().all(|record| record.message.topic() == "fine"));

    // The relay gives up the bad ones, and they are gone.
    let mut part = outbox_core::ShardSettlement::new(owned.shard, owned.epoch);
    part.delivered = good.iter().map(Record::reference).collect();
    part.dead = bad
        .iter()
        .map(|record| outbox_core::Death {
            record: record.reference(),
            attempts: 0,
            reason: record.defect.clone().unwrap(),
        })
        .collect();
    place.store.settle(&place.settlement(part)).await.unwrap();
    assert!(place.fetch(10).await.is_empty());
    assert_eq!(place.store.stats().await.unwrap().dead, 12);
    let query = DeadLetterQuery::default();
    let listed = place.store.dead_letters().unwrap().list(&query).await.unwrap();
    assert_eq!(listed.len(), 12);
}

#[tokio::test]
async fn the_status_of_each_message_can_be_asked_for() {
    let place = Place::new();
    done(
        &place,
        "INSERT INTO outbox (topic, key) VALUES ('t', 'pending'), ('t', 'parked'), ('t', 'retrying'), ('u', NULL), ('t', NULL);
         INSERT INTO outbox_scheduled (topic, key, deliver_at) VALUES ('t', 'later', 9000000000000);
         INSERT INTO outbox_hold (scope, topic, key, message, head, head_message_id, attempts, parked, due_at, reason) VALUES
           ('key', 't', CAST('parked' AS BLOB), 0, 2, zeroblob(16), 1, 1, 0, 'r'),
           ('key', 't', CAST('retrying' AS BLOB), 0, 3, zeroblob(16), 1, 0, 0, 'r'),
           ('topic', 'u', x'', 0, 4, zeroblob(16), 1, 1, 0, 'r'),
           ('message', '', x'', 5, 5, zeroblob(16), 1, 0, 0, 'r');",
    );
    let output = shell(&place, "SELECT group_concat(status) FROM outbox_status");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "pending,parked,retrying,parked,retrying,scheduled"
    );
}

#[test]
fn the_migration_runs_in_the_shell() {
    for ordering in [Ordering::Insert, Ordering::Sequenced] {
        let dir = tempfile::tempdir().unwrap();
        let config = outbox_sqlite::SqliteConfig {
            ordering,
            ..outbox_sqlite::SqliteConfig::new(dir.path().join("shell.db"))
        };
        let sql = format!(
            "PRAGMA journal_mode = WAL; BEGIN; {} COMMIT;",
            outbox_sqlite::migration_sql(&config)
        );
        let output = Command::new("sqlite3")
            .arg("-bail")
            .arg(&config.path)
            .arg(&sql)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        outbox_sqlite::SqliteStore::open(config.clone()).unwrap();
        assert_eq!(outbox_sqlite::migrate(&config).unwrap().from, Some(1));
    }
}
