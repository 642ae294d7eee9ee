//! How an outbox in a PostgreSQL database is configured.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use outbox_core::{
    Error, ErrorKind, FetchMode, Identifier, Limits, Ordering, Result, check_store, human, is_loopback,
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use sqlx::postgres::{PgConnectOptions, PgSslMode};

/// Where an outbox lives and how it is read and written.
///
/// Producers, relay and consumers of one outbox use the same `schema`, `prefix` and `ordering`.
///
/// ```
/// use outbox_postgres::PostgresConfig;
///
/// let config = PostgresConfig { archive: true, ..PostgresConfig::new("postgres://app:secret@localhost/shop") };
/// assert_eq!(config.prefix.as_str(), "outbox");
/// assert!(!format!("{config:?}").contains("secret"));
/// ```
#[derive(Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PostgresConfig {
    /// The database: `postgres://user:password@host:port/database`. It may ask for TLS by `sslmode` and `sslrootcert`;
    /// without `sslmode` a server on another machine must be verified (`verify-full`). Default: none, it must be given.
    pub url: SecretString,
    /// The schema in which the outbox is. Default: `public`.
    pub schema: Identifier,
    /// The name of the outbox table, with which all others begin; several outboxes fit into one schema.
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
    /// Whether a pooler in transaction mode (PgBouncer) stands before the server. Then nothing is prepared or set for
    /// a connection, and settlements are synchronous. Default: false.
    pub pooler: bool,
    /// Whether settlements wait for the disk. If not, a crash of the server may undo the last of them, and their
    /// messages are sent again. Leases always wait. Default: false.
    pub synchronous_settle: bool,
    /// How the relay reads. Default: `cursor`.
    pub fetch: FetchMode,
    /// How often the cursor is checked against all that is stored. Default: 5 min; at most 1 min with `pooler`.
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

impl PostgresConfig {
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
    /// let config = outbox_postgres::PostgresConfig::new("postgres://localhost/shop").with_prefix("billing")?;
    /// # Ok::<(), outbox_postgres::Error>(())
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
            ("sweep_interval", self.sweep_interval),
        ];
        check_store(self.shards, self.max_connections, &spans)
    }

    /// How to connect, with TLS as the address deserves it.
    pub(crate) fn options(&self) -> Result<PgConnectOptions> {
        let url = self.url.expose_secret();
        let invalid = |text: &'static str| Error::new(ErrorKind::Invalid, CONFIGURE, text);
        if url.is_empty() {
            return Err(invalid(
                "url is missing, expected postgres://user:password@host:port/database",
            ));
        }
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(invalid(
                "url must begin with postgres://, expected postgres://user:password@host:port/database",
            ));
        }
        let query = url.split_once('?').map_or("", |(_, query)| query);
        // The driver ignores what it does not know, and logs its value: sslpassword, say.
        if let Some(name) = query
            .split(['&', '#'])
            .filter_map(|pair| pair.split('=').next())
            .find(|name| !name.is_empty() && !name.starts_with("options") && !PARAMETERS.contains(name))
        {
            return Err(invalid("url has a parameter that is not known").with("parameter", name));
        }
        // What the parser says may hold a part of the URL, and with it the password.
        let mut options = PgConnectOptions::from_str(url).map_err(|_| {
            invalid(
                "url cannot be read, expected postgres://user:password@host:port/database?sslmode=verify-full; are \
                 special characters of the password percent-encoded?",
            )
        })?;
        let local = options.get_socket().is_some() || is_loopback(options.get_host());
        let named = query
            .split('&')
            .any(|pair| pair.starts_with("sslmode=") || pair.starts_with("ssl-mode="));
        if !local {
            match options.get_ssl_mode() {
                _ if !named => options = options.ssl_mode(PgSslMode::VerifyFull),
                PgSslMode::Prefer | PgSslMode::Allow => {
                    return Err(invalid(
                        "sslmode=prefer and sslmode=allow fall back to plain text without a word: say verify-full, \
                         verify-ca or require, or disable if plain text is meant",
                    )
                    .with("host", options.get_host()));
                }
                PgSslMode::Disable => tracing::warn!(
                    host = options.get_host(),
                    "the connection to the database is in plain text, as sslmode=disable asks"
                ),
                PgSslMode::Require | PgSslMode::VerifyCa | PgSslMode::VerifyFull => {}
            }
        }
        if options.get_application_name().is_none() {
            options = options.application_name("outbox");
        }
        Ok(if self.pooler {
            options.statement_cache_capacity(0).extra_float_digits(None)
        } else {
            options
        })
    }

    /// The same, where the relay must look more often because a restart of the server can go unseen.
    pub(crate) fn sweep_interval(&self) -> Duration {
        if self.pooler {
            self.sweep_interval.min(Duration::from_secs(60))
        } else {
            self.sweep_interval
        }
    }

    /// Where it is, for errors: never with the password.
    pub(crate) fn place(&self) -> String {
        format!("{}.{}", self.schema, self.prefix)
    }
}

const CONFIGURE: &str = "configure";
/// The parameters of a URL that sqlx knows, beside options.
const PARAMETERS: [&str; 17] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
];

