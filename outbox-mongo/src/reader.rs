//! Reading batches: at most three finds in one snapshot, which is never older than what was settled.
//!
//! Order rests on the server's timestamps within a key, and on nothing between keys. So nobody remembers how far he has
//! read: a find asks for what waits and is not in flight, key by key in the order of an index (*the ring*), and the next
//! one begins behind the key where the page was full. What commits late is below nothing, and cannot be passed over.
//!
//! A key that a page ended in is *hot*: it is read on beside the ring, in turns with it, so that neither a key with
//! a million messages holds up the others nor they it.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Bound;

use async_trait::async_trait;
use mongodb::ClientSession;
use mongodb::bson::{Bson, Document, Timestamp, doc};
use mongodb::options::Hint;
use outbox_core::{
    FetchRequest, Fetched, MessageId, OrderKey, Position, Reader, Record, RereadScope, Result, Shard,
};

use crate::commands::{Raw, by_flow, by_place, shards};
use crate::row::{Rows, flow, flows_of, timestamp};
use crate::session::{Sessions, Told, Transactions};
use crate::store::MongoStore;

const DURING: &str = "fetch";

/// So many finds a fetch may take.
const FINDS: usize = 3;
/// So many hot keys are read at once.
const TOGETHER: usize = 64;
/// So many are remembered; the ring comes to the others in its turn.
const HOT: usize = 1_000;

/// A reader; its connections are the store's.
pub(crate) struct MongoReader {
    sessions: Sessions,
    transactions: Transactions,
    /// Why everything that is known is void, which is told first.
    reset: Option<String>,
    ring: Ring,
    /// When the ring was begun: what is stored later waits for its next turn, so that nobody overtakes all others.
    turn: Option<Timestamp>,
    hot: BTreeSet<Flow>,
    /// Behind which of them is read next.
    hot_at: Option<Flow>,
    /// Keyless messages that were returned before and are wanted again.
    again: Vec<(Shard, Position)>,
    /// Whether hot keys are read before the ring this time.
    hot_first: bool,
    rows: Rows,
}

/// A key, or a keyless message, as the index has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Flow {
    shard: Shard,
    name: String,
}

/// Where a page became full.
struct Last {
    flow: Flow,
    /// Whether anything of this key was taken.
    taken: bool,
}

/// Where the ring goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ring {
    Start,
    /// With this key.
    At(Flow),
    /// Behind this key.
    Behind(Flow),
    /// Behind this shard.
    Shard(Shard),
}

impl Ring {
    /// What is to be read next, and where it goes on when that was read to its end.
    fn next(&self, owned: &[Shard]) -> (Document, Self) {
        let behind = |last: Shard| {
            let rest: Vec<Shard> = owned.iter().copied().filter(|shard| *shard > last).collect();
            match rest.is_empty() {
                true => (within_shards(owned), Self::Start),
                false => (within_shards(&rest), Self::Start),
            }
        };
        match self {
            Self::Start => (within_shards(owned), Self::Start),
            Self::At(Flow { shard, name }) if owned.contains(shard) => (
                doc! { "shard": i32::from(shard.0), "flow": { "$gte": name } },
                Self::Shard(*shard),
            ),
            Self::Behind(Flow { shard, name }) if owned.contains(shard) => (
                doc! { "shard": i32::from(shard.0), "flow": { "$gt": name } },
                Self::Shard(*shard),
            ),
            Self::At(Flow { shard, .. }) | Self::Behind(Flow { shard, .. }) | Self::Shard(shard) => {
                behind(*shard)
            }
        }
    }

    /// Whether the next find sees all that there is.
    fn is_whole(&self, owned: &[Shard]) -> bool {
        match self {
            Self::Start => true,
            Self::At(Flow { shard, .. }) | Self::Behind(Flow { shard, .. }) if owned.contains(shard) => false,
            Self::At(Flow { shard, .. }) | Self::Behind(Flow { shard, .. }) | Self::Shard(shard) => {
                owned.iter().all(|own| own <= shard)
            }
        }
    }
}

fn within_shards(owned: &[Shard]) -> Document {
    doc! { "shard": { "$in": shards(owned.iter().copied()) } }
}

/// What was read so far of a batch.
struct Page<'r> {
    request: &'r FetchRequest,
    /// What leaves out what is held.
    free: Vec<Document>,
    records: Vec<Record>,
    bytes: usize,
    full: bool,
}

impl Page<'_> {
    /// Whether the record is taken; if not, the page is full.
    fn take(&mut self, record: Record) -> bool {
        let size = record.message.size();
        let fits = self.records.is_empty() || self.bytes.saturating_add(size) <= self.request.max_bytes;
        if !fits || self.records.len() >= self.request.max_rows {
            self.full = true;
            return false;
        }
        self.bytes += size;
        self.records.push(record);
        self.full = self.records.len() >= self.request.max_rows;
        true
    }
}

