//! `outbox parked`: keys, messages and topics that wait for an operator.

use std::collections::BTreeSet;

use outbox::{Hold, HoldScope, MessageId, OutboxStore, Parking};
use serde::Serialize;

use super::bulk::{self, Progress};
use crate::args::{Consent, ParkedChoice, ParkedCommand};
use crate::exit::{Answer, Code, Failure, Result};
use crate::output::{self, number, readable};

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
    not_found: BTreeSet<MessageId>,
}

/// What to do to what is parked.
#[derive(Clone, Copy)]
enum Deed<'a> {
    Resume,
    Bury(&'a Consent),
}

/// More than are ever parked: a store lists them from the oldest on, and does not page.
const ALL: usize = u32::MAX as usize;

pub(crate) async fn run(command: &ParkedCommand) -> Result<Answer> {
    match command {
        ParkedCommand::List {
            config,
            topic,
            limit,
            json,
        } => {
            let store = super::store(config).await?;
            // Of a topic's there may be few among many: the limit counts what is shown.
            let most = match topic {
                Some(_) => ALL,
                None => super::and_one(*limit),
            };
            let mut holds = parking(&*store)?.parked(most).await?;
            holds.retain(|hold| is_of(hold, topic.as_deref()));
            super::cut(&mut holds, *limit);
            list(&holds, *json)
        }
        ParkedCommand::Resume(choice) => resume(choice).await,
        ParkedCommand::Bury { choice, consent } => act(choice, Deed::Bury(consent)).await,
    }
}

/// `outbox resume` and `outbox parked resume`.
pub(crate) async fn resume(choice: &ParkedChoice) -> Result<Answer> {
    act(choice, Deed::Resume).await
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
            readable(format!("{scope} {name}")).into(),
            number(hold.attempts),
            readable(&hold.reason).into(),
        ]);
    }
    output::line(table.to_string())?;
    Ok(Answer::Yes)
}

/// Whether what waits is of a topic, or of any. A message without a key does not tell its topic.
fn is_of(hold: &Hold, topic: Option<&str>) -> bool {
    let Some(topic) = topic else {
        return true;
    };
    match &hold.scope {
        HoldScope::Topic(own) => **own == *topic,
        HoldScope::Key(key) => *key.topic == *topic,
        HoldScope::Message => false,
    }
}

/// Resumes or buries what was chosen.
async fn act(choice: &ParkedChoice, deed: Deed<'_>) -> Result<Answer> {
    let wanted: BTreeSet<MessageId> = super::message_ids(&choice.which.ids)?.into_iter().collect();
    let must_ask = matches!(deed, Deed::Bury(consent) if choice.which.all && !consent.yes);
    if must_ask {
        bulk::must_be_able_to_ask("outbox parked bury")?;
    }
    let store = super::store(&choice.config).await?;
    let parking = parking(&*store)?;
    let mut holds = parking.parked(ALL).await?;
    holds.retain(|hold| match choice.which.all {
        true => is_of(hold, choice.topic.as_deref()),
        false => wanted.contains(&hold.head.id),
    });
    let agreed = !must_ask || bulk::agreed("bury", holds.len(), "parked messages")?;
    if !agreed {
        holds.clear();
    }
    let mut not_found = wanted;
    for hold in &holds {
        not_found.remove(&hold.head.id);
    }
    let (done, failure) = act_on(parking, &holds, deed, choice.which.all, &mut not_found).await;
    let answer = match agreed && not_found.is_empty() {
        true => Answer::Yes,
        false => Answer::No,
    };
    let told = tell(choice.json, deed, done, not_found, failure.is_some());
    failure.map_or(told, Err)?;
    Ok(answer)
}

/// Says how many it was done to, and why not to the rest; what was asked for, and is gone meanwhile, was not found.
async fn act_on(
    parking: &dyn Parking,
    holds: &[Hold],
    deed: Deed<'_>,
    all: bool,
    not_found: &mut BTreeSet<MessageId>,
) -> (usize, Option<Failure>) {
    let mut progress = Progress::new(holds.len(), all, "parked");
    for hold in holds {
        let done = match deed {
            Deed::Resume => parking.resume(&hold.reference()).await,
            Deed::Bury(_) => parking.bury(&hold.reference()).await,
        };
        match done {
            Ok(done) => {
                progress.add(1, usize::from(done));
                if !done && !all {
                    not_found.insert(hold.head.id);
                }
            }
            Err(error) => return (progress.end(), Some(error.into())),
        }
    }
    (progress.end(), None)
}

/// Tells what was done, all of it or what there was before it failed.
fn tell(json: bool, deed: Deed<'_>, done: usize, not_found: BTreeSet<MessageId>, failed: bool) -> Result<()> {
    let resumed = matches!(deed, Deed::Resume);
    if json {
        return output::json(&Done {
            resumed: resumed.then_some(done),
            buried: (!resumed).then_some(done),
            not_found,
        });
    }
    for id in not_found {
        output::notice(format!("nothing is parked at {id}"));
    }
    if failed {
        bulk::tell_partial(if resumed { "resumed" } else { "buried" }, done);
        return Ok(());
    }
    output::line(match deed {
        Deed::Resume => format!("resumed {done}"),
        Deed::Bury(_) => format!("buried {done}; see outbox dead list"),
    })
}

fn scope(hold: &Hold) -> (&'static str, String) {
    match &hold.scope {
        HoldScope::Topic(topic) => ("topic", topic.to_string()),
        HoldScope::Key(key) => ("key", key.to_string()),
        HoldScope::Message => ("message", String::new()),
    }
}
