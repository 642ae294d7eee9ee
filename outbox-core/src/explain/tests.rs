//! Each answer once, as people read it.

use bytes::Bytes;

use super::*;
use crate::fetch::RecordRef;
use crate::message::OrderKey;
use crate::shard::{Epoch, Position};
use crate::store::LeaseStatus;

const SECOND: Duration = Duration::from_secs(1);

fn id(number: u8) -> MessageId {
    MessageId::from_bytes([number; 16])
}

fn key() -> OrderKey {
    OrderKey {
        topic: "orders".into(),
        key: Bytes::from("42"),
    }
}

/// The message `number` of the key, at a position of the same number.
fn standing(number: u8, place: Place) -> Standing {
    Standing {
        id: id(number),
        topic: "orders".into(),
        key: Some(key()),
        key_seq: None,
        created_at: None,
        place,
    }
}

fn in_outbox(number: u8) -> Standing {
    let place = Place::Outbox {
        shard: Shard(3),
        position: Position(number.into()),
        ahead: Count::Exact(7),
    };
    standing(number, place)
}

fn hold(scope: HoldScope, state: HoldState) -> Hold {
    Hold {
        shard: Shard(3),
        scope,
        head: RecordRef {
            position: Position(1),
            id: id(1),
        },
        attempts: 3,
        state,
        reason: "no such topic".into(),
    }
}

fn facts(found: Vec<Standing>, holds: Vec<Hold>) -> Facts {
    Facts {
        now: SystemTime::UNIX_EPOCH + 1_000 * SECOND,
        backlog: Count::Exact(1),
        found,
        holds,
        last_seq: None,
        leases: vec![LeaseStatus {
            shard: Shard(3),
            epoch: Epoch(1),
            owner: Some(RelayId::new("relay-1")),
            time_left: 8 * SECOND,
        }],
        relays: vec![RelayId::new("relay-1")],
        complete: true,
    }
}

/// The causes of the only place that was found.
fn causes(facts: &Facts) -> Vec<String> {
    let explanation = explain(&Subject::Message(id(1)), facts);
    assert_eq!(explanation.places.len(), 1);
    assert_eq!(explanation.causes, []);
    explanation.places[0]
        .causes
        .iter()
        .map(|cause| format!("{}: {cause}", cause.code()))
        .collect()
}

const DUE: HoldState = HoldState::Retrying {
    due_in: Duration::from_secs(12),
};

#[test]
fn a_head_that_failed_tells_when_it_is_tried_again() {
    let facts = facts(vec![in_outbox(1)], vec![hold(HoldScope::Key(key()), DUE)]);
    assert_eq!(
        causes(&facts),
        ["retrying: it failed 3 times, next attempt in 12.0s: no such topic"]
    );
}

#[test]
fn what_waits_behind_a_parked_head_says_how_to_go_on() {
    let facts = facts(
        vec![in_outbox(2)],
        vec![hold(HoldScope::Key(key()), HoldState::Parked)],
    );
    let explanation = explain(&Subject::Message(id(2)), &facts);
    let cause = &explanation.places[0].causes[0];
    assert_eq!(cause.code(), "behind_parked");
    assert!(
        cause
            .to_string()
            .ends_with("which is parked until somebody decides, it failed 3 times: no such topic"),
        "{cause}"
    );
    let (resume, bury) = (
        format!("outbox resume {}", id(1)),
        format!("outbox parked bury {}", id(1)),
    );
    assert_eq!(cause.remedies(), [resume, bury]);
}

#[test]
fn a_topic_holds_all_that_is_in_it_and_other_keys_hold_nothing() {
    let other = OrderKey {
        key: Bytes::from("43"),
        ..key()
    };
    let holds = vec![
        hold(HoldScope::Key(other), HoldState::Parked),
        hold(HoldScope::Message, HoldState::Parked),
        hold(HoldScope::Topic("others".into()), HoldState::Parked),
        hold(HoldScope::Topic("orders".into()), DUE),
    ];
    let found = causes(&facts(vec![in_outbox(2)], holds));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].starts_with("topic_held: its topic failed 3 times"),
        "{found:?}"
    );
}

