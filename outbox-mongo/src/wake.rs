//! A hint that there may be work: the outbox's change stream. Polling stays the truth.

use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use mongodb::bson::{Document, doc};
use mongodb::change_stream::ChangeStream as Stream;
use outbox_core::WakeUp;
use tokio::time::sleep;

use crate::session::{Sessions, Told};

/// How long is waited before a stream that could not be opened, or broke, is opened again.
const PAUSE: Duration = Duration::from_secs(1);

/// Follows what is inserted into an outbox. A stream that breaks, has lost its place or cannot be had begins anew, without
/// a word: at worst a relay finds its work at the next poll.
pub(crate) struct ChangeStream {
    sessions: Sessions,
    stream: Option<Stream<Document>>,
}

impl ChangeStream {
    pub(crate) fn new(sessions: &Sessions) -> Self {
        Self {
            sessions: sessions.clone(),
            stream: None,
        }
    }

    /// Opened only here, and kept: where it was dropped half-way it is opened anew.
    async fn opened(&mut self) -> Told<&mut Stream<Document>> {
        if self.stream.is_none() {
            let outbox = self.sessions.collections.outbox::<Document>();
            // Of a message nothing is told but that it is there.
            let inserts = [
                doc! { "$match": { "operationType": "insert" } },
                doc! { "$project": { "_id": 1 } },
            ];
            let opened = outbox.watch().pipeline(inserts).await?;
            self.stream = Some(opened.with_type());
        }
        self.stream
            .as_mut()
            .ok_or_else(|| mongodb::error::Error::custom("the stream is closed"))
    }
}

#[async_trait]
impl WakeUp for ChangeStream {
    async fn wait(&mut self) {
        loop {
            let told = match self.opened().await {
                Ok(stream) => stream.next().await.transpose(),
                Err(error) => Err(error),
            };
            match told {
                Ok(Some(_)) => return,
                Ok(None) | Err(_) => {
                    self.stream = None;
                    sleep(PAUSE).await;
                }
            }
        }
    }
}
