//! No secret in any output, whatever fails and however much is logged.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use std::fs::File;
use std::process::{Command, Stdio};

use common::{Place, Run, eventually, finish};

/// What must never be seen. Of odd characters, so that no escape hides it.
const CANARY: &str = "c4n4ry-T0psecret";

const KAFKA: &str = "\
[store]
type = 'sqlite'
path = 'app.db'
[sink]
type = 'kafka'
bootstrap_servers = '127.0.0.1:1'
request_timeout = '500ms'
";

fn clean(what: &str, run: &Run) {
    assert!(
        !run.stdout.contains(CANARY) && !run.stderr.contains(CANARY),
        "{what}: {run:?}"
    );
}

const SASL: &str = "[sink.options]\nsecurity.protocol = 'SASL_PLAINTEXT'\nsasl.mechanism = 'PLAIN'\nsasl.username = 'relay'\n";

#[test]
fn commands_that_work_or_fail_show_none() {
    let in_file = format!("{KAFKA}{SASL}sasl.password = '{CANARY}'\ndebug = 'all'\n");
    let in_a_file_of_its_own =
        format!("{KAFKA}{SASL}debug = 'all'\n[sink.options_from_file]\nsasl.password = 'secret'\n");
    for config in [in_file, in_a_file_of_its_own] {
        let place = Place::migrated(&config);
        place.write("secret", &format!("{CANARY}\n"));
        place.enqueue(1, 1);
        for arguments in [
            &["config", "check", "--connect", "--verbose", "--log", "trace"][..],
            &["status", "--verbose", "--log", "trace"],
            &["migrate", "--verbose", "--log", "trace"],
        ] {
            clean(&format!("{arguments:?}"), &place.run(arguments));
        }
        // It cannot reach the broker and says so, in every detail.
        let log = File::create(place.path("log")).unwrap();
        let mut relay = place.start_logging(&["relay", "--log", "trace"], Stdio::piped(), log);
        let logged = || std::fs::read_to_string(place.path("log")).unwrap();
        eventually("it tries to connect", || logged().contains("Connection refused"));
        relay.signal("TERM");
        let mut run = relay.wait();
        run.stderr = logged();
        clean("relay", &run);
    }
}

#[test]
fn the_environments_show_none() {
    let place = Place::migrated(KAFKA);
    let with = |variable: &str, arguments: &[&str]| -> Command {
        let mut command = place.command(arguments);
        command.env(variable, CANARY);
        command
    };
    for variable in [
        "OUTBOX_SINK__OPTIONS__SASL_PASSWORD",
        "OUTBOX_SINK__OPTIONS__SSL_KEY_PEM",
        "OUTBOX_SINK__OPTIONS__SASL_PASWORD",
        "OUTBOX_SINK__PASSWORD",
        "OUTBOX_SINK__OPTIONS",
        "OUTBOX_SINK__REQUEST_TIMEOUT",
    ] {
        let run = finish(with(
            variable,
            &["config", "check", "--verbose", "--log", "trace"],
        ));
        assert_eq!(run.code, Some(2), "{variable}: {run:?}");
        clean(variable, &run);
    }
}

#[test]
fn broken_files_show_none() {
    for broken in [
        format!("{KAFKA}[sink.options]\nsasl.password = '{CANARY}\n"),
        format!("{KAFKA}[sink.options]\nsasl.password = {CANARY}\n"),
        format!("{KAFKA}[sink.options]\nsasl.password '{CANARY}'\n"),
        format!("{KAFKA}[sink.options]\nsasl.password = ['{CANARY}']\n"),
        format!("{KAFKA}[sink.options]\nsasl.password = '{CANARY}'\nsasl.password = '{CANARY}'\n"),
        format!("{KAFKA}sasl.password = '{CANARY}'\n"),
        format!("{KAFKA}password = '{CANARY}'\n"),
        format!("{KAFKA}options = 'sasl.password={CANARY}'\n"),
        format!("{KAFKA}[sink.options]\nsasl.pasword = '{CANARY}'\n"),
    ] {
        let place = Place::new(&broken);
        let run = place.run(&["config", "check", "--verbose", "--log", "trace"]);
        assert_eq!(run.code, Some(2), "{broken}: {run:?}");
        clean(&broken, &run);
    }
}

#[test]
fn payloads_are_not_logged() {
    let place = Place::migrated("[store]\ntype = 'sqlite'\npath = 'app.db'\n[sink]\ntype = 'stdout'\n");
    place.execute(
        "INSERT INTO outbox (topic, key, payload, headers) VALUES ('t', 'k', ?1, '5')",
        [CANARY],
    );
    let run = place.run(&["relay", "--drain", "--verbose", "--log", "trace"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    clean("relay", &run);
    clean("dead list", &place.run(&["dead", "list"]));
    clean("dead list", &place.run(&["dead", "list", "--json"]));
}
