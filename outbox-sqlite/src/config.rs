//! How an outbox in an SQLite file is configured.

use std::path::PathBuf;
use std::time::Duration;

use outbox_core::{Error, ErrorKind, FetchMode, Identifier, Limits, Ordering, Result, human};
use serde::{Deserialize, Serialize};

/// Where an outbox lives and how it is read and written.
///
/// Producers, relay and consumers of one outbox use the same `path`, `prefix` and `ordering`.
///
/// ```
/// use outbox_sqlite::SqliteConfig;
///
/// let config = SqliteConfig { archive: true, ..SqliteConfig::new("app.db") };
/// assert_eq!(config.prefix.as_str(), "outbox");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SqliteConfig {
    /// The database file; the application's own, so that one transaction covers both. Default: `outbox.db`.
    pub path: PathBuf,
    /// The name of the outbox table, with which all others begin; several outboxes fit into one file.
    /// Default: `outbox`.
    pub prefix: Identifier,
    /// The order within a key; fixed when the schema is made. Default: `insert`.
    pub ordering: Ordering,
    /// Whether delivered messages move to the archive instead of being deleted; somebody must purge it.
    /// Default: false.
    pub archive: bool,
    /// How long to wait for another connection that writes. Default: 5 s.
    #[serde(with = "human")]
    pub busy_timeout: Duration,
    /// How the relay's own commits reach the disk. Default: `normal`.
    pub synchronous: Synchronous,
    /// How the relay reads. Default: `cursor`.
    pub fetch: FetchMode,
    /// How often the cursor is checked against all that is stored. Default: 60 s.
    #[serde(with = "human")]
    pub sweep_interval: Duration,
    /// How often the file is looked at for commits of others; zero is never. Default: 5 ms.
    #[serde(with = "human")]
    pub wake_interval: Duration,
    /// What a message may weigh. Default: as [`Limits`].
    pub limits: Limits,
}

impl SqliteConfig {
    /// The outbox `outbox` in the file at `path`, with defaults.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            ..Self::default()
        }
    }

    /// The same outbox with another prefix.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] as of [`Identifier::new`].
    ///
    /// # Example
    /// ```
    /// use outbox_sqlite::SqliteConfig;
    ///
    /// let config = SqliteConfig::new("app.db").with_prefix("billing_outbox")?;
    /// assert!(config.with_prefix("billing-outbox").is_err());
    /// # Ok::<(), outbox_sqlite::Error>(())
    /// ```
    pub fn with_prefix(mut self, prefix: &str) -> Result<Self> {
        self.prefix = Identifier::new(prefix)?;
        Ok(self)
    }

    /// Whether the fields make sense together.
    pub(crate) fn check(&self) -> Result<()> {
        let memory = self.path.as_os_str().is_empty() || self.path.as_os_str() == ":memory:";
        if memory {
            return Err(Error::new(
                ErrorKind::Invalid,
                "configure",
                "path must name a file: several connections share the outbox, and each would have a memory of its own",
            )
            .with("path", self.path.display()));
        }
        self.prefix.check_prefix()?;
        if self.busy_timeout > MAX_BUSY_TIMEOUT {
            return Err(Error::new(
                ErrorKind::Invalid,
                "configure",
                "busy_timeout is at most one hour",
            )
            .with("busy_timeout", format!("{:?}", self.busy_timeout)));
        }
        Ok(())
    }
}

const MAX_BUSY_TIMEOUT: Duration = Duration::from_secs(60 * 60);

impl Default for SqliteConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::from("outbox.db"),
            prefix: Identifier::default(),
            ordering: Ordering::default(),
            archive: false,
            busy_timeout: Duration::from_secs(5),
            synchronous: Synchronous::default(),
            fetch: FetchMode::default(),
            sweep_interval: Duration::from_secs(60),
            wake_interval: Duration::from_millis(5),
            limits: Limits::default(),
        }
    }
}

/// How the relay's own commits reach the disk (`PRAGMA synchronous`). Producers decide for themselves, on their own
/// connections, and should use `FULL`: else a power loss can undo a commit whose message is already out.
///
/// ```
/// use outbox_sqlite::{SqliteConfig, Synchronous};
///
/// let config = SqliteConfig { synchronous: Synchronous::Full, ..SqliteConfig::new("app.db") };
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Synchronous {
    /// At checkpoints. A power loss may undo the last settlements of deliveries, and their messages are sent again. What is
    /// given up, waits, is promoted or done by an operator goes to the disk at once.
    #[default]
    Normal,
    /// At each commit.
    Full,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_form_is_strict_and_reads_back() {
        let config: SqliteConfig = serde_json::from_str(
            r#"{"path": "a.db", "prefix": "x", "ordering": "sequenced", "busy_timeout": "250ms", "fetch": "rescan"}"#,
        )
        .unwrap();
        assert_eq!(config.busy_timeout, Duration::from_millis(250));
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<SqliteConfig>(&text).unwrap(), config);

        for wrong in [
            r#"{"paht": "a"}"#,
            r#"{"prefix": "a-b"}"#,
            r#"{"prefix": ""}"#,
            r#"{"busy_timeout": 5}"#,
        ] {
            assert!(serde_json::from_str::<SqliteConfig>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_memory_database_is_refused() {
        for path in ["", ":memory:"] {
            assert_eq!(
                SqliteConfig::new(path).check().unwrap_err().kind(),
                ErrorKind::Invalid
            );
        }
    }
}
