//! What was handed to a producer and not yet answered.
//!
//! One tracker belongs to one producer with its lanes, from its making to its end. Messages are numbered as they are handed over,
//! the number travels through librdkafka with the message, and its delivery report finds the place of its outcome by
//! it: no allocation, no channel for each message.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use outbox_core::{Outcome, Reason};
use tokio::sync::{Notify, oneshot, watch};

use crate::classify::Class;
use crate::refused::{Refused, Unheard};

/// How far a producer's end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// It takes messages.
    Open,
    /// It takes no more messages; what it has is being dropped.
    Closing,
    /// All receipts are resolved, nothing is left in it.
    Resolved,
    /// Its threads have ended.
    Gone,
}

/// Why a producer takes no more messages, and what becomes of those it had.
#[derive(Debug, Clone)]
pub(crate) struct Closing {
    pub(crate) class: Class,
    pub(crate) reason: Reason,
    /// Whether what is on its way is waited for: the brokers are well, and each acknowledgement saves a duplicate.
    pub(crate) drain: bool,
    /// Topics that are the cause, and why: their messages are blocked.
    pub(crate) blocked: HashMap<Arc<str>, Reason>,
}

impl Closing {
    pub(crate) fn new(class: Class, reason: impl AsRef<str>) -> Self {
        Self {
            class,
            reason: reason.into(),
            drain: false,
            blocked: HashMap::new(),
        }
    }

    /// Because of these topics, which are blocked.
    pub(crate) fn blocked(topics: HashMap<Arc<str>, Reason>) -> Self {
        Self {
            blocked: topics,
            ..Self::new(Class::Unknown, "another topic was blocked and held everything up").draining()
        }
    }

    pub(crate) fn draining(self) -> Self {
        Self { drain: true, ..self }
    }

    /// What becomes of a message of `topic`.
    pub(crate) fn outcome(&self, topic: &str) -> Outcome {
        match self.blocked.get(topic) {
            Some(reason) => Outcome::TopicBlocked(reason.clone()),
            None => outcome(self.class, self.reason.clone()),
        }
    }
}

pub(crate) fn outcome(class: Class, reason: Reason) -> Outcome {
    match class {
        Class::Poison => Outcome::Poison(reason),
        Class::TopicBlocked => Outcome::TopicBlocked(reason),
        Class::Outage => Outcome::Outage(reason),
        Class::Unknown => Outcome::Unknown(reason),
        Class::Broken => Outcome::Broken(reason),
    }
}

#[derive(Debug)]
pub(crate) struct Tracker {
    /// Taken for a few instructions for each message and each report, never across a call into librdkafka.
    table: Mutex<Table>,
    /// Held while a message is handed to librdkafka, and once between closing and purging: so that nothing slips in
    /// behind the purge. Taken before `table`, never the other way round.
    handing_over: Mutex<()>,
    /// Set with `table.closing`; spares the publisher the lock.
    closed: AtomicBool,
    /// Whether a publisher waits for room; spares the reports the notification.
    waiting: AtomicBool,
    progress: Notify,
    refused: Refused,
    /// Messages that the careful lane has.
    careful: AtomicUsize,
    phase: watch::Sender<Phase>,
}

#[derive(Debug)]
struct Table {
    batches: VecDeque<Batch>,
    next: usize,
    open: usize,
    /// The last report, or when the first of the open messages came after there were none.
    quiet_since: Instant,
    /// Lanes that have not been purged, and lanes whose threads have not ended.
    unpurged: usize,
    running: usize,
    closing: Option<Closing>,
    /// Whether the relay was given an outcome that makes it purge.
    purge_due: bool,
    trouble: Option<Trouble>,
    /// Topics that turned out to be unwritable since the publisher last looked.
    unwritable: Vec<Arc<str>>,
}

/// What the client said about its connections since the last delivery.
#[derive(Debug, Clone)]
struct Trouble {
    /// The latest of the most telling reasons.
    reason: String,
    telling: Telling,
    /// When it was last said that nobody can go.
    outage: Option<Instant>,
}

