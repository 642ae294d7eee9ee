//! `outbox relay --listen`: metrics and health of the real program.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use common::{Place, Running, STDOUT, eventually};
use serde_json::Value;

/// A relay that serves, and where.
struct Served {
    relay: Running,
    address: String,
    /// Reads the log on, so that the relay never waits for a reader.
    _log: std::thread::JoinHandle<()>,
}

/// What a page answered.
#[derive(Debug)]
struct Page {
    status: u16,
    head: String,
    body: String,
}

/// Starts a relay that listens on a port of the system's choice, and waits until it says which.
fn serve(place: &Place, arguments: &[&str]) -> Served {
    let out = std::fs::File::create(place.path("out")).unwrap();
    let mut relay = place.start(&[&["relay"], arguments].concat(), out);
    let log = BufReader::new(relay.child().stderr.take().unwrap());
    let (said, hear) = mpsc::channel();
    let log = std::thread::spawn(move || {
        for line in log.lines() {
            if let Some((_, rest)) = line.unwrap().split_once("address=") {
                let _ = said.send(rest.split_whitespace().next().unwrap().to_owned());
            }
        }
    });
    let address = hear.recv_timeout(Duration::from_secs(30)).unwrap();
    Served {
        relay,
        address,
        _log: log,
    }
}

impl Served {
    fn ask(&self, request: &str) -> Page {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        // It may be refused before all of it was sent.
        let _ = stream.write_all(request.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        Page {
            status: head
                .split(' ')
                .nth(1)
                .and_then(|status| status.parse().ok())
                .unwrap_or(0),
            head: head.to_ascii_lowercase(),
            body: body.to_owned(),
        }
    }

    fn get(&self, path: &str) -> Page {
        self.ask(&format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"))
    }

    fn health(&self, path: &str) -> (u16, Value) {
        let page = self.get(path);
        assert!(page.head.contains("content-type: application/json"), "{page:?}");
        (page.status, serde_json::from_str(&page.body).unwrap())
    }

    /// A metric's value, or none: the sum of all lines of this name.
    fn metric(&self, name: &str) -> Option<f64> {
        let page = self.get("/metrics");
        let values = page
            .body
            .lines()
            .filter(|line| {
                line.strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with(['{', ' ']))
            })
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap());
        values.reduce(|sum, value| sum + value)
    }
}

#[test]
fn metrics_tell_what_flows_and_nothing_of_what_is_in_it() {
    let place = Place::migrated(STDOUT);
    let served = serve(&place, &["--listen", "0"]);
    assert!(served.address.starts_with("127.0.0.1:"), "{}", served.address);
    for payload in ["canary-1", "canary-2", "canary-3"] {
        place.execute(
            "INSERT INTO outbox (topic, key, payload) VALUES ('t', 'canary-key', ?1)",
            [payload],
        );
    }
    eventually("three are delivered and settled", || {
        served.metric("outbox_outcomes_total") == Some(3.0)
            && served.metric("outbox_settle_seconds_count") > Some(0.0)
            && served.metric("outbox_backlog").is_some()
    });

    let page = served.get("/metrics");
    assert_eq!(page.status, 200);
    assert!(
        page.head.contains("content-type: text/plain; version=0.0.4"),
        "{}",
        page.head
    );
    assert!(!page.body.contains("canary"), "{}", page.body);
    for (name, kind) in [
        ("outbox_outcomes_total", "counter"),
        ("outbox_dead_letters_total", "counter"),
        ("outbox_backlog", "gauge"),
        ("outbox_shards_owned", "gauge"),
        ("outbox_sink_up", "gauge"),
        ("outbox_batch_records", "histogram"),
        ("outbox_lag_seconds", "histogram"),
        ("outbox_publish_seconds", "histogram"),
    ] {
        assert!(
            page.body.contains(&format!("# TYPE {name} {kind}\n")),
            "{name}: {}",
            page.body
        );
        assert!(
            page.body.contains(&format!("# HELP {name} ")),
            "{name}: {}",
            page.body
        );
    }
    for bucket in [r#"outbox_lag_seconds_bucket{"#, r#"le="7200"}"#, r#"le="+Inf"}"#] {
        assert!(page.body.contains(bucket), "{bucket}: {}", page.body);
    }
    let unsaid: Vec<_> = page
        .body
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .filter(|line| {
            let name = line.split(['{', ' ']).next().unwrap();
            let name = ["_bucket", "_sum", "_count"]
                .iter()
                .fold(name, |name, end| name.strip_suffix(end).unwrap_or(name));
            !page.body.contains(&format!("# HELP {name} "))
        })
        .collect();
    assert!(unsaid.is_empty(), "metrics without a description: {unsaid:?}");
}

