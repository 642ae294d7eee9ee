//! Producers in any language: plain SQL through the real `psql` and through another language's driver, bytes exact.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::{Place, done, psql, url};
use outbox_core::{
    DeadLetterQuery, MemorySink, Message, MessageId, Ordering, OutboxStore, Record, Relay, Shard,
};
use outbox_postgres::PostgresConfig;

/// With one shard, so that messages come in the order in which they were written.
async fn one_shard(ordering: Ordering) -> Place {
    Place::with(|config| {
        config.shards = 1;
        config.ordering = ordering;
    })
    .await
}

fn run(place: &Place, sql: &str) -> String {
    done(&url(), &place.named(sql))
}

/// What the server said when it refused; nothing may have been written.
fn refusal(place: &Place, sql: &str) -> String {
    let output = psql(&url(), place.named(sql));
    assert!(!output.status.success(), "{sql}");
    String::from_utf8(output.stderr).unwrap()
}

/// A literal that means the same whatever `standard_conforming_strings` is.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn payload(record: &Record) -> &[u8] {
    record.message.payload().unwrap()
}

fn nasty() -> Vec<String> {
    let mut nasty: Vec<String> = [
        r#"{"a": 1}"#,
        "it's \"quoted\"",
        r"back\slash \n \x41 \\ \000 \",
        "line\nbreak\ttab\r\n",
        "süß 日本 🦀 e\u{301}",
        "$$ $1 $outbox$ $body$",
        "\\x6869",
        ":name :'name' %s ?",
        "-- no comment /* none */",
        "",
    ]
    .map(str::to_owned)
    .to_vec();
    nasty.push("0123456789".repeat(10_000));
    nasty
}

