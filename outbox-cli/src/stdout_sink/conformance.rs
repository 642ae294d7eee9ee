//! The public suite for sinks, run on this one: over an output in memory that fails as it is told.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use outbox::conformance::{SinkFault, SinkHarness};
use outbox::{Message, MessageId, Sink};
use serde_json::Value;

use super::{Gone, StdoutSink, Target};

outbox::sink_conformance!(Destination, on_memory, flavor = "multi_thread");

/// A file of endless patience, unless told otherwise.
#[derive(Clone, Default)]
struct Destination(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    text: Vec<u8>,
    /// So much is still taken before the disk is full.
    room: Option<usize>,
    delay: Duration,
}

impl Write for Destination {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock().unwrap();
        std::thread::sleep(state.delay);
        let count = state.room.unwrap_or(usize::MAX).min(bytes.len());
        if count == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        state.text.extend_from_slice(&bytes[..count]);
        state.room = state.room.map(|room| room - count);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Target for Destination {
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[async_trait]
impl SinkHarness for Destination {
    async fn fresh() -> Self {
        Self::default()
    }

    async fn sink(&self) -> Box<dyn Sink> {
        Box::new(StdoutSink::new(Box::new(self.clone()), Gone::default()))
    }

    /// All whole lines; one that was cut short is none.
    async fn delivered(&self) -> Vec<Message> {
        let text = String::from_utf8(self.0.lock().unwrap().text.clone()).unwrap();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .map(|line| message(&line))
            .collect()
    }

    fn faults(&self) -> &'static [SinkFault] {
        &[SinkFault::Outage, SinkFault::Heal, SinkFault::Delay]
    }

    async fn inject(&self, fault: SinkFault, _: MessageId) {
        let mut state = self.0.lock().unwrap();
        match fault {
            // It is full in the middle of a line, as disks are.
            SinkFault::Outage => state.room = Some(20),
            SinkFault::Heal => state.room = None,
            SinkFault::Delay => state.delay = Duration::from_millis(150),
            other => panic!("{other:?} is not listed"),
        }
    }

    async fn poison(&self, _: &'static str) -> Option<Message> {
        None
    }
}

/// The message that a line stands for.
fn message(line: &Value) -> Message {
    let mut builder = Message::builder(line["topic"].as_str().unwrap()).id(line["id"]
        .as_str()
        .unwrap()
        .parse::<MessageId>()
        .unwrap());
    if let Some(key) = bytes(&line["key"]) {
        builder = builder.key(key);
    }
    if let Some(payload) = bytes(&line["payload"]) {
        builder = builder.payload(payload);
    }
    if let Some(content_type) = line["content_type"].as_str() {
        builder = builder.content_type(content_type);
    }
    for header in line["headers"].as_array().unwrap() {
        builder = builder.header(header[0].as_str().unwrap(), bytes(&header[1]).unwrap());
    }
    builder.build().unwrap()
}

fn bytes(value: &Value) -> Option<Vec<u8>> {
    if let Some(hex) = value["hex"].as_str() {
        let digits: Vec<char> = hex.chars().collect();
        return digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(&String::from_iter(pair), 16).ok())
            .collect();
    }
    value.as_str().map(|text| text.as_bytes().to_vec())
}
