//! The configuration: a TOML file with the environment over it.
//!
//! [`tree`] reads both into values that know where they stand, [`de`] gives them their meaning. Unknown settings are
//! refused, and every complaint names the setting and its place. Values of the sink and the store's `url` are never
//! shown, because any of them may be, or be put in the place of, a secret.

mod de;
mod store;
mod tree;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use outbox::kafka::{KafkaConfig, KafkaSink};
use outbox::{RelayConfig, RelayId, Sink};
use serde::de::DeserializeOwned;

use self::de::Problem;
pub(crate) use self::store::{Migration, RoleKind, StoreSettings};
use self::tree::{Node, Origin, Value};
use crate::args::ExampleStore;
use crate::exit::{Code, Failure, Result};
use crate::stdout_sink::{Gone, StdoutSink};

/// An example with every setting and its default, for a store.
pub(crate) fn example(store: ExampleStore) -> String {
    let store = match store {
        ExampleStore::Sqlite => include_str!("example/sqlite.toml"),
        ExampleStore::Postgres => include_str!("example/postgres.toml"),
        ExampleStore::Mysql => include_str!("example/mysql.toml"),
        ExampleStore::Mongo => include_str!("example/mongo.toml"),
    };
    [
        include_str!("example/head.toml"),
        store,
        include_str!("example/sink_and_relay.toml"),
    ]
    .concat()
}

/// All settings, checked as far as that needs no connection.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) store: StoreSettings,
    /// None when no sink is configured, which only the relay minds.
    pub(crate) sink: Option<SinkSettings>,
    pub(crate) relay: RelaySettings,
}

/// `[sink]`
#[derive(Debug)]
pub(crate) enum SinkSettings {
    Kafka {
        config: KafkaConfig,
        /// Options whose values stand in files: passwords and keys, as orchestrators mount them.
        options_from_file: BTreeMap<String, PathBuf>,
    },
    Stdout,
}

/// `[relay]`
#[derive(Debug)]
pub(crate) struct RelaySettings {
    /// How the relay's id begins.
    pub(crate) name: String,
    /// Where metrics and health are served; nowhere unless told.
    pub(crate) listen: Option<String>,
    /// Whether others may reach that.
    pub(crate) listen_public: bool,
    pub(crate) config: RelayConfig,
}

impl Settings {
    /// Reads the file, if there is one, and the process's environment.
    pub(crate) fn load(file: Option<&Path>) -> Result<Self> {
        let mut environment = Vec::new();
        for (name, value) in std::env::vars_os() {
            let Ok(name) = name.into_string() else { continue };
            if !name.starts_with("OUTBOX_") {
                continue;
            }
            match value.into_string() {
                Ok(value) => environment.push((name, value)),
                Err(_) => return Err(wrong(format!("{name}: the value is not UTF-8"))),
            }
        }
        // So that the same environment is always read in the same order.
        environment.sort();
        Self::read(Node::load(file, environment)?)
    }

    fn read(mut root: Node) -> Result<Self> {
        let places = root.clone();
        let mut section = |name: &str| root.take(name);
        let (store, sink, relay) = (section("store"), section("sink"), section("relay"));
        if let Some((unknown, node)) = root.entries().and_then(|rest| rest.pop_first()) {
            return Err(wrong(format!(
                "{}: unknown section `{unknown}`, expected store, sink or relay",
                node.origin
            )));
        }
        let store = store.ok_or_else(|| {
            wrong("there is no store".to_owned())
                .hint("give --config FILE, or set OUTBOX_STORE__TYPE; `outbox config example` prints a file to begin with")
        })?;
        Ok(Self {
            store: StoreSettings::read(store)?,
            sink: sink.map(SinkSettings::read).transpose()?,
            relay: RelaySettings::read(relay.unwrap_or_else(Node::empty), &places)?,
        })
    }
}

impl SinkSettings {
    fn read(mut node: Node) -> Result<Self> {
        match take_type("sink", &mut node, "kafka or stdout")?.as_str() {
            "kafka" => Self::read_kafka(node),
            "stdout" => {
                if let Some((name, node)) = node.entries().and_then(|rest| rest.pop_first()) {
                    return Err(wrong(format!(
                        "{}: unknown field `sink.{name}`: the sink stdout has none",
                        node.origin
                    )));
                }
                Ok(Self::Stdout)
            }
            other => Err(unknown_type("sink", other, "kafka or stdout")),
        }
    }

    fn read_kafka(mut node: Node) -> Result<Self> {
        let mut files = node.take("options_from_file").unwrap_or_else(Node::empty);
        files.flatten();
        if let Some(options) = node.entries().and_then(|entries| entries.get_mut("options")) {
            options.flatten();
        }
        let places = node.clone();
        // Whoever wrote the error may have put a value into its text.
        let hide = |mut problem: Problem| {
            problem.text = places.without_values(problem.text);
            problem
        };
        let config: KafkaConfig = de::read(node).map_err(|problem| complain(hide(problem).within("sink")))?;
        let options_from_file: BTreeMap<String, PathBuf> = de::read(files.clone())
            .map_err(|problem| complain(problem.within("options_from_file").within("sink")))?;
        for name in options_from_file.keys() {
            if config.options.contains_key(name) {
                return Err(wrong(format!(
                    "{}: the option `{name}` is given twice, also at {}",
                    files.origin_of(&[name]),
                    places.origin_of(&["options", name]),
                )));
            }
        }
        // With the files' options it is checked again when the sink is made; whether a file can be read is no
        // concern of commands that only look at the store.
        if options_from_file.is_empty() {
            config.validate()?;
        }
        Ok(Self::Kafka {
            config,
            options_from_file,
        })
    }

