//! A sink that writes each message to stdout as one line of JSON, for pipes, tests and a first look.
//!
//! A line that was written counts as delivered: to a file it is synced first; what a pipe's reader does with it is
//! the reader's concern. Topic, key, payload and header values are text, or `{"hex": "ff00"}` where they are not UTF-8.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use outbox::{Error, ErrorKind, Outcome, Reason, Receipt, Record, Sink, SinkCapabilities};
use serde::{Serialize, Serializer};
use tokio::sync::Notify;

use crate::exit::{Code, Failure};
use crate::output;

/// Tells that the reader of stdout has gone and will not come back.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gone(Arc<Notify>);

impl Gone {
    /// Waits until it has gone.
    pub(crate) async fn wait(&self) {
        self.0.notified().await;
    }
}

/// Writes JSON lines. After a failure nothing more is written until the relay has purged.
pub(crate) struct StdoutSink {
    shared: Arc<Shared>,
    /// Why nothing is written until the next purge.
    closed: Option<Reason>,
    gone: Gone,
}

struct Shared {
    /// Held while a batch is written, by a thread that may block; never across an await.
    output: Mutex<Output>,
    /// Grows at each purge: a thread that still writes for an older one stops before its next write.
    generation: AtomicU64,
}

struct Output {
    writer: Box<dyn Target>,
    /// Whether the last write ended within a line; the next one first ends that line.
    torn: bool,
}

/// What lines are written to.
trait Target: Write + Send {
    /// Makes durable what was written, where that means anything.
    fn sync(&mut self) -> io::Result<()>;
}

/// At most so much goes out in one call, between which a purge can stop it.
const CHUNK: usize = 64 << 10;
/// How long to wait when a non-blocking stdout is full.
const FULL: Duration = Duration::from_millis(5);

impl StdoutSink {
    /// The sink for this process's stdout.
    pub(crate) fn open(gone: Gone) -> Result<Self, Failure> {
        let writer = target().map_err(|error| {
            Failure::new(Code::Unavailable, format!("open stdout: {error}")).because(&error)
        })?;
        Ok(Self::new(writer, gone))
    }

    fn new(writer: Box<dyn Target>, gone: Gone) -> Self {
        Self {
            shared: Arc::new(Shared {
                output: Mutex::new(Output { writer, torn: false }),
                generation: AtomicU64::new(0),
            }),
            closed: None,
            gone,
        }
    }
}

#[async_trait]
impl Sink for StdoutSink {
    fn capabilities(&self) -> SinkCapabilities {
        SinkCapabilities {
            name: "stdout",
            // The only failure is an outage, which stops everything.
            stops_key_at_failure: true,
        }
    }

    async fn publish(&mut self, batch: Vec<Record>) -> Receipt {
        if let Some(reason) = &self.closed {
            return Receipt::ready(vec![Outcome::Outage(reason.clone()); batch.len()]);
        }
        let records = batch.len();
        let shared = self.shared.clone();
        let generation = shared.generation.load(Ordering::SeqCst);
        let written = tokio::task::spawn_blocking(move || shared.write(&batch, generation)).await;
        let Ok(Written { outcomes, trouble }) = written else {
            return Receipt::ready(vec![Outcome::Unknown("writing was cut off".into()); records]);
        };
        if let Some(trouble) = trouble {
            self.closed = Some(trouble.to_string().as_str().into());
            if trouble.kind() == io::ErrorKind::BrokenPipe {
                self.gone.0.notify_one();
            }
        }
        Receipt::ready(outcomes)
    }

    async fn probe(&mut self) -> outbox::Result<()> {
        let shared = self.shared.clone();
        let ended = tokio::task::spawn_blocking(move || shared.end_torn_line()).await;
        match ended {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                Err(Error::new(ErrorKind::Unavailable, "write stdout", error.to_string()).with_source(error))
            }
            Err(error) => Err(Error::new(
                ErrorKind::Unavailable,
                "write stdout",
                "the runtime is shutting down",
            )
            .with_source(error)),
        }
    }

    async fn purge(&mut self) {
        self.shared.generation.fetch_add(1, Ordering::SeqCst);
        let shared = self.shared.clone();
        // Waits until a write that is under way has ended.
        let _ = tokio::task::spawn_blocking(move || drop(shared.lock())).await;
        self.closed = None;
    }

    async fn rebuild(&mut self) -> outbox::Result<()> {
        Ok(())
    }
}

