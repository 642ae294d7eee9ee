//! `outbox migrate`: makes the outbox, or brings it to this version.

use outbox::sqlite;
use serde::Serialize;

use crate::args::MigrateArgs;
use crate::exit::{Answer, Result};
use crate::output;
use crate::settings::StoreSettings;

/// What was done, for machines.
#[derive(Serialize)]
struct Done {
    store: &'static str,
    /// None: there was no outbox.
    from: Option<i64>,
    to: i64,
    changed: bool,
}

pub(crate) fn run(args: &MigrateArgs) -> Result<Answer> {
    let settings = super::settings(&args.config)?;
    let StoreSettings::Sqlite(config) = &settings.store;
    if args.print {
        output::line(sqlite::migration_sql(config).trim_end())?;
        return Ok(Answer::Yes);
    }
    let sqlite::Migrated { from, to } = sqlite::migrate(config)?;
    if args.json {
        output::json(&Done {
            store: "sqlite",
            from,
            to,
            changed: from != Some(to),
        })?;
        return Ok(Answer::Yes);
    }
    let store = settings.store.describe();
    output::line(match from {
        None => format!("made the outbox `{}`, version {to} ({store})", config.prefix),
        Some(from) if from == to => format!("nothing to do: the outbox is at version {to} ({store})"),
        Some(from) => format!("brought the outbox from version {from} to {to} ({store})"),
    })?;
    Ok(Answer::Yes)
}
