//! `outbox explain`: why a message, a key or a topic is still here.

use std::time::SystemTime;

use comfy_table::{Cell, Color, Table};
use outbox::human::short;
use outbox::{
    Cause, Count, Explained, Explanation, Facts, Inspection, MessageId, OrderKey, OutboxStore, Place,
    Standing, Subject,
};
use serde::Serialize;

use super::sureness;
use crate::args::ExplainArgs;
use crate::exit::{Answer, Code, Failure, Result};
use crate::output::{self, coloured, readable, readable_key};
use crate::stdout_sink::Text;

/// The explanation as JSON.
#[derive(Serialize)]
struct Report<'a> {
    message: Option<MessageId>,
    topic: Option<&'a str>,
    key: Option<Text<'a>>,
    found: bool,
    /// Whether everything was looked at.
    complete: bool,
    backlog: u64,
    backlog_is: &'static str,
    last_seq: Option<i64>,
    causes: Vec<Because>,
    places: Vec<Shown<'a>>,
    relays: Vec<&'a str>,
}

#[derive(Serialize)]
struct Because {
    code: &'static str,
    text: String,
    /// One or the other.
    remedies: Vec<String>,
}

/// One place; what a place does not have is null.
#[derive(Serialize)]
struct Shown<'a> {
    /// `outbox`, `scheduled`, `processed` or `dead`.
    place: &'static str,
    id: MessageId,
    topic: &'a str,
    key: Option<Text<'a>>,
    key_seq: Option<i64>,
    position: Option<i64>,
    shard: Option<u16>,
    /// How many of its shard stand before it.
    ahead: Option<u64>,
    attempts: Option<u32>,
    created_at: Option<String>,
    age_seconds: Option<f64>,
    /// When it is due, was delivered or was given up; null, too, where that cannot be written.
    at: Option<String>,
    causes: Vec<Because>,
}

pub(crate) async fn run(args: &ExplainArgs) -> Result<Answer> {
    let subject = subject(args)?;
    let store = super::store(&args.config).await?;
    let facts = inspection(&*store)?.inspect(&subject, args.search).await?;
    let explanation = outbox::explain(&subject, &facts);
    if args.json {
        output::json(&report(&subject, &facts, &explanation))?;
    } else {
        show(&subject, &facts, &explanation)?;
    }
    Ok(match facts.found.is_empty() {
        true => Answer::No,
        false => Answer::Yes,
    })
}

fn inspection(store: &dyn OutboxStore) -> Result<&dyn Inspection> {
    store
        .inspection()
        .ok_or_else(|| Failure::new(Code::Usage, "this store cannot be asked where something stands"))
}

/// What the command line asks about; it sees to it that there is a message or a topic.
fn subject(args: &ExplainArgs) -> Result<Subject> {
    if let Some(id) = &args.message {
        return Ok(Subject::Message(id.parse()?));
    }
    let topic = args.topic.as_deref().unwrap_or_default().into();
    let Some(key) = &args.key else {
        return Ok(Subject::Topic(topic));
    };
    let key = match args.hex {
        true => unhex(key).ok_or_else(|| {
            Failure::new(Code::Usage, "--key is not hexadecimal")
                .hint("two digits a byte, such as ff00; or leave out --hex")
        })?,
        false => key.clone().into_bytes(),
    };
    Ok(Subject::Key(OrderKey {
        topic,
        key: key.into(),
    }))
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    if !digits.len().is_multiple_of(2) || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok())
        .collect()
}

fn show(subject: &Subject, facts: &Facts, explanation: &Explanation) -> Result<()> {
    let mut whole = output::fields();
    match subject {
        Subject::Message(id) => whole.add_row(["message", &id.to_string()]),
        Subject::Key(key) => whole
            .add_row(["topic", &readable(&key.topic)])
            .add_row(["key", &readable_key(&key.key)]),
        Subject::Topic(topic) => whole.add_row(["topic", &readable(topic)]),
    };
    if !matches!(subject, Subject::Message(_)) && !facts.found.is_empty() {
        whole.add_row(["backlog", &backlog(facts.backlog)]);
    }
    if let Some(last) = facts.last_seq {
        whole.add_row(["numbered", &format!("up to {last}")]);
    }
    because(&mut whole, &explanation.causes);
    output::line(whole.trim_fmt())?;
    for explained in &explanation.places {
        output::line("")?;
        let mut table = place(subject, facts.now, explained);
        let said = |cause: &&Cause| explanation.causes.contains(cause);
        because(&mut table, explained.causes.iter().filter(|cause| !said(cause)));
        output::line(table.trim_fmt())?;
    }
    Ok(())
}

fn backlog(backlog: Count) -> String {
    match backlog {
        Count::Exact(1) => "1 undelivered".to_owned(),
        backlog => format!("{backlog} undelivered, of which the first is below"),
    }
}

