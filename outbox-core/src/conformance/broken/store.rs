//! Stores with one flaw each.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;

use super::flaw::StoreFlaw;
use super::reader::FlawedReader;
use crate::conformance::StoreHarness;
use crate::dead::{DeadLetter, DeadLetterQuery, DeadLetters};
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::RecordRef;
use crate::headers::Headers;
use crate::hold::{Hold, HoldChange, HoldRef, HoldScope, Parking};
use crate::inspect::{Facts, Inspection, Place, Subject};
use crate::lease::{LeaseRequest, Leases, Membership, RelayId, millis};
use crate::memory::{MemoryConfig, MemoryStore, MemoryTransaction};
use crate::message::{Message, MessageId};
use crate::retention::Retention;
use crate::scheduled::{Promotion, Scheduled};
use crate::settle::{Settled, Settlement, ShardSettlement};
use crate::shard::{OwnedShard, Position};
use crate::store::{Capabilities, Count, Ordering, OutboxStore, Reader, Stats};
use crate::wake::WakeUp;

tokio::task_local! {
    static FLAW: StoreFlaw;
}

/// Runs a future, in which every [`BrokenStore`] has this flaw.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use outbox_core::conformance::broken::{BrokenStore, StoreFlaw, with_store_flaw};
/// use outbox_core::conformance::prove_store;
///
/// // A store whose fence is only read still leaves nothing behind a rollback.
/// with_store_flaw(StoreFlaw::EpochOnlyRead, prove_store::<BrokenStore>("rollback_leaves_nothing")).await;
/// # }
/// ```
pub async fn with_store_flaw<F: Future>(flaw: StoreFlaw, future: F) -> F::Output {
    FLAW.scope(flaw, future).await
}

/// A store with the flaw that [`with_store_flaw`] says, and its harness.
///
/// ```
/// use outbox_core::OutboxStore;
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use outbox_core::conformance::StoreHarness;
/// use outbox_core::conformance::broken::{BrokenStore, StoreFlaw, with_store_flaw};
///
/// let harness = with_store_flaw(StoreFlaw::HoldIgnored, BrokenStore::fresh()).await;
/// assert!(harness.store().capabilities().keys);
/// # }
/// ```
pub struct BrokenStore {
    inner: MemoryStore,
    flaw: StoreFlaw,
    shared: Arc<Shared>,
}

/// What all handles of a broken store have in common.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// How far the clock of the next handle is ahead, in hours.
    handles: AtomicI64,
    /// Rows that somebody has claimed.
    pub(super) claims: Mutex<HashSet<Position>>,
    /// How many transactions were rolled back.
    pub(super) rollbacks: AtomicI64,
    /// The ids that were enqueued.
    ids: Mutex<HashSet<MessageId>>,
    /// The number that each message was first returned with.
    pub(super) numbers: Mutex<HashMap<MessageId, Option<i64>>>,
    /// What producers said of the time.
    pub(super) times: Mutex<HashMap<MessageId, SystemTime>>,
}

#[async_trait]
impl StoreHarness for BrokenStore {
    type Tx = MemoryTransaction;

    async fn fresh() -> Self {
        let flaw = FLAW.get();
        let config = MemoryConfig {
            ordering: match flaw {
                StoreFlaw::GapOnRollback
                | StoreFlaw::PositionIsNumber
                | StoreFlaw::NumberKept
                | StoreFlaw::InspectsNumbersLeft => Ordering::Sequenced,
                _ => Ordering::Insert,
            },
            archive: matches!(flaw, StoreFlaw::PurgesEverything | StoreFlaw::ArchiveUnpurged),
            ..MemoryConfig::default()
        };
        Self {
            inner: MemoryStore::new(config),
            flaw,
            shared: Arc::default(),
        }
    }

