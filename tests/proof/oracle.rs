//! The oracle: compares what was written with what arrived. Pure: it reads no clock, file or server.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use outbox::MessageId;

use super::report::Report;
use super::stamp::Stamp;
use super::walk::Walk;
use super::writer::{End, Written};

/// Everything that is known of a run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Run {
    pub(crate) topic: String,
    /// The writer's log.
    pub(crate) written: Vec<Written>,
    /// The topic from its beginning: of each partition all records, in order.
    pub(crate) arrived: Vec<Arrived>,
    pub(crate) dead: Vec<MessageId>,
    /// Of each key the sum of the numbers that a consumer with an inbox has added up, when there was one.
    pub(crate) effects: Option<BTreeMap<String, u64>>,
    /// How the outbox looked when all relays had stopped in order, when somebody looked.
    pub(crate) ending: Option<Ending>,
    /// Whether the outbox numbers the messages of each key, as the writer does.
    pub(crate) sequenced: bool,
    /// What is wrong with the resources that the relays used, where somebody looked.
    pub(crate) resources: Vec<String>,
    pub(crate) limits: Limits,
}

/// A record as the destination has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Arrived {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) payload: Option<Vec<u8>>,
    pub(crate) headers: Vec<(String, Vec<u8>)>,
}

/// What may repeat. The default is a run without faults.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Limits {
    /// How often one key may go back: once for each fault that hit a relay.
    pub(crate) rewinds: usize,
    /// How many records of a key may repeat each time: what a relay has in flight at most.
    pub(crate) repeats: usize,
}

/// What is left in the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Ending {
    pub(crate) backlog: u64,
    pub(crate) held: u64,
    pub(crate) scheduled: u64,
    pub(crate) owned_shards: usize,
    pub(crate) relays: usize,
}

/// A record that may be in the topic.
struct Sound<'a> {
    at: &'a Arrived,
    stamp: &'a Stamp,
}

impl Run {
    /// Holds the run to the laws.
    pub(crate) fn judge(&self) -> Report {
        let mut report = Report::default();
        let sound = self.contents(&mut report);
        let delivered: HashSet<MessageId> = sound.iter().map(|record| record.stamp.id).collect();
        report.distinct = delivered.len();
        report.duplicates = sound.len() - delivered.len();
        self.loss(&delivered, &mut report);
        self.counting(&delivered, &mut report);
        self.order(&sound, &mut report);
        self.effects(&delivered, &mut report);
        self.liveness(&mut report);
        for what in &self.resources {
            report.violation("I7", what.clone());
        }
        report
    }

