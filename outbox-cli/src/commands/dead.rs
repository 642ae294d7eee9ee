//! `outbox dead`: dead letters.

use std::collections::BTreeSet;
use std::sync::Arc;

use outbox::{DeadLetter, DeadLetterQuery, DeadLetters, MessageId, OutboxStore, RecordRef};
use serde::Serialize;

use crate::args::{ConfigArgs, DeadChoice, DeadCommand};
use crate::exit::{Answer, Code, Failure, Result};
use crate::output::{self, number};
use crate::stdout_sink::Line;

/// A dead letter as JSON; the payload only where one was asked for.
#[derive(Serialize)]
struct Shown<'a> {
    id: MessageId,
    topic: &'a str,
    position: i64,
    attempts: u32,
    reason: &'a str,
    died_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Line<'a>>,
}

/// What was done, for machines.
#[derive(Serialize)]
struct Done {
    requeued: Option<usize>,
    discarded: Option<usize>,
    not_found: Vec<MessageId>,
}

/// How many are read at once when all are wanted.
const PAGE: usize = 500;

pub(crate) async fn run(command: &DeadCommand) -> Result<Answer> {
    match command {
        DeadCommand::List {
            config,
            topic,
            limit,
            json,
        } => {
            let store = open(config).await?;
            let query = DeadLetterQuery {
                topic: topic.as_deref().map(Arc::from),
                limit: usize::try_from(*limit).unwrap_or(usize::MAX),
                ..DeadLetterQuery::default()
            };
            list(&letters(&*store)?.list(&query).await?, *json)
        }
        DeadCommand::Show { config, id } => {
            let id = super::message_ids(std::slice::from_ref(id))?[0];
            let store = open(config).await?;
            show(letters(&*store)?, id).await
        }
        DeadCommand::Requeue(choice) => act(choice, true).await,
        DeadCommand::Discard(choice) => act(choice, false).await,
    }
}

async fn open(config: &ConfigArgs) -> Result<Arc<dyn OutboxStore>> {
    super::store(config).await
}

fn letters(store: &dyn OutboxStore) -> Result<&dyn DeadLetters> {
    store
        .dead_letters()
        .ok_or_else(|| Failure::new(Code::Usage, "this store keeps no dead letters"))
}

fn list(letters: &[DeadLetter], json: bool) -> Result<Answer> {
    if json {
        for letter in letters {
            output::json(&shown(letter, false))?;
        }
        return Ok(Answer::Yes);
    }
    if letters.is_empty() {
        output::line("no dead letters")?;
        return Ok(Answer::Yes);
    }
    let mut table = output::table(["message id", "topic", "attempts", "died at", "reason"]);
    for letter in letters {
        table.add_row([
            letter.record.id.to_string().into(),
            letter.message.topic().into(),
            number(letter.attempts),
            humantime::format_rfc3339_seconds(letter.died_at)
                .to_string()
                .into(),
            comfy_table::Cell::new(&letter.reason),
        ]);
    }
    output::line(table.to_string())?;
    Ok(Answer::Yes)
}

async fn show(letters: &dyn DeadLetters, id: MessageId) -> Result<Answer> {
    let found = all(letters, None, Some(vec![id])).await?;
    for letter in &found {
        output::json(&shown(letter, true))?;
    }
    if found.is_empty() {
        output::notice(format!("there is no dead letter {id}"));
        return Ok(Answer::No);
    }
    Ok(Answer::Yes)
}

/// Requeues or discards what was chosen.
async fn act(choice: &DeadChoice, requeue: bool) -> Result<Answer> {
    let wanted: BTreeSet<MessageId> = super::message_ids(&choice.which.ids)?.into_iter().collect();
    let store = open(&choice.config).await?;
    let letters = letters(&*store)?;
    let ids = (!choice.which.all).then(|| wanted.iter().copied().collect());
    let found: Vec<RecordRef> = all(letters, choice.topic.as_deref(), ids)
        .await?
        .iter()
        .map(|letter| letter.record)
        .collect();
    let mut done = 0;
    for page in found.chunks(PAGE) {
        done += match requeue {
            true => letters.requeue(page).await?,
            false => letters.discard(page).await?,
        };
    }
    let ids: BTreeSet<MessageId> = found.iter().map(|record| record.id).collect();
    let not_found: Vec<MessageId> = wanted.difference(&ids).copied().collect();
    let answer = if not_found.is_empty() {
        Answer::Yes
    } else {
        Answer::No
    };
    if choice.json {
        output::json(&Done {
            requeued: requeue.then_some(done),
            discarded: (!requeue).then_some(done),
            not_found,
        })?;
        return Ok(answer);
    }
    for id in not_found {
        output::notice(format!("there is no dead letter {id}"));
    }
    output::line(match requeue {
        true if done > 0 => format!("requeued {done}: they come behind what was enqueued meanwhile"),
        true => "requeued 0".to_owned(),
        false => format!("discarded {done}"),
    })?;
    Ok(answer)
}

/// All dead letters, or all with these ids, page by page.
async fn all(
    letters: &dyn DeadLetters,
    topic: Option<&str>,
    ids: Option<Vec<MessageId>>,
) -> Result<Vec<DeadLetter>> {
    let mut query = DeadLetterQuery {
        topic: topic.map(Arc::from),
        ids,
        limit: PAGE,
        ..DeadLetterQuery::default()
    };
    let mut all = Vec::new();
    loop {
        let page = letters.list(&query).await?;
        let full = page.len() == PAGE;
        query.after = page.last().map(|letter| letter.record);
        all.extend(page);
        if !full {
            return Ok(all);
        }
    }
}

fn shown(letter: &DeadLetter, whole: bool) -> Shown<'_> {
    Shown {
        id: letter.record.id,
        topic: letter.message.topic(),
        position: letter.record.position.0,
        attempts: letter.attempts,
        reason: &letter.reason,
        died_at: humantime::format_rfc3339_millis(letter.died_at).to_string(),
        message: whole.then(|| Line::new(&letter.message, letter.key_seq)),
    }
}
