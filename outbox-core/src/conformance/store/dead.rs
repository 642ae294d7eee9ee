//! Dead letters: kept whole, listed, put back once.

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, Relay, sorted, texts};
use crate::dead::{DeadLetter, DeadLetterQuery, DeadLetters};
use crate::error::ErrorKind;
use crate::fetch::{Record, RecordRef};
use crate::hold::HoldState;
use crate::message::{Message, MessageId};
use crate::shard::Position;
use crate::store::OutboxStore;

/// A message that is given up leaves the outbox and is kept whole, with attempts and reason.
pub async fn dead_letter_keeps_whole<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let messages = rich_messages(&bench);
    bench.commit(&messages).await;
    let records = owner.drain_without_settling().await;
    bury(&mut owner, &records, 3, "it is 'poison'\nü").await;
    owner.reader = owner.store.reader().await.unwrap();
    assert!(
        owner.next(10).await.is_empty(),
        "a dead message must leave the outbox"
    );
    let letters = list(&*owner.store, &DeadLetterQuery::default()).await;
    assert_eq!(
        letters.len(),
        records.len(),
        "each death must become a dead letter"
    );
    for record in &records {
        let letter = letters.iter().find(|letter| letter.record == record.reference());
        let letter = letter.unwrap_or_else(|| panic!("no dead letter has the name {:?}", record.reference()));
        assert_eq!(letter.attempts, 3, "the attempts are kept as they are");
        assert_eq!(letter.reason, "it is 'poison'\nü", "the reason is kept");
        assert_eq!(
            letter.key_seq, record.key_seq,
            "its number within the key is kept"
        );
        expect_same(&letter.message, &record.message);
    }
}

/// A page of dead letters begins after the last one of the page before; the order is (position, id).
pub async fn dead_letter_list_pages<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 7)).await;
    let records = owner.drain_without_settling().await;
    bury(&mut owner, &records, 1, "poison").await;
    let mut pages = Vec::new();
    let mut query = DeadLetterQuery {
        limit: 3,
        ..DeadLetterQuery::default()
    };
    loop {
        let page = list(&*owner.store, &query).await;
        assert!(page.len() <= 3, "a page has at most `limit` dead letters");
        let Some(last) = page.last() else { break };
        query.after = Some(last.record);
        pages.extend(page);
        assert!(pages.len() <= 7, "a page must begin after the one that was named");
    }
    let mut expected: Vec<RecordRef> = records.iter().map(Record::reference).collect();
    expected.sort_unstable();
    assert_eq!(
        pages.iter().map(|letter| letter.record).collect::<Vec<_>>(),
        expected,
        "the pages together must be everything, in order of position and id"
    );
}

/// Dead letters can be listed by their ids, page by page like all others.
pub async fn dead_letter_list_by_id<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 6)).await;
    let records = owner.drain_without_settling().await;
    bury(&mut owner, &records, 1, "poison").await;
    let names = |records: &[Record]| records.iter().map(Record::reference).collect::<Vec<_>>();
    let of = async |ids: Vec<MessageId>, after, limit| {
        let query = DeadLetterQuery {
            topic: Some(bench.topic(0)),
            ids: Some(ids),
            after,
            limit,
        };
        let letters = list(&*owner.store, &query).await;
        letters.iter().map(|letter| letter.record).collect::<Vec<_>>()
    };
    let ids = |records: &[Record]| {
        records
            .iter()
            .map(|record| record.message.id())
            .collect::<Vec<_>>()
    };
    let mut wanted = ids(&records[1..4]);
    wanted.push(MessageId::new());
    assert_eq!(
        of(wanted.clone(), None, 100).await,
        names(&records[1..4]),
        "those that were asked for, and no others"
    );
    let first = of(wanted.clone(), None, 2).await;
    assert_eq!(first, names(&records[1..3]), "the limit holds");
    assert_eq!(
        of(wanted, first.last().copied(), 2).await,
        names(&records[3..4]),
        "so do pages"
    );
    assert_eq!(of(Vec::new(), None, 100).await, [], "no ids are none, not all");
}

/// Dead letters can be listed by topic.
pub async fn dead_letter_list_by_topic<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench
        .commit(&[
            bench.message(0, None, "a"),
            bench.message(1, None, "b"),
            bench.message(0, None, "c"),
        ])
        .await;
    let records = owner.drain_without_settling().await;
    bury(&mut owner, &records, 1, "poison").await;
    let query = DeadLetterQuery {
        topic: Some(bench.topic(0)),
        ..DeadLetterQuery::default()
    };
    assert_eq!(
        list(&*owner.store, &query).await.len(),
        2,
        "only the topic that was asked for"
    );
}

