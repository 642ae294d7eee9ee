//! The line between a relay and the store: requests take time, do not arrive, or arrive when nobody waits any more;
//! answers get lost.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::sleep;

use super::stage::Stage;
use crate::dead::DeadLetters;
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::{FetchRequest, Fetched};
use crate::hold::{Hold, Parking};
use crate::inspect::Inspection;
use crate::lease::{LeaseRequest, Leases, Membership, RelayId};
use crate::retention::Retention;
use crate::scheduled::{Promotion, Scheduled};
use crate::settle::{Settled, Settlement};
use crate::shard::OwnedShard;
use crate::store::{Capabilities, OutboxStore, Reader, Stats};
use crate::wake::WakeUp;

/// A store at the end of a line.
#[derive(Clone)]
pub(super) struct Line {
    stage: Arc<Stage>,
    store: Arc<dyn OutboxStore>,
    relay: RelayId,
    settlements: Arc<Settlements>,
}

/// A relay settles over one session: what was sent before and is still under way when a later settlement arrives is lost
/// with the connection that was given up.
#[derive(Default)]
struct Settlements {
    sent: AtomicU64,
    arrived: AtomicU64,
}

/// How a request and its answer fare.
struct Trip {
    there: Duration,
    back: Duration,
    /// Whether the request arrives.
    arrives: bool,
    /// Whether the answer does.
    answered: bool,
}

impl Line {
    pub(super) fn new(stage: &Arc<Stage>, store: Arc<dyn OutboxStore>, relay: &RelayId) -> Self {
        Self {
            stage: Arc::clone(stage),
            store,
            relay: relay.clone(),
            settlements: Arc::default(),
        }
    }

    fn trip(&self, operation: &'static str) -> Trip {
        let (rates, down) = {
            let weather = self.stage.weather();
            (weather.rates, weather.store_down)
        };
        let mut trip = Trip {
            there: self.stage.millis(0..4),
            back: self.stage.millis(0..4),
            arrives: !down,
            answered: true,
        };
        if down {
            // Refused at once, or not answered at all.
            if self.stage.happens(300) {
                trip.there = Duration::from_secs(60);
            }
            return trip;
        }
        if self.stage.strikes(rates.refused) {
            trip.arrives = false;
            self.fault("request lost", operation);
        } else if self.stage.strikes(rates.lost) {
            trip.answered = false;
            self.fault("answer lost", operation);
        } else if self.stage.strikes(rates.slow) {
            trip.there = self.stage.millis(200..4_000);
            self.fault("request late", operation);
        }
        trip
    }

    fn fault(&self, name: &'static str, operation: &'static str) {
        self.stage
            .fault(name, format_args!("{operation} of {}", self.relay));
    }

    /// Asks the store for something. Once it is under way it is the store's, whatever becomes of who asked.
    async fn ask<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let trip = self.trip(operation);
        if !trip.arrives {
            sleep(trip.there).await;
            return Err(no_answer(operation));
        }
        let (stage, relay) = (Arc::clone(&self.stage), self.relay.clone());
        let done = tokio::spawn(async move {
            sleep(trip.there).await;
            let result = work.await;
            stage.note(format_args!("{operation} of {relay}: {}", word(&result)));
            result
        });
        let result = done.await.unwrap_or_else(|error| {
            let what = format!("{operation} of {}: {error}", self.relay);
            self.stage.ledger().is_broken("I6", what);
            Err(no_answer(operation))
        });
        sleep(trip.back).await;
        if trip.answered {
            result
        } else {
            Err(no_answer(operation))
        }
    }
}

fn word<T>(result: &Result<T>) -> &'static str {
    if result.is_ok() { "done" } else { "failed" }
}

fn no_answer(operation: &'static str) -> Error {
    Error::new(ErrorKind::Unavailable, operation, "no answer")
}

#[async_trait]
impl OutboxStore for Line {
    fn capabilities(&self) -> Capabilities {
        self.store.capabilities()
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        let (store, request) = (Arc::clone(&self.store), request.clone());
        let leases = self
            .ask("lease", async move { store.lease(&request).await })
            .await?;
        self.stage
            .note(format_args!("{} has {:?}", self.relay, leases.held));
        Ok(leases)
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        let (store, relay, shards) = (Arc::clone(&self.store), relay.clone(), shards.to_vec());
        self.ask("release", async move {
            store.release(&relay, &shards, membership).await
        })
        .await
    }

    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>> {
        let (store, shards) = (Arc::clone(&self.store), shards.to_vec());
        self.ask("holds", async move { store.holds(&shards).await }).await
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        let reader = self.store.reader().await?;
        Ok(Box::new(LineReader {
            line: self.clone(),
            reader,
        }))
    }

    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        let (store, settlement) = (Arc::clone(&self.store), settlement.clone());
        self.stage
            .note(format_args!("{} settles {:?}", self.relay, settlement.shards));
        let (settlements, number) = (
            Arc::clone(&self.settlements),
            self.settlements.sent.fetch_add(1, SeqCst) + 1,
        );
        let settle = async move {
            if settlements.arrived.fetch_max(number, SeqCst) > number {
                return Err(no_answer("settle"));
            }
            store.settle(&settlement).await
        };
        let settled = self.ask("settle", settle).await?;
        if !settled.lost.is_empty() {
            self.stage
                .note(format_args!("{} has lost {:?}", self.relay, settled.lost));
        }
        Ok(settled)
    }

    async fn stats(&self) -> Result<Stats> {
        let store = Arc::clone(&self.store);
        self.ask("stats", async move { store.stats().await }).await
    }

    fn dead_letters(&self) -> Option<&dyn DeadLetters> {
        self.store.dead_letters()
    }

    fn scheduled(&self) -> Option<&dyn Scheduled> {
        self.store.scheduled().is_some().then_some(self)
    }

    fn retention(&self) -> Option<&dyn Retention> {
        self.store.retention()
    }

    fn parking(&self) -> Option<&dyn Parking> {
        self.store.parking()
    }

    fn inspection(&self) -> Option<&dyn Inspection> {
        self.store.inspection()
    }

    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        // A hint may come or not.
        if self.stage.happens(500) {
            return None;
        }
        self.store.wake_up()
    }
}

#[async_trait]
impl Scheduled for Line {
    async fn promote(&self, relay: &RelayId, shards: &[OwnedShard], limit: usize) -> Result<Promotion> {
        let (store, relay, shards) = (Arc::clone(&self.store), relay.clone(), shards.to_vec());
        self.ask("promote", async move {
            match store.scheduled() {
                Some(scheduled) => scheduled.promote(&relay, &shards, limit).await,
                None => Ok(Promotion::default()),
            }
        })
        .await
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Line").field(&self.relay).finish()
    }
}

/// A reader at the end of a line. What it reads nobody else misses, so its requests end with it.
#[derive(Debug)]
struct LineReader {
    line: Line,
    reader: Box<dyn Reader>,
}

#[async_trait]
impl Reader for LineReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        let trip = self.line.trip("fetch");
        sleep(trip.there).await;
        if !trip.arrives {
            return Err(no_answer("fetch"));
        }
        let fetched = self.reader.fetch(request).await?;
        if let Fetched::Batch { records, .. } = &fetched
            && !records.is_empty()
        {
            let positions: Vec<i64> = records.iter().map(|record| record.position.0).collect();
            self.line
                .stage
                .note(format_args!("{} reads {positions:?}", self.line.relay));
        }
        sleep(trip.back).await;
        if trip.answered {
            Ok(fetched)
        } else {
            Err(no_answer("fetch"))
        }
    }
}
