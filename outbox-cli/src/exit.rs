//! How the program ends: exit codes, and failures as one line with a hint what to do.

use std::error::Error as _;
use std::process::ExitCode;

use outbox::ErrorKind;

/// What a command answers when it did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Yes, or simply done.
    Yes,
    /// No: a promise did not hold, an outbox is not empty, a threshold was passed.
    No,
    /// A signal, by its number, ended the program before it could answer.
    Interrupted(u8),
}

/// Why the program ends, by remedy. The numbers are documented in `--help` and in the README.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    /// The answer is no.
    No = 1,
    /// The command line or the configuration must be corrected.
    Usage = 2,
    /// The database, the broker or the destination cannot be reached: the same command may succeed later.
    Unavailable = 3,
    /// Schema, permissions or data of the database or broker must be put right by somebody.
    Refused = 4,
    /// Very likely a defect of this program.
    Unexpected = 5,
}

/// What failed, as the user is told.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    /// One line: what failed, why, and on what.
    pub(crate) line: String,
    /// What to do about it.
    pub(crate) hint: Option<String>,
    /// The errors that this one came from, outermost first; shown with `--verbose`.
    pub(crate) chain: Vec<String>,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn new(code: Code, line: impl Into<String>) -> Self {
        Self {
            code,
            line: line.into(),
            hint: None,
            chain: Vec::new(),
        }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn because(mut self, source: &(dyn std::error::Error + 'static)) -> Self {
        self.chain = chain(Some(source));
        self
    }
}

impl From<outbox::Error> for Failure {
    fn from(error: outbox::Error) -> Self {
        let (code, hint) = remedy(error.kind());
        Self {
            code,
            line: error.to_string(),
            hint: hint.map(str::to_owned),
            chain: chain(error.source()),
        }
    }
}

impl From<Answer> for ExitCode {
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Yes => Self::SUCCESS,
            Answer::No => Self::from(Code::No as u8),
            Answer::Interrupted(signal) => Self::from(128_u8.saturating_add(signal)),
        }
    }
}

/// The exit code for a kind of error, and what to do unless the message already says it.
const fn remedy(kind: ErrorKind) -> (Code, Option<&'static str>) {
    match kind {
        ErrorKind::Invalid => (Code::Usage, None),
        ErrorKind::Unsupported => (Code::Usage, None),
        ErrorKind::Unavailable => (Code::Unavailable, Some("the same command may succeed later")),
        ErrorKind::Conflict => (
            Code::Unavailable,
            Some("another session was in the way; run the command again"),
        ),
        ErrorKind::Denied => (
            Code::Refused,
            Some("check credentials, grants and file permissions"),
        ),
        ErrorKind::Schema => (
            Code::Refused,
            Some("`outbox migrate` makes the outbox or brings it up to date"),
        ),
        ErrorKind::Corrupt => (Code::Refused, Some("somebody must look at what is stored there")),
        _ => (
            Code::Unexpected,
            Some("this is very likely a defect worth reporting, with the output of --verbose"),
        ),
    }
}

fn chain(mut source: Option<&(dyn std::error::Error + 'static)>) -> Vec<String> {
    let mut chain = Vec::new();
    while let Some(error) = source {
        chain.push(error.to_string());
        source = error.source();
    }
    chain
}

#[cfg(test)]
mod tests {
    use outbox::Error;

    use super::*;

    #[test]
    fn kinds_become_exit_codes_by_remedy() {
        for (kind, code) in [
            (ErrorKind::Invalid, 2),
            (ErrorKind::Unsupported, 2),
            (ErrorKind::Unavailable, 3),
            (ErrorKind::Conflict, 3),
            (ErrorKind::Denied, 4),
            (ErrorKind::Schema, 4),
            (ErrorKind::Corrupt, 4),
            (ErrorKind::Unexpected, 5),
        ] {
            let failure = Failure::from(Error::new(kind, "test", "failed"));
            assert_eq!(failure.code as u8, code, "{kind:?}");
        }
    }

    #[test]
    fn sources_are_kept_for_verbose() {
        let error =
            Error::new(ErrorKind::Unavailable, "open", "no").with_source(std::io::Error::other("deep"));
        let failure = Failure::from(error);
        assert_eq!(
            (failure.line.as_str(), failure.chain),
            ("open: no", vec!["deep".to_owned()])
        );
    }
}