    fn store(&self) -> Arc<dyn OutboxStore> {
        Arc::new(FlawedStore {
            inner: self.inner.clone(),
            flaw: self.flaw,
            hours_ahead: self.shared.handles.fetch_add(1, SeqCst),
            shared: self.shared.clone(),
            holds: Mutex::default(),
        })
    }

    async fn begin(&self) -> MemoryTransaction {
        self.inner.begin()
    }

    async fn enqueue(&self, tx: &mut MemoryTransaction, messages: &[Message]) -> Result<()> {
        let messages: Vec<Message> = messages
            .iter()
            .filter_map(|message| self.spoil(message))
            .collect();
        match self.flaw {
            StoreFlaw::VisibleBeforeCommit => {
                let mut own = self.inner.begin();
                self.inner.enqueue_many(&mut own, &messages).await?;
                own.commit();
                Ok(())
            }
            StoreFlaw::RefusedHalfWay => {
                for message in &messages {
                    self.inner.enqueue(tx, message).await?;
                }
                Ok(())
            }
            _ => self.inner.enqueue_many(tx, &messages).await,
        }
    }

    async fn commit(&self, tx: MemoryTransaction) {
        tx.commit();
    }

    async fn rollback(&self, tx: MemoryTransaction) {
        self.shared.rollbacks.fetch_add(1, SeqCst);
        match self.flaw {
            StoreFlaw::KeptOnRollback => tx.commit(),
            _ => tx.rollback(),
        }
    }

    fn concurrent_transactions(&self) -> bool {
        true
    }
}

impl BrokenStore {
    /// What the store makes of a message, if it does not drop it.
    fn spoil(&self, message: &Message) -> Option<Message> {
        let mut parts = message.clone().into_parts();
        let lossy = |bytes: Bytes| Bytes::from(String::from_utf8_lossy(&bytes).into_owned());
        match self.flaw {
            StoreFlaw::LossyUtf8 => {
                parts.key = parts.key.map(lossy);
                parts.payload = parts.payload.map(lossy);
                let headers = parts
                    .headers
                    .iter()
                    .map(|(name, value)| (name, lossy(value.clone())));
                parts.headers = headers.collect();
            }
            StoreFlaw::HeadersAsMap => {
                let map: BTreeMap<_, _> = parts.headers.iter().collect();
                let headers: Headers = map
                    .into_iter()
                    .map(|(name, value)| (name, value.clone()))
                    .collect();
                parts.headers = headers;
            }
            StoreFlaw::EmptyIsNull => {
                parts.key = parts.key.filter(|key| !key.is_empty());
                parts.payload = parts.payload.filter(|payload| !payload.is_empty());
            }
            StoreFlaw::ProducerClock => {
                let mut times = self.shared.times.lock().unwrap();
                times.extend(parts.created_at.map(|time| (parts.id, time)));
            }
            StoreFlaw::KeylessLost if parts.key.is_none() => return None,
            StoreFlaw::LongKeyCut => parts.key = parts.key.map(|key| key.slice(..key.len().min(255))),
            StoreFlaw::ContentTypeLost => parts.content_type = None,
            StoreFlaw::HeadersDropped => parts.headers = Headers::new(),
            StoreFlaw::PastWaits if parts.deliver_at.is_some_and(|due| due < self.inner.now()) => {
                parts.deliver_at = Some(self.inner.now() + Duration::from_secs(3_600));
            }
            StoreFlaw::DeliverAtIgnored => parts.deliver_at = None,
            StoreFlaw::IdsUnique if !self.shared.ids.lock().unwrap().insert(parts.id) => return None,
            _ => {}
        }
        Some(Message::from_stored(parts))
    }
}

/// One handle.
#[derive(Debug)]
struct FlawedStore {
    inner: MemoryStore,
    flaw: StoreFlaw,
    /// How far the clock of its machine is ahead.
    hours_ahead: i64,
    shared: Arc<Shared>,
    /// The holds that only this handle knows.
    holds: Mutex<Vec<Hold>>,
}

