//! The pages: what is asked for, and what is answered.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response, StatusCode};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use outbox::{Health, Vitals};
use serde::Serialize;

use crate::exit::{Code, Failure, Result};

/// Buckets for what takes from under a millisecond to half a minute.
const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];
/// Buckets for how long messages wait: after an outage hours.
const LAG: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0,
];
/// Buckets for records handed over at once.
const RECORDS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1_000.0, 2_500.0, 10_000.0,
];

/// The loop goes round every ten seconds at least.
const LIVE_WITHIN: Duration = Duration::from_secs(30);

/// Records all metrics of this process from now on; so it comes before the relay.
pub(crate) fn record_metrics() -> Result<PrometheusHandle> {
    let recorded = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS)
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Full("outbox_lag_seconds".to_owned()), LAG)
        })
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_records".to_owned()), RECORDS))
        .and_then(PrometheusBuilder::install_recorder);
    let handle = recorded.map_err(|error| {
        Failure::new(Code::Unexpected, format!("record metrics: {error}")).because(&error)
    })?;
    outbox::metrics::describe();
    Ok(handle)
}

/// Answers requests from the metrics and the relay's health.
pub(crate) struct Pages {
    metrics: PrometheusHandle,
    health: Health,
    /// A lease that was not renewed for so long has run out.
    lease: Duration,
}

/// The health as JSON.
#[derive(Serialize)]
struct Report {
    ok: bool,
    /// Why not, for people.
    reasons: Vec<String>,
    stopping: bool,
    shards: usize,
    seconds_since_lease: Option<f64>,
    store_failure: Option<String>,
    /// What keeps everything from going through the sink: the relay is ready all the same, and waits.
    sink_failure: Option<String>,
}

impl Pages {
    pub(crate) const fn new(metrics: PrometheusHandle, health: Health, lease: Duration) -> Self {
        Self {
            metrics,
            health,
            lease,
        }
    }

    pub(super) fn fold(&self) {
        self.metrics.run_upkeep();
    }

    pub(super) fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        const TEXT: &str = "text/plain; charset=utf-8";
        if !matches!(*method, Method::GET | Method::HEAD) {
            let mut response = page(
                StatusCode::METHOD_NOT_ALLOWED,
                TEXT,
                "only GET and HEAD\n".to_owned(),
            );
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match path {
            // The version of the format is part of its media type.
            "/metrics" => page(
                StatusCode::OK,
                "text/plain; version=0.0.4; charset=utf-8",
                self.metrics.render(),
            ),
            "/health/live" => health(dead(&self.health.vitals()), self.health.vitals()),
            "/health/ready" => {
                let vitals = self.health.vitals();
                health(unready(&vitals, self.lease), vitals)
            }
            _ => page(
                StatusCode::NOT_FOUND,
                TEXT,
                "there are /metrics, /health/live and /health/ready\n".to_owned(),
            ),
        }
    }
}

/// Why the process had better be started again.
fn dead(vitals: &Vitals) -> Vec<String> {
    match vitals.turned_ago {
        Some(ago) if ago > LIVE_WITHIN => {
            vec![format!("the relay's loop has stood still for {}", seconds(ago))]
        }
        _ => Vec::new(),
    }
}

/// Why the relay does not do its work.
fn unready(vitals: &Vitals, lease: Duration) -> Vec<String> {
    let mut reasons = dead(vitals);
    if vitals.stopping {
        reasons.push("the relay is stopping".to_owned());
    }
    match vitals.leased_ago {
        None => reasons.push("the relay has not been given a lease yet".to_owned()),
        Some(ago) if ago > lease => reasons.push(format!("the last lease was given {} ago", seconds(ago))),
        Some(_) => {}
    }
    if let Some(failure) = &vitals.store_failure {
        reasons.push(format!("the store fails: {failure}"));
    }
    reasons
}

fn seconds(duration: Duration) -> String {
    outbox::human::short(duration)
}

fn health(reasons: Vec<String>, vitals: Vitals) -> Response<Full<Bytes>> {
    let status = match reasons.is_empty() {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let report = Report {
        ok: reasons.is_empty(),
        reasons,
        stopping: vitals.stopping,
        shards: vitals.shards,
        seconds_since_lease: vitals.leased_ago.map(|ago| ago.as_secs_f64()),
        store_failure: vitals.store_failure,
        sink_failure: vitals.sink_failure,
    };
    // A report of plain fields can always be written.
    let body = serde_json::to_string(&report).unwrap_or_default();
    page(status, "application/json", body + "\n")
}

fn page(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn well() -> Vitals {
        Vitals {
            turned_ago: Some(SECOND),
            leased_ago: Some(3 * SECOND),
            ..Vitals::default()
        }
    }

    #[test]
    fn a_relay_that_leases_is_ready_whatever_its_sink_does() {
        let vitals = Vitals {
            sink_failure: Some("no broker".to_owned()),
            ..well()
        };
        assert_eq!(unready(&vitals, 10 * SECOND), Vec::<String>::new());
        assert_eq!(dead(&vitals), Vec::<String>::new());
    }

    #[test]
    fn each_reason_is_told() {
        for (vitals, expected) in [
            (Vitals::default(), "the relay has not been given a lease yet"),
            (
                Vitals {
                    leased_ago: Some(11 * SECOND),
                    ..well()
                },
                "the last lease was given 11.0s ago",
            ),
            (
                Vitals {
                    stopping: true,
                    ..well()
                },
                "the relay is stopping",
            ),
            (
                Vitals {
                    store_failure: Some("fetch: no".to_owned()),
                    ..well()
                },
                "the store fails: fetch: no",
            ),
            (
                Vitals {
                    turned_ago: Some(31 * SECOND),
                    ..well()
                },
                "the relay's loop has stood still for 31.0s",
            ),
        ] {
            assert_eq!(unready(&vitals, 10 * SECOND), [expected]);
        }
    }
}
