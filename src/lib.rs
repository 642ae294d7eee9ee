//! The transactional outbox.

pub use outbox_core::*;
#[cfg(feature = "kafka")]
pub use outbox_kafka as kafka;
#[cfg(feature = "sqlite")]
pub use outbox_sqlite as sqlite;
