//! A store of your own: what each method must do, in its simplest correct form.
//!
//! The rows are in a `Mutex` here; with a database each critical section is one transaction. What is not the store's
//! business comes from the framework: who may have which shard ([`LeaseTable`]), whose settlement counts
//! ([`Settlement::fence`]), what may be read ([`FetchRequest::admits`]). `tests/custom_store.rs` proves it with the
//! conformance suite.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use outbox::{
    Capabilities, Count, DeadLetters, Error, ErrorKind, FetchRequest, Fetched, Hold, HoldChange, HoldScope,
    HoldState, Inspection, LeaseRequest, LeaseTable, Leases, Limits, Membership, MemorySink, Message,
    Ordering, OutboxStore, OwnedShard, Parking, Parts, Position, Reader, Record, Relay, RelayId, Result,
    Retention, Scheduled, Settled, Settlement, Shard, Stats, StoreMillis, WakeUp, shard_of,
};

const SHARDS: u16 = 4;

/// The store. Clones share the rows, as connections share a database.
#[derive(Debug, Clone)]
pub(crate) struct MyStore {
    tables: Arc<Mutex<Tables>>,
    /// A store needs a clock of its own: leases are in the database's time, never in a relay's.
    start: Instant,
}

#[derive(Debug)]
struct Tables {
    leases: LeaseTable,
    next: i64,
    outbox: BTreeMap<Position, Row>,
    /// With the time at which each is due; none is parked.
    holds: Vec<(Hold, Option<StoreMillis>)>,
}

#[derive(Debug)]
struct Row {
    shard: Shard,
    message: Message,
    enqueued: SystemTime,
}

impl Default for MyStore {
    fn default() -> Self {
        let tables = Tables {
            leases: LeaseTable::new(SHARDS),
            next: 1,
            outbox: BTreeMap::new(),
            holds: Vec::new(),
        };
        Self {
            tables: Arc::new(Mutex::new(tables)),
            start: Instant::now(),
        }
    }
}

impl MyStore {
    /// Enqueues messages in a producer's transaction, all or none. What cannot be kept is refused here, where the
    /// producer can still react.
    pub(crate) fn enqueue(tx: &mut Vec<Message>, messages: &[Message]) -> Result<()> {
        for message in messages {
            Limits::default().check(message)?;
            if message.deliver_at().is_some() {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "enqueue",
                    "this store delivers at once",
                ));
            }
        }
        tx.extend_from_slice(messages);
        Ok(())
    }

    /// Commits them. Their positions are drawn here, all at once, so commit order is position order.
    pub(crate) fn commit(&self, tx: Vec<Message>) {
        let mut tables = self.tables();
        for message in tx {
            let position = Position(tables.next);
            tables.next += 1;
            let shard = shard_of(message.key().map(AsRef::as_ref), message.id(), SHARDS);
            tables.outbox.insert(
                position,
                Row {
                    shard,
                    message,
                    enqueued: SystemTime::now(),
                },
            );
        }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> StoreMillis {
        outbox::millis(self.start.elapsed())
    }
}

