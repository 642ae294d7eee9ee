//! Connections that are lent, one borrower each, and kept for the next one: for stores that want no pool of their
//! driver's.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::error::{Error, ErrorKind, Result};

/// Lends connections of one kind, opened when they are needed. Cheap to clone.
///
/// A connection goes back only by [`Lent::give_back`], when its borrower knows that it is in order. One that is dropped,
/// because a call failed or was cancelled half-way, is closed with all that was open on it; so are then the idle ones,
/// which what broke it, a restart or a network, has most likely broken as well.
///
/// Nothing is asked of a connection when it comes or goes. One that broke while it was idle fails its next call, which
/// is repeated: cheaper than to ask each time.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::Lender;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> outbox_core::Result<()> {
/// let lender = Lender::new(2, Duration::from_secs(10));
/// let mut lent = lender.lend("settle", async || Ok(String::from("a connection"))).await?;
/// lent.connection()?.push_str(" that was used");
/// lent.give_back();
/// # Ok(())
/// # }
/// ```
pub struct Lender<C> {
    patience: Duration,
    shared: Arc<Shared<C>>,
}

struct Shared<C> {
    /// One permit for each connection that may be open.
    places: Arc<Semaphore>,
    /// The one that was used last comes last, and is used next. Held for a push or a pop, never while waiting.
    idle: Mutex<Vec<Idle<C>>>,
}

struct Idle<C> {
    connection: C,
    opened: Instant,
    since: Instant,
}

/// What is idle for so long may have been forgotten on the way.
const MAX_IDLE: Duration = Duration::from_secs(5 * 60);
/// A session of the server's that lives for ever only grows.
const MAX_AGE: Duration = Duration::from_secs(30 * 60);

impl<C> Lender<C> {
    /// Lends at most `most` at a time, and opens none yet. Opening one, or waiting for one, may take `patience`.
    #[must_use]
    pub fn new(most: u32, patience: Duration) -> Self {
        Self {
            patience,
            shared: Arc::new(Shared {
                places: Arc::new(Semaphore::new(usize::try_from(most).unwrap_or(usize::MAX))),
                idle: Mutex::new(Vec::new()),
            }),
        }
    }

    /// An idle connection, or one that is opened now.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when none became free, or could be opened, in time; others as `open` gives them.
    ///
    /// # Cancel safety
    /// Safe to drop: no place is lost.
    pub async fn lend(
        &self,
        operation: &'static str,
        open: impl AsyncFnOnce() -> Result<C>,
    ) -> Result<Lent<C>> {
        let place = timeout(self.patience, Arc::clone(&self.shared.places).acquire_owned())
            .await
            .ok()
            .and_then(std::result::Result::ok)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Unavailable,
                    operation,
                    "no connection became free in time: the server is slow or max_connections too low",
                )
            })?;
        let (connection, opened) = match self.shared.take() {
            Some(idle) => (idle.connection, idle.opened),
            None => (within(self.patience, operation, open()).await?, Instant::now()),
        };
        Ok(Lent {
            connection: Some(connection),
            operation,
            opened,
            shared: Arc::clone(&self.shared),
            _place: place,
        })
    }
}

impl<C> Clone for Lender<C> {
    fn clone(&self) -> Self {
        Self {
            patience: self.patience,
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<C> fmt::Debug for Lender<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lender")
            .field("patience", &self.patience)
            .field("free", &self.shared.places.available_permits())
            .finish_non_exhaustive()
    }
}

impl<C> Shared<C> {
    fn take(&self) -> Option<Idle<C>> {
        let mut idle = self.idle();
        idle.retain(|idle| idle.since.elapsed() < MAX_IDLE && idle.opened.elapsed() < MAX_AGE);
        idle.pop()
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle<C>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that is lent by a [`Lender`].
///
/// ```
/// use std::time::Duration;
/// use outbox_core::{Lender, Lent};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> outbox_core::Result<()> {
/// let lender = Lender::new(1, Duration::from_secs(10));
/// let lent: Lent<u32> = lender.lend("fetch", async || Ok(1)).await?;
/// drop(lent); // something failed: this connection is closed, and its place is free again
/// lender.lend("fetch", async || Ok(2)).await?.give_back();
/// # Ok(())
/// # }
/// ```
pub struct Lent<C> {
    /// None once it is given back.
    connection: Option<C>,
    operation: &'static str,
    opened: Instant,
    shared: Arc<Shared<C>>,
    /// Comes after the connection: it is free when that is given back, or closed.
    _place: OwnedSemaphorePermit,
}

impl<C> Lent<C> {
    /// The connection, to be used.
    ///
    /// # Errors
    /// None while it is lent.
    pub fn connection(&mut self) -> Result<&mut C> {
        let operation = self.operation;
        self.connection
            .as_mut()
            .ok_or_else(|| Error::new(ErrorKind::Unexpected, operation, "the connection was given back"))
    }

    /// Keeps the connection for the next borrower: nothing is open on it, and no answer is awaited.
    pub fn give_back(mut self) {
        if let Some(connection) = self.connection.take() {
            self.shared.idle().push(Idle {
                connection,
                opened: self.opened,
                since: Instant::now(),
            });
        }
    }
}

impl<C> Drop for Lent<C> {
    fn drop(&mut self) {
        if self.connection.take().is_some() {
            self.shared.idle().clear();
        }
    }
}

impl<C> fmt::Debug for Lent<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent")
            .field("operation", &self.operation)
            .finish_non_exhaustive()
    }
}

/// Gives up on a server that does not answer.
///
/// # Errors
/// [`ErrorKind::Unavailable`] after `limit`; others as `call` gives them.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::{ErrorKind, within};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let error = within(Duration::from_millis(1), "settle", std::future::pending::<outbox_core::Result<()>>()).await.unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Unavailable);
/// # }
/// ```
pub async fn within<T>(
    limit: Duration,
    operation: &'static str,
    call: impl Future<Output = Result<T>>,
) -> Result<T> {
    timeout(limit, call).await.unwrap_or_else(|_| {
        Err(
            Error::new(ErrorKind::Unavailable, operation, "the server does not answer")
                .with("limit", format!("{limit:?}")),
        )
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    struct Opened(AtomicUsize);

    impl Opened {
        async fn lend(&self, lender: &Lender<usize>) -> Result<Lent<usize>> {
            lender
                .lend("test", async || Ok(self.0.fetch_add(1, Ordering::Relaxed)))
                .await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_given_back_is_lent_again_and_what_is_dropped_is_not() {
        let (lender, opened) = (
            Lender::new(2, Duration::from_secs(1)),
            Opened(AtomicUsize::new(0)),
        );
        let (first, mut second) = (
            opened.lend(&lender).await.unwrap(),
            opened.lend(&lender).await.unwrap(),
        );
        assert_eq!(
            opened.lend(&lender).await.unwrap_err().kind(),
            ErrorKind::Unavailable
        );
        assert_eq!(*second.connection().unwrap(), 1);
        second.give_back();
        let again = opened.lend(&lender).await.unwrap();
        assert_eq!(again.connection, Some(1));
        again.give_back();
        // The idle one goes as well.
        drop(first);
        assert_eq!(opened.lend(&lender).await.unwrap().connection, Some(2));
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_while_opening_takes_no_place() {
        let lender = Lender::<()>::new(1, Duration::from_secs(1));
        for _ in 0..3 {
            let never = lender.lend("test", std::future::pending);
            let error = never.await.unwrap_err();
            assert!(error.to_string().contains("does not answer"), "{error}");
        }
    }
}
