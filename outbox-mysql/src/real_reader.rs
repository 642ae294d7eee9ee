//! Reading in strides, on real servers.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::sync::Arc;
use std::time::Duration;

use outbox_core::{Message, OwnedShard};
use sqlx::mysql::MySqlConnection;
use sqlx::{Connection, Executor};
use tokio::sync::Mutex;

use crate::config::MysqlConfig;
use crate::enqueue::MysqlOutbox;
use crate::reader::MysqlReader;
use crate::reading::{goes_past_a_part, loses_and_repeats_nothing, owning};
use crate::schema::migrate;
use crate::sql::{Sql, safe};

/// An outbox of its own.
struct Place {
    database: String,
    connection: Mutex<MySqlConnection>,
    config: MysqlConfig,
    sql: Arc<Sql>,
    outbox: MysqlOutbox,
    owned: Vec<OwnedShard>,
}

impl Place {
    async fn new(variable: &str) -> Self {
        let url = std::env::var(variable)
            .unwrap_or_else(|_| panic!("{variable} is not set: run scripts/services start mysql mariadb"));
        let (server, _) = url.rsplit_once('/').unwrap();
        let database = format!("t_{}_{:08x}", std::process::id(), fastrand::u32(..));
        let mut connection = MySqlConnection::connect(&url).await.unwrap();
        let make = format!("CREATE DATABASE `{database}`; USE `{database}`");
        connection.execute(safe(Arc::new(make))).await.unwrap();
        // Few, each with many rows.
        let config = MysqlConfig {
            shards: 4,
            ..MysqlConfig::new(format!("{server}/{database}"))
        };
        migrate(&config).await.unwrap();
        Self {
            database,
            connection: Mutex::new(connection),
            sql: Arc::new(Sql::new(&config)),
            outbox: MysqlOutbox::new(&config).unwrap(),
            owned: owning(config.shards),
            config,
        }
    }

    /// Most shards are read in one scan, few of many each by itself: all that there are are few for who takes them for that.
    /// And nothing is read anew for its age, which would hide what was passed over.
    async fn reader(&self, few: bool) -> MysqlReader {
        let told = MysqlConfig {
            shards: if few { 1_024 } else { self.config.shards },
            lag: Duration::from_millis(1),
            ..MysqlConfig::clone(&self.config)
        };
        MysqlReader::connect(&Arc::new(told), &self.sql).await.unwrap()
    }

    async fn enqueue(&self, messages: &[Message]) {
        let mut connection = self.connection.lock().await;
        let mut transaction = connection.begin().await.unwrap();
        self.outbox
            .enqueue_many(&mut transaction, messages)
            .await
            .unwrap();
        transaction.commit().await.unwrap();
    }

    async fn gone(self) {
        let drop = safe(Arc::new(format!("DROP DATABASE `{}`", self.database)));
        self.connection.into_inner().execute(drop).await.unwrap();
    }
}

async fn scans_that_stop_lose_and_repeat_nothing(variable: &str) {
    for seed in 0..8 {
        let mut random = fastrand::Rng::with_seed(seed);
        let (place, few) = (Place::new(variable).await, random.bool());
        let parts = place.reader(few).await.striding(random.usize(1..100));
        let enqueue = async |messages: &[Message]| place.enqueue(messages).await;
        loses_and_repeats_nothing(seed, &place.owned, enqueue, place.reader(few).await, parts).await;
        goes_past_a_part(&place.owned, place.reader(few).await.striding(1)).await;
        place.gone().await;
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