/// Of concurrent requeues of one dead letter exactly one counts it, and it comes once.
pub async fn dead_letter_requeue_once<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let messages: Vec<_> = (0..5).map(|number| bench.keyless(&format!("{number}"))).collect();
    bench.commit(&messages).await;
    let records = owner.drain_without_settling().await;
    bury(&mut owner, &records, 1, "poison").await;
    let names: Vec<_> = records.iter().map(Record::reference).collect();
    let handles: Vec<_> = (0..6).map(|_| bench.harness.store()).collect();
    let counts = futures::future::join_all(handles.iter().map(|handle| async {
        loop {
            match dead(&**handle).requeue(&names).await {
                Ok(count) => return count,
                Err(error) => assert!(
                    error.is_retryable(),
                    "a race must end as a conflict, not as {error:?}"
                ),
            }
        }
    }))
    .await;
    assert_eq!(
        counts.iter().sum::<usize>(),
        5,
        "of concurrent requeues exactly one must count each dead letter: {counts:?}"
    );
    assert_eq!(
        sorted(&owner.drain().await),
        ["0", "1", "2", "3", "4"],
        "each requeued message must come exactly once: take it out and put it back in one transaction"
    );
    assert_eq!(
        dead(&*owner.store).requeue(&names).await.unwrap(),
        0,
        "they are no longer there"
    );
}

/// A requeued message is whole, behind all others, and starts with no attempts.
pub async fn dead_letter_requeue_whole<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&rich_messages(&bench)).await;
    let before = owner.drain_without_settling().await;
    bury(&mut owner, &before, 2, "poison").await;
    bench.commit(&[bench.keyed("a", "later")]).await;
    let later = owner.next(10).await.swap_remove(0);
    let names: Vec<_> = before.iter().map(Record::reference).collect();
    assert_eq!(
        dead(&*owner.store).requeue(&names).await.unwrap(),
        before.len(),
        "a requeue must count what it moved"
    );
    assert!(
        list(&*owner.store, &DeadLetterQuery::default()).await.is_empty(),
        "a requeued message is no dead letter any more"
    );
    let after = owner.drain_without_settling().await;
    assert_eq!(after.len(), before.len());
    for record in &after {
        assert!(
            record.position > later.position,
            "a requeued message must stand behind all others"
        );
        let same = before.iter().find(|old| {
            old.message.payload() == record.message.payload() && old.message.key() == record.message.key()
        });
        let same = same.unwrap_or_else(|| panic!("a requeued message must keep key and payload: {record:?}"));
        expect_same(&record.message, &same.message);
        assert_eq!(
            record.shard, same.shard,
            "the shard is that of the key, or of the id"
        );
    }
    // They can be settled like all others.
    owner.deliver(&after).await;
    owner.deliver(&[later]).await;
    owner.reader = owner.store.reader().await.unwrap();
    assert!(owner.next(10).await.is_empty());
}

/// A discarded dead letter is gone for good, and counted once.
pub async fn dead_letter_discard<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.keyless("1"), bench.keyless("2")]).await;
    let records = owner.drain_without_settling().await;
    bury(&mut owner, &records, 1, "poison").await;
    let first = [records[0].reference()];
    assert_eq!(dead(&*owner.store).discard(&first).await.unwrap(), 1);
    assert_eq!(
        dead(&*owner.store).discard(&first).await.unwrap(),
        0,
        "it was discarded before"
    );
    assert_eq!(
        dead(&*owner.store).requeue(&first).await.unwrap(),
        0,
        "it was discarded"
    );
    let stranger = RecordRef {
        position: Position(records[1].position.0),
        id: MessageId::new(),
    };
    assert_eq!(
        dead(&*owner.store).discard(&[stranger]).await.unwrap(),
        0,
        "a dead letter is named by position and id"
    );
    let left = list(&*owner.store, &DeadLetterQuery::default()).await;
    assert_eq!(left.len(), 1, "only what was named may be discarded");
    assert!(owner.next(10).await.is_empty());
}

/// After its last attempt a message is in the dead letters, and its key goes on: nothing is stranded.
pub async fn nothing_is_stranded<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 3)).await;
    let head = owner.next(1).await.swap_remove(0);
    let mut attempts = 0;
    let note = loop {
        attempts += 1;
        let note = super::super::kit::hold(
            &head,
            attempts,
            HoldState::Retrying {
                due_in: std::time::Duration::ZERO,
            },
        );
        owner.settle(owner.plan().put(note.clone())).await;
        if attempts == 5 {
            break note;
        }
    };
    owner
        .settle(
            owner
                .plan()
                .dead(&head, attempts, "attempts used up")
                .clear(note.reference()),
        )
        .await;
    assert!(owner.holds().await.is_empty(), "the hold goes with its head");
    let letters = list(&*owner.store, &DeadLetterQuery::default()).await;
    assert_eq!(
        letters
            .iter()
            .map(|letter| (letter.record, letter.attempts))
            .collect::<Vec<_>>(),
        [(head.reference(), 5)],
        "a message whose attempts are used up must be in the dead letters, where it can be found"
    );
    owner.in_flight.clear();
    owner.reader = owner.store.reader().await.unwrap();
    assert_eq!(
        texts(&owner.drain().await).len(),
        2,
        "the rest of the key must go on"
    );
    let stats = owner.store.stats().await.unwrap();
    assert_eq!(
        (stats.backlog.value(), stats.dead),
        (0, 1),
        "every message is somewhere"
    );
}

