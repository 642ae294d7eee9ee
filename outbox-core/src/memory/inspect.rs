//! Where something stands: what people ask.

use async_trait::async_trait;

use super::lock;
use super::state::{Row, State};
use super::store::MemoryStore;
use crate::error::Result;
use crate::inspect::{Facts, Inspection, MAX_PLACES, Place, Standing, Subject};
use crate::message::{Message, MessageId};
use crate::shard::Position;
use crate::store::Count;

#[async_trait]
impl Inspection for MemoryStore {
    async fn inspect(&self, subject: &Subject, bound: usize) -> Result<Facts> {
        let (now, millis) = (self.now(), self.millis());
        // Before the state's lock, as the order of locks demands.
        let last_seq = self.last_number(subject);
        let state = lock(&self.inner.state);
        let mut complete = state.rows.len() <= bound;
        let matching: Vec<_> = state
            .rows
            .iter()
            .enumerate()
            .take(bound)
            .filter(|(_, (_, row))| matches(subject, &row.message))
            .collect();
        let mut found: Vec<Standing> = matching
            .iter()
            .take(subject.places())
            .map(|(_, (position, row))| in_outbox(&state, **position, row))
            .collect();
        if let Subject::Message(id) = subject {
            complete &= state.scheduled.len().max(state.processed.len()) <= bound;
            found.extend(elsewhere(&state, *id, bound));
        }
        let holds = state
            .holds
            .values()
            .map(|stored| stored.at(now))
            .filter(|hold| subject.is_stopped_by(hold, &found))
            .collect();
        let count = u64::try_from(matching.len()).unwrap_or(u64::MAX);
        Ok(Facts {
            now,
            found,
            backlog: Count::found(count, state.rows.len() <= bound),
            holds,
            last_seq,
            leases: state.leases.status(millis),
            relays: state.leases.relays(millis),
            complete,
        })
    }
}

fn matches(subject: &Subject, message: &Message) -> bool {
    match subject {
        Subject::Message(id) => message.id() == *id,
        Subject::Key(key) => message.order_key().as_ref() == Some(key),
        Subject::Topic(topic) => message.topic() == &**topic,
    }
}

fn in_outbox(state: &State, position: Position, row: &Row) -> Standing {
    let before = state.rows.range(..position);
    let ahead = before.filter(|(_, other)| other.shard == row.shard).count();
    let place = Place::Outbox {
        shard: row.shard,
        position,
        ahead: Count::Exact(u64::try_from(ahead).unwrap_or(u64::MAX)),
    };
    Standing::of(&row.message, row.key_seq, place)
}

/// The places of a message that is not in the outbox, or not only there.
fn elsewhere(state: &State, id: MessageId, bound: usize) -> Vec<Standing> {
    let scheduled = state
        .scheduled
        .iter()
        .take(bound)
        .map(|((due, _), (shard, message))| {
            let place = Place::Scheduled {
                shard: *shard,
                due: *due,
            };
            Standing::of(message, None, place)
        });
    let processed = state.processed.iter().rev().take(bound);
    let processed = processed.map(|((at, position), message)| {
        let place = Place::Processed {
            position: *position,
            at: *at,
        };
        Standing::of(message, None, place)
    });
    let dead = state.dead.values().map(|(_, letter)| {
        let place = Place::Dead {
            position: letter.record.position,
            attempts: letter.attempts,
            reason: letter.reason.clone(),
            at: letter.died_at,
        };
        Standing::of(&letter.message, letter.key_seq, place)
    });
    let own = |standing: &Standing| standing.id == id;
    scheduled
        .filter(own)
        .take(MAX_PLACES)
        .chain(processed.filter(own).take(MAX_PLACES))
        .chain(dead.filter(own).take(MAX_PLACES))
        .collect()
}
