//! The scenarios of the store suite, by theme.

pub mod fetch;
pub mod holds;
pub mod lease;
pub mod reread;
pub mod settle;
pub mod visibility;
