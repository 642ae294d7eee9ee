//! What the tests of a store in trouble have in common, whatever the server.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use outbox_core::{Backoff, Hold, HoldScope, HoldState, LeaseRequest, Record, RelayConfig, RelayId};

/// `host:port` of a URL.
pub(crate) fn address(url: &str) -> &str {
    url.split_once('@').unwrap().1.split_once('/').unwrap().0
}

/// More shards than there are, for a minute.
pub(crate) fn lease_request(relay: &str) -> LeaseRequest {
    LeaseRequest {
        relay: RelayId::new(relay),
        want: 64,
        ttl: Duration::from_secs(60),
    }
}

/// A parked hold of the record's key.
pub(crate) fn hold(record: &Record) -> Hold {
    Hold {
        shard: record.shard,
        scope: HoldScope::Key(record.message.order_key().unwrap()),
        head: record.reference(),
        attempts: 1,
        state: HoldState::Parked,
        reason: "no".into(),
    }
}

/// Polls a future so often, lets a little time pass, and drops it where it stands.
pub(crate) async fn dropped_after<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    let output = poll_fn(|context| {
        left = left.saturating_sub(1);
        match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
    if output.is_none() {
        // The answer may be on its way, or here and unread.
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..80))).await;
    }
    output
}

/// How many keys producers write, and how many messages of each.
pub(crate) const KEYS: usize = 10;
pub(crate) const EACH: usize = 100;

/// The next number of each key must come first; what comes again was sent before.
pub(crate) fn assert_in_order(delivered: &[Record], keys: usize, each: usize) {
    let mut next: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
    for record in delivered {
        let key = record.message.key().unwrap().to_vec();
        let text = String::from_utf8(record.message.payload().unwrap().to_vec()).unwrap();
        let (number, expected) = (text.parse::<usize>().unwrap(), next.entry(key).or_default());
        assert!(number <= *expected, "{number} before {expected}");
        *expected = (*expected).max(number + 1);
    }
    assert_eq!(next.into_values().collect::<Vec<_>>(), vec![each; keys]);
}

/// A relay that asks again after so long at most.
pub(crate) fn asking_again(pause: Duration) -> RelayConfig {
    RelayConfig {
        outage_retry: Backoff {
            max: pause,
            ..RelayConfig::default().outage_retry
        },
        ..RelayConfig::default()
    }
}
