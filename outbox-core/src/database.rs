//! What stores in databases have in common: what migrating did, which roles there are, what their configurations check.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// What migrating an outbox did.
///
/// ```
/// use outbox_core::Migrated;
///
/// fn says(migrated: Migrated) -> String {
///     match migrated.from {
///         None => format!("made at version {}", migrated.to),
///         Some(from) if from == migrated.to => format!("is at version {from} already"),
///         Some(from) => format!("brought from version {from} to {}", migrated.to),
///     }
/// }
/// assert_eq!(says(Migrated { from: None, to: 1 }), "made at version 1");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Migrated {
    /// The version that was found; none where there was no outbox.
    pub from: Option<i64>,
    /// The version that is there now.
    pub to: i64,
}

/// What an account of the database may do.
///
/// ```
/// assert_ne!(outbox_core::Role::Produce, outbox_core::Role::Relay);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Enqueue messages, and note in the inbox what was handled.
    Produce,
    /// Run a relay, and operate the outbox.
    Relay,
}

const CONFIGURE: &str = "configure";
const MAX_SHARDS: u16 = 1_024;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Checks what a store in a database is configured with: 1 to 1,024 shards, at least two connections, and spans of 100 ms
/// to a day, each with its name.
///
/// # Errors
/// [`ErrorKind::Invalid`], which names what is wrong.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::check_store;
///
/// check_store(64, 6, &[("statement_timeout", Duration::from_secs(30))])?;
/// let error = check_store(64, 6, &[("statement_timeout", Duration::ZERO)]).unwrap_err();
/// assert!(error.to_string().contains("statement_timeout must be 100ms to 1day"));
/// # Ok::<(), outbox_core::Error>(())
/// ```
pub fn check_store(shards: u16, max_connections: u32, spans: &[(&'static str, Duration)]) -> Result<()> {
    let invalid = |text: String| Error::new(ErrorKind::Invalid, CONFIGURE, text);
    if !(1..=MAX_SHARDS).contains(&shards) {
        return Err(invalid("shards must be 1 to 1024".to_owned()).with("shards", shards));
    }
    if max_connections < 2 {
        let text = "max_connections must be at least 2: settlements must not wait for leases";
        return Err(invalid(text.to_owned()).with("max_connections", max_connections));
    }
    for (name, span) in spans {
        if *span < Duration::from_millis(100) || *span > DAY {
            return Err(invalid(format!("{name} must be 100ms to 1day")).with(name, format!("{span:?}")));
        }
    }
    Ok(())
}

/// Whether a host is this machine, so that a connection to it needs no TLS: `localhost`, or an address that loops back.
///
/// ```
/// use outbox_core::is_loopback;
///
/// assert!(is_loopback("localhost") && is_loopback("127.0.0.1") && is_loopback("[::1]"));
/// assert!(!is_loopback("db.example") && !is_loopback("10.0.0.1"));
/// ```
#[must_use]
pub fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}
