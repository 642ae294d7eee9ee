//! `outbox dead`: dead letters.

use std::collections::BTreeSet;
use std::sync::Arc;

use indicatif::ProgressBar;
use outbox::{DeadLetter, DeadLetterQuery, DeadLetters, MessageId, OutboxStore, RecordRef};
use serde::Serialize;

use super::bulk::{self, Progress};
use crate::args::{ConfigArgs, Consent, DeadChoice, DeadCommand};
use crate::exit::{Answer, Code, Failure, Result};
use crate::output::{self, number, readable};
use crate::stdout_sink::Line;

/// A dead letter as JSON; the payload only where one was asked for.
#[derive(Serialize)]
struct Shown<'a> {
    id: MessageId,
    topic: &'a str,
    position: i64,
    attempts: u32,
    reason: &'a str,
    /// None where it cannot be written.
    died_at: Option<String>,
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

/// What to do to dead letters.
#[derive(Clone, Copy)]
enum Deed<'a> {
    Requeue,
    Discard(&'a Consent),
}

/// How many are read at once: they come with their payloads.
const PAGE: usize = 100;
/// How many are requeued or discarded at once: no more than any store does in one transaction, so that what is told of
/// a failure is what was done.
const AT_ONCE: usize = 500;

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
                limit: super::and_one(*limit),
                ..DeadLetterQuery::default()
            };
            let mut found = letters(&*store)?.list(&query).await?;
            super::cut(&mut found, *limit);
            list(&found, *json)
        }
        DeadCommand::Show { config, id } => {
            let id = super::message_ids(std::slice::from_ref(id))?[0];
            let store = open(config).await?;
            show(letters(&*store)?, id).await
        }
        DeadCommand::Requeue(choice) => act(choice, Deed::Requeue).await,
        DeadCommand::Discard { choice, consent } => act(choice, Deed::Discard(consent)).await,
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
            readable(letter.message.topic()).into(),
            number(letter.attempts),
            output::time(letter.died_at).into(),
            readable(&letter.reason).into(),
        ]);
    }
    output::line(table.to_string())?;
    Ok(Answer::Yes)
}

async fn show(letters: &dyn DeadLetters, id: MessageId) -> Result<Answer> {
    let query = DeadLetterQuery {
        ids: Some(vec![id]),
        ..DeadLetterQuery::default()
    };
    let mut found = false;
    each_page(letters, query, |page| {
        found |= !page.is_empty();
        page.iter()
            .try_for_each(|letter| output::json(&shown(letter, true)))
    })
    .await?;
    if !found {
        output::notice(format!("there is no dead letter {id}"));
        return Ok(Answer::No);
    }
    Ok(Answer::Yes)
}

/// Requeues or discards what was chosen.
async fn act(choice: &DeadChoice, deed: Deed<'_>) -> Result<Answer> {
    let wanted: BTreeSet<MessageId> = super::message_ids(&choice.which.ids)?.into_iter().collect();
    let must_ask = matches!(deed, Deed::Discard(consent) if choice.which.all && !consent.yes);
    if must_ask {
        bulk::must_be_able_to_ask("outbox dead discard")?;
    }
    let store = open(&choice.config).await?;
    let letters = letters(&*store)?;
    let mut found = find(letters, choice, &wanted).await?;
    let agreed = !must_ask || bulk::agreed("discard", found.len(), "dead letters")?;
    if !agreed {
        found.clear();
    }
    let (done, failure) = act_on(letters, &found, deed, choice.which.all).await;
    let ids: BTreeSet<MessageId> = found.iter().map(|record| record.id).collect();
    let not_found: Vec<MessageId> = wanted.difference(&ids).copied().collect();
    let answer = match agreed && not_found.is_empty() {
        true => Answer::Yes,
        false => Answer::No,
    };
    let told = tell(choice.json, deed, done, not_found, failure.is_some());
    failure.map_or(told, Err)?;
    Ok(answer)
}

/// What names the dead letters that are meant: a letter comes with its payload, and of a million of them the names alone
/// are kept, 24 bytes each. All are named before the first is touched: one that is requeued, and dies again at once, is
/// not met again, and of what was asked for no more is discarded than the question said.
async fn find(
    letters: &dyn DeadLetters,
    choice: &DeadChoice,
    wanted: &BTreeSet<MessageId>,
) -> Result<Vec<RecordRef>> {
    let query = DeadLetterQuery {
        topic: choice.topic.as_deref().map(Arc::from),
        ids: (!choice.which.all).then(|| wanted.iter().copied().collect()),
        ..DeadLetterQuery::default()
    };
    let count = match choice.which.all {
        true => output::counting("dead letters found"),
        false => ProgressBar::hidden(),
    };
    let mut found = Vec::new();
    let searched = each_page(letters, query, |page| {
        found.extend(page.iter().map(|letter| letter.record));
        count.set_position(u64::try_from(found.len()).unwrap_or(u64::MAX));
        Ok(())
    })
    .await;
    count.finish_and_clear();
    searched.map(|()| found)
}

