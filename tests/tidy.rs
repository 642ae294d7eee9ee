//! Every public item of the library crates shows how it is used, in an example that the doctests compile.

use std::fs;
use std::path::Path;

/// Public items of modules. None of them is out of reach: the lint `unreachable_pub` sees to that.
const KINDS: [&str; 7] = ["struct", "enum", "trait", "fn", "type", "const", "static"];
/// Run by name, through `prove_store` and `prove_sink`; what each proves stands in the contract that names it.
const SCENARIOS: [&str; 2] = [
    "outbox-core/src/conformance/store",
    "outbox-core/src/conformance/sink",
];

#[test]
fn every_public_item_has_an_example() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let within = |folder: &Path| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut missing = Vec::new();
    for package in within(root) {
        let name = package.file_name().unwrap_or_default().to_string_lossy();
        let sources = package.join("src");
        if !name.starts_with("outbox-") || name == "outbox-cli" || !sources.is_dir() {
            continue;
        }
        let (mut found, mut paths) = (0, vec![sources]);
        while let Some(path) = paths.pop() {
            let shown = path.strip_prefix(root).unwrap().to_owned();
            if path.is_dir() && !SCENARIOS.iter().any(|folder| shown.starts_with(folder)) {
                paths.extend(within(&path));
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                for (line, item, has_example) in public_items(&fs::read_to_string(&path).unwrap()) {
                    found += 1;
                    if !has_example {
                        missing.push(format!("{}:{line}: {item}", shown.display()));
                    }
                }
            }
        }
        assert!(
            found > 0,
            "{name} has public items, or this test no longer sees them"
        );
    }
    missing.sort();
    assert!(missing.is_empty(), "without an example:\n{}", missing.join("\n"));
}

/// The public items of a file, each with its line and whether its documentation has an example that is compiled.
fn public_items(text: &str) -> Vec<(usize, String, bool)> {
    let mut items = Vec::new();
    let (mut in_block, mut has_example, mut is_exported) = (false, false, false);
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(doc) = line.strip_prefix("///") {
            if let Some(language) = doc.trim_start().strip_prefix("```") {
                in_block = !in_block;
                has_example |= in_block && ["", "no_run", "should_panic"].contains(&language);
            }
        } else if line.starts_with("#[macro_export]") {
            is_exported = true;
        } else if line.starts_with("#[doc(hidden)]") {
            has_example = true;
        } else if !line.starts_with(['#', ' ', ')']) {
            // Not within an attribute, which may stand between the documentation and its item.
            let item = line.strip_prefix("pub ").unwrap_or_default();
            let is_item = item.split(' ').take(2).any(|word| KINDS.contains(&word));
            if is_item || (is_exported && line.starts_with("macro_rules!")) {
                items.push((number, line.to_owned(), has_example));
            }
            (has_example, is_exported) = (false, false);
        }
    }
    items
}
