//! What is said to the server: the names of the collections, and the documents of commands and filters. They are made here
//! alone; what comes with a message is a value in them, never an expression.

use std::time::Duration;

use mongodb::bson::{Bson, Document, RawDocumentBuf, Timestamp, doc};
use mongodb::{Collection, Database};
use outbox_core::{
    Death, HoldChanges, HoldName, HoldRef, Identifier, MessageId, OwnedShard, RecordRef, RelayId, Settlement,
    Shard, ShardSettlement, StoreMillis,
};

use crate::row::{binary, timestamp, uuid};

/// What the collections of one outbox are called.
#[derive(Debug, Clone)]
pub(crate) struct Names(String);

impl Names {
    pub(crate) fn new(prefix: &Identifier) -> Self {
        Self(prefix.to_string())
    }

    pub(crate) fn name(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.0)
    }
}

/// The collections of one outbox.
#[derive(Debug, Clone)]
pub(crate) struct Collections {
    pub(crate) database: Database,
    pub(crate) names: Names,
    limit: Duration,
}

/// The index of what is read: a key's messages are neighbours, in their order.
pub(crate) fn by_flow() -> Document {
    doc! { "shard": 1, "flow": 1, "ts": 1 }
}

/// The index of what is settled.
pub(crate) fn by_place() -> Document {
    doc! { "shard": 1, "ts": 1 }
}

/// The index of the dead letters, in which nothing else has an entry.
pub(crate) fn by_death() -> Document {
    doc! { "dead.ts": 1, "id": 1 }
}

impl Collections {
    pub(crate) fn new(database: Database, prefix: &Identifier, limit: Duration) -> Self {
        Self {
            database,
            names: Names::new(prefix),
            limit,
        }
    }

    fn name(&self, suffix: &str) -> String {
        self.names.name(suffix)
    }

    fn of<T: Send + Sync>(&self, suffix: &str) -> Collection<T> {
        self.database.collection(&self.name(suffix))
    }

    /// Messages: those that wait, the dead ones, and those that are kept.
    pub(crate) fn outbox<T: Send + Sync>(&self) -> Collection<T> {
        self.of("")
    }

    pub(crate) fn scheduled<T: Send + Sync>(&self) -> Collection<T> {
        self.of("_scheduled")
    }

    pub(crate) fn holds(&self) -> Collection<Document> {
        self.of("_hold")
    }

    /// The leases of shards, by their numbers, and the relays that are alive, by their names.
    pub(crate) fn leases(&self) -> Collection<Document> {
        self.of("_lease")
    }

    pub(crate) fn sequence(&self) -> Collection<Document> {
        self.of("_sequence")
    }

    pub(crate) fn inbox(&self) -> Collection<Document> {
        self.of("_inbox")
    }

    pub(crate) fn meta(&self) -> Collection<Document> {
        self.of("_meta")
    }

    /// Deletes what was delivered, unless it is kept in the archive: one command, or a few of very much.
    pub(crate) fn deletion(&self, parts: &[ShardSettlement], archive: bool) -> Vec<Document> {
        let gone = if archive { &[] } else { parts };
        let deletes = gone
            .iter()
            .flat_map(delivered)
            .map(|named| doc! { "q": named, "limit": 0 });
        self.each(deletes, |deletes| {
            doc! { "delete": self.name(""), "deletes": deletes, "maxTimeMS": self.millis() }
        })
    }

    /// Takes out of the flow what died, and with `archive` what was delivered: one command, or a few of very much.
    pub(crate) fn taking_out(&self, parts: &[ShardSettlement], archive: bool) -> Vec<Document> {
        let kept = if archive { parts } else { &[] };
        let kept = kept.iter().flat_map(delivered).map(|named| {
            doc! {
                "q": named,
                "u": [doc! { "$set": { "processed": { "at": "$$NOW" } } }, doc! { "$unset": "shard" }],
                "multi": true,
            }
        });
        let dead = parts.iter().flat_map(|part| {
            let died =
                |death: &Death| doc! { "q": one(part.shard, death.record), "u": died(death), "multi": true };
            part.dead.iter().map(died)
        });
        self.each(kept.chain(dead), |updates| self.updates("", updates))
    }

    /// Writes holds, and marks those that are over, which the server itself deletes later: one command, or a few of very
    /// much.
    pub(crate) fn holding(&self, parts: &[ShardSettlement]) -> Vec<Document> {
        let mut changes = HoldChanges::default();
        for part in parts {
            for change in &part.holds {
                changes.add(part.shard, change);
            }
        }
        let over = changes.cleared().map(|name| {
            doc! { "q": { "_id": hold_id(name) }, "u": [doc! { "$set": { "over": "$$NOW" } }] }
        });
        let put = changes.put().map(|(name, hold)| {
            let (parked, due_in) = hold.state.stored();
            doc! {
                "q": { "_id": hold_id(name) },
                "u": [doc! { "$replaceWith": {
                    "_id": { "$literal": hold_id(name) },
                    "shard": i32::from(hold.shard.0),
                    "head": hold.head.position.0,
                    "head_id": uuid(hold.head.id),
                    "attempts": i64::from(hold.attempts),
                    "parked": parked,
                    "due": later(due_in),
                    "reason": { "$literal": &hold.reason },
                } }],
                "upsert": true,
            }
        });
        self.each(over.chain(put), |updates| self.updates("_hold", updates))
    }

