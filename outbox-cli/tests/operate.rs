//! `outbox migrate`, `status`, `dead` and `parked`.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use common::{Place, STDOUT, one_object};
use serde_json::json;

#[test]
fn migrate_makes_the_outbox_once() {
    let place = Place::new(STDOUT);
    assert_eq!(
        place.json(&["migrate", "--json"]),
        json!({"store": "sqlite", "from": null, "to": 1, "changed": true})
    );
    assert_eq!(
        place.json(&["migrate", "--json"]),
        json!({"store": "sqlite", "from": 1, "to": 1, "changed": false})
    );
    assert!(place.ok(&["migrate"]).starts_with("nothing to do"));
}

#[test]
fn migrate_print_changes_nothing_and_is_valid_sql() {
    let place = Place::new(STDOUT);
    let sql = place.ok(&["migrate", "--print"]);
    assert!(!place.path("app.db").exists());
    let connection = place.connection();
    connection.execute_batch("PRAGMA journal_mode = WAL").unwrap();
    connection
        .execute_batch(&format!("BEGIN; {sql} COMMIT;"))
        .unwrap();
    assert_eq!(place.backlog(), 0);
}

#[test]
fn status_tells_all_there_is() {
    let place = Place::migrated(STDOUT);
    place.enqueue(1, 3);
    let status = place.json(&["status", "--json"]);
    let age = status["oldest_age_seconds"].as_f64().unwrap();
    assert!((0.0..60.0).contains(&age), "{status}");
    let mut rest = status;
    rest.as_object_mut().unwrap().remove("oldest_age_seconds");
    assert_eq!(
        rest,
        json!({
            "store": "sqlite", "backlog": 3, "backlog_is": "exact", "retrying": 0, "parked": 0, "dead": 0,
            "scheduled": 0, "processed": 0, "processed_is": "exact", "relays": [],
            "leases": [{"shard": 0, "owner": null, "epoch": 0, "time_left_seconds": 0.0}], "ok": true,
        })
    );
    let table = place.ok(&["status"]);
    assert!(
        table
            .lines()
            .any(|line| line.contains("backlog") && line.contains(" 3 ")),
        "{table}"
    );
    assert!(!table.contains('\x1b'), "{table}");
}

#[test]
fn status_answers_probes() {
    let place = Place::migrated(STDOUT);
    place.ok(&["status", "--max-age", "1s", "--max-dead", "0"]);
    place.execute(
        "INSERT INTO outbox (topic, payload, created_at) VALUES ('t', 'x', 1700000000000)",
        [],
    );
    place.ok(&["status", "--max-dead", "0"]);
    let run = place.run(&["status", "--max-age", "1s", "--json"]);
    assert_eq!(run.code, Some(1));
    assert_eq!(one_object(&run.stdout)["ok"], false);
}

#[test]
fn status_can_be_watched() {
    let place = Place::migrated(STDOUT);
    let mut watch = place.start(&["status", "--watch", "100ms", "--json"], Stdio::piped());
    let mut lines = BufReader::new(watch.child().stdout.take().unwrap()).lines();
    for _ in 0..3 {
        one_object(&lines.next().unwrap().unwrap());
    }
    watch.signal("INT");
    assert_eq!(watch.wait().code, Some(0));
}

#[test]
#[cfg(target_os = "linux")]
fn a_signal_ends_the_watch_while_the_database_does_not_answer() {
    let place = Place::migrated(&STDOUT.replace("[sink]", "busy_timeout = '60s'\n[sink]"));
    let mut watch = place.start(&["status", "--watch", "100ms", "--json"], Stdio::piped());
    let mut lines = BufReader::new(watch.child().stdout.take().unwrap()).lines();
    one_object(&lines.next().unwrap().unwrap());
    // Another file in the place of the first, so that the connection is made anew and waits.
    let _locked = place.lock("other.db");
    std::fs::rename(place.path("other.db"), place.path("app.db")).unwrap();
    let locked = std::fs::metadata(place.path("app.db")).unwrap();
    common::eventually("it asks the locked database", || watch.has_open(&locked));
    watch.signal("TERM");
    assert_eq!(watch.wait().code, Some(0));
}

