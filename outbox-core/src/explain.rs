//! Why is this still here? Draws the conclusions from what a store knows; pure, so that every answer can be tested.

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::hold::{Hold, HoldScope, HoldState};
use crate::human::short;
use crate::inspect::{Facts, Place, Standing, Subject};
use crate::lease::RelayId;
use crate::message::MessageId;
use crate::shard::Shard;
use crate::store::Count;

/// Why something is where it is.
///
/// ```
/// use outbox_core::{MemoryStore, Message, OutboxStore, Subject, explain};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// let store = MemoryStore::default();
/// let mut tx = store.begin();
/// store.enqueue(&mut tx, &Message::builder("orders").key("42").build()?).await?;
/// tx.commit();
///
/// let subject = Subject::Topic("orders".into());
/// let facts = store.inspection().unwrap().inspect(&subject, 1_000).await?;
/// let explanation = explain(&subject, &facts);
/// assert_eq!(explanation.places.len(), 1);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// What is true of the subject as a whole. Empty when the places say all.
    pub causes: Vec<Cause>,
    /// Each place that was found, with why the message is still there.
    pub places: Vec<Explained>,
}

/// One place, explained.
///
/// ```
/// use outbox_core::{MemoryStore, Message, OutboxStore, Subject, explain};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// let store = MemoryStore::default();
/// let mut tx = store.begin();
/// store.enqueue(&mut tx, &Message::builder("orders").key("42").build()?).await?;
/// tx.commit();
///
/// let subject = Subject::Topic("orders".into());
/// let facts = store.inspection().unwrap().inspect(&subject, 1_000).await?;
/// for explained in explain(&subject, &facts).places {
///     println!("{}: {}", explained.standing.id, explained.causes[0]);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Explained {
    /// The message and its place.
    pub standing: Standing,
    /// Why it is there, the most decisive cause first; never empty.
    pub causes: Vec<Cause>,
}

/// One reason. Its `Display` is a sentence for people, [`code`](Self::code) is for programs.
///
/// ```
/// use outbox_core::Cause;
///
/// assert!(Cause::NoRelay.to_string().contains("relay"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// Its topic is held, with all that is in it.
    TopicHeld(Hold),
    /// It failed and is held itself; if it has a key, as its head.
    Held(Hold),
    /// It waits behind the head of its key, which is held.
    Behind(Hold),
    /// Keys of the topic are held.
    KeysHeld {
        /// So many are tried again.
        retrying: usize,
        /// So many wait for an operator.
        parked: usize,
    },
    /// No relay is running.
    NoRelay,
    /// Relays are running, but none owns these shards.
    NoOwner {
        /// The shards.
        shards: Vec<Shard>,
        /// How many relays are running.
        relays: usize,
    },
    /// Nothing that the store knows of stands in its way.
    InLine {
        /// How many of its shard stand before it.
        ahead: Count,
        /// Who owns the shard.
        owner: RelayId,
        /// How long the owner's lease still runs.
        lease_left: Duration,
    },
    /// It is not to go yet; zero is due, and the shard's owner puts it into the outbox.
    Scheduled {
        /// Time from now.
        due_in: Duration,
    },
    /// It was delivered.
    Delivered {
        /// Time until now.
        ago: Duration,
    },
    /// It was given up.
    Dead {
        /// Which.
        id: MessageId,
        /// How often it was tried.
        attempts: u32,
        /// What the sink said last.
        reason: String,
        /// Time until now.
        ago: Duration,
    },
    /// There is no such message, or none undelivered of the key or topic.
    NotHere {
        /// Whether everything was looked at.
        complete: bool,
        /// Whether a message was asked for, which may have been delivered, and not a key or a topic.
        message: bool,
    },
}

/// Draws the conclusions.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::{MemoryStore, Message, OutboxStore, Subject, explain};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> outbox_core::Result<()> {
/// let store = MemoryStore::default();
/// let mut tx = store.begin();
/// let message = Message::builder("orders").key("42").payload("placed").build()?;
/// store.enqueue(&mut tx, &message).await?;
/// tx.commit();
///
/// let subject = Subject::Message(message.id());
/// let facts = store.inspection().unwrap().inspect(&subject, 1_000).await?;
/// let explanation = explain(&subject, &facts);
/// assert_eq!(explanation.places[0].causes[0].to_string(), "no relay is running");
/// # Ok(()) }
/// ```
#[must_use]
pub fn explain(subject: &Subject, facts: &Facts) -> Explanation {
    Explanation {
        causes: whole(subject, facts),
        places: facts
            .found
            .iter()
            .map(|standing| Explained {
                standing: standing.clone(),
                causes: place(standing, facts),
            })
            .collect(),
    }
}

