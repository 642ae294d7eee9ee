//! In which order keys are read, and which of them are left out: what one find goes through. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Bound;

use mongodb::bson::{Document, doc};
use outbox_core::{Held, MessageId, OrderKey, Shard};

use crate::commands::shards;
use crate::row::{flow, flows_of};

/// A key, or a keyless message, as the index has it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Flow {
    pub(crate) shard: Shard,
    pub(crate) name: String,
}

/// Keys are data of the user's: they are not shown.
impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flow")
            .field("shard", &self.shard)
            .finish_non_exhaustive()
    }
}

impl Flow {
    pub(crate) fn of_key(shard: Shard, key: &OrderKey) -> Self {
        // The id is of no account where there is a key.
        let name = flow(&key.topic, Some(&key.key), MessageId::from_bytes([0; 16]));
        Self { shard, name }
    }
}

/// Where the ring goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ring {
    Start,
    /// With this key.
    At(Flow),
    /// Behind this key.
    Behind(Flow),
    /// Behind this shard.
    Shard(Shard),
}

/// What one find goes through: most often all that is left of a turn.
pub(crate) struct Stretch {
    /// What it asks for; all of it must be so.
    pub(crate) asked: Vec<Document>,
    /// Whether it is the first of a turn.
    pub(crate) begins: bool,
    /// Where the ring goes on when it was read to its end. With the last of a turn it is at its start again.
    pub(crate) next: Ring,
}

impl Ring {
    /// What is to be read next.
    pub(crate) fn next(&self, owned: &[Shard], closed: &Closed) -> Stretch {
        let last = |shard: Shard| owned.last().is_none_or(|last| *last <= shard);
        let from = match self {
            Self::At(flow) => Some((flow.shard, Bound::Included(flow.name.as_str()))),
            Self::Behind(flow) => Some((flow.shard, Bound::Excluded(flow.name.as_str()))),
            Self::Start | Self::Shard(_) => None,
        };
        if let Some((shard, from)) = from.filter(|(shard, _)| owned.contains(shard)) {
            return closed.stretch_within(shard, from, last(shard));
        }
        let rest = match self {
            Self::Start => owned,
            Self::At(Flow { shard, .. }) | Self::Behind(Flow { shard, .. }) | Self::Shard(shard) => {
                &owned[owned.partition_point(|own| own <= shard)..]
            }
        };
        let rest = if rest.is_empty() { owned } else { rest };
        let begins = rest.len() == owned.len();
        let together = &rest[..closed.fitting(rest)];
        match (together.last(), rest.first()) {
            (Some(shard), _) => Stretch {
                asked: std::iter::once(doc! { "shard": { "$in": shards(together.iter().copied()) } })
                    .chain(closed.of(together))
                    .collect(),
                begins,
                next: if last(*shard) {
                    Self::Start
                } else {
                    Self::Shard(*shard)
                },
            },
            (None, Some(shard)) => Stretch {
                begins,
                ..closed.stretch_within(*shard, Bound::Unbounded, last(*shard))
            },
            (None, None) => Stretch {
                asked: Vec::new(),
                begins,
                next: Self::Start,
            },
        }
    }
}

/// What is held by key or by topic, in the order in which it is read, so that each find need only be told what is in its way:
/// all of it might be too much for a command.
pub(crate) struct Closed {
    keys: BTreeMap<Shard, Keys>,
    /// The first that a flow of each topic could be, and the first behind them all. None is within another.
    topics: Vec<(String, String)>,
    /// How many bytes of it one find is told.
    most: usize,
}

#[derive(Default)]
struct Keys {
    names: BTreeSet<String>,
    bytes: usize,
}

impl Closed {
    pub(crate) fn new(held: &Held, most: usize) -> Self {
        let mut keys = BTreeMap::<Shard, Keys>::new();
        for (shard, key) in &held.keys {
            let Flow { name, .. } = Flow::of_key(*shard, key);
            let own = keys.entry(*shard).or_default();
            own.bytes += Out::Key(&name).bytes();
            own.names.insert(name);
        }
        let mut topics: Vec<_> = held.topics.iter().map(|topic| flows_of(topic)).collect();
        topics.sort_unstable();
        Self { keys, topics, most }
    }

    /// Whether it takes several finds to go through everything.
    pub(crate) fn is_large(&self) -> bool {
        self.topic_bytes() + self.keys.values().map(|keys| keys.bytes).sum::<usize>() > self.most
    }

    /// What leaves out all topics; nothing where they are too many for that.
    pub(crate) fn topics(&self) -> Option<Vec<Document>> {
        (self.topic_bytes() <= self.most).then(|| left_out(Vec::new(), self.topics.iter().collect()))
    }