    fn updates(&self, suffix: &str, updates: Vec<Document>) -> Document {
        doc! { "update": self.name(suffix), "updates": updates, "maxTimeMS": self.millis() }
    }

    /// Lets a relay stay alive, and its leases that are not over. One that was given up, and is carried out when a later one
    /// has been, takes nothing back.
    pub(crate) fn renewal(&self, relay: &str, ttl: StoreMillis) -> Document {
        let until = vec![doc! { "$set": { "until": { "$max": ["$until", later(ttl)] } } }];
        let own = doc! { "owner": relay, "$expr": { "$gt": ["$until", "$$NOW"] } };
        let updates = vec![
            doc! { "q": { "_id": relay }, "u": until.clone(), "upsert": true },
            doc! { "q": own, "u": until, "multi": true },
        ];
        doc! {
            "update": self.name("_lease"),
            "updates": updates,
            "writeConcern": { "w": "majority" },
            "maxTimeMS": self.briefly(ttl / 3),
        }
    }

    /// Takes leases that are over. One that another's transaction keeps locked is not waited for long, or the relay would
    /// lose its own meanwhile; those before it are taken.
    pub(crate) fn taking(
        &self,
        relay: &str,
        session: &Document,
        free: impl Iterator<Item = Shard>,
        ttl: StoreMillis,
    ) -> Document {
        let over = doc! { "_id": { "$in": shards(free) }, "$expr": { "$lte": ["$until", "$$NOW"] } };
        let take = vec![doc! { "$set": {
            "owner": { "$literal": relay },
            "epoch": { "$add": ["$epoch", 1_i64] },
            "until": later(ttl),
            "session": { "$literal": session },
        } }];
        doc! {
            "update": self.name("_lease"),
            "updates": [{ "q": over, "u": take, "multi": true }],
            "writeConcern": { "w": "majority" },
            "maxTimeMS": self.briefly(ttl / 10),
        }
    }

    /// Counts up the numbers of keys: one command, or a few of very many.
    pub(crate) fn counting<'k>(&self, keys: impl Iterator<Item = (&'k Document, i64)>) -> Vec<Document> {
        let updates = keys.map(
            |(key, count)| doc! { "q": { "_id": key }, "u": { "$inc": { "last": count } }, "upsert": true },
        );
        self.each(updates, |updates| self.updates("_sequence", updates))
    }

    /// Commands of so many writes each as a command may have; none without writes.
    fn each(
        &self,
        writes: impl Iterator<Item = Document>,
        command: impl Fn(Vec<Document>) -> Document,
    ) -> Vec<Document> {
        let (mut commands, mut together, mut bytes) = (Vec::new(), Vec::new(), 0);
        for write in writes {
            let size = size(&write);
            if !together.is_empty() && (bytes + size > MOST_BYTES || together.len() >= MOST_WRITES) {
                commands.push(command(std::mem::take(&mut together)));
                bytes = 0;
            }
            bytes += size;
            together.push(write);
        }
        if !together.is_empty() {
            commands.push(command(together));
        }
        commands
    }

    fn millis(&self) -> i64 {
        i64::try_from(self.limit.as_millis()).unwrap_or(i64::MAX).max(1)
    }

    /// So long, but no longer than a command may take, and not so short that no server manages it.
    fn briefly(&self, millis: StoreMillis) -> i64 {
        millis.max(100).min(self.millis())
    }
}

/// So many bytes of writes go into a command, which is a document and so has at most 16 MiB.
const MOST_BYTES: usize = 8 << 20;
/// So many writes the server takes in a command.
const MOST_WRITES: usize = 100_000;
/// So many messages are named by a write.
const MOST_NAMED: usize = 50_000;

/// How large it is in a command, its place in the list included.
fn size(write: &Document) -> usize {
    const PLACE: usize = 16;
    // What cannot be encoded is refused when it is sent.
    mongodb::bson::to_vec(write).map_or(PLACE, |bytes| bytes.len() + PLACE)
}

/// What was delivered of a shard, in parts that a write may name.
fn delivered(part: &ShardSettlement) -> impl Iterator<Item = Document> {
    part.delivered
        .chunks(MOST_NAMED)
        .map(|records| named(part.shard, records))
}

