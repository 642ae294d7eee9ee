//! Making the schema, and checking that it is what this version works with.

use outbox_core::{Error, ErrorKind, Identifier, Migrated, Result, Role};

use crate::config::PostgresConfig;
use crate::error::During;
use crate::row::{flag, number, text};
use crate::session::{Session, Sessions, Settings};
use crate::sql::{self, Statement, VERSION};

const DURING: &str = "migrate";
const CHECK: &str = "check schema";

/// Makes the outbox, its schema included, or brings it to this version; changes nothing where it is already.
///
/// Safe to run from several processes at once, and beside running relays and producers.
///
/// # Errors
/// [`ErrorKind::Schema`] when the outbox is of a newer version, was made with another ordering, or a table of that name
/// exists that is none of ours; others as the server gives them.
///
/// ```no_run
/// # async fn example() -> outbox_postgres::Result<()> {
/// use outbox_postgres::{PostgresConfig, migrate};
///
/// let config = PostgresConfig::new("postgres://owner:secret@db.example/shop");
/// assert_eq!(migrate(&config).await?.to, 1);
/// # Ok(())
/// # }
/// ```
pub async fn migrate(config: &PostgresConfig) -> Result<Migrated> {
    config.check()?;
    let sessions = Sessions::new(config, Settings::durable(config), 2)?;
    let mut session = sessions.begin(DURING).await?;
    server(&mut session).await?;
    // Of two that migrate at the same time the second waits, and then finds nothing to do. Other outboxes of the same
    // schema wait as well: it may have to be made first.
    session
        .rows(sql::LOCK.query().bind(config.schema.as_str()))
        .await?;
    let from = version(&mut session, config).await?;
    if from.is_none() {
        let exists = session
            .row(sql::SCHEMA_EXISTS.query().bind(config.schema.as_str()))
            .await?;
        if !flag(&exists, 0).during(DURING)? {
            session.run(sql::create_schema(&config.schema)).await?;
        }
        session.run(sql::migration(config)).await?;
    }
    session.finish().await?;
    check(&sessions, config).await?;
    Ok(Migrated { from, to: VERSION })
}

/// The statements that make this outbox in an empty place, for teams with migrations of their own. To be run in one
/// transaction; the schema must be there.
///
/// ```
/// let sql = outbox_postgres::migration_sql(&outbox_postgres::PostgresConfig::default());
/// assert!(sql.contains("CREATE TABLE \"public\".\"outbox\""));
/// ```
#[must_use]
pub fn migration_sql(config: &PostgresConfig) -> String {
    sql::migration(config)
}

/// The statements that grant a role what it needs and no more, to be run by the outbox's owner. The third role is the
/// owner, who migrates.
///
/// ```
/// use outbox_postgres::{Identifier, PostgresConfig, Role, grant_sql};
///
/// let sql = grant_sql(&PostgresConfig::default(), Role::Produce, &Identifier::new("shop_app")?);
/// assert!(sql.contains("TO \"shop_app\""));
/// # Ok::<(), outbox_postgres::Error>(())
/// ```
#[must_use]
pub fn grant_sql(config: &PostgresConfig, role: Role, name: &Identifier) -> String {
    sql::grants(config, name, role == Role::Relay)
}

/// Whether the outbox is there, of this version and ordering, and what the relay rests on still holds. Says how many
/// shards it has.
pub(crate) async fn check(sessions: &Sessions, config: &PostgresConfig) -> Result<u16> {
    let schema = |text: String| Error::new(ErrorKind::Schema, CHECK, text).with("outbox", config.place());
    let mut session = sessions.open(CHECK).await?;
    server(&mut session).await?;
    if version(&mut session, config).await? != Some(VERSION) {
        return Err(schema("there is no outbox of this name: run migrate".into()));
    }
    let made = meta(&mut session, config, "ordering").await?;
    let expected = sql::ordering(config.ordering);
    if made.as_deref() != Some(expected) {
        return Err(schema(format!(
            "the outbox was made with the ordering \"{}\" and is opened with \"{expected}\": configure the former, or \
             make another outbox under a new prefix",
            made.unwrap_or_default(),
        )));
    }
    let shards = meta(&mut session, config, "shards").await?;
    let Some(shards) = shards
        .and_then(|text| text.parse().ok())
        .filter(|shards| *shards > 0)
    else {
        return Err(schema(
            "it is not told how many shards the outbox has: was it made by hand?".into(),
        ));
    };

    // Positions must be drawn one by one, upwards, for good, and after the transaction has its number.
    let sequence = session
        .rows(sql::SEQUENCE.query().bind(sql::sequence(config)))
        .await?;
    let intact = match sequence.first() {
        Some(row) => flag(row, 0).during(CHECK)?,
        None => false,
    };
    if !intact {
        return Err(schema(
            "the sequence of positions is missing or altered; it must have CACHE 1, INCREMENT 1 and NO CYCLE"
                .into(),
        ));
    }
    let default = session
        .rows(
            sql::POSITION_DEFAULT
                .query()
                .bind(sql::table(config))
                .bind(sql::sequence(config)),
        )
        .await?;
    let intact = match default.first() {
        Some(row) => flag(row, 0).during(CHECK)?,
        None => false,
    };
    if !intact {
        return Err(schema(
            "the default of the column id is altered: it must be the one that migrate made, or messages are lost".into(),
        ));
    }
    session.finish().await?;
    Ok(shards)
}

/// Whether this server can be used at all.
async fn server(session: &mut Session) -> Result<()> {
    let row = session.row(sql::SERVER.query()).await?;
    let version = number(&row, 0).during(CHECK)?;
    if version < 140_000 {
        return Err(
            Error::new(ErrorKind::Unsupported, CHECK, "PostgreSQL 14 or newer is needed")
                .with("server_version_num", version),
        );
    }
    let encoding = text(&row, 1).during(CHECK)?.unwrap_or_default();
    if encoding != "UTF8" {
        return Err(Error::new(
            ErrorKind::Unsupported,
            CHECK,
            "the database is not in UTF-8, and could not keep every text as it is",
        )
        .with("server_encoding", encoding));
    }
    if flag(&row, 2).during(CHECK)? {
        return Err(Error::new(
            ErrorKind::Unavailable,
            CHECK,
            "the server is a standby, or still recovering: connect to the primary",
        ));
    }
    Ok(())
}

/// The version that is there, which is not above ours.
async fn version(session: &mut Session, config: &PostgresConfig) -> Result<Option<i64>> {
    let exists = session
        .row(sql::TABLE_EXISTS.query().bind(sql::meta_table(config)))
        .await?;
    if !flag(&exists, 0).during(CHECK)? {
        return Ok(None);
    }
    let stored = meta(session, config, "version").await?;
    match stored.as_deref().and_then(|text| text.parse().ok()) {
        Some(version) if version <= VERSION => Ok(Some(version)),
        Some(version) => Err(Error::new(
            ErrorKind::Schema,
            CHECK,
            "the outbox was made by a newer version of this crate: upgrade the program",
        )
        .with("found", version)
        .with("known", VERSION)),
        None => Err(Error::new(
            ErrorKind::Schema,
            CHECK,
            "the table of the outbox's version is there, but names no version: was it made by hand?",
        )
        .with("outbox", config.place())),
    }
}

async fn meta(session: &mut Session, config: &PostgresConfig, name: &str) -> Result<Option<String>> {
    let statement: Statement = sql::meta(config);
    let rows = session.rows(statement.query().bind(name)).await?;
    match rows.first() {
        Some(row) => Ok(text(row, 0).during(CHECK)?.map(str::to_owned)),
        None => Ok(None),
    }
}