    /// The names of all keys.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys
            .values()
            .flat_map(|keys| keys.names.iter().map(String::as_str))
    }

    /// Whether the topic of this flow is held.
    pub(crate) fn has_topic_of(&self, flow: &str) -> bool {
        let before = self.topics.partition_point(|(first, _)| first.as_str() <= flow);
        let topic = before.checked_sub(1).and_then(|last| self.topics.get(last));
        topic.is_some_and(|(_, behind)| flow < behind.as_str())
    }

    fn topic_bytes(&self) -> usize {
        self.topics.iter().map(|topic| Out::Topic(topic).bytes()).sum()
    }

    /// How many of these shards one find can go through.
    fn fitting(&self, shards: &[Shard]) -> usize {
        let mut bytes = self.topic_bytes();
        let fits = |shard: &&Shard| {
            bytes += self.keys.get(shard).map_or(0, |keys| keys.bytes);
            bytes <= self.most
        };
        shards.iter().take_while(fits).count()
    }

    /// What leaves out all that is held of these shards.
    fn of(&self, shards: &[Shard]) -> Vec<Document> {
        let keys = shards.iter().filter_map(|shard| self.keys.get(shard));
        let keys = keys.flat_map(|keys| keys.names.iter().map(String::as_str));
        left_out(keys.collect(), self.topics.iter().collect())
    }

    /// As far into a shard as one find can be told what is held there, and at least behind the first of it.
    fn stretch_within(&self, shard: Shard, from: Bound<&str>, last: bool) -> Stretch {
        let keys = self.keys.get(&shard).into_iter();
        let keys = keys.flat_map(|keys| keys.names.range::<str, _>((from, Bound::Unbounded)));
        let keys = keys
            .map(String::as_str)
            .filter(|key| !self.has_topic_of(key))
            .map(Out::Key);
        let topics = self.topics.iter().filter(|(_, behind)| match from {
            Bound::Included(from) | Bound::Excluded(from) => from < behind.as_str(),
            Bound::Unbounded => true,
        });
        let mut out: Vec<Out<'_>> = keys.chain(topics.map(Out::Topic)).collect();
        out.sort_unstable_by_key(|out| out.first());
        let mut bytes = 0;
        let fits = |out: &&Out<'_>| {
            bytes += out.bytes();
            bytes <= self.most
        };
        let fitting = out.iter().take_while(fits).count().max(1);
        let end = out.get(fitting).map(|out| out.first());

        let mut within = Document::new();
        match from {
            Bound::Included(from) => drop(within.insert("$gte", from)),
            Bound::Excluded(from) => drop(within.insert("$gt", from)),
            Bound::Unbounded => {}
        }
        if let Some(end) = end {
            within.insert("$lt", end);
        }
        let mut asked = doc! { "shard": i32::from(shard.0) };
        if !within.is_empty() {
            asked.insert("flow", within);
        }
        let next = match end {
            Some(end) => Ring::At(Flow {
                shard,
                name: end.to_owned(),
            }),
            None if last => Ring::Start,
            None => Ring::Shard(shard),
        };
        let (mut keys, mut topics) = (Vec::new(), Vec::new());
        for out in out.into_iter().take(fitting) {
            match out {
                Out::Key(key) => keys.push(key),
                Out::Topic(topic) => topics.push(topic),
            }
        }
        Stretch {
            asked: std::iter::once(asked).chain(left_out(keys, topics)).collect(),
            begins: false,
            next,
        }
    }
}

/// A key or a topic that is left out.
#[derive(Clone, Copy)]
enum Out<'c> {
    Key(&'c str),
    Topic(&'c (String, String)),
}

impl<'c> Out<'c> {
    fn first(self) -> &'c str {
        match self {
            Self::Key(key) => key,
            Self::Topic((first, _)) => first,
        }
    }

    /// How large it is in a command, with what stands around it.
    fn bytes(self) -> usize {
        match self {
            Self::Key(key) => key.len() + 16,
            Self::Topic((first, behind)) => first.len() + behind.len() + 64,
        }
    }
}