#[tokio::test]
async fn one_function_call_is_enough() {
    for ordering in [Ordering::Insert, Ordering::Sequenced] {
        let place = one_shard(ordering).await;
        let id = run(&place, r#"SELECT {_enqueue}('orders', '42', '{"a": 1}')"#);
        let record = &place.fetch(10).await[0];
        assert_eq!(record.message.topic(), "orders");
        assert_eq!(record.message.key().unwrap().as_ref(), b"42");
        assert_eq!(payload(record), br#"{"a": 1}"#);
        assert_eq!(record.message.id().to_string(), id);
        assert!(record.message.created_at().unwrap().elapsed().unwrap().as_secs() < 5);
        assert_eq!(record.defect, None);
        assert_eq!(record.key_seq, (ordering == Ordering::Sequenced).then_some(1));
    }
}

#[tokio::test]
async fn three_columns_are_enough() {
    let place = one_shard(Ordering::Insert).await;
    run(
        &place,
        r#"INSERT INTO {} (topic, key, payload) VALUES ('orders', '42', '{"a":1}')"#,
    );
    let record = &place.fetch(10).await[0];
    assert_eq!(record.message.key().unwrap().as_ref(), b"42");
    assert_eq!(payload(record), br#"{"a":1}"#);
    assert_ne!(record.message.id(), MessageId::from_bytes([0; 16]));
    assert_eq!((record.shard, record.defect.as_deref()), (Shard(0), None));
}

#[tokio::test]
async fn bytes_are_exact() {
    let place = one_shard(Ordering::Insert).await;
    let nasty = nasty();
    for text in &nasty {
        let payload = literal(text);
        // A key is shorter.
        let key = literal(&text.chars().take(100).collect::<String>());
        run(&place, &format!("SELECT {{_enqueue}}('t', {key}, {payload})"));
    }
    // A client with another encoding writes the same characters, and its own end up as UTF-8.
    let latin = place.named("SET client_encoding = 'LATIN1'; SELECT {_enqueue}('t', '?', '?')");
    let latin: Vec<u8> = latin
        .bytes()
        .map(|byte| if byte == b'?' { 0xfc } else { byte })
        .collect();
    assert!(psql(&url(), &latin).status.success());
    for bytes in ["'\\x006100ff00'", "'\\x'"] {
        run(
            &place,
            &format!("SELECT {{_enqueue_bytes}}('t', {bytes}, {bytes})"),
        );
    }
    run(&place, "SELECT {_enqueue}('t', NULL, NULL)");

    let records = place.fetch(100).await;
    assert_eq!(records.len(), nasty.len() + 4);
    for (record, expected) in records.iter().zip(&nasty) {
        assert!(payload(record) == expected.as_bytes(), "{expected}");
        let key: String = expected.chars().take(100).collect();
        assert_eq!(record.message.key().unwrap().as_ref(), key.as_bytes());
    }
    let rest = &records[nasty.len()..];
    assert_eq!(payload(&rest[0]), "ü".as_bytes());
    assert_eq!(payload(&rest[1]), b"\0a\0\xff\0");
    assert_eq!(payload(&rest[2]), b"");
    assert!(rest[3].message.key().is_none() && rest[3].message.payload().is_none());
    assert!(records.iter().all(|record| record.defect.is_none()));
}

/// The other way to write a literal: backslashes that begin escapes even without E.
#[tokio::test]
async fn the_session_s_way_to_write_literals_changes_nothing() {
    let place = one_shard(Ordering::Sequenced).await;
    run(
        &place,
        r"SET standard_conforming_strings = off; SET bytea_output = 'escape'; SET backslash_quote = on;
          SET search_path = pg_temp; SET DateStyle = 'German'; SET TimeZone = 'Asia/Tokyo'; SET IntervalStyle = 'sql_standard';
          SELECT {_enqueue}('t', 'k\\1', 'a\\b')",
    );
    let record = &place.fetch(10).await[0];
    assert_eq!(record.message.key().unwrap().as_ref(), br"k\1");
    assert_eq!(payload(record), br"a\b");
}

/// What the documentation warns of: there a backslash begins an escape, `\\` is one and `\101` is an A.
#[tokio::test]
async fn a_text_literal_put_into_bytea_by_hand_is_changed() {
    let place = one_shard(Ordering::Insert).await;
    run(
        &place,
        r#"INSERT INTO {} (topic, key, payload) VALUES
           ('t', 'k', '{"path": "C:\\temp \101"}'),
           ('t', 'k', '\x6869'),
           ('t', 'k', convert_to('{"path": "C:\\temp \101"}', 'UTF8'))"#,
    );
    let said = refusal(
        &place,
        r#"INSERT INTO {} (topic, key, payload) VALUES ('t', 'k', 'line\nbreak')"#,
    );
    assert!(said.contains("bytea"), "{said}");
    let records = place.fetch(10).await;
    assert_eq!(payload(&records[0]), br#"{"path": "C:\temp A"}"#);
    assert_eq!(payload(&records[1]), b"hi");
    // The remedy.
    assert_eq!(payload(&records[2]), br#"{"path": "C:\\temp \101"}"#);
}

/// A driver that binds bytes needs no function, and nothing is changed on the way.
#[tokio::test]
async fn another_languages_driver_binds_bytes() {
    let place = one_shard(Ordering::Insert).await;
    let script = r#"
import sys, psycopg2
url, outbox, enqueue = sys.argv[1:]
connection = psycopg2.connect(url)
cursor = connection.cursor()
insert = "INSERT INTO " + outbox + " (topic, key, payload) VALUES (%s, %s, %s)"
every = bytes(range(256))
cursor.execute(insert, ("orders", b"42", every))
cursor.execute(insert, ("orders", "sü\\ß".encode(), 'C:\\temp \\101 \U0001f980'.encode()))
cursor.execute(insert, ("orders", None, None))
connection.commit()
cursor.execute(insert, ("orders", b"42", b"never"))
connection.rollback()
cursor.execute("SELECT " + enqueue + "(%s, %s, %s)", ("orders", "42", 'C:\\temp \\101 \U0001f980\n'))
print(cursor.fetchone()[0])
connection.commit()
"#;
    let mut python = Command::new(python())
        .args(["-", &url(), &place.table(""), &place.table("_enqueue")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    python.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    let records = place.fetch(10).await;
    assert_eq!(records.len(), 4);
    assert_eq!(payload(&records[0]), (0..=255).collect::<Vec<u8>>());
    assert_eq!(records[1].message.key().unwrap().as_ref(), r"sü\ß".as_bytes());
    assert_eq!(payload(&records[1]), r"C:\temp \101 🦀".as_bytes());
    assert!(records[2].message.key().is_none() && records[2].message.payload().is_none());
    assert_eq!(payload(&records[3]), "C:\\temp \\101 🦀\n".as_bytes());
    let id = String::from_utf8(output.stdout).unwrap();
    assert_eq!(records[3].message.id().to_string(), id.trim());
}

/// The one that knows the driver: the first on PATH may be of a version manager's, which does not see the system's
/// packages.
fn python() -> &'static str {
    ["python3", "/usr/bin/python3"]
        .into_iter()
        .find(|program| {
            Command::new(program)
                .args(["-c", "import psycopg2"])
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success())
        })
        .expect("a python3 that can import psycopg2 is installed (Debian: python3-psycopg2)")
}

#[tokio::test]
async fn what_could_never_be_sent_is_refused_in_the_producers_transaction() {
    for ordering in [Ordering::Insert, Ordering::Sequenced] {
        let place = one_shard(ordering).await;
        run(
            &place,
            &format!("CREATE TABLE {} (a int)", place.table("_business")),
        );
        for call in [
            "{_enqueue}('', 'k', 'p')",
            "{_enqueue}(NULL, 'k', 'p')",
            "{_enqueue}('.', 'k', 'p')",
            "{_enqueue}('..', 'k', 'p')",
            "{_enqueue}('no spaces', 'k', 'p')",
            "{_enqueue}('ü', 'k', 'p')",
            "{_enqueue}(E'line\\n', 'k', 'p')",
            "{_enqueue}(repeat('a', 250), 'k', 'p')",
            "{_enqueue}('t', repeat('k', 1025), 'p')",
            "{_enqueue}('t', repeat('ü', 513), 'p')",
            "{_enqueue}('t', 'k', 'p', '{')",
            "{_enqueue}('t', 'k', 'p', '')",
            "{_enqueue}('t', 'k', 'p', NULL, '')",
            "{_enqueue}('t', 'k', 'p', deliver_at => 'yesterdayish')",
            "{_enqueue}('t', 'k', 'p', deliver_at => 'infinity')",
            "{_enqueue}('no good', 'k', 'p', deliver_at => now() + interval '1 hour')",
            "{_enqueue}('t', repeat('k', 1025), 'p', deliver_at => now() + interval '1 hour')",
        ] {
            let said = refusal(
                &place,
                &format!(
                    "BEGIN; INSERT INTO {} VALUES (1); SELECT {call}; COMMIT",
                    place.table("_business")
                ),
            );
            assert!(said.contains("ERROR"), "{call}: {said}");
        }
        for columns in [
            "(topic, message_id) VALUES ('t', 'abc')",
            "(topic, message_id) VALUES ('t', NULL)",
            "(topic, created_at) VALUES ('t', 'yesterdayish')",
            "(topic, created_at) VALUES ('t', 'infinity')",
            "(topic, created_at) VALUES ('t', '-infinity')",
            "(topic, created_at) VALUES ('t', NULL)",
            "(topic, shard) VALUES ('t', 0)",
        ] {
            refusal(&place, &format!("INSERT INTO {{}} {columns}"));
        }
        run(
            &place,
            "SELECT {_enqueue}(repeat('a', 249), repeat('k', 1024), 'p')",
        );
        assert_eq!(place.fetch(10).await.len(), 1);
        let business = format!("SELECT count(*) FROM {}", place.table("_business"));
        assert_eq!(run(&place, &business), "0");
    }
}

#[tokio::test]
async fn a_bare_insert_into_a_numbered_outbox_is_told_the_remedy() {
    let place = one_shard(Ordering::Sequenced).await;
    let said = refusal(
        &place,
        "INSERT INTO {} (topic, key, payload) VALUES ('t', 'k', 'p')",
    );
    assert!(said.contains("outbox_use_enqueue_function"), "{said}");
    // Without a key there is nothing to be numbered.
    run(&place, "INSERT INTO {} (topic, payload) VALUES ('t', 'p')");
    assert_eq!(place.fetch(10).await.len(), 1);
}

#[tokio::test]
async fn numbers_have_no_gaps_whoever_enqueues() {
    let place = one_shard(Ordering::Sequenced).await;
    run(&place, "SELECT {_enqueue}('t', 'k', '1')");
    place.enqueue(&[common::message("t", Some("k"), "2")]).await;
    run(&place, "BEGIN; SELECT {_enqueue}('t', 'k', 'never'); ROLLBACK");
    run(&place, "SELECT {_enqueue_bytes}('t', 'k', '3')");
    run(
        &place,
        "SELECT {_enqueue}('t', 'k', n::text) FROM generate_series(4, 6) n",
    );
    place
        .enqueue(&[
            common::message("t", Some("k"), "7"),
            common::message("u", Some("k"), "1"),
            common::message("t", None, "none"),
            common::message("t", Some("k"), "8"),
        ])
        .await;
    for record in place.fetch(20).await {
        let number = record
            .key_seq
            .map_or("none".to_owned(), |number| number.to_string());
        assert_eq!(payload(&record), number.as_bytes());
    }
    assert_eq!(place.fetch(20).await.len(), 10);
}

#[tokio::test]
async fn headers_are_an_object_of_strings_or_the_library_s_own_form() {
    let place = one_shard(Ordering::Insert).await;
    run(
        &place,
        r#"SELECT {_enqueue}('t', 'k', 'p', '{"trace": "a\u00fc\"", "b": ""}', 'text/plain')"#,
    );
    run(&place, "SELECT {_enqueue}('t', 'k', 'p', '{ }')");
    let records = place.fetch(10).await;
    let headers: Vec<_> = records[0]
        .message
        .headers()
        .iter()
        .map(|(name, value)| (name.to_owned(), value.to_vec()))
        .collect();
    assert_eq!(
        headers,
        [
            // An object has no order; names come sorted.
            ("b".to_owned(), Vec::new()),
            ("trace".to_owned(), "aü\"".as_bytes().to_vec())
        ]
    );
    assert_eq!(records[0].message.content_type(), Some("text/plain"));
    assert!(records[1].message.headers().is_empty());
    assert!(records.iter().all(|record| record.defect.is_none()));
}

/// Through a whole relay: what nobody could have enqueued dies alone, and its key goes on.
#[tokio::test]
async fn bad_rows_are_dead_letters_alone() {
    let place = one_shard(Ordering::Insert).await;
    let bad = [
        r#"(topic, key, headers) VALUES ('t', 'k', '{"a": 1}')"#,
        r#"(topic, key, headers) VALUES ('t', 'k', '[1]')"#,
        r#"(topic, key, headers) VALUES ('t', 'k', 'null')"#,
        r#"(topic, key, headers) VALUES ('t', 'k', '{"a": "\u0000", "b": [1]}')"#,
        r#"(topic, key, headers) VALUES ('t', 'k', '{"outbox-id": "spoof"}')"#,
        r#"(topic, key, headers) VALUES ('t', 'k', '{"a\r\nb": "x"}')"#,
        r#"(topic, key, headers) VALUES ('t', 'k', '{"": "x"}')"#,
        r#"(topic, key, headers) VALUES ('t', 'k', '[["a","\ud800"]]')"#,
        "(topic, key, content_type) VALUES ('t', 'k', E'a\\n')",
    ];
    for (number, columns) in bad.iter().enumerate() {
        run(&place, &format!("SELECT {{_enqueue}}('t', 'k', '{number}')"));
        run(&place, &format!("INSERT INTO {{}} {columns}"));
    }
    for created_at in ["4713-01-01 00:00 BC", "1969-12-31", "9999-12-31", "294276-12-31"] {
        run(
            &place,
            &format!(
                "INSERT INTO {{}} (topic, key, payload, created_at) VALUES ('t', 'old', 'p', '{created_at}')"
            ),
        );
    }
    place.store.stats().await.unwrap();

    let sink = MemorySink::new();
    let relay = Relay::new(Arc::new(place.store.clone()), Box::new(sink.clone()));
    tokio::time::timeout(Duration::from_secs(30), relay.drain(std::future::pending()))
        .await
        .unwrap()
        .unwrap();
    let delivered = sink.delivered();
    let good: Vec<_> = delivered
        .iter()
        .filter(|record| record.message.key().unwrap().as_ref() == b"k")
        .map(|record| String::from_utf8(payload(record).to_vec()).unwrap())
        .collect();
    assert_eq!(
        good,
        (0..bad.len())
            .map(|number| number.to_string())
            .collect::<Vec<_>>()
    );
    assert_eq!(delivered.len(), bad.len() + 4);
    let query = DeadLetterQuery::default();
    let listed = place.store.dead_letters().unwrap().list(&query).await.unwrap();
    assert_eq!(listed.len(), bad.len());
    assert_eq!(place.store.stats().await.unwrap().backlog.value(), 0);
}

#[tokio::test]
async fn a_message_is_scheduled_by_sql() {
    for ordering in [Ordering::Insert, Ordering::Sequenced] {
        let place = one_shard(ordering).await;
        run(
            &place,
            "SELECT {_enqueue}('t', 'k', 'later', deliver_at => now() + interval '1 hour')",
        );
        run(
            &place,
            "SELECT {_enqueue}('t', 'k', 'now', deliver_at => now() - interval '1 hour')",
        );
        run(
            &place,
            "SELECT {_enqueue}('t', 'k', 'now', deliver_at => '-infinity')",
        );
        // As far as a clock goes.
        run(
            &place,
            "SELECT {_enqueue}('t', 'k', 'never', deliver_at => '294276-12-31')",
        );
        let owned = place.lease().await;
        let scheduled = place.store.scheduled().unwrap();
        let promotion = scheduled.promote(&place.relay, &owned, 10).await.unwrap();
        assert_eq!(promotion.promoted, 0);
        let next_in = promotion.next_in.unwrap();
        assert!((3500..=3600).contains(&next_in.as_secs()), "{next_in:?}");
        assert_eq!(place.fetch(10).await.len(), 2);
        run(
            &place,
            "UPDATE {_scheduled} SET deliver_at = now() WHERE payload = 'later'",
        );
        let promotion = scheduled.promote(&place.relay, &owned, 10).await.unwrap();
        assert_eq!(promotion.promoted, 1);
        let records = place.fetch(10).await;
        assert_eq!(payload(&records[2]), b"later");
        if ordering == Ordering::Sequenced {
            assert_eq!(records[2].key_seq, Some(3), "numbered when it is promoted");
        }
        assert_eq!(place.store.stats().await.unwrap().scheduled, 1);
    }
}

#[tokio::test]
async fn the_status_of_each_message_can_be_asked_for() {
    let place = one_shard(Ordering::Insert).await;
    run(
        &place,
        "INSERT INTO {} (topic, key) VALUES ('t', 'pending'), ('t', 'parked'), ('t', 'retrying'), ('u', NULL), ('t', NULL);
         INSERT INTO {_scheduled} (topic, key, deliver_at) VALUES ('t', 'later', '2100-01-01');
         INSERT INTO {_processed} (position, message_id, topic, key, created_at) VALUES (0, gen_random_uuid(), 't', 'done', now());
         INSERT INTO {_dead} (position, message_id, topic, key, created_at, attempts, reason)
           VALUES (0, gen_random_uuid(), 't', 'dead', now(), 1, 'r');
         INSERT INTO {_hold} (shard, scope, topic, key, message, head, head_message_id, attempts, parked, due_at, reason) VALUES
           (0, 'key', 't', 'parked', 0, 2, gen_random_uuid(), 1, true, now(), 'r'),
           (0, 'key', 't', 'retrying', 0, 3, gen_random_uuid(), 1, false, now(), 'r'),
           (0, 'topic', 'u', '', 0, 4, gen_random_uuid(), 1, true, now(), 'r'),
           (0, 'message', '', '', 5, 5, gen_random_uuid(), 1, false, now(), 'r');",
    );
    let statuses = run(&place, "SELECT string_agg(status, ',') FROM {_status}");
    assert_eq!(
        statuses,
        "pending,parked,retrying,parked,retrying,scheduled,processed,dead"
    );
}

/// What the documentation says of how to enqueue from other languages is what the outbox takes.
#[tokio::test]
async fn two_producers_of_two_kinds_share_a_key_and_a_shard() {
    let place = Place::new().await;
    run(&place, "SELECT {_enqueue}('t', 'sü\\ß', '1')");
    let twin = Message::builder("t")
        .key(r"sü\ß".to_owned())
        .payload("2")
        .build()
        .unwrap();
    place.enqueue(&[twin]).await;
    let owned = place.lease().await;
    let mut reader = place.store.reader().await.unwrap();
    let (records, _) = common::fetch(&mut reader, &common::request(&owned, 10_000)).await;
    assert_eq!(records.len(), 2);
    assert_eq!(records[0].shard, records[1].shard);
    assert_eq!(records[0].message.key(), records[1].message.key());
    let config: &PostgresConfig = &place.config;
    assert_eq!(config.shards, 64);
}
