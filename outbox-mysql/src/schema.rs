//! Making the tables, and checking that they are what this version works with.

use std::collections::BTreeMap;

use outbox_core::{Error, ErrorKind, Identifier, Migrated, Result, Role};

use crate::config::MysqlConfig;
use crate::error::During;
use crate::row::{flag, number, text};
use crate::session::{Session, Sessions};
use crate::sql::{self, META, Sql, VERSION};

const DURING: &str = "migrate";
const CHECK: &str = "check schema";

/// Makes the outbox, or brings it to this version; changes nothing where it is already. The database must be there.
///
/// Safe to run from several processes at once, and beside running relays and producers. These servers have no
/// transactions over tables: what was interrupted half-way is finished by the next call.
///
/// # Errors
/// [`ErrorKind::Schema`] when the outbox is of a newer version, was made with another ordering, or a table of that name
/// exists that is none of ours; others as the server gives them.
///
/// ```no_run
/// # async fn example() -> outbox_mysql::Result<()> {
/// use outbox_mysql::{MysqlConfig, migrate};
///
/// let config = MysqlConfig::new("mysql://owner:secret@db.example/shop");
/// assert_eq!(migrate(&config).await?.to, 1);
/// # Ok(())
/// # }
/// ```
pub async fn migrate(config: &MysqlConfig) -> Result<Migrated> {
    config.check()?;
    let (sessions, sql) = (Sessions::new(config, 2)?, Sql::new(config));
    let mut session = sessions.open(DURING).await?;
    server(&mut session).await?;
    // Of two that migrate at the same time the second waits, and then finds nothing to do.
    let patience = config.statement_timeout.as_secs().max(1);
    let locked = session.run(sql.lock(patience)).await?;
    if !flag(locked.row(0).during(DURING)?, 0).during(DURING)? {
        return Err(Error::new(
            ErrorKind::Unavailable,
            DURING,
            "another process has been migrating this outbox for too long",
        )
        .with("outbox", config.place()));
    }
    // Where it fails the connection is closed, and the lock gone with it.
    let from = make(&mut session, config, &sql).await?;
    session.run(sql.unlock()).await?;
    session.finish();
    check(&sessions, config, &sql).await?;
    Ok(Migrated { from, to: VERSION })
}

/// Makes what is not there; says which version was.
async fn make(session: &mut Session, config: &MysqlConfig, sql: &Sql) -> Result<Option<i64>> {
    let mut facts = Facts::read(session, config, sql).await?;
    if facts.is_none() {
        let taken = session.run(sql.tables()).await?;
        if let Some(row) = taken.rows(0).first() {
            let name = text(row, 0).during(DURING)?.unwrap_or_default();
            return Err(Error::new(
                ErrorKind::Schema,
                DURING,
                "a table or procedure of such a name exists that is none of ours: choose another prefix",
            )
            .with("name", name));
        }
    }
    if facts
        .as_ref()
        .is_none_or(|facts| !facts.0.contains_key("version"))
    {
        session.run(sql.found(config)).await?;
        facts = Facts::read(session, config, sql).await?;
    }
    // What is half-made goes on as it was begun.
    let facts = facts.unwrap_or_default();
    let version = facts.version()?;
    if version.is_none() {
        let begun = MysqlConfig {
            shards: facts.shards(config)?,
            ..config.clone()
        };
        facts.check_ordering(config)?;
        session.run(sql::tables(&begun)).await?;
        session.run(sql.made()).await?;
    }
    Ok(version)
}

/// The statements that make this outbox in an empty place, for teams with migrations of their own, as the server's own
/// shell takes them.
///
/// ```
/// let sql = outbox_mysql::migration_sql(&outbox_mysql::MysqlConfig::default());
/// assert!(sql.contains("CREATE TABLE IF NOT EXISTS `outbox`"));
/// ```
#[must_use]
pub fn migration_sql(config: &MysqlConfig) -> String {
    sql::migration(config)
}

/// The statements that grant an account, of any host, what it needs and no more, to be run by the outbox's owner in the
/// outbox's database. The third role is the owner, who migrates.
///
/// ```
/// use outbox_mysql::{Identifier, MysqlConfig, Role, grant_sql};
///
/// let sql = grant_sql(&MysqlConfig::default(), Role::Produce, &Identifier::new("shop_app")?);
/// assert!(sql.contains("TO 'shop_app'@'%'"));
/// # Ok::<(), outbox_mysql::Error>(())
/// ```
#[must_use]
pub fn grant_sql(config: &MysqlConfig, role: Role, account: &Identifier) -> String {
    sql::grants(config, account, role == Role::Relay)
}

