//! The simple exact reader: what is undelivered, not in flight and not held, oldest first, in one look.

use std::collections::HashSet;

use async_trait::async_trait;

use super::lock;
use super::store::MemoryStore;
use crate::error::Result;
use crate::fetch::{FetchRequest, Fetched};
use crate::store::Reader;

/// Reads under the state's lock, which is a snapshot. It keeps no cursor and so needs no rereads.
#[derive(Debug)]
pub(super) struct MemoryReader(pub(super) MemoryStore);

#[async_trait]
impl Reader for MemoryReader {
    async fn fetch(&mut self, request: &FetchRequest) -> Result<Fetched> {
        let shards: HashSet<_> = request.shards.iter().map(|owned| owned.shard).collect();
        let in_flight: HashSet<_> = request.in_flight.iter().copied().collect();
        let held = &request.held;
        let state = lock(&self.0.inner.state);
        let mut records = Vec::new();
        let mut bytes = 0;
        let mut more = false;
        for (position, row) in &state.rows {
            if !shards.contains(&row.shard) || in_flight.contains(&(row.shard, *position)) {
                continue;
            }
            let is_held = held.topics.contains(row.message.topic())
                || match row.message.order_key() {
                    Some(key) => held.keys.contains(&(row.shard, key)),
                    None => held.messages.contains(&(row.shard, *position)),
                };
            if is_held {
                continue;
            }
            let size = row.message.size();
            if records.len() >= request.max_rows || (!records.is_empty() && bytes + size > request.max_bytes)
            {
                more = true;
                break;
            }
            bytes += size;
            records.push(row.record(*position));
        }
        Ok(Fetched::Batch { records, more })
    }
}
