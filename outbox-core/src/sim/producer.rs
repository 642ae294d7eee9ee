//! Producers: they lock their keys, write messages in transactions that stay open for a while, and commit or not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, OwnedMutexGuard};

use super::ledger::End;
use super::stage::Stage;
use crate::conformance::StoreHarness;
use crate::error::Result;
use crate::message::{Message, MessageBuilder, MessageId};

/// The topics of a world.
pub(super) const TOPICS: [&str; 2] = ["orders", "films"];

/// The keys of a world, each with its lock and the number of its last message: what a service's own rows are.
#[derive(Clone)]
pub(super) struct Keys(Vec<Key>);

#[derive(Clone)]
struct Key {
    topic: &'static str,
    bytes: Vec<u8>,
    last: Arc<Mutex<u64>>,
}

impl Keys {
    pub(super) fn new(stage: &Stage) -> Self {
        let keys = stage.draw(|random| random.usize(1..=8));
        // One that is empty, one that is no text, one with a zero.
        let names: [&[u8]; 8] = [b"42", b"", b"\xff\xfe", b"a\0b", b"43", b"44", b"45", b"46"];
        let key = |index: usize, name: &[u8]| Key {
            topic: TOPICS[index % TOPICS.len()],
            bytes: name.to_vec(),
            last: Arc::default(),
        };
        Self(
            names
                .iter()
                .take(keys)
                .enumerate()
                .map(|(index, name)| key(index, name))
                .collect(),
        )
    }
}

/// What a transaction has locked.
type Locked = BTreeMap<usize, (OwnedMutexGuard<u64>, u64)>;

/// Enqueues about so many messages.
pub(super) async fn produce<H: StoreHarness>(
    harness: Arc<H>,
    stage: Arc<Stage>,
    keys: Keys,
    messages: usize,
) -> Result<()> {
    let mut written = 0;
    while written < messages {
        stage.pause(0..150).await;
        let mut locked = lock(&stage, &keys).await;
        let mut tx = harness.begin().await;
        let mut ids = Vec::new();
        let mut refused = false;
        for _ in 0..stage.draw(|random| random.u8(1..=4)) {
            let message = draft(&stage, &keys, &mut locked)?;
            ids.push(message.id());
            written += 1;
            // It waits for others' locks at worst, and gives up; then nothing of this transaction counts.
            if harness.enqueue(&mut tx, &[message]).await.is_err() {
                refused = true;
                break;
            }
            // Some stay open for long.
            let longest = if stage.happens(100) { 1_500 } else { 6 };
            stage.pause(0..longest).await;
        }
        if refused || stage.happens(120) {
            stage.note(format_args!("rolled back: {:?}", names(&stage, &ids)));
            stage.ledger().end(&ids, End::RolledBack);
            if stage.happens(500) {
                harness.rollback(tx).await;
            }
        } else {
            stage.note(format_args!("committed: {:?}", names(&stage, &ids)));
            stage.ledger().end(&ids, End::Committed);
            harness.commit(tx).await;
            for (guard, number) in locked.values_mut() {
                **guard = *number;
            }
        }
    }
    Ok(())
}

/// Locks some keys, in their order, or none.
async fn lock(stage: &Stage, keys: &Keys) -> Locked {
    let mut locked = Locked::new();
    let first = stage.draw(|random| random.usize(..keys.0.len()));
    let range = match stage.draw(|random| random.u8(..8)) {
        0 => first..first,
        1 | 2 => first..(first + 2).min(keys.0.len()),
        _ => first..first + 1,
    };
    for index in range {
        let guard = Arc::clone(&keys.0[index].last).lock_owned().await;
        let last = *guard;
        locked.insert(index, (guard, last));
    }
    locked
}

/// The next message of a transaction.
fn draft(stage: &Stage, keys: &Keys, locked: &mut Locked) -> Result<Message> {
    let id = stage.id();
    let choice = stage.draw(|random| random.usize(..=locked.len()));
    let (builder, number) = match locked.iter_mut().nth(choice) {
        Some((index, (_, number))) => {
            *number += 1;
            let Key { topic, bytes, .. } = &keys.0[*index];
            (Message::builder(*topic).key(bytes.clone()), Some(*number))
        }
        None => (keyless(stage), None),
    };
    let message = content(stage, builder.id(id)).build()?;
    stage.ledger().write(message.clone(), number);
    if stage.strikes(20) {
        stage.weather().poison.insert(id);
    }
    Ok(message)
}

/// A message without an order, now or later.
fn keyless(stage: &Stage) -> MessageBuilder {
    let topic = TOPICS[stage.draw(|random| random.usize(..TOPICS.len()))];
    let builder = Message::builder(topic);
    if stage.happens(200) {
        return builder.deliver_at(stage.wall() + stage.millis(0..3_000) + Duration::from_micros(500));
    }
    builder
}

/// All kinds of bytes.
fn content(stage: &Stage, builder: MessageBuilder) -> MessageBuilder {
    let kind = stage.draw(|random| random.u8(..8));
    match kind {
        0 => builder,
        1 => builder.payload(Vec::new()),
        2 => builder.payload(vec![0xff, 0x00, 0xc3, 0x28]),
        3 => builder
            .payload("{\"placed\": true}")
            .content_type("application/json")
            .header("trace", "7")
            .header("trace", vec![0xfe])
            .header("a", ""),
        _ => {
            let length = stage.draw(|random| random.usize(..200));
            builder.payload(vec![b'x'; length])
        }
    }
}

/// The messages as they are told.
fn names(stage: &Stage, ids: &[MessageId]) -> Vec<String> {
    let ledger = stage.ledger();
    ids.iter().map(|id| ledger.name(*id)).collect()
}
