//! How many commands a batch and a settlement take, counted by the driver.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use mongodb::Client;
use mongodb::event::EventHandler;
use mongodb::event::command::CommandEvent;
use outbox_core::{
    Death, FetchRequest, Fetched, Hold, HoldChange, HoldScope, HoldState, LeaseRequest, Message, OutboxStore,
    OwnedShard, Record, RelayId, Settlement, ShardSettlement,
};

use crate::config::MongoConfig;
use crate::enqueue::MongoOutbox;
use crate::schema::migrate;
use crate::session::Sessions;
use crate::store::MongoStore;

/// A store whose commands are counted, in a database of its own.
struct Counted {
    store: MongoStore,
    outbox: MongoOutbox,
    client: Client,
    commands: Arc<Mutex<Vec<String>>>,
    relay: RelayId,
}

impl Counted {
    async fn new(archive: bool) -> Self {
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
                heard.lock().unwrap().push(started.command_name);
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

    async fn enqueue(&self, messages: &[Message]) {
        let mut session = self.client.start_session().await.unwrap();
        session.start_transaction().await.unwrap();
        self.outbox.enqueue_many(&mut session, messages).await.unwrap();
        session.commit_transaction().await.unwrap();
    }

    async fn lease(&self) -> Vec<OwnedShard> {
        let request = LeaseRequest {
            relay: self.relay.clone(),
            want: 64,
            ttl: Duration::from_secs(60),
        };
        self.store.lease(&request).await.unwrap().held
    }

    /// What was said to the server meanwhile.
    async fn during<T>(&self, work: impl Future<Output = T>) -> (T, Vec<String>) {
        self.commands.lock().unwrap().clear();
        let done = work.await;
        let said = self.commands.lock().unwrap().clone();
        (done, said)
    }

    async fn remove(self) {
        self.store.sessions.collections.database.drop().await.unwrap();
    }
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
async fn a_batch_is_at_most_three_finds_and_a_settlement_four_commands_and_the_commit() {
    for archive in [false, true] {
        let counted = Counted::new(archive).await;
        // Of 50 keys one is hot; a page ends in it, and the ring in all places.
        let mut messages: Vec<Message> = (0..1_000).map(|number| message(number % 50)).collect();
        messages.extend((0..1_000).map(|_| message(7)));
        counted.enqueue(&messages).await;
        let owned = counted.lease().await;
        let mut reader = counted.store.reader().await.unwrap();
        let mut request = FetchRequest {
            shards: owned.clone(),
            max_rows: 150,
            max_bytes: 1 << 30,
            ..FetchRequest::default()
        };
        let mut records = Vec::new();
        for fetches in 0.. {
            assert!(fetches < 100, "reading comes to no end");
            let (fetched, said) = counted.during(reader.fetch(&request)).await;
            let Fetched::Batch { records: batch, more } = fetched.unwrap() else {
                panic!("reset")
            };
            // The end of the snapshot, of which nobody waits for an answer, may be heard at any time.
            let finds: Vec<_> = said
                .iter()
                .filter(|command| *command != "abortTransaction")
                .collect();
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

        let settlement = of_all_kinds(&counted.relay, &owned, &records);
        let (settled, said) = counted.during(counted.store.settle(&settlement)).await;
        assert_eq!(settled.unwrap().lost, []);
        let said: Vec<_> = said
            .into_iter()
            .filter(|command| command != "abortTransaction")
            .collect();
        let (commit, writes) = said.split_last().unwrap();
        assert_eq!(commit, "commitTransaction");
        assert!(writes.len() <= 4, "{said:?}");
        // It did what it says.
        let stats = counted.store.stats().await.unwrap();
        assert_eq!((stats.backlog.value(), stats.dead), (1_000, 500));
        assert_eq!(stats.processed.value(), if archive { 500 } else { 0 });
        counted.remove().await;
    }
}
