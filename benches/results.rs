//! What runs found, as it is kept in a file: a JSON array of `{"machine": …}`, one for each run, and of findings.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The result of reading, writing or measuring.
pub(crate) type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Where and how a run was made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Machine {
    /// Which run, as its findings name it: when it began, in UTC.
    pub(crate) run: String,
    pub(crate) command: String,
    pub(crate) commit: String,
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory: String,
    pub(crate) kernel: String,
    /// What else ran: the load average before the run.
    pub(crate) load: String,
    pub(crate) postgres: Option<Postgres>,
    /// Of MySQL or MariaDB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mysql: Option<Mysql>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mongo: Option<Mongo>,
    pub(crate) kafka: Kafka,
    /// The relay's configuration where it is not the default.
    pub(crate) relay: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Postgres {
    pub(crate) version: String,
    pub(crate) fsync: String,
    pub(crate) synchronous_commit: String,
    pub(crate) shared_buffers: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mysql {
    /// MariaDB's has its name.
    pub(crate) version: String,
    pub(crate) flush_log_at_trx_commit: String,
    pub(crate) log_bin: String,
    pub(crate) sync_binlog: String,
    pub(crate) doublewrite: String,
    pub(crate) buffer_pool: String,
    pub(crate) performance_schema: String,
}

impl Mysql {
    pub(crate) fn product(&self) -> &'static str {
        if self.version.contains("MariaDB") {
            "MariaDB"
        } else {
            "MySQL"
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mongo {
    pub(crate) product: String,
    pub(crate) version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kafka {
    pub(crate) version: String,
    pub(crate) acks: String,
    pub(crate) librdkafka: String,
    pub(crate) partitions: i32,
}

impl Machine {
    /// Names and values, for people.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![
            ("processor", format!("{}, {} cores", self.cpu, self.cores)),
            ("memory", self.memory.clone()),
            ("kernel", self.kernel.clone()),
            ("load before the run", self.load.clone()),
        ];
        if let Some(postgres) = &self.postgres {
            lines.push((
                "PostgreSQL",
                format!(
                    "{}, fsync={}, synchronous_commit={}, shared_buffers={}",
                    postgres.version, postgres.fsync, postgres.synchronous_commit, postgres.shared_buffers
                ),
            ));
        }
        if let Some(mysql) = &self.mysql {
            let Mysql {
                version,
                flush_log_at_trx_commit,
                log_bin,
                sync_binlog,
                doublewrite,
                buffer_pool,
                performance_schema,
            } = mysql;
            lines.push((
                mysql.product(),
                format!(
                    "{version}, innodb_flush_log_at_trx_commit={flush_log_at_trx_commit}, log_bin={log_bin}, \
                     sync_binlog={sync_binlog}, innodb_doublewrite={doublewrite}, \
                     innodb_buffer_pool_size={buffer_pool}, performance_schema={performance_schema}"
                ),
            ));
        }
        if let Some(Mongo { product, version }) = &self.mongo {
            lines.push(("MongoDB's protocol", format!("{product} {version}")));
        }
        let Kafka {
            version,
            acks,
            librdkafka,
            partitions,
        } = &self.kafka;
        lines.push((
            "Kafka",
            format!("{version}, acks={acks}, {partitions} partitions, librdkafka {librdkafka}"),
        ));
        lines.push(("relay", self.relay.clone()));
        lines.push(("commit", self.commit.clone()));
        lines.push(("begun", self.run.clone()));
        lines.push(("command", self.command.clone()));
        lines
    }
}

/// One figure: the median of so many rounds, and their range.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Finding {
    pub(crate) workload: String,
    pub(crate) store: String,
    /// `outbox`, or a baseline: `batched`, `locked`, `naive`.
    pub(crate) system: String,
    /// What the workload varies; empty where it varies nothing.
    pub(crate) case: String,
    pub(crate) metric: String,
    pub(crate) unit: String,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) rounds: usize,
    pub(crate) run: String,
}

impl Finding {
    /// Median, least and most of what rounds gave.
    pub(crate) fn spread(values: &[f64]) -> (f64, f64, f64) {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let Some((&min, &max)) = sorted.first().zip(sorted.last()) else {
            return (f64::NAN, f64::NAN, f64::NAN);
        };
        let middle = sorted.len() / 2;
        let median = if sorted.len().is_multiple_of(2) {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        } else {
            sorted[middle]
        };
        (median, min, max)
    }

    /// The range, where there was more than one round.
    pub(crate) fn range(&self) -> String {
        if self.rounds > 1 {
            format!("{} to {}", figure(self.min), figure(self.max))
        } else {
            String::new()
        }
    }
}

/// All that is known.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Results {
    pub(crate) machines: Vec<Machine>,
    pub(crate) findings: Vec<Finding>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Entry {
    Machine { machine: Box<Machine> },
    Finding(Finding),
}

impl Results {
    pub(crate) fn parse(text: &str) -> Outcome<Self> {
        let mut results = Self::default();
        for entry in serde_json::from_str::<Vec<Entry>>(text)? {
            match entry {
                Entry::Machine { machine } => results.machines.push(*machine),
                Entry::Finding(finding) => results.findings.push(finding),
            }
        }
        Ok(results)
    }

    pub(crate) fn read(path: &Path) -> Outcome<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Self::parse(&text).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    /// One entry a line, so that a new run is a diff that can be read.
    pub(crate) fn write(&self, path: &Path) -> Outcome<()> {
        let machines = self.machines.iter().map(|machine| Entry::Machine {
            machine: Box::new(machine.clone()),
        });
        let findings = self.findings.iter().cloned().map(Entry::Finding);
        let lines: Vec<String> = machines
            .chain(findings)
            .map(|entry| serde_json::to_string(&entry))
            .collect::<Result<_, _>>()?;
        std::fs::write(path, format!("[\n{}\n]\n", lines.join(",\n")))
            .map_err(|error| format!("{}: {error}", path.display()).into())
    }

    /// Takes over what another run found, in place of what was known of the same workloads and stores.
    pub(crate) fn take_over(&mut self, newer: Self) {
        let measured = |found: &[Finding]| -> BTreeSet<(String, String)> {
            found
                .iter()
                .map(|finding| (finding.workload.clone(), finding.store.clone()))
                .collect()
        };
        let again = measured(&newer.findings);
        self.findings
            .retain(|finding| !again.contains(&(finding.workload.clone(), finding.store.clone())));
        self.findings.extend(newer.findings);
        self.machines.extend(newer.machines);
        let runs: BTreeSet<&str> = self.findings.iter().map(|finding| finding.run.as_str()).collect();
        self.machines
            .retain(|machine| runs.contains(machine.run.as_str()));
    }

    pub(crate) fn find(
        &self,
        store: &str,
        workload: &str,
        system: &str,
        case: &str,
        metric: &str,
    ) -> Option<&Finding> {
        self.findings.iter().find(|finding| {
            finding.store == store
                && finding.workload == workload
                && finding.system == system
                && finding.case == case
                && finding.metric == metric
        })
    }
}

/// A number with about three digits that mean something, and its thousands apart.
pub(crate) fn figure(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    let (whole, rest) = text.find('.').map_or((text.as_str(), ""), |at| text.split_at(at));
    let (sign, digits) = whole
        .strip_prefix('-')
        .map_or(("", whole), |digits| ("-", digits));
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0
            && (digits.len() - index).is_multiple_of(3)
            && digits.chars().all(|digit| digit.is_ascii_digit())
        {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    format!("{sign}{grouped}{rest}")
}
