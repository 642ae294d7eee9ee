//! The report of what was measured says what was measured, and what measures it sees faults.

#[path = "../benches/ledger.rs"]
#[allow(dead_code, reason = "the bench uses the rest")]
mod ledger;
#[path = "../benches/plot.rs"]
mod plot;
#[path = "../benches/report.rs"]
mod report;
#[path = "../benches/results.rs"]
#[allow(dead_code, reason = "the bench uses the rest")]
mod results;

use std::path::Path;

use ledger::{Flow, Ledger};
use results::{Finding, Machine, Mysql, Results, figure};

#[test]
fn the_report_is_made_of_what_was_measured() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let (json, markdown) = (docs.join("performance.json"), docs.join("performance.md"));
    assert_eq!(json.exists(), markdown.exists(), "one without the other");
    if !json.exists() {
        return;
    }
    let results = Results::read(&json).unwrap();
    for (path, made) in [
        (&markdown, report::text(&results)),
        (&docs.join("performance.svg"), plot::drawing(&results)),
    ] {
        let there = std::fs::read_to_string(path).unwrap();
        assert!(
            there == made,
            "{} is not what scripts/bench --report docs/performance.json docs/performance.md makes",
            path.display()
        );
    }
}

fn finding(metric: &str, median: f64) -> Finding {
    Finding {
        workload: "drain".into(),
        store: "postgres".into(),
        system: "outbox".into(),
        case: String::new(),
        metric: metric.into(),
        unit: "×".into(),
        median,
        min: median,
        max: median,
        rounds: 5,
        run: "1".into(),
    }
}

#[test]
fn targets_are_met_or_missed_by_so_much() {
    let results = Results {
        machines: vec![Machine::default()],
        findings: vec![
            finding("rate, in rates of batched", 4.0),
            finding("rate, in rates of naive", 300.0),
            finding("CPU", 6.0),
        ],
    };
    let text = report::text(&results);
    for line in [
        "| ≥ 5 × | 4.00 × | **missed**, 20.0% below |",
        "| ≥ 200 × | 300 × | met, 50.0% above |",
        "| ≤ 5 × | 6.00 × | **missed**, 20.0% above |",
        "not measured",
    ] {
        assert!(text.contains(line), "{line}:\n{text}");
    }
}

#[test]
fn each_store_has_a_section_with_its_own_targets() {
    let of_store = |store: &str, metric, median| Finding {
        store: store.into(),
        ..finding(metric, median)
    };
    let results = Results {
        machines: vec![Machine::default()],
        findings: vec![
            of_store("mariadb", "rate, in rates of batched", 1.5),
            of_store("postgres", "rate, in rates of batched", 6.0),
            of_store("mysql", "rate, in rates of batched", 2.5),
        ],
    };
    let text = report::text(&results);
    let sections: Vec<&str> = text.split("\n## ").skip(2).collect();
    for (section, title, line) in [
        (sections[0], "PostgreSQL", "| ≥ 5 × | 6.00 × | met, 20.0% above |"),
        (sections[1], "MySQL", "| ≥ 2 × | 2.50 × | met, 25.0% above |"),
        (
            sections[2],
            "MariaDB",
            "| ≥ 2 × | 1.50 × | **missed**, 25.0% below |",
        ),
    ] {
        assert!(section.starts_with(title), "{section}");
        assert!(section.contains(line), "{line}:\n{section}");
        assert!(section.contains(&format!("### {title}: drain")), "{section}");
    }
    // Of a store that was not measured nothing is said.
    assert!(sections[3].starts_with("Machines"), "{text}");
}

#[test]
fn a_machine_tells_what_its_database_is() {
    let mut machine = Machine::default();
    let before = serde_json::to_string(&machine).unwrap();
    assert!(
        !before.contains("mysql"),
        "what is recorded stays as it is: {before}"
    );
    for (version, product) in [("9.7.4", "MySQL"), ("10.11.19-MariaDB-log", "MariaDB")] {
        machine.mysql = Some(Mysql {
            version: version.into(),
            sync_binlog: "1".into(),
            ..Mysql::default()
        });
        let lines = machine.lines();
        let (_, told) = lines.iter().find(|(name, _)| *name == product).unwrap();
        assert!(
            told.starts_with(version) && told.contains("sync_binlog=1"),
            "{told}"
        );
    }
}

