//! Watches the relays' connections, as the server sees them.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outbox::postgres::sqlx::postgres::{PgConnectOptions, PgConnection};
use outbox::postgres::sqlx::{self, Connection};

/// A thread that looks every few milliseconds, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Sampler {
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

/// A transaction that stood open.
#[derive(Debug, Default, Clone)]
struct Idle {
    time: Duration,
    /// What it had done last.
    after: String,
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
    /// Watches the connections of this application.
    pub(super) fn start(options: PgConnectOptions, application: String) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let told = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(watch(&options, &application, &told));
        });
        Self {
            seen,
            thread: Some(thread),
        }
    }

    /// How many there are, at a look that begins later than this call.
    pub(super) fn connections(&self) -> usize {
        let looks = self.seen.lock().unwrap().looks;
        let fresh = crate::stage::until(Duration::from_secs(10), || {
            let seen = self.seen.lock().unwrap();
            (seen.looks > looks + 1).then_some(seen.connections)
        });
        fresh.unwrap()
    }

    /// For how long at most one was seen to be in a transaction and do nothing, and after which statement. What a busy
    /// machine may have to do with it is taken off.
    pub(super) fn longest_idle(&self) -> (Duration, String) {
        let seen = self.seen.lock().unwrap();
        let Idle { time, after } = seen.longest_idle.clone();
        (time.saturating_sub(seen.longest_delay), after)
    }
}

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

async fn watch(options: &PgConnectOptions, application: &str, told: &Mutex<Seen>) {
    let mut connection = None;
    while !told.lock().unwrap().over {
        connection = match connection {
            None => PgConnection::connect_with(options).await.ok(),
            Some(mut connection) => look(&mut connection, application, told)
                .await
                .is_ok()
                .then_some(connection),
        };
        let begin = Instant::now();
        tokio::time::sleep(PAUSE).await;
        let delay = begin.elapsed().saturating_sub(PAUSE);
        let mut seen = told.lock().unwrap();
        seen.longest_delay = seen.longest_delay.max(delay);
    }
}

async fn look(connection: &mut PgConnection, application: &str, told: &Mutex<Seen>) -> sqlx::Result<()> {
    let (connections, idle, after): (i64, f64, String) = sqlx::query_as(
        "SELECT count(*) OVER (), \
                CASE WHEN state LIKE 'idle in transaction%' THEN extract(epoch FROM clock_timestamp() - state_change) \
                ELSE 0 END::float8 AS idle, query \
           FROM pg_stat_activity WHERE application_name = $1 \
         UNION ALL SELECT 0, 0, '' ORDER BY idle DESC, 1 DESC LIMIT 1",
    )
    .bind(application)
    .fetch_one(connection)
    .await?;
    let mut seen = told.lock().unwrap();
    seen.connections = usize::try_from(connections).unwrap();
    seen.looks += 1;
    let time = Duration::from_secs_f64(idle.max(0.0));
    if time > seen.longest_idle.time {
        seen.longest_idle = Idle { time, after };
    }
    Ok(())
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
