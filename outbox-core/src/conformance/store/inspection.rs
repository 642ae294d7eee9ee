//! Why is it still here: the facts that people are told.

use std::time::Duration;

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, LONG, hold, order_key, retrying};
use crate::hold::{Hold, HoldScope, HoldState};
use crate::inspect::{Facts, Inspection, Place, Standing, Subject};
use crate::lease::Membership;
use crate::message::Message;
use crate::store::{Count, OutboxStore};

/// More than any scenario enqueues.
const ALL: usize = 1_000;

/// A message is found wherever it stands, with what is known of it there, and nowhere else.
pub async fn inspection_finds_every_place<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let power = inspection(&*bench.store);
    bench
        .commit(&[
            bench.keyed("a", "waits"),
            bench.keyed("b", "delivered"),
            bench.keyless("dead"),
        ])
        .await;
    let records = owner.drain_without_settling().await;
    let of = |id| Subject::Message(id);
    for record in &records {
        let facts = power.inspect(&of(record.message.id()), ALL).await.unwrap();
        let standing = only(&facts);
        assert_eq!(
            (
                &standing.topic[..],
                &standing.key,
                standing.key_seq,
                standing.created_at
            ),
            (
                record.message.topic(),
                &record.message.order_key(),
                record.key_seq,
                record.message.created_at()
            ),
            "what is told of a message must be what a reader gives"
        );
        assert!(
            matches!(standing.place, Place::Outbox { shard, position, .. }
                if (shard, position) == (record.shard, record.position)),
            "shard and position are told: {standing:?}"
        );
        assert_eq!(facts.backlog, Count::Exact(1));
        assert!(facts.complete, "three messages are fewer than the bound");
    }

    let delivered = records.iter().find(|record| record.message.key().is_some());
    let delivered = delivered.unwrap_or(&records[0]).clone();
    owner.deliver(std::slice::from_ref(&delivered)).await;
    let facts = power.inspect(&of(delivered.message.id()), ALL).await.unwrap();
    match bench.store.retention() {
        Some(_) => assert!(
            matches!(only(&facts).place, Place::Processed { position, at }
                if position == delivered.position && near(at, &facts)),
            "what was delivered is in the archive: {facts:?}"
        ),
        None => assert_eq!(facts.found, [], "what was delivered is nowhere"),
    }
    assert_eq!(facts.backlog, Count::Exact(0));

    let rest: Vec<_> = records
        .iter()
        .filter(|record| record.position != delivered.position)
        .collect();
    if bench.store.dead_letters().is_some() {
        owner.settle(owner.plan().dead(rest[0], 3, "it is poison")).await;
        let facts = power.inspect(&of(rest[0].message.id()), ALL).await.unwrap();
        assert!(
            matches!(&only(&facts).place, Place::Dead { position, attempts: 3, reason, at }
                if *position == rest[0].position && reason == "it is poison" && near(*at, &facts)),
            "what was given up is in the dead letters: {facts:?}"
        );
    }
    if bench.store.scheduled().is_some() {
        let due = bench.database_now(&mut owner).await + LONG;
        let mut parts = bench.keyed("a", "planned").into_parts();
        parts.deliver_at = Some(due);
        let planned = Message::from_stored(parts);
        bench.commit(std::slice::from_ref(&planned)).await;
        // Ids that the store derives from positions are not known before there is a position.
        if bench.can.message_ids {
            let facts = power.inspect(&of(planned.id()), ALL).await.unwrap();
            let Place::Scheduled { due: told, .. } = only(&facts).place else {
                panic!("what is not due is among the scheduled: {facts:?}")
            };
            let off = told.duration_since(due).unwrap_or_else(|error| error.duration());
            assert!(
                off < Duration::from_millis(5),
                "the time it is due is told, {off:?} off"
            );
        }
    }
    let unknown = power.inspect(&of(crate::MessageId::new()), ALL).await.unwrap();
    assert_eq!(
        (unknown.found, unknown.complete),
        (Vec::new(), true),
        "it was never enqueued"
    );
}

/// All messages of one id are told.
pub async fn inspection_finds_all_of_an_id<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let first = bench.keyed("a", "1");
    let twin = |text: &str| {
        let mut parts = bench.keyed("b", text).into_parts();
        parts.id = first.id();
        Message::from_stored(parts)
    };
    bench
        .commit(&[first.clone(), twin("2"), twin("3"), bench.keyed("a", "4")])
        .await;
    let power = inspection(&*bench.store);
    let subject = Subject::Message(first.id());
    let facts = power.inspect(&subject, ALL).await.unwrap();
    assert_eq!(
        (facts.found.len(), facts.backlog),
        (3, Count::Exact(3)),
        "three share the id"
    );
    let records = owner.drain_without_settling().await;
    let own = records.iter().find(|record| record.message.id() == first.id());
    if let (Some(own), Some(_)) = (own, bench.store.dead_letters()) {
        owner.settle(owner.plan().dead(own, 1, "poison")).await;
        let facts = power.inspect(&subject, ALL).await.unwrap();
        let dead = facts
            .found
            .iter()
            .filter(|found| matches!(found.place, Place::Dead { .. }));
        assert_eq!(
            (facts.found.len(), dead.count()),
            (3, 1),
            "two wait and one is dead: {facts:?}"
        );
    }
}