/// Says how many it was done to, and why not to the rest.
async fn act_on(
    letters: &dyn DeadLetters,
    records: &[RecordRef],
    deed: Deed<'_>,
    all: bool,
) -> (usize, Option<Failure>) {
    let mut progress = Progress::new(records.len(), all, "dead letters");
    for some in records.chunks(AT_ONCE) {
        let done = match deed {
            Deed::Requeue => letters.requeue(some).await,
            Deed::Discard(_) => letters.discard(some).await,
        };
        match done {
            Ok(done) => progress.add(some.len(), done),
            Err(error) => return (progress.end(), Some(error.into())),
        }
    }
    (progress.end(), None)
}

/// Tells what was done, all of it or what there was before it failed.
fn tell(json: bool, deed: Deed<'_>, done: usize, not_found: Vec<MessageId>, failed: bool) -> Result<()> {
    let requeued = matches!(deed, Deed::Requeue);
    if json {
        return output::json(&Done {
            requeued: requeued.then_some(done),
            discarded: (!requeued).then_some(done),
            not_found,
        });
    }
    for id in not_found {
        output::notice(format!("there is no dead letter {id}"));
    }
    if failed {
        bulk::tell_partial(if requeued { "requeued" } else { "discarded" }, done);
        return Ok(());
    }
    output::line(match deed {
        Deed::Requeue if done > 0 => {
            format!("requeued {done}: they come behind what was enqueued meanwhile")
        }
        Deed::Requeue => "requeued 0".to_owned(),
        Deed::Discard(_) => format!("discarded {done}"),
    })
}

/// Shows all dead letters of a query, page by page.
async fn each_page(
    letters: &dyn DeadLetters,
    mut query: DeadLetterQuery,
    mut each: impl FnMut(&[DeadLetter]) -> Result<()>,
) -> Result<()> {
    query.limit = PAGE;
    loop {
        let page = letters.list(&query).await?;
        each(&page)?;
        query.after = page.last().map(|letter| letter.record);
        if page.len() < PAGE {
            return Ok(());
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
        died_at: output::timestamp(letter.died_at),
        message: whole.then(|| Line::new(&letter.message, letter.key_seq)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use std::time::SystemTime;

    use async_trait::async_trait;
    use outbox::{Message, Position};

    use super::*;
    use crate::args::Which;

    /// Dead letters of one topic: who has hold of its name has not let go of a letter. What is requeued dies again at
    /// once.
    struct Recurring {
        topic: Arc<str>,
        state: Mutex<State>,
    }

    #[derive(Default)]
    struct State {
        letters: BTreeMap<Position, MessageId>,
        /// How many letters there were at one time outside of the store.
        most_alive: usize,
    }

    impl Recurring {
        fn new(count: i64) -> Self {
            let letters = (1..=count).map(|position| (Position(position), MessageId::new()));
            Self {
                topic: "orders".into(),
                state: Mutex::new(State {
                    letters: letters.collect(),
                    most_alive: 0,
                }),
            }
        }

        fn letter(&self, position: Position, id: MessageId) -> DeadLetter {
            let message = Message::builder("orders").id(id).build().unwrap();
            let mut parts = message.into_parts();
            parts.topic = self.topic.clone();
            DeadLetter {
                record: RecordRef { position, id },
                message: Message::from_stored(parts),
                key_seq: None,
                attempts: 1,
                reason: "too large".to_owned(),
                died_at: SystemTime::UNIX_EPOCH,
            }
        }
    }

    #[async_trait]
    impl DeadLetters for Recurring {
        async fn list(&self, query: &DeadLetterQuery) -> outbox::Result<Vec<DeadLetter>> {
            let mut state = self.state.lock().unwrap();
            let after = query.after.map_or(Position(0), |after| after.position);
            let page: Vec<_> = state
                .letters
                .iter()
                .filter(|(position, _)| **position > after)
                .take(query.limit)
                .map(|(position, id)| self.letter(*position, *id))
                .collect();
            state.most_alive = state.most_alive.max(Arc::strong_count(&self.topic) - 1);
            Ok(page)
        }

        async fn requeue(&self, records: &[RecordRef]) -> outbox::Result<usize> {
            let mut state = self.state.lock().unwrap();
            let mut requeued = 0;
            for record in records {
                if let Some(id) = state.letters.remove(&record.position) {
                    let last = state
                        .letters
                        .last_key_value()
                        .map_or(record.position, |last| *last.0);
                    state.letters.insert(Position(last.0 + 1), id);
                    requeued += 1;
                }
            }
            Ok(requeued)
        }

        async fn discard(&self, _: &[RecordRef]) -> outbox::Result<usize> {
            Ok(0)
        }
    }

    #[tokio::test]
    async fn payloads_are_let_go_page_by_page_and_what_dies_again_is_requeued_once() {
        const COUNT: usize = 1_234;
        let letters = Recurring::new(i64::try_from(COUNT).unwrap());
        let choice = DeadChoice {
            config: ConfigArgs { config: None },
            which: Which {
                ids: Vec::new(),
                all: true,
            },
            topic: None,
            json: false,
        };
        let found = find(&letters, &choice, &BTreeSet::new()).await.unwrap();
        assert_eq!(found.len(), COUNT);
        let (done, failure) = act_on(&letters, &found, Deed::Requeue, true).await;
        assert!(done == COUNT && failure.is_none(), "{done} {failure:?}");
        let state = letters.state.lock().unwrap();
        assert!(
            state.most_alive <= PAGE,
            "{} letters at one time",
            state.most_alive
        );
        assert_eq!(state.letters.len(), COUNT, "each died again");
    }
}