impl Default for PostgresConfig {
    fn default() -> Self {
        Self {
            url: SecretString::from(String::new()),
            schema: public(),
            prefix: Identifier::default(),
            ordering: Ordering::default(),
            shards: 64,
            archive: false,
            pooler: false,
            synchronous_settle: false,
            fetch: FetchMode::default(),
            sweep_interval: Duration::from_secs(5 * 60),
            statement_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            max_connections: 6,
            limits: Limits::default(),
        }
    }
}

fn public() -> Identifier {
    Identifier::new("public").unwrap_or_default()
}

/// Everything but the password.
impl fmt::Debug for PostgresConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresConfig")
            .field("url", &Described(self))
            .field("schema", &self.schema.as_str())
            .field("prefix", &self.prefix.as_str())
            .field("ordering", &self.ordering)
            .field("shards", &self.shards)
            .field("archive", &self.archive)
            .field("pooler", &self.pooler)
            .field("synchronous_settle", &self.synchronous_settle)
            .field("fetch", &self.fetch)
            .field("sweep_interval", &self.sweep_interval)
            .field("statement_timeout", &self.statement_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("max_connections", &self.max_connections)
            .field("limits", &self.limits)
            .finish()
    }
}

/// Host, port and database of the URL, which may be shown: no user, no password, no options.
struct Described<'c>(&'c PostgresConfig);

impl fmt::Debug for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match PgConnectOptions::from_str(self.0.url.expose_secret()) {
            Ok(options) => write!(
                f,
                "postgres://{}:{}/{}",
                options.get_host(),
                options.get_port(),
                options.get_database().unwrap_or_default()
            ),
            Err(_) => f.write_str("(not a URL)"),
        }
    }
}

impl PostgresConfig {
    /// Host, port and database, for people: nothing that is secret.
    ///
    /// ```
    /// let config = outbox_postgres::PostgresConfig::new("postgres://app:secret@localhost/shop");
    /// assert_eq!(config.describe(), "postgres://localhost:5432/shop");
    /// ```
    #[must_use]
    pub fn describe(&self) -> String {
        format!("{:?}", Described(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(url: &str) -> Result<PgConnectOptions> {
        PostgresConfig::new(url).options()
    }

    #[test]
    fn the_file_form_is_strict() {
        let config: PostgresConfig = serde_json::from_str(
            r#"{"url": "postgres://localhost/a", "prefix": "x", "ordering": "sequenced", "statement_timeout": "250ms"}"#,
        )
        .unwrap();
        assert_eq!(config.statement_timeout, Duration::from_millis(250));
        for wrong in [
            r#"{"ulr": "a"}"#,
            r#"{"prefix": "a-b"}"#,
            r#"{"schema": "pg_catalog"}"#,
        ] {
            assert!(serde_json::from_str::<PostgresConfig>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn values_out_of_range_are_named() {
        let base = || PostgresConfig::new("postgres://localhost/a");
        for (config, field) in [
            (PostgresConfig { shards: 0, ..base() }, "shards"),
            (
                PostgresConfig {
                    shards: 1_025,
                    ..base()
                },
                "shards",
            ),
            (
                PostgresConfig {
                    max_connections: 1,
                    ..base()
                },
                "max_connections",
            ),
            (
                PostgresConfig {
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
            options("postgres://db.example/a").unwrap().get_ssl_mode(),
            PgSslMode::VerifyFull
        ));
        for silent in ["prefer", "allow"] {
            let error = options(&format!("postgres://db.example/a?sslmode={silent}")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
        for open in ["disable", "require", "verify-ca", "verify-full"] {
            assert!(options(&format!("postgres://db.example/a?sslmode={open}")).is_ok());
        }
        for local in ["localhost", "127.0.0.1", "[::1]"] {
            assert!(matches!(
                options(&format!("postgres://{local}/a")).unwrap().get_ssl_mode(),
                PgSslMode::Prefer
            ));
        }
    }

    #[test]
    fn a_parameter_that_the_driver_does_not_know_is_named() {
        let error = options("postgres://db.example/a?sslmode=require&sslpassword=x").unwrap_err();
        assert!(error.to_string().contains("sslpassword"), "{error}");
        assert!(options("postgres://db.example/a?application_name=b&options=-c%20jit%3Doff").is_ok());
    }

    #[test]
    fn no_secret_is_told() {
        for url in [
            "postgres://app:canary@db.example/shop",
            "postgres://app:can%61ry@db.example/shop",
            "postgres://app:canary@db.example:notaport/shop",
            "mysql://app:canary@db.example/shop",
            "postgres://db.example/shop?password=canary",
            "postgres://db.example/shop?sslmode=require&sslpassword=canary",
        ] {
            let config = PostgresConfig::new(url);
            let mut told = format!("{config:?} {}", config.describe());
            if let Err(error) = config.options() {
                told += &format!("{error} {error:?} {error:#?}");
            }
            assert!(!told.contains("canary") && !told.contains("can%61ry"), "{told}");
        }
    }
}
