//! The report: `docs/performance.md`, made of what was measured and of nothing else.

use std::fmt::Write as _;

use crate::results::{Finding, Results, figure};

/// A store, as its section begins.
struct Section {
    store: &'static str,
    title: &'static str,
    targets: &'static [Target],
    /// What stands in the way of what was missed. Its figures are of profiles, beside the runs below.
    limits: &'static str,
}

/// All stores, in the order of the report.
const SECTIONS: &[Section] = &[
    Section {
        store: "postgres",
        title: "PostgreSQL",
        targets: POSTGRES,
        limits: LIMITS,
    },
    Section {
        store: "mysql",
        title: "MySQL",
        targets: MYSQL,
        limits: MYSQL_LIMITS,
    },
    Section {
        store: "mariadb",
        title: "MariaDB",
        targets: MYSQL,
        limits: "",
    },
    Section {
        store: "mongo",
        title: "MongoDB's protocol",
        targets: &[],
        limits: MONGO_LIMITS,
    },
    Section {
        store: "sqlite",
        title: "SQLite",
        targets: &[],
        limits: "",
    },
    Section {
        store: "memory",
        title: "Memory",
        targets: &[],
        limits: "",
    },
];

/// What the project set out to reach with a store and Kafka.
struct Target {
    what: &'static str,
    workload: &'static str,
    case: &'static str,
    metric: &'static str,
    bound: Bound,
}

enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

const fn target(
    what: &'static str,
    workload: &'static str,
    case: &'static str,
    metric: &'static str,
    bound: Bound,
) -> Target {
    Target {
        what,
        workload,
        case,
        metric,
        bound,
    }
}

/// MySQL's and MariaDB's.
const MYSQL: &[Target] = &[target(
    "drain, beside the batched baseline",
    "drain",
    "",
    "rate, in rates of batched",
    Bound::AtLeast(2.0),
)];

const POSTGRES: &[Target] = &[
    target(
        "drain, beside the batched baseline",
        "drain",
        "",
        "rate, in rates of batched",
        Bound::AtLeast(5.0),
    ),
    target(
        "drain, beside the same in one transaction",
        "drain",
        "",
        "rate, in rates of locked",
        Bound::AtLeast(5.0),
    ),
    target(
        "drain, beside the naive baseline",
        "drain",
        "",
        "rate, in rates of naive",
        Bound::AtLeast(200.0),
    ),
    target("relay's CPU", "drain", "", "CPU", Bound::AtMost(5.0)),
    target(
        "commit to consume at 1,000/s, median",
        "latency",
        "1,000 messages/s",
        "p50",
        Bound::AtMost(3.0),
    ),
    target(
        "commit to consume at 1,000/s, 99 of 100",
        "latency",
        "1,000 messages/s",
        "p99",
        Bound::AtMost(8.0),
    ),
    target(
        "time for a message, 10 M waiting beside 10 k",
        "backlog",
        "10,000,000 waiting",
        "time for a message, in that at 10,000 waiting",
        Bound::AtMost(1.25),
    ),
    target(
        "relay's memory, 10 M waiting",
        "backlog",
        "10,000,000 waiting",
        "peak memory",
        Bound::AtMost(96.0),
    ),
    target(
        "relay's memory, 10 M waiting beside 10 k",
        "backlog",
        "10,000,000 waiting",
        "peak memory, in that at 10,000 waiting",
        Bound::AtMost(1.25),
    ),
    target(
        "one key, beside 10,000",
        "keys",
        "1 key",
        "rate, share of that with 10,000 keys",
        Bound::AtLeast(80.0),
    ),
    target(
        "producers, beside none",
        "producers",
        "with a relay",
        "commits, share of those without",
        Bound::AtLeast(90.0),
    ),
    target(
        "a snapshot is held",
        "held",
        "snapshot held",
        "rate, share of the undisturbed",
        Bound::AtLeast(90.0),
    ),
    target(
        "a writing transaction is held",
        "held",
        "writer held",
        "rate, share of the undisturbed",
        Bound::AtLeast(90.0),
    ),
    target(
        "a key is blocked",
        "held",
        "key blocked",
        "rate, share of the undisturbed",
        Bound::AtLeast(90.0),
    ),
];

