//! The model's sinks, and the topic log behind them with its law.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::store::Row;
use super::{Relay, World};
use crate::fetch::Record;
use crate::message::{MessageId, OrderKey};
use crate::relay::machine::{BatchId, Event};
use crate::shard::Position;
use crate::sink::Outcome;

#[derive(Debug, Default)]
pub(super) struct Sink {
    pub(super) queue: VecDeque<Item>,
    /// Open receipts: outcomes so far, and keys that failed in them.
    pub(super) open: BTreeMap<BatchId, Receipt>,
    /// The batch that it has not said to have taken over.
    handing: Option<BatchId>,
    /// The sink as a whole failed: nothing goes until it is purged.
    pub(super) dead: Option<Outcome>,
}

#[derive(Debug)]
pub(super) struct Receipt {
    outcomes: Vec<Option<Outcome>>,
    failed: BTreeSet<OrderKey>,
}

#[derive(Debug)]
pub(super) struct Item {
    batch: BatchId,
    index: usize,
    pub(super) record: Record,
    /// A predecessor of its key failed in a receipt that was open when it was handed over.
    pub(super) skip: bool,
}

/// What consumers see.
#[derive(Debug, Default)]
pub(super) struct Log {
    high: BTreeMap<OrderKey, u64>,
    pub(super) seen: BTreeSet<MessageId>,
    pub(super) committed: BTreeMap<MessageId, (Position, Row)>,
    pub(super) deliveries: u64,
}

impl Log {
    /// The law: only what was committed, and of each key no step further than the next.
    pub(super) fn deliver(&mut self, record: &Record) -> Result<(), String> {
        self.deliveries += 1;
        let id = record.message.id();
        let Some((_, row)) = self.committed.get(&id) else {
            return Err(format!("{id} was delivered and never committed"));
        };
        if row.defect {
            return Err(format!("{id} was delivered though it makes no sense"));
        }
        self.seen.insert(id);
        if let (Some(key), Some(n)) = (row.message.order_key(), row.n) {
            let high = self.high.entry(key.clone()).or_default();
            if n > *high + 1 {
                return Err(format!("{key}: {n} was delivered after {high}"));
            }
            *high = (*high).max(n);
        }
        Ok(())
    }

    /// Buried: as good as seen. It may have been in doubt before, so it need not be the next.
    pub(super) fn count_as_seen(&mut self, row: &Row) {
        if let (Some(key), Some(n)) = (row.message.order_key(), row.n) {
            let high = self.high.entry(key).or_default();
            *high = (*high).max(n);
        }
    }
}

impl World {
    pub(super) fn publish(&mut self, relay: &mut Relay, batch: BatchId, records: Vec<Record>) {
        let receipt = Receipt {
            outcomes: vec![None; records.len()],
            failed: BTreeSet::new(),
        };
        for (index, record) in records.into_iter().enumerate() {
            let key = record.message.order_key();
            let skip = key.is_some_and(|key| relay.sink.open.values().any(|open| open.failed.contains(&key)));
            relay.sink.queue.push_back(Item {
                batch,
                index,
                record,
                skip,
            });
        }
        relay.sink.open.insert(batch, receipt);
        relay.sink.handing = Some(batch);
    }

