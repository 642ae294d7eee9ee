//! One key's way through the topic: how far it came, and how often and how far it went back.

/// The figures of one key, record by record.
#[derive(Debug)]
pub(super) struct Walk {
    /// Where its first record is, and all others belong.
    pub(super) partition: i32,
    /// The highest number so far.
    pub(super) highest: u64,
    last: u64,
    /// How many records in a row were seen before.
    repeats: usize,
    pub(super) most_repeats: usize,
    pub(super) rewinds: usize,
}

impl Walk {
    pub(super) fn new(partition: i32) -> Self {
        Self {
            partition,
            highest: 0,
            last: 0,
            repeats: 0,
            most_repeats: 0,
            rewinds: 0,
        }
    }

    /// The next record of the key.
    pub(super) fn step(&mut self, n: u64) {
        if n > self.highest {
            self.highest = n;
            self.repeats = 0;
        } else if self.repeats == 0 || n <= self.last {
            self.rewinds += 1;
            self.repeats = 1;
        } else {
            self.repeats += 1;
        }
        self.last = n;
        self.most_repeats = self.most_repeats.max(self.repeats);
    }
}