impl MongoReader {
    pub(crate) fn new(store: &MongoStore, reset: Option<String>) -> Self {
        Self {
            sessions: store.sessions.clone(),
            transactions: store.transactions.clone(),
            reset,
            ring: Ring::Start,
            turn: None,
            hot: BTreeSet::new(),
            hot_at: None,
            again: Vec::new(),
            hot_first: false,
            rows: Rows::new(store.config.shards),
        }
    }

    /// What is wanted again is read before others.
    fn heed(&mut self, request: &FetchRequest, owned: &[Shard], held: &BTreeSet<String>) {
        for reread in &request.reread {
            match &reread.scope {
                RereadScope::Shard => self.ring = Ring::Start,
                RereadScope::Key(key) => {
                    self.hot.insert(Flow::of_key(reread.shard, key));
                }
                RereadScope::Message => self.again.push((reread.shard, reread.from)),
            }
        }
        self.hot
            .retain(|flow| owned.contains(&flow.shard) && !held.contains(&flow.name));
        while self.hot.len() > HOT {
            self.hot.pop_last();
        }
        self.again.retain(|(shard, _)| owned.contains(shard));
    }

    async fn read(&mut self, request: &FetchRequest) -> Told<Fetched> {
        let mut owned: Vec<Shard> = request.shards.iter().map(|owned| owned.shard).collect();
        owned.sort_unstable();
        let held = request.held.keys.iter();
        let held = held.map(|(shard, key)| Flow::of_key(*shard, key).name).collect();
        self.heed(request, &owned, &held);
        let mut page = Page {
            request,
            free: free(request, held),
            records: Vec::new(),
            bytes: 0,
            full: false,
        };
        let mut session = self.sessions.snapshot(self.transactions.settled()).await?;
        let (mut finds, mut complete) = (0, owned.is_empty());
        self.hot_first = !self.hot_first;
        if !self.again.is_empty() {
            finds += 1;
            self.read_again(&mut session, &mut page).await?;
        }
        if self.hot_first && !self.hot.is_empty() && !page.full {
            finds += 1;
            self.read_hot(&mut session, &mut page).await?;
        }
        while finds < FINDS && !page.full && !complete {
            finds += 1;
            complete = self.read_ring(&mut session, &mut page, &owned).await?;
        }
        if !self.hot_first && !self.hot.is_empty() && !page.full && finds < FINDS && !complete {
            self.read_hot(&mut session, &mut page).await?;
        }
        if complete {
            // Whatever was hot, or wanted again, was among it.
            self.hot.clear();
        }
        Ok(Fetched::Batch {
            records: page.records,
            more: !complete,
        })
    }

    /// Goes on in the ring; says whether all that there is was seen.
    async fn read_ring(
        &mut self,
        session: &mut ClientSession,
        page: &mut Page<'_>,
        owned: &[Shard],
    ) -> Told<bool> {
        let whole = self.ring.is_whole(owned);
        let (mut filter, next) = self.ring.next(owned);
        if let (false, Some(turn)) = (whole, self.turn) {
            filter.insert("ts", doc! { "$lte": turn });
        }
        let last = self.find(session, page, filter, by_flow()).await?;
        if whole {
            self.turn = session.operation_time();
        }
        match last {
            Some(Last { flow, taken }) => {
                // A key of which nothing was taken has had no turn.
                self.ring = match taken {
                    true => Ring::Behind(flow.clone()),
                    false => Ring::At(flow.clone()),
                };
                if taken {
                    self.hot.insert(flow);
                }
                Ok(false)
            }
            None => {
                self.ring = next;
                Ok(whole)
            }
        }
    }

    /// Reads on in keys that are hot. The filter may take in keys of the same name in another of the shards, which is no
    /// harm: they wait as well, and are read from their beginning.
    async fn read_hot(&mut self, session: &mut ClientSession, page: &mut Page<'_>) -> Told<()> {
        let behind = match &self.hot_at {
            Some(last) if self.hot.last() > Some(last) => (Bound::Excluded(last), Bound::Unbounded),
            _ => (Bound::Unbounded, Bound::Unbounded),
        };
        let now: Vec<Flow> = self
            .hot
            .range::<Flow, _>(behind)
            .take(TOGETHER)
            .cloned()
            .collect();
        let filter = doc! {
            "shard": { "$in": shards(now.iter().map(|flow| flow.shard)) },
            "flow": { "$in": now.iter().map(|flow| flow.name.as_str()).collect::<Vec<_>>() },
        };
        let last = self.find(session, page, filter, by_flow()).await?;
        // Those before it were read to their ends, those behind it come next.
        let mut before = None;
        for flow in now {
            if last.as_ref().is_none_or(|last| flow < last.flow) {
                self.hot.remove(&flow);
                before = Some(flow);
            }
        }
        if let Some(Last { flow, taken }) = &last {
            self.hot_at = match taken {
                true => Some(flow.clone()),
                // It is the next: what comes before it has had its turn.
                false => before.or(self.hot_at.take()),
            };
        } else {
            self.hot_at = None;
        }
        self.hot.extend(last.map(|last| last.flow));
        Ok(())
    }

