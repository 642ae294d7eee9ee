//! How an outbox in a MySQL or MariaDB database is configured.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use outbox_core::{
    Error, ErrorKind, FetchMode, Identifier, Limits, Ordering, Result, check_store, human, is_loopback,
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use sqlx::mysql::{MySqlConnectOptions, MySqlSslMode};

/// Where an outbox lives and how it is read and written.
///
/// Producers, relay and consumers of one outbox use the same database, `prefix` and `ordering`.
///
/// ```
/// use outbox_mysql::MysqlConfig;
///
/// let config = MysqlConfig { archive: true, ..MysqlConfig::new("mysql://app:secret@localhost/shop") };
/// assert_eq!(config.prefix.as_str(), "outbox");
/// assert!(!format!("{config:?}").contains("secret"));
/// ```
#[derive(Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MysqlConfig {
    /// The database: `mysql://user:password@host:port/database`. `mariadb://` means the same. It may ask for TLS by
    /// `ssl-mode` and `ssl-ca`; without `ssl-mode` a server on another machine must be verified (`VERIFY_IDENTITY`).
    /// Default: none, it must be given.
    pub url: SecretString,
    /// The name of the outbox table, with which all others begin; several outboxes fit into one database.
    /// Default: `outbox`.
    pub prefix: Identifier,
    /// The order within a key; fixed when the schema is made. Default: `insert`.
    pub ordering: Ordering,
    /// How many shards a new outbox gets, 1 to 1,024: at most so many relays share the work. Fixed when the schema is
    /// made, and read from there afterwards. Default: 64.
    pub shards: u16,
    /// Whether delivered messages move to the archive instead of being deleted; the relay purges it.
    /// Default: false.
    pub archive: bool,
    /// How the relay reads. Where several servers take writes (Galera, a group with several primaries) it is always
    /// `rescan`. Default: `cursor`.
    pub fetch: FetchMode,
    /// For how long what was enqueued last is read anew each time. No single INSERT into the outbox may take longer from
    /// drawing an id to storing its row, however long its transaction then stays open. Default: 10 s.
    #[serde(with = "human")]
    pub lag: Duration,
    /// How often the cursor is checked against all that is stored. Default: 1 min.
    #[serde(with = "human")]
    pub sweep_interval: Duration,
    /// How long one statement of ours may take. Default: 30 s.
    #[serde(with = "human")]
    pub statement_timeout: Duration,
    /// How long connecting, or waiting for a connection of ours, may take. Default: 10 s.
    #[serde(with = "human")]
    pub connect_timeout: Duration,
    /// How many connections a store opens at most, beside one for each reader: at least 2. Default: 6.
    pub max_connections: u32,
    /// What a message may weigh. Default: as [`Limits`].
    pub limits: Limits,
}

impl MysqlConfig {
    /// The outbox `outbox` in the database at `url`, with defaults.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: SecretString::from(url.into()),
            ..Self::default()
        }
    }

    /// The same outbox with another prefix.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] as of [`Identifier::new`].
    ///
    /// ```
    /// let config = outbox_mysql::MysqlConfig::new("mysql://localhost/shop").with_prefix("billing")?;
    /// # Ok::<(), outbox_mysql::Error>(())
    /// ```
    pub fn with_prefix(mut self, prefix: &str) -> Result<Self> {
        self.prefix = Identifier::new(prefix)?;
        Ok(self)
    }

    /// Whether the fields make sense together.
    pub(crate) fn check(&self) -> Result<()> {
        self.prefix.check_prefix()?;
        let spans = [
            ("statement_timeout", self.statement_timeout),
            ("connect_timeout", self.connect_timeout),
            ("lag", self.lag),
            ("sweep_interval", self.sweep_interval),
        ];
        check_store(self.shards, self.max_connections, &spans)
    }

    /// How to connect, with TLS as the address deserves it.
    pub(crate) fn options(&self) -> Result<MySqlConnectOptions> {
        let url = self.url.expose_secret();
        let invalid = |text: &'static str| Error::new(ErrorKind::Invalid, CONFIGURE, text);
        if url.is_empty() {
            return Err(invalid(
                "url is missing, expected mysql://user:password@host:port/database",
            ));
        }
        if !url.starts_with("mysql://") && !url.starts_with("mariadb://") {
            return Err(invalid(
                "url must begin with mysql://, expected mysql://user:password@host:port/database",
            ));
        }
        // What the parser says may hold a part of the URL, and with it the password.
        let mut options = MySqlConnectOptions::from_str(url).map_err(|_| {
            invalid(
                "url cannot be read, expected mysql://user:password@host:port/database?ssl-mode=VERIFY_IDENTITY; are \
                 special characters of the password percent-encoded?",
            )
        })?;
        if options.get_database().is_none() {
            return Err(invalid(
                "url names no database, expected mysql://user:password@host:port/database",
            ));
        }
        let local = options.get_socket().is_some() || is_loopback(options.get_host());
        let named = url.split_once('?').is_some_and(|(_, query)| {
            query
                .split('&')
                .any(|pair| pair.starts_with("sslmode=") || pair.starts_with("ssl-mode="))
        });
        if !local {
            match options.get_ssl_mode() {
                _ if !named => options = options.ssl_mode(MySqlSslMode::VerifyIdentity),
                MySqlSslMode::Preferred => {
                    return Err(invalid(
                        "ssl-mode=PREFERRED falls back to plain text without a word: say VERIFY_IDENTITY, VERIFY_CA or \
                         REQUIRED, or DISABLED if plain text is meant",
                    )
                    .with("host", options.get_host()));
                }
                MySqlSslMode::Disabled => tracing::warn!(
                    host = options.get_host(),
                    "the connection to the database is in plain text, as ssl-mode=DISABLED asks"
                ),
                MySqlSslMode::Required | MySqlSslMode::VerifyCa | MySqlSslMode::VerifyIdentity => {}
            }
        }
        Ok(options)
    }

    /// Where it is, for errors: never with the password.
    pub(crate) fn place(&self) -> String {
        self.prefix.to_string()
    }
}

