//! Logs: to stderr, as lines for people or as JSON for collectors.

use tracing_subscriber::EnvFilter;

use crate::args::{LogArgs, LogFormat};
use crate::exit::{Code, Failure, Result};
use crate::output;

/// Starts logging; `default` is the filter when neither `--log` nor `RUST_LOG` gives one.
pub(crate) fn start(args: &LogArgs, default: &str) -> Result<()> {
    let given = args
        .log
        .clone()
        .or_else(|| std::env::var("RUST_LOG").ok())
        .filter(|filter| !filter.is_empty());
    let filter = EnvFilter::try_new(given.as_deref().unwrap_or(default)).map_err(|error| {
        Failure::new(Code::Usage, format!("log filter: {error}"))
            .hint("a level (info) or targets with levels (info,librdkafka=debug)")
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output::colours_on_stderr());
    let started = match args.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_ansi(false).try_init(),
    };
    started.map_err(|error| Failure::new(Code::Unexpected, format!("start logging: {error}")))
}
