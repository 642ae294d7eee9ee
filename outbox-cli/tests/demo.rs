//! `outbox demo`, small: that it runs anywhere, and says what it found. That it notices a broken promise is tested
//! where the promise is checked.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use common::{Place, Running, eventually, kept};

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