/// Messages by position and id. One whose id cannot be read has a position all the same, which no other has.
fn placed(field: &str, records: &[RecordRef]) -> Document {
    let (nameless, named): (Vec<RecordRef>, _) = records.iter().partition(|record| record.id == NAMELESS);
    let places = |records: &[RecordRef]| {
        let places = records.iter().map(|record| timestamp(record.position));
        doc! { "$in": places.map(Bson::Timestamp).collect::<Vec<_>>() }
    };
    let with_ids = || {
        let ids = named.iter().map(|record| Bson::Binary(uuid(record.id)));
        doc! { field: places(&named), "id": { "$in": ids.collect::<Vec<_>>() } }
    };
    match (named.is_empty(), nameless.is_empty()) {
        (_, true) => with_ids(),
        (true, false) => doc! { field: places(&nameless) },
        (false, false) => doc! { "$or": [with_ids(), doc! { field: places(&nameless) }] },
    }
}

/// Stands for an id that cannot be read.
const NAMELESS: MessageId = MessageId::from_bytes([0; 16]);

/// Messages of a shard, by position and id.
fn named(shard: Shard, records: &[RecordRef]) -> Document {
    let mut named = placed("ts", records);
    named.insert("shard", i32::from(shard.0));
    named
}

/// The one message that is named.
pub(crate) fn one(shard: Shard, record: RecordRef) -> Document {
    named(shard, &[record])
}

/// How a message dies: it leaves its shard, and stays where it is.
pub(crate) fn died(death: &Death) -> Vec<Document> {
    vec![
        doc! { "$set": { "dead": {
            "ts": timestamp(death.record.position),
            "attempts": i64::from(death.attempts),
            "reason": { "$literal": &death.reason },
            "at": "$$NOW",
        } } },
        doc! { "$unset": "shard" },
    ]
}

/// All dead letters. Compared, not asked for whether it is there: so the index of the dead tells it without the documents.
pub(crate) fn dead_ones() -> Document {
    doc! { "dead.ts": { "$gt": Timestamp { time: 0, increment: 0 } } }
}

/// Dead letters, by position and id.
pub(crate) fn dead(records: &[RecordRef]) -> Document {
    placed("dead.ts", records)
}

/// Leases of a relay under exactly these epochs.
pub(crate) fn leased(relay: &RelayId, shards: &[OwnedShard]) -> Document {
    let each: Vec<Document> = shards
        .iter()
        .map(|owned| doc! { "_id": i32::from(owned.shard.0), "epoch": owned.epoch.0 })
        .collect();
    doc! { "owner": relay.as_str(), "$or": each }
}

/// The shards of a settlement, and the epochs under which it was made.
pub(crate) fn owned(settlement: &Settlement) -> Vec<OwnedShard> {
    settlement
        .shards
        .iter()
        .map(|part| OwnedShard {
            shard: part.shard,
            epoch: part.epoch,
        })
        .collect()
}

/// What makes a fence of leases: written, because a mere read would not be in a take-over's way, and with another value
/// each time, because a write that changes nothing is none.
pub(crate) fn fence() -> Document {
    doc! { "$inc": { "fence": 1_i64 } }
}

/// So many milliseconds from the server's own time.
pub(crate) fn later(millis: i64) -> Document {
    doc! { "$dateAdd": { "startDate": "$$NOW", "unit": "millisecond", "amount": millis } }
}

/// Adds the server's time to what is read.
pub(crate) fn with_now() -> Document {
    doc! { "$set": { "now": "$$NOW" } }
}

/// What names a hold.
pub(crate) fn hold_id(name: HoldName<'_>) -> Document {
    doc! {
        "shard": i32::from(name.shard.0),
        "scope": name.scope,
        "topic": name.topic,
        "key": binary(name.key.to_vec()),
        "message": name.message,
    }
}

/// A hold that waits for an operator, as its name and its head say.
pub(crate) fn parked(hold: &HoldRef) -> Document {
    doc! {
        "_id": hold_id(HoldName::new(hold.shard, &hold.scope, hold.head)),
        "head": hold.head.position.0,
        "head_id": uuid(hold.head.id),
        "parked": true,
        "over": { "$exists": false },
    }
}

/// What names a key's number.
pub(crate) fn counter(topic: &str, key: &[u8]) -> Document {
    doc! { "topic": topic, "key": binary(key.to_vec()) }
}

/// Shards as the server has them.
pub(crate) fn shards(shards: impl Iterator<Item = Shard>) -> Vec<Bson> {
    shards.map(|shard| Bson::Int32(i32::from(shard.0))).collect()
}

/// Any of all shards: what waits.
pub(crate) fn every_shard(count: u16) -> Vec<Bson> {
    shards((0..count).map(Shard))
}

/// Documents as they came, not taken apart.
pub(crate) type Raw = RawDocumentBuf;

