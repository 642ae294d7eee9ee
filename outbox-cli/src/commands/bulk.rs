//! Changes of many things at once: asked for before, counted while they go on, told of when they end half-way.

use indicatif::{HumanCount, ProgressBar};

use crate::exit::{Code, Failure, Result};
use crate::output;

/// Refuses what has to be asked for where nobody can be asked.
pub(super) fn must_be_able_to_ask(command: &str) -> Result<()> {
    if output::can_ask() {
        return Ok(());
    }
    Err(Failure::new(
        Code::Usage,
        format!("{command} --all cannot be undone, and there is no terminal to ask on: add --yes"),
    ))
}

/// Asks whether so many are meant; none need no leave.
pub(super) fn agreed(question: &str, count: usize, what: &str) -> Result<bool> {
    Ok(count == 0 || output::ask(&format!("{question} {} {what}?", human(count)))?)
}

/// Counts what was done, and shows it on a terminal where it may take long.
pub(super) struct Progress {
    done: usize,
    bar: ProgressBar,
}

impl Progress {
    /// Of one or a few that were named a bar would only flicker.
    pub(super) fn new(total: usize, all: bool, what: &str) -> Self {
        let bar = match all {
            true => output::progress(u64::try_from(total).unwrap_or(u64::MAX), what),
            false => ProgressBar::hidden(),
        };
        Self { done: 0, bar }
    }

    /// So many were tried, of which so many were still there.
    pub(super) fn add(&mut self, tried: usize, done: usize) {
        self.done += done;
        self.bar.inc(u64::try_from(tried).unwrap_or(u64::MAX));
    }

    /// How many were done in all.
    pub(super) fn end(self) -> usize {
        self.bar.finish_and_clear();
        self.done
    }
}

/// Tells people what had been done when the rest failed; why it failed is told next, as every failure.
pub(super) fn tell_partial(deed: &str, done: usize) {
    if done > 0 {
        output::notice(format!("{deed} {} before this failed:", human(done)));
    }
}

fn human(count: usize) -> HumanCount {
    HumanCount(u64::try_from(count).unwrap_or(u64::MAX))
}