#[async_trait]
impl OutboxStore for FlawedStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            headers: self.flaw != StoreFlaw::HeadersDropped,
            ..self.inner.capabilities()
        }
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        let mut request = request.clone();
        match self.flaw {
            StoreFlaw::ApplicationClock => {
                let hour = millis(Duration::from_secs(3_600));
                let ahead = 2 * hour * self.hours_ahead;
                return Ok(self
                    .inner
                    .with_leases(|leases, now| leases.lease(&request, now + ahead)));
            }
            StoreFlaw::LeaseNeverExpires => {
                let ttl = std::mem::replace(&mut request.ttl, Duration::from_secs(1_000_000_000));
                let mut leases = self.inner.lease(&request).await?;
                leases.time_left = ttl;
                return Ok(leases);
            }
            StoreFlaw::EpochStays => return Ok(self.lease_keeping_epochs(&request)),
            StoreFlaw::MembersUncounted => {
                let leases = self.inner.lease(&request).await?;
                return Ok(Leases { relays: 1, ..leases });
            }
            StoreFlaw::TimeLeftWrong => {
                let leases = self.inner.lease(&request).await?;
                return Ok(Leases {
                    time_left: request.ttl * 2,
                    ..leases
                });
            }
            StoreFlaw::TakesTooMany if request.want > 0 => request.want = request.want.saturating_add(1),
            StoreFlaw::WantIgnored => request.want = request.want.max(1),
            StoreFlaw::LeaseShrinks => {
                let held = self
                    .inner
                    .with_leases(|leases, now| leases.held_by(&request.relay, now));
                let surplus = held.get(usize::from(request.want)..).unwrap_or_default();
                self.inner
                    .release(&request.relay, surplus, Membership::Stays)
                    .await?;
            }
            _ => {}
        }
        self.inner.lease(&request).await
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        if self.flaw == StoreFlaw::ReleaseUnchecked {
            self.inner.with_leases(|leases, _| {
                for owned in shards {
                    if let Some(lease) = leases.leases.get_mut(&owned.shard) {
                        (lease.owner, lease.until) = (None, 0);
                    }
                }
            });
        }
        self.inner.release(relay, shards, membership).await
    }

    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>> {
        if self.flaw == StoreFlaw::HoldsForgotten {
            let holds = self.holds.lock().unwrap();
            let asked = |hold: &&Hold| shards.iter().any(|owned| owned.shard == hold.shard);
            return Ok(holds.iter().filter(asked).cloned().collect());
        }
        self.inner.holds(shards).await
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        let inner = self.inner.reader().await?;
        Ok(Box::new(FlawedReader::new(
            inner,
            self.inner.clone(),
            self.flaw,
            self.shared.clone(),
        )))
    }

    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        let mut settlement = settlement.clone();
        let looks = [
            StoreFlaw::RepeatRefused,
            StoreFlaw::NaiveMark,
            StoreFlaw::PositionOnly,
            StoreFlaw::IdOnly,
        ];
        let pending = match looks.contains(&self.flaw) {
            true => self.inner.pending(),
            false => Vec::new(),
        };
        let held = self
            .inner
            .with_leases(|leases, now| leases.held_by(&settlement.relay, now));
        match self.flaw {
            StoreFlaw::NothingRefused if settlement.shards.is_empty() => {
                return Err(Error::new(ErrorKind::Invalid, "settle", "nothing to settle"));
            }
            StoreFlaw::NoFencing => {
                self.inner.settle_unfenced(&settlement)?;
                return Ok(Settled::default());
            }
            StoreFlaw::EpochOnlyRead => {
                let lost = settlement.fence(&held).1;
                tokio::time::sleep(Duration::from_millis(5)).await;
                settlement.shards.retain(|part| !lost.contains(&part.shard));
                self.inner.settle_unfenced(&settlement)?;
                return Ok(Settled { lost });
            }
            StoreFlaw::OwnerIgnored => {
                let leases = self.inner.with_leases(|leases, _| leases.leases.clone());
                let lost: Vec<_> = settlement
                    .shards
                    .iter()
                    .filter(|part| leases.get(&part.shard).map(|lease| lease.epoch) != Some(part.epoch.0))
                    .map(|part| part.shard)
                    .collect();
                settlement.shards.retain(|part| !lost.contains(&part.shard));
                self.inner.settle_unfenced(&settlement)?;
                return Ok(Settled { lost });
            }
            StoreFlaw::AllShardsOrNothing if !settlement.fence(&held).1.is_empty() => {
                let lost = settlement.shards.iter().map(|part| part.shard).collect();
                return Ok(Settled { lost });
            }
            StoreFlaw::NaiveMark if settlement.shards.iter().any(|part| !part.delivered.is_empty()) => {
                for owned in &held {
                    if settlement.shards.iter().all(|part| part.shard != owned.shard) {
                        settlement
                            .shards
                            .push(ShardSettlement::new(owned.shard, owned.epoch));
                    }
                }
            }
            StoreFlaw::NaiveMark => return self.inner.settle(&settlement).await,
            StoreFlaw::RepeatRefused => {
                let known = |record: &RecordRef| pending.iter().any(|row| row.reference() == *record);
                let kept = settlement.fence(&held).0;
                if !kept.iter().all(|part| part.delivered.iter().all(known)) {
                    return Err(Error::new(
                        ErrorKind::Unexpected,
                        "settle",
                        "expected another number of rows",
                    ));
                }
            }
            _ => {}
        }
        for part in &mut settlement.shards {
            match self.flaw {
                StoreFlaw::NaiveMark => {
                    let own = pending.iter().filter(|row| row.shard == part.shard);
                    part.delivered = own.map(crate::Record::reference).collect();
                }
                StoreFlaw::PositionOnly => {
                    for record in &mut part.delivered {
                        if let Some(row) = pending.iter().find(|row| row.position == record.position) {
                            record.id = row.message.id();
                        }
                    }
                }
                StoreFlaw::IdOnly => {
                    part.delivered = pending
                        .iter()
                        .map(crate::Record::reference)
                        .filter(|row| part.delivered.iter().any(|record| record.id == row.id))
                        .collect();
                }
                StoreFlaw::Stranded | StoreFlaw::SilentDeaths => {
                    let dead = std::mem::take(&mut part.dead);
                    part.delivered.extend(dead.into_iter().map(|death| death.record));
                }
                StoreFlaw::AttemptsAddUp => {
                    let owned = [OwnedShard {
                        shard: part.shard,
                        epoch: part.epoch,
                    }];
                    let before = self.inner.holds(&owned).await?;
                    for change in &mut part.holds {
                        if let HoldChange::Put(hold) = change
                            && let Some(old) = before.iter().find(|old| old.reference() == hold.reference())
                        {
                            hold.attempts = hold.attempts.saturating_add(old.attempts);
                        }
                    }
                }
                StoreFlaw::KeylessHoldsShared => {
                    let shared = |reference: &mut RecordRef, scope: &HoldScope| {
                        if *scope == HoldScope::Message {
                            reference.position = Position::MIN;
                        }
                    };
                    for change in &mut part.holds {
                        match change {
                            HoldChange::Put(hold) => shared(&mut hold.head, &hold.scope),
                            HoldChange::Clear(hold) => shared(&mut hold.head, &hold.scope),
                        }
                    }
                }
                StoreFlaw::HoldsForgotten => {
                    let mut holds = self.holds.lock().unwrap();
                    for change in std::mem::take(&mut part.holds) {
                        let name = match &change {
                            HoldChange::Put(hold) => hold.reference(),
                            HoldChange::Clear(hold) => hold.clone(),
                        };
                        holds.retain(|own| !same_hold(&own.reference(), &name));
                        if let HoldChange::Put(hold) = change {
                            holds.push(hold);
                        }
                    }
                }
                _ => {}
            }
        }
        self.inner.settle(&settlement).await
    }

    async fn stats(&self) -> Result<Stats> {
        let mut stats = self.inner.stats().await?;
        if self.flaw == StoreFlaw::AgeUnknown {
            stats.oldest_age = stats.oldest_age.map(|_| Duration::ZERO);
        }
        Ok(stats)
    }

    fn dead_letters(&self) -> Option<&dyn DeadLetters> {
        let flickers = self.flaw == StoreFlaw::PowersFlicker && self.hours_ahead % 3 == 2;
        (self.flaw != StoreFlaw::SilentDeaths && !flickers).then_some(self as _)
    }

    fn scheduled(&self) -> Option<&dyn Scheduled> {
        (self.flaw != StoreFlaw::ScheduledForgotten).then_some(self as _)
    }

    fn retention(&self) -> Option<&dyn Retention> {
        match self.flaw {
            StoreFlaw::PurgesEverything | StoreFlaw::ArchiveEmpty => Some(self),
            _ => None,
        }
    }

    fn parking(&self) -> Option<&dyn Parking> {
        Some(self)
    }

    fn inspection(&self) -> Option<&dyn Inspection> {
        Some(self)
    }

    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        self.inner.wake_up()
    }
}

