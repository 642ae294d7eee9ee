//! `outbox dead` and `parked` with `--all`: what is asked first, and what is told when it ends half-way.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use common::{Place, STDOUT, one_object};
use serde_json::{Value, json};

/// Dead letters of topic `t` at the positions from 1 on.
fn kill(place: &Place, count: u32) {
    place.execute(
        "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?1)
         INSERT INTO outbox_dead (position, message_id, topic, payload, created_at, attempts, reason)
         SELECT n, randomblob(16), 't', 'x', 0, 1, 'too large' FROM n",
        [count],
    );
}

/// Parked heads of the keys `k1`, `k2`, … of a topic, and of a message without a key.
fn park(place: &Place, topic: &str, keys: u32) {
    let mut connection = place.connection();
    let tx = connection.transaction().unwrap();
    let hold = |scope: &str, topic: &str, key: Option<&str>| {
        tx.execute(
            "INSERT INTO outbox (topic, key, payload) VALUES (?1, ?2, 'x')",
            (topic, key.map(str::as_bytes)),
        )
        .unwrap();
        let keyless = scope == "message";
        tx.execute(
            "INSERT INTO outbox_hold (scope, topic, key, message, head, head_message_id, attempts, parked, due_at, reason)
             SELECT ?1, ?2, ?3, ?4 * id, id, message_id, 3, 1, 0, 'too large' FROM outbox ORDER BY id DESC LIMIT 1",
            (
                scope,
                if keyless { "" } else { topic },
                key.unwrap_or_default().as_bytes(),
                keyless,
            ),
        )
        .unwrap();
    };
    for key in 1..=keys {
        hold("key", topic, Some(&format!("k{key}")));
    }
    hold("message", topic, None);
    tx.commit().unwrap();
}

fn parked(place: &Place, arguments: &[&str]) -> Vec<Value> {
    let listed = place.ok(&[&["parked", "list", "--json"], arguments].concat());
    listed
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn dead(place: &Place) -> u64 {
    place.json(&["status", "--json"])["dead"].as_u64().unwrap()
}

#[test]
fn what_cannot_be_undone_needs_a_yes_where_nobody_can_be_asked() {
    let place = Place::migrated(STDOUT);
    kill(&place, 3);
    park(&place, "t", 1);
    for command in [&["dead", "discard", "--all"][..], &["parked", "bury", "--all"]] {
        let run = place.run(command);
        assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""), "{run:?}");
        assert!(run.stderr.contains("add --yes"), "{run:?}");
    }
    assert_eq!((dead(&place), parked(&place, &[]).len()), (3, 2));

    assert_eq!(
        place.ok(&["parked", "bury", "--all", "--yes"]),
        "buried 2; see outbox dead list\n"
    );
    assert_eq!(place.ok(&["dead", "discard", "--all", "--yes"]), "discarded 5\n");
    assert_eq!((dead(&place), parked(&place, &[]).len()), (0, 0));
}

#[test]
fn what_is_named_or_can_be_undone_is_not_asked_for() {
    let place = Place::migrated(STDOUT);
    kill(&place, 2);
    park(&place, "t", 2);
    let listed = place.ok(&["dead", "list", "--limit", "1", "--json"]);
    let letter: Value = serde_json::from_str(&listed).unwrap();
    let head = parked(&place, &[])[0]["head"].clone();
    place.ok(&["dead", "discard", letter["id"].as_str().unwrap()]);
    place.ok(&["parked", "bury", head.as_str().unwrap()]);
    assert_eq!(place.json(&["dead", "requeue", "--all", "--json"])["requeued"], 2);
    assert_eq!(place.json(&["parked", "resume", "--all", "--json"])["resumed"], 2);
}