#[async_trait]
impl OutboxStore for MyStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "mine",
            shards: SHARDS,
            ordering: Ordering::Insert,
            keys: true,
            fixed_topic: None,
            headers: true,
            content_types: true,
            tombstones: true,
            any_bytes: true,
            message_ids: true,
        }
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        Ok(self.tables().leases.lease(request, self.now()))
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        self.tables().leases.release(relay, shards, membership);
        Ok(())
    }

    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>> {
        let now = self.now();
        let tables = self.tables();
        let asked = tables
            .holds
            .iter()
            .filter(|(hold, _)| shards.iter().any(|owned| owned.shard == hold.shard));
        Ok(asked
            .map(|(hold, due)| {
                let left =
                    due.map(|due| Duration::from_millis(due.saturating_sub(now).max(0).unsigned_abs()));
                let state = left.map_or(HoldState::Parked, |due_in| HoldState::Retrying { due_in });
                Hold {
                    state,
                    ..hold.clone()
                }
            })
            .collect())
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        Ok(Box::new(MyReader(self.clone())))
    }

    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        if settlement.shards.iter().any(|part| !part.dead.is_empty()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "settle",
                "this store keeps no dead letters",
            ));
        }
        let mut tables = self.tables();
        let now = self.now();
        // Nobody can take a shard over between this look and the end of the critical section.
        let (kept, lost) = settlement.fence(&tables.leases.held_by(&settlement.relay, now));
        for part in kept {
            for record in &part.delivered {
                // By shard, position and id; what is not there any more was settled before.
                let row = tables.outbox.get(&record.position);
                if row.is_some_and(|row| row.shard == part.shard && row.message.id() == record.id) {
                    tables.outbox.remove(&record.position);
                }
            }
            for change in &part.holds {
                let named = match change {
                    HoldChange::Put(hold) => hold.reference(),
                    HoldChange::Clear(named) => named.clone(),
                };
                tables.holds.retain(|(hold, _)| {
                    hold.shard != named.shard
                        || hold.scope != named.scope
                        || (hold.scope == HoldScope::Message && hold.head.position != named.head.position)
                });
                if let HoldChange::Put(hold) = change {
                    let due = match hold.state {
                        HoldState::Retrying { due_in } => Some(now.saturating_add(outbox::millis(due_in))),
                        HoldState::Parked => None,
                    };
                    tables.holds.push((hold.clone(), due));
                }
            }
        }
        Ok(Settled { lost })
    }

    async fn stats(&self) -> Result<Stats> {
        let now = self.now();
        let tables = self.tables();
        let parked = tables.holds.iter().filter(|(_, due)| due.is_none()).count() as u64;
        let oldest = tables.outbox.values().next();
        Ok(Stats {
            backlog: Count::Exact(tables.outbox.len() as u64),
            oldest_age: oldest.map(|row| row.enqueued.elapsed().unwrap_or_default()),
            retrying: tables.holds.len() as u64 - parked,
            parked,
            dead: 0,
            scheduled: 0,
            processed: Count::Exact(0),
            leases: tables.leases.status(now),
            relays: tables.leases.relays(now),
        })
    }

    // Powers that this store does not have. Without dead letters, what cannot be delivered parks its key.
    fn dead_letters(&self) -> Option<&dyn DeadLetters> {
        None
    }

    fn scheduled(&self) -> Option<&dyn Scheduled> {
        None
    }

    fn retention(&self) -> Option<&dyn Retention> {
        None
    }

    fn parking(&self) -> Option<&dyn Parking> {
        None
    }

    fn inspection(&self) -> Option<&dyn Inspection> {
        None
    }

    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        None
    }
}

/// The simple reader, correct by construction: undelivered, of my shards, not in flight, not held, oldest first.
#[derive(Debug)]
struct MyReader(MyStore);

#[async_trait]
impl Reader for MyReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        let (mut records, mut bytes) = (Vec::new(), 0);
        for (
            position,
            Row {
                shard,
                message,
                enqueued,
            },
        ) in &self.0.tables().outbox
        {
            let topic = message.topic().into();
            if !request.admits(*shard, *position, &topic, message.order_key().as_ref()) {
                continue;
            }
            bytes += message.size();
            // One always passes, or a large message would never go.
            if records.len() == request.max_rows || (bytes > request.max_bytes && !records.is_empty()) {
                return Ok(Fetched::Batch { records, more: true });
            }
            let parts = Parts {
                created_at: Some(*enqueued),
                ..message.clone().into_parts()
            };
            let message = Message::from_stored(parts);
            records.push(Record {
                shard: *shard,
                position: *position,
                key_seq: None,
                attempts: 0,
                message,
                defect: None,
            });
        }
        Ok(Fetched::Batch { records, more: false })
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let store = MyStore::default();
    let mut tx = Vec::new();
    let message = Message::builder("orders").key("42").payload("placed").build()?;
    MyStore::enqueue(&mut tx, &[message])?;
    store.commit(tx);
    let sink = MemorySink::default();
    Relay::new(Arc::new(store), Box::new(sink.clone()))
        .drain(std::future::pending())
        .await?;
    println!("delivered: {}", sink.delivered().len());
    Ok(())
}
