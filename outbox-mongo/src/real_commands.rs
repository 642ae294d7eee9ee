//! What is said to the server, heard by the driver: how many commands a batch and a settlement take, and with which concerns.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use mongodb::Client;
use mongodb::bson::Document;
use mongodb::event::EventHandler;
use mongodb::event::command::CommandEvent;
use outbox_core::{
    Death, FetchRequest, Fetched, Hold, HoldChange, HoldScope, HoldState, LeaseRequest, Message, MessageId,
    OutboxStore, OwnedShard, Position, Record, RecordRef, RelayId, Settlement, ShardSettlement, Subject,
};

use crate::config::MongoConfig;
use crate::enqueue::MongoOutbox;
use crate::schema::migrate;
use crate::session::Sessions;
use crate::store::MongoStore;

/// A store whose commands are heard, in a database of its own.
pub(crate) struct Heard {
    pub(crate) store: MongoStore,
    outbox: MongoOutbox,
    client: Client,
    commands: Arc<Mutex<Vec<Command>>>,
    pub(crate) relay: RelayId,
}

/// A command as it was sent.
#[derive(Debug, Clone)]
pub(crate) struct Command {
    pub(crate) name: String,
    pub(crate) body: Document,
}

impl Heard {
    pub(crate) async fn new(archive: bool) -> Self {
        let server = std::env::var("OUTBOX_TEST_MONGO")
            .unwrap_or_else(|_| panic!("OUTBOX_TEST_MONGO is not set: run scripts/services start mongo"));
        let (place, _) = server.rsplit_once('/').unwrap();
        let name = format!("t_{}_{:08x}", std::process::id(), fastrand::u32(..));
        let mut config = MongoConfig {
            archive,
            ..MongoConfig::new(format!("{place}/{name}"))
        };
        migrate(&config).await.unwrap();
        let commands = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&commands);
        let mut options = config.options().await.unwrap();
        options.command_event_handler = Some(EventHandler::callback(move |event| {
            if let CommandEvent::Started(started) = event {
                heard.lock().unwrap().push(Command {
                    name: started.command_name,
                    body: started.command,
                });
            }
        }));
        let client = Client::with_options(options).unwrap();
        let sessions = Sessions::of(client.clone(), &name, &config);
        let outbox = MongoOutbox::new(&config).unwrap();
        config.shards = 64;
        Self {
            store: MongoStore::over(sessions, config).await.unwrap(),
            outbox,
            client,
            commands,
            relay: RelayId::new("relay"),
        }
    }

    pub(crate) async fn enqueue(&self, messages: &[Message]) {
        let mut session = self.client.start_session().await.unwrap();
        session.start_transaction().await.unwrap();
        self.outbox.enqueue_many(&mut session, messages).await.unwrap();
        session.commit_transaction().await.unwrap();
    }

    pub(crate) async fn lease(&self) -> Vec<OwnedShard> {
        let request = LeaseRequest {
            relay: self.relay.clone(),
            want: 64,
            ttl: Duration::from_secs(60),
        };
        self.store.lease(&request).await.unwrap().held
    }

    /// What was said to the server meanwhile. The end of a session that was dropped, of which nobody waits for an answer, may
    /// be heard at any time.
    pub(crate) async fn during<T>(&self, work: impl Future<Output = T>) -> (T, Vec<Command>) {
        self.commands.lock().unwrap().clear();
        let done = work.await;
        let mut said = self.commands.lock().unwrap().clone();
        said.retain(|command| command.name != "abortTransaction");
        (done, said)
    }

    pub(crate) async fn remove(self) {
        self.store.sessions.collections.database.drop().await.unwrap();
    }
}

pub(crate) fn names(said: &[Command]) -> Vec<&str> {
    said.iter().map(|command| command.name.as_str()).collect()
}

fn message(key: usize) -> Message {
    Message::builder("orders")
        .key(key.to_string())
        .payload("placed")
        .build()
        .unwrap()
}