#[test]
fn what_was_done_to_dead_letters_is_told_when_the_rest_fails() {
    for (deed, done) in [("requeue", "requeued"), ("discard", "discarded")] {
        let place = Place::migrated(STDOUT);
        kill(&place, 2_345);
        place.execute(
            "CREATE TRIGGER broken BEFORE DELETE ON outbox_dead WHEN OLD.position = 2000
             BEGIN SELECT RAISE(ABORT, 'the disk is broken'); END",
            [],
        );
        let run = place.run(&[&["dead", deed, "--all"], yes(deed)].concat());
        assert!(run.code.is_some_and(|code| code > 1), "{run:?}");
        assert_eq!(run.stdout, "", "{run:?}");
        let lines: Vec<_> = run.stderr.lines().collect();
        assert_eq!(lines[0], format!("{done} 1,500 before this failed:"), "{run:?}");
        assert!(
            lines[1].starts_with(&format!("outbox: {deed}: ")) && lines[1].contains("the disk is broken"),
            "{run:?}"
        );
        assert_eq!(dead(&place), 845);

        let again = place.run(&[&["dead", deed, "--all", "--json"], yes(deed)].concat());
        assert_eq!(again.code, run.code, "{again:?}");
        assert_eq!(one_object(&again.stdout)[done], 0, "{again:?}");
        place.execute("DROP TRIGGER broken", []);
        let rest = place.json(&[&["dead", deed, "--all", "--json"], yes(deed)].concat());
        assert_eq!(rest[done], 845);
    }
}

#[test]
fn what_was_done_to_parked_keys_is_told_when_the_rest_fails() {
    for (deed, done, statement) in [
        ("resume", "resumed", "BEFORE UPDATE"),
        ("bury", "buried", "BEFORE DELETE"),
    ] {
        let place = Place::migrated(STDOUT);
        park(&place, "t", 5);
        place.execute(
            &format!(
                "CREATE TRIGGER broken {statement} ON outbox_hold WHEN OLD.head = 4
                 BEGIN SELECT RAISE(ABORT, 'the disk is broken'); END"
            ),
            [],
        );
        let last = parked(&place, &[])[5]["head"].clone();
        let run = place.run(&[&["parked", deed, "--all"], yes(deed)].concat());
        assert!(run.code.is_some_and(|code| code > 1), "{run:?}");
        assert_eq!(run.stdout, "", "{run:?}");
        assert!(
            run.stderr
                .starts_with(&format!("{done} 3 before this failed:\noutbox: {deed}: ")),
            "{run:?}"
        );

        let heads = parked(&place, &[]);
        assert_eq!(heads.len(), 3);
        let heads: Vec<_> = heads.iter().map(|hold| hold["head"].as_str().unwrap()).collect();
        let again = place.run(&["parked", deed, heads[0], heads[1], "--json"]);
        assert_eq!(again.code, run.code, "{again:?}");
        assert_eq!(
            one_object(&again.stdout),
            json!({"resumed": (deed == "resume").then_some(0), "buried": (deed == "bury").then_some(0), "not_found": []}),
            "what was not reached was not missing"
        );
        assert_eq!(
            place.json(&["parked", deed, last.as_str().unwrap(), "--json"])[done],
            1
        );
    }
}

fn yes(deed: &str) -> &'static [&'static str] {
    match deed {
        "discard" | "bury" => &["--yes"],
        _ => &[],
    }
}

