//! `outbox relay`: runs a relay until it is told to stop, or until nothing is left.

use std::future::Future;
use std::sync::Arc;

use outbox::{OutboxStore, Relay, Stats};
use tokio::sync::oneshot;

use super::signals::Signals;
use crate::args::RelayArgs;
use crate::exit::{Answer, Code, Failure, Result};
use crate::listen::{Address, Pages, Server, record_metrics};
use crate::output;
use crate::settings::{Settings, SinkSettings};
use crate::stdout_sink::Gone;

pub(crate) async fn run(args: &RelayArgs) -> Result<Answer> {
    let mut signals = Signals::listen().map_err(|error| {
        Failure::new(Code::Unexpected, format!("listen for signals: {error}")).because(&error)
    })?;
    let settings = super::settings(&args.config)?;
    let address = address(args, &settings)?;
    let store = tokio::select! {
        store = reach(&settings) => store?,
        signal = signals.next() => {
            tracing::info!(signal, "told to stop before the relay started");
            // Nothing was begun, so that this is an orderly end; but what a drain would have left nobody knows.
            return Ok(if args.drain { Answer::Interrupted(signal) } else { Answer::Yes });
        }
    };
    let gone = Gone::default();
    // Before the relay, so that it records what the relay counts.
    let metrics = address.map(|_| record_metrics()).transpose()?;
    let relay = build(&settings, store.clone(), &gone)?;
    let id = relay.id().clone();

    tracing::info!(relay = %id, store = settings.store.describe(), sink = settings.sink.as_ref().map(SinkSettings::describe), drain = args.drain, "relay starts");
    // Dropped with this function: nothing is served when the relay has ended.
    let _server = match address.zip(metrics) {
        Some((address, metrics)) => {
            let pages = Pages::new(metrics, relay.health(), settings.relay.config.lease);
            let server = Server::start(&address, pages).await?;
            tracing::info!(address = %server.address, "listening: /metrics, /health/live, /health/ready");
            Some(server)
        }
        None => None,
    };
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async {
        // The sender lives as long as the relay.
        let _ = stopped.await;
    };
    let running = async {
        if args.drain {
            relay.drain(shutdown).await
        } else {
            relay.run(shutdown).await
        }
    };
    tokio::pin!(running);

    let mut reader_gone = false;
    tokio::select! {
        result = &mut running => {
            result?;
            return remaining(store.stats(), args.drain, &mut signals).await;
        }
        signal = signals.next() => tracing::info!(relay = %id, signal, "stopping in order; a second signal stops at once"),
        () = gone.wait() => reader_gone = true,
    }
    let _ = stop.send(());
    tokio::select! {
        result = &mut running => result?,
        signal = signals.next() => {
            tracing::warn!(relay = %id, signal, "stopped at once; unsettled messages will be delivered again");
            return Ok(Answer::Interrupted(signal));
        }
    }
    tracing::info!(relay = %id, "relay stopped");
    if reader_gone {
        return Err(
            Failure::new(Code::Unavailable, "write stdout: its reader has gone")
                .hint("nothing is lost: what was not written, and the last batch, will be written again"),
        );
    }
    remaining(store.stats(), args.drain, &mut signals).await
}

/// Opens the store and asks it once: one that is not there is told at once and by the exit code; later on the relay
/// waits for it to come back.
async fn reach(settings: &Settings) -> Result<Arc<dyn OutboxStore>> {
    let store = settings.store.open().await?;
    store.stats().await?;
    Ok(store)
}

/// Where to listen, if anywhere: the command line before the configuration.
fn address(args: &RelayArgs, settings: &Settings) -> Result<Option<Address>> {
    let public = args.listen_public || settings.relay.listen_public;
    let address = args.listen.as_deref().or(settings.relay.listen.as_deref());
    if args.listen_public && address.is_none() {
        return Err(Failure::new(
            Code::Usage,
            "listen: --listen-public allows an address, but none is given",
        )
        .hint("add --listen ADDRESS, or relay.listen in the file"));
    }
    address.map(|address| Address::read(address, public)).transpose()
}

fn build(settings: &Settings, store: Arc<dyn OutboxStore>, gone: &Gone) -> Result<Relay> {
    let Some(sink) = &settings.sink else {
        return Err(Failure::new(Code::Usage, "configuration: there is no sink")
            .hint("add [sink] with type = \"kafka\" or \"stdout\", or set OUTBOX_SINK__TYPE"));
    };
    Ok(Relay::new(store, sink.open(gone)?)
        .with_config(settings.relay.config.clone())
        .with_id(settings.relay.id()))
}

/// Whether a drain has left nothing behind. A store that does not answer is not waited for when a signal comes.
async fn remaining(
    stats: impl Future<Output = outbox::Result<Stats>>,
    drain: bool,
    signals: &mut Signals,
) -> Result<Answer> {
    if !drain {
        return Ok(Answer::Yes);
    }
    let stats = tokio::select! {
        stats = stats => stats?,
        signal = signals.next() => return Ok(Answer::Interrupted(signal)),
    };
    if stats.backlog.value() == 0 {
        output::notice("drained: the outbox is empty");
        return Ok(Answer::Yes);
    }
    output::notice(format!(
        "not drained: {} messages remain ({} keys, messages or topics wait for a retry, {} are parked)",
        stats.backlog, stats.retrying, stats.parked
    ));
    Ok(Answer::No)
}

#[cfg(all(test, unix))]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_signal_ends_the_wait_for_what_remains() {
        let mut signals = Signals::listen().unwrap();
        let itself = std::process::id().to_string();
        let sent = Command::new("sh")
            .args(["-c", &format!("kill -TERM {itself}")])
            .status()
            .unwrap();
        assert!(sent.success());
        let answer = remaining(std::future::pending(), true, &mut signals)
            .await
            .unwrap();
        assert_eq!(answer, Answer::Interrupted(15));
    }
}
