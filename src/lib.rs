//! The transactional outbox.

pub use outbox_core::*;
