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

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serializer};

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
/// When it is no text, or no duration.
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
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|error| {
        serde::de::Error::custom(format_args!(
            "{text:?} is no duration ({error}), expected for example \"10s\""
        ))
    })
}
