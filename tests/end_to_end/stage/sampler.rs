//! Watches the relays' connections, as the server sees them.
#![allow(dead_code, reason = "a file has no server")]

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A thread that looks every few milliseconds, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Sampler {
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

/// What one look shows.
#[derive(Debug, Default)]
pub(crate) struct Sight {
    /// How many the relays have.
    pub(crate) connections: usize,
    /// Of those in which nothing is done, the one that has stood open longest.
    pub(crate) idle: Idle,
}

/// A transaction that stood open.
#[derive(Debug, Default, Clone)]
pub(crate) struct Idle {
    pub(crate) time: Duration,
    /// What it had done last.
    pub(crate) after: String,
}

#[derive(Debug, Default)]
struct Seen {
    /// At the last look.
    connections: usize,
    /// How often it looked.
    looks: usize,
    longest_idle: Idle,
    /// By how much the sampler itself came too late at most: so long a relay may have got no processor either.
    longest_delay: Duration,
    over: bool,
}

impl Sampler {
    /// Looks like this, again and again; none is told when the server does not answer.
    pub(crate) fn start(look: impl AsyncFnMut() -> Option<Sight> + Send + 'static) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let told = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(watch(look, &told));
        });
        Self {
            seen,
            thread: Some(thread),
        }
    }

    /// How many there are, at a look that begins later than this call.
    pub(crate) fn connections(&self) -> usize {
        let looks = self.seen.lock().unwrap().looks;
        let fresh = super::until(Duration::from_secs(10), || {
            let seen = self.seen.lock().unwrap();
            (seen.looks > looks + 1).then_some(seen.connections)
        });
        fresh.unwrap()
    }

    /// For how long at most one was seen to be in a transaction and do nothing, and after which statement. What a busy
    /// machine may have to do with it is taken off.
    pub(crate) fn longest_idle(&self) -> (Duration, String) {
        let seen = self.seen.lock().unwrap();
        let Idle { time, after } = seen.longest_idle.clone();
        (time.saturating_sub(seen.longest_delay), after)
    }
}

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

async fn watch(mut look: impl AsyncFnMut() -> Option<Sight>, told: &Mutex<Seen>) {
    while !told.lock().unwrap().over {
        let sight = look().await;
        let begin = Instant::now();
        tokio::time::sleep(PAUSE).await;
        let delay = begin.elapsed().saturating_sub(PAUSE);
        let mut seen = told.lock().unwrap();
        seen.longest_delay = seen.longest_delay.max(delay);
        if let Some(sight) = sight {
            seen.connections = sight.connections;
            seen.looks += 1;
            if sight.idle.time > seen.longest_idle.time {
                seen.longest_idle = sight.idle;
            }
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        if let Ok(mut seen) = self.seen.lock() {
            seen.over = true;
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
