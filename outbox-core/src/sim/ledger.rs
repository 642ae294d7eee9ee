//! What was written and what arrived, and the laws between the two.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::time::{Duration, SystemTime};

use crate::fetch::Record;
use crate::message::{Message, MessageId, OrderKey};

/// A law, and what breaks it.
pub(super) type Breach = (&'static str, String);

#[derive(Debug)]
pub(super) struct Ledger {
    written: HashMap<MessageId, Written>,
    /// What arrived, in order, and from which relay.
    arrived: Vec<(MessageId, u32)>,
    /// What the destination has refused at least once: nothing else may die.
    refused: BTreeSet<MessageId>,
    /// Whether the store numbers the messages of each key.
    pub(super) sequenced: bool,
    /// Whether the destination delivers what follows a refused message: then that is as good as buried.
    pub(super) goes_on: bool,
    pub(super) faults: BTreeMap<&'static str, u64>,
    /// The first law that was seen to be broken.
    breach: Option<Breach>,
    hash: DefaultHasher,
    pub(super) lines: Option<Vec<String>>,
}

#[derive(Debug)]
struct Written {
    message: Message,
    /// Its number within its key, from 1; where there is no order it has none.
    number: Option<u64>,
    end: End,
}

/// What became of the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Open,
    Committed,
    RolledBack,
}

/// What it all came to.
#[derive(Debug)]
pub(super) struct Total {
    pub(super) committed: u64,
    pub(super) arrived: u64,
    pub(super) duplicates: u64,
}

impl Ledger {
    pub(super) fn new(traced: bool) -> Self {
        Self {
            written: HashMap::new(),
            arrived: Vec::new(),
            refused: BTreeSet::new(),
            sequenced: false,
            goes_on: false,
            faults: BTreeMap::new(),
            breach: None,
            hash: DefaultHasher::new(),
            lines: traced.then(Vec::new),
        }
    }

    pub(super) fn note(&mut self, now: Duration, what: fmt::Arguments<'_>) {
        let line = format!("{:>10.3} {what}", now.as_secs_f64());
        line.hash(&mut self.hash);
        if let Some(lines) = &mut self.lines {
            lines.push(line);
        }
    }

    /// A hash of all that was noted.
    pub(super) fn trace(&self) -> u64 {
        self.hash.finish()
    }

    pub(super) fn breach(&self) -> Option<&Breach> {
        self.breach.as_ref()
    }

    pub(super) fn is_broken(&mut self, law: &'static str, what: String) {
        self.breach.get_or_insert((law, what));
    }

    /// A producer writes a message in an open transaction.
    pub(super) fn write(&mut self, message: Message, number: Option<u64>) {
        self.written.insert(
            message.id(),
            Written {
                message,
                number,
                end: End::Open,
            },
        );
    }

    /// Its transaction ends.
    pub(super) fn end(&mut self, ids: &[MessageId], end: End) {
        for id in ids {
            if let Some(written) = self.written.get_mut(id) {
                written.end = end;
            }
        }
    }

    /// A message as it is told.
    pub(super) fn name(&self, id: MessageId) -> String {
        match self.written.get(&id).and_then(Written::place) {
            Some((key, number)) => format!("{key} #{number}"),
            None => id.to_string(),
        }
    }

    /// The destination has refused a message.
    pub(super) fn refuse(&mut self, id: MessageId) {
        self.refused.insert(id);
    }

    /// The destination has a record, by a relay, when the clocks show this. I2 is judged at once.
    pub(super) fn arrive(&mut self, record: &Record, relay: u32, wall: SystemTime) {
        let id = record.message.id();
        let found = match self.written.get(&id) {
            None => Some("was never written".to_owned()),
            Some(written) => match written.end {
                End::Open => Some("arrived before it was committed".to_owned()),
                End::RolledBack => Some("was rolled back and arrived".to_owned()),
                End::Committed if written.message.deliver_at().is_some_and(|due| due > wall) => {
                    Some("arrived before its time".to_owned())
                }
                End::Committed => written.differs(record, self.sequenced),
            },
        };
        if let Some(what) = found {
            self.is_broken("I2", format!("{id} {what}"));
        }
        self.arrived.push((id, relay));
    }

