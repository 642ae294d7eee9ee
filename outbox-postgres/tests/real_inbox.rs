//! The inbox: the effect of a message happens once for each consumer.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::time::Duration;

use common::{Place, message, until};
use outbox_core::{Enqueue, ErrorKind, Inbox, MIN_INBOX_AGE, MessageId, Receive};
use outbox_postgres::sqlx::{self, AssertSqlSafe, Postgres, Transaction};
use outbox_postgres::{PostgresInbox, begin};

async fn with_effects() -> (Place, PostgresInbox) {
    let place = Place::new().await;
    place
        .sql(&format!("CREATE TABLE {} (a int)", place.table("_effects")))
        .await;
    let inbox = PostgresInbox::new(&place.config).unwrap();
    (place, inbox)
}

async fn effect(place: &Place, tx: &mut Transaction<'_, Postgres>) {
    let insert = format!("INSERT INTO {} VALUES (1)", place.table("_effects"));
    sqlx::query(AssertSqlSafe(insert))
        .execute(&mut **tx)
        .await
        .unwrap();
}

async fn effects(place: &Place) -> i64 {
    place
        .number(&format!("SELECT count(*) FROM {}", place.table("_effects")))
        .await
}

#[tokio::test]
async fn the_effect_happens_once_for_each_consumer() {
    let (place, inbox) = with_effects().await;
    let id = MessageId::new();
    for (consumer, commit, expected) in [
        ("billing", false, Receive::Fresh),
        ("billing", true, Receive::Fresh),
        ("billing", true, Receive::Duplicate),
        ("mail", true, Receive::Fresh),
        ("", true, Receive::Fresh),
        ("Billing", true, Receive::Fresh),
        ("'; DROP TABLE canary; --", true, Receive::Fresh),
    ] {
        let mut tx = begin(&place.pool).await.unwrap();
        let receive = inbox.receive(&mut tx, consumer, id).await.unwrap();
        assert_eq!(receive, expected, "{consumer}");
        if receive == Receive::Fresh {
            effect(&place, &mut tx).await;
        }
        if commit {
            tx.commit().await.unwrap();
        } else {
            tx.rollback().await.unwrap();
        }
    }
    assert_eq!(effects(&place).await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_copies_take_effect_once() {
    let (place, inbox) = with_effects().await;
    let place = std::sync::Arc::new(place);
    let ids: Vec<MessageId> = (0..50).map(|_| MessageId::new()).collect();
    let all: Vec<_> = (0..4)
        .map(|_| {
            let (place, inbox, ids) = (std::sync::Arc::clone(&place), inbox.clone(), ids.clone());
            tokio::spawn(async move {
                for id in ids {
                    let mut tx = begin(&place.pool).await.unwrap();
                    if inbox.receive(&mut tx, "c", id).await.unwrap() == Receive::Fresh {
                        effect(&place, &mut tx).await;
                    }
                    tx.commit().await.unwrap();
                }
            })
        })
        .collect();
    for one in all {
        one.await.unwrap();
    }
    assert_eq!(effects(&place).await, 50);
}

/// The second of two copies waits for the first one's end, and does what that has left to do.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_waits_for_the_other_ones_end() {
    let (place, inbox) = with_effects().await;
    for (commits, expected) in [(true, Receive::Duplicate), (false, Receive::Fresh)] {
        let id = MessageId::new();
        let mut first = begin(&place.pool).await.unwrap();
        assert_eq!(inbox.receive(&mut first, "c", id).await.unwrap(), Receive::Fresh);
        let mut second = begin(&place.pool).await.unwrap();
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
            .fetch_one(&mut *second)
            .await
            .unwrap();
        let waiting = {
            let inbox = inbox.clone();
            tokio::spawn(async move {
                let receive = inbox.receive(&mut second, "c", id).await.unwrap();
                second.commit().await.unwrap();
                receive
            })
        };
        let blocked =
            format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event_type = 'Lock'");
        until(Duration::from_secs(10), async || {
            (place.number(&blocked).await == 1).then_some(())
        })
        .await
        .expect("the second copy waits");
        assert!(!waiting.is_finished());
        if commits {
            first.commit().await.unwrap();
        } else {
            first.rollback().await.unwrap();
        }
        assert_eq!(waiting.await.unwrap(), expected);
    }
}

#[tokio::test]
async fn a_purge_forgets_only_what_is_old() {
    let (place, inbox) = with_effects().await;
    let mut connection = place.connect().await;
    for number in 0..10 {
        inbox
            .receive(&mut connection, "c", MessageId::new())
            .await
            .unwrap();
        if number == 5 {
            place
                .sql("UPDATE {_inbox} SET received_at = received_at - interval '1 hour 1 ms'")
                .await;
        }
    }
    let error = inbox
        .purge(&mut connection, Duration::from_secs(60), 100)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    for (age, limit, forgotten) in [
        (MIN_INBOX_AGE, 4, 4),
        (MIN_INBOX_AGE, 100, 2),
        (MIN_INBOX_AGE, 100, 0),
        (Duration::MAX, usize::MAX, 0),
    ] {
        assert_eq!(inbox.purge(&mut connection, age, limit).await.unwrap(), forgotten);
    }
    assert_eq!(place.number("SELECT count(*) FROM {_inbox}").await, 4);
}

/// Code that is generic over stores uses the traits.
#[tokio::test]
async fn the_traits_work_on_the_drivers_own_transaction() {
    async fn handle<I, O>(inbox: &I, outbox: &O, tx: &mut Transaction<'static, Postgres>, id: MessageId)
    where
        I: Inbox<Transaction<'static, Postgres>>,
        O: Enqueue<Transaction<'static, Postgres>>,
    {
        if inbox.receive(tx, "c", id).await.unwrap() == Receive::Fresh {
            outbox.enqueue(tx, &message("t", None, "follows")).await.unwrap();
        }
    }
    let (place, inbox) = with_effects().await;
    let id = MessageId::new();
    for _ in 0..2 {
        let mut tx = begin(&place.pool).await.unwrap();
        handle(&inbox, &place.outbox, &mut tx, id).await;
        tx.commit().await.unwrap();
    }
    assert_eq!(place.number("SELECT count(*) FROM {}").await, 1);
}
