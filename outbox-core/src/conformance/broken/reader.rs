//! Readers with one flaw each: everything that is eligible, and then the mistake.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use async_trait::async_trait;

use super::flaw::StoreFlaw;
use super::store::Shared;
use crate::error::Result;
use crate::fetch::{FetchRequest, Fetched, Held, Record, Reread};
use crate::memory::MemoryStore;
use crate::message::{Message, OrderKey};
use crate::shard::{Epoch, OwnedShard, Position, Shard};
use crate::store::{OutboxStore, Reader};

#[derive(Debug)]
pub(super) struct FlawedReader {
    inner: Box<dyn Reader>,
    store: MemoryStore,
    flaw: StoreFlaw,
    shared: Arc<Shared>,
    /// Up to where each shard was read.
    cursors: HashMap<OwnedShard, Position>,
    /// What was returned, and is not wanted again.
    returned: HashSet<(OwnedShard, Position)>,
    /// Whether the last batch was cut off by a limit.
    was_cut: bool,
}

#[async_trait]
impl Reader for FlawedReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        let mut records = self.eligible(request).await?;
        match self.flaw {
            StoreFlaw::PositionCursor | StoreFlaw::CursorToMaximum => {
                self.rewind(&request.reread);
                records.retain(|record| {
                    let cursor = self.cursors.get(&owned(request, record.shard));
                    cursor.is_none_or(|cursor| record.position > *cursor)
                });
            }
            StoreFlaw::TwoSnapshots => {
                records.truncate(request.max_rows.div_ceil(2));
                let last = records.last().map_or(Position::MIN, |record| record.position);
                tokio::time::sleep(Duration::from_millis(5)).await;
                let second = self.eligible(request).await?;
                records.extend(second.into_iter().filter(|record| record.position > last));
            }
            StoreFlaw::CursorSurvivesLoss | StoreFlaw::RereadIgnored => {
                if self.flaw == StoreFlaw::CursorSurvivesLoss {
                    for reread in &request.reread {
                        self.returned
                            .retain(|(own, position)| own.shard != reread.shard || *position < reread.from);
                    }
                }
                records.retain(|record| {
                    !self
                        .returned
                        .contains(&(self.name(request, record), record.position))
                });
            }
            StoreFlaw::PassedOverForgotten => {
                for reread in &request.reread {
                    self.returned
                        .retain(|(own, position)| own.shard != reread.shard || *position < reread.from);
                }
                records.retain(|record| {
                    !self
                        .returned
                        .contains(&(self.name(request, record), record.position))
                });
                let mut all = request.clone();
                all.held = Arc::new(Held::default());
                for record in self.eligible(&all).await? {
                    let key = record.message.order_key();
                    if request.held.holds(
                        record.shard,
                        record.position,
                        &record.message.topic().into(),
                        key.as_ref(),
                    ) {
                        self.returned
                            .insert((owned(request, record.shard), record.position));
                    }
                }
            }
            StoreFlaw::RowClaims => {
                let claims = self.shared.claims.lock().unwrap();
                records.retain(|record| !claims.contains(&record.position));
                records.reverse();
            }
            StoreFlaw::KeylessNull if !request.held.keys.is_empty() => {
                records.retain(|record| record.message.key().is_some());
            }
            StoreFlaw::HoldForgetsTopic => records.retain(|record| {
                let key = record.message.key();
                !request.held.keys.iter().any(|(_, held)| Some(&held.key) == key)
            }),
            StoreFlaw::NewestFirst => records = newest_first(records),
            StoreFlaw::EmptyTooEarly if self.was_cut => records.clear(),
            _ => {}
        }
        let (mut records, more) = self.cut(records, request);
        self.remember(request, &records, more).await;
        for record in &mut records {
            match self.flaw {
                StoreFlaw::GapOnRollback => {
                    let rollbacks = self.shared.rollbacks.load(SeqCst);
                    record.key_seq = record.key_seq.map(|number| number + rollbacks);
                }
                StoreFlaw::PositionIsNumber => record.key_seq = record.key_seq.map(|_| record.position.0),
                StoreFlaw::NumberKept => {
                    let mut numbers = self.shared.numbers.lock().unwrap();
                    record.key_seq = *numbers.entry(record.message.id()).or_insert(record.key_seq);
                }
                StoreFlaw::NumbersEverything => record.key_seq = Some(record.position.0),
                StoreFlaw::ProducerClock => {
                    let mut parts = record.message.clone().into_parts();
                    let times = self.shared.times.lock().unwrap();
                    parts.created_at = times.get(&parts.id).copied().or(parts.created_at);
                    record.message = Message::from_stored(parts);
                }
                _ => {}
            }
        }
        Ok(Fetched::Batch { records, more })
    }
}