/// A settlement of everything at once: each fourth delivered, given up, held, let go.
fn of_all_kinds(relay: &RelayId, owned: &[OwnedShard], records: &[Record]) -> Settlement {
    let mut shards: Vec<ShardSettlement> = owned
        .iter()
        .map(|owned| ShardSettlement::new(owned.shard, owned.epoch))
        .collect();
    for (number, record) in records.iter().enumerate() {
        let part = shards.iter_mut().find(|part| part.shard == record.shard).unwrap();
        let hold = || Hold {
            shard: record.shard,
            scope: HoldScope::Key(record.message.order_key().unwrap()),
            head: record.reference(),
            attempts: 1,
            state: HoldState::Parked,
            reason: "$told".to_owned(),
        };
        match number % 4 {
            0 => part.delivered.push(record.reference()),
            1 => part.dead.push(Death {
                record: record.reference(),
                attempts: 2,
                reason: "$too large".to_owned(),
            }),
            2 => part.holds.push(HoldChange::Put(hold())),
            _ => part.holds.push(HoldChange::Clear(hold().reference())),
        }
    }
    Settlement {
        relay: relay.clone(),
        shards,
    }
}

#[tokio::test]
async fn a_batch_is_at_most_three_finds_and_a_settlement_four_commands_and_the_commit_of_each() {
    for archive in [false, true] {
        let heard = Heard::new(archive).await;
        // Of 50 keys one is hot; a page ends in it, and the ring in all places.
        let mut messages: Vec<Message> = (0..1_000).map(|number| message(number % 50)).collect();
        messages.extend((0..1_000).map(|_| message(7)));
        heard.enqueue(&messages).await;
        let owned = heard.lease().await;
        let mut reader = heard.store.reader().await.unwrap();
        let mut request = FetchRequest {
            shards: owned.clone(),
            max_rows: 150,
            max_bytes: 1 << 30,
            ..FetchRequest::default()
        };
        let mut records = Vec::new();
        for fetches in 0.. {
            assert!(fetches < 100, "reading comes to no end");
            let (fetched, said) = heard.during(reader.fetch(&request)).await;
            let Fetched::Batch { records: batch, more } = fetched.unwrap() else {
                panic!("reset")
            };
            let said = names(&said);
            let (commit, finds) = said.split_last().unwrap();
            assert_eq!(*commit, "commitTransaction");
            assert!(finds.iter().all(|command| *command == "find"), "{said:?}");
            assert!((1..=3).contains(&finds.len()), "{said:?}");
            request
                .in_flight
                .extend(batch.iter().map(|record| (record.shard, record.position)));
            records.extend(batch);
            if !more {
                break;
            }
        }
        assert_eq!(records.len(), messages.len());

        let settlement = of_all_kinds(&heard.relay, &owned, &records);
        let (settled, said) = heard.during(heard.store.settle(&settlement)).await;
        assert_eq!(settled.unwrap().lost, []);
        let said = names(&said);
        let (commit, writes) = said.split_last().unwrap();
        assert_eq!(*commit, "commitTransaction");
        assert!(writes.len() <= 4, "{said:?}");
        // It did what it says.
        let stats = heard.store.stats().await.unwrap();
        assert_eq!((stats.backlog.value(), stats.dead), (1_000, 500));
        assert_eq!(stats.processed.value(), if archive { 500 } else { 0 });
        heard.remove().await;
    }
}

/// Where nothing waits a read is one find.
#[tokio::test]
async fn a_batch_of_nothing_is_one_find_and_its_commit() {
    let heard = Heard::new(false).await;
    let request = FetchRequest {
        shards: heard.lease().await,
        max_rows: 150,
        max_bytes: 1 << 30,
        ..FetchRequest::default()
    };
    let mut reader = heard.store.reader().await.unwrap();
    for _ in 0..3 {
        let (fetched, said) = heard.during(reader.fetch(&request)).await;
        assert!(matches!(fetched.unwrap(), Fetched::Batch { records, more: false } if records.is_empty()));
        assert_eq!(names(&said), ["find", "commitTransaction"]);
    }
    heard.remove().await;
}

