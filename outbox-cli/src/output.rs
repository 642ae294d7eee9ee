//! All that the program prints: answers to stdout, everything for people beside them to stderr.
//!
//! Nothing here panics when a reader has gone: `outbox status | head -1` is no defect.

use std::io::{self, IsTerminal, Write};
use std::time::SystemTime;

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, Color, Table, TableComponent};
use indicatif::{ProgressBar, ProgressStyle};
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
            notice(format!("  caused by: {}", one_line(cause)));
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

/// A time as all times of this program, for people.
pub(crate) fn time(time: SystemTime) -> String {
    timestamp(time).unwrap_or_else(|| "out of range".to_owned())
}

/// The same for machines: none where it cannot be written. Rows written by hand may name times before 1970 or after
/// the year 9999, with which humantime would panic.
pub(crate) fn timestamp(time: SystemTime) -> Option<String> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    (since.as_secs() < YEAR_10000).then(|| humantime::format_rfc3339_millis(time).to_string())
}

/// In seconds since 1970.
const YEAR_10000: u64 = 253_402_300_800;

/// Text from elsewhere, such as a topic or what a sink said: no control character in it reaches the terminal.
pub(crate) fn readable(text: impl AsRef<str>) -> String {
    let mut readable = String::with_capacity(text.as_ref().len());
    for c in text.as_ref().chars() {
        match c.is_control() {
            true => readable.extend(c.escape_default()),
            false => readable.push(c),
        }
    }
    readable
}

/// A key as people can read it.
pub(crate) fn readable_key(key: &[u8]) -> String {
    match str::from_utf8(key) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => key.escape_ascii().to_string(),
    }
}

/// A bar for so many of something, on stderr where that is a terminal.
pub(crate) fn progress(total: u64, what: &str) -> ProgressBar {
    let template = format!("{{bar:40}} {{human_pos}} of {{human_len}} {what}, {{per_sec}}, {{eta}} left");
    ProgressBar::new(total).with_style(style(&template))
}

/// A count of something, of which nobody knows yet how many there are.
pub(crate) fn counting(what: &str) -> ProgressBar {
    ProgressBar::no_length().with_style(style(&format!("{{human_pos}} {what}")))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Whether there is somebody to ask: who cannot see the question cannot answer it.
pub(crate) fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks; anything but a yes is a no.
pub(crate) fn ask(question: &str) -> Result<bool> {
    let mut answer = String::new();
    let mut err = io::stderr().lock();
    write!(err, "{question} [y/N] ")
        .and_then(|()| err.flush())
        .and_then(|()| io::stdin().read_line(&mut answer))
        .map_err(|error| Failure::new(Code::Unavailable, format!("ask: {error}")).because(&error))?;
    Ok(is_yes(&answer))
}

fn is_yes(answer: &str) -> bool {
    ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str())
}

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

/// Errors of libraries may have several lines, and what a server said in them; a log collector wants one line.
fn one_line(text: &str) -> String {
    readable(text.split('\n').map(str::trim).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_that_cannot_be_written_are_out_of_range() {
        let last = SystemTime::UNIX_EPOCH + Duration::from_millis(253_402_300_799_999);
        assert_eq!(time(SystemTime::UNIX_EPOCH), "1970-01-01T00:00:00.000Z");
        assert_eq!(time(last), "9999-12-31T23:59:59.999Z");
        for odd in [
            SystemTime::UNIX_EPOCH - Duration::from_millis(1),
            last + Duration::from_millis(1),
        ] {
            assert_eq!((time(odd), timestamp(odd)), ("out of range".to_owned(), None));
        }
    }

    #[test]
    fn no_control_character_is_readable() {
        assert_eq!(
            readable("a \x1b[31mü\r\n\t\u{9b}\u{7f} \\ \""),
            "a \\u{1b}[31mü\\r\\n\\t\\u{9b}\\u{7f} \\ \""
        );
        assert_eq!(readable_key("ü".as_bytes()), "ü");
        assert_eq!(readable_key(b"\x1b[2J"), "\\x1b[2J");
        assert_eq!(readable_key(b"\xff\0"), "\\xff\\x00");
        assert_eq!(one_line("first\r\n  second \x07"), "first second \\u{7}");
    }

    #[test]
    fn only_a_yes_is_a_yes() {
        for yes in ["y\n", "Y\r\n", " yes "] {
            assert!(is_yes(yes), "{yes:?}");
        }
        for no in ["", "\n", "n\n", "yesterday\n", "1\n"] {
            assert!(!is_yes(no), "{no:?}");
        }
    }
}
