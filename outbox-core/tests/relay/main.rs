//! The relay as it runs: over the store and the sink in memory, in paused time, deterministic.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of tests may fail them"
)]

mod delivery;
mod failures;
mod health;
mod leases;
mod limits;
mod observability;
mod support;