fn place(subject: &Subject, now: SystemTime, explained: &Explained) -> Table {
    let Standing {
        id,
        topic,
        key,
        key_seq,
        created_at,
        place,
    } = &explained.standing;
    let mut table = output::fields();
    let place = match place {
        Place::Outbox { shard, position, .. } => format!("the outbox, position {position}, shard {shard}"),
        Place::Scheduled { shard, due } => {
            format!("the scheduled, shard {shard}, due {}", output::time(*due))
        }
        Place::Processed { position, at } => {
            format!(
                "the archive, position {position}, delivered {}",
                output::time(*at)
            )
        }
        Place::Dead { position, at, .. } => {
            format!(
                "the dead letters, position {position}, since {}",
                output::time(*at)
            )
        }
    };
    table.add_row(["in", &place]);
    if !matches!(subject, Subject::Message(_)) {
        table.add_row(["message", &id.to_string()]);
    }
    if matches!(subject, Subject::Message(_)) {
        table.add_row(["topic", &readable(topic)]);
    }
    match (subject, key) {
        (Subject::Key(_), _) => {}
        (_, Some(key)) => {
            table.add_row(["key", &readable_key(&key.key)]);
        }
        (_, None) => {
            table.add_row(["key", "none"]);
        }
    }
    if let Some(number) = key_seq {
        table.add_row(["number", &number.to_string()]);
    }
    if let Some(created) = created_at {
        let age = short(now.duration_since(*created).unwrap_or_default());
        table.add_row(["enqueued", &format!("{age} ago, {}", output::time(*created))]);
    }
    table
}

/// Adds the causes, each with what to do about it.
fn because<'a>(table: &mut Table, causes: impl IntoIterator<Item = &'a Cause>) {
    for cause in causes {
        let color = match cause.code() {
            "parked" | "behind_parked" | "topic_parked" | "dead" | "no_relay" => Color::Red,
            "in_line" | "delivered" | "scheduled" => Color::Green,
            _ => Color::Yellow,
        };
        table.add_row([coloured("why", color), Cell::new(readable(cause.to_string()))]);
        for (number, remedy) in cause.remedies().iter().enumerate() {
            table.add_row([if number == 0 { "do" } else { "or" }, remedy]);
        }
    }
}

fn report<'a>(subject: &'a Subject, facts: &'a Facts, explanation: &'a Explanation) -> Report<'a> {
    let (message, topic, key) = match subject {
        Subject::Message(id) => (Some(*id), None, None),
        Subject::Key(key) => (None, Some(&*key.topic), Some(Text(&key.key))),
        Subject::Topic(topic) => (None, Some(&**topic), None),
    };
    Report {
        message,
        topic,
        key,
        found: !facts.found.is_empty(),
        complete: facts.complete,
        backlog: facts.backlog.value(),
        backlog_is: sureness(facts.backlog),
        last_seq: facts.last_seq,
        causes: told(&explanation.causes),
        places: explanation
            .places
            .iter()
            .map(|explained| shown(facts.now, explained))
            .collect(),
        relays: facts.relays.iter().map(outbox::RelayId::as_str).collect(),
    }
}

fn shown(now: SystemTime, explained: &Explained) -> Shown<'_> {
    let standing = &explained.standing;
    let mut shown = Shown {
        place: "outbox",
        id: standing.id,
        topic: &standing.topic,
        key: standing.key.as_ref().map(|key| Text(&key.key)),
        key_seq: standing.key_seq,
        position: None,
        shard: None,
        ahead: None,
        attempts: None,
        created_at: standing.created_at.and_then(output::timestamp),
        age_seconds: standing
            .created_at
            .map(|created| now.duration_since(created).unwrap_or_default().as_secs_f64()),
        at: None,
        causes: told(&explained.causes),
    };
    match &standing.place {
        Place::Outbox {
            shard,
            position,
            ahead,
        } => {
            (shown.shard, shown.position, shown.ahead) =
                (Some(shard.0), Some(position.0), Some(ahead.value()));
        }
        Place::Scheduled { shard, due } => {
            (shown.place, shown.shard, shown.at) = ("scheduled", Some(shard.0), output::timestamp(*due));
        }
        Place::Processed { position, at } => {
            (shown.place, shown.position, shown.at) = ("processed", Some(position.0), output::timestamp(*at));
        }
        Place::Dead {
            position,
            attempts,
            at,
            ..
        } => {
            (shown.place, shown.position, shown.at) = ("dead", Some(position.0), output::timestamp(*at));
            shown.attempts = Some(*attempts);
        }
    }
    shown
}

fn told(causes: &[Cause]) -> Vec<Because> {
    causes
        .iter()
        .map(|cause| Because {
            code: cause.code(),
            text: cause.to_string(),
            remedies: cause.remedies(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_can_be_given_in_hexadecimal() {
        assert_eq!(unhex("ff00").unwrap(), [0xff, 0]);
        assert_eq!(unhex("").unwrap(), [0_u8; 0]);
        for wrong in ["f", "0x10", "zz", "ü0"] {
            assert_eq!(unhex(wrong), None, "{wrong}");
        }
    }
}
