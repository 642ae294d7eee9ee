//! Reading batches: at most three finds in one snapshot, which is never older than what was settled, and counts when it is
//! confirmed.
//!
//! Order rests on the server's timestamps within a key, and on nothing between keys. So nobody remembers how far he has
//! read: a find asks for what waits and is not in flight, key by key in the order of an index (*the ring*), and the next
//! one begins behind the key where the page was full. What commits late is below nothing, and cannot be passed over.
//!
//! A key that a page ended in is *hot*: it is read on beside the ring, in turns with it, so that neither a key with
//! a million messages holds up the others nor they it.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::ops::Bound;

use async_trait::async_trait;
use mongodb::ClientSession;
use mongodb::bson::{Bson, Document, Timestamp, doc};
use mongodb::options::Hint;
use outbox_core::{FetchRequest, Fetched, Position, Reader, Record, RereadScope, Result, Shard};
use tokio::time::Instant;

use crate::commands::{Raw, by_flow, by_place, shards};
use crate::ring::{Closed, Flow, Ring, Stretch};
use crate::row::{Rows, timestamp};
use crate::session::{Sessions, Told, Transactions, confirm};
use crate::store::MongoStore;

const DURING: &str = "fetch";

/// So many finds a fetch may take.
const FINDS: usize = 3;
/// So many hot keys are read at once.
const TOGETHER: usize = 64;
/// So many are remembered; the ring comes to the others in its turn.
const HOT: usize = 1_000;
/// So many keyless messages that are wanted again are read at once.
const AGAIN: usize = 50_000;

/// How much one find is told of what it is to leave out: a command has at most 16 MiB.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Most {
    /// Bytes of keys and topics that are held.
    pub(crate) held: usize,
    /// Positions of what is in flight, or held one by one.
    pub(crate) places: usize,
}

const MOST: Most = Most {
    held: 1 << 20,
    places: 400_000,
};

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
    pub(crate) most: Most,
}

/// Where a page became full.
struct Last {
    flow: Flow,
    /// Whether anything of this key was taken.
    taken: bool,
}

/// What was read so far of a batch.
struct Page<'r> {
    request: &'r FetchRequest,
    records: Vec<Record>,
    bytes: usize,
    full: bool,
}

