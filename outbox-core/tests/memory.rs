//! What the store and the sink in memory promise beyond the conformance suites.

#![expect(clippy::unwrap_used, reason = "the helpers of tests may fail them")]

use std::time::Duration;

use outbox_core::{
    ErrorKind, Inbox, MemoryConfig, MemoryFault, MemoryInbox, MemorySink, MemoryStore, Message, MessageId,
    Ordering, OutboxStore, Outcome, Position, Receive, Record, Shard, Sink,
};

fn message(key: Option<&str>, payload: &str) -> Message {
    let builder = Message::builder("t").payload(payload.to_owned());
    match key {
        Some(key) => builder.key(key.to_owned()).build().unwrap(),
        None => builder.build().unwrap(),
    }
}

fn record(key: &str, payload: &str) -> Record {
    Record {
        shard: Shard(0),
        position: Position(0),
        key_seq: None,
        attempts: 0,
        message: message(Some(key), payload),
        defect: None,
    }
}

fn payloads(records: &[Record]) -> Vec<String> {
    records
        .iter()
        .map(|record| String::from_utf8_lossy(record.message.payload().unwrap()).into_owned())
        .collect()
}

fn sequenced() -> MemoryStore {
    MemoryStore::new(MemoryConfig {
        ordering: Ordering::Sequenced,
        ..MemoryConfig::default()
    })
}

#[tokio::test(start_paused = true)]
async fn sequenced_producers_of_one_key_wait_for_each_other() {
    let store = sequenced();
    let mut first = store.begin();
    store.enqueue(&mut first, &message(Some("k"), "1")).await.unwrap();
    let second = async {
        let mut second = store.begin();
        store
            .enqueue(&mut second, &message(Some("k"), "2"))
            .await
            .unwrap();
        second.commit();
    };
    let first = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(store.pending().is_empty());
        first.commit();
    };
    tokio::join!(second, first);
    let pending = store.pending();
    assert_eq!(payloads(&pending), ["1", "2"]);
    assert_eq!(
        pending.iter().map(|row| row.key_seq).collect::<Vec<_>>(),
        [Some(1), Some(2)]
    );
}

#[tokio::test(start_paused = true)]
async fn a_deadlock_of_producers_ends_as_a_conflict() {
    let store = sequenced();
    let (mut one, mut two) = (store.begin(), store.begin());
    store.enqueue(&mut one, &message(Some("a"), "")).await.unwrap();
    store.enqueue(&mut two, &message(Some("b"), "")).await.unwrap();
    let error = async {
        let error = store
            .enqueue(&mut one, &message(Some("b"), ""))
            .await
            .unwrap_err();
        one.rollback();
        error
    };
    let waiting = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        store.enqueue(&mut two, &message(Some("a"), "")).await
    };
    let (error, waited) = tokio::join!(error, waiting);
    assert_eq!(error.kind(), ErrorKind::Conflict);
    waited.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_inbox_lets_one_of_two_copies_through() {
    let (store, inbox, id) = (MemoryStore::default(), MemoryInbox, MessageId::new());
    let mut first = store.begin();
    assert_eq!(inbox.receive(&mut first, "c", id).await.unwrap(), Receive::Fresh);
    assert_eq!(
        inbox.receive(&mut first, "c", id).await.unwrap(),
        Receive::Duplicate
    );
    assert_eq!(
        inbox.receive(&mut first, "other", id).await.unwrap(),
        Receive::Fresh
    );
    let second = async {
        let mut second = store.begin();
        inbox.receive(&mut second, "c", id).await.unwrap()
    };
    let commit = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        first.commit();
    };
    assert_eq!(tokio::join!(second, commit).0, Receive::Duplicate);

    let mut third = store.begin();
    let day = Duration::from_secs(24 * 60 * 60);
    assert_eq!(
        inbox
            .purge(&mut third, Duration::ZERO, 10)
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::Invalid
    );
    assert_eq!(inbox.purge(&mut third, day, 10).await.unwrap(), 0);
    tokio::time::advance(day * 2).await;
    assert_eq!(inbox.purge(&mut third, day, 10).await.unwrap(), 2);
    assert_eq!(inbox.receive(&mut third, "c", id).await.unwrap(), Receive::Fresh);
}