/// What each workload is, in the order of the report.
const WORKLOADS: &[(&str, &str)] = &[
    (
        "drain",
        "A backlog of messages of 1 KiB with 10,000 keys, from the word to begin until the broker has the last message: \
         200,000 messages (MongoDB's protocol: 20,000), 2,000 for *naive*. Each system has a fresh table, vacuumed (in MySQL and MariaDB: purged) and \
         analysed, a fresh topic that was written to, and sends the message's id as a header. *batched* claims rows by an \
         `UPDATE` with `FOR UPDATE SKIP LOCKED` over a partial index, sends all, waits for all, marks all with one \
         `UPDATE`: as libraries do it that hold no transaction open while they wait for a broker. In MySQL and MariaDB, \
         where an `UPDATE` returns nothing and no index is partial, the claim is a transaction of a `SELECT` and an \
         `UPDATE`, over an index by what is marked and the id. *locked* does all of it in one transaction, which spares \
         the claim's write, and in PostgreSQL commits without waiting for the disk. The batch of each is the best of 100, \
         500, 1,000 and 2,000 (and 5,000 in MySQL and MariaDB), tried before, its linger 0. *naive* claims as *batched* does, sends one after the other \
         with librdkafka's default linger and waits for each, then marks; in SQLite it reads one, sends it, deletes it. \
         All use `acks=all` and idempotence, as the relay does. The CPU of the database, of the broker and of the whole \
         machine is what they spent for a message until the last one's arrival, with whatever else they did: where a \
         machine's cores are full, its CPU for a message is what limits the rate.",
    ),
    (
        "latency",
        "Messages of 1 KiB are committed at a fixed rate for 60 s, each in a transaction of its own, on an open schedule: \
         nobody waits for anybody. Timed from the commit's return to the consumer that takes messages one by one, with one \
         clock.",
    ),
    (
        "backlog",
        "Messages of 200 bytes; the inner part of a drain, 100,000 messages, while so many wait. The relay is started anew \
         each time.",
    ),
    ("keys", "As *drain*, with as many keys."),
    (
        "producers",
        "8 connections (SQLite: one) commit one message of 1 KiB a transaction, as fast as they can, with and without a \
         relay on the same machine.",
    ),
    (
        "held",
        "A backlog of 4 million messages of 200 bytes (MySQL and MariaDB: 1 million) is drained for up to 60 s while a producer goes on committing, beside \
         a read-only snapshot that is held, beside a transaction that has enqueued and does not end, and behind 300,000 \
         messages of a parked key.",
    ),
    (
        "relays",
        "A backlog of 200,000 messages of 1 KiB, committed at once, is drained by several relays on one machine.",
    ),
];

/// PostgreSQL's.
const LIMITS: &str = "
### PostgreSQL: what limits it

Database, broker, producers, consumer and relay share the cores of one machine, and all of its cores are busy: a message's \
CPU on the whole machine, in the table of *drain*, times the rate is all there is. So the relay's rate is bounded by what \
database and broker spend, which the relay can only ask for in fewer and larger pieces.

- **drain**: at five times the rate of *batched*, two cores would have 17 µs for a message; database and broker alone spent \
  16, in the table of *drain*. Sampled on a slower machine at 38,000 messages/s (`perf record -a`), PostgreSQL had 43% of the \
  cores (reading 18, deleting 23), the relay 21, librdkafka in its process 10, the broker 18, and 3 were idle. A `DELETE` of \
  1,000 rows of 1 KiB alone, from `psql` and with nothing else running, took 7.3 µs a row there.
- **relay's CPU**: about a third is librdkafka's and the kernel's (a record's copy into a request, checksums, sockets), the rest \
  is decoding rows, building records and the settlement's arrays.
- **latency**: read, hand-over and settlement are each a round trip, and of a batch of a few messages each goes to another \
  partition in a request of its own, which the broker answers one after the other on a connection. In quiet moments the \
  relay has a message 1.5 ms after its commit and its acknowledgement 1 ms later (its own metrics, medians); the rest is \
  waiting for a core, which the share of busy cores shows: producers of 1,000 transactions a second take about as much as \
  relay, database and broker together. The collector of the broker's Java pauses it for 40 to 130 ms every 20 to 30 s.
- **time for a message, 10 M waiting beside 10 k**: 10,000 messages are hardly more than the 8,000 that a relay may have read and \
  not settled (`window_rows`): the most of them arrive before anything has to be deleted. With a window of 2,000 \
  (`--relay '{\"window_rows\": 2000}'`, 2 rounds) it is 0.98 ×: 76,800, 77,400 and 78,200 messages/s, and 4.6 to 5.3 µs of the \
  relay's CPU. Ten million cost 9% more time than one million in the table, and the relay as much CPU as at 10,000.
- **producers**: without a relay they keep 80% of the cores busy and wait for the disk in between. Whatever a relay, a broker \
  and a consumer spend is taken from them: sampled while a relay ran (`/proc`), in parts of one core, producers and their \
  sessions had 103%, the broker 27, the relay 20, its reading session 16 and its settling session 10. With reads only every \
  50 ms (`poll_busy`), at batches of 230, they kept 75 to 89%.
- **a snapshot or a writing transaction is held**: what has to be read stays the same. Sampled over the whole machine \
  (`perf record -a`), undisturbed and beside the snapshot: the database's walks through index and heap 12.1% and 8.9%, its \
  buffer lookups 5.0% and 6.2%, its reading and writing of files 5.8% and 13.7%: pages of deleted rows cannot be reused, and the \
  table grows out of the server's 256 MiB of buffers. And one window of 60 s differs from the next by more than the target \
  allows for: the undisturbed ones by 29%.
";

/// MySQL's.
const MYSQL_LIMITS: &str = "
### MySQL: what limits it

