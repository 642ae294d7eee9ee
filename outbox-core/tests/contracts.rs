//! Every clause of the contracts names scenarios that exist, and every scenario stands in a contract.

#![cfg(feature = "conformance")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use outbox_core::conformance::broken::{BrokenSink, BrokenStore};
use outbox_core::conformance::{sink_scenarios, store_scenarios};

#[test]
fn contracts_and_scenarios_name_each_other() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut named = BTreeSet::new();
    for entry in fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            named.extend(names_in_contracts(&text));
        }
    }
    let stores = store_scenarios::<BrokenStore>();
    let sinks = sink_scenarios::<BrokenSink>();
    let names = stores.iter().map(|scenario| scenario.name);
    let exist: BTreeSet<String> = names
        .chain(sinks.iter().map(|scenario| scenario.name))
        .map(str::to_owned)
        .collect();
    let unknown: Vec<_> = named.difference(&exist).collect();
    let unnamed: Vec<_> = exist.difference(&named).collect();
    assert!(
        unknown.is_empty(),
        "contracts name scenarios that do not exist: {unknown:?}"
    );
    assert!(
        unnamed.is_empty(),
        "scenarios that no contract names: {unnamed:?}"
    );
}

/// What stands in backticks and in parentheses within a section `# Contract`: (`one_name`, `another_one`).
fn names_in_contracts(text: &str) -> Vec<String> {
    let mut sections = vec![String::new()];
    let mut inside = false;
    for line in text.lines() {
        let Some(doc) = line.trim_start().strip_prefix("///") else {
            inside = false;
            continue;
        };
        if let Some(heading) = doc.trim_start().strip_prefix("# ") {
            inside = heading.starts_with("Contract");
            sections.push(String::new());
        }
        if let Some(section) = sections.last_mut().filter(|_| inside) {
            section.push_str(doc);
        }
    }
    let groups = sections.iter().flat_map(|section| section.split('(').skip(1));
    let lists = groups.filter_map(|group| Some(group.split_once(')')?.0));
    let words = lists.flat_map(|list| list.split('`').skip(1).step_by(2));
    let is_name = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    words.filter(is_name).map(str::to_owned).collect()
}
