//! `outbox demo`, small: that it runs anywhere, and says what it found. That it notices a broken promise is tested
//! where the promise is checked.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use common::{Place, Running, eventually, kept};

#[test] functions for tests")]

mod common;

use common::{Place, Running, eventually, kept};

fn kept(run: &Run) {
    assert_eq!(run.code, Some(0), "{run:?}");
    let report = one_object(&run.stdout);
    let (committed, rolled_back) = (
        report["committed"].as_u64().unwrap(),
        report["rolled_back"].as_u64().unwrap(),
    );
    assert_eq!(committed + rolled_back, 200, "{report}");
    assert_eq!(report["delivered"], committed, "{report}");
    assert_eq!(
        report["duplicates_at_broker"], report["duplicates_dropped"],
        "{report}"
    );
    assert_eq!(report["sum_expected"], report["sum_applied"], "{report}");
    for zero in [
        "lost",
        "phantoms",
        "order_gaps",
        "accounts_wrong",
        "left_in_outbox",
    ] {
        assert_eq!(report[zero], 0, "{zero}: {report}");
    }
    assert_eq!(report["kept"], true, "{report}");
    let checks = report["checks"].as_object().unwrap();
    assert!(
        checks.len() == 5 && checks.values().all(|held| held == true),
        "{report}"
    );
}

#[test]
fn the_promise_is_kept_with_a_mock_broker() {
    let run = Place::new("").run(&["demo", "--orders", "200", "--keys", "7", "--json"]);
    kept(&run);
    assert!(run.stderr.contains("KILLED"), "{run:?}");
}

#[test]
fn the_table_is_for_people() {
    let run = Place::new("").run(&["demo", "--orders", "1", "--keys", "1"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.stdout.contains("Every part of the promise held"), "{run:?}");
    assert!(run.stdout.contains("mock"), "{run:?}");
    assert!(
        !run.stdout.contains('\x1b') && !run.stderr.contains('\x1b'),
        "{run:?}"
    );
}

#[test]
fn a_broker_that_is_not_there_is_3() {
    let run = Place::new("").run(&["demo", "--kafka", "127.0.0.1:1", "--json"]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(3), ""), "{run:?}");
    assert!(run.stderr.contains("127.0.0.1:1"), "{run:?}");
}

#[test]
fn a_signal_ends_it_early_and_leaves_nothing_behind() {
    let place = Place::new("");
    let mut command = place.command(&["demo", "--orders", "100000", "--json"]);
    command.env("TMPDIR", place.path("."));
    let mut demo = Running::spawn(command);
    let found = || {
        std::fs::read_dir(place.path("."))
            .unwrap()
            .filter(|entry| {
                entry
                    .as_ref()
                    .unwrap()
                    .file_name()
                    .to_string_lossy()
                    .starts_with("outbox-demo-")
            })
            .count()
    };
    eventually("the demo has begun", || found() == 1);
    demo.signal("TERM");
    let run = demo.wait();
    assert_eq!((run.code, run.stdout.as_str()), (Some(143), ""), "{run:?}");
    assert!(!run.stderr.contains("KILLED"), "{run:?}");
    assert_eq!(found(), 0);
}
