//! What `outbox relay --listen` serves over HTTP: metrics and health, read only.
//!
//! Off unless asked for, on this machine alone unless allowed, and small: GET and HEAD, no body is read, each
//! connection serves one request, few at a time, none for long. All tasks end with the [`Server`].

mod address;
mod pages;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};

pub(crate) use self::address::Address;
pub(crate) use self::pages::{Pages, record_metrics};
use crate::exit::{Code, Failure, Result};

/// How many connections are served at one time; more wait.
const CONNECTIONS: usize = 32;
/// How long a connection may take from its first byte to its last.
const CONNECTION_TIME: Duration = Duration::from_secs(10);
/// The most headers of a request, and the most bytes of them: the least that hyper lets be.
const HEADERS: usize = 32;
const HEADER_BYTES: usize = 8 * 1024;
/// How often histograms are folded, so that they do not grow while nobody asks.
const UPKEEP: Duration = Duration::from_secs(5);

/// A server that stops when it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Server {
    /// Begins to listen; the pages are asked for at each request.
    pub(crate) async fn start(address: &Address, pages: Pages) -> Result<Self> {
        let failed = |error: io::Error| refusal(address, &error);
        let listener = TcpListener::bind(address.socket()).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let pages = Arc::new(pages);
        let mut tasks = JoinSet::new();
        tasks.spawn(fold(Arc::clone(&pages)));
        tasks.spawn(accept(listener, pages));
        Ok(Self {
            address: bound,
            _tasks: tasks,
        })
    }
}

fn refusal(address: &Address, error: &io::Error) -> Failure {
    let line = format!("listen on {}: {error}", address.socket());
    match error.kind() {
        io::ErrorKind::AddrInUse => Failure::new(Code::Unavailable, line)
            .hint("another program listens there, perhaps another relay: give each an address of its own"),
        io::ErrorKind::AddrNotAvailable => {
            Failure::new(Code::Usage, line).hint("this machine does not have that address")
        }
        io::ErrorKind::PermissionDenied => {
            Failure::new(Code::Refused, line).hint("ports below 1024 need a privilege: choose a higher one")
        }
        _ => Failure::new(Code::Unavailable, line),
    }
    .because(error)
}

/// Folds what the histograms have gathered, now and then.
async fn fold(pages: Arc<Pages>) {
    let mut ticks = interval(UPKEEP);
    loop {
        ticks.tick().await;
        pages.fold();
    }
}

/// Serves whoever comes; its connections end with it.
async fn accept(listener: TcpListener, pages: Arc<Pages>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let pages = Arc::clone(&pages);
                connections.spawn(async move {
                    // A client that goes or dawdles is its own concern.
                    let _ = timeout(CONNECTION_TIME, serve(stream, &pages)).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                // Out of descriptors, very likely: trying again at once would only fill the log.
                sleep(Duration::from_secs(1)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(stream: TcpStream, pages: &Pages) -> hyper::Result<()> {
    let answer =
        async |request: Request<Incoming>| -> std::result::Result<Response<Full<Bytes>>, Infallible> {
            Ok(pages.answer(request.method(), request.uri().path()))
        };
    http1::Builder::new()
        .keep_alive(false)
        .max_headers(HEADERS)
        .max_buf_size(HEADER_BYTES)
        .timer(TokioTimer::new())
        .header_read_timeout(CONNECTION_TIME)
        .serve_connection(TokioIo::new(stream), service_fn(answer))
        .await
}
