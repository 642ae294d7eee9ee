//! Producers in any language: plain SQL through the servers' own shells and through a driver that binds, bytes exact.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Place, Server, done, message, on_each_server, shell};
use outbox_core::{
    DeadLetterQuery, ErrorKind, MemorySink, Message, MessageId, Ordering, OutboxStore, Record, Relay, Shard,
    shard_of,
};
use outbox_mysql::sqlx::{self, AssertSqlSafe, Row};

const ORDERINGS: [Ordering; 2] = [Ordering::Insert, Ordering::Sequenced];

/// With one shard, so that messages come in the order in which they were written.
async fn one_shard(server: Server, ordering: Ordering) -> Place {
    Place::with(server, |config| {
        config.shards = 1;
        config.ordering = ordering;
    })
    .await
}

fn url(place: &Place) -> String {
    place.server.database(&place.database)
}

fn run(place: &Place, sql: &str) -> String {
    done(place.server, &url(place), &place.named(sql))
}

/// In a transaction, which an outbox that numbers its messages wants.
fn call(place: &Place, sql: &str) {
    run(place, &format!("START TRANSACTION; CALL {sql}; COMMIT"));
}

/// What the server said when it refused.
fn refusal(place: &Place, sql: &str) -> String {
    let output = shell(place.server, &url(place), place.named(sql));
    assert!(!output.status.success(), "{sql}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A literal of text under the servers' default mode.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\\', r"\\").replace('\'', "''"))
}

fn hex(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("X'{digits}'")
}

fn payload(record: &Record) -> &[u8] {
    record.message.payload().unwrap()
}

fn key(record: &Record) -> &[u8] {
    record.message.key().unwrap()
}

fn nasty() -> Vec<String> {
    let mut nasty: Vec<String> = [
        r#"{"a": 1}"#,
        "it's \"quoted\" `ticked`",
        r"back\slash \n \x41 \\ \000 \% \_ \",
        "line\nbreak\ttab\r\n",
        "süß 日本 🦀 e\u{301}",
        "nul\0 sub\u{1a} del\u{7f}",
        "DELIMITER //\nDELIMITER //\nuse mysql\nquit\n\\q",
        ":name @name @@version %s ? ${x} {prefix}",
        "-- no comment /* none */ # none /*! none */",
        " spaces ",
        "",
    ]
    .map(str::to_owned)
    .to_vec();
    nasty.push("0123456789".repeat(10_000));
    nasty
}

fn short(text: &str) -> String {
    text.chars().take(100).collect()
}

async fn one_call_is_enough(server: Server) {
    for ordering in ORDERINGS {
        let place = one_shard(server, ordering).await;
        call(&place, r#"{_enqueue}('orders', '42', '{"a": 1}')"#);
        let record = &place.fetch(10).await[0];
        assert_eq!(record.message.topic(), "orders");
        assert_eq!(key(record), b"42");
        assert_eq!(payload(record), br#"{"a": 1}"#);
        assert_ne!(record.message.id(), MessageId::from_bytes([0; 16]));
        assert!(record.message.created_at().unwrap().elapsed().unwrap().as_secs() < 5);
        assert_eq!((record.shard, record.defect.as_deref()), (Shard(0), None));
        assert_eq!(record.key_seq, (ordering == Ordering::Sequenced).then_some(1));
    }
}

async fn three_columns_are_enough(server: Server) {
    let place = one_shard(server, Ordering::Insert).await;
    run(
        &place,
        r#"INSERT INTO {} (topic, `key`, payload) VALUES ('orders', '42', '{"a":1}'), ('orders', '42', '{"a":2}')"#,
    );
    let records = place.fetch(10).await;
    assert_eq!(key(&records[0]), b"42");
    assert_eq!(payload(&records[0]), br#"{"a":1}"#);
    assert_eq!(payload(&records[1]), br#"{"a":2}"#);
    assert_ne!(
        records[0].message.id(),
        records[1].message.id(),
        "each row has its own"
    );
    assert!(
        records[0]
            .message
            .created_at()
            .unwrap()
            .elapsed()
            .unwrap()
            .as_secs()
            < 5
    );
    assert!(records.iter().all(|record| record.defect.is_none()));
}

async fn bytes_are_exact_through_the_shell(server: Server) {
    let place = one_shard(server, Ordering::Insert).await;
    // The shells themselves change a NUL, and the end of a line, on their way.
    let nasty: Vec<String> = nasty()
        .into_iter()
        .filter(|text| !text.contains(['\0', '\r']))
        .collect();
    for text in &nasty {
        let (key, payload) = (literal(&short(text)), literal(text));
        run(&place, &format!("CALL {{_enqueue}}('t', {key}, {payload})"));
        run(
            &place,
            &format!("INSERT INTO {{}} (topic, `key`, payload) VALUES ('t', {key}, {payload})"),
        );
        let (key, payload) = (hex(short(text).as_bytes()), hex(text.as_bytes()));
        run(
            &place,
            &format!("CALL {{_enqueue_bytes}}('t', {key}, {payload}, NULL, NULL, NULL)"),
        );
    }
    let records = place.fetch(1_000).await;
    assert_eq!(records.len(), 3 * nasty.len());
    for (records, expected) in records.chunks(3).zip(&nasty) {
        for record in records {
            assert!(payload(record) == expected.as_bytes(), "{expected}");
            assert_eq!(key(record), short(expected).as_bytes());
            assert_eq!(record.defect, None);
        }
    }
}

async fn escapes_null_and_bytes_that_are_no_text(server: Server) {
    let place = one_shard(server, Ordering::Insert).await;
    run(&place, r"CALL {_enqueue}('t', 'a\0b', 'a\0b\r\n\Z\'\\')");
    for bytes in ["X'006100FF00'", "X''"] {
        let call = format!("CALL {{_enqueue_bytes}}('t', {bytes}, {bytes}, NULL, NULL, NULL)");
        run(&place, &call);
    }
    run(
        &place,
        "INSERT INTO {} (topic, `key`, payload) VALUES ('t', X'00FF', X'FF00')",
    );
    run(&place, "CALL {_enqueue}('t', '', '')");
    run(&place, "CALL {_enqueue}('t', NULL, NULL)");
    run(&place, "INSERT INTO {} (topic) VALUES ('t')");
    let records = place.fetch(100).await;
    let told: Vec<_> = records
        .iter()
        .map(|record| (record.message.key().cloned(), record.message.payload().cloned()))
        .collect();
    let bytes = |bytes: &'static [u8]| Some(bytes.into());
    assert_eq!(
        told,
        [
            (bytes(b"a\0b"), bytes(b"a\0b\r\n\x1a'\\")),
            (bytes(b"\0a\0\xff\0"), bytes(b"\0a\0\xff\0")),
            (bytes(b""), bytes(b"")),
            (bytes(b"\0\xff"), bytes(b"\xff\0")),
            (bytes(b""), bytes(b"")),
            (None, None),
            (None, None),
        ]
    );
    assert!(records.iter().all(|record| record.defect.is_none()));
}

/// A client with another character set writes the same characters, which end up as UTF-8; by hand they would not.
async fn the_clients_character_set_changes_nothing_through_the_procedure(server: Server) {
    let place = one_shard(server, Ordering::Sequenced).await;
    let sql = place.named(
        "SET NAMES latin1; START TRANSACTION; CALL {_enqueue}('t', '~', '~'); COMMIT;
         INSERT INTO {} (topic, payload) VALUES ('t', '~')",
    );
    let latin: Vec<u8> = sql
        .bytes()
        .map(|byte| if byte == b'~' { 0xfc } else { byte })
        .collect();
    let output = shell(server, &url(&place), latin);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let records = place.fetch(10).await;
    assert_eq!(key(&records[0]), "ü".as_bytes());
    assert_eq!(payload(&records[0]), "ü".as_bytes());
    assert_eq!(payload(&records[1]), b"\xfc", "the remedy is the procedure");
}

/// The other way to write a literal, and a session that is strange in every way.
async fn the_sessions_settings_change_nothing(server: Server) {
    let place = one_shard(server, Ordering::Sequenced).await;
    run(
        &place,
        r#"SET SESSION sql_mode = 'ANSI,NO_BACKSLASH_ESCAPES,PIPES_AS_CONCAT,HIGH_NOT_PRECEDENCE', time_zone = '+09:00',
             collation_connection = 'utf8mb4_general_ci', sql_auto_is_null = 1, div_precision_increment = 0;
           START TRANSACTION; CALL {_enqueue}('t', 'k\1', 'a\b || c'); COMMIT;
           INSERT INTO {} (topic, payload) VALUES ('t', 'a\b')"#,
    );
    let records = place.fetch(10).await;
    assert_eq!(key(&records[0]), br"k\1");
    assert_eq!(payload(&records[0]), br"a\b || c");
    assert_eq!(payload(&records[1]), br"a\b");
    for record in records {
        assert!(record.message.created_at().unwrap().elapsed().unwrap().as_secs() < 10);
    }
}

/// A driver that binds bytes needs no procedure, and nothing is changed on the way.
async fn a_driver_that_binds_needs_no_procedure(server: Server) {
    let place = one_shard(server, Ordering::Insert).await;
    let mut connection = place.connect().await;
    let insert = place.named("INSERT INTO {} (topic, `key`, payload) VALUES (?, ?, ?)");
    let call = place.named("CALL {_enqueue}(?, ?, ?)");
    let call_bytes = place.named("CALL {_enqueue_bytes}(?, ?, ?, NULL, NULL, NULL)");
    let nasty = nasty();
    for text in &nasty {
        for sql in [&insert, &call_bytes] {
            sqlx::query(AssertSqlSafe(sql.as_str()))
                .bind("t")
                .bind(short(text).as_bytes().to_vec())
                .bind(text.as_bytes())
                .execute(&mut connection)
                .await
                .unwrap();
        }
        sqlx::query(AssertSqlSafe(call.as_str()))
            .bind("t")
            .bind(short(text))
            .bind(text)
            .execute(&mut connection)
            .await
            .unwrap();
    }
    let every: Vec<u8> = (0..=255).collect();
    for sql in [&insert, &call_bytes] {
        sqlx::query(AssertSqlSafe(sql.as_str()))
            .bind("t")
            .bind(&every)
            .bind(&every)
            .execute(&mut connection)
            .await
            .unwrap();
    }
    sqlx::query(AssertSqlSafe(insert.as_str()))
        .bind("t")
        .bind(None::<&[u8]>)
        .bind(None::<&[u8]>)
        .execute(&mut connection)
        .await
        .unwrap();

    let records = place.fetch(1_000).await;
    assert_eq!(records.len(), 3 * nasty.len() + 3);
    for (records, expected) in records.chunks(3).zip(&nasty) {
        for record in records {
            assert!(payload(record) == expected.as_bytes(), "{expected}");
            assert_eq!(key(record), short(expected).as_bytes());
        }
    }
    let rest = &records[3 * nasty.len()..];
    for record in &rest[..2] {
        assert_eq!(payload(record), every);
        assert_eq!(key(record), every);
    }
    assert!(rest[2].message.key().is_none() && rest[2].message.payload().is_none());
}

/// What a server that is not strict would cut is refused by it too.
async fn what_could_never_be_sent_is_refused_in_the_producers_transaction(server: Server) {
    for ordering in ORDERINGS {
        let place = one_shard(server, ordering).await;
        for mode in ["STRICT_ALL_TABLES", "", "NO_BACKSLASH_ESCAPES"] {
            let mut script: Vec<String> = Vec::new();
            for topic in [
                "''",
                "NULL",
                "'.'",
                "'..'",
                "'no spaces'",
                "' t'",
                "'t '",
                "'ü'",
                "'\u{212a}'",
                "'\u{17f}'",
                "X'740A'",
                "X'0A74'",
                "X'7400'",
                "repeat('a', 250)",
                "concat(repeat('a', 249), ' ')",
                "concat(repeat('a', 249), char(10))",
                "repeat('a', 251)",
                "repeat('a', 70000)",
            ] {
                script.extend([
                    format!("CALL {{_enqueue}}({topic}, 'k', 'p')"),
                    format!("CALL {{_enqueue_bytes}}({topic}, NULL, 'p', NULL, NULL, NULL)"),
                    format!(
                        "CALL {{_enqueue_bytes}}({topic}, 'k', 'p', NULL, NULL, UTC_TIMESTAMP(6) + INTERVAL 1 HOUR)"
                    ),
                    format!("INSERT INTO {{}} (topic, payload) VALUES ({topic}, 'p')"),
                    format!(
                        "INSERT INTO {{_scheduled}} (topic, payload, deliver_at) VALUES ({topic}, 'p', '2100-01-01')"
                    ),
                ]);
            }
            for key in [
                "repeat('k', 1025)",
                "repeat('k', 1026)",
                "repeat('k', 5000)",
                "repeat('ü', 513)",
                "repeat('🦀', 1025)",
                "concat(repeat('k', 1024), ' ')",
            ] {
                script.extend([
                    format!("CALL {{_enqueue}}('t', {key}, 'p')"),
                    format!("CALL {{_enqueue_bytes}}('t', {key}, 'p', NULL, NULL, NULL)"),
                    format!("CALL {{_enqueue_bytes}}('t', {key}, 'p', NULL, NULL, '2100-01-01')"),
                    format!("INSERT INTO {{}} (topic, `key`) VALUES ('t', {key})"),
                    format!(
                        "INSERT INTO {{_scheduled}} (topic, `key`, deliver_at) VALUES ('t', {key}, '2100-01-01')"
                    ),
                ]);
            }
            for (headers, content_type) in [
                ("'{'", "NULL"),
                ("''", "NULL"),
                ("'a'", "NULL"),
                ("NULL", "''"),
                ("NULL", "' '"),
            ] {
                script.extend([
                    format!("CALL {{_enqueue_bytes}}('t', 'k', 'p', {headers}, {content_type}, NULL)"),
                    format!("CALL {{_enqueue_bytes}}('t', 'k', 'p', {headers}, {content_type}, '2100-01-01')"),
                    format!(
                        "INSERT INTO {{}} (topic, headers, content_type) VALUES ('t', {headers}, {content_type})"
                    ),
                ]);
            }
            script.extend([
                "INSERT INTO {} (payload) VALUES ('p')".to_owned(),
                "INSERT INTO {} (topic, payload) VALUES (NULL, 'p'), (NULL, 'q')".to_owned(),
            ]);
            let mut connection = place.connect().await;
            let mut accepted = Vec::new();
            for statement in script {
                let sql = place.named(&format!(
                    "SET SESSION sql_mode = '{mode}'; START TRANSACTION; {statement}"
                ));
                if sqlx::raw_sql(AssertSqlSafe(sql))
                    .execute(&mut connection)
                    .await
                    .is_ok()
                {
                    accepted.push(statement);
                }
                sqlx::raw_sql("ROLLBACK").execute(&mut connection).await.unwrap();
            }
            assert_eq!(accepted, [""; 0], "{mode}");
        }
        call(&place, "{_enqueue}(repeat('a', 249), repeat('k', 1024), 'p')");
        call(&place, "{_enqueue}('A.b_c-9', repeat('ü', 512), 'p')");
        let records = place.fetch(10).await;
        assert_eq!(records.len(), 2);
        assert!(records.iter().all(|record| record.defect.is_none()));
    }
}

/// In the shell's own session nothing of a refused transaction is left.
async fn a_refusal_takes_the_business_change_with_it(server: Server) {
    let place = one_shard(server, Ordering::Insert).await;
    run(&place, "CREATE TABLE business (a INT)");
    for mode in ["STRICT_ALL_TABLES", ""] {
        let said = refusal(
            &place,
            &format!(
                "SET SESSION sql_mode = '{mode}'; START TRANSACTION; INSERT INTO business VALUES (1); \
                 CALL {{_enqueue}}('no spaces', 'k', 'p'); COMMIT"
            ),
        );
        assert!(said.contains("outbox_topic"), "{said}");
    }
    for table in ["{}", "business"] {
        assert_eq!(place.number(&format!("SELECT COUNT(*) FROM {table}")).await, 0);
    }
}

async fn a_bare_insert_into_a_numbered_outbox_is_told_the_remedy(server: Server) {
    let place = one_shard(server, Ordering::Sequenced).await;
    let insert = "INSERT INTO {} (topic, `key`, payload) VALUES ('t', 'k', 'p')";
    for mode in ["STRICT_ALL_TABLES", ""] {
        let said = refusal(&place, &format!("SET SESSION sql_mode = '{mode}'; {insert}"));
        assert!(said.contains("outbox_use_enqueue_procedure"), "{said}");
    }
    // Without a key there is nothing to be numbered.
    run(&place, "INSERT INTO {} (topic, payload) VALUES ('t', 'p')");
    run(&place, "CALL {_enqueue}('t', NULL, 'p')");
    let records = place.fetch(10).await;
    assert_eq!(records.len(), 2);
    assert!(records.iter().all(|record| record.key_seq.is_none()));
}

/// Outside a transaction the counter would be free again before the message is there.
async fn numbers_are_drawn_in_a_transaction_only(server: Server) {
    let place = one_shard(server, Ordering::Sequenced).await;
    for call in [
        "{_enqueue}('t', 'k', 'p')",
        "{_enqueue_bytes}('t', 'k', 'p', NULL, NULL, NULL)",
    ] {
        let said = refusal(&place, &format!("CALL {call}"));
        assert!(said.contains("outbox_enqueue_needs_a_transaction"), "{said}");
    }
    let mut connection = place.connect().await;
    let error = place
        .outbox
        .enqueue(&mut connection, &message("t", Some("k"), "p"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
    assert!(error.to_string().contains("in a transaction"), "{error}");
    for table in ["{}", "{_sequence}"] {
        assert_eq!(place.number(&format!("SELECT COUNT(*) FROM {table}")).await, 0);
    }
    // A transaction need not be begun where nothing is committed by itself.
    run(
        &place,
        "SET autocommit = 0; CALL {_enqueue}('t', 'k', 'p'); COMMIT",
    );
    assert_eq!(place.fetch(10).await[0].key_seq, Some(1));
}

async fn numbers_have_no_gaps_whoever_enqueues(server: Server) {
    let place = one_shard(server, Ordering::Sequenced).await;
    let library = async |messages: &[Message]| {
        let mut tx = outbox_mysql::begin(&place.pool).await.unwrap();
        place.outbox.enqueue_many(&mut tx, messages).await.unwrap();
        tx.commit().await.unwrap();
    };
    call(&place, "{_enqueue}('t', 'k', '1')");
    library(&[message("t", Some("k"), "2")]).await;
    run(
        &place,
        "START TRANSACTION; CALL {_enqueue}('t', 'k', 'never'); ROLLBACK",
    );
    call(&place, "{_enqueue_bytes}('t', 'k', '3', NULL, NULL, NULL)");
    // A savepoint of the application's own, to which it goes back.
    run(
        &place,
        "START TRANSACTION; CALL {_enqueue}('t', 'k', '4'); SAVEPOINT s; CALL {_enqueue}('t', 'k', 'never'); \
         ROLLBACK TO SAVEPOINT s; CALL {_enqueue}('t', 'k', '5'); COMMIT",
    );
    library(&[
        message("t", Some("k"), "6"),
        message("u", Some("k"), "1"),
        message("t", None, "none"),
        message("t", Some(""), "1"),
        message("t", Some("k"), "7"),
    ])
    .await;
    call(&place, "{_enqueue}('t', '', '2')");
    // One letter is not the other.
    call(&place, "{_enqueue}('T', 'k', '1')");
    call(&place, "{_enqueue}('t', 'K', '1')");
    let records = place.fetch(20).await;
    assert_eq!(records.len(), 13);
    for record in records {
        let number = record
            .key_seq
            .map_or("none".to_owned(), |number| number.to_string());
        assert_eq!(payload(&record), number.as_bytes(), "{record:?}");
    }
}

async fn headers_are_an_object_of_strings_or_the_librarys_own_form(server: Server) {
    let place = one_shard(server, Ordering::Insert).await;
    let headers = hex(r#"{"trace": "a\u00fc\"🦀", "b": ""}"#.as_bytes());
    run(
        &place,
        &format!("CALL {{_enqueue_bytes}}('t', 'k', 'p', {headers}, 'text/plain', NULL)"),
    );
    run(&place, "CALL {_enqueue_bytes}('t', 'k', 'p', '{ }', NULL, NULL)");
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
            ("trace".to_owned(), "aü\"🦀".as_bytes().to_vec())
        ]
    );
    assert_eq!(records[0].message.content_type(), Some("text/plain"));
    assert!(records[1].message.headers().is_empty());
    assert!(records.iter().all(|record| record.defect.is_none()));
}

/// Through a whole relay: what nobody could have enqueued dies alone, and its key goes on.
async fn bad_rows_are_dead_letters_alone(server: Server) {
    let place = one_shard(server, Ordering::Insert).await;
    let bad = [
        r#"{"a": 1}"#,
        "[1]",
        "1",
        "\"a\"",
        "null",
        r#"{"a": null}"#,
        r#"{"a": {"b": "c"}}"#,
        r#"{"a": "\u0000", "b": [1]}"#,
        r#"{"outbox-id": "spoof"}"#,
        r#"{"a\r\nb": "x"}"#,
        r#"{"": "x"}"#,
        r#"[["a"]]"#,
    ];
    for (number, headers) in bad.iter().enumerate() {
        run(&place, &format!("CALL {{_enqueue}}('t', 'k', '{number}')"));
        let headers = hex(headers.as_bytes());
        run(
            &place,
            &format!("INSERT INTO {{}} (topic, `key`, headers) VALUES ('t', 'k', {headers})"),
        );
    }
    run(
        &place,
        r"INSERT INTO {} (topic, `key`, content_type) VALUES ('t', 'k', 'a\n')",
    );
    // Times are no reason to die.
    for created_at in ["1000-01-01", "1969-12-31", "9999-12-31 23:59:59.999999"] {
        run(
            &place,
            &format!(
                "INSERT INTO {{}} (topic, `key`, payload, created_at) VALUES ('t', 'old', 'p', '{created_at}')"
            ),
        );
    }
    place.store.stats().await.unwrap();

    let sink = MemorySink::new();
    drain(&place, &sink).await;
    let delivered = sink.delivered();
    let good: Vec<_> = delivered
        .iter()
        .filter(|record| key(record) == b"k")
        .map(|record| String::from_utf8(payload(record).to_vec()).unwrap())
        .collect();
    let expected: Vec<_> = (0..bad.len()).map(|number| number.to_string()).collect();
    assert_eq!(good, expected);
    assert_eq!(delivered.len(), bad.len() + 3);
    let query = DeadLetterQuery::default();
    let listed = place.store.dead_letters().unwrap().list(&query).await.unwrap();
    assert_eq!(listed.len(), bad.len() + 1);
    assert_eq!(place.store.stats().await.unwrap().backlog.value(), 0);
}

async fn drain(place: &Place, sink: &MemorySink) {
    let relay = Relay::new(Arc::new(place.store.clone()), Box::new(sink.clone()));
    tokio::time::timeout(Duration::from_secs(60), relay.drain(std::future::pending()))
        .await
        .unwrap()
        .unwrap();
}

/// As large as its limit lets a producer write it, all but.
async fn what_the_server_takes_is_delivered(server: Server) {
    let place = one_shard(server, Ordering::Insert).await;
    let most = place.number("SELECT CAST(@@max_allowed_packet AS SIGNED)").await;
    sqlx::query("INSERT INTO outbox (topic, payload) VALUES ('t', ?)")
        .bind(vec![b'p'; usize::try_from(most).unwrap() - 1_000])
        .execute(&mut place.connect().await)
        .await
        .unwrap();
    assert_eq!(place.fetch(10).await[0].defect, None);
}

/// Two columns that fit one by one, and together do not. The server's limit is everybody's, and left alone.
async fn what_the_server_cannot_send_is_a_dead_letter_alone(server: Server) {
    let place = one_shard(server, Ordering::Insert).await;
    run(&place, "CALL {_enqueue}('t', 'k', 'before')");
    run(
        &place,
        "INSERT INTO {} (topic, `key`, payload, headers) SELECT 't', 'k', REPEAT('p', @@max_allowed_packet DIV 2), \
         CONCAT('{\"h\": \"', REPEAT('h', @@max_allowed_packet DIV 2), '\"}')",
    );
    run(&place, "CALL {_enqueue}('t', 'k', 'after')");
    let sink = MemorySink::new();
    drain(&place, &sink).await;
    let delivered = sink.delivered();
    let delivered: Vec<_> = delivered.iter().map(payload).collect();
    assert_eq!(delivered, [&b"before"[..], b"after"]);
    let letters = place.store.dead_letters().unwrap();
    let listed = letters.list(&DeadLetterQuery::default()).await.unwrap();
    assert_eq!(listed.len(), 1);
    assert!(
        listed[0].reason.contains("max_allowed_packet"),
        "{}",
        listed[0].reason
    );
    assert_eq!(letters.discard(&[listed[0].record]).await.unwrap(), 1);
}

async fn a_message_is_scheduled_by_sql(server: Server) {
    for ordering in ORDERINGS {
        let place = one_shard(server, ordering).await;
        for (payload, deliver_at) in [
            ("later", "UTC_TIMESTAMP(6) + INTERVAL 1 HOUR"),
            ("past", "UTC_TIMESTAMP(6) - INTERVAL 1 SECOND"),
            ("first", "'1970-01-01'"),
            ("null", "NULL"),
            // As far as the server's time goes.
            ("never", "'9999-12-31 23:59:59.999999'"),
        ] {
            // The time is UTC, whatever the session's zone.
            run(
                &place,
                &format!(
                    "SET time_zone = '-11:00'; START TRANSACTION; \
                     CALL {{_enqueue_bytes}}('t', 'k', '{payload}', NULL, NULL, {deliver_at}); COMMIT"
                ),
            );
        }
        let owned = place.lease().await;
        let scheduled = place.store.scheduled().unwrap();
        let promotion = scheduled.promote(&place.relay, &owned, 10).await.unwrap();
        assert_eq!(promotion.promoted, 0);
        let next_in = promotion.next_in.unwrap();
        assert!((3500..=3600).contains(&next_in.as_secs()), "{next_in:?}");
        let records = place.fetch(10).await;
        let payloads: Vec<_> = records.iter().map(payload).collect();
        assert_eq!(payloads, [&b"past"[..], b"first", b"null"]);
        run(
            &place,
            "UPDATE {_scheduled} SET deliver_at = UTC_TIMESTAMP(6) WHERE payload = 'later'",
        );
        let promotion = scheduled.promote(&place.relay, &owned, 10).await.unwrap();
        assert_eq!(promotion.promoted, 1);
        let records = place.fetch(10).await;
        assert_eq!(payload(&records[3]), b"later");
        let number = (ordering == Ordering::Sequenced).then_some(4);
        assert_eq!(records[3].key_seq, number, "numbered when it is promoted");
        assert_eq!(place.store.stats().await.unwrap().scheduled, 1);
    }
}

async fn the_status_of_each_message_can_be_asked_for(server: Server) {
    let place = one_shard(server, Ordering::Insert).await;
    run(
        &place,
        "INSERT INTO {} (topic, `key`) VALUES ('t', 'pending'), ('t', 'parked'), ('t', 'retrying'), ('u', NULL), ('t', NULL),
           ('v', 'parked'), ('T', 'retrying');
         INSERT INTO {_scheduled} (topic, `key`, deliver_at) VALUES ('t', 'later', '2100-01-01');
         INSERT INTO {_processed} (position, message_id, topic, `key`, created_at) VALUES (0, UNHEX(REPEAT('a', 32)), 't', 'done', NOW());
         INSERT INTO {_dead} (position, message_id, topic, `key`, created_at, attempts, reason)
           VALUES (0, UNHEX(REPEAT('b', 32)), 't', 'dead', NOW(), 1, 'r');
         INSERT INTO {_hold} (shard, scope, topic, `key`, message, head, head_message_id, attempts, parked, due_at, reason) VALUES
           (0, 'key', 't', 'parked', 0, 2, UNHEX(REPEAT('c', 32)), 1, true, NOW(), 'r'),
           (0, 'key', 't', 'retrying', 0, 3, UNHEX(REPEAT('c', 32)), 1, false, NOW(), 'r'),
           (0, 'topic', 'u', '', 0, 4, UNHEX(REPEAT('c', 32)), 1, true, NOW(), 'r'),
           (0, 'message', '', '', 5, 5, UNHEX(REPEAT('c', 32)), 1, false, NOW(), 'r');",
    );
    let statuses = run(
        &place,
        "SELECT CONCAT_WS(' ', topic, `key`, status) FROM {_status} \
         ORDER BY FIELD(status, 'scheduled', 'processed', 'dead'), position",
    );
    assert_eq!(
        statuses.lines().collect::<Vec<_>>(),
        [
            "t pending pending",
            "t parked parked",
            "t retrying retrying",
            "u parked",
            "t retrying",
            "v parked pending",
            "T retrying pending",
            "t later scheduled",
            "t done processed",
            "t dead dead",
        ]
    );
}

/// Producers of any kind agree on the shard, which is a column that nobody writes.
async fn the_shard_is_that_of_the_library(server: Server) {
    for shards in [1, 7, 64, 1024] {
        let place = Place::with(server, |config| config.shards = shards).await;
        let mut keys: Vec<Vec<u8>> = (0..50_u8).map(|byte| vec![byte; usize::from(byte)]).collect();
        keys.extend([vec![0xff; 1024], "sü\\ß🦀".into(), b"a ".to_vec(), b"A".to_vec()]);
        let mut connection = place.connect().await;
        let insert = place.named("INSERT INTO {} (topic, `key`) VALUES ('t', ?)");
        for key in &keys {
            sqlx::query(AssertSqlSafe(insert.as_str()))
                .bind(key)
                .execute(&mut connection)
                .await
                .unwrap();
        }
        for _ in 0..50 {
            run_on(&mut connection, &place, "INSERT INTO {} (topic) VALUES ('t')").await;
        }
        run_on(
            &mut connection,
            &place,
            "INSERT INTO {_scheduled} (topic, `key`, deliver_at) SELECT topic, `key`, '2100-01-01' FROM {}",
        )
        .await;
        for table in ["{}", "{_scheduled}"] {
            let select = place.named(&format!("SELECT `key`, message_id, shard FROM {table}"));
            let rows = sqlx::query(AssertSqlSafe(select))
                .fetch_all(&mut connection)
                .await
                .unwrap();
            assert_eq!(rows.len(), 104);
            for row in rows {
                let (key, id): (Option<Vec<u8>>, Vec<u8>) = (row.get(0), row.get(1));
                let id = MessageId::from_bytes(id.try_into().unwrap());
                let shard: i16 = row.get(2);
                assert_eq!(
                    i32::from(shard),
                    i32::from(shard_of(key.as_deref(), id, shards).0)
                );
            }
        }
        let error = refusal(&place, "INSERT INTO {} (topic, shard) VALUES ('t', 0)");
        assert!(error.contains("generated column"), "{error}");
    }
}

async fn run_on(connection: &mut sqlx::MySqlConnection, place: &Place, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(place.named(sql)))
        .execute(connection)
        .await
        .unwrap();
}

on_each_server!(
    what_the_server_takes_is_delivered,
    one_call_is_enough,
    three_columns_are_enough,
    bytes_are_exact_through_the_shell,
    escapes_null_and_bytes_that_are_no_text,
    the_clients_character_set_changes_nothing_through_the_procedure,
    the_sessions_settings_change_nothing,
    a_driver_that_binds_needs_no_procedure,
    what_could_never_be_sent_is_refused_in_the_producers_transaction,
    a_refusal_takes_the_business_change_with_it,
    a_bare_insert_into_a_numbered_outbox_is_told_the_remedy,
    numbers_are_drawn_in_a_transaction_only,
    numbers_have_no_gaps_whoever_enqueues,
    headers_are_an_object_of_strings_or_the_librarys_own_form,
    bad_rows_are_dead_letters_alone,
    what_the_server_cannot_send_is_a_dead_letter_alone,
    a_message_is_scheduled_by_sql,
    the_status_of_each_message_can_be_asked_for,
    the_shard_is_that_of_the_library,
);