#[test]
fn a_file_is_read_as_it_was_written_and_a_new_run_takes_the_place_of_the_old() {
    let of_run = |run: &str, workload: &str| {
        let machine = Machine {
            run: run.into(),
            ..Machine::default()
        };
        let finding = Finding {
            workload: workload.into(),
            run: run.into(),
            ..finding("rate", 1.5)
        };
        Results {
            machines: vec![machine],
            findings: vec![finding],
        }
    };
    let mut all = of_run("1", "drain");
    all.take_over(of_run("2", "keys"));
    assert_eq!((all.machines.len(), all.findings.len()), (2, 2));
    all.take_over(of_run("3", "drain"));
    let runs: Vec<&str> = all.machines.iter().map(|machine| machine.run.as_str()).collect();
    assert_eq!((runs, all.findings.len()), (vec!["2", "3"], 2));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results.json");
    all.write(&path).unwrap();
    assert_eq!(Results::read(&path).unwrap(), all);
}

#[test]
fn figures_are_short_and_medians_are_medians() {
    for (value, shown) in [
        (1_234_567.8, "1,234,568"),
        (100.4, "100"),
        (12.345, "12.3"),
        (0.456, "0.46"),
        (-1_000.0, "-1,000"),
    ] {
        assert_eq!(figure(value), shown);
    }
    assert_eq!(Finding::spread(&[3.0, 1.0, 2.0]), (2.0, 1.0, 3.0));
    assert_eq!(Finding::spread(&[4.0, 1.0, 2.0, 3.0]), (2.5, 1.0, 4.0));
}

/// What a ledger says when the messages of `numbers` arrive, of 0 to 5 with two keys.
fn verdict(numbers: &[u64]) -> Result<(), String> {
    let flow = Flow::new(20, 2);
    let mut ledger = Ledger::new(flow, 0);
    for number in numbers {
        let key = flow.key(*number).to_string();
        ledger.arrive(Some(key.as_bytes()), Some(&flow.payload(*number)));
    }
    ledger.verdict(Some(6))
}

#[test]
fn the_ledger_sees_losses_duplicates_and_inversions() {
    assert_eq!(verdict(&[1, 0, 2, 3, 4, 5]), Ok(()));
    for (numbers, fault) in [
        (&[0, 1, 3, 4, 5][..], "1 lost"),
        (&[0, 1, 2, 3], "2 lost"),
        (&[0, 1, 2, 3, 4, 5, 2], "1 twice"),
        (&[0, 1, 4, 3, 2, 5], "1 out of order"),
        (&[], "6 lost"),
    ] {
        let told = verdict(numbers).unwrap_err();
        assert!(told.ends_with(fault), "{numbers:?}: {told}");
    }
    let mut ledger = Ledger::new(Flow::new(20, 2), 0);
    ledger.arrive(Some(b"1"), Some(&Flow::new(20, 2).payload(0)));
    ledger.arrive(Some(b"0"), Some(&Flow::new(21, 2).payload(0)));
    assert!(
        ledger.verdict(None).unwrap_err().ends_with("2 unknown"),
        "a message with another's key, and one of another size"
    );
}

#[test]
fn the_ledger_knows_where_it_begins_and_what_is_apart() {
    let flow = Flow {
        apart: 3,
        ..Flow::new(20, 2)
    };
    let mut ledger = Ledger::new(flow, 0);
    for number in [0, 3, 4, 1, 2] {
        ledger.arrive(
            Some(flow.key(number).to_string().as_bytes()),
            Some(&flow.payload(number)),
        );
    }
    assert_eq!(ledger.verdict(Some(5)), Ok(()));
    assert!(
        Ledger::new(flow, 0)
            .verdict(Some(5))
            .unwrap_err()
            .ends_with("5 lost")
    );

    let mut behind = Ledger::new(flow, 3);
    for number in [4, 3] {
        behind.arrive(
            Some(flow.key(number).to_string().as_bytes()),
            Some(&flow.payload(number)),
        );
    }
    assert_eq!(behind.verdict(Some(5)), Ok(()));
    behind.arrive(Some(b"2"), Some(&flow.payload(0)));
    assert!(behind.verdict(Some(5)).is_err(), "a message that must not come");
}