impl FlawedStore {
    fn lease_keeping_epochs(&self, request: &LeaseRequest) -> Leases {
        self.inner.with_leases(|leases, now| {
            let last = leases.leases.clone();
            let mut own = leases.lease(request, now);
            for owned in &mut own.held {
                let (Some(before), Some(after)) =
                    (last.get(&owned.shard), leases.leases.get_mut(&owned.shard))
                else {
                    continue;
                };
                // A release forgets the owner; then nobody came in between, as far as this store can tell.
                if before.epoch > 0 && before.owner.as_ref().is_none_or(|owner| *owner == request.relay) {
                    after.epoch = before.epoch;
                    owned.epoch.0 = before.epoch;
                }
            }
            own
        })
    }
}

#[async_trait]
impl DeadLetters for FlawedStore {
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>> {
        let mut query = query.clone();
        if self.flaw == StoreFlaw::DeadIdsIgnored {
            query.ids = None;
        }
        let mut letters = self.inner.list(&query).await?;
        if self.flaw == StoreFlaw::DeadById {
            let mut seen = HashSet::new();
            letters.retain(|letter| seen.insert(letter.record.id));
        }
        Ok(letters)
    }

    async fn requeue(&self, records: &[RecordRef]) -> Result<usize> {
        let lossy = self.flaw == StoreFlaw::RequeueLosesHeaders;
        if !lossy && self.flaw != StoreFlaw::RequeueInTwoSteps {
            return self.inner.requeue(records).await;
        }
        let mut letters = self
            .inner
            .list(&DeadLetterQuery {
                limit: usize::MAX,
                ..DeadLetterQuery::default()
            })
            .await?;
        letters.retain(|letter| records.contains(&letter.record));
        if !lossy {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut tx = self.inner.begin();
        for letter in &letters {
            let mut parts = letter.message.clone().into_parts();
            if lossy {
                parts.headers = Headers::new();
            }
            self.inner.enqueue(&mut tx, &Message::from_stored(parts)).await?;
        }
        tx.commit();
        self.inner.discard(records).await?;
        Ok(letters.len())
    }

    async fn discard(&self, records: &[RecordRef]) -> Result<usize> {
        self.inner.discard(records).await
    }
}

#[async_trait]
impl Scheduled for FlawedStore {
    async fn promote(&self, relay: &RelayId, shards: &[OwnedShard], limit: usize) -> Result<Promotion> {
        if self.flaw != StoreFlaw::PromotionUnfenced {
            return self.inner.promote(relay, shards, limit).await;
        }
        let mut promotion = Promotion::default();
        let leases = self.inner.with_leases(|leases, _| leases.leases.clone());
        for owned in shards {
            let Some(lease) = leases.get(&owned.shard) else {
                continue;
            };
            let owner = lease.owner.clone().unwrap_or_else(|| relay.clone());
            let present = OwnedShard {
                shard: owned.shard,
                epoch: crate::Epoch(lease.epoch),
            };
            let part = self
                .inner
                .promote(&owner, &[present], limit - promotion.promoted)
                .await?;
            promotion.promoted += part.promoted;
            promotion.next_in = [promotion.next_in, part.next_in].into_iter().flatten().min();
        }
        Ok(promotion)
    }
}

#[async_trait]
impl Retention for FlawedStore {
    async fn purge(&self, _age: Duration, limit: usize) -> Result<usize> {
        // Two milliseconds, so that what is older than "now" is everything.
        tokio::time::sleep(Duration::from_millis(2)).await;
        self.inner.purge(Duration::from_millis(1), limit).await
    }
}

#[async_trait]
impl Parking for FlawedStore {
    async fn parked(&self, limit: usize) -> Result<Vec<Hold>> {
        Parking::parked(&self.inner, limit).await
    }

