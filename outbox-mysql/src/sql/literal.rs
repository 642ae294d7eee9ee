//! Values as text of SQL: nothing that is written here can end what it stands in.

use std::fmt::{self, Display, Write};

/// Bytes as a literal.
pub(super) fn literal(bytes: &[u8]) -> String {
    format!("X'{}'", hex(bytes))
}

/// Text as a literal.
pub(super) fn text(text: &str) -> String {
    format!("_utf8mb4 X'{}'", hex(text.as_bytes()))
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// A field of a row of JSON: a number, or bytes in hexadecimal.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Field<'f> {
    Number(i64),
    Bytes(&'f [u8]),
}

impl Display for Field<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Bytes(bytes) => write!(f, "\"{}\"", hex(bytes)),
        }
    }
}

/// Rows as a literal of JSON. It needs no quoting: there is nothing in it that could end it.
pub(super) fn json<'f, const N: usize>(rows: impl IntoIterator<Item = [Field<'f>; N]>) -> String {
    let mut text = String::from("'[");
    for (index, row) in rows.into_iter().enumerate() {
        text.push_str(if index == 0 { "[" } else { ",[" });
        for (index, field) in row.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(text, "{comma}{field}");
        }
        text.push(']');
    }
    text.push_str("]'");
    text
}

/// Values with commas between them.
pub(super) fn list(values: impl IntoIterator<Item = impl Display>) -> String {
    let mut text = String::new();
    for value in values {
        let comma = if text.is_empty() { "" } else { "," };
        let _ = write!(text, "{comma}{value}");
    }
    text
}

/// `what` is none of the values; true when there are none.
pub(super) fn none_of(what: &str, values: impl IntoIterator<Item = impl Display>) -> String {
    match list(values) {
        list if list.is_empty() => "TRUE".to_owned(),
        list => format!("{what} NOT IN ({list})"),
    }
}