/// Conditions that leave out these keys, and these topics in their order.
fn left_out(keys: Vec<&str>, topics: Vec<&(String, String)>) -> Vec<Document> {
    let mut all = Vec::new();
    if !keys.is_empty() {
        all.push(doc! { "flow": { "$nin": keys } });
    }
    // What is between the topics, in one condition of ranges: of several the index is bounded by one alone.
    let mut between = Vec::new();
    let mut rest = Document::new();
    for (first, behind) in topics {
        rest.insert("$lt", first);
        between.push(doc! { "flow": std::mem::take(&mut rest) });
        rest.insert("$gte", behind);
    }
    if !rest.is_empty() {
        between.push(doc! { "flow": rest });
        all.push(doc! { "$or": between });
    }
    all
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use mongodb::bson::Bson;
    use outbox_core::shard_of;

    use super::*;

    /// Whether a flow is asked for: what a server makes of the conditions.
    fn asks(conditions: &[Document], at: &Flow) -> bool {
        conditions
            .iter()
            .flatten()
            .all(|(field, asked)| match field.as_str() {
                "$or" => {
                    let any = asked.as_array().unwrap();
                    any.iter()
                        .any(|one| asks(&[one.as_document().unwrap().clone()], at))
                }
                "shard" => is(&Bson::Int32(i32::from(at.shard.0)), asked),
                "flow" => is(&Bson::String(at.name.clone()), asked),
                other => panic!("{other}"),
            })
    }

    fn is(value: &Bson, asked: &Bson) -> bool {
        let Some(operators) = asked.as_document() else {
            return value == asked;
        };
        operators.iter().all(|(operator, operand)| {
            let order = || value.as_str().unwrap().cmp(operand.as_str().unwrap());
            match operator.as_str() {
                "$in" => operand.as_array().unwrap().contains(value),
                "$nin" => !operand.as_array().unwrap().contains(value),
                "$lt" => order() == Ordering::Less,
                "$gt" => order() == Ordering::Greater,
                "$gte" => order() != Ordering::Less,
                other => panic!("{other}"),
            }
        })
    }

    /// Keys of a few topics, whose names begin like one another's, on the shards that are theirs.
    struct World {
        flows: Vec<Flow>,
        held: Held,
        owned: Vec<Shard>,
    }

    fn world(random: &mut fastrand::Rng) -> World {
        const TOPICS: [&str; 5] = ["a", "a-b", "a.b", "ab", "b"];
        let count = random.u16(1..=4);
        let mut held = Held::default();
        for topic in TOPICS {
            if random.u8(..) < 60 {
                held.topics.insert(topic.into());
            }
        }
        let mut flows = Vec::new();
        for number in 0..random.usize(0..60) {
            let topic = random.choice(TOPICS).unwrap();
            let key = OrderKey {
                topic: topic.into(),
                key: format!("{}{number}", "k".repeat(random.usize(0..40))).into(),
            };
            let shard = shard_of(Some(&key.key), MessageId::from_bytes([0; 16]), count);
            flows.push(Flow::of_key(shard, &key));
            if random.bool() {
                held.keys.insert((shard, key));
            }
        }
        flows.sort_unstable();
        let owned: Vec<Shard> = (0..count).map(Shard).filter(|_| random.u8(..) < 200).collect();
        World { flows, held, owned }
    }

    fn is_free(flow: &Flow, held: &Held) -> bool {
        let topic = flow.name.split('/').next().unwrap();
        let keys = held.keys.iter();
        !held.topics.contains(topic)
            && !keys
                .into_iter()
                .any(|(shard, key)| Flow::of_key(*shard, key) == *flow)
    }

    /// From wherever it begins, and however little a find is told: all that is free is gone through once in a turn, in order,
    /// and the turn comes to an end.
    #[test]
    fn a_turn_of_the_ring_goes_through_all_that_is_not_held_once() {
        for seed in 0..2_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let World { flows, held, owned } = world(&mut random);
            if owned.is_empty() {
                continue;
            }
            let most = *random.choice(&[0, 1, 100, 300, 1_000, 1 << 20]).unwrap();
            let closed = Closed::new(&held, most);
            let somewhere = random.choice(&flows).cloned();
            let mut ring = match (random.u8(0..4), somewhere) {
                (1, Some(flow)) => Ring::At(flow),
                (2, Some(flow)) => Ring::Behind(flow),
                (3, _) => Ring::Shard(Shard(random.u16(0..5))),
                _ => Ring::Start,
            };
            // The rest of this turn, then a whole one.
            let (mut seen, mut begun, mut finds) = (Vec::new(), false, 0);
            loop {
                finds += 1;
                assert!(
                    finds <= 2 * (flows.len() + 20),
                    "seed {seed}: the ring does not end"
                );
                let stretch = ring.next(&owned, &closed);
                if stretch.begins {
                    assert!(!begun, "seed {seed}: a turn begins twice");
                    begun = true;
                    seen.clear();
                }
                let read = flows.iter().filter(|flow| asks(&stretch.asked, flow));
                seen.extend(read.cloned());
                let told: usize = stretch
                    .asked
                    .iter()
                    .map(|asked| mongodb::bson::to_vec(asked).unwrap().len())
                    .sum();
                // Where nothing fits it is told of one key or topic.
                assert!(told <= most + 400, "seed {seed}: {told} bytes");
                ring = stretch.next;
                if begun && ring == Ring::Start {
                    break;
                }
            }
            let free: Vec<Flow> = flows
                .iter()
                .filter(|flow| owned.contains(&flow.shard) && is_free(flow, &held))
                .cloned()
                .collect();
            assert_eq!(seen, free, "seed {seed}");
            if !closed.is_large() {
                assert!(finds <= 3, "seed {seed}: {finds} finds");
            }
        }
    }

    #[test]
    fn no_key_is_shown() {
        let flow = Flow {
            shard: Shard(3),
            name: "orders/=canary".to_owned(),
        };
        let shown = format!("{:?} {:?}", Ring::At(flow.clone()), Ring::Behind(flow));
        assert!(!shown.contains("canary"), "{shown}");
    }

    #[test]
    fn a_topic_is_known_by_a_flow_of_it() {
        for seed in 0..200 {
            let World { flows, held, .. } = world(&mut fastrand::Rng::with_seed(seed));
            let closed = Closed::new(&held, 0);
            for flow in flows {
                let topic = flow.name.split('/').next().unwrap();
                assert_eq!(closed.has_topic_of(&flow.name), held.topics.contains(topic));
            }
        }
    }
}