/// Of a key its first undelivered message is told, and how many there are; of other keys and topics nothing.
pub async fn inspection_finds_head<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let mut messages = vec![bench.keyed("b", "other")];
    if bench.can.fixed_topic.is_none() {
        messages.push(bench.message(1, Some("a"), "elsewhere"));
    }
    messages.extend(bench.series("a", 3));
    messages.push(bench.keyed("", "empty"));
    messages.push(bench.keyless("keyless"));
    bench.commit(&messages).await;
    let mut records = owner.drain_without_settling().await;
    records.retain(|record| {
        record.message.key().is_some_and(|key| key == "a") && record.message.topic() == &*bench.topic(0)
    });
    let subject = Subject::Key(order_key(&records[0]));
    let power = inspection(&*bench.store);
    for (delivered, head) in records.iter().enumerate() {
        let facts = power.inspect(&subject, ALL).await.unwrap();
        assert_eq!(
            only(&facts).id,
            head.message.id(),
            "the head is the first undelivered message"
        );
        assert_eq!(
            facts.backlog.value(),
            3 - delivered as u64,
            "the key's messages are counted"
        );
        owner.deliver(std::slice::from_ref(head)).await;
    }
    let facts = power.inspect(&subject, ALL).await.unwrap();
    assert_eq!(
        (facts.found, facts.backlog),
        (Vec::new(), Count::Exact(0)),
        "nothing of the key is left"
    );
}

/// Of a topic its first undelivered message is told, and how many there are.
pub async fn inspection_finds_first_of_topic<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    bench
        .commit(&[
            bench.message(1, None, "other"),
            bench.message(0, None, "1"),
            bench.message(1, None, "other"),
            bench.message(0, None, "2"),
        ])
        .await;
    let power = inspection(&*bench.store);
    let facts = power.inspect(&Subject::Topic(bench.topic(0)), ALL).await.unwrap();
    assert_eq!(
        only(&facts).topic,
        bench.topic(0),
        "only the topic that was asked for"
    );
    assert_eq!(facts.backlog, Count::Exact(2), "two of four are of the topic");
    let unknown = Subject::Topic("conformance-unknown".into());
    let facts = power.inspect(&unknown, ALL).await.unwrap();
    assert_eq!((facts.found, facts.backlog), (Vec::new(), Count::Exact(0)));
}

/// How many of its shard stand before a message is told.
pub async fn inspection_tells_line<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 4)).await;
    bench
        .commit(&[bench.keyless("1"), bench.keyless("2"), bench.keyed("b", "3")])
        .await;
    let records = owner.drain_without_settling().await;
    let power = inspection(&*bench.store);
    for record in &records {
        let expected = records
            .iter()
            .filter(|other| other.shard == record.shard && other.position < record.position)
            .count() as u64;
        let subject = Subject::Message(record.message.id());
        let facts = power.inspect(&subject, ALL).await.unwrap();
        assert!(
            matches!(only(&facts).place, Place::Outbox { ahead, .. } if ahead.value() == expected),
            "{expected} of its shard stand before it: {facts:?}"
        );
    }
}

/// The holds that stop a message, a key or a topic are told, and no others.
pub async fn inspection_tells_holds<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let mut messages = vec![bench.keyless("lone"), bench.keyless("free")];
    if bench.can.keys {
        messages.extend(bench.series("a", 2));
        messages.push(bench.keyed("b", "b1"));
    }
    bench.commit(&messages).await;
    let records = owner.drain_without_settling().await;
    let find = |text: &str| {
        records
            .iter()
            .find(|record| super::super::kit::text(&record.message) == text)
    };
    let lone = find("lone").unwrap();
    owner.hold(hold(lone, 4, HoldState::Parked)).await;
    let power = inspection(&*bench.store);
    let heads = async |subject: Subject| -> Vec<(HoldScope, u32)> {
        let facts = power.inspect(&subject, ALL).await.unwrap();
        let mut holds: Vec<_> = facts
            .holds
            .into_iter()
            .map(|hold| (hold.scope, hold.attempts))
            .collect();
        holds.sort_unstable();
        holds
    };
    let of = |text: &str| Subject::Message(find(text).unwrap().message.id());
    assert_eq!(
        heads(of("lone")).await,
        [(HoldScope::Message, 4)],
        "it is held itself"
    );
    assert_eq!(
        heads(of("free")).await,
        [],
        "the hold of a keyless message stops no other"
    );
    assert_eq!(
        heads(Subject::Topic(bench.topic(0))).await,
        [(HoldScope::Message, 4)],
        "the hold of a topic's first message is told of the topic"
    );
    if bench.can.keys {
        let head = find("a1").unwrap();
        let key = HoldScope::Key(order_key(head));
        owner.hold(retrying(head, 2)).await;
        for text in ["a1", "a2"] {
            assert_eq!(
                heads(of(text)).await,
                [(key.clone(), 2)],
                "the key's hold stops all of the key"
            );
        }
        assert_eq!(heads(of("b1")).await, [], "the hold of a key stops no other");
        assert_eq!(heads(Subject::Key(order_key(head))).await, [(key.clone(), 2)]);
        assert_eq!(heads(Subject::Key(order_key(find("b1").unwrap()))).await, []);
        assert_eq!(
            heads(Subject::Topic(bench.topic(0))).await,
            [(key, 2), (HoldScope::Message, 4)],
            "the holds of its keys are told of a topic"
        );
    }
    let topic = Hold {
        scope: HoldScope::Topic(bench.topic(0)),
        ..retrying(lone, 1)
    };
    owner.hold(topic.clone()).await;
    for text in ["lone", "free"] {
        assert!(
            heads(of(text)).await.contains(&(topic.scope.clone(), 1)),
            "the topic's hold stops all"
        );
    }
    if bench.can.keys {
        let key = Subject::Key(order_key(find("b1").unwrap()));
        assert_eq!(
            heads(key).await,
            [(topic.scope.clone(), 1)],
            "the topic's hold stops every key of it"
        );
    }
    assert!(
        heads(Subject::Topic(bench.topic(0)))
            .await
            .contains(&(topic.scope, 1))
    );
}