/// What became of a batch.
struct Written {
    outcomes: Vec<Outcome>,
    trouble: Option<io::Error>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a batch, unless a purge has come in between.
    fn write(&self, batch: &[Record], generation: u64) -> Written {
        let mut text = Vec::new();
        let mut ends = Vec::with_capacity(batch.len());
        let mut output = self.lock();
        if output.torn {
            text.push(b'\n');
        }
        for record in batch {
            // Writing to memory does not fail, and nothing here has keys that JSON could not write.
            let _ = serde_json::to_writer(&mut text, &Line::of(record));
            text.push(b'\n');
            ends.push(text.len());
        }

        let mut done = 0;
        let mut trouble = None;
        while done < text.len() && trouble.is_none() {
            if self.generation.load(Ordering::SeqCst) != generation {
                trouble = Some(io::Error::other("dropped by the relay"));
                break;
            }
            match output.writer.write(&text[done..text.len().min(done + CHUNK)]) {
                Ok(0) => trouble = Some(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(FULL),
                Err(error) => trouble = Some(error),
            }
        }
        if done > 0 {
            output.torn = text[done - 1] != b'\n';
        }
        let mut in_doubt = trouble
            .as_ref()
            // What a reader that has gone had not read yet is lost.
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
        if done > 0
            && let Err(error) = output.writer.flush().and_then(|()| output.writer.sync())
        {
            in_doubt = true;
            trouble = Some(error);
        }
        let Some(error) = trouble else {
            return Written {
                outcomes: vec![Outcome::Delivered; batch.len()],
                trouble: None,
            };
        };
        let reason = Reason::from(error.to_string());
        let outcomes = ends
            .iter()
            .map(|end| match *end <= done {
                true if in_doubt => Outcome::Unknown(reason.clone()),
                true => Outcome::Delivered,
                false => Outcome::Outage(reason.clone()),
            })
            .collect();
        Written {
            outcomes,
            trouble: Some(error),
        }
    }

    /// Ends a line that was cut short, which also shows whether there is room again.
    fn end_torn_line(&self) -> io::Result<()> {
        let mut output = self.lock();
        if output.torn {
            output.writer.write_all(b"\n")?;
            output.torn = false;
        }
        output.writer.flush()
    }
}

impl fmt::Debug for StdoutSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StdoutSink")
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

/// Stdout without the buffer of the standard library: a line must not be half out when its batch is done.
#[cfg(unix)]
fn target() -> io::Result<Box<dyn Target>> {
    use std::os::fd::AsFd;

    struct Descriptor {
        file: std::fs::File,
        durable: bool,
    }

    impl Write for Descriptor {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.file.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.file.flush()
        }
    }

    impl Target for Descriptor {
        fn sync(&mut self) -> io::Result<()> {
            if self.durable {
                self.file.sync_data()
            } else {
                Ok(())
            }
        }
    }

    let file = std::fs::File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let durable = file.metadata()?.is_file();
    Ok(Box::new(Descriptor { file, durable }))
}

#[cfg(not(unix))]
fn target() -> io::Result<Box<dyn Target>> {
    impl Target for io::Stdout {
        fn sync(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    Ok(Box::new(io::stdout()))
}

/// A message as it is written.
#[derive(Serialize)]
pub(crate) struct Line<'a> {
    id: outbox::MessageId,
    topic: &'a str,
    /// None: no order.
    key: Option<Text<'a>>,
    /// None: a tombstone.
    payload: Option<Text<'a>>,
    headers: Vec<(&'a str, Text<'a>)>,
    content_type: Option<&'a str>,
    key_seq: Option<i64>,
    /// None also where the row has a time that cannot be written.
    created_at: Option<String>,
}

impl<'a> Line<'a> {
    fn of(record: &'a Record) -> Self {
        Self::new(&record.message, record.key_seq)
    }

    pub(crate) fn new(message: &'a outbox::Message, key_seq: Option<i64>) -> Self {
        Self {
            id: message.id(),
            topic: message.topic(),
            key: message.key().map(|key| Text(key)),
            payload: message.payload().map(|payload| Text(payload)),
            headers: message
                .headers()
                .iter()
                .map(|(name, value)| (name, Text(value)))
                .collect(),
            content_type: message.content_type(),
            key_seq,
            created_at: message.created_at().and_then(output::timestamp),
        }
    }
}

/// Bytes as text, or as `{"hex": …}` where they are none.
pub(crate) struct Text<'a>(pub(crate) &'a [u8]);

impl Serialize for Text<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        if let Ok(text) = str::from_utf8(self.0) {
            return serializer.serialize_str(text);
        }
        let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry("hex", &hex)?;
        map.end()
    }
}

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod tests;
