//! Enqueue in a transaction, relay, receive: everything in memory, so that it runs anywhere.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::sync::Arc;

use outbox::{MemorySink, MemoryStore, Message, Relay};

#[tokio::main(flavor = "current_thread")]
async fn main() -> outbox::Result<()> {
    let store = MemoryStore::default();

    // Business change and message commit together, or not at all.
    let mut tx = store.begin();
    store
        .enqueue(&mut tx, &Message::json("orders", &"placed").key("42").build()?)
        .await?;
    store
        .enqueue(&mut tx, &Message::json("orders", &"paid").key("42").build()?)
        .await?;
    tx.commit();

    let mut tx = store.begin();
    store
        .enqueue(
            &mut tx,
            &Message::json("orders", &"never happened").key("42").build()?,
        )
        .await?;
    tx.rollback();

    // A service would use `run` and a shutdown signal; `drain` stops when nothing is left.
    let sink = MemorySink::default();
    Relay::new(Arc::new(store), Box::new(sink.clone()))
        .drain(std::future::pending())
        .await?;

    for record in sink.delivered() {
        let payload = record.message.payload().cloned().unwrap_or_default();
        println!("{} {}", record.message.topic(), String::from_utf8_lossy(&payload));
    }
    Ok(())
}
