//! Durations as people write them, `5s` or `20ms`, in configurations: `#[serde(with = "outbox_core::human")]`.
//!
//! ```
//! use std::time::Duration;
//!
//! #[derive(serde::Deserialize)]
//! struct Config {
//!     #[serde(with = "outbox_core::human")]
//!     timeout: Duration,
//! }
//!
//! let config: Config = serde_json::from_str(r#"{"timeout": "1m 30s"}"#).unwrap();
//! assert_eq!(config.timeout, Duration::from_secs(90));
//! assert!(serde_json::from_str::<Config>(r#"{"timeout": "soon"}"#).is_err());
//! ```

use std::fmt;
use std::time::Duration;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserializer, Serializer};

/// A duration in at most two units, for answers.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::human::short;
///
/// let shown = [0, 250, 1_250, 61_000, 3_725_000, 90_061_000].map(|millis| short(Duration::from_millis(millis)));
/// assert_eq!(shown, ["0s", "250ms", "1.2s", "1m 1s", "1h 2m", "1day 1h"]);
/// ```
#[must_use]
pub fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let rounded = match seconds {
        0 => Duration::from_millis(duration.subsec_millis().into()),
        1..60 => return format!("{seconds}.{}s", duration.subsec_millis() / 100),
        60..3_600 => Duration::from_secs(seconds),
        3_600..86_400 => Duration::from_secs(seconds / 60 * 60),
        _ => Duration::from_secs(seconds / 3_600 * 3_600),
    };
    humantime::format_duration(rounded).to_string()
}

/// Writes a duration as people do.
///
/// # Errors
/// The serializer's own.
///
/// # Example
/// ```
/// #[derive(serde::Serialize)]
/// struct Answer {
///     #[serde(serialize_with = "outbox_core::human::serialize")]
///     age: std::time::Duration,
/// }
/// let answer = Answer { age: std::time::Duration::from_secs(90) };
/// assert_eq!(serde_json::to_string(&answer).unwrap(), r#"{"age":"1m 30s"}"#);
/// ```
pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(*value))
}

/// Reads a duration as people write it.
///
/// # Errors
/// When it is no text, or no duration. What was found is for the deserializer to show, or to hide.
///
/// # Example
/// ```
/// #[derive(serde::Deserialize)]
/// struct Config {
///     #[serde(deserialize_with = "outbox_core::human::deserialize")]
///     lease: std::time::Duration,
/// }
/// let config: Config = serde_json::from_str(r#"{"lease": "250ms"}"#).unwrap();
/// assert_eq!(config.lease.as_millis(), 250);
/// ```
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    deserializer.deserialize_str(Text)
}

struct Text;

impl Visitor<'_> for Text {
    type Value = Duration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a duration such as \"10s\", \"250ms\" or \"1h 30m\"")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Duration, E> {
        humantime::parse_duration(text).map_err(|_| E::invalid_value(Unexpected::Str(text), &self))
    }
}
