//! `outbox config`: checks a configuration, or prints an example.

use crate::args::ConfigCommand;
use crate::exit::{Answer, Result};
use crate::output;
use crate::settings::{Settings, example};
use crate::stdout_sink::Gone;

pub(crate) async fn run(command: &ConfigCommand) -> Result<Answer> {
    match command {
        ConfigCommand::Example { store } => output::line(example(*store).trim_end())?,
        ConfigCommand::Check { config, connect } => {
            let settings = super::settings(config)?;
            check(&settings, *connect).await?;
        }
    }
    Ok(Answer::Yes)
}

async fn check(settings: &Settings, connect: bool) -> Result<()> {
    let sink = settings.sink.as_ref();
    // Made even when it is not asked: some options are only understood by the client itself.
    let opened = sink.map(|sink| sink.open(&Gone::default())).transpose()?;
    let described = sink.map_or_else(|| "no sink".to_owned(), crate::settings::SinkSettings::describe);
    if connect {
        settings.store.open().await?.stats().await?;
        output::line(format!(
            "store: {}: reached, schema as expected",
            settings.store.describe()
        ))?;
        if let Some(mut opened) = opened {
            opened.probe().await?;
            output::line(format!("sink: {described}: reached"))?;
        }
    }
    output::line(format!(
        "the configuration is valid: {} to {described}",
        settings.store.describe()
    ))
}