    /// The sink does something with the first of what it has, or says that it took a batch over.
    pub(super) fn sink_progress(&mut self, relay: &mut Relay) {
        if (relay.sink.queue.is_empty() || self.random.bool())
            && let Some(batch) = relay.sink.handing.take()
        {
            relay.events.push(Event::Accepted { batch });
            self.finish(relay, batch);
            return;
        }
        let Some(item) = relay.sink.queue.pop_front() else {
            return;
        };
        let outcome = self.outcome(&relay.sink, &item);
        trace!(self, "{} sink: {} {:?}", relay.id, item.record.position, outcome);
        if outcome == Outcome::Delivered {
            self.deliver(&item.record);
        }
        if matches!(
            outcome,
            Outcome::Outage(_) | Outcome::Unknown(_) | Outcome::Broken(_)
        ) {
            self.faults += 1;
            relay.sink.dead.get_or_insert_with(|| outcome.clone());
        }
        let failed = !matches!(outcome, Outcome::Delivered | Outcome::Poison(_))
            || (outcome != Outcome::Delivered && self.stops_key);
        if failed && let Some(key) = item.record.message.order_key() {
            for later in &mut relay.sink.queue {
                later.skip |= later.record.message.order_key().as_ref() == Some(&key);
            }
            if let Some(receipt) = relay.sink.open.get_mut(&item.batch) {
                receipt.failed.insert(key);
            }
        }
        if let (Outcome::Poison(_), false, false) = (&outcome, self.stops_key, self.park)
            && let Some((_, row)) = self.log.committed.get(&item.record.message.id()).cloned()
        {
            // Such a sink delivers what follows a refused message at once: refused is as good as buried.
            self.log.count_as_seen(&row);
        }
        if let Some(receipt) = relay.sink.open.get_mut(&item.batch) {
            receipt.outcomes[item.index] = Some(outcome);
        }
        if relay.sink.handing != Some(item.batch) {
            self.finish(relay, item.batch);
        }
    }

    /// Tells the outcomes of a batch when all are known. It stays open until the relay has heard them.
    fn finish(&mut self, relay: &mut Relay, batch: BatchId) {
        if let Some(receipt) = relay.sink.open.get(&batch)
            && receipt.outcomes.iter().all(Option::is_some)
        {
            let outcomes = receipt.outcomes.iter().flatten().cloned().collect();
            relay.events.push(Event::Outcomes {
                batch,
                outcomes: Some(outcomes),
            });
        }
    }

    fn outcome(&mut self, sink: &Sink, item: &Item) -> Outcome {
        if let Some(dead) = &sink.dead {
            return dead.clone();
        }
        if item.skip {
            return Outcome::Skipped;
        }
        if self.blocked.contains(item.record.message.topic()) {
            return Outcome::TopicBlocked("forbidden".into());
        }
        if !self.rough {
            return Outcome::Delivered;
        }
        let among = if self.shaky { 40 } else { 100 };
        match self.random.u8(..among) {
            0..4 => Outcome::Poison("poison".into()),
            4..12 if self.stops_key => Outcome::Retry("later".into()),
            12 => Outcome::Outage("down".into()),
            13 => {
                // Written, and nobody knows.
                if self.random.bool() {
                    self.deliver(&item.record);
                }
                Outcome::Unknown("no answer".into())
            }
            14 => Outcome::Broken("fatal".into()),
            _ => Outcome::Delivered,
        }
    }

    pub(super) fn purge(&mut self, relay: &mut Relay) {
        // Of what is under way a prefix may have been written.
        let written = self.random.usize(..=relay.sink.queue.len());
        let dead = relay.sink.dead.take().is_some();
        for (index, item) in std::mem::take(&mut relay.sink.queue).into_iter().enumerate() {
            if index < written && !dead && !item.skip && !self.blocked.contains(item.record.message.topic()) {
                self.deliver(&item.record);
            }
        }
        if let Some(batch) = relay.sink.handing.take() {
            // The hand-over is given up half-way: there is no receipt, and nobody knows.
            self.reach("hand-over given up");
            relay.sink.open.remove(&batch);
            relay.events.push(Event::Outcomes {
                batch,
                outcomes: None,
            });
        }
        for (batch, receipt) in &mut relay.sink.open {
            if receipt.outcomes.iter().any(Option::is_none) {
                let outcomes = receipt.outcomes.iter_mut().map(|outcome| {
                    outcome
                        .get_or_insert_with(|| Outcome::Unknown("purged".into()))
                        .clone()
                });
                relay.events.push(Event::Outcomes {
                    batch: *batch,
                    outcomes: Some(outcomes.collect()),
                });
            }
        }
    }

    fn deliver(&mut self, record: &Record) {
        if let Err(what) = self.log.deliver(record) {
            self.fail(&what);
        }
    }
}
