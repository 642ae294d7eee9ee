//! Names that become part of a statement's text.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// A name of a schema, a table or a collection that is safe in a statement's text: `[A-Za-z_][A-Za-z0-9_]{0,62}`, not
/// beginning with `sqlite` or `pg_`, which databases keep for themselves. Stores quote it all the same, so that
/// reserved words work.
///
/// ```
/// use outbox_core::Identifier;
///
/// assert!(Identifier::new("billing_outbox").is_ok());
/// assert!(Identifier::new("x\"; DROP TABLE orders; --").is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Identifier(String);

impl Identifier {
    /// The longest name, in bytes: what the most frugal of the databases keeps whole.
    pub const MAX_BYTES: usize = 63;
    /// The longest prefix of a store's tables, in bytes: the longest of the suffixes still fits behind it.
    pub const MAX_PREFIX_BYTES: usize = 41;

    /// The name, checked.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the name and what is allowed.
    pub fn new(name: &str) -> Result<Self> {
        let mut bytes = name.bytes();
        let first = bytes
            .next()
            .is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
        let legal = first
            && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && name.len() <= Self::MAX_BYTES;
        let taken = ["sqlite", "pg_"].iter().any(|start| {
            name.get(..start.len())
                .is_some_and(|own| own.eq_ignore_ascii_case(start))
        });
        if !legal || taken {
            return Err(Error::new(
                ErrorKind::Invalid,
                "configure",
                "a name is [A-Za-z_][A-Za-z0-9_]{0,62} and does not begin with \"sqlite\" or \"pg_\"",
            )
            .with("name", shortened(name)));
        }
        Ok(Self(name.to_owned()))
    }

    /// Whether it can begin the names of a store's tables.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when it is longer than [`Identifier::MAX_PREFIX_BYTES`].
    ///
    /// # Example
    /// ```
    /// use outbox_core::Identifier;
    ///
    /// let name = Identifier::new(&"a".repeat(Identifier::MAX_BYTES))?;
    /// assert!(name.check_prefix().is_err()); // a table, but no prefix: no suffix would fit behind it
    /// # Ok::<(), outbox_core::Error>(())
    /// ```
    pub fn check_prefix(&self) -> Result<()> {
        if self.0.len() > Self::MAX_PREFIX_BYTES {
            return Err(Error::new(
                ErrorKind::Invalid,
                "configure",
                format!("prefix has at most {} characters", Self::MAX_PREFIX_BYTES),
            )
            .with("prefix", &self.0));
        }
        Ok(())
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn shortened(name: &str) -> String {
    let start: String = name.chars().take(Identifier::MAX_BYTES).collect();
    start.escape_debug().to_string()
}

/// `outbox`, the prefix unless another is chosen.
impl Default for Identifier {
    fn default() -> Self {
        Self("outbox".to_owned())
    }
}

impl FromStr for Identifier {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::new(name)
    }
}

impl TryFrom<String> for Identifier {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        Self::new(&name)
    }
}

impl From<Identifier> for String {
    fn from(name: Identifier) -> Self {
        name.0
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