/// Two messages with one id can both die.
pub async fn dead_letters_may_share_an_id<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let message = bench.keyless("twin");
    bench.commit(&[message.clone(), message]).await;
    let records = owner.drain_without_settling().await;
    assert_eq!(records.len(), 2, "an id need not be unique");
    bury(&mut owner, &records, 1, "poison").await;
    assert_eq!(
        list(&*owner.store, &DeadLetterQuery::default()).await.len(),
        2,
        "a dead letter is named by position and id: one must not overwrite the other"
    );
}

/// A store without dead letters refuses a settlement with deaths, and changes nothing.
pub async fn deaths_are_refused_without_dead_letters<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&[bench.keyless("1"), bench.keyless("2")]).await;
    let records = owner.drain_without_settling().await;
    let plan = owner.plan().delivered(&records[0]).dead(&records[1], 1, "poison");
    match owner.store.settle(&plan.settlement()).await {
        Ok(_) => panic!(
            "the store says that it keeps no dead letters, and took a death: the message would be lost"
        ),
        Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}"),
    }
    owner.in_flight.clear();
    owner.reader = owner.store.reader().await.unwrap();
    assert_eq!(
        sorted(&owner.drain().await),
        ["1", "2"],
        "a refused settlement must change nothing"
    );
}

/// Messages of all kinds that the store can hold.
pub(super) fn rich_messages<H: StoreHarness>(bench: &Bench<H>) -> Vec<Message> {
    let rich = |key: Option<&'static str>, payload: Option<&'static str>| {
        let mut builder = Message::builder(bench.topic(0));
        if let Some(key) = key.filter(|_| bench.can.keys) {
            builder = builder.key(key);
        }
        if let Some(payload) = payload {
            builder = builder.payload(payload);
        }
        if bench.can.headers {
            builder = builder
                .header(
                    "traceparent",
                    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                )
                .header("twice", "1")
                .header("twice", "2");
        }
        if bench.can.content_types {
            builder = builder.content_type("application/json");
        }
        bench.build(builder)
    };
    let mut messages = vec![
        rich(Some("a"), Some("{\"n\":1}")),
        rich(Some(""), Some("{\"n\":2}")),
        rich(None, Some("{\"n\":3}")),
    ];
    if bench.can.tombstones {
        messages.push(rich(Some("a"), None));
    }
    if bench.can.tombstones && bench.can.any_bytes {
        messages.push(rich(Some("a"), Some("")));
    }
    messages
}

/// Two messages are the same but for their times.
pub(super) fn expect_same(found: &Message, expected: &Message) {
    let stripped = |message: &Message| {
        let mut parts = message.clone().into_parts();
        parts.created_at = None;
        parts.deliver_at = None;
        Message::from_stored(parts)
    };
    assert_eq!(
        found.key(),
        expected.key(),
        "the key must be kept, and none is not an empty one"
    );
    assert_eq!(
        found.payload(),
        expected.payload(),
        "the payload must be kept, and none is not an empty one"
    );
    assert!(
        found.headers() == expected.headers(),
        "the headers must be kept, in order, repeated names included: {:?} became {:?}",
        expected.headers(),
        found.headers()
    );
    assert_eq!(
        found.content_type(),
        expected.content_type(),
        "the content type must be kept"
    );
    assert!(
        stripped(found) == stripped(expected),
        "id and topic must be kept: {found:?}, {expected:?}"
    );
}

pub(super) async fn bury(owner: &mut Relay, records: &[Record], attempts: u32, reason: &str) {
    let plan = records
        .iter()
        .fold(owner.plan(), |plan, record| plan.dead(record, attempts, reason));
    assert!(
        owner.settle(plan).await.lost.is_empty(),
        "nobody took a shard over"
    );
}

pub(super) fn dead(store: &dyn OutboxStore) -> &dyn DeadLetters {
    store
        .dead_letters()
        .unwrap_or_else(|| panic!("whether a store keeps dead letters must not change"))
}

pub(super) async fn list(store: &dyn OutboxStore, query: &DeadLetterQuery) -> Vec<DeadLetter> {
    dead(store).list(query).await.unwrap()
}