#[cfg(test)]
mod tests {
    use mongodb::Client;
    use outbox_core::{Epoch, Hold, HoldChange, HoldScope, HoldState, OrderKey, Position};

    use super::*;

    async fn collections() -> Collections {
        let client = Client::with_uri_str("mongodb://localhost").await.unwrap();
        let prefix = Identifier::new("outbox").unwrap();
        Collections::new(client.database("shop"), &prefix, Duration::from_millis(50))
    }

    fn records(count: usize) -> Vec<RecordRef> {
        let record = |number: usize| RecordRef {
            position: Position(i64::try_from(number).unwrap()),
            id: MessageId::new(),
        };
        (0..count).map(record).collect()
    }

    /// A part of a settlement as large as a window may be, with the longest reasons and keys.
    fn much() -> ShardSettlement {
        let mut part = ShardSettlement::new(Shard(3), Epoch(1));
        part.delivered = records(200_000);
        let reason = "\u{1f980}".repeat(250);
        let death = |record| Death {
            record,
            attempts: 1,
            reason: reason.clone(),
        };
        part.dead = records(9_000).into_iter().map(death).collect();
        let hold = |head: RecordRef| {
            HoldChange::Put(Hold {
                shard: part.shard,
                scope: HoldScope::Key(OrderKey {
                    topic: "orders".into(),
                    key: format!("{:01024}", head.position.0).into(),
                }),
                head,
                attempts: 1,
                state: HoldState::Parked,
                reason: reason.clone(),
            })
        };
        part.holds = records(4_000).into_iter().map(hold).collect();
        part
    }

    /// Lists of writes, each checked to be one that a server takes.
    fn taken(commands: &[Document], list: &str) -> Vec<Document> {
        let mut all = Vec::new();
        for command in commands {
            let bytes = mongodb::bson::to_vec(command).unwrap().len();
            assert!(bytes < 9 << 20, "a command has {bytes} bytes");
            let writes = command.get_array(list).unwrap();
            assert!(!writes.is_empty() && writes.len() <= 100_000);
            all.extend(writes.iter().map(|write| write.as_document().unwrap().clone()));
        }
        all
    }

    #[tokio::test]
    async fn however_much_is_settled_each_command_is_one_that_a_server_takes() {
        let collections = collections().await;
        let part = [much()];
        let places = |writes: &[Document]| -> usize {
            let named = writes.iter().map(|write| {
                let places = write.get_document("q").unwrap().get_document("ts").unwrap();
                places.get_array("$in").unwrap().len()
            });
            named.sum()
        };
        let deletes = collections.deletion(&part, false);
        assert!(deletes.len() > 1);
        assert_eq!(places(&taken(&deletes, "deletes")), 200_000);
        let died = collections.taking_out(&part, false);
        assert!(died.len() > 1);
        assert_eq!(places(&taken(&died, "updates")), 9_000);
        assert!(collections.deletion(&part, true).is_empty());
        let kept = collections.taking_out(&part, true);
        assert_eq!(places(&taken(&kept, "updates")), 209_000);
        let held = collections.holding(&part);
        assert!(held.len() > 1);
        assert_eq!(taken(&held, "updates").len(), 4_000);
        let few = ShardSettlement {
            delivered: records(2_000),
            dead: part[0].dead[..100].to_vec(),
            ..ShardSettlement::new(Shard(3), Epoch(1))
        };
        assert_eq!(collections.deletion(std::slice::from_ref(&few), false).len(), 1);
        assert_eq!(collections.taking_out(&[few], true).len(), 1);
        let nothing = [ShardSettlement::new(Shard(3), Epoch(1))];
        assert!(collections.holding(&nothing).is_empty() && collections.deletion(&nothing, false).is_empty());
        let keys: Vec<Document> = (0..101_000).map(|_| counter("orders", b"42")).collect();
        let counted = collections.counting(keys.iter().map(|key| (key, 1)));
        assert_eq!(taken(&counted, "updates").len(), 101_000);
    }

    /// A server that carries a command out late does nobody a service. No limit is beyond that of all commands, however short.
    #[tokio::test]
    async fn the_commands_of_a_lease_are_limited_by_its_time() {
        let mut collections = collections().await;
        let limits = |collections: &Collections, ttl| {
            let renewal = collections.renewal("relay", ttl);
            let taking = collections.taking("relay", &doc! {}, std::iter::empty(), ttl);
            [renewal, taking].map(|command| command.get_i64("maxTimeMS").unwrap())
        };
        assert_eq!(limits(&collections, 10_000), [50, 50]);
        collections.limit = Duration::from_secs(30);
        assert_eq!(limits(&collections, 30_000), [10_000, 3_000]);
        assert_eq!(limits(&collections, 100), [100, 100]);
        assert_eq!(limits(&collections, StoreMillis::MAX), [30_000, 30_000]);
    }
}
