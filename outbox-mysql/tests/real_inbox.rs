//! The inbox: the effect of a message happens once for each consumer.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Place, Server, message, on_each_server, until};
use outbox_core::{Enqueue, ErrorKind, Inbox, MIN_INBOX_AGE, MessageId, Receive};
use outbox_mysql::sqlx::{self, MySql, Transaction};
use outbox_mysql::{MysqlInbox, begin};

async fn with_effects(server: Server) -> (Place, MysqlInbox) {
    let place = Place::with(server, |config| config.shards = 1).await;
    place.sql("CREATE TABLE effects (a INT)").await;
    let inbox = MysqlInbox::new(&place.config).unwrap();
    (place, inbox)
}

async fn effect(tx: &mut Transaction<'_, MySql>) {
    sqlx::query("INSERT INTO effects VALUES (1)")
        .execute(&mut **tx)
        .await
        .unwrap();
}

async fn effects(place: &Place) -> i64 {
    place.number("SELECT COUNT(*) FROM effects").await
}

async fn the_effect_happens_once_for_each_consumer(server: Server) {
    let (place, inbox) = with_effects(server).await;
    let id = MessageId::new();
    let longest = "ü".repeat(255);
    for (consumer, commit, expected) in [
        ("billing", false, Receive::Fresh),
        ("billing", true, Receive::Fresh),
        ("billing", true, Receive::Duplicate),
        ("mail", true, Receive::Fresh),
        ("", true, Receive::Fresh),
        ("Billing", true, Receive::Fresh),
        ("billıng", true, Receive::Fresh),
        ("🦀", true, Receive::Fresh),
        ("🐙", true, Receive::Fresh),
        ("'; DROP TABLE canary; -- \\", true, Receive::Fresh),
        (&*longest, true, Receive::Fresh),
        (&*longest, true, Receive::Duplicate),
    ] {
        let mut tx = begin(&place.pool).await.unwrap();
        let receive = inbox.receive(&mut tx, consumer, id).await.unwrap();
        assert_eq!(receive, expected, "{consumer}");
        if receive == Receive::Fresh {
            effect(&mut tx).await;
        }
        if commit {
            tx.commit().await.unwrap();
        } else {
            tx.rollback().await.unwrap();
        }
    }
    assert_eq!(effects(&place).await, 9);
}

/// A server that is not strict would cut it, and take it for another one's.
async fn a_name_that_is_too_long_is_refused(server: Server) {
    let (place, inbox) = with_effects(server).await;
    let mut connection = place.connect().await;
    sqlx::raw_sql("SET SESSION sql_mode = ''")
        .execute(&mut connection)
        .await
        .unwrap();
    for name in ["c".repeat(256), "ü".repeat(256)] {
        let error = inbox
            .receive(&mut connection, &name, MessageId::new())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
        assert!(error.to_string().contains("255"), "{error}");
    }
    assert_eq!(place.number("SELECT COUNT(*) FROM {_inbox}").await, 0);
}

/// What was done before in the transaction stays, and so does what follows.
async fn a_duplicate_leaves_the_transaction_usable(server: Server) {
    let (place, inbox) = with_effects(server).await;
    let id = MessageId::new();
    let mut tx = begin(&place.pool).await.unwrap();
    effect(&mut tx).await;
    assert_eq!(inbox.receive(&mut tx, "c", id).await.unwrap(), Receive::Fresh);
    assert_eq!(inbox.receive(&mut tx, "c", id).await.unwrap(), Receive::Duplicate);
    effect(&mut tx).await;
    let next = MessageId::new();
    assert_eq!(inbox.receive(&mut tx, "c", next).await.unwrap(), Receive::Fresh);
    tx.commit().await.unwrap();
    assert_eq!(effects(&place).await, 2);
    assert_eq!(place.number("SELECT COUNT(*) FROM {_inbox}").await, 2);
}