#[test]
fn a_keyless_message_is_held_by_its_own_hold_alone() {
    let mut message = in_outbox(1);
    message.key = None;
    let holds = vec![hold(HoldScope::Message, HoldState::Parked)];
    assert!(causes(&facts(vec![message], holds))[0].starts_with("parked: it is parked"));
}

#[test]
fn what_nothing_stops_is_in_line() {
    assert_eq!(
        causes(&facts(vec![in_outbox(1)], Vec::new())),
        ["in_line: it is in line, 7 of its shard before it; relay-1 owns the shard, lease for 8.0s"]
    );
}

#[test]
fn without_an_owner_nothing_moves_held_or_not() {
    let mut facts = facts(vec![in_outbox(1)], vec![hold(HoldScope::Key(key()), DUE)]);
    facts.leases[0].owner = None;
    assert_eq!(
        causes(&facts)[1],
        "no_owner: shard 3 has no owner, though 1 relay is running: it should be taken within seconds"
    );
    facts.relays.clear();
    assert_eq!(causes(&facts)[1], "no_relay: no relay is running");
    facts.holds.clear();
    assert_eq!(causes(&facts), ["no_relay: no relay is running"]);
}

#[test]
fn what_is_not_due_needs_no_owner_yet() {
    let scheduled = |seconds: u32| {
        let place = Place::Scheduled {
            shard: Shard(3),
            due: SystemTime::UNIX_EPOCH + seconds * SECOND,
        };
        let mut facts = facts(vec![standing(1, place)], Vec::new());
        facts.leases.clear();
        facts.relays.clear();
        causes(&facts)
    };
    assert_eq!(scheduled(1_180), ["scheduled: it is scheduled: due in 3m"]);
    assert_eq!(scheduled(1_000).len(), 2);
}

#[test]
fn what_is_settled_says_how_and_when() {
    let at = SystemTime::UNIX_EPOCH + 940 * SECOND;
    let position = Position(1);
    let delivered = standing(1, Place::Processed { position, at });
    assert_eq!(
        causes(&facts(vec![delivered], Vec::new())),
        ["delivered: it was delivered 1m ago"]
    );
    let dead = Place::Dead {
        position,
        attempts: 1,
        reason: "too large".into(),
        at,
    };
    assert_eq!(
        causes(&facts(vec![standing(1, dead)], Vec::new())),
        ["dead: it was given up 1m ago, it failed once: too large"]
    );
}

#[test]
fn what_is_not_here_is_not_claimed_to_be_gone_when_not_all_was_seen() {
    let mut facts = facts(Vec::new(), vec![hold(HoldScope::Topic("orders".into()), DUE)]);
    let said = |subject: &Subject, facts: &Facts| -> Vec<String> {
        let explanation = explain(subject, facts);
        explanation.causes.iter().map(ToString::to_string).collect()
    };
    assert_eq!(
        said(&Subject::Message(id(9)), &facts),
        ["not here: delivered (and not archived), discarded, rolled back, or never enqueued"]
    );
    let of_key = said(&Subject::Key(key()), &facts);
    assert_eq!(of_key[0], "nothing of it is undelivered");
    assert!(of_key[1].starts_with("its topic failed"), "{of_key:?}");
    facts.complete = false;
    assert_eq!(
        said(&Subject::Message(id(9)), &facts),
        ["not found, but not everything was looked at"]
    );
}

#[test]
fn a_topic_tells_of_its_keys_and_of_shards_without_an_owner() {
    let holds = vec![
        hold(HoldScope::Key(key()), HoldState::Parked),
        hold(HoldScope::Key(key()), DUE),
    ];
    let mut facts = facts(vec![in_outbox(9)], holds);
    facts.leases.push(LeaseStatus {
        shard: Shard(4),
        epoch: Epoch(1),
        owner: None,
        time_left: Duration::ZERO,
    });
    let explanation = explain(&Subject::Topic("orders".into()), &facts);
    assert_eq!(
        explanation.causes,
        [
            Cause::KeysHeld {
                retrying: 1,
                parked: 1
            },
            Cause::NoOwner {
                shards: vec![Shard(4)],
                relays: 1
            }
        ]
    );
}
