//! The inbox, and a database that is full.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::time::Duration;

use common::{Place, message};
use outbox_core::{Enqueue, ErrorKind, Inbox, MIN_INBOX_AGE, MessageId, Receive};
use outbox_sqlite::SqliteInbox;
use outbox_sqlite::rusqlite::{Connection, Transaction, TransactionBehavior};

fn count(connection: &Connection, table: &str) -> i64 {
    connection
        .query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0))
        .unwrap()
}

#[test]
fn the_effect_happens_once_for_each_consumer() {
    let place = Place::new();
    let inbox = SqliteInbox::new(&place.config).unwrap();
    let mut connection = place.connect();
    connection.execute_batch("CREATE TABLE effects (a)").unwrap();
    let id = MessageId::new();
    for (consumer, commit, expected) in [
        ("billing", false, Receive::Fresh),
        ("billing", true, Receive::Fresh),
        ("billing", true, Receive::Duplicate),
        ("mail", true, Receive::Fresh),
        ("", true, Receive::Fresh),
    ] {
        let tx = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .unwrap();
        let receive = inbox.receive(&tx, consumer, id).unwrap();
        assert_eq!(receive, expected);
        if receive == Receive::Fresh {
            tx.execute("INSERT INTO effects VALUES (1)", []).unwrap();
        }
        if commit {
            tx.commit().unwrap();
        }
    }
    assert_eq!(count(&connection, "effects"), 3);
}

#[test]
fn concurrent_copies_take_effect_once() {
    let place = Place::new();
    let inbox = SqliteInbox::new(&place.config).unwrap();
    place.connect().execute_batch("CREATE TABLE effects (a)").unwrap();
    let ids: Vec<MessageId> = (0..50).map(|_| MessageId::new()).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut connection = place.connect();
                for id in &ids {
                    let tx = connection
                        .transaction_with_behavior(TransactionBehavior::Immediate)
                        .unwrap();
                    if inbox.receive(&tx, "c", *id).unwrap() == Receive::Fresh {
                        tx.execute("INSERT INTO effects VALUES (1)", []).unwrap();
                    }
                    tx.commit().unwrap();
                }
            });
        }
    });
    assert_eq!(count(&place.connect(), "effects"), 50);
}

#[test]
fn a_purge_forgets_only_what_is_old() {
    let place = Place::new();
    let inbox = SqliteInbox::new(&place.config).unwrap();
    let connection = place.connect();
    for number in 0..10 {
        inbox.receive(&connection, "c", MessageId::new()).unwrap();
        if number == 5 {
            connection
                .execute_batch("UPDATE outbox_inbox SET received_at = received_at - 3600 * 1000 - 1")
                .unwrap();
        }
    }
    let error = inbox
        .purge(&connection, Duration::from_secs(60), 100)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(inbox.purge(&connection, MIN_INBOX_AGE, 4).unwrap(), 4);
    assert_eq!(inbox.purge(&connection, MIN_INBOX_AGE, 100).unwrap(), 2);
    assert_eq!(inbox.purge(&connection, MIN_INBOX_AGE, 100).unwrap(), 0);
    assert_eq!(inbox.purge(&connection, Duration::MAX, 100).unwrap(), 0);
    assert_eq!(count(&connection, "outbox_inbox"), 4);
}

/// Code that is generic over stores uses the traits.
#[tokio::test]
async fn the_traits_work_on_the_drivers_own_transaction() {
    async fn handle<'c, I: Inbox<Transaction<'c>>, O: Enqueue<Transaction<'c>>>(
        inbox: &I,
        outbox: &O,
        tx: &mut Transaction<'c>,
        id: MessageId,
    ) {
        if inbox.receive(tx, "c", id).await.unwrap() == Receive::Fresh {
            outbox.enqueue(tx, &message("t", None, "follows")).await.unwrap();
        }
    }
    let place = Place::new();
    let inbox = SqliteInbox::new(&place.config).unwrap();
    let mut connection = place.connect();
    let id = MessageId::new();
    for _ in 0..2 {
        let mut tx = connection.transaction().unwrap();
        handle(&inbox, &place.outbox, &mut tx, id).await;
        tx.commit().unwrap();
    }
    assert_eq!(count(&connection, "outbox"), 1);
}

#[test]
fn a_full_database_fails_the_producer_and_goes_on_when_there_is_room() {
    let place = Place::new();
    let connection = place.connect();
    connection.execute_batch("CREATE TABLE business (a)").unwrap();
    let pages: i64 = connection
        .query_row("PRAGMA page_count", [], |row| row.get(0))
        .unwrap();
    connection
        .pragma_update_and_check(None, "max_page_count", pages + 2, |_| Ok(()))
        .unwrap();
    connection
        .execute_batch("BEGIN IMMEDIATE; INSERT INTO business VALUES (1)")
        .unwrap();
    let large = message("t", None, &"x".repeat(100_000));
    let error = place
        .outbox
        .enqueue_many(&connection, &[message("t", None, "p"), large.clone()])
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(error.to_string().contains("full"), "{error}");
    if !connection.is_autocommit() {
        connection.execute_batch("ROLLBACK").unwrap();
    }
    connection
        .pragma_update_and_check(None, "max_page_count", pages + 1000, |_| Ok(()))
        .unwrap();
    place.outbox.enqueue(&connection, &large).unwrap();
    assert_eq!(
        (count(&connection, "outbox"), count(&connection, "business")),
        (1, 0)
    );
}
