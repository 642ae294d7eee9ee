//! The writer of the end-to-end proof and its log.

mod proof;

use std::collections::BTreeMap;
use std::time::Duration;

use outbox::Message;
use proof::stamp::Stamp;
use proof::writer::{End, Load, Producer, WriterLog};

/// Counts in memory and commits nothing anywhere.
struct Nowhere(BTreeMap<String, u64>);

impl Producer for Nowhere {
    fn transact(
        &mut self,
        keys: &[String],
        message: &mut dyn FnMut(&str, u64) -> Message,
        _wait: Duration,
        commit: bool,
    ) -> End {
        let before = self.0.clone();
        for key in keys {
            let n = self.0.entry(key.clone()).or_default();
            *n += 1;
            let _ = message(key, *n);
        }
        if commit {
            return End::Committed;
        }
        self.0 = before;
        End::RolledBack
    }
}

#[test]
fn the_writers_log_tells_what_was_done_and_survives_its_writer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let load = Load {
        topic: "proof".to_owned(),
        messages: 500,
        keys: 20,
        producers: 1,
        rollback_each: 5,
        hold_each: 10,
        hold: Duration::ZERO,
        poison_each: 10,
        spread: Duration::ZERO,
    };
    load.write(&WriterLog::open(&path), || Nowhere(BTreeMap::new()));
    let written = WriterLog::read(&path);
    let count = |end| written.iter().filter(|written| written.end == end).count();
    assert_eq!((written.len(), count(End::Unknown)), (500, 0));
    assert!(count(End::RolledBack) > 0);
    assert!(written.iter().any(|written| written.stamp.poison));
    assert!(written.iter().any(|written| !written.stamp.poison));

    // The writer dies between an intent and its end, and again within a line.
    let stamp = Stamp::new("k1", 1);
    WriterLog::open(&path).intent(&stamp);
    let mut text = std::fs::read_to_string(&path).unwrap();
    text.push_str("committed 0199");
    std::fs::write(&path, text).unwrap();
    let written = WriterLog::read(&path);
    assert_eq!(written.len(), 501);
    assert_eq!((&written[500].stamp, written[500].end), (&stamp, End::Unknown));
}
