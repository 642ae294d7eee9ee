//! `outbox migrate`: makes the outbox, or brings it to this version.

use serde::Serialize;

use crate::args::MigrateArgs;
use crate::exit::{Answer, Result};
use crate::output;
use crate::settings::{Migration, RoleKind};

/// What was done, for machines.
#[derive(Serialize)]
struct Done {
    store: &'static str,
    /// None: there was no outbox.
    from: Option<i64>,
    to: i64,
    changed: bool,
}

pub(crate) async fn run(args: &MigrateArgs) -> Result<Answer> {
    let settings = super::settings(&args.config)?;
    let mut printed = String::new();
    if args.print {
        printed += &settings.store.migration_script();
    }
    for (role, kind) in [
        (&args.print_grants_to_producer, RoleKind::Produce),
        (&args.print_grants_to_relay, RoleKind::Relay),
    ] {
        if let Some(role) = role {
            printed += &settings.store.grant_script(kind, role)?;
        }
    }
    if !printed.is_empty() {
        output::line(printed.trim_end())?;
        return Ok(Answer::Yes);
    }
    let Migration {
        store,
        prefix,
        from,
        to,
    } = settings.store.migrate().await?;
    if args.json {
        output::json(&Done {
            store,
            from,
            to,
            changed: from != Some(to),
        })?;
        return Ok(Answer::Yes);
    }
    let store = settings.store.describe();
    output::line(match from {
        None => format!("made the outbox `{prefix}`, version {to} ({store})"),
        Some(from) if from == to => format!("nothing to do: the outbox is at version {to} ({store})"),
        Some(from) => format!("brought the outbox from version {from} to {to} ({store})"),
    })?;
    Ok(Answer::Yes)
}
