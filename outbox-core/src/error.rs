//! The one error type of the framework.
//!
//! A kind says what to do about it, an operation and a context say what failed on what, and the source is kept.
//! Nothing in an [`Error`] may hold a secret or a payload: what goes in is printed.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;

/// The result of the framework's operations.
///
/// ```
/// use outbox_core::{Message, Result};
///
/// fn cancelled(order: &str) -> Result<Message> {
///     Message::builder("orders").key(order.to_owned()).payload("cancelled").build()
/// }
/// # cancelled("42").unwrap();
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What to do about an [`Error`].
///
/// ```
/// use outbox_core::{Error, ErrorKind};
///
/// fn advice(error: &Error) -> &'static str {
///     match error.kind() {
///         ErrorKind::Schema => "run `outbox migrate`",
///         ErrorKind::Denied => "look at the credentials",
///         _ if error.is_retryable() => "try again",
///         _ => "see the message",
///     }
/// }
/// assert_eq!(advice(&Error::new(ErrorKind::Conflict, "enqueue", "database is locked")), "try again");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The message, argument or configuration is wrong: correct it. Repeating it fails again.
    Invalid,
    /// The database or broker cannot be reached, timed out or was cut off: try again later.
    Unavailable,
    /// Lost a race with another session (deadlock, serialization failure, busy): try again at once.
    Conflict,
    /// The database or broker refused who we are or what we may: correct credentials or grants.
    Denied,
    /// The schema is missing, too old, too new or altered: run the migration of this version.
    Schema,
    /// This store, sink or server cannot do that: choose another option, see the message.
    Unsupported,
    /// What is stored cannot be understood: inspect it by hand.
    Corrupt,
    /// None of the above; very likely a defect worth reporting.
    Unexpected,
}

impl ErrorKind {
    /// The kind in words, as it stands in messages.
    ///
    /// ```
    /// assert_eq!(outbox_core::ErrorKind::Unavailable.as_str(), "unavailable");
    /// ```
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Unavailable => "unavailable",
            Self::Conflict => "conflict",
            Self::Denied => "denied",
            Self::Schema => "schema",
            Self::Unsupported => "unsupported",
            Self::Corrupt => "corrupt",
            Self::Unexpected => "unexpected",
        }
    }
}

/// What failed, on what, and why.
///
/// `Display` is one line; `{:?}` is a small report with the context and the chain of sources.
///
/// ```
/// use outbox_core::{Error, ErrorKind};
///
/// let error = Error::new(ErrorKind::Invalid, "build message", "a topic may not be empty").with("topic", "");
/// assert_eq!(error.to_string(), "build message: a topic may not be empty (topic: \"\")");
/// assert!(!error.is_retryable());
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    operation: &'static str,
    message: Cow<'static, str>,
    context: Vec<(&'static str, String)>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind` while doing `operation` ("enqueue", "fetch"), with what went wrong in words.
    #[must_use]
    pub fn new(kind: ErrorKind, operation: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            operation,
            message: message.into(),
            context: Vec::new(),
            source: None,
        }))
    }

    /// Adds a fact: on what it failed (a topic, a shard, a path), never a secret or a payload.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.0.context.push((name, value.to_string()));
        self
    }

    /// Keeps the error that this one came from.
    ///
    /// ```
    /// use std::error::Error as _;
    /// use outbox_core::{Error, ErrorKind};
    ///
    /// let cut = std::io::Error::other("connection reset");
    /// let error = Error::new(ErrorKind::Unavailable, "fetch", "the database does not answer").with_source(cut);
    /// assert_eq!(error.source().unwrap().to_string(), "connection reset");
    /// ```
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What to do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was being done.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// The facts added by [`Error::with`], in order.
    ///
    /// ```
    /// use outbox_core::{Error, ErrorKind};
    ///
    /// let error = Error::new(ErrorKind::Schema, "open", "there is no outbox").with("path", "app.db");
    /// assert_eq!(error.context().collect::<Vec<_>>(), [("path", "app.db")]);
    /// ```
    pub fn context(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.context.iter().map(|(name, value)| (*name, value.as_str()))
    }

    /// Whether the same call may succeed when it is repeated unchanged.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self.0.kind, ErrorKind::Unavailable | ErrorKind::Conflict)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.operation, self.0.message)?;
        for (index, (name, value)) in self.0.context.iter().enumerate() {
            write!(f, "{}{name}: {value:?}", if index == 0 { " (" } else { ", " })?;
        }
        if !self.0.context.is_empty() {
            f.write_str(")")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self, self.0.kind.as_str())?;
        let mut source = self.source();
        while let Some(cause) = source {
            write!(f, "\n  caused by: {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0
            .source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_is_a_report_with_the_chain_of_sources() {
        let error = Error::new(ErrorKind::Unavailable, "fetch", "the database does not answer")
            .with("shard", 7)
            .with_source(std::io::Error::other("connection reset"));
        assert_eq!(
            format!("{error:?}"),
            "fetch: the database does not answer (shard: \"7\") [unavailable]\n  caused by: connection reset"
        );
        assert!(error.is_retryable());
    }
}
