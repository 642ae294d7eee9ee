//! What names a message in every log, and the message that is made of it.
//!
//! A message is made of its stamp alone, so the oracle can make it again and compare every byte.

use std::fmt;

use outbox::{Message, MessageId};

/// The `n`-th message of its key, as its producer counted in the transaction that wrote it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Stamp {
    pub(crate) id: MessageId,
    pub(crate) key: String,
    pub(crate) n: u64,
    /// Whether it is larger than the topic takes: a dead letter, in the end.
    pub(crate) poison: bool,
}

impl Stamp {
    /// A stamp with an id of its own.
    pub(crate) fn new(key: &str, n: u64) -> Self {
        Self {
            id: MessageId::new(),
            key: key.to_owned(),
            n,
            poison: false,
        }
    }

    /// The message: awkward on purpose, with bytes that are no text, an empty header and a name that comes twice.
    pub(crate) fn message(&self, topic: &str) -> Message {
        Message::builder(topic)
            .id(self.id)
            .key(self.key.clone())
            .payload(self.payload())
            .content_type(CONTENT_TYPE)
            .header("n", self.n.to_string())
            .header("twice", vec![0xff, 0x00, self.id.as_bytes()[15]])
            .header("empty", "")
            .header("twice", "again")
            .build()
            .unwrap()
    }

    /// The stamp in words, up to 300 bytes that look random, or many more, a checksum of both.
    fn payload(&self) -> Vec<u8> {
        let mut payload = format!("{self}\n").into_bytes();
        let mut random = fastrand::Rng::with_seed(u64::from(crc32(self.id.as_bytes())));
        let filler = random.usize(0..300) + if self.poison { LARGEST } else { 0 };
        payload.extend((0..filler).map(|_| random.u8(..)));
        let checksum = crc32(&payload);
        payload.extend(checksum.to_be_bytes());
        payload
    }

    /// Reads the stamp out of a payload; none when it is damaged.
    pub(crate) fn read(payload: &[u8]) -> Option<Self> {
        let (content, checksum) = payload.split_last_chunk()?;
        if crc32(content) != u32::from_be_bytes(*checksum) {
            return None;
        }
        let line = content.split(|byte| *byte == b'\n').next()?;
        Self::parse(str::from_utf8(line).ok()?)
    }

    /// Reads what `Display` wrote.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let stamp = Self {
            id: words.next()?.parse().ok()?,
            key: words.next()?.to_owned(),
            n: words.next()?.parse().ok()?,
            poison: match words.next() {
                None => false,
                Some(word) => (word == POISON).then_some(true)?,
            },
        };
        words.next().is_none().then_some(stamp)
    }
}

/// The largest record that a topic takes which has to refuse poison.
pub(crate) const LARGEST: usize = 20_000;

/// The last word of a stamp that is poison.
const POISON: &str = "poison";

/// The content type of every message of the proof.
const CONTENT_TYPE: &str = "application/x-proof";

/// As the logs hold it. Keys of the proof have no spaces.
impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.id, self.key, self.n)?;
        if self.poison {
            write!(f, " {POISON}")?;
        }
        Ok(())
    }
}

/// The checksum of zip and Ethernet, bit by bit: there is little to check and nothing to depend on.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let shifted = |crc: u32| (crc >> 1) ^ (0xedb8_8320 * (crc & 1));
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| shifted(crc))
    })
}
