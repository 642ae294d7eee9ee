//! The outbox table that a company already has, read by the relay as it is: nothing of it changes, nor do its producers.
//!
//! `store.rs` is the part to copy. Run it against a MySQL or MariaDB server on which it may make a database:
//!
//! ```sh
//! cargo run --example 4_classic_table -- mysql://root:secret@localhost/mysql
//! ```
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod store;

use std::sync::Arc;

use async_trait::async_trait;
use outbox::{Outcome, Receipt, Record, Relay, Sink, SinkCapabilities};
use sqlx::{AssertSqlSafe, Connection, Executor, MySqlConnection};
use store::{CLASSIC, ClassicStore};

type Error = Box<dyn std::error::Error>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let url = std::env::args()
        .nth(1)
        .or(std::env::var("OUTBOX_TEST_MYSQL").ok());
    let url = url.ok_or("tell the server's URL: mysql://user:password@host/database")?;
    let database = format!("outbox_example_{}", std::process::id());
    let mut server = MySqlConnection::connect(&url).await?;
    server
        .execute(AssertSqlSafe(format!("CREATE DATABASE {database}")))
        .await?;
    let (server_url, _) = url.rsplit_once('/').ok_or("the URL names no database")?;
    let shown = show(&format!("{server_url}/{database}")).await;
    server
        .execute(AssertSqlSafe(format!("DROP DATABASE {database}")))
        .await?;
    shown
}

async fn show(url: &str) -> Result<(), Error> {
    let mut connection = MySqlConnection::connect(url).await?;
    connection.execute(CLASSIC).await?;
    connection
        .execute("CREATE TABLE orders (id BIGINT PRIMARY KEY, state VARCHAR(20) NOT NULL)")
        .await?;
    place_order(&mut connection, 42).await?;
    place_order(&mut connection, 43).await?;

    // A service would call `run` instead of `drain`, and publish to Kafka.
    let store = ClassicStore::connect(url).await?;
    Relay::new(Arc::new(store), Box::new(Printer))
        .drain(std::future::pending())
        .await?;

    let rows: Vec<(i64, String)> = sqlx::query_as("SELECT id, CAST(status AS CHAR) FROM outbox ORDER BY id")
        .fetch_all(&mut connection)
        .await?;
    for (id, status) in rows {
        println!("row {id}: {status}");
    }
    Ok(())
}

/// The application, which knows of no framework: the order and what is said of it commit together.
async fn place_order(connection: &mut MySqlConnection, order: i64) -> Result<(), Error> {
    let mut tx = connection.begin().await?;
    sqlx::query("INSERT INTO orders VALUES (?, 'placed')")
        .bind(order)
        .execute(&mut *tx)
        .await?;
    for event in ["placed", "paid"] {
        sqlx::query("INSERT INTO outbox (payload) VALUES (JSON_OBJECT('event', ?, 'order_id', ?))")
            .bind(event)
            .bind(order)
            .execute(&mut *tx)
            .await?;
    }
    tx.commit().await?;
    Ok(())
}

/// Prints each message and is done with it.
#[derive(Debug)]
struct Printer;

#[async_trait]
impl Sink for Printer {
    fn capabilities(&self) -> SinkCapabilities {
        SinkCapabilities {
            name: "printer",
            stops_key_at_failure: true,
        }
    }

    async fn publish(&mut self, batch: Vec<Record>) -> Receipt {
        for Record { message, .. } in &batch {
            let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
            let (key, payload) = (
                message.key().map(AsRef::as_ref),
                message.payload().map(AsRef::as_ref),
            );
            println!("to {}, key {}: {}", message.topic(), text(key), text(payload));
        }
        Receipt::ready(vec![Outcome::Delivered; batch.len()])
    }

    async fn probe(&mut self) -> outbox::Result<()> {
        Ok(())
    }

    async fn purge(&mut self) {}

    async fn rebuild(&mut self) -> outbox::Result<()> {
        Ok(())
    }
}
