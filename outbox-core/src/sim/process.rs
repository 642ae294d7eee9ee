//! A relay as a process that can be killed, stopped in its tracks and asked to end.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::line::Line;
use super::sink::Producer;
use super::stage::Stage;
use crate::clock::Clock;
use crate::error::Result;
use crate::lease::RelayId;
use crate::memory::MemorySink;
use crate::relay::{Relay, RelayConfig};
use crate::sink::Sink;
use crate::store::OutboxStore;

pub(super) struct Process {
    pub(super) id: RelayId,
    running: JoinHandle<Result<()>>,
    /// What the producer has under way: it leaves when its time has come, asked or not.
    wire: JoinHandle<()>,
    sink: MemorySink,
    gate: Gate,
    stop: Option<oneshot::Sender<()>>,
    clock: SkewedClock,
}

impl Process {
    pub(super) fn start(
        stage: &Arc<Stage>,
        store: Arc<dyn OutboxStore>,
        config: &RelayConfig,
        number: u32,
        goes_on: bool,
    ) -> Self {
        let id = RelayId::new(format!("relay-{number}"));
        stage.note(format_args!("{id} starts"));
        let (producer, sink) = Producer::new(stage, number, goes_on);
        let clock = SkewedClock::new(stage);
        let line = Line::new(stage, store, &id);
        let relay = Relay::new(Arc::new(line), Box::new(producer))
            .with_config(config.clone())
            .with_id(id.clone())
            .with_clock(Arc::new(clock.clone()))
            .with_seed(stage.draw(|random| random.u64(..)));
        let gate = Gate::default();
        let (stop, stopped) = oneshot::channel();
        let running = {
            let (stage, id) = (Arc::clone(stage), id.clone());
            tokio::spawn(gate.guard(async move {
                let ended = relay.run(async move { drop(stopped.await) }).await;
                stage.note(format_args!("{id} has ended: {ended:?}"));
                ended
            }))
        };
        let wire = {
            let sink = sink.clone();
            tokio::spawn(gate.guard(async move {
                sink.wait_for(usize::MAX).await;
            }))
        };
        Self {
            id,
            running,
            wire,
            sink,
            gate,
            stop: Some(stop),
            clock,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.running.is_finished()
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.is_none()
    }

    /// It dies. What it had under way is lost with it, or arrives a while later, as far as that comes.
    pub(super) fn kill(self, wire_lasts: Duration) {
        self.running.abort();
        self.gate.open();
        let (mut sink, wire) = (self.sink, self.wire);
        tokio::spawn(async move {
            sleep(wire_lasts).await;
            sink.purge().await;
            wire.abort();
        });
    }

    /// It stands still, with all that it has, and goes on as if nothing had happened.
    pub(super) fn freeze(&self, length: Duration) {
        self.gate.close();
        let gate = self.gate.clone();
        tokio::spawn(async move {
            sleep(length).await;
            gate.open();
        });
    }

    /// Its clock jumps ahead.
    pub(super) fn jump(&self, by: Duration) {
        self.clock.jump(by);
    }

    /// It is asked to end.
    pub(super) fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Nobody hears it when it is over by itself, which it must not be.
            let _ = stop.send(());
        }
    }

    /// It has ended; says what was wrong with that.
    pub(super) async fn bury(self) -> Option<String> {
        self.wire.abort();
        let id = &self.id;
        match self.running.await {
            Ok(Ok(())) if self.stop.is_none() => None,
            Ok(Ok(())) => Some(format!("{id} ended, and nobody had told it to")),
            Ok(Err(error)) => Some(format!("{id} ended with an error: {error}")),
            Err(error) => Some(format!("{id} ended so: {error}")),
        }
    }
}

/// Where all that belongs to a process waits while it is closed.
#[derive(Clone, Default)]
struct Gate(Arc<Mutex<Leaves>>);

#[derive(Default)]
struct Leaves {
    closed: bool,
    waiting: Vec<Waker>,
}

impl Gate {
    fn leaves(&self) -> std::sync::MutexGuard<'_, Leaves> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.leaves().closed = true;
    }

    fn open(&self) {
        let waiting = {
            let mut leaves = self.leaves();
            leaves.closed = false;
            std::mem::take(&mut leaves.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    fn guard<F: Future>(&self, future: F) -> Guarded<F> {
        Guarded {
            gate: self.clone(),
            future: Box::pin(future),
        }
    }
}

/// What goes on only while its gate is open.
struct Guarded<F> {
    gate: Gate,
    future: Pin<Box<F>>,
}

impl<F: Future> Future for Guarded<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        {
            let mut leaves = self.gate.leaves();
            if leaves.closed {
                leaves.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
        }
        self.future.as_mut().poll(context)
    }
}

/// A machine's own clock.
#[derive(Clone)]
struct SkewedClock {
    stage: Arc<Stage>,
    ahead: Arc<Mutex<Duration>>,
}

impl SkewedClock {
    fn new(stage: &Arc<Stage>) -> Self {
        Self {
            ahead: Arc::new(Mutex::new(stage.millis(0..3_600_000))),
            stage: Arc::clone(stage),
        }
    }

    fn ahead(&self) -> std::sync::MutexGuard<'_, Duration> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn jump(&self, by: Duration) {
        *self.ahead() += by;
    }
}

impl Clock for SkewedClock {
    fn now(&self) -> Duration {
        self.stage.now() + *self.ahead()
    }

    fn wall(&self) -> SystemTime {
        self.stage.wall() + *self.ahead()
    }
}

impl fmt::Debug for SkewedClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SkewedClock").field(&*self.ahead()).finish()
    }
}