/// What is true of the subject as a whole.
fn whole(subject: &Subject, facts: &Facts) -> Vec<Cause> {
    let mut causes = Vec::new();
    if facts.found.is_empty() {
        causes.push(Cause::NotHere {
            complete: facts.complete,
            message: matches!(subject, Subject::Message(_)),
        });
    }
    if matches!(subject, Subject::Message(_)) {
        return causes;
    }
    if facts.found.is_empty() {
        causes.extend(topic_hold(facts).cloned().map(Cause::TopicHeld));
    }
    if matches!(subject, Subject::Topic(_)) {
        let keys = facts
            .holds
            .iter()
            .filter(|hold| matches!(hold.scope, HoldScope::Key(_)));
        let (parked, retrying): (Vec<_>, Vec<_>) = keys.partition(|hold| hold.state == HoldState::Parked);
        if !parked.is_empty() || !retrying.is_empty() {
            causes.push(Cause::KeysHeld {
                retrying: retrying.len(),
                parked: parked.len(),
            });
        }
        let free = facts.leases.iter().filter(|lease| lease.owner.is_none());
        causes.extend(unowned(free.map(|lease| lease.shard).collect(), facts));
    }
    causes
}

fn place(standing: &Standing, facts: &Facts) -> Vec<Cause> {
    let since = |at: SystemTime| facts.now.duration_since(at).unwrap_or_default();
    match &standing.place {
        Place::Outbox { shard, ahead, .. } => undelivered(standing, *shard, *ahead, facts),
        Place::Scheduled { shard, due } => {
            let due_in = due.duration_since(facts.now).unwrap_or_default();
            let mut causes = vec![Cause::Scheduled { due_in }];
            // As long as it is not due nobody has to own its shard.
            if due_in.is_zero() && owner(*shard, facts).is_none() {
                causes.extend(unowned(vec![*shard], facts));
            }
            causes
        }
        Place::Processed { at, .. } => vec![Cause::Delivered { ago: since(*at) }],
        Place::Dead {
            attempts, reason, at, ..
        } => vec![Cause::Dead {
            id: standing.id,
            attempts: *attempts,
            reason: reason.clone(),
            ago: since(*at),
        }],
    }
}

/// Why a message is in the outbox.
fn undelivered(standing: &Standing, shard: Shard, ahead: Count, facts: &Facts) -> Vec<Cause> {
    let mut causes: Vec<Cause> = facts
        .holds
        .iter()
        .filter_map(|hold| stopped_by(standing, hold))
        .collect();
    match owner(shard, facts) {
        None => causes.extend(unowned(vec![shard], facts)),
        Some((owner, lease_left)) if causes.is_empty() => causes.push(Cause::InLine {
            ahead,
            owner,
            lease_left,
        }),
        Some(_) => {}
    }
    causes
}

/// How a hold stops a message in the outbox, if it does.
fn stopped_by(standing: &Standing, hold: &Hold) -> Option<Cause> {
    let cause = match hold.scope {
        HoldScope::Topic(_) => Cause::TopicHeld,
        HoldScope::Key(_) if !standing.is_head_of(hold) => Cause::Behind,
        HoldScope::Key(_) | HoldScope::Message => Cause::Held,
    };
    standing.is_stopped_by(hold).then(|| cause(hold.clone()))
}

fn topic_hold(facts: &Facts) -> Option<&Hold> {
    facts
        .holds
        .iter()
        .find(|hold| matches!(hold.scope, HoldScope::Topic(_)))
}

/// The owner of a shard and how long its lease runs.
fn owner(shard: Shard, facts: &Facts) -> Option<(RelayId, Duration)> {
    let lease = facts.leases.iter().find(|lease| lease.shard == shard)?;
    Some((lease.owner.clone()?, lease.time_left))
}

/// What shards without an owner mean.
fn unowned(shards: Vec<Shard>, facts: &Facts) -> Option<Cause> {
    if shards.is_empty() {
        return None;
    }
    Some(match facts.relays.len() {
        0 => Cause::NoRelay,
        relays => Cause::NoOwner { shards, relays },
    })
}

