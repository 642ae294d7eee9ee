//! How a real server carries out what is asked every few seconds: at a cost of what is counted or told, not of what waits.
//! What is explained is what was sent.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::time::{Duration, SystemTime};

use mongodb::bson::{Bson, Document, doc};
use outbox_core::{
    DeadLetterQuery, Death, FetchRequest, Fetched, Message, OutboxStore, Settlement, ShardSettlement, Subject,
};

use crate::commands::by_death;
use crate::real_commands::{Command, Heard};

const WAITING: usize = 300;
const DEAD: usize = 5;
const SCHEDULED: usize = 20;

/// An outbox with many messages that wait, some that are scheduled, and a few that died.
async fn filled() -> Heard {
    let heard = Heard::new(false).await;
    let message = |number: usize| {
        let builder = Message::builder("orders").key((number % 50).to_string());
        builder.payload("placed")
    };
    let later = SystemTime::now() + Duration::from_secs(3_600);
    let messages: Vec<Message> = (0..WAITING + DEAD)
        .map(|number| message(number).build().unwrap())
        .chain((0..SCHEDULED).map(|number| message(number).deliver_at(later).build().unwrap()))
        .collect();
    heard.enqueue(&messages).await;
    let owned = heard.lease().await;
    let request = FetchRequest {
        shards: owned.clone(),
        max_rows: DEAD,
        max_bytes: 1 << 20,
        ..FetchRequest::default()
    };
    let fetched = heard.store.reader().await.unwrap().fetch(&request).await;
    let Fetched::Batch { records, .. } = fetched.unwrap() else {
        panic!("reset")
    };
    let mut shards: Vec<ShardSettlement> = owned
        .iter()
        .map(|owned| ShardSettlement::new(owned.shard, owned.epoch))
        .collect();
    for record in records {
        let part = shards.iter_mut().find(|part| part.shard == record.shard);
        part.unwrap().dead.push(Death {
            record: record.reference(),
            attempts: 1,
            reason: "too large".to_owned(),
        });
    }
    let relay = heard.relay.clone();
    heard.store.settle(&Settlement { relay, shards }).await.unwrap();
    heard
}

/// What the server examined.
#[derive(Debug)]
struct Examined {
    keys: i64,
    documents: i64,
}

impl Heard {
    /// By a command that only reads.
    async fn examined(&self, command: &Command) -> Examined {
        let mut explained = Document::new();
        for (field, value) in &command.body {
            let of_it = [
                "aggregate",
                "pipeline",
                "cursor",
                "find",
                "filter",
                "sort",
                "limit",
            ];
            if of_it.contains(&field.as_str()) {
                explained.insert(field, value.clone());
            }
        }
        self.explained(explained).await
    }

    /// By a count of what matches in an aggregation, which not every server explains as one that needs no field of a document.
    async fn counted(&self, command: &Command) -> Examined {
        let first = command.body.get_array("pipeline").unwrap()[0]
            .as_document()
            .unwrap();
        let collection = command.body.get_str("aggregate").unwrap();
        let filter = first.get_document("$match").unwrap();
        assert!(!filter.is_empty(), "no index: {}", command.body);
        self.explained(doc! { "count": collection, "query": filter })
            .await
    }

    async fn explained(&self, mut explained: Document) -> Examined {
        if explained.to_string().contains("dead.ts") {
            // There is no other index for it. Said here, because the tests' server explains no bounds of timestamps.
            explained.insert("hint", by_death());
        }
        let explain = doc! { "explain": explained, "verbosity": "executionStats" };
        let database = &self.store.sessions.collections.database;
        let told = Bson::Document(database.run_command(explain).await.unwrap());
        let number = |field: &str| match found(&told, field) {
            Some(Bson::Int32(number)) => i64::from(*number),
            Some(Bson::Int64(number)) => *number,
            other => panic!("{field}: {other:?}"),
        };
        Examined {
            keys: number("totalKeysExamined"),
            documents: number("totalDocsExamined"),
        }
    }
}

/// The first field of this name, wherever it is.
fn found<'b>(told: &'b Bson, field: &str) -> Option<&'b Bson> {
    match told {
        Bson::Document(document) => document
            .get(field)
            .or_else(|| document.values().find_map(|value| found(value, field))),
        Bson::Array(all) => all.iter().find_map(|value| found(value, field)),
        _ => None,
    }
}

/// Whether it is about dead letters.
fn of_the_dead(command: &Command) -> bool {
    command.body.to_string().contains("dead.ts")
}

#[tokio::test]
async fn what_is_counted_is_counted_in_indexes() {
    let heard = filled().await;
    let (stats, said) = heard.during(heard.store.stats()).await;
    let stats = stats.unwrap();
    assert_eq!(
        (stats.backlog.value(), stats.dead, stats.scheduled),
        (WAITING as u64, DEAD as u64, SCHEDULED as u64)
    );
    let counts = |collection: &'static str| {
        said.iter().filter(move |command| {
            let counts = command.body.to_string().contains("$group");
            counts && command.body.get_str("aggregate") == Ok(collection)
        })
    };
    // The backlog, what was delivered, what died.
    assert_eq!(counts("outbox").count(), 3);
    for command in counts("outbox").chain(counts("outbox_scheduled")) {
        let bounded = command.body.to_string().contains("$limit");
        assert!(
            bounded || of_the_dead(command),
            "counted however many: {}",
            command.body
        );
        let examined = heard.counted(command).await;
        // Of an index, and of the right one.
        let (keys, documents) = match of_the_dead(command) {
            true => (DEAD + 1, DEAD),
            false => (WAITING + 64, 0),
        };
        assert!(
            examined.keys <= keys as i64 && examined.documents <= documents as i64,
            "{examined:?}: {}",
            command.body
        );
    }
    heard.remove().await;
}

#[tokio::test]
async fn dead_letters_are_found_without_looking_at_what_waits() {
    let heard = filled().await;
    let letters = heard.store.dead_letters().unwrap();
    let mut query = DeadLetterQuery {
        limit: 2,
        ..DeadLetterQuery::default()
    };
    for expected in [2, 2, 1, 0] {
        let (listed, said) = heard.during(letters.list(&query)).await;
        let listed = listed.unwrap();
        assert_eq!(listed.len(), expected);
        let examined = heard.examined(&said[0]).await;
        assert!(
            examined.documents <= DEAD as i64,
            "{examined:?}: {}",
            said[0].body
        );
        query.after = listed.last().map(|letter| letter.record).or(query.after);
    }
    let everything = DeadLetterQuery {
        limit: 100,
        ..DeadLetterQuery::default()
    };
    let all = letters.list(&everything).await.unwrap();
    let subject = Subject::Message(all[2].message.id());
    let (facts, said) = heard
        .during(heard.store.inspection().unwrap().inspect(&subject, 1_000))
        .await;
    assert_eq!(facts.unwrap().found.len(), 1);
    for command in said.iter().filter(|command| of_the_dead(command)) {
        let examined = heard.examined(command).await;
        assert!(
            examined.documents <= DEAD as i64,
            "{examined:?}: {}",
            command.body
        );
    }
    let ids: Vec<_> = all.iter().map(|letter| letter.record).collect();
    assert_eq!(letters.requeue(&ids[..3]).await.unwrap(), 3);
    assert_eq!(letters.discard(&ids).await.unwrap(), 2);
    heard.remove().await;
}
