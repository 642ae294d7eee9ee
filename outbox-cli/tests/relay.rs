//! `outbox relay`: what it writes, and how it ends.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use common::{Place, Running, STDOUT, finish};
use serde_json::json;

#[test]
fn a_drain_writes_each_message_as_one_line_of_json() {
    let place = Place::migrated(STDOUT);
    for (id, key, payload) in [
        (1_u8, Some(&b"k"[..]), Some(&b"{\"n\": 1}"[..])),
        (2, None, None),
        (3, Some(&[0xff, 0x00][..]), Some(&b""[..])),
    ] {
        let id = [0, 0, 0, 0, 0, 0, 0x70, 0, 0x80, 0, 0, 0, 0, 0, 0, id];
        place.execute(
            "INSERT INTO outbox (message_id, topic, key, payload, headers, content_type, created_at) \
             VALUES (?1, 'orders', ?2, ?3, '[[\"a\",\"b\"]]', 'text/plain', 1700000000123)",
            (id, key, payload),
        );
    }
    let rest = r#""headers":[["a","b"]],"content_type":"text/plain","key_seq":null,"created_at":"2023-11-14T22:13:20.123Z"}"#;
    let run = place.run(&["relay", "--drain"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    assert_eq!(
        run.stdout,
        [
            r#"{"id":"00000000-0000-7000-8000-000000000001","topic":"orders","key":"k","payload":"{\"n\": 1}","#,
            rest,
            "\n",
            r#"{"id":"00000000-0000-7000-8000-000000000002","topic":"orders","key":null,"payload":null,"#,
            rest,
            "\n",
            r#"{"id":"00000000-0000-7000-8000-000000000003","topic":"orders","key":{"hex":"ff00"},"payload":"","#,
            rest,
            "\n",
        ]
        .concat()
    );
    assert_eq!(place.backlog(), 0);
    assert_eq!(place.ok(&["relay", "--drain"]), "");
}

#[test]
fn a_time_that_no_calendar_has_stops_nothing() {
    let place = Place::migrated(STDOUT);
    // Microseconds in a column of milliseconds, and a time before 1970.
    for odd in [1_700_000_000_000_000_i64, -1, 1_700_000_000_123] {
        place.execute(
            "INSERT INTO outbox (topic, payload, created_at) VALUES ('t', 'x', ?1)",
            [odd],
        );
    }
    let run = place.start(&["relay", "--drain"], Stdio::piped()).wait();
    assert_eq!(run.code, Some(0), "{run:?}");
    let times: Vec<_> = run
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["created_at"].clone())
        .collect();
    assert_eq!(
        times,
        [json!(null), json!(null), json!("2023-11-14T22:13:20.123Z")]
    );
    assert_eq!(place.backlog(), 0);
}

#[test]
#[cfg(target_os = "linux")]
fn a_signal_ends_the_wait_for_a_database_that_does_not_answer() {
    let drain: &[&str] = &["relay", "--drain"];
    // A relay that has not begun has nothing to stop; what a drain has left is not known.
    for (args, signal, code) in [
        (&["relay"][..], "TERM", 0),
        (drain, "TERM", 143),
        (drain, "INT", 130),
    ] {
        let place = Place::migrated(&STDOUT.replace("[sink]", "busy_timeout = '60s'\n[sink]"));
        let _locked = place.lock("app.db");
        let locked = std::fs::metadata(place.path("app.db")).unwrap();
        let mut relay = place.start(args, Stdio::piped());
        common::eventually("it opens the locked database", || relay.has_open(&locked));
        relay.signal(signal);
        let run = relay.wait();
        assert_eq!(run.code, Some(code), "{run:?}");
    }
}

#[test]
fn the_environment_has_the_last_word() {
    let place = Place::migrated(STDOUT);
    place.enqueue(1, 1);
    let mut command = place.command(&["relay", "--drain"]);
    command
        .env_remove("OUTBOX_CONFIG")
        .env("OUTBOX_STORE__TYPE", "sqlite")
        .env("OUTBOX_STORE__PATH", place.path("app.db"))
        .env("OUTBOX_SINK__TYPE", "stdout")
        .env("OUTBOX_RELAY__NAME", "from-the-environment");
    let run = finish(command);
    assert_eq!((run.code, run.stdout.lines().count()), (Some(0), 1), "{run:?}");
    assert!(run.stderr.contains("from-the-environment-"), "{run:?}");

    let mut command = place.command(&["relay", "--drain"]);
    command.env("OUTBOX_RELAY__LEASE", "2h");
    let run = finish(command);
    assert_eq!(run.code, Some(2));
    assert!(
        run.stderr.contains("OUTBOX_RELAY__LEASE") && run.stderr.contains("100ms to 3600s"),
        "{run:?}"
    );
}

#[test]
fn logs_can_be_json() {
    let place = Place::migrated(STDOUT);
    let run = place.run(&["relay", "--drain", "--log-format", "json", "--log", "outbox=info"]);
    assert_eq!(run.code, Some(0));
    let line: serde_json::Value = serde_json::from_str(run.stderr.lines().next().unwrap()).unwrap();
    assert_eq!(line["message"], "relay starts");
    assert_eq!(line["sink"], "stdout");
}

#[test]
fn sigterm_stops_it_in_order_and_frees_its_lease() {
    for signal in ["TERM", "INT"] {
        let place = Place::migrated(STDOUT);
        let mut relay = place.start(&["relay"], Stdio::piped());
        let mut lines = BufReader::new(relay.child().stdout.take().unwrap()).lines();
        place.enqueue(1, 3);
        for _ in 0..3 {
            lines.next().unwrap().unwrap();
        }
        let status = place.json(&["status", "--json"]);
        assert!(
            status["leases"][0]["owner"]
                .as_str()
                .unwrap()
                .starts_with("relay-"),
            "{status}"
        );
        assert_eq!(status["relays"].as_array().unwrap().len(), 1, "{status}");

        relay.signal(signal);
        let run = relay.wait();
        assert_eq!(run.code, Some(0), "{run:?}");
        let status = place.json(&["status", "--json"]);
        assert!(status["leases"][0]["owner"].is_null(), "{status}");
        assert_eq!(status["relays"].as_array().unwrap().len(), 0, "{status}");
        assert_eq!(status["backlog"], 0, "{status}");
    }
}

/// More than a pipe holds.
const MANY: u32 = 2_000;

/// A relay that is stuck, because nobody reads what it writes.
fn stuck(place: &Place) -> Running {
    place.enqueue(1, MANY);
    let mut relay = place.start(&["relay"], Stdio::piped());
    // Something has come, so it is about to be stuck.
    let mut first = [0];
    relay
        .child()
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    relay
}

#[test]
fn a_reader_that_is_stuck_does_not_keep_it_from_stopping() {
    let place = Place::migrated(&format!("{STDOUT}[relay]\ngrace = '200ms'\n"));
    let mut relay = stuck(&place);
    relay.signal("TERM");
    // The pipe's end is kept open by the test, unread.
    let pipe = relay.child().stdout.take();
    let run = relay.wait();
    assert_eq!(run.code, Some(0), "{run:?}");
    drop(pipe);
    assert_eq!(place.backlog(), u64::from(MANY));
}

#[test]
fn a_second_signal_stops_it_at_once() {
    let place = Place::migrated(&format!("{STDOUT}[relay]\ngrace = '10m'\n"));
    let mut relay = stuck(&place);
    relay.signal("TERM");
    let pipe = relay.child().stdout.take();
    let mut log = BufReader::new(relay.child().stderr.take().unwrap()).lines();
    assert!(log.any(|line| line.unwrap().contains("stopping in order")));
    relay.signal("TERM");
    assert_eq!(relay.wait().code, Some(143));
    drop(pipe);
    assert_eq!(place.backlog(), u64::from(MANY));
}

#[test]
fn when_its_reader_goes_it_ends_and_nothing_is_lost() {
    let place = Place::migrated(STDOUT);
    let mut relay = stuck(&place);
    drop(relay.child().stdout.take());
    let run = relay.wait();
    assert_eq!(run.code, Some(3), "{run:?}");
    assert!(
        run.stderr.contains("outbox: write stdout: its reader has gone"),
        "{run:?}"
    );
    assert!(place.json(&["status", "--json"])["leases"][0]["owner"].is_null());

    let again = place.ok(&["relay", "--drain"]);
    assert_eq!(again.lines().count(), usize::try_from(MANY).unwrap());
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_an_outage_that_loses_nothing() {
    let place = Place::migrated(STDOUT);
    place.enqueue(1, 10);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut relay = place.start(&["relay", "--drain"], full);
    let mut log = BufReader::new(relay.child().stderr.take().unwrap()).lines();
    assert!(log.any(|line| line.unwrap().contains("No space left on device")));
    relay.signal("TERM");
    assert_eq!(relay.wait().code, Some(1), "what is not drained is a no");
    assert_eq!(place.backlog(), 10);
    assert_eq!(place.ok(&["relay", "--drain"]).lines().count(), 10);
}

#[test]
fn a_relay_takes_over_from_one_that_was_killed() {
    let place = Place::migrated(&format!("{STDOUT}[relay]\nlease = '500ms'\n"));
    let mut first = place.start(&["relay"], Stdio::piped());
    let mut lines = BufReader::new(first.child().stdout.take().unwrap()).lines();
    place.enqueue(1, 1);
    lines.next().unwrap().unwrap();
    first.signal("KILL");
    assert_eq!(first.wait().code, None);
    place.enqueue(2, 1);
    let second = place.ok(&["relay", "--drain"]);
    assert!(
        second.lines().last().unwrap().contains(r#""payload":"2""#),
        "{second}"
    );
}

#[test]
fn without_a_sink_it_says_what_is_missing() {
    let place = Place::migrated("[store]\ntype = 'sqlite'\npath = 'app.db'\n");
    let run = place.run(&["relay"]);
    assert_eq!(run.code, Some(2), "{run:?}");
    assert!(run.stderr.contains("there is no sink"), "{run:?}");
}