const CONFIGURE: &str = "configure";

impl Default for MysqlConfig {
    fn default() -> Self {
        Self {
            url: SecretString::from(String::new()),
            prefix: Identifier::default(),
            ordering: Ordering::default(),
            shards: 64,
            archive: false,
            fetch: FetchMode::default(),
            lag: Duration::from_secs(10),
            sweep_interval: Duration::from_secs(60),
            statement_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            max_connections: 6,
            limits: Limits::default(),
        }
    }
}

/// Everything but the password.
impl fmt::Debug for MysqlConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MysqlConfig")
            .field("url", &Described(self))
            .field("prefix", &self.prefix.as_str())
            .field("ordering", &self.ordering)
            .field("shards", &self.shards)
            .field("archive", &self.archive)
            .field("fetch", &self.fetch)
            .field("lag", &self.lag)
            .field("sweep_interval", &self.sweep_interval)
            .field("statement_timeout", &self.statement_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("max_connections", &self.max_connections)
            .field("limits", &self.limits)
            .finish()
    }
}

/// Host, port and database of the URL, which may be shown: no user, no password, no options.
struct Described<'c>(&'c MysqlConfig);

impl fmt::Debug for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match MySqlConnectOptions::from_str(self.0.url.expose_secret()) {
            Ok(options) => write!(
                f,
                "mysql://{}:{}/{}",
                options.get_host(),
                options.get_port(),
                options.get_database().unwrap_or_default()
            ),
            Err(_) => f.write_str("(not a URL)"),
        }
    }
}

impl MysqlConfig {
    /// Host, port and database, for people: nothing that is secret.
    ///
    /// ```
    /// let config = outbox_mysql::MysqlConfig::new("mysql://app:secret@localhost/shop");
    /// assert_eq!(config.describe(), "mysql://localhost:3306/shop");
    /// ```
    #[must_use]
    pub fn describe(&self) -> String {
        format!("{:?}", Described(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(url: &str) -> Result<MySqlConnectOptions> {
        MysqlConfig::new(url).options()
    }

    #[test]
    fn the_file_form_is_strict() {
        let config: MysqlConfig = serde_json::from_str(
            r#"{"url": "mysql://localhost/a", "prefix": "x", "ordering": "sequenced", "statement_timeout": "250ms"}"#,
        )
        .unwrap();
        assert_eq!(config.statement_timeout, Duration::from_millis(250));
        for wrong in [r#"{"ulr": "a"}"#, r#"{"prefix": "a-b"}"#, r#"{"schema": "a"}"#] {
            assert!(serde_json::from_str::<MysqlConfig>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn values_out_of_range_are_named() {
        let base = || MysqlConfig::new("mysql://localhost/a");
        for (config, field) in [
            (MysqlConfig { shards: 0, ..base() }, "shards"),
            (
                MysqlConfig {
                    shards: 1_025,
                    ..base()
                },
                "shards",
            ),
            (
                MysqlConfig {
                    max_connections: 1,
                    ..base()
                },
                "max_connections",
            ),
            (
                MysqlConfig {
                    statement_timeout: Duration::ZERO,
                    ..base()
                },
                "statement_timeout",
            ),
        ] {
            let error = config.check().unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
    }

    #[test]
    fn another_machine_is_verified_unless_told_otherwise() {
        assert!(matches!(
            options("mysql://db.example/a").unwrap().get_ssl_mode(),
            MySqlSslMode::VerifyIdentity
        ));
        let error = options("mysql://db.example/a?ssl-mode=PREFERRED").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        for open in ["DISABLED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY"] {
            assert!(options(&format!("mariadb://db.example/a?ssl-mode={open}")).is_ok());
        }
        for local in ["localhost", "127.0.0.1", "[::1]"] {
            assert!(matches!(
                options(&format!("mysql://{local}/a")).unwrap().get_ssl_mode(),
                MySqlSslMode::Preferred
            ));
        }
    }

    #[test]
    fn no_secret_is_told() {
        for url in [
            "mysql://app:canary@db.example/shop",
            "mysql://app:can%61ry@db.example/shop",
            "mysql://app:canary@db.example:notaport/shop",
            "postgres://app:canary@db.example/shop",
            "mysql://db.example/shop?password=canary",
        ] {
            let config = MysqlConfig::new(url);
            let mut told = format!("{config:?} {}", config.describe());
            if let Err(error) = config.options() {
                told += &format!("{error} {error:?} {error:#?}");
            }
            assert!(!told.contains("canary") && !told.contains("can%61ry"), "{told}");
        }
    }
}
