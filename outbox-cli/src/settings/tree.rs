//! The configuration before it has a meaning: values from the file and the environment, each with where it stands.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::exit::{Code, Failure, Result};

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) origin: Origin,
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    /// Of the file: text only.
    Text(String),
    /// Of the environment: whatever the setting needs it to be.
    Raw(String),
    Integer(i64),
    Float(f64),
    Bool(bool),
    List(Vec<Node>),
    Table(BTreeMap<String, Node>),
}

/// Where a value stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    File {
        name: String,
        line: usize,
        column: usize,
    },
    Environment(String),
    /// Nowhere: what is missing, or was put together.
    None,
}

impl Node {
    /// The file with the environment's variables over it.
    pub(super) fn load(file: Option<&Path>, environment: Vec<(String, String)>) -> Result<Self> {
        let mut root = match file {
            Some(path) => Self::read(path)?,
            None => Self::empty(),
        };
        root.overlay_all(environment)?;
        Ok(root)
    }

    /// Puts the values of those variables in their places that are meant for us.
    pub(super) fn overlay_all(&mut self, environment: Vec<(String, String)>) -> Result<()> {
        for (name, value) in environment {
            if let Some(path) = variable_path(&name) {
                self.overlay(&path, &name, value)?;
            }
        }
        Ok(())
    }

    pub(super) fn empty() -> Self {
        Self {
            value: Value::Table(BTreeMap::new()),
            origin: Origin::None,
        }
    }

    fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::new(
                Code::Usage,
                format!("read configuration: {error} (file: {name:?})"),
            )
            .hint("`outbox config example` prints one to begin with")
        })?;
        Self::parse(&name, &text)
    }

    /// Errors show the place but never the line itself: it may hold a secret.
    pub(super) fn parse(name: &str, text: &str) -> Result<Self> {
        let file = File { name, text };
        let table = DeTable::parse(text).map_err(|error| {
            let place = file.origin(error.span().map_or(0, |span| span.start));
            Failure::new(
                Code::Usage,
                format!("read configuration: {place}: {}", error.message()),
            )
        })?;
        Ok(Self {
            value: Value::Table(file.table(table.into_inner())),
            origin: Origin::None,
        })
    }

    /// The table's entries; none for anything else.
    pub(super) fn entries(&mut self) -> Option<&mut BTreeMap<String, Self>> {
        match &mut self.value {
            Value::Table(entries) => Some(entries),
            _ => None,
        }
    }

    /// Takes an entry out of a table.
    pub(super) fn take(&mut self, name: &str) -> Option<Self> {
        self.entries()?.remove(name)
    }

    /// An entry of a table.
    pub(super) fn get(&self, name: &str) -> Option<&Self> {
        match &self.value {
            Value::Table(entries) => entries.get(name),
            _ => None,
        }
    }

    /// Where the entry at this path stands.
    pub(super) fn origin_of(&self, path: &[&str]) -> Origin {
        let mut node = self;
        for name in path {
            match &node.value {
                Value::Table(entries) if entries.contains_key(*name) => node = &entries[*name],
                _ => return Origin::None,
            }
        }
        node.origin.clone()
    }

    /// The text without any value of this tree that it may contain.
    pub(super) fn without_values(&self, text: String) -> String {
        // Shorter ones are no secrets, and might be parts of words.
        const SHORTEST: usize = 4;
        match &self.value {
            Value::Text(value) | Value::Raw(value) if value.len() >= SHORTEST => text.replace(value, "***"),
            Value::List(items) => items.iter().fold(text, |text, item| item.without_values(text)),
            Value::Table(entries) => entries
                .values()
                .fold(text, |text, entry| entry.without_values(text)),
            _ => text,
        }
    }

    /// Puts a variable's value in its place.
    fn overlay(&mut self, path: &[String], variable: &str, value: String) -> Result<()> {
        let origin = Origin::Environment(variable.to_owned());
        let Some((last, tables)) = path.split_last() else {
            return Ok(());
        };
        let mut node = self;
        for name in tables {
            let Some(entries) = node.entries() else {
                return Err(Failure::new(
                    Code::Usage,
                    format!("read configuration: {variable}: {} has no fields", path.join(".")),
                ));
            };
            node = entries.entry(name.clone()).or_insert_with(|| Self {
                value: Value::Table(BTreeMap::new()),
                origin: origin.clone(),
            });
        }
        // The options of the file are flat by then, see `flatten`, so that one name is one entry.
        if tables.last().is_some_and(|table| table.starts_with("options")) {
            node.flatten();
        }
        let node = match node.entries() {
            Some(entries) => entries,
            None => {
                return Err(Failure::new(
                    Code::Usage,
                    format!(
                        "read configuration: {variable}: {} has no fields",
                        tables.join(".")
                    ),
                ));
            }
        };
        node.insert(
            last.clone(),
            Self {
                value: Value::Raw(value),
                origin,
            },
        );
        Ok(())
    }

    /// Joins the names of nested tables with dots: an unquoted `sasl.password = …` is a table in TOML.
    pub(super) fn flatten(&mut self) {
        let Some(entries) = self.entries() else { return };
        let mut flat = BTreeMap::new();
        for (name, mut node) in std::mem::take(entries) {
            node.flatten();
            match node.value {
                Value::Table(inner) => {
                    for (rest, node) in inner {
                        flat.insert(format!("{name}.{rest}"), node);
                    }
                }
                _ => {
                    flat.insert(name, node);
                }
            }
        }
        *entries = flat;
    }
}