impl Cause {
    /// The cause in a word, for programs; stays the same from version to version.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::TopicHeld(hold) => match hold.state {
                HoldState::Parked => "topic_parked",
                HoldState::Retrying { .. } => "topic_held",
            },
            Self::Held(hold) => match hold.state {
                HoldState::Parked => "parked",
                HoldState::Retrying { .. } => "retrying",
            },
            Self::Behind(hold) => match hold.state {
                HoldState::Parked => "behind_parked",
                HoldState::Retrying { .. } => "behind_retrying",
            },
            Self::KeysHeld { .. } => "keys_held",
            Self::NoRelay => "no_relay",
            Self::NoOwner { .. } => "no_owner",
            Self::InLine { .. } => "in_line",
            Self::Scheduled { .. } => "scheduled",
            Self::Delivered { .. } => "delivered",
            Self::Dead { .. } => "dead",
            Self::NotHere { .. } => "not_here",
        }
    }

    /// What to do about it, one or the other: mostly commands of the program `outbox`. Empty where nothing has to be
    /// done.
    #[must_use]
    pub fn remedies(&self) -> Vec<String> {
        match self {
            Self::TopicHeld(hold) if hold.state == HoldState::Parked => {
                vec![format!("outbox resume {}", hold.head.id)]
            }
            Self::Held(hold) | Self::Behind(hold) if hold.state == HoldState::Parked => vec![
                format!("outbox resume {}", hold.head.id),
                format!("outbox parked bury {}", hold.head.id),
            ],
            Self::KeysHeld { parked: 1.., .. } => vec!["outbox parked list".to_owned()],
            Self::NoRelay => vec!["outbox relay".to_owned()],
            Self::Dead { id, .. } => vec![
                format!("outbox dead requeue {id}"),
                format!("outbox dead discard {id}"),
            ],
            Self::InLine { .. } => {
                vec!["if it does not move: its relay's log and /health/ready tell of its sink".to_owned()]
            }
            Self::NotHere { complete: false, .. } => vec!["the same with a larger --search".to_owned()],
            _ => Vec::new(),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TopicHeld(hold) => write!(f, "its topic {}", Failed(hold)),
            Self::Held(hold) => write!(f, "it {}", Failed(hold)),
            Self::Behind(hold) => {
                write!(
                    f,
                    "it waits behind the head of its key, {}, which {}",
                    hold.head.id,
                    Failed(hold)
                )
            }
            Self::KeysHeld { retrying, parked: 0 } => write!(f, "keys of it wait for a retry: {retrying}"),
            Self::KeysHeld { retrying: 0, parked } => write!(f, "keys of it are parked: {parked}"),
            Self::KeysHeld { retrying, parked } => {
                write!(
                    f,
                    "keys of it are parked: {parked}, and wait for a retry: {retrying}"
                )
            }
            Self::NoRelay => f.write_str("no relay is running"),
            Self::NoOwner { shards, relays } => {
                match shards.as_slice() {
                    [shard] => write!(f, "shard {shard} has no owner")?,
                    shards => write!(f, "{} shards have no owner", shards.len())?,
                }
                write!(
                    f,
                    ", though {} running: it should be taken within seconds",
                    Relays(*relays)
                )
            }
            Self::InLine {
                ahead,
                owner,
                lease_left,
            } => write!(
                f,
                "it is in line, {ahead} of its shard before it; {owner} owns the shard, lease for {}",
                short(*lease_left)
            ),
            Self::Scheduled { due_in } if due_in.is_zero() => {
                f.write_str("it is due: the owner of its shard moves it into the outbox")
            }
            Self::Scheduled { due_in } => write!(f, "it is scheduled: due in {}", short(*due_in)),
            Self::Delivered { ago } => write!(f, "it was delivered {} ago", short(*ago)),
            Self::Dead {
                attempts,
                reason,
                ago,
                ..
            } => write!(
                f,
                "it was given up {} ago, it failed{}: {reason}",
                short(*ago),
                Times(*attempts)
            ),
            Self::NotHere { complete: false, .. } => {
                f.write_str("not found, but not everything was looked at")
            }
            Self::NotHere { message: true, .. } => f.write_str(
                "not here: delivered (and not archived), discarded, rolled back, or never enqueued",
            ),
            Self::NotHere { message: false, .. } => f.write_str("nothing of it is undelivered"),
        }
    }
}

/// How a hold goes on, and why.
struct Failed<'a>(&'a Hold);

impl fmt::Display for Failed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed = Times(self.0.attempts);
        match self.0.state {
            HoldState::Parked => write!(f, "is parked until somebody decides, it failed{failed}")?,
            HoldState::Retrying { due_in } if due_in.is_zero() => {
                write!(f, "failed{failed}, the next attempt is due")?;
            }
            HoldState::Retrying { due_in } => write!(f, "failed{failed}, next attempt in {}", short(due_in))?,
        }
        write!(f, ": {}", self.0.reason)
    }
}

/// How often; nothing where no attempt was counted.
struct Times(u32);

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            1 => f.write_str(" once"),
            2 => f.write_str(" twice"),
            times => write!(f, " {times} times"),
        }
    }
}

struct Relays(usize);

impl fmt::Display for Relays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("1 relay is"),
            relays => write!(f, "{relays} relays are"),
        }
    }
}

#[cfg(test)]
mod tests;