    /// Makes the sink; `gone` is told when there is nobody left to write to.
    pub(crate) fn open(&self, gone: &Gone) -> Result<Box<dyn Sink>> {
        match self {
            Self::Kafka {
                config,
                options_from_file,
            } => {
                let mut config = config.clone();
                for (name, path) in options_from_file {
                    config.options.insert(
                        name.clone(),
                        read_secret(&format!("sink.options_from_file: {name}"), path)?,
                    );
                }
                Ok(Box::new(KafkaSink::new(&config)?))
            }
            Self::Stdout => Ok(Box::new(StdoutSink::open(gone.clone())?)),
        }
    }

    /// What it is, for people.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Kafka { config, .. } => format!("kafka {}", config.bootstrap_servers),
            Self::Stdout => "stdout".to_owned(),
        }
    }
}

impl RelaySettings {
    fn read(mut node: Node, places: &Node) -> Result<Self> {
        let name = match node.take("name") {
            Some(name) => de::read::<String>(name)
                .map_err(|problem| complain(problem.within("name").within("relay")))?,
            None => "relay".to_owned(),
        };
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || name.len() > 64 || !name.chars().all(legal) {
            return Err(wrong(format!(
                "{}: relay.name: expected 1 to 64 characters of [A-Za-z0-9._-] (value: {name:?})",
                places.origin_of(&["relay", "name"])
            )));
        }
        let listen = match node.take("listen") {
            Some(listen) => Some(Self::read_listen(listen)?),
            None => None,
        };
        let listen_public = match node.take("listen_public") {
            Some(public) => de::read(public)
                .map_err(|problem| complain(problem.within("listen_public").within("relay")))?,
            None => false,
        };
        let config: RelayConfig = read_section("relay", node)?;
        config.check().map_err(|error| {
            // The message begins with the field; its place is known here alone.
            let text = error.to_string();
            let field = text
                .strip_prefix("configure relay: ")
                .and_then(|text| text.split(' ').next())
                .unwrap_or_default();
            match places.origin_of(&["relay", field]) {
                Origin::None => Failure::from(error),
                origin => wrong(format!("{origin}: {text}")),
            }
        })?;
        Ok(Self {
            name,
            listen,
            listen_public,
            config,
        })
    }

    /// An address, or a port, which may be a number.
    fn read_listen(mut node: Node) -> Result<String> {
        if let Value::Integer(port) = node.value {
            node.value = Value::Text(port.to_string());
        }
        de::read(node).map_err(|problem| complain(problem.within("listen").within("relay")))
    }

    /// An id that no other relay has.
    pub(crate) fn id(&self) -> RelayId {
        RelayId::unique(&self.name)
    }
}

/// The section's `type`, taken out.
fn take_type(section: &str, node: &mut Node, expected: &str) -> Result<String> {
    let Some(kind) = node.take("type") else {
        return Err(wrong(format!("{section}.type is missing, expected {expected}")));
    };
    de::read(kind).map_err(|problem| complain(problem.within("type").within(section)))
}

fn unknown_type(section: &str, found: &str, expected: &str) -> Failure {
    // What is no plain word may be a URL that was put there by mistake, with its password.
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let shown = match found.len() <= 32 && found.chars().all(plain) {
        true => format!(" (value: {found:?})"),
        false => String::new(),
    };
    wrong(format!("{section}.type: expected {expected}{shown}"))
}

fn read_section<T: DeserializeOwned>(section: &str, node: Node) -> Result<T> {
    de::read(node).map_err(|problem| complain(problem.within(section)))
}

/// A problem as the user is told: place, setting, what is expected, and the value where no secret can be.
fn complain(problem: Problem) -> Failure {
    let Problem {
        path,
        origin,
        text,
        value,
    } = problem;
    let shown = value
        .filter(|_| !is_secret(&path))
        .map(|value| format!(" (value: {value})"))
        .unwrap_or_default();
    wrong(format!("{origin}: {}: {text}{shown}", path.join(".")))
}

/// Whether a value may be a secret: anything of a sink, and the URL of a store.
fn is_secret(path: &[String]) -> bool {
    match path {
        [section, ..] if section == "sink" => true,
        [section, field, ..] => section == "store" && field.starts_with("url"),
        _ => false,
    }
}

fn wrong(text: String) -> Failure {
    Failure::new(Code::Usage, format!("configuration: {text}"))
}

/// A secret as orchestrators mount it: the file's text without the newline at its end.
fn read_secret(setting: &str, path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        // Missing or unreadable is the same remedy: mount it. Its content is never shown.
        wrong(format!(
            "{setting}: {error} (file: {:?})",
            path.display().to_string()
        ))
    })?;
    Ok(text
        .strip_suffix('\n')
        .map(|text| text.strip_suffix('\r').unwrap_or(text))
        .unwrap_or(&text)
        .to_owned())
}

#[cfg(test)]
mod tests;