impl Page<'_> {
    /// What leaves out what may not be returned one by one: what is in flight, in this batch already, or held. In parts, if one
    /// cannot name it all: each of the positions that follow those of the one before, so that keys stay in their order.
    fn places(&self, most: usize) -> Vec<Document> {
        let one_by_one = self.request.in_flight.iter().chain(&self.request.held.messages);
        let taken = self.records.iter().map(|record| record.position);
        let mut out: Vec<Timestamp> = one_by_one
            .map(|(_, position)| *position)
            .chain(taken)
            .map(timestamp)
            .collect();
        let list = |places: &[Timestamp]| places.iter().copied().map(Bson::Timestamp).collect::<Vec<_>>();
        if out.is_empty() {
            return vec![Document::new()];
        }
        if out.len() <= most {
            return vec![doc! { "ts": { "$nin": list(&out) } }];
        }
        out.sort_unstable();
        let mut parts: Vec<Document> = Vec::new();
        let mut chunks = out.chunks(most).peekable();
        while let Some(chunk) = chunks.next() {
            let mut part = doc! { "$nin": list(chunk) };
            if let (Some(first), false) = (chunk.first(), parts.is_empty()) {
                part.insert("$gte", *first);
            }
            if let Some(behind) = chunks.peek().and_then(|next| next.first()) {
                part.insert("$lt", *behind);
            }
            parts.push(doc! { "ts": part });
        }
        parts
    }

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
            most: MOST,
        }
    }

    /// What is wanted again is read before others.
    fn heed(&mut self, request: &FetchRequest, owned: &[Shard], closed: &Closed) {
        for reread in &request.reread {
            match &reread.scope {
                RereadScope::Shard => self.ring = Ring::Start,
                RereadScope::Key(key) => {
                    self.hot.insert(Flow::of_key(reread.shard, key));
                }
                RereadScope::Message => self.again.push((reread.shard, reread.from)),
            }
        }
        if !self.hot.is_empty() {
            // By name alone: a find of several keys takes in those of the same name in another of the shards.
            let held: HashSet<&str> = closed.keys().collect();
            self.hot.retain(|flow| {
                let name = flow.name.as_str();
                owned.contains(&flow.shard) && !held.contains(name) && !closed.has_topic_of(name)
            });
        }
        while self.hot.len() > HOT {
            self.hot.pop_last();
        }
        self.again.retain(|(shard, _)| owned.contains(shard));
    }

    async fn read(&mut self, request: &FetchRequest) -> Told<Fetched> {
        let mut owned: Vec<Shard> = request.shards.iter().map(|owned| owned.shard).collect();
        owned.sort_unstable();
        let closed = Closed::new(&request.held, self.most.held);
        self.heed(request, &owned, &closed);
        let mut page = Page {
            request,
            records: Vec::new(),
            bytes: 0,
            full: false,
        };
        let mut session = self.sessions.snapshot(self.transactions.settled()).await?;
        let (mut finds, mut complete, mut begun) = (0, owned.is_empty(), false);
        self.hot_first = !self.hot_first;
        if !self.again.is_empty() {
            finds += 1;
            self.read_again(&mut session, &mut page, &closed).await?;
        }
        if self.hot_first && !self.hot.is_empty() && !page.full {
            finds += 1;
            self.read_hot(&mut session, &mut page).await?;
        }
        // Where finds go through parts, what waits may be behind many in which nothing does, and that nothing waits is only
        // known when all were seen. What there is no time for is read next.
        let (parts, began) = (closed.is_large(), Instant::now());
        while !page.full && !complete {
            let goes_on = parts && page.records.is_empty() && began.elapsed() < self.sessions.limit / 2;
            if finds >= FINDS && !goes_on {
                break;
            }
            finds += 1;
            let stretch = self.ring.next(&owned, &closed);
            begun |= stretch.begins;
            let ended = self.read_ring(&mut session, &mut page, stretch).await?;
            complete = begun && ended;
        }
        if !self.hot_first && !self.hot.is_empty() && !page.full && finds < FINDS && !complete {
            self.read_hot(&mut session, &mut page).await?;
        }
        confirm(&mut session).await?;
        if complete {
            // Whatever was hot, or wanted again, was among it.
            self.hot.clear();
            self.again.clear();
        }
        Ok(Fetched::Batch {
            records: page.records,
            more: !complete,
        })
    }

    /// Goes on in the ring; says whether a turn was read to its end.
    async fn read_ring(
        &mut self,
        session: &mut ClientSession,
        page: &mut Page<'_>,
        stretch: Stretch,
    ) -> Told<bool> {
        let Stretch {
            mut asked,
            begins,
            next,
        } = stretch;
        if let (false, Some(turn)) = (begins, self.turn) {
            asked.push(doc! { "ts": { "$lte": turn } });
        }
        let last = self.find(session, page, asked, by_flow()).await?;
        if begins {
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
                Ok(self.ring == Ring::Start)
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
        let own: BTreeSet<Shard> = now.iter().map(|flow| flow.shard).collect();
        // None of them is held.
        let asked = doc! {
            "shard": { "$in": shards(own.into_iter()) },
            "flow": { "$in": now.iter().map(|flow| flow.name.as_str()).collect::<Vec<_>>() },
        };
        let last = self.find(session, page, vec![asked], by_flow()).await?;
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
    async fn read_again(
        &mut self,
        session: &mut ClientSession,
        page: &mut Page<'_>,
        closed: &Closed,
    ) -> Told<()> {
        let mut again = std::mem::take(&mut self.again);
        let Some(mut asked) = closed.topics() else {
            // The ring comes to them in its turn.
            return Ok(());
        };
        let mut rest = again.split_off(again.len().min(AGAIN));
        let own: BTreeSet<Shard> = again.iter().map(|(shard, _)| *shard).collect();
        let places: Vec<Bson> = again
            .iter()
            .map(|(_, position)| Bson::Timestamp(timestamp(*position)))
            .collect();
        asked.push(doc! { "shard": { "$in": shards(own.into_iter()) }, "ts": { "$in": places } });
        if self.find(session, page, asked, by_place()).await?.is_some() {
            rest.append(&mut again);
        }
        self.again = rest;
        Ok(())
    }

    /// Reads what is asked for and may be returned, key by key. Says where the page became full.
    async fn find(
        &mut self,
        session: &mut ClientSession,
        page: &mut Page<'_>,
        asked: Vec<Document>,
        index: Document,
    ) -> Told<Option<Last>> {
        for part in page.places(self.most.places) {
            let filter = all_of(asked.iter().cloned().chain([part]));
            if let Some(last) = self.find_part(session, page, filter, index.clone()).await? {
                return Ok(Some(last));
            }
        }
        Ok(None)
    }

    async fn find_part(
        &mut self,
        session: &mut ClientSession,
        page: &mut Page<'_>,
        filter: Document,
        index: Document,
    ) -> Told<Option<Last>> {
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

/// All of these conditions; those that ask for nothing are left away.
fn all_of(conditions: impl Iterator<Item = Document>) -> Document {
    let mut all: Vec<Document> = conditions.filter(|condition| !condition.is_empty()).collect();
    match all.len() {
        1 => all.remove(0),
        _ => doc! { "$and": all },
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
