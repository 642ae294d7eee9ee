//! The relay, on a thread of its own so that it can be killed.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use outbox::kafka::{KafkaConfig, KafkaSink};
use outbox::sqlite::{SqliteConfig, SqliteStore};
use outbox::{Relay, RelayConfig, RelayId};
use tokio::sync::oneshot;

use crate::exit::{Code, Failure, Result};

/// Short, so that the next relay takes over soon; real ones last 10 s.
pub(super) const LEASE: Duration = Duration::from_secs(1);

/// A relay that runs.
pub(super) struct Running {
    pub(super) id: RelayId,
    end: oneshot::Sender<End>,
    thread: JoinHandle<Result<()>>,
}

enum End {
    /// Its future is dropped where it stands: nothing is settled, nothing is released.
    Kill,
    InOrder,
}

impl Running {
    pub(super) fn start(name: &str, store: &SqliteConfig, servers: &str) -> Result<Self> {
        let sink = KafkaSink::new(&KafkaConfig::new(servers))?;
        let config = RelayConfig {
            lease: LEASE,
            ..RelayConfig::default()
        };
        let id = RelayId::unique(name);
        let relay = Relay::new(Arc::new(SqliteStore::open(store.clone())?), Box::new(sink))
            .with_config(config)
            .with_id(id.clone());
        let (end, ends) = oneshot::channel();
        let thread = thread::spawn(move || run(relay, ends));
        Ok(Self { id, end, thread })
    }

    pub(super) fn kill(self) -> Result<()> {
        self.stop(End::Kill)
    }

    pub(super) fn stop_in_order(self) -> Result<()> {
        self.stop(End::InOrder)
    }

    fn stop(self, end: End) -> Result<()> {
        // When it has ended by itself, its result says why.
        let _ = self.end.send(end);
        self.thread
            .join()
            .map_err(|_| Failure::new(Code::Unexpected, "the relay of the demo panicked"))?
    }
}

fn run(relay: Relay, ends: oneshot::Receiver<End>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            Failure::new(Code::Unavailable, format!("start the relay: {error}")).because(&error)
        })?;
    let (stop, stopped) = oneshot::channel::<()>();
    let result = runtime.block_on(async {
        let running = relay.run(async {
            let _ = stopped.await;
        });
        tokio::pin!(running);
        tokio::select! {
            result = &mut running => result,
            end = ends => match end {
                Ok(End::InOrder) => {
                    let _ = stop.send(());
                    running.await
                }
                // Leaving drops the future.
                Ok(End::Kill) | Err(_) => Ok(()),
            },
        }
    });
    runtime.shutdown_background();
    Ok(result?)
}
