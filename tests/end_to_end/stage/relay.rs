//! Relays as operators run them: processes, which can be killed, stopped and told to end.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// By which a process ends that aborts.
#[allow(dead_code, reason = "for faults")]
const SIGABRT: i32 = 6;

/// What a process takes of the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Of memory, in KiB.
    pub(crate) resident: usize,
    /// Open files and sockets.
    pub(crate) files: usize,
}

/// A running `outbox relay`. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Relay {
    child: Child,
    log: PathBuf,
}

impl Relay {
    /// Starts one that writes its log to a file, in this environment.
    pub(super) fn start(config: &Path, log: PathBuf, environment: Vec<(&str, String)>) -> Self {
        let output = File::create(&log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_outbox"))
            .envs(environment)
            .args(["relay", "--config"])
            .arg(config)
            .env("RUST_LOG", "info,outbox_core=debug")
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL: it gets no chance to do anything.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// It dies by itself, as if it had been killed.
    #[allow(dead_code, reason = "for faults")]
    pub(crate) fn dies(mut self) {
        let ended = super::until(Duration::from_secs(60), || self.child.try_wait().unwrap());
        let status = ended.unwrap_or_else(|| panic!("it goes on:\n{}", self.log()));
        assert_eq!(status.signal(), Some(SIGABRT), "{status}:\n{}", self.log());
    }

    /// SIGTERM: it is told to end in order.
    pub(crate) fn tell_to_end(&self) {
        signal(&self.pid().to_string(), "TERM");
    }

    /// SIGSTOP: it stands still and does not know.
    pub(crate) fn pause(&self) {
        signal(&self.pid().to_string(), "STOP");
    }

    /// SIGCONT: it goes on as if nothing had happened.
    pub(crate) fn resume(&self) {
        signal(&self.pid().to_string(), "CONT");
    }

    /// SIGTERM: it ends in order; says how, and how long it took.
    pub(crate) fn terminate(mut self) -> (ExitStatus, Duration) {
        let begin = Instant::now();
        self.tell_to_end();
        let ended = super::until(Duration::from_secs(60), || self.child.try_wait().unwrap());
        let status = ended.unwrap_or_else(|| panic!("a relay does not end:\n{}", self.log()));
        (status, begin.elapsed())
    }

    /// What it takes of the system; none where there is no `/proc` to tell it.
    pub(crate) fn usage(&self) -> Option<Usage> {
        let process = PathBuf::from(format!("/proc/{}", self.pid()));
        let status = std::fs::read_to_string(process.join("status")).ok()?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(Usage {
            resident: resident.trim().strip_suffix(" kB")?.parse().ok()?,
            files: std::fs::read_dir(process.join("fd")).ok()?.count(),
        })
    }

    /// What its open files are, for people.
    pub(crate) fn files(&self) -> Vec<String> {
        let folder = std::fs::read_dir(format!("/proc/{}/fd", self.pid()));
        let targets = folder.into_iter().flatten().flatten();
        let mut files: Vec<String> = targets
            .filter_map(|file| Some(std::fs::read_link(file.path()).ok()?.display().to_string()))
            .collect();
        files.sort_unstable();
        files
    }

    /// What it has said so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Fails when it has died by itself.
    pub(crate) fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("a relay died, {status}:\n{}", self.log());
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The shell has `kill` built in, on every system.
pub(super) fn signal(pid: &str, name: &str) {
    let status = Command::new("sh")
        .args(["-c", "kill -s \"$1\" \"$2\"", "sh", name, pid])
        .status()
        .unwrap();
    assert!(status.success(), "SIG{name} could not be sent to {pid}");
}
