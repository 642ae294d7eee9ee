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

/// Neighbours that are left out by one comparison, which lets a server step over their rows without reading them.
const RUN: i64 = 8;
/// With more comparisons a server would rather read the rows than think.
const MAX_RUNS: usize = 100;

/// The number `what` is none of these, whose neighbours are told as a range; true when there are none.
pub(super) fn no_number_of(what: &str, numbers: &[i64]) -> String {
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable();
    numbers.dedup();
    let (mut condition, mut single) = (String::new(), Vec::<i64>::new());
    let mut runs = 0;
    for run in numbers.chunk_by(|one, next| one.checked_add(1) == Some(*next)) {
        match run {
            [first, .., last] if last - first >= RUN - 1 && runs < MAX_RUNS => {
                runs += 1;
                let _ = write!(condition, "{what} NOT BETWEEN {first} AND {last} AND ");
            }
            _ => single.extend(run),
        }
    }
    condition + &none_of(what, single)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_left_out_as_ranges() {
        assert_eq!(no_number_of("id", &[]), "TRUE");
        assert_eq!(no_number_of("id", &[3, 1, 2]), "id NOT IN (1,2,3)");
        let numbers: Vec<i64> = (10..=17).rev().chain([30, i64::MAX, i64::MIN]).collect();
        assert_eq!(
            no_number_of("id", &numbers),
            format!(
                "id NOT BETWEEN 10 AND 17 AND id NOT IN ({},30,{})",
                i64::MIN,
                i64::MAX
            )
        );
        assert_eq!(
            no_number_of("id", &(1..=20).collect::<Vec<_>>()),
            "id NOT BETWEEN 1 AND 20 AND TRUE"
        );
        let many: Vec<i64> = (0..200).flat_map(|run| 100 * run..100 * run + RUN).collect();
        let text = no_number_of("id", &many);
        assert_eq!(text.matches("BETWEEN").count(), MAX_RUNS);
        assert_eq!(
            text.split_once("NOT IN").unwrap().1.matches(',').count(),
            100 * 8 - 1
        );
    }
}
