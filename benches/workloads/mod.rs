//! What is measured. Each workload does one round at a time, in which its systems or cases take turns.

mod backlog;
mod drain;
mod held;
mod keys;
mod latency;
mod producers;
mod relays;

use crate::place::Store;
use crate::results::Outcome;
use crate::stage::Bench;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Workload {
    /// How fast a backlog is drained, beside the baselines.
    Drain,
    /// From commit to consume, at fixed rates.
    Latency,
    /// What a message costs when ever more wait.
    Backlog,
    /// How the number of keys matters.
    Keys,
    /// What a relay costs producers.
    Producers,
    /// What a long transaction, and a key that waits, cost all others.
    Held,
    /// Several relays.
    Relays,
}

impl Workload {
    pub(crate) const ALL: [Self; 7] = [
        Self::Drain,
        Self::Latency,
        Self::Backlog,
        Self::Keys,
        Self::Producers,
        Self::Held,
        Self::Relays,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Drain => "drain",
            Self::Latency => "latency",
            Self::Backlog => "backlog",
            Self::Keys => "keys",
            Self::Producers => "producers",
            Self::Held => "held",
            Self::Relays => "relays",
        }
    }

    /// Whether a store can be measured so: a store in memory has no producers elsewhere, one in a file no second
    /// relay that would help.
    pub(crate) const fn fits(self, store: Store) -> bool {
        match store {
            Store::Postgres | Store::Mysql | Store::Mariadb | Store::Mongo => true,
            Store::Sqlite => !matches!(self, Self::Relays),
            Store::Memory => matches!(self, Self::Drain | Self::Keys),
        }
    }

    pub(crate) async fn run(self, bench: &mut Bench, rounds: usize) -> Outcome<()> {
        match self {
            Self::Drain => drain::run(bench, rounds).await,
            Self::Latency => latency::run(bench, rounds).await,
            Self::Backlog => backlog::run(bench, rounds).await,
            Self::Keys => keys::run(bench, rounds).await,
            Self::Producers => producers::run(bench, rounds).await,
            Self::Held => held::run(bench, rounds).await,
            Self::Relays => relays::run(bench, rounds).await,
        }
    }
}

/// The systems or cases of a round, beginning with another one each time: none always comes first.
fn turn<T: Copy>(all: &[T], round: usize) -> Vec<T> {
    let mut turned = all.to_vec();
    turned.rotate_left(round % all.len().max(1));
    turned
}
