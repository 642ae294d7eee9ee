//! `outbox demo` on real Kafka.
#![allow(clippy::expect_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use common::{Place, kept, one_object};

#[test]
fn the_promise_is_kept_with_a_real_broker() {
    let servers = std::env::var("OUTBOX_TEST_KAFKA")
        .expect("OUTBOX_TEST_KAFKA is not set: scripts/services start && eval \"$(scripts/services env)\"");
    let run = Place::new("").run(&["demo", "--orders", "200", "--kafka", &servers, "--json"]);
    kept(&run);
    assert_eq!(one_object(&run.stdout)["broker"], servers);
}
