//! The scenarios of the store suite, by theme.

pub mod bytes;
pub mod dead;
pub mod fetch;
pub mod holds;
pub mod honesty;
pub mod inspection;
pub mod lease;
pub mod parking;
pub mod reread;
pub mod retention;
pub mod scheduled;
pub mod schedules;
pub mod sequenced;
pub mod settle;
pub mod stats;
pub mod visibility;
