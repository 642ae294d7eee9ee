//! The writer: transactions of many producers at once, and an honest log of what became of each message.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use outbox::{Message, MessageId};

use super::stamp::Stamp;

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Committed,
    RolledBack,
    /// The commit failed, or nobody lived to see it: its messages may arrive or not.
    Unknown,
}

/// A message that was written, or nearly.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    pub(crate) stamp: Stamp,
    pub(crate) end: End,
}

/// The writer's log. What is said before a commit is in the file before the commit begins.
///
/// The file is not synced: it has to outlive the process, not the machine.
#[derive(Debug)]
pub(crate) struct WriterLog(Mutex<File>);

impl WriterLog {
    /// Continues the log of this path, or begins it.
    pub(crate) fn open(path: &Path) -> Self {
        Self(Mutex::new(
            OpenOptions::new().create(true).append(true).open(path).unwrap(),
        ))
    }

    /// Says what is about to be committed or rolled back.
    pub(crate) fn intent(&self, stamp: &Stamp) {
        self.append(&format!("intent {stamp}\n"));
    }

    /// Says what became of it.
    pub(crate) fn end(&self, stamps: &[Stamp], end: End) {
        let word = match end {
            End::Committed => "committed",
            End::RolledBack => "rolled_back",
            End::Unknown => "unknown",
        };
        let mut lines = String::new();
        for stamp in stamps {
            let _ = writeln!(lines, "{word} {stamp}");
        }
        self.append(&lines);
    }

    fn append(&self, lines: &str) {
        self.0.lock().unwrap().write_all(lines.as_bytes()).unwrap();
    }

    /// Everything the log tells, in the order of the intents. An intent without an end is unknown; a line that a
    /// dying writer left unfinished is none.
    pub(crate) fn read(path: &Path) -> Vec<Written> {
        let text = std::fs::read_to_string(path).unwrap();
        let complete = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
        let mut written: Vec<Written> = Vec::new();
        let mut places: HashMap<MessageId, usize> = HashMap::new();
        for line in complete.lines() {
            let (word, stamp) = line.split_once(' ').unwrap();
            let stamp = Stamp::parse(stamp).unwrap();
            let end = match word {
                "committed" => End::Committed,
                "rolled_back" => End::RolledBack,
                "intent" | "unknown" => End::Unknown,
                other => panic!("the writer's log has a line that begins with {other:?}"),
            };
            match places.get(&stamp.id) {
                Some(place) => written[*place].end = end,
                None => {
                    places.insert(stamp.id, written.len());
                    written.push(Written { stamp, end });
                }
            }
        }
        written
    }
}

/// The messages of which the writer does not know what became of them.
pub(crate) fn unknown(written: &[Written]) -> Vec<MessageId> {
    let unknown = written.iter().filter(|written| written.end == End::Unknown);
    unknown.map(|written| written.stamp.id).collect()
}

/// What was unknown is known: these were committed, and all others were not.
pub(crate) fn resolve(written: &mut [Written], committed: &BTreeSet<MessageId>) {
    for written in written.iter_mut().filter(|written| written.end == End::Unknown) {
        written.end = match committed.contains(&written.stamp.id) {
            true => End::Committed,
            false => End::RolledBack,
        };
    }
}

/// One producer: its connection to the database, with the application's own table of counters.
pub(crate) trait Producer {
    /// In one transaction: for each of the keys in turn counts the key's next number, in the application's table,
    /// and enqueues what `message` makes of it; then waits, then commits or rolls back.
    ///
    /// The keys are in order, so that transactions that lock their counters and overlap wait for each other and never
    /// in a circle. Counting before enqueueing is what makes insert order commit order.
    fn transact(
        &mut self,
        keys: &[String],
        message: &mut dyn FnMut(&str, u64) -> Message,
        wait: Duration,
        commit: bool,
    ) -> End;
}

/// How much is written, and how.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) topic: String,
    /// How many messages, those rolled back included.
    pub(crate) messages: usize,
    pub(crate) keys: usize,
    /// How many producers at once.
    pub(crate) producers: usize,
    /// One transaction of so many is rolled back.
    pub(crate) rollback_each: usize,
    /// One transaction of so many is held open, up to `hold`.
    pub(crate) hold_each: usize,
    pub(crate) hold: Duration,
    /// One message of so many is poison; none with 0.
    pub(crate) poison_each: usize,
    /// The producers pause so that it takes at least so long.
    pub(crate) spread: Duration,
}

impl Load {
    /// Writes it all; gives the time it took.
    pub(crate) fn write<P: Producer>(&self, log: &WriterLog, connect: impl Fn() -> P + Sync) -> Duration {
        let begin = Instant::now();
        let written = &AtomicUsize::new(1);
        std::thread::scope(|scope| {
            for producer in 0..self.producers {
                let share =
                    self.messages / self.producers + usize::from(producer < self.messages % self.producers);
                let connect = &connect;
                scope.spawn(move || self.produce(share, log, connect(), begin, written));
            }
        });
        begin.elapsed()
    }

    fn produce(
        &self,
        share: usize,
        log: &WriterLog,
        mut producer: impl Producer,
        begin: Instant,
        written: &AtomicUsize,
    ) {
        let mut done = 0;
        while done < share {
            let count = fastrand::usize(1..=MOST_AT_ONCE).min(share - done);
            let mut keys: Vec<String> = (0..count).map(|_| self.any_key()).collect();
            keys.sort_unstable();
            let commit = fastrand::usize(0..self.rollback_each) > 0;
            let wait = match fastrand::usize(0..self.hold_each) {
                0 => self.hold.mul_f64(fastrand::f64()),
                _ => Duration::ZERO,
            };
            let mut stamps = Vec::with_capacity(count);
            let mut message = |key: &str, n| {
                let stamp = Stamp {
                    poison: self.poison_each > 0
                        && written
                            .fetch_add(1, Ordering::Relaxed)
                            .is_multiple_of(self.poison_each),
                    ..Stamp::new(key, n)
                };
                log.intent(&stamp);
                stamps.push(stamp.clone());
                stamp.message(&self.topic)
            };
            let end = producer.transact(&keys, &mut message, wait, commit);
            log.end(&stamps, end);
            done += count;
            let due = begin + self.spread.mul_f64(fraction(done, share));
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }

    /// Some keys are hot: one message of eight goes to one key of a hundred.
    fn any_key(&self) -> String {
        let keys = match fastrand::usize(0..8) {
            0 => self.keys.div_ceil(100),
            _ => self.keys,
        };
        format!("k{}", fastrand::usize(0..keys))
    }
}

/// Most messages of one transaction.
const MOST_AT_ONCE: usize = 5;

#[expect(clippy::cast_precision_loss, reason = "both are small")]
fn fraction(part: usize, whole: usize) -> f64 {
    part as f64 / whole as f64
}
