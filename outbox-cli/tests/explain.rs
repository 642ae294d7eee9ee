//! `outbox explain` and `resume`: why it is still here, and the short way to let it go on.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use std::process::Stdio;

use common::{Place, STDOUT, eventually, one_object};
use serde_json::{Value, json};

/// The id with which `enqueue` writes the message `number`.
fn id(number: u8) -> String {
    format!("00000000-0000-7000-8000-0000000000{number:02x}")
}

/// A message of topic `t`; with headers that are none no sink can be given it.
fn enqueue(place: &Place, number: u8, key: Option<&[u8]>, defective: bool) {
    let id = [0, 0, 0, 0, 0, 0, 0x70, 0, 0x80, 0, 0, 0, 0, 0, 0, number];
    place.execute(
        "INSERT INTO outbox (message_id, topic, key, payload, headers) VALUES (?1, 't', ?2, 'canary', ?3)",
        (id, key, defective.then_some("5")),
    );
}

/// The answer, which must be this exit code, as JSON; the text that people get shows no payload and no colours.
fn explain(place: &Place, arguments: &[&str], code: i32) -> Value {
    let text = place.run(&[&["explain"], arguments].concat());
    assert_eq!(text.code, Some(code), "{text:?}");
    assert!(
        !text.stdout.contains("canary") && !text.stdout.contains('\x1b'),
        "{text:?}"
    );
    assert!(
        text.stdout.lines().all(|line| line == line.trim_end()),
        "{text:?}"
    );
    let run = place.run(&[&["explain"], arguments, &["--json"]].concat());
    assert_eq!(run.code, Some(code), "{run:?}");
    assert!(!run.stdout.contains("canary"), "{run:?}");
    one_object(&run.stdout)
}

fn codes(causes: &Value) -> Vec<&str> {
    let causes = causes.as_array().unwrap();
    causes
        .iter()
        .map(|cause| cause["code"].as_str().unwrap())
        .collect()
}

#[test]
fn a_parked_key_says_why_and_what_to_do_and_goes_on_after_resume() {
    let place = Place::migrated(&format!("{STDOUT}[relay]\non_failure = 'park'\n"));
    enqueue(&place, 1, Some(b"k"), true);
    enqueue(&place, 2, Some(b"k"), false);
    assert_eq!(place.run(&["relay", "--drain"]).code, Some(1));

    let head = explain(&place, &["--message", &id(1)], 0);
    assert_eq!(codes(&head["places"][0]["causes"]), ["parked", "no_relay"]);
    let behind = explain(&place, &["--message", &id(2)], 0);
    assert_eq!(
        codes(&behind["places"][0]["causes"]),
        ["behind_parked", "no_relay"]
    );
    let text = place.ok(&["explain", "--message", &id(2)]);
    assert!(
        text.contains(&format!("it waits behind the head of its key, {}", id(1)))
            && text.contains(&format!("outbox resume {}", id(1))),
        "{text}"
    );

    let key = explain(&place, &["--topic", "t", "--key", "k"], 0);
    assert_eq!(
        (&key["backlog"], &key["places"][0]["id"]),
        (&json!(2), &json!(id(1)))
    );
    assert_eq!(key["places"][0]["place"], "outbox");
    let topic = explain(&place, &["--topic", "t"], 0);
    assert_eq!(codes(&topic["causes"]), ["keys_held", "no_relay"]);
    assert!(
        place
            .ok(&["explain", "--topic", "t"])
            .contains("keys of it are parked: 1")
    );

    // What the answer says is what helps.
    place.execute("UPDATE outbox SET headers = NULL", []);
    assert_eq!(place.json(&["resume", &id(1), "--json"])["resumed"], 1);
    assert_eq!(
        place.run(&["resume", &id(1)]).code,
        Some(1),
        "it is not parked any more"
    );
    assert_eq!(place.ok(&["relay", "--drain"]).lines().count(), 2);
    let gone = explain(&place, &["--topic", "t", "--key", "k"], 1);
    assert_eq!(
        (codes(&gone["causes"]), &gone["found"]),
        (vec!["not_here"], &json!(false))
    );
    assert_eq!(place.json(&["resume", "--all", "--json"])["resumed"], 0);
}