    /// Reads keyless messages that are wanted again, by their positions.
    async fn read_again(&mut self, session: &mut ClientSession, page: &mut Page<'_>) -> Told<()> {
        let again = std::mem::take(&mut self.again);
        let places: Vec<Bson> = again
            .iter()
            .map(|(_, position)| Bson::Timestamp(timestamp(*position)))
            .collect();
        let filter = doc! {
            "shard": { "$in": shards(again.iter().map(|(shard, _)| *shard)) },
            "ts": { "$in": places },
        };
        if self.find(session, page, filter, by_place()).await?.is_some() {
            self.again = again;
        }
        Ok(())
    }

    /// Reads what the filter asks for and may be returned, key by key. Says where the page became full.
    async fn find(
        &mut self,
        session: &mut ClientSession,
        page: &mut Page<'_>,
        mut filter: Document,
        index: Document,
    ) -> Told<Option<Last>> {
        leave_out(&mut filter, page);
        let most = page.request.max_rows - page.records.len();
        let most = u32::try_from(most).unwrap_or(u32::MAX);
        let mut cursor = self
            .sessions
            .collections
            .outbox::<Raw>()
            .find(filter)
            .sort(by_flow())
            // Whatever the server believes of the collection.
            .hint(Hint::Keys(index))
            .limit(i64::from(most))
            // All in one answer, as long as it has less than 16 MiB.
            .batch_size(most.saturating_add(1))
            .session(&mut *session)
            .await?;
        while cursor.advance(session).await? {
            let row = self.rows.read(cursor.current());
            let here = || {
                let name = cursor.current().get_str("flow").unwrap_or_default();
                Flow {
                    shard: row.shard.unwrap_or(Shard(0)),
                    name: name.to_owned(),
                }
            };
            let at = here();
            let taken = page.take(row.record());
            if page.full {
                return Ok(Some(Last { flow: at, taken }));
            }
        }
        Ok(None)
    }
}

/// Conditions that leave out what is held.
fn free(request: &FetchRequest, keys: BTreeSet<String>) -> Vec<Document> {
    let mut free = Vec::new();
    if !keys.is_empty() {
        free.push(doc! { "flow": { "$nin": keys.into_iter().collect::<Vec<_>>() } });
    }
    for topic in &request.held.topics {
        let (first, behind) = flows_of(topic);
        free.push(doc! { "$or": [{ "flow": { "$lt": first } }, { "flow": { "$gte": behind } }] });
    }
    free
}

/// Adds what may not be returned: what is in flight, in this batch already, or held.
fn leave_out(filter: &mut Document, page: &Page<'_>) {
    let request = page.request;
    let taken = page.records.iter().map(|record| record.position);
    let one_by_one = request.in_flight.iter().chain(&request.held.messages);
    let out: Vec<Bson> = one_by_one
        .map(|(_, position)| *position)
        .chain(taken)
        .map(|position| Bson::Timestamp(timestamp(position)))
        .collect();
    let mut all = vec![std::mem::take(filter)];
    if !out.is_empty() {
        all.push(doc! { "ts": { "$nin": out } });
    }
    all.extend(page.free.iter().cloned());
    *filter = match all.len() {
        1 => all.remove(0),
        _ => doc! { "$and": all },
    };
}

impl Flow {
    fn of_key(shard: Shard, key: &OrderKey) -> Self {
        // The id is of no account where there is a key.
        let name = flow(&key.topic, Some(&key.key), MessageId::from_bytes([0; 16]));
        Self { shard, name }
    }
}

#[async_trait]
impl Reader for MongoReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        if let Some(reason) = self.reset.take() {
            return Ok(Fetched::Reset { reason });
        }
        let sessions = self.sessions.clone();
        sessions.call(DURING, self.read(request)).await
    }
}

impl fmt::Debug for MongoReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoReader")
            .field("ring", &self.ring)
            .field("hot", &self.hot.len())
            .finish_non_exhaustive()
    }
}
