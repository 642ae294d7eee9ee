//! A TCP proxy that misbehaves as networks do, for tests against any server.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

/// Passes bytes on, as it is told. Dropping it cuts everything.
pub(crate) struct Proxy {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
    accepting: JoinHandle<()>,
}

/// What connections meet; those that are open follow its changes.
#[derive(Debug, Clone)]
struct Weather {
    target: String,
    /// How long each chunk is on its way, in either direction.
    delay: Duration,
    /// Nothing passes, and nobody is told.
    blackhole: bool,
    /// Connections below this number are closed.
    cut_below: u64,
    /// Of connections below this number nothing passes any more, ever, and nobody is told.
    lost_below: u64,
    /// The next connection.
    next: u64,
    /// The connection whose client sends these bytes is cut once the server has them.
    cut_after: Option<Arc<[u8]>>,
    /// How much more passes in all before a connection is cut: of what clients send, and of what servers answer.
    left: [Option<Left>; 2],
    /// How often a connection was cut by one of these.
    cuts: u64,
    /// How many bytes servers have answered.
    answered: usize,
}

#[derive(Debug, Clone, Copy)]
enum Left {
    /// So many chunks, the last of which still arrives.
    Chunks(usize),
    /// So many chunks, the last of which does not.
    ButOne(usize),
    Bytes(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    There,
    Back,
}

impl Proxy {
    /// In front of the server at `target`, which is `host:port`.
    pub(crate) async fn before(target: impl Into<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (weather, _) = watch::channel(Weather {
            target: target.into(),
            delay: Duration::ZERO,
            blackhole: false,
            cut_below: 0,
            lost_below: 0,
            next: 0,
            cut_after: None,
            left: [None; 2],
            cuts: 0,
            answered: 0,
        });
        let changes = weather.clone();
        let accepting = tokio::spawn(async move {
            // Connections end with the proxy.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(connection(client, changes.clone()));
            }
        });
        Self {
            address,
            weather,
            accepting,
        }
    }

    pub(crate) const fn port(&self) -> u16 {
        self.address.port()
    }

    /// Sends new connections elsewhere.
    pub(crate) fn retarget(&self, target: impl Into<String>) {
        self.weather.send_modify(|weather| weather.target = target.into());
    }

    /// Keeps each chunk for so long, in either direction.
    pub(crate) fn delay(&self, delay: Duration) {
        self.weather.send_modify(|weather| weather.delay = delay);
    }

    /// Closes what is open.
    pub(crate) fn cut(&self) {
        self.weather
            .send_modify(|weather| weather.cut_below = weather.next);
    }

    /// Lets nothing pass, while connections stay open; what is sent meanwhile arrives afterwards.
    pub(crate) fn blackhole(&self, on: bool) {
        self.weather.send_modify(|weather| weather.blackhole = on);
    }

    /// Forgets the connections that are open, as a firewall does: nothing passes, ever, and nobody is told. New ones
    /// are not concerned.
    pub(crate) fn lose(&self) {
        self.weather
            .send_modify(|weather| weather.lost_below = weather.next);
    }

    /// Cuts, once, the connection whose client sends these bytes in one piece, after the server has got them.
    pub(crate) fn cut_after(&self, bytes: &[u8]) {
        self.weather
            .send_modify(|weather| weather.cut_after = Some(bytes.into()));
    }

    /// Cuts, once, the connection whose client sends the `number`-th piece from now on, which the server gets or not.
    pub(crate) fn cut_at(&self, number: usize, arrives: bool) {
        let left = if arrives {
            Left::Chunks(number)
        } else {
            Left::ButOne(number)
        };
        self.weather
            .send_modify(|weather| weather.left = [Some(left), None]);
    }

    /// Cuts, once, the connection on which an answer goes on beyond so many bytes from now on.
    pub(crate) fn cut_back_after(&self, bytes: usize) {
        self.weather
            .send_modify(|weather| weather.left = [None, Some(Left::Bytes(bytes))]);
    }

    /// Cuts nothing any more that was not cut yet.
    pub(crate) fn disarm(&self) {
        self.weather.send_modify(|weather| {
            weather.cut_after = None;
            weather.left = [None; 2];
        });
    }

