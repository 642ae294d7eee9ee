//! Reading in strides, on real servers.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::sync::Arc;
use std::time::Duration;

use outbox_core::Message;
use sqlx::mysql::MySqlConnection;
use sqlx::{Connection, Executor};
use tokio::sync::Mutex;

use crate::config::MysqlConfig;
use crate::enqueue::MysqlOutbox;
use crate::reader::MysqlReader;
use crate::reading::{goes_past_a_part, loses_and_repeats_nothing, owning};
use crate::schema::migrate;
use crate::sql::{Sql, safe};

async fn scans_that_stop_lose_and_repeat_nothing(variable: &str) {
    let url = std::env::var(variable)
        .unwrap_or_else(|_| panic!("{variable} is not set: run scripts/services start mysql mariadb"));
    let (server, _) = url.rsplit_once('/').unwrap();
    for seed in 0..8 {
        let mut random = fastrand::Rng::with_seed(seed);
        let database = format!("t_{}_{:08x}", std::process::id(), fastrand::u32(..));
        let mut connection = MySqlConnection::connect(&url).await.unwrap();
        let make = format!("CREATE DATABASE `{database}`; USE `{database}`");
        connection.execute(safe(Arc::new(make))).await.unwrap();
        let connection = Mutex::new(connection);
        // Few, each with many rows.
        let config = Arc::new(MysqlConfig {
            shards: 4,
            ..MysqlConfig::new(format!("{server}/{database}"))
        });
        migrate(&config).await.unwrap();
        let (sql, outbox) = (Arc::new(Sql::new(&config)), MysqlOutbox::new(&config).unwrap());
        // Most shards are read in one scan, few of many each by itself: all that there are are few for who takes them for that.
        // And nothing is read anew for its age, which would hide what was passed over.
        let told = Arc::new(MysqlConfig {
            shards: *random.choice(&[config.shards, 1_024]).unwrap(),
            lag: Duration::from_millis(1),
            ..MysqlConfig::clone(&config)
        });
        let reader = async || MysqlReader::connect(&told, &sql).await.unwrap();
        let owned = owning(config.shards);
        let enqueue = async |messages: &[Message]| {
            let mut connection = connection.lock().await;
            let mut transaction = connection.begin().await.unwrap();
            outbox.enqueue_many(&mut transaction, messages).await.unwrap();
            transaction.commit().await.unwrap();
        };
        let parts = reader().await.striding(random.usize(1..100));
        loses_and_repeats_nothing(seed, &owned, enqueue, reader().await, parts).await;
        goes_past_a_part(&owned, reader().await.striding(1)).await;
        let drop = format!("DROP DATABASE `{database}`");
        connection
            .lock()
            .await
            .execute(safe(Arc::new(drop)))
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scans_that_stop_lose_and_repeat_nothing_on_mysql() {
    scans_that_stop_lose_and_repeat_nothing("OUTBOX_TEST_MYSQL").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scans_that_stop_lose_and_repeat_nothing_on_mariadb() {
    scans_that_stop_lose_and_repeat_nothing("OUTBOX_TEST_MARIADB").await;
}