    /// I2: only what may be there is there, and it is what was written.
    fn contents<'a>(&'a self, report: &mut Report) -> Vec<Sound<'a>> {
        let written: HashMap<MessageId, &Written> = self
            .written
            .iter()
            .map(|written| (written.stamp.id, written))
            .collect();
        report.arrived = self.arrived.len();
        let mut sound = Vec::with_capacity(self.arrived.len());
        for at in &self.arrived {
            let place = at.place();
            let Some(stamp) = at.stamp() else {
                report.damaged += 1;
                report.violation("I2", format!("{place}: the payload is damaged"));
                continue;
            };
            match written.get(&stamp.id) {
                Some(written) if written.end == End::RolledBack => {
                    report.phantoms += 1;
                    report.violation("I2", format!("{place}: {stamp} was rolled back and arrived"));
                }
                Some(written) => {
                    if let Some(what) = at.differs(&written.stamp, &self.topic, self.sequenced) {
                        report.damaged += 1;
                        report.violation("I2", format!("{place}: {stamp} arrived with {what}"));
                    }
                    sound.push(Sound {
                        at,
                        stamp: &written.stamp,
                    });
                }
                None => {
                    report.phantoms += 1;
                    report.violation("I2", format!("{place}: {stamp} arrived and was never written"));
                }
            }
        }
        sound
    }

    /// I1: what was committed arrived, or is a dead letter because it is poison.
    fn loss(&self, delivered: &HashSet<MessageId>, report: &mut Report) {
        let dead: HashSet<MessageId> = self.dead.iter().copied().collect();
        report.dead = dead.len();
        for written in &self.written {
            match written.end {
                End::Committed => report.committed += 1,
                End::RolledBack => report.rolled_back += 1,
                End::Unknown => report.unknown += 1,
            }
            let id = written.stamp.id;
            if written.end == End::Committed && !delivered.contains(&id) && !dead.contains(&id) {
                report.lost += 1;
                report.violation(
                    "I1",
                    format!("{} was committed and did not arrive", written.stamp),
                );
            }
            if dead.contains(&id) && !written.stamp.poison {
                report.violation("I1", format!("{} died of nothing", written.stamp));
            }
            if delivered.contains(&id) && written.stamp.poison {
                report.violation(
                    "I2",
                    format!("{} is larger than the topic takes, and arrived", written.stamp),
                );
            }
        }
    }

    /// The writer itself counted every key from one without a gap; else the law of order would prove nothing.
    fn counting(&self, delivered: &HashSet<MessageId>, report: &mut Report) {
        let mut numbers: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
        let counts = |written: &&Written| {
            written.end == End::Committed
                || (written.end == End::Unknown && delivered.contains(&written.stamp.id))
        };
        for Written { stamp, .. } in self.written.iter().filter(counts) {
            numbers.entry(&stamp.key).or_default().push(stamp.n);
        }
        for (key, mut numbers) in numbers {
            numbers.sort_unstable();
            if !numbers.iter().copied().eq(1..=numbers.len() as u64) {
                report.violation(
                    "I0",
                    format!("the writer did not count {key} from 1 without a gap"),
                );
            }
        }
    }

    /// I3 and I4: walks each key through its partition with the highest number seen so far.
    fn order(&self, sound: &[Sound<'_>], report: &mut Report) {
        let dead: HashSet<MessageId> = self.dead.iter().copied().collect();
        let buried: BTreeSet<(&str, u64)> = self
            .written
            .iter()
            .filter(|written| dead.contains(&written.stamp.id))
            .map(|written| (written.stamp.key.as_str(), written.stamp.n))
            .collect();
        let mut keys: BTreeMap<&str, Walk> = BTreeMap::new();
        for Sound { at, stamp } in sound {
            let walk = keys.entry(&stamp.key).or_insert_with(|| Walk::new(at.partition));
            if walk.partition != at.partition {
                report.violation("I3", format!("{}: {stamp} is in a second partition", at.place()));
            }
            while buried.contains(&(stamp.key.as_str(), walk.highest + 1)) && stamp.n > walk.highest {
                walk.highest += 1;
            }
            let highest = walk.highest;
            if stamp.n > highest + 1 {
                report.gaps += 1;
                report.violation(
                    "I3",
                    format!("{}: {stamp} comes when the highest was {highest}", at.place()),
                );
            }
            walk.step(stamp.n);
        }
        for (key, walk) in keys {
            report.rewinds += walk.rewinds;
            report.most_rewinds = report.most_rewinds.max(walk.rewinds);
            report.most_repeats = report.most_repeats.max(walk.most_repeats);
            if walk.rewinds > self.limits.rewinds {
                let allowed = self.limits.rewinds;
                report.violation(
                    "I4",
                    format!("{key} went back {} times, allowed {allowed}", walk.rewinds),
                );
            } else if walk.most_repeats > self.limits.repeats {
                let (most, allowed) = (walk.most_repeats, self.limits.repeats);
                report.violation(
                    "I4",
                    format!("{key} repeated {most} records at once, allowed {allowed}"),
                );
            }
        }
    }

    /// I5: the effects are those of each delivered message once.
    fn effects(&self, delivered: &HashSet<MessageId>, report: &mut Report) {
        let Some(effects) = &self.effects else { return };
        let mut expected: BTreeMap<&str, u64> = BTreeMap::new();
        for Written { stamp, .. } in &self.written {
            if delivered.contains(&stamp.id) {
                *expected.entry(&stamp.key).or_default() += stamp.n;
            }
        }
        let keys: BTreeSet<&str> = expected
            .keys()
            .copied()
            .chain(effects.keys().map(String::as_str))
            .collect();
        for key in keys {
            let (sum, should) = (effects.get(key).copied(), expected.get(key).copied());
            if sum.unwrap_or(0) != should.unwrap_or(0) {
                report.violation("I5", format!("{key} sums up to {sum:?}, expected {should:?}"));
            }
        }
    }

    /// I6: nothing waits, nobody owns.
    fn liveness(&self, report: &mut Report) {
        if let Some(ending) = self.ending.filter(|ending| *ending != Ending::default()) {
            report.violation("I6", format!("in the end: {ending:?}"));
        }
    }
}

impl Arrived {
    /// The stamp that it carries; none when it is damaged.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        Stamp::read(self.payload.as_deref()?)
    }

    fn place(&self) -> String {
        format!("partition {} offset {}", self.partition, self.offset)
    }

    /// What is not as the stamp's message would have it.
    fn differs(&self, stamp: &Stamp, topic: &str, sequenced: bool) -> Option<&'static str> {
        let parts = stamp.message(topic).into_parts();
        let mut headers = vec![("outbox-id".to_owned(), stamp.id.to_string().into_bytes())];
        if sequenced {
            // The framework counts as the writer does.
            headers.push(("outbox-key-seq".to_owned(), stamp.n.to_string().into_bytes()));
        }
        headers.extend(
            parts
                .content_type
                .map(|text| ("content-type".to_owned(), text.as_bytes().to_vec())),
        );
        headers.extend(
            parts
                .headers
                .iter()
                .map(|(name, value)| (name.to_owned(), value.to_vec())),
        );
        if self.key.as_deref() != parts.key.as_deref() {
            Some("another key")
        } else if self.payload.as_deref() != parts.payload.as_deref() {
            Some("another payload")
        } else if self.headers != headers {
            Some("other headers")
        } else {
            None
        }
    }
}
