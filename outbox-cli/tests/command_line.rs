//! Help, usage and exit codes.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use common::{Place, STDOUT};

const COMMANDS: &[&[&str]] = &[
    &["demo"],
    &["simulate"],
    &["relay"],
    &["status"],
    &["explain"],
    &["resume"],
    &["migrate"],
    &["dead"],
    &["dead", "list"],
    &["dead", "show"],
    &["dead", "requeue"],
    &["dead", "discard"],
    &["parked"],
    &["parked", "list"],
    &["parked", "resume"],
    &["parked", "bury"],
    &["config"],
    &["config", "check"],
    &["config", "example"],
];

#[test]
fn every_command_explains_itself_with_examples() {
    let place = Place::new("");
    for command in COMMANDS {
        let help = place.ok(&[*command, &["--help"]].concat());
        assert!(help.contains("Examples:\n  "), "{command:?}\n{help}");
        assert!(!help.contains('\x1b'), "colours without a terminal: {command:?}");
        assert!(
            help.lines().all(|line| line.chars().count() <= 110),
            "{command:?}\n{help}"
        );
    }
}

#[test]
fn exit_codes_are_documented() {
    let help = Place::new("").ok(&["--help"]);
    for code in 0..=5 {
        assert!(help.contains(&format!("\n  {code}  ")), "{help}");
    }
}

#[test]
fn wrong_usage_is_2() {
    let place = Place::new(STDOUT);
    for arguments in [
        &[][..],
        &["publish"],
        &["relay", "--drian"],
        &["status", "--watch", "soon"],
        &["status", "--watch", "0s"],
        &["status", "--watch", "99ms"],
        &["demo", "--orders", "0"],
        &["dead", "requeue"],
        &["resume"],
        &["dead", "requeue", "--all", "018f3f2e-7c1a-7000-8000-000000000001"],
        &["dead", "requeue", "not-an-id"],
        &["dead", "list", "--limit", "0"],
        &["relay", "--log", "loud=very=much"],
    ] {
        let run = place.run(arguments);
        assert_eq!(run.code, Some(2), "{arguments:?} {run:?}");
        assert!(
            run.stdout.is_empty() && !run.stderr.is_empty(),
            "{arguments:?} {run:?}"
        );
    }
}

#[test]
fn wrong_configuration_is_2_and_names_place_setting_value_and_range() {
    let place = Place::migrated(STDOUT);
    place.write("outbox.toml", &format!("{STDOUT}[relay]\nlease = '5ms'\n"));
    let run = place.run(&["relay"]);
    assert_eq!(run.code, Some(2), "{run:?}");
    assert_eq!(
        run.stderr,
        "outbox: configuration: outbox.toml:7:1: configure relay: lease must be 100ms to 3600s (value: \"5ms\")\n"
    );
    // Every command reads all of it, so that a mistake shows where it is made.
    place.write("outbox.toml", &format!("{STDOUT}[relay]\nleese = '5s'\n"));
    let run = place.run(&["status"]);
    assert_eq!(run.code, Some(2), "{run:?}");
    assert!(
        run.stderr
            .contains("outbox.toml:7:1: relay.leese: unknown field `leese`"),
        "{run:?}"
    );
}

#[test]
fn what_cannot_be_reached_is_3() {
    let place = Place::migrated(
        "[store]\ntype = 'sqlite'\npath = 'app.db'\n[sink]\ntype = 'kafka'\nbootstrap_servers = '127.0.0.1:1'\n\
         request_timeout = '500ms'\n",
    );
    let run = place.run(&["config", "check", "--connect"]);
    assert_eq!(run.code, Some(3), "{run:?}");
    assert!(run.stderr.starts_with("outbox: probe kafka: "), "{run:?}");
    assert!(run.stderr.contains("hint: "), "{run:?}");
}

#[test]
fn a_missing_or_foreign_database_is_4() {
    let place = Place::new(STDOUT);
    for arguments in [
        &["relay"][..],
        &["status"],
        &["dead", "list"],
        &["parked", "list"],
    ] {
        let run = place.run(arguments);
        assert_eq!(run.code, Some(4), "{arguments:?} {run:?}");
        assert!(
            run.stderr.contains("app.db") && run.stderr.contains("migrate"),
            "{run:?}"
        );
    }
    place.write("app.db", "this is no database, whatever its name says");
    assert_eq!(place.run(&["migrate"]).code, Some(4));
}

#[test]
fn verbose_shows_the_causes() {
    let place = Place::new(STDOUT);
    assert!(!place.run(&["status"]).stderr.contains("caused by"));
    let run = place.run(&["status", "--verbose"]);
    assert!(
        run.stderr.contains("caused by: No such file or directory"),
        "{run:?}"
    );
}

#[test]
fn the_example_is_a_valid_configuration() {
    let place = Place::new("");
    let example = place.ok(&["config", "example"]);
    place.write("outbox.toml", &example);
    assert_eq!(
        place.ok(&["config", "check"]),
        "the configuration is valid: sqlite app.db to kafka localhost:9092\n"
    );
}