/// A snapshot is what one server has, until a commit with a majority says otherwise.
#[tokio::test]
async fn what_is_acted_upon_is_read_in_a_snapshot_that_a_majority_confirms() {
    let heard = Heard::new(false).await;
    heard.enqueue(&[message(1)]).await;
    let owned = heard.lease().await;
    let mut reader = heard.store.reader().await.unwrap();
    let request = FetchRequest {
        shards: owned.clone(),
        max_rows: 10,
        max_bytes: 1 << 20,
        ..FetchRequest::default()
    };
    let subject = Subject::Key(message(1).order_key().unwrap());
    let (_, fetched) = heard.during(reader.fetch(&request)).await;
    let (_, held) = heard.during(heard.store.holds(&owned)).await;
    let (_, stats) = heard.during(heard.store.owners("stats")).await;
    let (_, inspected) = heard
        .during(heard.store.inspection().unwrap().inspect(&subject, 100))
        .await;
    for (said, snapshots) in [(fetched, 1), (held, 1), (stats, 1), (inspected, 2)] {
        let begun = said.iter().filter_map(|command| {
            command.body.get("startTransaction")?;
            command.body.get_document("readConcern").ok()
        });
        let begun: Vec<_> = begun.map(|concern| concern.get_str("level")).collect();
        assert_eq!(begun, vec![Ok("snapshot"); snapshots], "{said:?}");
        let commits = said.iter().filter(|command| command.name == "commitTransaction");
        let commits = commits.map(|commit| commit.body.get_document("writeConcern").unwrap().get_str("w"));
        assert_eq!(
            commits.collect::<Vec<_>>(),
            vec![Ok("majority"); snapshots],
            "{said:?}"
        );
    }
    heard.remove().await;
}

/// Whoever became the primary in between: what a relay is told that it holds is not older than its renewal.
#[tokio::test]
async fn leases_are_read_in_the_session_that_renewed_them() {
    let heard = Heard::new(false).await;
    let lease = || async { heard.lease().await };
    for taking in [true, false] {
        let (held, said) = heard.during(lease()).await;
        assert_eq!(held.len(), 64);
        let read = ["aggregate", "commitTransaction"];
        let expected = match taking {
            true => [&["update"][..], &read, &["update"], &read].concat(),
            false => [&["update"][..], &read].concat(),
        };
        assert_eq!(names(&said), expected);
        let session = said[0].body.get("lsid");
        assert!(session.is_some());
        for command in &said {
            assert_eq!(command.body.get("lsid"), session, "{command:?}");
            let concern = command.body.get_document("readConcern").ok();
            assert_eq!(concern.is_some(), command.name == "aggregate");
            if let Some(concern) = concern {
                assert_eq!(concern.get_str("level"), Ok("snapshot"));
                assert!(concern.get_timestamp("afterClusterTime").is_ok(), "{concern}");
            }
        }
    }
    heard.remove().await;
}

/// More dies at once than fits into a command, which has at most 16 MiB: it is settled in one transaction all the same.
#[tokio::test]
async fn more_can_be_settled_than_fits_into_a_command() {
    let heard = Heard::new(false).await;
    heard.enqueue(&[message(1), message(1)]).await;
    let owned = heard.lease().await;
    let request = FetchRequest {
        shards: owned.clone(),
        max_rows: 10,
        max_bytes: 1 << 20,
        ..FetchRequest::default()
    };
    let fetched = heard.store.reader().await.unwrap().fetch(&request).await;
    let Fetched::Batch { records, .. } = fetched.unwrap() else {
        panic!("reset")
    };
    let part = owned.iter().find(|owned| owned.shard == records[0].shard);
    let mut part = ShardSettlement::new(records[0].shard, part.unwrap().epoch);
    // The first and the last are there; what is not is no error.
    let other = |number| RecordRef {
        position: Position(number),
        id: MessageId::new(),
    };
    let others = (1..170).map(other);
    let all = std::iter::once(records[0].reference())
        .chain(others)
        .chain([records[1].reference()]);
    part.dead = all
        .map(|record| Death {
            record,
            attempts: 1,
            reason: "x".repeat(100_000),
        })
        .collect();
    let settlement = Settlement {
        relay: heard.relay.clone(),
        shards: vec![part],
    };
    let (settled, said) = heard.during(heard.store.settle(&settlement)).await;
    assert_eq!(settled.unwrap().lost, []);
    let said = names(&said);
    assert_eq!(
        said,
        ["update", "update", "update", "update", "commitTransaction"]
    );
    let stats = heard.store.stats().await.unwrap();
    assert_eq!((stats.backlog.value(), stats.dead), (0, 2));
    heard.remove().await;
}
