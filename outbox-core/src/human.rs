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
pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(*value))
}

/// Reads a duration as people write it.
///
/// # Errors
/// When it is no text, or no duration.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|error| {
        serde::de::Error::custom(format_args!(
            "{text:?} is no duration ({error}), expected for example \"10s\""
        ))
    })
}
