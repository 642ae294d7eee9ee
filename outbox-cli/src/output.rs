//! All that the program prints: answers to stdout, everything for people beside them to stderr.
//!
//! Nothing here panics when a reader has gone: `outbox status | head -1` is no defect.

use std::io::{self, IsTerminal, Write};
use std::time::SystemTime;

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, Color, Table, TableComponent};
use serde::Serialize;

use crate::exit::{Code, Failure, Result};

/// Prints one line of an answer.
pub(crate) fn line(text: impl AsRef<str>) -> Result<()> {
    write(&mut io::stdout().lock(), text.as_ref())
}

/// Prints an answer as one JSON object on one line.
pub(crate) fn json<T: Serialize>(value: &T) -> Result<()> {
    let text = serde_json::to_string(value)
        .map_err(|error| Failure::new(Code::Unexpected, format!("write JSON: {error}")))?;
    line(text)
}

/// Tells people something; machines read stdout.
pub(crate) fn notice(text: impl AsRef<str>) {
    // Nobody is left to be told that nobody listens.
    let _ = writeln!(io::stderr().lock(), "{}", text.as_ref());
}

/// Says why the program ends.
pub(crate) fn failure(failure: &Failure, verbose: bool) {
    // A reader of stdout that has gone has heard enough: `outbox status | head -1` is no failure to talk about.
    if failure.line.is_empty() {
        return;
    }
    notice(format!("outbox: {}", one_line(&failure.line)));
    if verbose {
        for cause in &failure.chain {
            notice(format!("  caused by: {cause}"));
        }
    }
    if let Some(hint) = &failure.hint {
        notice(format!("  hint: {hint}"));
    }
}

/// A table in the style of all tables of this program.
pub(crate) fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(NOTHING)
        .set_style(TableComponent::HeaderLines, '─')
        .set_style(TableComponent::MiddleHeaderIntersections, '─')
        .set_header(header);
    table
}

/// A table of names and values, without a head.
pub(crate) fn fields() -> Table {
    let mut table = Table::new();
    table.load_preset(NOTHING);
    table
}

/// A time as all times of this program. Rows written by hand may name times that no calendar has.
pub(crate) fn time(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok();
    match since.filter(|since| since.as_secs() < YEAR_10000) {
        Some(_) => humantime::format_rfc3339_millis(time).to_string(),
        None => "out of range".to_owned(),
    }
}

/// In seconds since 1970.
const YEAR_10000: u64 = 253_402_300_800;

/// A cell with a number, which stands at the right.
pub(crate) fn number(value: impl ToString) -> Cell {
    Cell::new(value.to_string()).set_alignment(CellAlignment::Right)
}

/// A cell in a colour, where stdout shows colours.
pub(crate) fn coloured(text: impl ToString, color: Color) -> Cell {
    let cell = Cell::new(text.to_string());
    if colours() { cell.fg(color) } else { cell }
}

/// Whether stdout is a terminal whose user wants colours.
pub(crate) fn colours() -> bool {
    io::stdout().is_terminal() && wants_colours()
}

/// The same of stderr.
pub(crate) fn colours_on_stderr() -> bool {
    io::stderr().is_terminal() && wants_colours()
}

/// A word that must not be overlooked among notices.
pub(crate) fn alarming_on_stderr(word: &str) -> String {
    if colours_on_stderr() {
        return format!("\x1b[1;31m{word}\x1b[0m");
    }
    word.to_owned()
}

/// Clears the terminal, for what is shown again and again.
pub(crate) fn clear() {
    if io::stdout().is_terminal() {
        let mut out = io::stdout().lock();
        let _ = write!(out, "\x1b[H\x1b[2J").and_then(|()| out.flush());
    }
}

fn wants_colours() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

fn write(out: &mut impl Write, text: &str) -> Result<()> {
    writeln!(out, "{text}")
        .and_then(|()| out.flush())
        .map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::new(Code::Unavailable, ""),
            _ => Failure::new(Code::Unavailable, format!("write stdout: {error}")).because(&error),
        })
}

/// Errors of libraries may have several lines; a log collector wants one.
fn one_line(text: &str) -> String {
    text.split('\n').map(str::trim).collect::<Vec<_>>().join(" ")
}