impl FlawedReader {
    pub(super) fn new(
        inner: Box<dyn Reader>,
        store: MemoryStore,
        flaw: StoreFlaw,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            inner,
            store,
            flaw,
            shared,
            cursors: HashMap::new(),
            returned: HashSet::new(),
            was_cut: false,
        }
    }

    /// All that may be returned, without limits; flawed in what may.
    async fn eligible(&mut self, request: &FetchRequest) -> Result<Vec<Record>> {
        let mut wide = request.clone();
        (wide.max_rows, wide.max_bytes) = (usize::MAX, usize::MAX);
        match self.flaw {
            StoreFlaw::HoldIgnored => wide.held = Arc::new(Held::default()),
            StoreFlaw::InFlightReturned => wide.in_flight.clear(),
            StoreFlaw::OtherShards => {
                wide.shards = (0..self.store.capabilities().shards)
                    .map(|shard| OwnedShard {
                        shard: Shard(shard),
                        epoch: Epoch(0),
                    })
                    .collect();
            }
            _ => {}
        }
        match self.inner.fetch(&wide).await? {
            Fetched::Batch { records, .. } => Ok(records),
            Fetched::Reset { .. } => Ok(Vec::new()),
        }
    }

    fn cut(&self, mut records: Vec<Record>, request: &FetchRequest) -> (Vec<Record>, bool) {
        let all = records.len();
        records.truncate(request.max_rows);
        if self.flaw != StoreFlaw::BytesIgnored {
            let mut bytes = 0;
            let fits = |record: &Record| {
                bytes += record.message.size();
                bytes <= request.max_bytes
            };
            let fitting = records.iter().map(fits).take_while(|fits| *fits).count();
            let least = usize::from(self.flaw != StoreFlaw::LargeRecordStuck);
            records.truncate(fitting.max(least));
        }
        let more = records.len() < all && !records.is_empty();
        (records, more)
    }

    async fn remember(&mut self, request: &FetchRequest, records: &[Record], more: bool) {
        self.was_cut = more;
        for record in records {
            self.cursors.insert(owned(request, record.shard), record.position);
            self.returned
                .insert((self.name(request, record), record.position));
        }
        if self.flaw == StoreFlaw::RowClaims {
            let positions = records.iter().map(|record| record.position);
            self.shared.claims.lock().unwrap().extend(positions);
        }
        if self.flaw == StoreFlaw::CursorToMaximum && !more {
            tokio::time::sleep(Duration::from_millis(1)).await;
            if let Some(last) = self.store.pending().last() {
                for owned in &request.shards {
                    let cursor = self.cursors.entry(*owned).or_insert(last.position);
                    *cursor = (*cursor).max(last.position);
                }
            }
        }
    }

    fn rewind(&mut self, rereads: &[Reread]) {
        for Reread { shard, from, .. } in rereads {
            for (owned, cursor) in &mut self.cursors {
                if owned.shard == *shard {
                    *cursor = (*cursor).min(Position(from.0.saturating_sub(1)));
                }
            }
        }
    }

    /// Under which name a record was returned: a cursor that survives the loss of a shard forgets the epoch.
    fn name(&self, request: &FetchRequest, record: &Record) -> OwnedShard {
        match self.flaw {
            StoreFlaw::CursorSurvivesLoss => OwnedShard {
                shard: record.shard,
                epoch: Epoch(0),
            },
            _ => owned(request, record.shard),
        }
    }
}

/// The shard with the epoch of the request.
fn owned(request: &FetchRequest, shard: Shard) -> OwnedShard {
    let found = request.shards.iter().copied().find(|owned| owned.shard == shard);
    found.unwrap_or(OwnedShard {
        shard,
        epoch: Epoch(0),
    })
}

/// The same records, those of the keys with the newest ones first.
fn newest_first(records: Vec<Record>) -> Vec<Record> {
    let mut groups: BTreeMap<(Option<OrderKey>, Option<Position>), Vec<Record>> = BTreeMap::new();
    for record in records {
        let key = record.message.order_key();
        let alone = key.is_none().then_some(record.position);
        groups.entry((key, alone)).or_default().push(record);
    }
    let mut groups: Vec<_> = groups.into_values().collect();
    groups.sort_by_key(|group| Reverse(group.last().map(|record| record.position)));
    groups.into_iter().flatten().collect()
}
