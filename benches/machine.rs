//! Where a run is made: without it its figures mean nothing.

use std::fs::read_to_string;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use outbox::RelayConfig;
use outbox::kafka::rdkafka::util::get_rdkafka_version;

use crate::kafka::PARTITIONS;
use crate::place::Server;
use crate::results::{Kafka, Machine, Outcome};

/// Describes this machine and its servers.
pub(crate) async fn describe(server: &Server, relay: &str) -> Outcome<Machine> {
    let cpu = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = read_to_string("/proc/meminfo").unwrap_or_default();
    let load = read_to_string("/proc/loadavg").unwrap_or_default();
    Ok(Machine {
        run: now(),
        command: command(),
        commit: commit(),
        cpu: field(&cpu, "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        memory: field(&memory, "MemTotal").map_or_else(String::new, |total| gibibytes(&total)),
        kernel: read_to_string("/proc/sys/kernel/osrelease")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        load: load.split(' ').take(3).collect::<Vec<_>>().join(" "),
        postgres: server.postgres().await?,
        mysql: server.mysql().await?,
        mongo: server.mongo().await?,
        kafka: Kafka {
            // Kafka's protocol does not tell its version; scripts/bench does, of the one that scripts/services starts.
            version: std::env::var("OUTBOX_BENCH_KAFKA_VERSION")
                .unwrap_or_else(|_| "of unknown version".to_owned()),
            acks: "all".to_owned(),
            librdkafka: get_rdkafka_version().1,
            partitions: PARTITIONS,
        },
        relay: relay.to_owned(),
    })
}

/// The value of the first line `name: value`.
fn field(text: &str, name: &str) -> Option<String> {
    let (_, value) = text
        .lines()
        .find_map(|line| line.split_once(':').filter(|(own, _)| own.trim() == name))?;
    Some(value.trim().to_owned())
}

fn gibibytes(kib: &str) -> String {
    let kib: f64 = kib.trim_end_matches(" kB").parse().unwrap_or_default();
    format!("{:.0} GiB", kib / f64::from(1 << 20))
}

/// As it was typed, not as cargo passed it on.
fn command() -> String {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    format!("scripts/bench {}", arguments.join(" "))
        .trim_end()
        .to_owned()
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    match (
        git(&["rev-parse", "--short=12", "HEAD"]),
        git(&["status", "--porcelain", "--untracked-files=no"]),
    ) {
        (Some(commit), Some(changes)) if changes.is_empty() => commit,
        (Some(commit), _) => format!("{commit}, changed"),
        _ => "unknown".to_owned(),
    }
}

/// The relay's settings that are not the defaults.
pub(crate) fn differences(config: &RelayConfig) -> Outcome<String> {
    let (own, default) = (
        serde_json::to_value(config)?,
        serde_json::to_value(RelayConfig::default())?,
    );
    let changed: Vec<String> = own
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, value)| default.get(name.as_str()) != Some(*value))
        .map(|(name, value)| format!("{name} = {value}"))
        .collect();
    Ok(if changed.is_empty() {
        "defaults".to_owned()
    } else {
        changed.join(", ")
    })
}

/// The time, to the second, in UTC.
fn now() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant's `civil_from_days`, for days since 1970: a year begins in March, so that the leap day is its last.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3_600,
        second / 60 % 60,
        second % 60
    )
}