/// How much a reason tells; what tells more is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Telling {
    /// How many brokers are down.
    Number,
    /// What happened to a connection.
    Connection,
    /// What is wrong with TLS.
    Certificate,
    /// That we are not let in.
    Denied,
}

/// The number of a batch's first message, and its outcomes to come.
pub(crate) type Registered = (usize, oneshot::Receiver<Vec<Outcome>>);

#[derive(Debug)]
struct Batch {
    first: usize,
    topics: Vec<Arc<str>>,
    outcomes: Vec<Option<Outcome>>,
    open: usize,
    since: Instant,
    receipt: oneshot::Sender<Vec<Outcome>>,
    unheard: Weak<()>,
}

impl Batch {
    fn resolve(self) {
        let outcomes = self
            .outcomes
            .into_iter()
            .map(|outcome| outcome.unwrap_or(Outcome::Skipped));
        // The relay may have dropped the receipt: then nobody waits.
        let _ = self.receipt.send(outcomes.collect());
    }
}

/// Whether the relay purges when it hears this.
pub(crate) fn makes_purge(outcome: &Outcome) -> bool {
    matches!(
        outcome,
        Outcome::Outage(_) | Outcome::Unknown(_) | Outcome::Broken(_)
    )
}

impl Tracker {
    pub(crate) fn new(refused: Refused) -> Arc<Self> {
        Arc::new(Self {
            table: Mutex::new(Table {
                batches: VecDeque::new(),
                next: 0,
                open: 0,
                quiet_since: Instant::now(),
                unpurged: 0,
                running: 0,
                closing: None,
                purge_due: false,
                trouble: None,
                unwritable: Vec::new(),
            }),
            handing_over: Mutex::new(()),
            closed: AtomicBool::new(false),
            waiting: AtomicBool::new(false),
            progress: Notify::new(),
            refused,
            careful: AtomicUsize::new(0),
            phase: watch::Sender::new(Phase::Open),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while it is held; were it so, the numbers in it would still be true.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for a batch's outcomes: the number of its first message, and where they will appear. The topics back when
    /// the producer is closed, which resolves nothing any more that comes now.
    pub(crate) fn register(
        &self,
        topics: Vec<Arc<str>>,
        unheard: &Unheard,
    ) -> Result<Registered, Vec<Arc<str>>> {
        let (receipt, outcomes) = oneshot::channel();
        let messages = topics.len();
        let now = Instant::now();
        let mut table = self.table();
        if table.closing.is_some() {
            return Err(topics);
        }
        let first = table.next;
        table.next += messages;
        if table.open == 0 {
            table.quiet_since = now;
        }
        table.open += messages;
        table.batches.push_back(Batch {
            first,
            topics,
            since: now,
            outcomes: vec![None; messages],
            open: messages,
            receipt,
            unheard: Arc::downgrade(unheard),
        });
        Ok((first, outcomes))
    }

    /// Runs `hand_over` unless the producer is closed.
    pub(crate) fn unless_closed<T>(&self, hand_over: impl FnOnce() -> T) -> Option<T> {
        let _guard = self.handing_over.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.is_closed()).then(hand_over)
    }

    /// Notes what became of a message; a number that is not known any more is ignored.
    pub(crate) fn resolve(&self, number: usize, outcome: Outcome) {
        let done = {
            let mut table = self.table();
            table.resolve(number, outcome, &self.refused)
        };
        if let Some(batch) = done {
            batch.resolve();
        }
    }

    /// The same for a delivery report, which is a sign of life.
    pub(crate) fn report(&self, number: usize, outcome: Outcome) {
        let done = {
            let mut table = self.table();
            table.quiet_since = Instant::now();
            if outcome == Outcome::Delivered {
                table.trouble = None;
            }
            table.resolve(number, outcome, &self.refused)
        };
        if let Some(batch) = done {
            batch.resolve();
        }
        if self.waiting.load(Ordering::Relaxed) {
            self.progress.notify_one();
        }
    }

    /// A message goes into the careful lane.
    pub(crate) fn enter_careful(&self) {
        self.careful.fetch_add(1, Ordering::Relaxed);
    }

    /// A message came out of the careful lane.
    pub(crate) fn leave_careful(&self) {
        self.careful.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn careful_is_empty(&self) -> bool {
        self.careful.load(Ordering::Relaxed) == 0
    }

    /// The topic of this message was refused: no more of it is taken until that is heard. Whether some was before, behind
    /// this one, and is not resolved.
    pub(crate) fn refuse_topic(&self, number: usize, topic: &str, outcome: &Outcome) -> bool {
        let table = self.table();
        if let Some(batch) = table.index_of(number).and_then(|index| table.batches.get(index)) {
            self.refused.note(topic, outcome, &batch.unheard);
        }
        // Whoever is registered later finds the note.
        table.batches.iter().any(|batch| {
            std::iter::zip(batch.first.., std::iter::zip(&batch.topics, &batch.outcomes))
                .any(|(other, (own, outcome))| other > number && outcome.is_none() && **own == *topic)
        })
    }

    /// A topic turned out to be unwritable.
    pub(crate) fn note_unwritable(&self, topic: &str) {
        let mut table = self.table();
        if !table.unwritable.iter().any(|noted| **noted == *topic) {
            table.unwritable.push(topic.into());
        }
    }

    /// The topics noted since the last call.
    pub(crate) fn take_unwritable(&self) -> Vec<Arc<str>> {
        std::mem::take(&mut self.table().unwritable)
    }

    /// Waits until there may be room again.
    pub(crate) async fn room(&self) {
        self.waiting.store(true, Ordering::Relaxed);
        // A report is seen a little before its message is freed, and closing may come between: hence a time limit,
        // and callers try again.
        let _ = tokio::time::timeout(Duration::from_millis(5), self.progress.notified()).await;
        self.waiting.store(false, Ordering::Relaxed);
    }

    pub(crate) fn open(&self) -> usize {
        self.table().open
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(crate) fn closing(&self) -> Option<Closing> {
        self.table().closing.clone()
    }

    /// Whether the relay was given an outcome that makes it purge, and will be given no other until it has.
    pub(crate) fn purge_is_due(&self) -> bool {
        self.table().purge_due
    }

    /// The relay is given such an outcome for messages that were not even taken.
    pub(crate) fn make_purge_due(&self) {
        self.table().purge_due = true;
    }

    /// Takes no more messages, for the first reason given.
    pub(crate) fn close(&self, closing: Closing) {
        {
            let mut table = self.table();
            if table.closing.is_some() {
                return;
            }
            table.closing = Some(closing);
            self.closed.store(true, Ordering::Release);
        }
        self.advance(Phase::Closing);
        self.progress.notify_one();
    }

    /// Waits for a message that is being handed over right now; after [`close`](Self::close) none follows.
    pub(crate) fn settle_in(&self) {
        drop(self.handing_over.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Resolves what is left.
    pub(crate) fn resolve_all(&self) {
        let batches = {
            let mut table = self.table();
            let closing = table.closing.clone();
            let mut batches = std::mem::take(&mut table.batches);
            for batch in &mut batches {
                for (slot, topic) in std::iter::zip(&mut batch.outcomes, &batch.topics) {
                    if slot.is_none() {
                        let outcome = closing.as_ref().map_or_else(
                            || Outcome::Unknown("the producer has ended".into()),
                            |closing| closing.outcome(topic),
                        );
                        table.purge_due |= makes_purge(&outcome);
                        self.refused.note(topic, &outcome, &batch.unheard);
                        *slot = Some(outcome);
                    }
                }
            }
            table.open = 0;
            batches
        };
        batches.into_iter().for_each(Batch::resolve);
        self.advance(Phase::Resolved);
    }

    pub(crate) fn lane_starts(&self) {
        let mut table = self.table();
        table.unpurged += 1;
        table.running += 1;
    }

    /// A lane has nothing more; with the last one all is known.
    pub(crate) fn lane_is_purged(&self) {
        let last = {
            let mut table = self.table();
            table.unpurged -= 1;
            table.unpurged == 0
        };
        if last {
            self.resolve_all();
        }
    }

    pub(crate) fn lane_ends(&self) {
        let last = {
            let mut table = self.table();
            table.running -= 1;
            table.running == 0
        };
        if last {
            self.resolve_all();
            self.advance(Phase::Gone);
        }
    }

    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let later = to > *phase;
            *phase = to.max(*phase);
            later
        });
    }

    /// Waits until the producer's end has come so far, at most for `limit`; whether it has.
    pub(crate) async fn reached(&self, phase: Phase, limit: Duration) -> bool {
        let mut phases = self.phase.subscribe();
        let reached = phases.wait_for(|current| *current >= phase);
        matches!(tokio::time::timeout(limit, reached).await, Ok(Ok(_)))
    }

    /// Notes what the client says about its connections. `outage` is when it means that nobody can go.
    pub(crate) fn trouble(&self, telling: Telling, reason: &str, outage: bool) {
        let mut table = self.table();
        let trouble = table.trouble.get_or_insert_with(|| Trouble {
            reason: String::new(),
            telling: Telling::Number,
            outage: None,
        });
        if telling >= trouble.telling {
            trouble.reason.clear();
            trouble.reason.push_str(reason);
            trouble.telling = telling;
        }
        if outage {
            trouble.outage = Some(Instant::now());
        }
    }

    /// What the client last said about its connections, if anything was said since the last delivery.
    pub(crate) fn last_trouble(&self) -> Option<(Telling, String)> {
        let table = self.table();
        let trouble = table.trouble.as_ref()?;
        Some((trouble.telling, trouble.reason.clone()))
    }

    /// The topics of messages that have waited for longer than `limit`, at most a few, each with its oldest message.
    pub(crate) fn waiting_topics(&self, limit: Duration) -> HashMap<Arc<str>, usize> {
        let table = self.table();
        let mut waiting: HashMap<Arc<str>, usize> = HashMap::new();
        for batch in table
            .batches
            .iter()
            .take_while(|batch| batch.since.elapsed() >= limit)
        {
            let places = std::iter::zip(batch.first.., std::iter::zip(&batch.topics, &batch.outcomes));
            for (number, (topic, outcome)) in places {
                if outcome.is_none() && waiting.len() < 10 && !waiting.contains_key(topic) {
                    waiting.insert(topic.clone(), number);
                }
            }
        }
        waiting
    }

    /// Whether the silence has lasted so long that the destination is out, and why.
    pub(crate) fn silent(&self, limit: Duration, limit_after_error: Duration) -> Option<Silence> {
        let table = self.table();
        if table.open == 0 || table.closing.is_some() {
            return None;
        }
        let silence = table.quiet_since.elapsed();
        let said = table.trouble.as_ref().is_some_and(|trouble| {
            // What was said long before the messages came may have passed unnoticed.
            trouble.outage.is_some_and(|at| at.elapsed() < silence + STALE)
        });
        if silence < if said { limit_after_error } else { limit } {
            return None;
        }
        let reason = match &table.trouble {
            Some(trouble) => format!("no acknowledgement for {silence:.1?}: {}", trouble.reason),
            None => format!("no acknowledgement for {silence:.1?}, and no error either"),
        };
        Some(Silence {
            closing: Closing::new(Class::Outage, reason),
            explained: said,
        })
    }
}

/// A silence that is an outage, unless a topic turns out to be the cause.
#[derive(Debug)]
pub(crate) struct Silence {
    pub(crate) closing: Closing,
    /// Whether the client itself said that nobody can go.
    pub(crate) explained: bool,
}

/// How long an error counts that was said before there was anything to send.
const STALE: Duration = Duration::from_secs(30);

impl Table {
    /// Where the batch is that this message may be of.
    fn index_of(&self, number: usize) -> Option<usize> {
        self.batches
            .partition_point(|batch| batch.first <= number)
            .checked_sub(1)
    }

    fn resolve(&mut self, number: usize, outcome: Outcome, refused: &Refused) -> Option<Batch> {
        let index = self.index_of(number)?;
        let batch = self.batches.get_mut(index)?;
        let slot = batch.outcomes.get_mut(number - batch.first)?;
        if slot.is_some() {
            return None;
        }
        self.purge_due |= makes_purge(&outcome);
        refused.note(&batch.topics[number - batch.first], &outcome, &batch.unheard);
        *slot = Some(outcome);
        batch.open -= 1;
        let done = batch.open == 0;
        self.open -= 1;
        if done { self.batches.remove(index) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topics(messages: usize) -> Vec<Arc<str>> {
        vec!["t".into(); messages]
    }

    #[test]
    fn each_batch_gets_its_outcomes_in_order_whatever_the_order_of_reports() {
        let tracker = Tracker::new(Refused::default());
        let (first, mut one) = tracker.register(topics(2), &Unheard::default()).unwrap();
        let (second, mut two) = tracker.register(topics(3), &Unheard::default()).unwrap();
        assert_eq!((first, second), (0, 2));
        for number in [4, 1, 2, 3] {
            tracker.report(number, Outcome::Delivered);
        }
        assert!(one.try_recv().is_err());
        assert_eq!(two.try_recv().unwrap(), vec![Outcome::Delivered; 3]);
        tracker.report(0, Outcome::Poison("no".into()));
        assert_eq!(
            one.try_recv().unwrap(),
            [Outcome::Poison("no".into()), Outcome::Delivered]
        );
        assert_eq!(tracker.open(), 0);
    }

    #[test]
    fn what_is_left_at_the_end_is_resolved_by_its_reason_and_late_reports_are_ignored() {
        let tracker = Tracker::new(Refused::default());
        let (_, mut outcomes) = tracker.register(topics(2), &Unheard::default()).unwrap();
        tracker.report(0, Outcome::Delivered);
        tracker.close(Closing::new(Class::Outage, "gone"));
        tracker.close(Closing::new(Class::Broken, "the second reason does not count"));
        assert!(tracker.unless_closed(|| ()).is_none());
        tracker.resolve_all();
        tracker.report(1, Outcome::Delivered);
        tracker.report(7, Outcome::Delivered);
        assert_eq!(
            outcomes.try_recv().unwrap(),
            [Outcome::Delivered, Outcome::Outage("gone".into())]
        );
    }

    #[test]
    fn silence_is_an_outage_sooner_when_the_client_says_so() {
        let tracker = Tracker::new(Refused::default());
        let (long, short, none) = (Duration::from_secs(60), Duration::ZERO, Duration::ZERO);
        assert!(tracker.silent(none, none).is_none(), "nothing waits");
        let (number, _outcomes) = tracker.register(topics(1), &Unheard::default()).unwrap();
        assert!(tracker.silent(long, short).is_none());
        tracker.trouble(Telling::Connection, "one of three is down", false);
        assert!(tracker.silent(long, short).is_none());
        tracker.trouble(Telling::Denied, "wrong password", true);
        tracker.trouble(Telling::Number, "all brokers down", true);
        let Silence { closing, explained } = tracker.silent(long, short).unwrap();
        assert!(explained);
        assert_eq!(closing.class, Class::Outage);
        assert!(closing.reason.as_str().contains("wrong password"), "{closing:?}");
        tracker.report(number, Outcome::Delivered);
        assert_eq!(tracker.last_trouble(), None);
    }
}