/// Owners and relays are told as they are.
pub async fn inspection_tells_owners<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    bench.commit(&[bench.keyed("a", "1")]).await;
    let subject = Subject::Topic(bench.topic(0));
    let power = inspection(&*bench.store);
    let facts = power.inspect(&subject, ALL).await.unwrap();
    assert_eq!(
        facts.leases.len(),
        usize::from(bench.can.shards),
        "each shard has a lease"
    );
    assert!(facts.leases.iter().all(|lease| lease.owner.is_none()) && facts.relays.is_empty());
    let mut owner = bench.owner("owner").await;
    let facts = power.inspect(&subject, ALL).await.unwrap();
    assert!(
        facts
            .leases
            .iter()
            .all(|lease| lease.owner.as_ref() == Some(&owner.id) && lease.time_left > LONG / 2),
        "a shard's owner is told: {:?}",
        facts.leases
    );
    assert_eq!(facts.relays, [owner.id.clone()], "the relays that live are told");
    owner.release_all(Membership::Leaves).await;
    let facts = power.inspect(&subject, ALL).await.unwrap();
    assert!(facts.leases.iter().all(|lease| lease.owner.is_none()) && facts.relays.is_empty());
}

/// The last number of a key is told, delivered or not.
pub async fn inspection_tells_last_number<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 3)).await;
    let records = owner.drain().await;
    let power = inspection(&*bench.store);
    let facts = power
        .inspect(&Subject::Key(order_key(&records[0])), ALL)
        .await
        .unwrap();
    assert_eq!(facts.last_seq, Some(3), "three numbers were given");
    let mut unknown = order_key(&records[0]);
    unknown.key = "unknown".into();
    let facts = power.inspect(&Subject::Key(unknown), ALL).await.unwrap();
    assert_eq!(facts.last_seq, None, "no number was given");
}

/// A search that the bound cut off claims no more than it saw.
pub async fn inspection_keeps_its_bound<H: StoreHarness>() {
    const BOUND: usize = 5;
    let bench = Bench::<H>::fresh().await;
    // One key, so that one shard has them all: a store may search shard by shard.
    let messages: Vec<_> = match bench.can.keys {
        true => bench.series("a", 20),
        false => (0..20 * bench.can.shards)
            .map(|number| bench.keyless(&format!("{number}")))
            .collect(),
    };
    bench.commit(&messages).await;
    let power = inspection(&*bench.store);
    let topic = Subject::Topic(bench.topic(0));
    let facts = power.inspect(&topic, BOUND).await.unwrap();
    assert!(!facts.complete, "twenty are more than the bound");
    assert!(
        matches!(facts.backlog, Count::AtLeast(count) if count <= 20),
        "a count that was cut off is a lower bound: {:?}",
        facts.backlog
    );
    let mut owner = bench.owner("owner").await;
    let last = owner.drain_without_settling().await.pop().unwrap().message.id();
    let facts = power.inspect(&Subject::Message(last), BOUND).await.unwrap();
    assert!(
        !facts.found.is_empty() || !facts.complete && matches!(facts.backlog, Count::AtLeast(0)),
        "what was not looked for is not claimed to be gone: {facts:?}"
    );
    let facts = power.inspect(&topic, ALL).await.unwrap();
    assert!(
        facts.complete && facts.backlog == Count::Exact(messages.len() as u64),
        "{facts:?}"
    );
}

fn inspection(store: &dyn OutboxStore) -> &dyn Inspection {
    store
        .inspection()
        .unwrap_or_else(|| panic!("whether a store can be inspected must not change"))
}

fn only(facts: &Facts) -> &Standing {
    match facts.found.as_slice() {
        [standing] => standing,
        found => panic!("exactly one place was expected: {found:?}"),
    }
}

/// Whether something happened just now, by the database's clock.
fn near(at: std::time::SystemTime, facts: &Facts) -> bool {
    facts.now.duration_since(at).unwrap_or_default() < Duration::from_secs(60)
}
