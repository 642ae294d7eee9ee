//! A message's headers and the one form in which every store keeps them.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// Ordered headers: names may repeat, values are bytes.
///
/// ```
/// use outbox_core::Headers;
///
/// let mut headers = Headers::new();
/// headers.push("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
/// headers.push("raw", vec![0xff, 0x00]);
/// assert_eq!(headers.get("raw").map(|value| value.to_vec()), Some(vec![0xff, 0x00]));
/// assert_eq!(Headers::decode(headers.encode().unwrap_or_default().as_bytes()).unwrap(), headers);
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, Bytes)>);

impl Headers {
    /// No headers.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds a header at the end.
    pub fn push(&mut self, name: impl Into<String>, value: impl Into<Bytes>) {
        self.0.push((name.into(), value.into()));
    }

    /// The first value of `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Bytes> {
        self.0.iter().find(|(own, _)| own == name).map(|(_, value)| value)
    }

    /// The headers in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Bytes)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of all names and values together.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0.iter().map(|(name, value)| name.len() + value.len()).sum()
    }

    /// The stored form: a JSON array of `[name, value]`, a value that is not UTF-8 as `{"hex": "ff00"}`.
    ///
    /// It is ASCII-safe text; none when there are no headers.
    ///
    /// ```
    /// let mut headers = outbox_core::Headers::new();
    /// assert_eq!(headers.encode(), None);
    /// headers.push("traceparent", "00-4b");
    /// headers.push("raw", vec![0xff, 0x00]);
    /// assert_eq!(headers.encode().unwrap(), r#"[["traceparent","00-4b"],["raw",{"hex":"ff00"}]]"#);
    /// ```
    #[must_use]
    pub fn encode(&self) -> Option<String> {
        if self.0.is_empty() {
            return None;
        }
        let pairs: Vec<(&str, Value)> = self
            .iter()
            .map(|(name, value)| (name, Value::of(value)))
            .collect();
        serde_json::to_string(&pairs).ok()
    }

    /// Reads the stored form; for rows written by hand a JSON object of strings is understood as well.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when it is neither.
    ///
    /// # Example
    /// ```
    /// let headers = outbox_core::Headers::decode(br#"{"traceparent": "00-4b"}"#)?; // written by hand
    /// assert_eq!(headers.get("traceparent").unwrap(), "00-4b");
    /// # Ok::<(), outbox_core::Error>(())
    /// ```
    pub fn decode(stored: &[u8]) -> Result<Self> {
        if stored.is_empty() {
            return Ok(Self::new());
        }
        let stored: Stored = serde_json::from_slice(stored).map_err(|error| {
            Error::new(
                ErrorKind::Corrupt,
                "read headers",
                "expected a JSON array of [name, value] or an object of strings",
            )
            .with_source(error)
        })?;
        let pairs = match stored {
            Stored::Pairs(pairs) => pairs,
            Stored::Object(object) => object.into_iter().collect(),
        };
        pairs
            .into_iter()
            .map(|(name, value)| Ok((name, value.into_bytes()?)))
            .collect::<Result<_>>()
            .map(Self)
    }
}

/// Header values may carry tokens: only names and lengths are shown.
impl std::fmt::Debug for Headers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map()
            .entries(
                self.iter()
                    .map(|(name, value)| (name, format!("{} bytes", value.len()))),
            )
            .finish()
    }
}

impl<N: Into<String>, V: Into<Bytes>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        Self(
            pairs
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
        )
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Value {
    Text(String),
    Hex { hex: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Stored {
    Pairs(Vec<(String, Value)>),
    Object(std::collections::BTreeMap<String, Value>),
}

impl Value {
    fn of(value: &Bytes) -> Self {
        match std::str::from_utf8(value) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Hex {
                hex: value.iter().map(|byte| format!("{byte:02x}")).collect(),
            },
        }
    }

    fn into_bytes(self) -> Result<Bytes> {
        match self {
            Self::Text(text) => Ok(text.into()),
            Self::Hex { hex } => decode_hex(&hex).ok_or_else(|| {
                Error::new(
                    ErrorKind::Corrupt,
                    "read headers",
                    "a value under \"hex\" is not hexadecimal",
                )
            }),
        }
    }
}

fn decode_hex(hex: &str) -> Option<Bytes> {
    let digits: Vec<u8> = hex
        .chars()
        .map(|digit| digit.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    rest.is_empty().then(|| {
        pairs
            .iter()
            .map(|[high, low]| high << 4 | low)
            .collect::<Vec<u8>>()
            .into()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_headers_survive_the_stored_form(pairs: Vec<(String, Vec<u8>)>) {
            let headers: Headers = pairs.into_iter().collect();
            prop_assert_eq!(Headers::decode(headers.encode().unwrap_or_default().as_bytes()).unwrap(), headers);
        }

        #[test]
        fn any_bytes_are_read_or_refused(stored: Vec<u8>) {
            let _ = Headers::decode(&stored);
        }
    }

    #[test]
    fn an_object_written_by_hand_is_read() {
        let headers = Headers::decode(br#"{"a": "1", "b": {"hex": "ff"}}"#).unwrap();
        assert_eq!(
            headers,
            [("a", &b"1"[..]), ("b", &b"\xff"[..])].into_iter().collect()
        );
    }

    #[test]
    fn broken_headers_are_corrupt() {
        for stored in [
            &b"{"[..],
            b"[1]",
            b"[[\"a\", 1]]",
            b"[[\"a\", {\"hex\": \"f\"}]]",
            b"[[\"a\", {\"hex\": \"+f\"}]]",
        ] {
            assert_eq!(Headers::decode(stored).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn debug_shows_no_value() {
        let headers: Headers = [("authorization", "secret")].into_iter().collect();
        assert_eq!(format!("{headers:?}"), r#"{"authorization": "6 bytes"}"#);
    }
}
