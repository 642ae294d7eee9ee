//! What the tests of the program share: a folder with a database and a configuration, and the program run in it.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use outbox::sqlite::rusqlite::{Connection, Params};

/// A folder of its own, with `outbox.toml` in it.
pub struct Place {
    folder: tempfile::TempDir,
}

/// What a run gave.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A store in `app.db` and the sink stdout.
pub const STDOUT: &str = "[store]\ntype = 'sqlite'\npath = 'app.db'\n[sink]\ntype = 'stdout'\n";

impl Place {
    /// An empty outbox, configured by `config`.
    pub fn migrated(config: &str) -> Self {
        let place = Self::new(config);
        place.ok(&["migrate"]);
        place
    }

    pub fn new(config: &str) -> Self {
        let place = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        place.write("outbox.toml", config);
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub fn connection(&self) -> Connection {
        Connection::open(self.path("app.db")).unwrap()
    }

    /// A database of this name that nobody else can so much as read while the connection lives.
    pub fn lock(&self, name: &str) -> Connection {
        let connection = Connection::open(self.path(name)).unwrap();
        connection
            .execute_batch(
                "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; CREATE TABLE IF NOT EXISTS locked (x)",
            )
            .unwrap();
        connection
    }

    pub fn execute(&self, statement: &str, params: impl Params) {
        self.connection().execute(statement, params).unwrap();
    }

    /// Rows of the topic `t` and key `k` with the payloads `from`, `from + 1`, …
    pub fn enqueue(&self, from: u32, count: u32) {
        let mut connection = self.connection();
        let tx = connection.transaction().unwrap();
        for payload in from..from + count {
            tx.execute(
                "INSERT INTO outbox (topic, key, payload) VALUES ('t', 'k', ?1)",
                [payload.to_string()],
            )
            .unwrap();
        }
        tx.commit().unwrap();
    }

    /// The program with these arguments in this folder, and nothing of the tests' own environment that it would read.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_outbox"));
        for (name, _) in std::env::vars_os() {
            let foreign = name.to_str().is_none_or(|name| name.starts_with("OUTBOX_"));
            if foreign || name == "RUST_LOG" {
                command.env_remove(name);
            }
        }
        command
            .args(arguments)
            .env("OUTBOX_CONFIG", "outbox.toml")
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Run {
        finish(self.command(arguments))
    }

    /// Runs it; panics unless it answers yes. Gives stdout.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let run = self.run(arguments);
        assert_eq!(run.code, Some(0), "{arguments:?}: {run:?}");
        run.stdout
    }

    /// The answer as JSON.
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        one_object(&self.ok(arguments))
    }

    pub fn backlog(&self) -> u64 {
        self.json(&["status", "--json"])["backlog"].as_u64().unwrap()
    }

    /// Starts it and leaves it running; it is killed with the returned value.
    pub fn start(&self, arguments: &[&str], stdout: impl Into<Stdio>) -> Running {
        self.start_logging(arguments, stdout, Stdio::piped())
    }

    /// The same with stderr somewhere else: a pipe that nobody reads holds little.
    pub fn start_logging(
        &self,
        arguments: &[&str],
        stdout: impl Into<Stdio>,
        stderr: impl Into<Stdio>,
    ) -> Running {
        let mut command = self.command(arguments);
        command.stdout(stdout).stderr(stderr);
        Running(Some(command.spawn().unwrap()))
    }
}

/// Runs a command to its end.
pub fn finish(mut command: Command) -> Run {
    command.output().unwrap().into()
}

/// The one JSON object that stdout must be.
pub fn one_object(stdout: &str) -> serde_json::Value {
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    let value: serde_json::Value = serde_json::from_str(stdout).unwrap();
    assert!(value.is_object(), "{stdout}");
    value
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// The demo placed 200 orders and says that every part of the promise held.
pub fn kept(run: &Run) {
    assert_eq!(run.code, Some(0), "{run:?}");
    let report = one_object(&run.stdout);
    let (committed, rolled_back) = (
        report["committed"].as_u64().unwrap(),
        report["rolled_back"].as_u64().unwrap(),
    );
    assert_eq!(committed + rolled_back, 200, "{report}");
    assert_eq!(report["delivered"], committed, "{report}");
    assert_eq!(
        report["duplicates_at_broker"], report["duplicates_dropped"],
        "{report}"
    );
    assert_eq!(report["sum_expected"], report["sum_applied"], "{report}");
    for zero in [
        "lost",
        "phantoms",
        "order_gaps",
        "accounts_wrong",
        "left_in_outbox",
    ] {
        assert_eq!(report[zero], 0, "{zero}: {report}");
    }
    assert_eq!(report["kept"], true, "{report}");
    let checks = report["checks"].as_object().unwrap();
    assert!(
        checks.len() == 5 && checks.values().all(|held| held == true),
        "{report}"
    );
}

/// A process that does not outlive its test.
pub struct Running(Option<Child>);

impl Running {
    /// Starts a command whose output is read in the end.
    pub fn spawn(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(Some(command.spawn().unwrap()))
    }

    pub fn child(&mut self) -> &mut Child {
        self.0.as_mut().unwrap()
    }

    /// Whether it has this file open.
    #[cfg(target_os = "linux")]
    pub fn has_open(&mut self, file: &std::fs::Metadata) -> bool {
        use std::os::unix::fs::MetadataExt;
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.child().id())).unwrap();
        // What was closed meanwhile is not open.
        open.filter_map(|entry| std::fs::metadata(entry.unwrap().path()).ok())
            .any(|open| (open.dev(), open.ino()) == (file.dev(), file.ino()))
    }

    /// Sends a signal by its name.
    pub fn signal(&mut self, name: &str) {
        let pid = self.child().id().to_string();
        // The shell has it built in; the program of that name is not everywhere.
        let sent = Command::new("sh")
            .args(["-c", &format!("kill -{name} {pid}")])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    /// Waits for the end; panics when it takes longer than half a minute.
    pub fn wait(mut self) -> Run {
        let until = Instant::now() + Duration::from_secs(30);
        while self.child().try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "the program does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.0.take().unwrap().wait_with_output().unwrap().into()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until something is so; panics when it takes longer than half a minute.
pub fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