    /// How many bytes servers have answered.
    pub(crate) fn answered(&self) -> usize {
        self.weather.borrow().answered
    }

    /// How often a connection was cut at such a place.
    pub(crate) fn cuts(&self) -> u64 {
        self.weather.borrow().cuts
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn connection(client: TcpStream, weather: watch::Sender<Weather>) {
    let mut number = 0;
    weather.send_modify(|weather| {
        number = weather.next;
        weather.next += 1;
    });
    let target = weather.borrow().target.clone();
    let Ok(server) = TcpStream::connect(target).await else {
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    // A second handle, so that the server's end stays open when the client's is cut.
    let server = server.into_std().unwrap();
    let kept = server.try_clone().unwrap();
    let (server_reads, server_writes) = TcpStream::from_std(server).unwrap().into_split();
    let (client_reads, client_writes) = client.into_split();
    let (strike, mut struck) = watch::channel(false);
    let mut changes = weather.subscribe();
    let hushed = AtomicBool::new(false);
    let there = pump(
        Direction::There,
        number,
        client_reads,
        server_writes,
        &weather,
        &hushed,
        &strike,
    );
    let back = pump(
        Direction::Back,
        number,
        server_reads,
        client_writes,
        &weather,
        &hushed,
        &strike,
    );
    tokio::select! {
        () = async { tokio::join!(there, back); } => return,
        _ = changes.wait_for(|weather| weather.cut_below > number) => return,
        _ = struck.wait_for(|struck| *struck) => {}
    }
    // The server acts on what it has got; closed with an answer unread, it might never have seen it.
    let mut rest = TcpStream::from_std(kept).unwrap();
    let drained = async { while let Ok(1..) = rest.read(&mut [0; 4096]).await {} };
    let _ = timeout(Duration::from_secs(10), drained).await;
}

/// One direction, until its end.
async fn pump(
    direction: Direction,
    number: u64,
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    weather: &watch::Sender<Weather>,
    // Set before the server gets what it will answer to: the client does not hear of it.
    hushed: &AtomicBool,
    strike: &watch::Sender<bool>,
) {
    let (chunks, mut due) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let mut changes = weather.subscribe();
    let read = async {
        let chunks = chunks;
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let delay = weather.borrow().delay;
            let _ = chunks.send((Instant::now() + delay, buffer[..length].to_vec()));
        }
    };
    let write = async {
        while let Some((at, chunk)) = due.recv().await {
            sleep_until(at).await;
            let passes = |weather: &Weather| !weather.blackhole && weather.lost_below <= number;
            if changes.wait_for(passes).await.is_err() {
                return;
            }
            if direction == Direction::Back && hushed.load(Ordering::SeqCst) {
                return;
            }
            if let Some(arrives) = strikes(weather, direction, &chunk) {
                hushed.store(true, Ordering::SeqCst);
                let _ = to.write_all(&chunk[..arrives]).await;
                let _ = strike.send(true);
                return;
            }
            if to.write_all(&chunk).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(read, write);
}

/// Whether the connection is cut at this chunk, and how much of it arrives; there is only one.
fn strikes(weather: &watch::Sender<Weather>, direction: Direction, chunk: &[u8]) -> Option<usize> {
    let mut arrives = None;
    weather.send_if_modified(|weather| {
        if direction == Direction::Back {
            weather.answered += chunk.len();
        } else if weather
            .cut_after
            .as_ref()
            .is_some_and(|wanted| chunk.windows(wanted.len()).any(|part| part == &wanted[..]))
        {
            weather.cut_after = None;
            arrives = Some(chunk.len());
        }
        let left = &mut weather.left[direction as usize];
        match left {
            Some(Left::Chunks(1)) => arrives = Some(chunk.len()),
            Some(Left::ButOne(1)) => arrives = Some(0),
            Some(Left::Bytes(bytes)) if *bytes < chunk.len() => arrives = Some(*bytes),
            Some(Left::Chunks(chunks) | Left::ButOne(chunks)) => *chunks -= 1,
            Some(Left::Bytes(bytes)) => *bytes -= chunk.len(),
            None => {}
        }
        if arrives.is_some() {
            weather.left = [None; 2];
            weather.cuts += 1;
        }
        arrives.is_some()
    });
    arrives
}
