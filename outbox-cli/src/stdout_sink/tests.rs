//! What becomes of lines when the output fails.

use outbox::{Message, Position, Shard};

use super::*;

/// Keeps what it takes; takes so much and then fails.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<FakeState>>);

#[derive(Default)]
struct FakeState {
    text: Vec<u8>,
    room: Option<usize>,
    fails_with: Option<io::ErrorKind>,
}

impl Fake {
    fn room(&self, room: usize, then: io::ErrorKind) {
        let mut state = self.0.lock().unwrap();
        state.room = Some(room);
        state.fails_with = Some(then);
    }

    fn endless_room(&self) {
        self.0.lock().unwrap().room = None;
    }

    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().text.clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

impl Write for Fake {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock().unwrap();
        let count = state.room.unwrap_or(usize::MAX).min(bytes.len());
        if count == 0 {
            return Err(state.fails_with.unwrap().into());
        }
        state.text.extend_from_slice(&bytes[..count]);
        state.room = state.room.map(|room| room - count);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Target for Fake {
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn sink() -> (StdoutSink, Fake, Gone) {
    let (fake, gone) = (Fake::default(), Gone::default());
    (StdoutSink::new(Box::new(fake.clone()), gone.clone()), fake, gone)
}

fn record(payload: &str) -> Record {
    Record {
        shard: Shard(0),
        position: Position(1),
        key_seq: None,
        attempts: 0,
        message: Message::builder("t")
            .key("k")
            .payload(payload.to_owned())
            .build()
            .unwrap(),
        defect: None,
    }
}

async fn publish(sink: &mut StdoutSink, payloads: &[&str]) -> Vec<&'static str> {
    let batch = payloads.iter().map(|payload| record(payload)).collect();
    sink.publish(batch)
        .await
        .outcomes()
        .await
        .iter()
        .map(Outcome::as_str)
        .collect()
}

fn payload(line: &str) -> String {
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    line["payload"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_full_disk_is_an_outage_and_the_torn_line_stands_alone() {
    let (mut sink, fake, _) = sink();
    assert_eq!(publish(&mut sink, &["one"]).await, ["delivered"]);
    let line = fake.lines()[0].len() + 1;
    fake.room(line + 20, io::ErrorKind::StorageFull);
    assert_eq!(
        publish(&mut sink, &["two", "3", "4"]).await,
        ["delivered", "outage", "outage"]
    );
    // Nothing of the key goes out before the purge.
    fake.endless_room();
    assert_eq!(publish(&mut sink, &["5"]).await, ["outage"]);

    sink.purge().await;
    assert_eq!(publish(&mut sink, &["3", "4"]).await, ["delivered", "delivered"]);
    let lines = fake.lines();
    assert_eq!(lines.len(), 5);
    assert_eq!(lines[2].len(), 20);
    let whole: Vec<String> = [0, 1, 3, 4].iter().map(|index| payload(&lines[*index])).collect();
    assert_eq!(whole, ["one", "two", "3", "4"]);
}

#[tokio::test]
async fn a_probe_ends_the_torn_line_when_there_is_room() {
    let (mut sink, fake, _) = sink();
    fake.room(5, io::ErrorKind::StorageFull);
    assert_eq!(publish(&mut sink, &["one"]).await, ["outage"]);
    sink.purge().await;
    assert_eq!(sink.probe().await.unwrap_err().kind(), ErrorKind::Unavailable);
    fake.endless_room();
    sink.probe().await.unwrap();
    assert_eq!(publish(&mut sink, &["one"]).await, ["delivered"]);
    assert_eq!(fake.lines().len(), 2);
}

#[tokio::test]
async fn when_the_reader_has_gone_the_batch_is_in_doubt() {
    let (mut sink, fake, gone) = sink();
    fake.room(200, io::ErrorKind::BrokenPipe);
    let outcomes = publish(&mut sink, &["one", "two", "three"]).await;
    assert_eq!((outcomes[0], outcomes[2]), ("unknown", "outage"));
    gone.wait().await;
}

#[tokio::test]
async fn what_was_purged_is_not_written() {
    let (mut sink, fake, _) = sink();
    let shared = sink.shared.clone();
    sink.purge().await;
    let written = shared.write(&[record("late")], 0);
    assert_eq!(written.outcomes[0].as_str(), "outage");
    assert!(fake.lines().is_empty());
}

#[test]
fn bytes_that_are_no_text_are_written_in_hex() {
    let message = Message::builder("t")
        .id("018f3f2e-7c1a-7000-8000-000000000001"
            .parse::<outbox::MessageId>()
            .unwrap())
        .key(vec![0xff, 0x00])
        .payload("a\"b\n")
        .header("h", "v")
        .header("h", vec![0x80])
        .content_type("text/plain")
        .build()
        .unwrap();
    assert_eq!(
        serde_json::to_string(&Line::new(&message, Some(3))).unwrap(),
        r#"{"id":"018f3f2e-7c1a-7000-8000-000000000001","topic":"t","key":{"hex":"ff00"},"payload":"a\"b\n","headers":[["h","v"],["h",{"hex":"80"}]],"content_type":"text/plain","key_seq":3,"created_at":null}"#
    );
}