/// Variables with two underscores in a row are ours, so that a misspelt one is refused like any unknown setting:
/// `OUTBOX_RELAY__RETRY__MAX` is `relay.retry.max`; in the options of a sink, whose names have dots and never
/// underscores, `OUTBOX_SINK__OPTIONS__SASL_PASSWORD` is `sasl.password`.
fn variable_path(variable: &str) -> Option<Vec<String>> {
    let mut path: Vec<String> = variable
        .strip_prefix("OUTBOX_")?
        .split("__")
        .map(str::to_ascii_lowercase)
        .collect();
    if path.len() < 2 {
        return None;
    }
    if path[0] == "sink" && path[1].starts_with("options") && path.len() > 2 {
        let option = path.split_off(2).join("_").replace('_', ".");
        path.push(option);
    }
    Some(path)
}

struct File<'a> {
    name: &'a str,
    text: &'a str,
}

impl File<'_> {
    fn origin(&self, at: usize) -> Origin {
        let before = self.text.get(..at).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Origin::File {
            name: self.name.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }

    fn table(&self, table: DeTable<'_>) -> BTreeMap<String, Node> {
        table
            .into_iter()
            .map(|(key, value)| {
                let origin = self.origin(key.span().start);
                (key.into_inner().into_owned(), self.node(value, origin))
            })
            .collect()
    }

    fn node(&self, value: Spanned<DeValue<'_>>, origin: Origin) -> Node {
        let value = match value.into_inner() {
            DeValue::String(text) => Value::Text(text.into_owned()),
            DeValue::Integer(integer) => {
                i64::from_str_radix(&integer.as_str().replace('_', ""), integer.radix())
                    .map_or_else(|_| Value::Text(integer.as_str().to_owned()), Value::Integer)
            }
            DeValue::Float(float) => float
                .as_str()
                .replace('_', "")
                .parse()
                .map_or_else(|_| Value::Text(float.as_str().to_owned()), Value::Float),
            DeValue::Boolean(flag) => Value::Bool(flag),
            DeValue::Datetime(time) => Value::Text(time.to_string()),
            DeValue::Array(items) => Value::List(
                items
                    .into_iter()
                    .map(|item| {
                        let origin = self.origin(item.span().start);
                        self.node(item, origin)
                    })
                    .collect(),
            ),
            DeValue::Table(table) => Value::Table(self.table(table)),
        };
        Node { value, origin }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { name, line, column } => write!(f, "{name}:{line}:{column}"),
            Self::Environment(variable) => f.write_str(variable),
            Self::None => f.write_str("the configuration"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_name_fields_and_options() {
        let path = |name| variable_path(name).map(|path| path.join("/"));
        assert_eq!(path("OUTBOX_RELAY__LEASE").as_deref(), Some("relay/lease"));
        assert_eq!(
            path("OUTBOX_RELAY__RETRY__MAX").as_deref(),
            Some("relay/retry/max")
        );
        assert_eq!(
            path("OUTBOX_SINK__OPTIONS__SASL_PASSWORD").as_deref(),
            Some("sink/options/sasl.password")
        );
        assert_eq!(
            path("OUTBOX_SINK__OPTIONS_FROM_FILE__SSL_KEY_PEM").as_deref(),
            Some("sink/options_from_file/ssl.key.pem")
        );
        for other in [
            "OUTBOX_CONFIG",
            "OUTBOX_TEST_KAFKA",
            "OUTBOX_STORE",
            "RELAY__LEASE",
        ] {
            assert_eq!(path(other), None, "{other}");
        }
    }

    #[test]
    fn places_are_lines_and_columns_counted_from_one() {
        let tree = Node::parse("a.toml", "[store]\n  type = 'ö'\n[relay]\n").unwrap();
        assert_eq!(tree.origin_of(&["store", "type"]).to_string(), "a.toml:2:3");
    }

    #[test]
    fn a_broken_line_is_not_shown() {
        let failure = Node::parse("a.toml", "[sink.options]\n\"sasl.password\" = \"canary\n").unwrap_err();
        assert!(
            failure.line.starts_with("read configuration: a.toml:2:"),
            "{}",
            failure.line
        );
        assert!(!failure.line.contains("canary"), "{}", failure.line);
    }
}
