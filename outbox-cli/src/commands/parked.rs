//! `outbox parked`: keys, messages and topics that wait for an operator.

use std::collections::BTreeSet;

use outbox::{Hold, HoldScope, MessageId, OutboxStore, Parking};
use serde::Serialize;

use crate::args::{ParkedChoice, ParkedCommand};
use crate::exit::{Answer, Code, Failure, Result};
use crate::output::{self, number};

/// What is parked, as JSON.
#[derive(Serialize)]
struct Shown<'a> {
    /// The message that failed, for which the others wait.
    head: MessageId,
    /// `topic`, `key` or `message`.
    scope: &'static str,
    /// Which topic or key.
    name: String,
    attempts: u32,
    reason: &'a str,
}

/// What was done, for machines.
#[derive(Serialize)]
struct Done {
    resumed: Option<usize>,
    buried: Option<usize>,
    not_found: Vec<MessageId>,
}

pub(crate) async fn run(command: &ParkedCommand) -> Result<Answer> {
    match command {
        ParkedCommand::List { config, limit, json } => {
            let store = super::store(config).await?;
            let limit = usize::try_from(*limit).unwrap_or(usize::MAX);
            list(&parking(&*store)?.parked(limit).await?, *json)
        }
        ParkedCommand::Resume(choice) => resume(choice).await,
        ParkedCommand::Bury(choice) => act(choice, false).await,
    }
}

/// `outbox resume` and `outbox parked resume`.
pub(crate) async fn resume(choice: &ParkedChoice) -> Result<Answer> {
    act(choice, true).await
}

fn parking(store: &dyn OutboxStore) -> Result<&dyn Parking> {
    store
        .parking()
        .ok_or_else(|| Failure::new(Code::Usage, "this store does not let parked keys be resumed"))
}

fn list(holds: &[Hold], json: bool) -> Result<Answer> {
    if json {
        for hold in holds {
            let (scope, name) = scope(hold);
            output::json(&Shown {
                head: hold.head.id,
                scope,
                name,
                attempts: hold.attempts,
                reason: &hold.reason,
            })?;
        }
        return Ok(Answer::Yes);
    }
    if holds.is_empty() {
        output::line("nothing is parked")?;
        return Ok(Answer::Yes);
    }
    let mut table = output::table(["message id", "what waits", "attempts", "reason"]);
    for hold in holds {
        let (scope, name) = scope(hold);
        table.add_row([
            hold.head.id.to_string().into(),
            format!("{scope} {name}").into(),
            number(hold.attempts),
            comfy_table::Cell::new(&hold.reason),
        ]);
    }
    output::line(table.to_string())?;
    Ok(Answer::Yes)
}

/// Resumes or buries what was chosen.
async fn act(choice: &ParkedChoice, resume: bool) -> Result<Answer> {
    let wanted: BTreeSet<MessageId> = super::message_ids(&choice.which.ids)?.into_iter().collect();
    let store = super::store(&choice.config).await?;
    let parking = parking(&*store)?;
    let (mut done, mut found) = (0, BTreeSet::new());
    for hold in parking
        .parked(usize::try_from(u32::MAX).unwrap_or(usize::MAX))
        .await?
    {
        if !choice.which.all && !wanted.contains(&hold.head.id) {
            continue;
        }
        let changed = match resume {
            true => parking.resume(&hold.reference()).await?,
            false => parking.bury(&hold.reference()).await?,
        };
        if changed {
            done += 1;
            found.insert(hold.head.id);
        }
    }
    let not_found: Vec<MessageId> = wanted.difference(&found).copied().collect();
    let answer = if not_found.is_empty() {
        Answer::Yes
    } else {
        Answer::No
    };
    if choice.json {
        output::json(&Done {
            resumed: resume.then_some(done),
            buried: (!resume).then_some(done),
            not_found,
        })?;
        return Ok(answer);
    }
    for id in not_found {
        output::notice(format!("nothing is parked at {id}"));
    }
    output::line(match resume {
        true => format!("resumed {done}"),
        false => format!("buried {done}; see outbox dead list"),
    })?;
    Ok(answer)
}

fn scope(hold: &Hold) -> (&'static str, String) {
    match &hold.scope {
        HoldScope::Topic(topic) => ("topic", topic.to_string()),
        HoldScope::Key(key) => ("key", key.to_string()),
        HoldScope::Message => ("message", String::new()),
    }
}
