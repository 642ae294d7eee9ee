//! The commands, one file each.

mod bulk;
mod config;
mod dead;
mod demo;
mod explain;
mod migrate;
mod parked;
mod relay;
mod signals;
mod simulate;
mod status;

use std::future::Future;
use std::sync::Arc;

use outbox::{Count, MessageId, OutboxStore};
use tokio::runtime::Runtime;

use crate::args::{Args, Command, ConfigArgs};
use crate::exit::{Answer, Code, Failure, Result};
use crate::logging;
use crate::output;
use crate::settings::Settings;

/// Does what the command line says.
pub(crate) fn run(args: &Args) -> Result<Answer> {
    let default_filter = match args.command {
        Command::Relay(_) => "info",
        // It kills its own relay and says so; the log would say it again.
        // So does a simulation, thousands of times.
        Command::Demo(_) | Command::Simulate(_) => "off",
        // What librdkafka has to say comes back as the command's own failure.
        _ => "warn,librdkafka=off",
    };
    logging::start(&args.log, default_filter)?;
    match &args.command {
        Command::Demo(args) => demo::run(args),
        Command::Simulate(args) => simulate::run(args),
        Command::Relay(args) => block_on(relay::run(args)),
        Command::Status(args) => block_on(status::run(args)),
        Command::Explain(args) => block_on(explain::run(args)),
        Command::Resume(choice) => block_on(parked::resume(choice)),
        Command::Migrate(args) => block_on(migrate::run(args)),
        Command::Dead(command) => block_on(dead::run(command)),
        Command::Parked(command) => block_on(parked::run(command)),
        Command::Config(command) => block_on(config::run(command)),
    }
}

/// The settings that the command line names.
fn settings(args: &ConfigArgs) -> Result<Settings> {
    Settings::load(args.config.as_deref())
}

/// The store that the command line names.
async fn store(args: &ConfigArgs) -> Result<Arc<dyn OutboxStore>> {
    settings(args)?.store.open().await
}

/// How sure a count is, in JSON.
const fn sureness(count: Count) -> &'static str {
    match count {
        Count::Exact(_) => "exact",
        Count::AtLeast(_) => "at_least",
        Count::About(_) => "about",
    }
}

/// One more than is shown shows whether there are more.
const fn and_one(limit: u32) -> usize {
    (limit as usize).saturating_add(1)
}

/// Cuts a list at the limit, and says so to people: a list that just ends is taken for all there is.
fn cut<T>(list: &mut Vec<T>, limit: u32) {
    let limit = limit as usize;
    if list.len() > limit {
        list.truncate(limit);
        output::notice(format!("{limit} shown; --limit shows more"));
    }
}

/// Message ids as the user gave them.
fn message_ids(texts: &[String]) -> Result<Vec<MessageId>> {
    texts.iter().map(|text| Ok(text.parse::<MessageId>()?)).collect()
}

/// Runs a command; does not wait for blocking calls that nobody waits for any more.
fn block_on<T>(command: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = runtime()?;
    let result = runtime.block_on(command);
    runtime.shutdown_background();
    result
}

fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Code::Unavailable, format!("start threads: {error}")).because(&error))
}
