//! What all parts of a world share: the one source of chance, the time, what goes wrong at present, and the ledger.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use uuid::Uuid;

use super::Simulation;
use super::ledger::Ledger;
use crate::message::MessageId;

pub(super) struct Stage {
    pub(super) simulation: Simulation,
    random: Mutex<fastrand::Rng>,
    weather: Mutex<Weather>,
    ledger: Mutex<Ledger>,
    born: Instant,
    dawn: SystemTime,
}

/// What goes wrong at present.
#[derive(Debug, Default)]
pub(super) struct Weather {
    /// Whether anything does.
    pub(super) rough: bool,
    pub(super) store_down: bool,
    /// How often the database came up anew.
    pub(super) restarts: u64,
    pub(super) broker_down: bool,
    /// Topics that the destination does not take.
    pub(super) blocked: BTreeSet<Arc<str>>,
    /// Messages that it never takes.
    pub(super) poison: BTreeSet<MessageId>,
    pub(super) rates: Rates,
}

/// How often in a thousand times.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rates {
    /// A request does not reach the store.
    pub(super) refused: u32,
    /// Its answer does not come back.
    pub(super) lost: u32,
    /// It is under way for so long that nobody waits for it any more.
    pub(super) slow: u32,
    /// The destination wants a message again, later.
    pub(super) retry: u32,
    /// Nobody knows whether it has it.
    pub(super) unknown: u32,
    /// The sink breaks.
    pub(super) broken: u32,
}

impl Stage {
    pub(super) fn new(simulation: Simulation, dawn: SystemTime) -> Self {
        let mut random = fastrand::Rng::with_seed(simulation.seed);
        let mut rate = |usual: u32| usual * random.u32(..3);
        let rates = Rates {
            refused: rate(10),
            lost: rate(10),
            slow: rate(4),
            retry: rate(20),
            unknown: rate(8),
            broken: rate(4),
        };
        Self {
            simulation,
            random: Mutex::new(random),
            weather: Mutex::new(Weather {
                rough: !simulation.calm,
                rates,
                ..Weather::default()
            }),
            ledger: Mutex::new(Ledger::new(simulation.traced)),
            born: Instant::now(),
            dawn,
        }
    }

    /// The time since the beginning.
    pub(super) fn now(&self) -> Duration {
        self.born.elapsed()
    }

    /// What the wall clocks show.
    pub(super) fn wall(&self) -> SystemTime {
        self.dawn + self.now()
    }

    /// Leaves something to chance.
    pub(super) fn draw<T>(&self, what: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        what(&mut lock(&self.random))
    }

    /// Whether something happens that does so many times in a thousand.
    pub(super) fn happens(&self, in_a_thousand: u32) -> bool {
        self.draw(|random| random.u32(..1000) < in_a_thousand)
    }

    /// The same of what goes wrong, and only while anything does.
    pub(super) fn strikes(&self, in_a_thousand: u32) -> bool {
        self.weather().rough && self.happens(in_a_thousand)
    }

    pub(super) fn millis(&self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.draw(|random| random.u64(range)))
    }

    pub(super) async fn pause(&self, millis: Range<u64>) {
        tokio::time::sleep(self.millis(millis)).await;
    }

    pub(super) fn id(&self) -> MessageId {
        Uuid::from_u128(self.draw(|random| random.u128(..))).into()
    }

    pub(super) fn weather(&self) -> MutexGuard<'_, Weather> {
        lock(&self.weather)
    }

    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }

    /// Something happened.
    pub(super) fn note(&self, what: fmt::Arguments<'_>) {
        let now = self.now();
        self.ledger().note(now, what);
    }

    /// Something went wrong, on purpose.
    pub(super) fn fault(&self, name: &'static str, what: impl fmt::Display) {
        self.note(format_args!("{name}: {what}"));
        *self.ledger().faults.entry(name).or_default() += 1;
    }
}

/// A lock whose state is sound even when a thread panicked while it held it: no critical section here calls out.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