#[test]
fn a_topic_whose_first_message_is_parked_says_so_though_that_has_no_key() {
    let place = Place::migrated(&format!("{STDOUT}[relay]\non_failure = 'park'\n"));
    enqueue(&place, 1, None, true);
    assert_eq!(place.run(&["relay", "--drain"]).code, Some(1));
    enqueue(&place, 2, None, false);
    let topic = explain(&place, &["--topic", "t"], 0);
    assert_eq!(topic["places"][0]["id"], id(1), "{topic}");
    assert_eq!(codes(&topic["places"][0]["causes"]), ["parked", "no_relay"]);
    assert!(
        place
            .ok(&["explain", "--topic", "t"])
            .contains(&format!("outbox resume {}", id(1)))
    );
    // Another topic is not stopped by it.
    place.execute("INSERT INTO outbox (topic) VALUES ('u')", []);
    let other = explain(&place, &["--topic", "u"], 0);
    assert_eq!(codes(&other["places"][0]["causes"]), ["no_relay"]);
}

#[test]
fn a_message_is_found_wherever_it_stands() {
    let place = Place::migrated(&STDOUT.replace("[sink]", "archive = true\n[sink]"));
    enqueue(&place, 1, None, false);
    enqueue(&place, 2, Some(b"k"), true);
    assert_eq!(place.ok(&["relay", "--drain"]).lines().count(), 1);
    place.execute(
        "INSERT INTO outbox_scheduled (deliver_at, message_id, topic) VALUES (?1, ?2, 't')",
        (
            4_000_000_000_000_i64,
            [0, 0, 0, 0, 0, 0, 0x70, 0, 0x80, 0, 0, 0, 0, 0, 0, 3],
        ),
    );
    for (number, name, code) in [
        (1, "processed", "delivered"),
        (2, "dead", "dead"),
        (3, "scheduled", "scheduled"),
    ] {
        let found = explain(&place, &["--message", &id(number)], 0);
        assert_eq!(found["places"][0]["place"], name, "{found}");
        assert_eq!(codes(&found["places"][0]["causes"]), [code], "{found}");
    }
    // Ids need not be unique: all places are told.
    enqueue(&place, 2, Some(b"other"), false);
    let twice = explain(&place, &["--message", &id(2)], 0);
    assert_eq!(twice["places"].as_array().unwrap().len(), 2, "{twice}");
    assert_eq!(twice["places"][0]["place"], "outbox", "{twice}");

    let unknown = explain(&place, &["--message", &id(9)], 1);
    assert_eq!(codes(&unknown["causes"]), ["not_here"]);
    assert!(
        unknown["causes"][0]["text"]
            .as_str()
            .unwrap()
            .contains("never enqueued"),
        "{unknown}"
    );
}

#[test]
fn a_search_that_ended_early_says_so() {
    let place = Place::migrated(STDOUT);
    place.enqueue(1, 5);
    enqueue(&place, 1, None, false);
    let run = place.run(&["explain", "--message", &id(1), "--search", "3"]);
    assert_eq!(run.code, Some(1), "{run:?}");
    assert!(run.stdout.contains("not everything was looked at"), "{run:?}");
    let topic = explain(&place, &["--topic", "t", "--search", "3"], 0);
    assert_eq!(
        (&topic["backlog"], &topic["backlog_is"]),
        (&json!(3), &json!("at_least"))
    );
}

#[test]
fn what_nothing_stops_is_in_line_behind_others() {
    let place = Place::migrated(&format!("{STDOUT}[relay]\nrate_limit = 1\nbatch_rows = 1\n"));
    place.enqueue(1, 20);
    enqueue(&place, 1, Some(&[0xff, 0]), false);
    let mut relay = place.start(&["relay"], Stdio::piped());
    eventually("a relay owns the shard", || {
        let key = explain(&place, &["--topic", "t", "--key", "ff00", "--hex"], 0);
        assert_eq!(key["key"], json!({"hex": "ff00"}));
        codes(&key["places"][0]["causes"]) == ["in_line"] && key["places"][0]["ahead"].as_u64() > Some(0)
    });
    relay.signal("KILL");
    relay.wait();
}

#[test]
fn what_is_asked_must_be_clear() {
    let place = Place::migrated(STDOUT);
    for arguments in [
        &[][..],
        &["--key", "k"],
        &["--message", "no-id"],
        &[
            "--message",
            "018f3f2e-7c1a-7000-8000-000000000001",
            "--topic",
            "t",
        ],
        &["--topic", "t", "--key", "f", "--hex"],
        &["--topic", "t", "--hex"],
    ] {
        let run = place.run(&[&["explain"], arguments].concat());
        assert_eq!(run.code, Some(2), "{arguments:?} {run:?}");
    }
}
