//! The program `outbox`: shows, runs and operates a transactional outbox.

mod args;
mod commands;
mod exit;
mod listen;
mod logging;
mod output;
mod settings;
mod stdout_sink;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // For tests, which say by a variable where a relay is to die.
    #[cfg(feature = "failpoints")]
    let _armed = fail::FailScenario::setup();
    let args = args::Args::parse();
    match commands::run(&args) {
        Ok(answer) => answer.into(),
        Err(failure) => {
            output::failure(&failure, args.verbose);
            ExitCode::from(failure.code as u8)
        }
    }
}