async fn concurrent_copies_take_effect_once(server: Server) {
    let (place, inbox) = with_effects(server).await;
    let place = Arc::new(place);
    let ids: Vec<MessageId> = (0..50).map(|_| MessageId::new()).collect();
    let all: Vec<_> = (0..4)
        .map(|_| {
            let (place, inbox, ids) = (Arc::clone(&place), inbox.clone(), ids.clone());
            tokio::spawn(async move {
                for id in ids {
                    let mut tx = begin(&place.pool).await.unwrap();
                    if inbox.receive(&mut tx, "c", id).await.unwrap() == Receive::Fresh {
                        effect(&mut tx).await;
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
async fn a_copy_waits_for_the_other_ones_end(server: Server) {
    let (place, inbox) = with_effects(server).await;
    for (commits, expected) in [(true, Receive::Duplicate), (false, Receive::Fresh)] {
        let id = MessageId::new();
        let mut first = begin(&place.pool).await.unwrap();
        assert_eq!(inbox.receive(&mut first, "c", id).await.unwrap(), Receive::Fresh);
        let mut second = begin(&place.pool).await.unwrap();
        let connection: u64 = sqlx::query_scalar("SELECT CAST(CONNECTION_ID() AS UNSIGNED)")
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
        let blocked = waits(server, connection);
        until(Duration::from_secs(10), async || {
            // MariaDB tells the same again to who asks more often.
            tokio::time::sleep(Duration::from_millis(200)).await;
            (place.number(&blocked).await > 0).then_some(())
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

/// For how many locks a connection waits. MySQL's table of transactions cannot be read while one of them binds bytes.
fn waits(server: Server, connection: u64) -> String {
    match server {
        Server::Mysql => format!(
            "SELECT COUNT(*) FROM performance_schema.data_lock_waits w \
             JOIN performance_schema.threads t ON t.THREAD_ID = w.REQUESTING_THREAD_ID \
             WHERE t.PROCESSLIST_ID = {connection}"
        ),
        Server::Mariadb => format!(
            "SELECT COUNT(*) FROM information_schema.INNODB_TRX \
             WHERE trx_mysql_thread_id = {connection} AND trx_state = 'LOCK WAIT'"
        ),
    }
}

async fn a_purge_forgets_only_what_is_old(server: Server) {
    let (place, inbox) = with_effects(server).await;
    let mut connection = place.connect().await;
    for number in 0..10 {
        inbox
            .receive(&mut connection, "c", MessageId::new())
            .await
            .unwrap();
        if number == 5 {
            place
                .sql("UPDATE {_inbox} SET received_at = received_at - INTERVAL 3601 SECOND")
                .await;
        }
    }
    let error = inbox
        .purge(&mut connection, Duration::from_secs(60), 100)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    // Whatever zone the session has.
    sqlx::raw_sql("SET SESSION time_zone = '+11:00'")
        .execute(&mut connection)
        .await
        .unwrap();
    for (age, limit, forgotten) in [
        (MIN_INBOX_AGE, 0, 0),
        (MIN_INBOX_AGE, 4, 4),
        (MIN_INBOX_AGE, 100, 2),
        (MIN_INBOX_AGE, 100, 0),
        (Duration::MAX, usize::MAX, 0),
    ] {
        assert_eq!(inbox.purge(&mut connection, age, limit).await.unwrap(), forgotten);
    }
    assert_eq!(place.number("SELECT COUNT(*) FROM {_inbox}").await, 4);
}

/// Code that is generic over stores uses the traits.
async fn the_traits_work_on_the_drivers_own_transaction(server: Server) {
    async fn handle<I, O>(inbox: &I, outbox: &O, tx: &mut Transaction<'static, MySql>, id: MessageId)
    where
        I: Inbox<Transaction<'static, MySql>>,
        O: Enqueue<Transaction<'static, MySql>>,
    {
        if inbox.receive(tx, "c", id).await.unwrap() == Receive::Fresh {
            outbox.enqueue(tx, &message("t", None, "follows")).await.unwrap();
        }
    }
    let (place, inbox) = with_effects(server).await;
    let id = MessageId::new();
    for _ in 0..2 {
        let mut tx = begin(&place.pool).await.unwrap();
        handle(&inbox, &place.outbox, &mut tx, id).await;
        tx.commit().await.unwrap();
    }
    assert_eq!(place.number("SELECT COUNT(*) FROM {}").await, 1);
}

on_each_server!(
    the_effect_happens_once_for_each_consumer,
    a_name_that_is_too_long_is_refused,
    a_duplicate_leaves_the_transaction_usable,
    concurrent_copies_take_effect_once,
    a_copy_waits_for_the_other_ones_end,
    a_purge_forgets_only_what_is_old,
    the_traits_work_on_the_drivers_own_transaction,
);