- **drain**: the server's own work. Sampled at 13,800 messages/s, with settlements of 1,000 rows (`perf record -a`), MySQL \
  had 60% of the cores (its sessions 41, the purge of deleted rows 16, the writing of pages 3), the relay and the benchmark 11, \
  librdkafka 5, the broker 9, and 11 were idle. By the server's own counts of another such drain (statement digests) a deleted row \
  took 46 µs, a read one 26 µs beside it, and a commit 13 ms, in which the binary log and the redo log wait for the disk: \
  settlements of 2,000 rows, as they are now, wait half as often.
";

/// MongoDB's.
const MONGO_LIMITS: &str = "
### MongoDB's protocol: what limits it

- **drain**: the server, which is no MongoDB: of the CPU that a message took on the whole machine, more than four fifths were \
  its own. The relay asks more of it than *batched* does: a batch is read in one snapshot, key by key, and settled in a \
  transaction with the leases. What MongoDB itself makes of that was not measured: no package registry has it.
";

pub(crate) fn text(results: &Results) -> String {
    let mut text = String::from(
        "# Performance\n\n\
         Made by `scripts/bench --report` of what `scripts/bench` measured; not written by hand. Figures are medians of \
         rounds, with their range, in which systems and cases take turns. Compare within one table only: another machine, \
         or this one tomorrow, gives others. The relay is a process of its own, and CPU and memory are its alone. Every \
         topic was read from its beginning; a round with a loss, a duplicate or an inversion would not count.\n\
         \n![Drain rates and latencies](performance.svg)\n\
         \n## What is measured\n\n",
    );
    for (workload, description) in WORKLOADS {
        put(&mut text, format_args!("- **{workload}**: {description}\n"));
    }
    for section in SECTIONS {
        let measured = results
            .findings
            .iter()
            .any(|finding| finding.store == section.store);
        if measured {
            write_section(&mut text, section, results);
        }
    }
    text.push_str("\n## Machines\n");
    for machine in &results.machines {
        text.push_str("\n| | |\n|---|---|\n");
        for (name, value) in machine.lines() {
            put(
                &mut text,
                format_args!("| {name} | {} |\n", value.replace('|', "\\|")),
            );
        }
        let mut measured: Vec<&str> = Vec::new();
        for finding in results
            .findings
            .iter()
            .filter(|finding| finding.run == machine.run)
        {
            if !measured.contains(&finding.workload.as_str()) {
                measured.push(&finding.workload);
            }
        }
        put(
            &mut text,
            format_args!("| measured | {} |\n", measured.join(", ")),
        );
    }
    text
}

fn write_section(text: &mut String, section: &Section, results: &Results) {
    put(text, format_args!("\n## {}\n", section.title));
    if !section.targets.is_empty() {
        write_targets(text, section, results);
    }
    text.push_str(section.limits);
    for (workload, _) in WORKLOADS {
        let of_both = |finding: &&Finding| finding.store == section.store && finding.workload == *workload;
        let found: Vec<&Finding> = results.findings.iter().filter(of_both).collect();
        if !found.is_empty() {
            write_workload(text, section, workload, &found);
        }
    }
}

fn write_targets(text: &mut String, section: &Section, results: &Results) {
    text.push_str("\n| target | wanted | found | |\n|---|---:|---:|---|\n");
    for target in section.targets {
        let Target {
            what,
            workload,
            case,
            metric,
            bound,
        } = target;
        let found = results.find(section.store, workload, "outbox", case, metric);
        let (sign, wanted) = match bound {
            Bound::AtLeast(wanted) => ("≥", *wanted),
            Bound::AtMost(wanted) => ("≤", *wanted),
        };
        let unit = found.map_or("", |found| found.unit.as_str());
        let verdict = found.map_or_else(
            || "not measured".to_owned(),
            |found| {
                let off = 100.0 * (found.median - wanted) / wanted;
                let met = if sign == "≥" { off >= 0.0 } else { off <= 0.0 };
                let direction = if off < 0.0 { "below" } else { "above" };
                format!(
                    "{}, {}% {direction}",
                    if met { "met" } else { "**missed**" },
                    figure(off.abs())
                )
            },
        );
        let shown = found.map_or(String::new(), |found| format!("{} {unit}", figure(found.median)));
        put(
            text,
            format_args!(
                "| {what} | {sign} {} {unit} | {shown} | {verdict} |\n",
                plain(wanted)
            ),
        );
    }
}

fn write_workload(text: &mut String, section: &Section, workload: &str, found: &[&Finding]) {
    put(text, format_args!("\n### {}: {workload}\n\n", section.title));
    text.push_str(
        "| system | case | metric | median | range | unit | rounds |\n|---|---|---|---:|---:|---|---:|\n",
    );
    for finding in found {
        let Finding {
            system,
            case,
            metric,
            median,
            unit,
            rounds,
            ..
        } = finding;
        put(
            text,
            format_args!(
                "| {system} | {case} | {metric} | {} | {} | {unit} | {rounds} |\n",
                figure(*median),
                finding.range()
            ),
        );
    }
}

/// A bound as it is said: `5`, `1.25`.
fn plain(value: f64) -> String {
    format!("{value}")
}

fn put(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = text.write_fmt(arguments);
}
