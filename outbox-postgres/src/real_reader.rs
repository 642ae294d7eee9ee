//! Reading in strides, on a real server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::sync::Arc;

use outbox_core::{Identifier, Message};
use sqlx::postgres::PgConnection;
use sqlx::{Connection, Executor};
use tokio::sync::Mutex;

use crate::config::PostgresConfig;
use crate::enqueue::PostgresOutbox;
use crate::reader::PostgresReader;
use crate::reading::{goes_past_a_part, loses_and_repeats_nothing, owning};
use crate::schema::migrate;
use crate::sql::{Sql, safe};

#[tokio::test(flavor = "multi_thread")]
async fn scans_that_stop_lose_and_repeat_nothing() {
    let url = std::env::var("OUTBOX_TEST_POSTGRES")
        .unwrap_or_else(|_| panic!("OUTBOX_TEST_POSTGRES is not set: run scripts/services start postgres"));
    let connection = Mutex::new(PgConnection::connect(&url).await.unwrap());
    for seed in 0..8 {
        let schema = format!("t_{}_{:08x}", std::process::id(), fastrand::u32(..));
        let config = Arc::new(PostgresConfig {
            schema: Identifier::new(&schema).unwrap(),
            // Few, each with many rows.
            shards: 4,
            ..PostgresConfig::new(url.clone())
        });
        migrate(&config).await.unwrap();
        let (sql, outbox) = (Arc::new(Sql::new(&config)), PostgresOutbox::new(&config).unwrap());
        let reader = async || PostgresReader::connect(&config, &sql).await.unwrap();
        let owned = owning(config.shards);
        let enqueue = async |messages: &[Message]| {
            let mut connection = connection.lock().await;
            let mut transaction = connection.begin().await.unwrap();
            outbox.enqueue_many(&mut transaction, messages).await.unwrap();
            transaction.commit().await.unwrap();
        };
        let rows = fastrand::Rng::with_seed(seed).usize(1..100);
        let parts = reader().await.striding(rows);
        loses_and_repeats_nothing(seed, &owned, enqueue, reader().await, parts).await;
        goes_past_a_part(&owned, reader().await.striding(1)).await;
        let drop = format!("DROP SCHEMA \"{schema}\" CASCADE");
        connection.lock().await.execute(safe(drop)).await.unwrap();
    }
}
