//! What moves the messages, each in a process of its own: its CPU time and its memory are then its alone.

use std::process::Stdio;
use std::time::{Duration, Instant};

use outbox::RelayConfig;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::place::Spec;
use crate::results::Outcome;
use crate::stage::count;

/// The argument that makes a worker of this program.
pub(crate) const WORKER: &str = "worker";
/// How long a worker may take to begin and to end.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum System {
    /// The relay.
    Outbox,
    /// Claims so many rows, sends all, waits for all, marks all.
    Batched(i64),
    /// Keeps so many rows locked while it sends all and waits for all, then marks all.
    Locked(i64),
    /// Claims so many rows, and sends one after the other.
    Naive(i64),
}

impl System {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Outbox => "outbox",
            Self::Batched(_) => "batched",
            Self::Locked(_) => "locked",
            Self::Naive(_) => "naive",
        }
    }
}

/// What a worker is told. On its standard input, because a URL may have a password.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) system: System,
    pub(crate) spec: Spec,
    pub(crate) brokers: String,
    pub(crate) relay: RelayConfig,
}

/// The CPU time that a server has taken so far: its own, and that of its children, ended and alive.
pub(crate) fn of_server(process: &str) -> Outcome<Duration> {
    let [user, system, ended_user, ended_system] = ticks(process)?;
    let mut all = user + system + ended_user + ended_system;
    let children = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children"))?;
    for child in children.split_whitespace() {
        // One that has ended meanwhile is among its parent's next time.
        let [user, system, ..] = ticks(child).unwrap_or_default();
        all += user + system;
    }
    Ok(time(all))
}

/// How busy the machine's cores are.
pub(crate) struct Busy {
    since: Instant,
    before: Duration,
}

impl Busy {
    pub(crate) fn from_now() -> Outcome<Self> {
        Ok(Self {
            since: Instant::now(),
            before: of_machine()?,
        })
    }

    /// Percent of all cores, since then.
    pub(crate) fn share(&self) -> Outcome<f64> {
        let cores = std::thread::available_parallelism()?.get();
        let there = self.since.elapsed().as_secs_f64() * count(cores as u64);
        Ok(100.0 * of_machine()?.saturating_sub(self.before).as_secs_f64() / there)
    }
}

/// The CPU time that all processes of this machine have taken so far.
pub(crate) fn of_machine() -> Outcome<Duration> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().unwrap_or_default();
    let fields: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    // Idle, and idle while a disk is waited for, are the fourth and the fifth; time for guests is told twice.
    let busy = fields.iter().take(8).enumerate();
    let busy = busy.filter(|(at, _)| !matches!(at, 3 | 4));
    Ok(time(busy.map(|(_, ticks)| ticks).sum()))
}

/// Linux counts a hundred ticks a second for user space, whatever its own rate.
const fn time(ticks: u64) -> Duration {
    Duration::from_millis(ticks * 10)
}

/// Of a process: in user space and in the kernel, and the same of its children that have ended.
fn ticks(process: &str) -> Outcome<[u64; 4]> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // They are the fields from the 14th on; after the name, which may contain anything but a closing parenthesis.
    let fields: Vec<u64> = stat
        .rsplit(')')
        .next()
        .into_iter()
        .flat_map(|rest| rest.split_whitespace().skip(11).take(4))
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    fields
        .try_into()
        .map_err(|_| format!("/proc/{process}/stat is cut off").into())
}

/// What a process has used so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Usage {
    /// CPU time, in user space and in the kernel.
    pub(crate) cpu: Duration,
    /// Resident bytes, at most and now.
    pub(crate) peak: u64,
    pub(crate) resident: u64,
}

impl Usage {
    /// Of a process by its id, or of `self`.
    pub(crate) fn of(process: &str) -> Outcome<Self> {
        let [user, system, ..] = ticks(process)?;
        let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
        let bytes = |name: &str| -> Outcome<u64> {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap_or_default();
            let kib: u64 = line
                .trim()
                .trim_end_matches(" kB")
                .parse()
                .map_err(|_| format!("no {name} in /proc"))?;
            Ok(kib * 1024)
        };
        Ok(Self {
            cpu: time(user + system),
            peak: bytes("VmHWM:")?,
            resident: bytes("VmRSS:")?,
        })
    }
}

/// A worker that has connected and waits for the word.
pub(crate) struct Worker {
    process: Child,
    /// Its end is the sign to stop.
    input: Option<ChildStdin>,
    output: Lines<BufReader<ChildStdout>>,
    name: &'static str,
}

impl Worker {
    /// Starts it by itself, or as the last arguments of another command.
    pub(crate) async fn start(task: &Task, under: &[String]) -> Outcome<Self> {
        let program = std::env::current_exe()?;
        let mut command = match under.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
            None => Command::new(program),
        };
        let mut process = command
            .arg(WORKER)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let output = process.stdout.take().ok_or("a worker without output")?;
        let mut worker = Self {
            input: process.stdin.take(),
            process,
            output: BufReader::new(output).lines(),
            name: task.system.name(),
        };
        worker.tell(&serde_json::to_string(task)?).await?;
        worker.hear().await?;
        Ok(worker)
    }

    /// Lets it begin, and says when that was.
    pub(crate) async fn go(&mut self) -> Outcome<Instant> {
        let start = Instant::now();
        self.tell("go").await?;
        Ok(start)
    }

    pub(crate) fn usage(&self) -> Outcome<Usage> {
        Usage::of(&self.process.id().ok_or("the worker has ended")?.to_string())
    }

    /// Fails when it has ended by itself.
    pub(crate) fn check(&mut self) -> Outcome<()> {
        match self.process.try_wait()? {
            Some(status) => Err(format!("{} ended before it was told to: {status}", self.name).into()),
            None => Ok(()),
        }
    }

    /// Stops it in order, and says what it has used in all, from beginning to end.
    pub(crate) async fn stop(mut self) -> Outcome<Usage> {
        drop(self.input.take());
        let used = serde_json::from_str(&self.hear().await?)?;
        let status = timeout(PATIENCE, self.process.wait()).await??;
        if !status.success() {
            return Err(format!("{} ended badly: {status}", self.name).into());
        }
        Ok(used)
    }

    async fn tell(&mut self, line: &str) -> Outcome<()> {
        let input = self.input.as_mut().ok_or("the worker was told to stop")?;
        input.write_all(format!("{line}\n").as_bytes()).await?;
        Ok(input.flush().await?)
    }

    async fn hear(&mut self) -> Outcome<String> {
        let line = timeout(PATIENCE, self.output.next_line()).await??;
        line.ok_or_else(|| format!("{} ended without a word", self.name).into())
    }
}
