//! What is said to the server: the names of the collections, and the documents of commands and filters. They are made here
//! alone; what comes with a message is a value in them, never an expression.

use std::time::Duration;

use mongodb::bson::{Bson, Document, RawDocumentBuf, doc};
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

    /// Deletes what was delivered: one command, whatever it is.
    pub(crate) fn deletion(&self, parts: &[ShardSettlement]) -> Option<Document> {
        let deletes: Vec<Document> = parts
            .iter()
            .filter(|part| !part.delivered.is_empty())
            .map(|part| doc! { "q": named(part.shard, &part.delivered), "limit": 0 })
            .collect();
        (!deletes.is_empty())
            .then(|| doc! { "delete": self.name(""), "deletes": deletes, "maxTimeMS": self.millis() })
    }

    /// Takes out of the flow what died, and with `archive` what was delivered: one command, whatever it is.
    pub(crate) fn taking_out(&self, parts: &[ShardSettlement], archive: bool) -> Option<Document> {
        let mut updates = Vec::new();
        for part in parts {
            if archive && !part.delivered.is_empty() {
                updates.push(doc! {
                    "q": named(part.shard, &part.delivered),
                    "u": [doc! { "$set": { "processed": { "at": "$$NOW" } } }, doc! { "$unset": "shard" }],
                    "multi": true,
                });
            }
            for death in &part.dead {
                updates.push(doc! {
                    "q": named(part.shard, &[death.record]),
                    "u": died(death),
                    "multi": true,
                });
            }
        }
        (!updates.is_empty())
            .then(|| doc! { "update": self.name(""), "updates": updates, "maxTimeMS": self.millis() })
    }

    /// Writes holds, and marks those that are over, which the server itself deletes later: one command, whatever it is.
    pub(crate) fn holding(&self, parts: &[ShardSettlement]) -> Option<Document> {
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
        let updates: Vec<Document> = over.chain(put).collect();
        (!updates.is_empty())
            .then(|| doc! { "update": self.name("_hold"), "updates": updates, "maxTimeMS": self.millis() })
    }

    /// Lets a relay stay alive, and its leases that are not over.
    pub(crate) fn renewal(&self, relay: &str, until: &Document) -> Document {
        let until = vec![doc! { "$set": { "until": until } }];
        let own = doc! { "owner": relay, "$expr": { "$gt": ["$until", "$$NOW"] } };
        let updates = vec![
            doc! { "q": { "_id": relay }, "u": until.clone(), "upsert": true },
            doc! { "q": own, "u": until, "multi": true },
        ];
        doc! {
            "update": self.name("_lease"),
            "updates": updates,
            "writeConcern": { "w": "majority" },
            "maxTimeMS": self.millis(),
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
            "maxTimeMS": (ttl / 10).clamp(100, self.millis()),
        }
    }

    /// Counts up the numbers of keys: one command, whatever it is.
    pub(crate) fn counting<'k>(&self, keys: impl Iterator<Item = (&'k Document, i64)>) -> Document {
        let updates: Vec<Document> = keys
            .map(|(key, count)| doc! { "q": { "_id": key }, "u": { "$inc": { "last": count } }, "upsert": true })
            .collect();
        doc! { "update": self.name("_sequence"), "updates": updates, "maxTimeMS": self.millis() }
    }

    fn millis(&self) -> i64 {
        i64::try_from(self.limit.as_millis()).unwrap_or(i64::MAX)
    }
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