    /// I1, I3 and I4, when all is over. `window` is how many records a relay has in its hands at most.
    pub(super) fn judge(&mut self, dead: &BTreeSet<MessageId>, window: u64, calm: bool) -> Total {
        let mut total = Total {
            committed: 0,
            arrived: count(self.arrived.len()),
            duplicates: 0,
        };
        let mut lost = None;
        let seen: BTreeSet<MessageId> = self.arrived.iter().map(|(id, _)| *id).collect();
        for (id, written) in &self.written {
            if written.end == End::Committed {
                total.committed += 1;
                if !seen.contains(id) && !dead.contains(id) {
                    lost = lost.max(Some(*id));
                }
            }
        }
        total.duplicates = total.arrived - count(seen.len());
        if let Some(id) = lost {
            self.is_broken("I1", format!("{id} was committed and is nowhere"));
        }
        for id in dead {
            let committed = self
                .written
                .get(id)
                .is_some_and(|written| written.end == End::Committed);
            if !committed || !self.refused.contains(id) {
                let what = format!("{} is a dead letter, and nobody has refused it", self.name(*id));
                self.is_broken("I1", what);
            }
        }
        if let Some(what) = self.walk(dead, window) {
            self.is_broken("I3", what);
        }
        if calm && total.duplicates > 0 {
            let what = format!("{} messages arrived twice without a fault", total.duplicates);
            self.is_broken("I4", what);
        }
        total
    }

    /// Walks through what arrived with the highest number of each key so far.
    fn walk(&mut self, dead: &BTreeSet<MessageId>, window: u64) -> Option<String> {
        let refused = self.refused.iter().filter(|_| self.goes_on);
        let buried: BTreeSet<(OrderKey, u64)> = dead
            .iter()
            .chain(refused)
            .filter_map(|id| self.written.get(id)?.place())
            .collect();
        let faults: u64 = self.faults.values().sum();
        let mut highest: BTreeMap<OrderKey, u64> = BTreeMap::new();
        let mut walks: BTreeMap<(u32, OrderKey), Walk> = BTreeMap::new();
        for (id, relay) in &self.arrived {
            let Some((key, number)) = self.written.get(id).and_then(Written::place) else {
                continue;
            };
            let highest = highest.entry(key.clone()).or_default();
            while number > *highest && buried.contains(&(key.clone(), *highest + 1)) {
                *highest += 1;
            }
            if number > *highest + 1 {
                return Some(format!("{number} of {key} came when the highest was {highest}"));
            }
            let walk = walks.entry((*relay, key.clone())).or_default();
            if number <= walk.last {
                walk.rewinds += 1;
                walk.repeats = 0;
            }
            walk.repeats = if number <= *highest { walk.repeats + 1 } else { 0 };
            walk.last = number;
            *highest = number.max(*highest);
            // What it had in its hands when it lost them, and what it took over.
            if walk.repeats > 2 * window {
                let what = format!("relay-{relay} repeated {} of {key} in a row", walk.repeats);
                self.breach.get_or_insert(("I4", what));
            }
            if walk.rewinds > faults {
                let what = format!("relay-{relay} went back in {key} more often than something failed");
                self.breach.get_or_insert(("I4", what));
            }
        }
        None
    }
}

/// How a relay goes through a key.
#[derive(Default)]
struct Walk {
    last: u64,
    rewinds: u64,
    /// How many it has just sent, one after the other since it last went back itself, that had arrived before.
    repeats: u64,
}

impl Written {
    fn place(&self) -> Option<(OrderKey, u64)> {
        Some((self.message.order_key()?, self.number?))
    }

    /// How a record is not what was written.
    fn differs(&self, record: &Record, sequenced: bool) -> Option<String> {
        let (ours, theirs) = (&self.message, &record.message);
        let what = if ours.topic() != theirs.topic() || ours.key() != theirs.key() {
            "another topic or key"
        } else if ours.payload() != theirs.payload() {
            "another payload"
        } else if ours.headers() != theirs.headers() || ours.content_type() != theirs.content_type() {
            "other headers"
        } else if record.key_seq.and_then(|seq| u64::try_from(seq).ok()) != self.number.filter(|_| sequenced)
        {
            return Some(format!(
                "is number {:?} of its key and has {:?}",
                self.number, record.key_seq
            ));
        } else {
            return None;
        };
        Some(format!("arrived with {what}"))
    }
}

pub(super) fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