/// Whether the outbox is there, of this version and ordering. Says how many shards it has.
pub(crate) async fn check(sessions: &Sessions, config: &MysqlConfig, sql: &Sql) -> Result<u16> {
    let mut session = sessions.open(CHECK).await?;
    server(&mut session).await?;
    let facts = Facts::read(&mut session, config, sql).await?.unwrap_or_default();
    session.finish();
    if facts.version()? != Some(VERSION) {
        return Err(Error::new(
            ErrorKind::Schema,
            CHECK,
            "there is no outbox of this name: run migrate",
        )
        .with("outbox", config.place()));
    }
    facts.check_ordering(config)?;
    facts.shards(config)
}

/// Whether this server can be used at all.
async fn server(session: &mut Session) -> Result<()> {
    let told = session.run(sql::SERVER.to_owned()).await?;
    let row = told.row(0).during(CHECK)?;
    let version = text(row, 0).during(CHECK)?.unwrap_or_default();
    if !is_supported(version) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            CHECK,
            "MySQL 8.0.19 or MariaDB 10.6, or newer, is needed",
        )
        .with("version", version));
    }
    if number(row, 1).during(CHECK)? != 0 {
        return Err(read_only(CHECK));
    }
    Ok(())
}

pub(crate) fn read_only(operation: &'static str) -> Error {
    Error::new(
        ErrorKind::Unavailable,
        operation,
        "the server is read only: is it a replica? Connect to the primary",
    )
}

/// Check constraints, `JSON_TABLE` and window functions: since when a server has them all.
fn is_supported(version: &str) -> bool {
    let numbers: Vec<u32> = version
        .split(|char: char| !char.is_ascii_digit())
        .map_while(|part| part.parse().ok())
        .take(3)
        .collect();
    if version.contains("MariaDB") {
        numbers >= vec![10, 6]
    } else {
        numbers >= vec![8, 0, 19]
    }
}

/// What was noted when the outbox was made.
#[derive(Debug, Default)]
struct Facts(BTreeMap<String, String>);

impl Facts {
    /// None where there is no outbox.
    async fn read(session: &mut Session, config: &MysqlConfig, sql: &Sql) -> Result<Option<Self>> {
        let tables = session.run(sql.tables()).await?;
        let meta = format!("{}{META}", config.prefix);
        let named = |row| Ok(text(row, 0)?.is_some_and(|name| name.eq_ignore_ascii_case(&meta)));
        let there = tables
            .rows(0)
            .iter()
            .map(named)
            .collect::<sqlx::Result<Vec<bool>>>();
        if !there.during(CHECK)?.contains(&true) {
            return Ok(None);
        }
        let told = session.run(sql.facts()).await?;
        let fact = |row| {
            Ok((
                text(row, 0)?.unwrap_or_default().to_owned(),
                text(row, 1)?.unwrap_or_default().to_owned(),
            ))
        };
        let facts = told.rows(0).iter().map(fact).collect::<sqlx::Result<_>>();
        facts.during(CHECK).map(|facts| Some(Self(facts)))
    }

    /// The version, which is not above ours; none where the outbox is not there, or half-made.
    fn version(&self) -> Result<Option<i64>> {
        let Some(stored) = self.0.get("version") else {
            return Ok(None);
        };
        match stored.parse() {
            Ok(version) if version <= VERSION => Ok(Some(version)),
            _ => Err(Error::new(
                ErrorKind::Schema,
                CHECK,
                "the outbox was made by a newer version of this crate: upgrade the program",
            )
            .with("found", stored)
            .with("known", VERSION)),
        }
    }

    fn check_ordering(&self, config: &MysqlConfig) -> Result<()> {
        let made = self.0.get("ordering").map(String::as_str).unwrap_or_default();
        let expected = sql::ordering(config.ordering);
        if made == expected {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Schema,
            CHECK,
            format!(
                "the outbox was made with the ordering \"{made}\" and is opened with \"{expected}\": configure the \
                 former, or make another outbox under a new prefix"
            ),
        )
        .with("outbox", config.place()))
    }

    fn shards(&self, config: &MysqlConfig) -> Result<u16> {
        let shards = self.0.get("shards").and_then(|text| text.parse().ok());
        shards.filter(|shards| *shards > 0).ok_or_else(|| {
            Error::new(
                ErrorKind::Schema,
                CHECK,
                "it is not told how many shards the outbox has: was it made by hand?",
            )
            .with("outbox", config.place())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::is_supported;

    #[test]
    fn old_servers_are_told_from_new_ones() {
        for version in [
            "8.0.19",
            "8.4.0-log",
            "9.7.4-2",
            "10.6.18-MariaDB",
            "10.11.6-MariaDB-0+deb12u1",
            "11.4.2-MariaDB",
        ] {
            assert!(is_supported(version), "{version}");
        }
        for version in ["5.7.44", "8.0.18", "10.5.23-MariaDB", "", "MariaDB"] {
            assert!(!is_supported(version), "{version}");
        }
    }
}
