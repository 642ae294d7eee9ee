//! The wake-up: SQLite counts the commits of others, and asking for the number costs about a microsecond.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::WakeUp;
use tokio::sync::Notify;

use crate::config::SqliteConfig;
use crate::error::During;
use crate::worker::Session;

/// Notices commits of any connection of any process, within the configured interval.
#[derive(Debug)]
pub(crate) struct SqliteWakeUp {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Rung by the thread, once for any number of commits.
    changed: Notify,
    /// Tells the thread to end.
    dropped: AtomicBool,
}

/// How long to wait after the file could not be read.
const PAUSE: Duration = Duration::from_millis(500);

impl SqliteWakeUp {
    /// Starts the thread that looks; none when the system gives no thread, as a hint is only a hint.
    pub(crate) fn start(config: &Arc<SqliteConfig>) -> Option<Self> {
        let shared = Arc::new(Shared::default());
        let (own, config) = (Arc::clone(&shared), Arc::clone(config));
        thread::Builder::new()
            .name("outbox-wake".to_owned())
            .spawn(move || watch(&own, config))
            .ok()?;
        Some(Self { shared })
    }
}

fn watch(shared: &Shared, config: Arc<SqliteConfig>) {
    let interval = config.wake_interval;
    let mut session = Session::new(config);
    let mut last = None;
    while !shared.dropped.load(Ordering::Relaxed) {
        let version = session.run("wake up", |connection, _| {
            connection
                .prepare_cached("PRAGMA main.data_version")
                .and_then(|mut statement| statement.query_row([], |row| row.get::<_, i64>(0)))
                .during("wake up")
        });
        match version {
            Ok(version) => {
                if last.replace(version).is_some_and(|last| last != version) {
                    shared.changed.notify_one();
                }
                thread::sleep(interval);
            }
            // The relay's own connections meet the same error and tell it.
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

#[async_trait]
impl WakeUp for SqliteWakeUp {
    async fn wait(&mut self) {
        self.shared.changed.notified().await;
    }
}

impl Drop for SqliteWakeUp {
    fn drop(&mut self) {
        self.shared.dropped.store(true, Ordering::Relaxed);
    }
}
