//! An order service on SQLite: order and message in one transaction, and a consumer whose effects happen once.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::sync::Arc;

use outbox::sqlite::rusqlite::Connection;
use outbox::sqlite::{SqliteConfig, SqliteInbox, SqliteOutbox, SqliteStore, migrate};
use outbox::{MemorySink, Message, Receive, Relay};

type Error = Box<dyn std::error::Error>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let folder = tempfile::tempdir()?;
    let config = SqliteConfig::new(folder.path().join("shop.db"));
    migrate(&config)?;

    place_order(&config, 42, 12)?;

    // A service would publish to Kafka: `Box::new(KafkaSink::new(&KafkaConfig::new("localhost:9092"))?)`.
    let sink = MemorySink::default();
    let store = SqliteStore::open(config.clone())?;
    Relay::new(Arc::new(store), Box::new(sink.clone()))
        .drain(std::future::pending())
        .await?;

    // At least once means that a message may come twice.
    let received = sink.delivered();
    for record in received.iter().chain(&received) {
        handle(&config, &record.message)?;
    }
    let revenue: i64 =
        Connection::open(&config.path)?.query_row("SELECT total FROM revenue", [], |row| row.get(0))?;
    println!("revenue: {revenue}");
    Ok(())
}

/// The producer: what it does and what it says commit together.
fn place_order(config: &SqliteConfig, order: u32, total: i64) -> Result<(), Error> {
    let outbox = SqliteOutbox::new(config)?;
    let mut connection = Connection::open(&config.path)?;
    connection.execute_batch("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, total INTEGER)")?;
    let tx = connection.transaction()?;
    tx.execute("INSERT INTO orders VALUES (?1, ?2)", (order, total))?;
    outbox.enqueue(
        &tx,
        &Message::json("orders", &total).key(order.to_string()).build()?,
    )?;
    tx.commit()?;
    Ok(())
}

/// The consumer: the inbox first, then the effect, then the commit; only then would it commit the offset.
fn handle(config: &SqliteConfig, message: &Message) -> Result<(), Error> {
    let inbox = SqliteInbox::new(config)?;
    let mut connection = Connection::open(&config.path)?;
    connection.execute_batch("CREATE TABLE IF NOT EXISTS revenue (total INTEGER)")?;
    let tx = connection.transaction()?;
    if inbox.receive(&tx, "bookkeeping", message.id())? == Receive::Duplicate {
        println!("a duplicate, dropped");
        return Ok(());
    }
    let total: i64 = std::str::from_utf8(message.payload().ok_or("a tombstone")?)?.parse()?;
    tx.execute("INSERT INTO revenue VALUES (?1)", [total])?;
    tx.commit()?;
    Ok(())
}