#[test]
fn of_a_topic_only_what_names_it_is_listed_resumed_and_buried() {
    let place = Place::migrated(STDOUT);
    park(&place, "t", 2);
    park(&place, "u", 3);
    let names = |arguments: &[&str]| -> Vec<String> {
        let holds = parked(&place, arguments);
        holds
            .iter()
            .map(|hold| hold["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(&["--topic", "t"]), ["t/k1", "t/k2"]);
    assert_eq!(names(&["--topic", "u", "--limit", "2"]), ["u/k1", "u/k2"]);
    assert_eq!(
        place.ok(&["parked", "list", "--topic", "v"]),
        "nothing is parked\n"
    );

    assert_eq!(
        place.json(&["resume", "--all", "--topic", "t", "--json"])["resumed"],
        2
    );
    assert_eq!(
        place.json(&["parked", "bury", "--all", "--topic", "u", "--yes", "--json"])["buried"],
        3
    );
    assert_eq!(names(&[]), ["", ""], "messages without a key are left");
    let head = parked(&place, &[])[0]["head"].clone();
    let head = head.as_str().unwrap();
    for named in [
        ["parked", "bury", head],
        ["parked", "resume", head],
        ["dead", "discard", head],
    ] {
        let run = place.run(&[&named, &["--topic", "t"][..]].concat());
        assert_eq!(run.code, Some(2), "an id needs no topic: {run:?}");
    }
}

#[test]
fn a_list_that_was_cut_says_so() {
    let place = Place::migrated(STDOUT);
    kill(&place, 101);
    park(&place, "t", 100);
    for command in ["dead", "parked"] {
        for json in [&[][..], &["--json"]] {
            let run = place.run(&[&[command, "list"], json].concat());
            assert_eq!(run.code, Some(0), "{run:?}");
            assert_eq!(run.stderr, "100 shown; --limit shows more\n", "{run:?}");
            assert_eq!(
                run.stdout.lines().count(),
                if json.is_empty() { 102 } else { 100 }
            );
            let whole = place.run(&[&[command, "list", "--limit", "101"], json].concat());
            assert_eq!(whole.stderr, "", "{whole:?}");
        }
    }
}

#[test]
fn no_control_character_of_elsewhere_reaches_the_terminal() {
    const HOSTILE: &str = "\x1b[2J\x07a\r\nb\u{9b}31m";
    let place = Place::migrated(STDOUT);
    kill(&place, 1);
    park(&place, "t", 1);
    place.execute("UPDATE outbox_dead SET topic = 't' || ?1, reason = ?1", [HOSTILE]);
    place.execute(
        "UPDATE outbox_hold SET topic = topic || ?1, key = ?2, reason = ?1 WHERE scope = 'key'",
        (HOSTILE, HOSTILE.as_bytes()),
    );
    place.execute("UPDATE outbox_hold SET reason = ?1", [HOSTILE]);
    place.execute(
        "UPDATE outbox SET key = ?1 WHERE key IS NOT NULL",
        [HOSTILE.as_bytes()],
    );
    place.execute(
        "INSERT INTO outbox_relay (relay, until) VALUES (?1, 4000000000000)",
        [HOSTILE],
    );
    place.execute(
        "UPDATE outbox_lease SET owner = ?1, until = 4000000000000",
        [HOSTILE],
    );
    let letter = place.json(&["dead", "list", "--json"])["id"].clone();
    let holds = parked(&place, &[]);
    assert!(
        holds.iter().all(|hold| hold["reason"] == HOSTILE),
        "JSON keeps it: {holds:?}"
    );
    let head = |scope: &str| {
        let hold = holds.iter().find(|hold| hold["scope"] == scope).unwrap();
        hold["head"].as_str().unwrap()
    };
    for command in [
        &["status"][..],
        &["dead", "list"],
        &["parked", "list"],
        &["explain", "--topic", "t"],
        &["explain", "--topic", "t", "--key", HOSTILE],
        &["explain", "--message", letter.as_str().unwrap()],
        &["explain", "--message", head("key")],
        &["explain", "--message", head("message")],
    ] {
        let shown = place.ok(command);
        assert!(
            shown.chars().all(|c| c == '\n' || !c.is_control()),
            "{command:?}: {shown:?}"
        );
        assert!(shown.contains("[2J"), "{command:?}: {shown:?}");
    }
    // What a database says is shown as well.
    let run = place.run(&["explain", "--message", HOSTILE]);
    assert!(
        run.stderr.chars().all(|c| c == '\n' || !c.is_control()),
        "{run:?}"
    );
}
