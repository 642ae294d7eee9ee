//! `outbox simulate` as its users run it.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use common::Place;
use serde_json::Value;

fn simulate(arguments: &[&str]) -> String {
    Place::new("").ok(&[&["simulate"], arguments].concat())
}

#[test]
fn it_says_what_many_worlds_came_to() {
    let shown = simulate(&["--seeds", "40"]);
    for part in [
        "simulated worlds",
        "messages committed",
        "kill",
        "laws broken",
        "every law held",
    ] {
        assert!(shown.contains(part), "{part}:\n{shown}");
    }
    assert!(!shown.contains('\x1b'), "colours without a terminal");
}

#[test]
fn machines_get_one_object() {
    let report: Value = serde_json::from_str(&simulate(&["--seeds", "40", "--json"])).unwrap();
    assert_eq!(report["worlds"], 40);
    assert_eq!(report["violation"], Value::Null);
    assert!(report["faults"]["kill"].as_u64().unwrap() > 0, "{report}");
}

#[test]
fn in_calm_worlds_nothing_arrives_twice() {
    let report: Value = serde_json::from_str(&simulate(&["--seeds", "20", "--calm", "--json"])).unwrap();
    assert_eq!(report["arrived"], report["committed"]);
    assert_eq!(report["faults"], serde_json::json!({}));
}

#[test]
fn one_world_is_told_line_by_line_and_always_the_same() {
    let trace = || simulate(&["--seed", "3", "--trace"]);
    let told = trace();
    assert!(
        told.contains("relay-1 starts") && told.contains("everything heals"),
        "{told}"
    );
    assert_eq!(told, trace());
}