    async fn resume(&self, hold: &HoldRef) -> Result<bool> {
        Ok(self.inner.resume(hold).await? || self.flaw == StoreFlaw::ResumesAnything)
    }

    async fn bury(&self, hold: &HoldRef) -> Result<bool> {
        self.inner.bury(hold).await
    }
}

#[async_trait]
impl Inspection for FlawedStore {
    async fn inspect(&self, subject: &Subject, bound: usize) -> Result<Facts> {
        let mut facts = self.inner.inspect(subject, bound).await?;
        match (self.flaw, subject) {
            (StoreFlaw::InspectsOutboxOnly, _) => {
                facts
                    .found
                    .retain(|found| matches!(found.place, Place::Outbox { .. }));
            }
            (StoreFlaw::InspectsFirstPlace, _) => facts.found.truncate(1),
            (StoreFlaw::InspectsKeyOfAnyTopic, Subject::Key(key)) => {
                let own = |row: &&crate::Record| row.message.key() == Some(&key.key);
                let rows = self.inner.pending();
                if let Some(head) = rows.iter().find(own) {
                    let head = Subject::Message(head.message.id());
                    facts.found = self.inner.inspect(&head, bound).await?.found;
                    facts.backlog = Count::Exact(rows.iter().filter(own).count() as u64);
                }
            }
            (StoreFlaw::InspectsTopicFromItsEnd, Subject::Topic(_)) => {
                let last = self
                    .inner
                    .pending()
                    .pop()
                    .map(|row| Subject::Message(row.message.id()));
                if let Some(last) = last {
                    facts.found = self.inner.inspect(&last, bound).await?.found;
                }
            }
            (StoreFlaw::InspectsNoLine, _) => {
                for found in &mut facts.found {
                    if let Place::Outbox { ahead, .. } = &mut found.place {
                        *ahead = Count::Exact(0);
                    }
                }
            }
            (StoreFlaw::InspectsNoTopicHold, _) => {
                facts
                    .holds
                    .retain(|hold| !matches!(hold.scope, HoldScope::Topic(_)));
            }
            (StoreFlaw::InspectsNoOwner, _) => {
                for lease in &mut facts.leases {
                    lease.owner = None;
                }
            }
            (StoreFlaw::InspectsNumbersLeft, _) => {
                facts.last_seq = facts.found.iter().filter_map(|found| found.key_seq).max();
            }
            (StoreFlaw::InspectsTooSurely, _) => {
                facts.complete = true;
                facts.backlog = Count::Exact(facts.backlog.value());
            }
            _ => {}
        }
        Ok(facts)
    }
}

fn same_hold(one: &HoldRef, other: &HoldRef) -> bool {
    (one.shard, &one.scope) == (other.shard, &other.scope)
        && (one.scope != HoldScope::Message || one.head.position == other.head.position)
}
