//! What others cost that hold something up: a read-only snapshot, a transaction that has written and does not end, a
//! key that waits with a long tail.
//!
//! A backlog is drained beside them while a producer goes on committing, and the rate is a share of the undisturbed one
//! of the same round.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use outbox::{
    FetchRequest, Fetched, Hold, HoldChange, HoldScope, HoldState, LeaseRequest, Membership, RelayId,
    Settlement, ShardSettlement,
};
use tokio::task::JoinHandle;

use crate::ledger::Flow;
use crate::place::Store;
use crate::process::System;
use crate::results::Outcome;
use crate::stage::{Bench, Stage, Subject, say};
use crate::workloads::turn;

const KEYS: u64 = 10_000;
const SIZE: usize = 200;
/// Between two commits of the producer.
const PACE: Duration = Duration::from_millis(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    Undisturbed,
    Snapshot,
    Writer,
    Key,
}

impl Case {
    const fn name(self) -> &'static str {
        match self {
            Self::Undisturbed => "undisturbed",
            Self::Snapshot => "snapshot held",
            Self::Writer => "writer held",
            Self::Key => "key blocked",
        }
    }

    const fn subject(self) -> Subject<'static> {
        Subject {
            workload: "held",
            system: "outbox",
            case: self.name(),
        }
    }
}

pub(super) async fn run(bench: &mut Bench, rounds: usize) -> Outcome<()> {
    let cases: &[Case] = if bench.server.store.is_server() {
        &[Case::Undisturbed, Case::Snapshot, Case::Writer, Case::Key]
    } else {
        &[Case::Undisturbed, Case::Key]
    };
    for round in 0..rounds {
        let mut rates = Vec::new();
        for case in turn(cases, round) {
            if let Some(rate) = measure(bench, case).await? {
                bench.record(case.subject(), "rate", "messages/s", rate);
                say(&format!("held {}: {rate:.0} messages/s", case.name()));
                rates.push((case, rate));
            }
        }
        let Some(&(_, undisturbed)) = rates.iter().find(|(case, _)| *case == Case::Undisturbed) else {
            continue;
        };
        for (case, rate) in rates.into_iter().filter(|(case, _)| *case != Case::Undisturbed) {
            let share = 100.0 * rate / undisturbed;
            bench.record(case.subject(), "rate, share of the undisturbed", "%", share);
        }
    }
    Ok(())
}

async fn measure(bench: &mut Bench, case: Case) -> Outcome<Option<f64>> {
    // Enough for the time at the rate of the store: to write more would take longer than to measure.
    let enough = match bench.server.store {
        Store::Mysql | Store::Mariadb | Store::Mongo => 1_000_000,
        Store::Postgres | Store::Sqlite | Store::Memory => 4_000_000,
    };
    let messages: u64 = bench.size(enough, 60_000);
    let time = bench.size(Duration::from_secs(60), Duration::from_secs(10));
    // Messages apart share one more key. The writer's is the first one of all, and comes last.
    let apart = match case {
        Case::Key => bench.size(300_000, 30_000),
        Case::Writer => 1,
        _ => 0,
    };
    let flow = Flow {
        apart,
        ..Flow::new(SIZE, KEYS)
    };
    let mut stage = Stage::new(bench, flow, System::Outbox).await?;
    let mut other = None;
    match case {
        Case::Writer => other = Some(stage.place.writer(&stage.topic.name, flow, 0).await?),
        Case::Key => {
            stage.fill(0..apart).await?;
            park_the_head(&stage).await?;
        }
        _ => {}
    }
    stage.fill(apart..apart + messages).await?;
    stage.place.calm().await?;
    if case == Case::Snapshot {
        other = Some(stage.place.snapshot().await?);
    }

    let mut worker = stage.worker(bench, System::Outbox).await?;
    let trickle = Trickle::start(&stage, apart + messages).await?;
    worker.go().await?;
    let from = stage.until(messages / 20, None, &mut worker).await?;
    let end = Some(from.at + time);
    let to = stage.until(messages / 20 * 19, end, &mut worker).await?;
    let next = trickle.stop().await?;
    if let Some(held) = other {
        held.end().await?;
    }
    // Behind a blocked key nothing comes; what the writer committed comes as well.
    let (first, left) = match case {
        Case::Key => (apart, apart),
        _ => (0, 0),
    };
    stage.until(next - first, None, &mut worker).await?;
    worker.stop().await?;
    let verdict = stage.verify(first, next, left).await?;
    stage.remove().await?;
    Ok(bench
        .counts(case.subject(), verdict)
        .then(|| from.rate_until(&to)))
}

/// Parks the key of the first message, as a relay would that could not deliver it.
async fn park_the_head(stage: &Stage) -> Outcome<()> {
    let store = stage.place.spec.open().await?;
    let relay = RelayId::new("bench-parks");
    let request = LeaseRequest {
        relay: relay.clone(),
        want: store.capabilities().shards,
        ttl: Duration::from_secs(30),
    };
    let shards = store.lease(&request).await?.held;
    let fetch = FetchRequest {
        shards: shards.clone(),
        max_rows: 1,
        max_bytes: 1 << 20,
        ..FetchRequest::default()
    };
    let Fetched::Batch { records, .. } = store.reader().await?.fetch(&fetch).await? else {
        return Err("the store was reset".into());
    };
    let head = records.first().ok_or("there is no head to park")?;
    let owned = shards
        .iter()
        .find(|owned| owned.shard == head.shard)
        .ok_or("the head's shard is not ours")?;
    let mut part = ShardSettlement::new(owned.shard, owned.epoch);
    part.holds.push(HoldChange::Put(Hold {
        shard: head.shard,
        scope: HoldScope::Key(head.message.order_key().ok_or("the head has no key")?),
        head: head.reference(),
        attempts: 1,
        state: HoldState::Parked,
        reason: "parked by the bench".to_owned(),
    }));
    let settled = store
        .settle(&Settlement {
            relay: relay.clone(),
            shards: vec![part],
        })
        .await?;
    if !settled.lost.is_empty() {
        return Err("the lease was lost while the head was parked".into());
    }
    store.release(&relay, &shards, Membership::Leaves).await?;
    Ok(())
}

/// A producer that commits a message now and then.
struct Trickle {
    next: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    running: JoinHandle<Outcome<()>>,
}

impl Trickle {
    async fn start(stage: &Stage, from: u64) -> Outcome<Self> {
        let mut producer = stage
            .place
            .producer("outbox", &stage.topic.name, stage.flow)
            .await?;
        let next = Arc::new(AtomicU64::new(from));
        let over = Arc::new(AtomicBool::new(false));
        let running = tokio::spawn({
            let (next, over) = (Arc::clone(&next), Arc::clone(&over));
            async move {
                let begin = Instant::now();
                while !over.load(Ordering::Relaxed) {
                    let number = next.load(Ordering::Relaxed);
                    producer.commit(number).await?;
                    next.store(number + 1, Ordering::Relaxed);
                    let pace = u32::try_from(number + 1 - from).unwrap_or(u32::MAX);
                    tokio::time::sleep_until((begin + PACE * pace).into()).await;
                }
                Ok(())
            }
        });
        Ok(Self { next, over, running })
    }

    /// Says which message would have been the next.
    async fn stop(self) -> Outcome<u64> {
        self.over.store(true, Ordering::Relaxed);
        self.running.await??;
        Ok(self.next.load(Ordering::Relaxed))
    }
}