#[tokio::test(start_paused = true)]
async fn a_rolled_back_copy_does_not_count_as_handled() {
    let (store, inbox, id) = (MemoryStore::default(), MemoryInbox, MessageId::new());
    let mut first = store.begin();
    assert_eq!(inbox.receive(&mut first, "c", id).await.unwrap(), Receive::Fresh);
    first.rollback();
    let mut second = store.begin();
    assert_eq!(inbox.receive(&mut second, "c", id).await.unwrap(), Receive::Fresh);
}

#[tokio::test(start_paused = true)]
async fn a_commit_wakes() {
    let store = MemoryStore::default();
    let mut wake_up = store.wake_up().unwrap();
    let mut tx = store.begin();
    store.enqueue(&mut tx, &message(None, "")).await.unwrap();
    let second = Duration::from_secs(1);
    assert!(tokio::time::timeout(second, wake_up.wait()).await.is_err());
    tx.commit();
    tokio::time::timeout(second, wake_up.wait()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_sink_fails_as_it_is_told() {
    let shared = MemorySink::new();
    let mut sink = shared.clone();
    shared.fail(MemoryFault::new(Outcome::Retry("later".into())).key("a").times(1));
    let receipt = sink
        .publish(vec![record("a", "1"), record("a", "2"), record("b", "1")])
        .await;
    // Handed over before the failure could be known: it must not overtake.
    let next = sink.publish(vec![record("a", "3"), record("b", "2")]).await;
    assert_eq!(
        receipt.outcomes().await,
        [
            Outcome::Retry("later".into()),
            Outcome::Skipped,
            Outcome::Delivered
        ]
    );
    assert_eq!(next.outcomes().await, [Outcome::Skipped, Outcome::Delivered]);
    let again = sink
        .publish(vec![record("a", "1"), record("a", "2"), record("a", "3")])
        .await;
    assert_eq!(again.outcomes().await, [const { Outcome::Delivered }; 3]);
    assert_eq!(payloads(&shared.delivered()), ["1", "2", "1", "2", "3"]);
}

#[tokio::test(start_paused = true)]
async fn an_outage_ends_with_a_purge_and_a_broken_sink_with_a_rebuild() {
    let shared = MemorySink::new();
    let mut sink = shared.clone();
    shared.begin_outage("nobody home");
    assert!(sink.probe().await.is_err());
    let receipt = sink.publish(vec![record("a", "1")]).await;
    assert_eq!(receipt.outcomes().await, [Outcome::Outage("nobody home".into())]);
    shared.end_outage();
    let receipt = sink.publish(vec![record("a", "2")]).await;
    assert_eq!(receipt.outcomes().await, [Outcome::Skipped]);
    sink.purge().await;
    shared.fail_next(Outcome::Broken("fatal".into()));
    let receipt = sink.publish(vec![record("a", "1"), record("b", "1")]).await;
    assert_eq!(receipt.outcomes().await, vec![Outcome::Broken("fatal".into()); 2]);
    assert!(sink.probe().await.is_err());
    sink.rebuild().await.unwrap();
    sink.probe().await.unwrap();
    let receipt = sink.publish(vec![record("a", "1")]).await;
    assert_eq!(receipt.outcomes().await, [Outcome::Delivered]);
}

#[tokio::test(start_paused = true)]
async fn latency_and_capacity_hold_the_publisher_back() {
    let shared = MemorySink::new();
    let mut sink = shared.clone();
    shared.set_latency(Duration::from_millis(100));
    shared.set_capacity(1);
    let started = tokio::time::Instant::now();
    let first = sink.publish(vec![record("a", "1")]).await;
    assert_eq!(started.elapsed(), Duration::ZERO);
    assert!(shared.delivered().is_empty());
    let second = sink.publish(vec![record("a", "2")]).await;
    assert_eq!(started.elapsed(), Duration::from_millis(100));
    assert_eq!(shared.wait_for(2).await.len(), 2);
    assert_eq!(started.elapsed(), Duration::from_millis(200));
    assert_eq!(first.outcomes().await, [Outcome::Delivered]);
    assert_eq!(second.outcomes().await, [Outcome::Delivered]);

    let third = sink.publish(vec![record("a", "3")]).await;
    sink.purge().await;
    assert_eq!(
        third.outcomes().await,
        [Outcome::Unknown("purged before it left".into())]
    );
    assert_eq!(shared.delivered().len(), 2);
}