#[test]
fn times_that_no_calendar_has_do_no_harm() {
    let place = Place::migrated(STDOUT);
    for (position, odd) in [(1, 1_700_000_000_000_000_i64), (2, -1)] {
        place.execute(
            "INSERT INTO outbox_dead (position, message_id, topic, created_at, attempts, reason, died_at)
             VALUES (?1, randomblob(16), 't', ?2, 1, 'too large', ?2)",
            (position, odd),
        );
    }
    let table = place.ok(&["dead", "list"]);
    assert_eq!(table.matches("out of range").count(), 2, "{table}");
    for letter in place.ok(&["dead", "list", "--json"]).lines() {
        let letter = one_object(letter);
        assert_eq!(letter["died_at"], json!(null));
        let id = letter["id"].as_str().unwrap();
        let shown = place.json(&["dead", "show", id]);
        assert_eq!(shown["message"]["created_at"], json!(null), "{shown}");
        let explained = place.json(&["explain", "--message", id, "--json"]);
        assert_eq!(
            (
                &explained["places"][0]["at"],
                &explained["places"][0]["created_at"]
            ),
            (&json!(null), &json!(null)),
            "{explained}"
        );
        assert!(place.ok(&["explain", "--message", id]).contains("out of range"));
    }
}

/// A message of key `k` that no sink can be given: its headers are no headers.
fn enqueue_defective(place: &Place) {
    place.execute(
        "INSERT INTO outbox (topic, key, payload, headers) VALUES ('t', 'k', 'bad', '5')",
        [],
    );
}

#[test]
fn dead_letters_are_listed_shown_requeued_and_discarded() {
    let place = Place::migrated(STDOUT);
    enqueue_defective(&place);
    place.enqueue(2, 1);
    let delivered = place.ok(&["relay", "--drain"]);
    assert!(
        delivered.contains(r#""payload":"2""#) && !delivered.contains("bad"),
        "{delivered}"
    );

    let letter = place.json(&["dead", "list", "--json"]);
    let id = letter["id"].as_str().unwrap();
    assert_eq!(letter["topic"], "t");
    assert!(
        letter.get("message").is_none(),
        "payloads are shown one by one: {letter}"
    );
    assert!(place.ok(&["dead", "list"]).contains(id));
    assert_eq!(
        place.ok(&["dead", "list", "--topic", "other"]),
        "no dead letters\n"
    );
    assert_eq!(place.run(&["status", "--max-dead", "0"]).code, Some(1));

    assert_eq!(place.json(&["dead", "show", id])["message"]["payload"], "bad");
    let unknown = "018f3f2e-7c1a-7000-8000-000000000001";
    let run = place.run(&["dead", "show", unknown]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    let run = place.run(&["dead", "requeue", unknown, "--json"]);
    assert_eq!(run.code, Some(1));
    assert_eq!(
        one_object(&run.stdout),
        json!({"requeued": 0, "discarded": null, "not_found": [unknown]})
    );

    assert_eq!(
        place.json(&["dead", "requeue", id, "--json"]),
        json!({"requeued": 1, "discarded": null, "not_found": []})
    );
    assert_eq!(place.backlog(), 1);
    place.ok(&["relay", "--drain"]);
    assert_eq!(
        place.json(&["dead", "discard", "--all", "--topic", "t", "--yes", "--json"]),
        json!({"requeued": null, "discarded": 1, "not_found": []})
    );
    assert_eq!(place.ok(&["dead", "list"]), "no dead letters\n");
}

#[test]
fn parked_keys_are_listed_resumed_and_buried() {
    let place = Place::migrated(&format!("{STDOUT}[relay]\non_failure = 'park'\n"));
    enqueue_defective(&place);
    place.enqueue(2, 1);
    let run = place.run(&["relay", "--drain"]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""), "{run:?}");
    assert!(run.stderr.contains("not drained: 2 messages remain"), "{run:?}");

    let parked = place.json(&["parked", "list", "--json"]);
    let head = parked["head"].as_str().unwrap();
    assert_eq!(
        (&parked["scope"], &parked["name"]),
        (&json!("key"), &json!("t/k"))
    );
    assert!(place.ok(&["parked", "list"]).contains(head));

    assert_eq!(place.json(&["parked", "resume", head, "--json"])["resumed"], 1);
    assert_eq!(
        place.run(&["parked", "resume", head]).code,
        Some(1),
        "it is not parked any more"
    );
    assert_eq!(place.run(&["relay", "--drain"]).code, Some(1));
    assert_eq!(
        place.json(&["parked", "bury", "--all", "--yes", "--json"])["buried"],
        1
    );
    assert!(place.ok(&["relay", "--drain"]).contains(r#""payload":"2""#));
    assert!(place.ok(&["dead", "list"]).contains(head));
}
