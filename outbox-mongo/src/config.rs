//! How an outbox in a MongoDB database is configured.

use std::fmt;
use std::time::Duration;

use mongodb::options::{
    ClientOptions, ConnectionString, HostInfo, ReadConcern, ReadPreference, SelectionCriteria, ServerAddress,
    Tls, TlsOptions, WriteConcern,
};
use outbox_core::{
    Error, ErrorKind, Identifier, Limits, Ordering, Result, check_store, human, is_loopback, within,
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

/// Where an outbox lives and how it is read and written.
///
/// Producers, relay and consumers of one outbox use the same database, `prefix` and `ordering`.
///
/// ```
/// use outbox_mongo::MongoConfig;
///
/// let config = MongoConfig { archive: true, ..MongoConfig::new("mongodb://app:secret@localhost/shop") };
/// assert_eq!(config.prefix.as_str(), "outbox");
/// assert!(!format!("{config:?}").contains("secret"));
/// ```
#[derive(Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MongoConfig {
    /// The database: `mongodb://user:password@host:port/database?replicaSet=rs0`, or `mongodb+srv://`. A server on another
    /// machine is spoken to by TLS and verified, unless the URL says `tls=false`. Default: none, it must be given.
    pub url: SecretString,
    /// The name of the outbox collection, with which all others begin; several outboxes fit into one database.
    /// Default: `outbox`.
    pub prefix: Identifier,
    /// The order within a key; fixed when the schema is made. Default: `insert`.
    pub ordering: Ordering,
    /// How many shards a new outbox gets, 1 to 200: at most so many relays share the work. Fixed when the schema is
    /// made, and read from there afterwards. Default: 64.
    pub shards: u16,
    /// Whether delivered messages are kept instead of being deleted; the relay purges them. Default: false.
    pub archive: bool,
    /// For how long delivered messages are kept by the server itself, which deletes them afterwards (a TTL index; `migrate`
    /// sets it). Default: 0 s, the relay purges them, as its own `retention` says.
    #[serde(with = "human")]
    pub archive_ttl: Duration,
    /// Whether the relay follows the outbox by a change stream, so that it need not wait for its next poll. Costs the
    /// server an event for each message and relay. Default: false.
    pub change_stream: bool,
    /// How long one command of ours may take. Default: 30 s.
    #[serde(with = "human")]
    pub statement_timeout: Duration,
    /// How long connecting, or waiting for a primary, may take. Default: 10 s.
    #[serde(with = "human")]
    pub connect_timeout: Duration,
    /// How many connections a store opens at most, beside those that watch the servers: at least 2. Default: 6.
    pub max_connections: u32,
    /// What a message may weigh; a document has at most 16 MiB. Default: as [`Limits`].
    pub limits: Limits,
}

const CONFIGURE: &str = "configure";
const MOST_SHARDS: u16 = 200;
/// A document has 16 MiB, of which the rest is for what is not the message's.
const MOST_BYTES: usize = 15 << 20;

impl MongoConfig {
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
    /// let config = outbox_mongo::MongoConfig::new("mongodb://localhost/shop").with_prefix("billing")?;
    /// # Ok::<(), outbox_mongo::Error>(())
    /// ```
    pub fn with_prefix(mut self, prefix: &str) -> Result<Self> {
        self.prefix = Identifier::new(prefix)?;
        Ok(self)
    }

    /// Whether the fields make sense together.
    pub(crate) fn check(&self) -> Result<()> {
        self.prefix.check_prefix()?;
        if self.limits.max_message_bytes > MOST_BYTES {
            let text = "max_message_bytes must be at most 15728640: a document has at most 16 MiB";
            return Err(Error::new(ErrorKind::Invalid, CONFIGURE, text)
                .with("max_message_bytes", self.limits.max_message_bytes));
        }
        // So many scans of an index the server merges in order; of more it would sort the whole backlog.
        if self.shards > MOST_SHARDS {
            let text = "shards must be 1 to 200";
            return Err(Error::new(ErrorKind::Invalid, CONFIGURE, text).with("shards", self.shards));
        }
        let spans = [
            ("statement_timeout", self.statement_timeout),
            ("connect_timeout", self.connect_timeout),
        ];
        check_store(self.shards, self.max_connections, &spans)
    }