#[test]
fn health_follows_the_relay() {
    let place = Place::migrated(&format!(
        "{STDOUT}[relay]\nlease = '500ms'\nlisten = 0\ncall_timeout = '200ms'\n"
    ));
    let mut served = serve(&place, &[]);
    eventually("it is ready", || served.health("/health/ready").0 == 200);
    let (_, ready) = served.health("/health/ready");
    assert_eq!(
        (&ready["ok"], &ready["shards"]),
        (&true.into(), &1.into()),
        "{ready}"
    );

    // Another relay's database, as far as this one can see: its tables are gone.
    place.execute("ALTER TABLE outbox_lease RENAME TO outbox_lease_away", []);
    eventually("it is not ready without its store", || {
        served.health("/health/ready").0 == 503
    });
    let (_, why) = served.health("/health/ready");
    assert!(
        why["reasons"][0]
            .as_str()
            .is_some_and(|reason| !reason.is_empty()),
        "{why}"
    );
    assert_eq!(
        served.health("/health/live").0,
        200,
        "nothing is gained by starting it again"
    );
    place.execute("ALTER TABLE outbox_lease_away RENAME TO outbox_lease", []);
    eventually("it is ready again", || served.health("/health/ready").0 == 200);

    served.relay.signal("TERM");
    let address = served.address.clone();
    assert_eq!(served.relay.wait().code, Some(0));
    assert!(
        TcpStream::connect(address).is_err(),
        "nothing is served when the relay has ended"
    );
}

#[test]
#[cfg(target_os = "linux")]
fn a_sink_that_is_out_is_told_and_no_reason_to_be_unready() {
    let place = Place::migrated(&format!("{STDOUT}[relay]\nlisten = 0\n"));
    place.enqueue(1, 1);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut relay = place.start(&["relay"], full);
    let mut log = BufReader::new(relay.child().stderr.take().unwrap()).lines();
    let address = log.find_map(|line| {
        let line = line.unwrap();
        line.split_once("address=")
            .map(|(_, rest)| rest.split_whitespace().next().unwrap().to_owned())
    });
    let served = Served {
        relay,
        address: address.unwrap(),
        _log: std::thread::spawn(move || log.for_each(drop)),
    };
    eventually("the sink's failure is told", || {
        let (status, health) = served.health("/health/ready");
        status == 200
            && health["sink_failure"]
                .as_str()
                .is_some_and(|why| why.contains("No space left"))
    });
    assert_eq!(served.metric("outbox_sink_up"), Some(0.0));
}

#[test]
fn only_what_is_meant_is_answered() {
    let place = Place::migrated(STDOUT);
    let served = serve(&place, &["--listen", "127.0.0.1:0"]);
    assert_eq!(served.get("/").status, 404);
    assert_eq!(served.get("/metrics/../secrets").status, 404);
    let head = served.ask("HEAD /metrics HTTP/1.1\r\nhost: test\r\n\r\n");
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let page = served.ask(&format!(
            "{method} /metrics HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n"
        ));
        assert_eq!(page.status, 405, "{method}: {page:?}");
        assert!(page.head.contains("allow: get, head"), "{page:?}");
    }
    let many: String = (0..100).map(|number| format!("x-{number}: y\r\n")).collect();
    let long = format!("x: {}\r\n", "y".repeat(64 * 1024));
    for headers in [many, long] {
        let page = served.ask(&format!("GET /metrics HTTP/1.1\r\n{headers}\r\n"));
        assert_ne!(page.status, 200, "{page:?}");
    }
    assert_eq!(
        served.get("/health/live").status,
        200,
        "none of that harms anyone else"
    );
    // Whoever connects and says nothing keeps nobody else waiting.
    let _silent: Vec<_> = (0..8)
        .map(|_| TcpStream::connect(&served.address).unwrap())
        .collect();
    assert_eq!(served.get("/health/live").status, 200);
}

#[test]
fn nothing_listens_unless_it_is_asked_to_and_only_where_it_may() {
    let place = Place::migrated(STDOUT);
    for arguments in [
        &["--listen", "0.0.0.0:0"][..],
        &["--listen", "[::]:0"],
        &["--listen", "192.0.2.1:0"],
        &["--listen", "somewhere"],
        &["--listen", "192.0.2.1:0", "--listen-public"],
        &["--listen-public", "--drain"],
    ] {
        let run = place.run(&[&["relay"], arguments].concat());
        assert_eq!(run.code, Some(2), "{arguments:?}: {run:?}");
        assert!(
            run.stderr.contains("outbox: listen") && run.stderr.contains("hint: "),
            "{run:?}"
        );
    }
    let mut command = place.command(&["relay", "--drain", "--listen-public"]);
    command.env("OUTBOX_RELAY__LISTEN", "127.0.0.1:0");
    assert_eq!(common::finish(command).code, Some(0), "the file may say where");
    let mut command = place.command(&["relay", "--drain"]);
    command.env("OUTBOX_RELAY__LISTEN", "0.0.0.0:0");
    assert_eq!(common::finish(command).code, Some(2));
    let run = place.run(&["relay", "--drain"]);
    assert!(!run.stderr.contains("listening"), "{run:?}");
}

#[test]
fn a_port_in_use_is_3_and_says_so() {
    let place = Place::migrated(STDOUT);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut command = place.command(&["relay", "--listen", &address]);
    command.stdout(Stdio::null());
    let run = common::finish(command);
    assert_eq!(run.code, Some(3), "{run:?}");
    assert!(
        run.stderr.contains(&format!("outbox: listen on {address}: "))
            && run.stderr.contains("hint: another program"),
        "{run:?}"
    );
    assert!(
        place.json(&["status", "--json"])["leases"][0]["owner"].is_null(),
        "no relay ran"
    );
}
