//! What came of faults, as a table for people and as JSON.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// All stores.
pub(crate) const STORES: &[&str] = &["sqlite", "postgres", "mysql", "mariadb", "mongo"];
/// Those on servers.
pub(crate) const SERVERS: &[&str] = &["postgres", "mysql", "mariadb", "mongo"];

/// What came of a fault on a store.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) store: String,
    pub(crate) fault: String,
    pub(crate) kept: bool,
    pub(crate) committed: usize,
    pub(crate) duplicates: usize,
    pub(crate) lost: usize,
    pub(crate) phantoms: usize,
    pub(crate) gaps: usize,
    #[serde(default)]
    pub(crate) dead: usize,
    #[serde(default)]
    pub(crate) kills: usize,
    pub(crate) recovery_ms: Option<u64>,
    #[serde(default)]
    pub(crate) take_over_ms: Option<u64>,
    pub(crate) seconds: f64,
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap()
}

impl Row {
    fn cell(&self) -> String {
        let verdict = if self.kept { "kept" } else { "**broken**" };
        let figures = self.figures();
        format!("{verdict}, {} of {}{figures}", self.duplicates, self.committed)
    }

    /// Those that only some faults have.
    fn figures(&self) -> String {
        let figures = [
            (self.kills > 1).then(|| format!("{} kills", self.kills)),
            (self.dead > 0).then(|| format!("{} dead", self.dead)),
            self.take_over_ms
                .map(|millis| format!("taken over in {millis} ms")),
            self.recovery_ms.map(|millis| format!("{millis} ms")),
        ];
        let figures = figures.into_iter().flatten();
        figures.map(|figure| format!(", {figure}")).collect()
    }

    /// It panicked, and has said why.
    pub(crate) fn broken(store: &str, fault: &str, took: Duration) -> Self {
        Self {
            store: store.to_owned(),
            fault: fault.to_owned(),
            kept: false,
            committed: 0,
            duplicates: 0,
            lost: 0,
            phantoms: 0,
            gaps: 0,
            dead: 0,
            kills: 0,
            recovery_ms: None,
            take_over_ms: None,
            seconds: took.as_secs_f64(),
        }
    }

    pub(crate) fn line(&self) -> String {
        let verdict = if self.kept { "kept  " } else { "BROKEN" };
        let figures = self.figures();
        format!(
            "{verdict} {} | {}: {} committed, {} duplicates, {} lost, {} phantoms, {} gaps{figures}, {:.1} s",
            self.store,
            self.fault,
            self.committed,
            self.duplicates,
            self.lost,
            self.phantoms,
            self.gaps,
            self.seconds
        )
    }
}

/// Keeps what was found where it is wanted, and fails when a promise was broken.
pub(crate) fn finish(store: &str, rows: &[Row]) {
    if let Some(path) = std::env::var_os("OUTBOX_FAULTS_JSON") {
        add(Path::new(&path), rows);
    }
    let broken: Vec<&str> = rows
        .iter()
        .filter(|row| !row.kept)
        .map(|row| row.fault.as_str())
        .collect();
    assert!(broken.is_empty(), "{store} broke the promise: {broken:?}");
}

/// Adds rows to a file, in place of those of the same stores and faults.
fn add(path: &Path, rows: &[Row]) {
    let text = std::fs::read_to_string(path).unwrap_or_else(|_| "[]".to_owned());
    let mut all: Vec<Row> = serde_json::from_str(&text).unwrap();
    all.retain(|own| {
        !rows
            .iter()
            .any(|row| row.store == own.store && row.fault == own.fault)
    });
    all.extend(rows.iter().cloned());
    let mut text = serde_json::to_string_pretty(&all).unwrap();
    text.push('\n');
    std::fs::write(path, text).unwrap();
    std::fs::write(path.with_extension("md"), report(&all)).unwrap();
}

type Figure = fn(&Row) -> Option<u64>;

/// The faults of which it is told how soon all worked again, and which figure tells it.
const SOON: [(&str, &[&str], Figure); 4] = [
    (
        "others owned what a dead relay had, at most",
        &["the owner is killed"],
        |row| row.take_over_ms,
    ),
    (
        "the broker answered again",
        &["the broker is killed", "the broker is away for five seconds"],
        |row| row.recovery_ms,
    ),
    (
        "the database answered again",
        &[
            "the database is killed",
            "the database is killed, again and again",
        ],
        |row| row.recovery_ms,
    ),
    ("the producer broke", &["the producer breaks"], |row| {
        row.recovery_ms
    }),
];

/// What was found: in all, how soon all worked again, and fault by fault and store by store.
fn report(rows: &[Row]) -> String {
    let of = |store: &'static str| rows.iter().filter(move |row| row.store == store);
    let sum = |store, figure: fn(&Row) -> usize| of(store).map(figure).sum::<usize>().to_string();
    let mut text = String::from(
        "# Faults\n\nMade by `scripts/faults` of what it found; not written by hand. On each store two relays and eight \
         producers work, the fault strikes in the middle, then all heals, and the oracle compares what was committed with what \
         the broker has. *kept* is: nothing lost, nothing invented, of each key everything in order, nothing repeated but what \
         was in flight, effects exact through the inbox, nothing dead but what the topic refuses, nothing left waiting, nothing \
         kept of the system.\n\n## In all\n\n",
    );
    text += &header("");
    text += &line("faults", |store| of(store).count().to_string());
    text += &line("broken", |store| {
        of(store).filter(|row| !row.kept).count().to_string()
    });
    text += &line("messages committed", |store| sum(store, |row| row.committed));
    text += &line("lost", |store| sum(store, |row| row.lost));
    text += &line("phantoms", |store| sum(store, |row| row.phantoms));
    text += &line("gaps", |store| sum(store, |row| row.gaps));
    text += &line("arrived twice", |store| sum(store, |row| row.duplicates));
    text += &line("relays killed by signal", |store| sum(store, |row| row.kills));
    text += "\n## How soon\n\nThe longest of what was measured, in milliseconds, from the moment that is named until something \
             arrived, or until all was owned. The lease was a second, on MongoDB's slow stand-in three.\n\n";
    text += &header("");
    for (what, faults, figure) in SOON {
        text += &line(what, |store| {
            let rows = of(store).filter(|row| faults.contains(&row.fault.as_str()));
            let longest = rows.filter_map(figure).max();
            longest.map_or(String::new(), |millis| millis.to_string())
        });
    }
    text += "\n## One by one\n\nThe figures are messages that arrived twice, of those that were committed; how many died; and the \
             time from the moment at which all worked again until something arrived.\n\n";
    text += &header("fault");
    let mut faults: Vec<&str> = Vec::new();
    for row in rows {
        if !faults.contains(&row.fault.as_str()) {
            faults.push(&row.fault);
        }
    }
    for fault in faults {
        text += &line(fault, |store| {
            let row = of(store).find(|row| row.fault == fault);
            row.map_or(String::new(), Row::cell)
        });
    }
    text
}

fn header(first: &str) -> String {
    format!(
        "| {first} |{}\n|---|{}\n",
        STORES
            .iter()
            .map(|store| format!(" {store} |"))
            .collect::<String>(),
        "---|".repeat(STORES.len())
    )
}

/// A line of a table, with a cell for each store.
fn line(first: &str, cell: impl Fn(&'static str) -> String) -> String {
    let cells: String = STORES.iter().map(|store| format!(" {} |", cell(store))).collect();
    format!("| {first} |{cells}\n")
}