    /// The URL as the driver reads it, and the database that it names.
    fn read_url(&self) -> Result<(ConnectionString, String)> {
        let url = self.url.expose_secret();
        let invalid = |text: &'static str| Error::new(ErrorKind::Invalid, CONFIGURE, text);
        if url.is_empty() {
            return Err(invalid(
                "url is missing, expected mongodb://user:password@host:port/database",
            ));
        }
        if !url.starts_with("mongodb://") && !url.starts_with("mongodb+srv://") {
            return Err(invalid(
                "url must begin with mongodb:// or mongodb+srv://, expected mongodb://user:password@host:port/database",
            ));
        }
        // What the parser says may hold a part of the URL, and with it the password.
        let read = ConnectionString::parse(url).map_err(|_| {
            invalid(
                "url cannot be read, expected mongodb://user:password@host:port/database?replicaSet=rs0; are special \
                 characters of the password percent-encoded?",
            )
        })?;
        let Some(database) = read.default_database.clone() else {
            return Err(invalid(
                "url names no database, expected mongodb://user:password@host:port/database",
            ));
        };
        Ok((read, database))
    }

    /// The database of the outbox.
    pub(crate) fn database(&self) -> Result<String> {
        Ok(self.read_url()?.1)
    }

    /// How to connect: to the primary, with a majority's word for what is read and written, and with TLS as the address
    /// deserves it.
    pub(crate) async fn options(&self) -> Result<ClientOptions> {
        let (mut read, _) = self.read_url()?;
        read.tls = self.tls(&read);
        let parsing = async {
            ClientOptions::parse(read).await.map_err(|_| {
                Error::new(
                    ErrorKind::Unavailable,
                    CONFIGURE,
                    "the servers behind the url cannot be found: does its name have the DNS records of mongodb+srv://, \
                     are its options right?",
                )
                .with("url", self.describe())
            })
        };
        let mut options = within(self.connect_timeout, CONFIGURE, parsing).await?;
        options.app_name.get_or_insert_with(|| "outbox".to_owned());
        options.read_concern = Some(ReadConcern::majority());
        options.write_concern = Some(WriteConcern::majority());
        options.selection_criteria = Some(SelectionCriteria::ReadPreference(ReadPreference::Primary));
        options.retry_reads = Some(true);
        options.retry_writes = Some(true);
        options.connect_timeout = Some(self.connect_timeout);
        options.server_selection_timeout = Some(self.connect_timeout);
        options.max_pool_size = Some(self.max_connections);
        Ok(options)
    }

    /// Plain text to another machine only when the URL says so.
    fn tls(&self, read: &ConnectionString) -> Option<Tls> {
        let local = match &read.host_info {
            HostInfo::HostIdentifiers(hosts) => hosts.iter().all(|host| match host {
                ServerAddress::Tcp { host, .. } => is_loopback(host),
                _ => true,
            }),
            _ => false,
        };
        match &read.tls {
            None if !local => Some(Tls::Enabled(TlsOptions::default())),
            Some(Tls::Disabled) if !local => {
                tracing::warn!(
                    database = self.describe(),
                    "the connection to the database is in plain text, as tls=false asks"
                );
                Some(Tls::Disabled)
            }
            Some(Tls::Enabled(tls)) => {
                if tls.allow_invalid_certificates == Some(true) {
                    tracing::warn!(
                        database = self.describe(),
                        "the server is not verified, as the url asks"
                    );
                }
                Some(Tls::Enabled(tls.clone()))
            }
            other => other.clone(),
        }
    }

    /// Where it is, for errors: never with the password.
    pub(crate) fn place(&self) -> String {
        self.prefix.to_string()
    }

    /// Hosts and database, for people: nothing that is secret.
    ///
    /// ```
    /// let config = outbox_mongo::MongoConfig::new("mongodb://app:secret@localhost/shop");
    /// assert_eq!(config.describe(), "mongodb://localhost:27017/shop");
    /// ```
    #[must_use]
    pub fn describe(&self) -> String {
        format!("{:?}", Described(self))
    }
}

impl Default for MongoConfig {
    fn default() -> Self {
        Self {
            url: SecretString::from(String::new()),
            prefix: Identifier::default(),
            ordering: Ordering::default(),
            shards: 64,
            archive: false,
            archive_ttl: Duration::ZERO,
            change_stream: false,
            statement_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            max_connections: 6,
            limits: Limits::default(),
        }
    }
}

/// Everything but the password.
impl fmt::Debug for MongoConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoConfig")
            .field("url", &Described(self))
            .field("prefix", &self.prefix.as_str())
            .field("ordering", &self.ordering)
            .field("shards", &self.shards)
            .field("archive", &self.archive)
            .field("archive_ttl", &self.archive_ttl)
            .field("change_stream", &self.change_stream)
            .field("statement_timeout", &self.statement_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("max_connections", &self.max_connections)
            .field("limits", &self.limits)
            .finish()
    }
}

/// Hosts and database of the URL, which may be shown: no user, no password, no options.
struct Described<'c>(&'c MongoConfig);

impl fmt::Debug for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ok((read, database)) = self.0.read_url() else {
            return f.write_str("(not a URL)");
        };
        match read.host_info {
            HostInfo::HostIdentifiers(hosts) => {
                f.write_str("mongodb://")?;
                for (index, host) in hosts.iter().enumerate() {
                    let comma = if index == 0 { "" } else { "," };
                    match host {
                        ServerAddress::Tcp { host, port } => {
                            write!(f, "{comma}{host}:{}", port.unwrap_or(27_017))?;
                        }
                        other => write!(f, "{comma}{other}")?,
                    }
                }
            }
            HostInfo::DnsRecord(name) => write!(f, "mongodb+srv://{name}")?,
            _ => f.write_str("mongodb://")?,
        }
        write!(f, "/{database}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tls(url: &str) -> Option<Tls> {
        MongoConfig::new(url).options().await.unwrap().tls
    }

    #[test]
    fn the_file_form_is_strict() {
        let config: MongoConfig = serde_json::from_str(
            r#"{"url": "mongodb://localhost/a", "prefix": "x", "ordering": "sequenced", "statement_timeout": "250ms"}"#,
        )
        .unwrap();
        assert_eq!(config.statement_timeout, Duration::from_millis(250));
        for wrong in [r#"{"ulr": "a"}"#, r#"{"prefix": "a-b"}"#, r#"{"schema": "a"}"#] {
            assert!(serde_json::from_str::<MongoConfig>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn values_out_of_range_are_named() {
        let base = || MongoConfig::new("mongodb://localhost/a");
        let large = Limits {
            max_message_bytes: MOST_BYTES + 1,
            ..Limits::default()
        };
        for (config, field) in [
            (MongoConfig { shards: 0, ..base() }, "shards"),
            (
                MongoConfig {
                    shards: 201,
                    ..base()
                },
                "shards",
            ),
            (
                MongoConfig {
                    max_connections: 1,
                    ..base()
                },
                "max_connections",
            ),
            (
                MongoConfig {
                    statement_timeout: Duration::ZERO,
                    ..base()
                },
                "statement_timeout",
            ),
            (
                MongoConfig {
                    limits: large,
                    ..base()
                },
                "max_message_bytes",
            ),
        ] {
            let error = config.check().unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
    }

    #[tokio::test]
    async fn another_machine_is_verified_unless_told_otherwise() {
        let Some(Tls::Enabled(options)) = tls("mongodb://db.example/a").await else {
            panic!("plain text to another machine");
        };
        assert_ne!(options.allow_invalid_certificates, Some(true));
        let mixed = tls("mongodb://localhost,db.example/a?replicaSet=rs").await;
        assert!(matches!(mixed, Some(Tls::Enabled(_))));
        let open = tls("mongodb://db.example/a?tls=false").await;
        assert!(matches!(open, Some(Tls::Disabled)));
        for local in ["localhost", "127.0.0.1", "[::1]"] {
            assert!(tls(&format!("mongodb://{local}/a")).await.is_none(), "{local}");
        }
    }

    #[tokio::test]
    async fn what_the_promise_rests_on_cannot_be_turned_off_by_the_url() {
        let url =
            "mongodb://localhost/a?readPreference=secondary&w=1&retryWrites=false&readConcernLevel=local";
        let options = MongoConfig::new(url).options().await.unwrap();
        assert_eq!(options.write_concern, Some(WriteConcern::majority()));
        assert_eq!(options.read_concern, Some(ReadConcern::majority()));
        assert_eq!(options.retry_writes, Some(true));
        let primary = SelectionCriteria::ReadPreference(ReadPreference::Primary);
        assert_eq!(options.selection_criteria, Some(primary));
    }

    #[tokio::test]
    async fn no_secret_is_told() {
        for url in [
            "mongodb://app:canary@db.example/shop",
            "mongodb://app:can%61ry@db.example/shop",
            "mongodb://app:canary@db.example:notaport/shop",
            "mongodb://app:canary@db.example/",
            "postgres://app:canary@db.example/shop",
            "mongodb://db.example/shop?password=canary",
        ] {
            let config = MongoConfig::new(url);
            let mut told = format!("{config:?} {}", config.describe());
            if let Err(error) = config.options().await {
                told += &format!("{error} {error:?} {error:#?}");
            }
            assert!(!told.contains("canary") && !told.contains("can%61ry"), "{told}");
        }
    }
}
