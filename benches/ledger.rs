//! Which messages must arrive, and in which order: what a topic is checked against.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// How messages are made. Message `n` begins with its number, and its key is a number as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Flow {
    /// Bytes of each payload, at least [`DIGITS`].
    pub(crate) size: usize,
    /// Among how many keys the messages take turns.
    pub(crate) keys: u64,
    /// Messages with a lower number than this share one more key.
    pub(crate) apart: u64,
}

/// With so many digits a payload begins.
pub(crate) const DIGITS: usize = 20;

impl Flow {
    pub(crate) const fn new(size: usize, keys: u64) -> Self {
        Self { size, keys, apart: 0 }
    }

    pub(crate) const fn key(&self, number: u64) -> u64 {
        if number < self.apart {
            self.keys
        } else {
            number % self.keys
        }
    }

    pub(crate) fn payload(&self, number: u64) -> Vec<u8> {
        let mut payload = format!("{number:0DIGITS$}").into_bytes();
        payload.resize(self.size, b'x');
        payload
    }

    /// The number that a payload begins with.
    pub(crate) fn number(payload: &[u8]) -> Option<u64> {
        std::str::from_utf8(payload.get(..DIGITS)?).ok()?.parse().ok()
    }
}

/// What has arrived so far, and what was wrong with it.
#[derive(Debug, Clone)]
pub(crate) struct Ledger {
    flow: Flow,
    /// Of each key, the number that must come next.
    next: Vec<u64>,
    /// What was passed over.
    missing: BTreeSet<u64>,
    pub(crate) arrived: u64,
    pub(crate) duplicates: u64,
    pub(crate) inversions: u64,
    pub(crate) strangers: u64,
}

impl Ledger {
    /// Nothing has arrived, and the first message is number `from`.
    pub(crate) fn new(flow: Flow, from: u64) -> Self {
        let first = |key: u64| {
            let from = from.max(flow.apart);
            from + (key + flow.keys - from % flow.keys) % flow.keys
        };
        let apart = if from < flow.apart { from } else { u64::MAX };
        Self {
            flow,
            next: (0..flow.keys).map(first).chain([apart]).collect(),
            missing: BTreeSet::new(),
            arrived: 0,
            duplicates: 0,
            inversions: 0,
            strangers: 0,
        }
    }

    /// A message has arrived, after all others of its key that were told before.
    pub(crate) fn arrive(&mut self, key: Option<&[u8]>, payload: Option<&[u8]>) {
        self.arrived += 1;
        let number = payload.and_then(Flow::number);
        let key = key.and_then(|key| std::str::from_utf8(key).ok()?.parse::<u64>().ok());
        let Some((number, key)) = number
            .zip(key)
            .filter(|(number, key)| self.flow.key(*number) == *key)
            .filter(|_| payload.is_some_and(|payload| payload.len() == self.flow.size))
        else {
            self.strangers += 1;
            return;
        };
        let step = self.step(key);
        let Some(next) = usize::try_from(key).ok().and_then(|key| self.next.get_mut(key)) else {
            self.strangers += 1;
            return;
        };
        if number < *next {
            // What comes after its successors is late; what came before is here twice.
            if self.missing.remove(&number) {
                self.inversions += 1;
            } else {
                self.duplicates += 1;
            }
            return;
        }
        let mut passed = *next;
        *next = number + step;
        while passed < number {
            self.missing.insert(passed);
            passed += step;
        }
    }

    /// What is wrong, when messages below `to` should have arrived; with none, only what came is looked at.
    pub(crate) fn verdict(&self, to: Option<u64>) -> Result<(), String> {
        let mut lost = self.missing.len() as u64;
        if let Some(to) = to {
            for (key, next) in (0..).zip(&self.next) {
                let end = if key == self.flow.keys {
                    to.min(self.flow.apart)
                } else {
                    to
                };
                lost += end.saturating_sub(*next).div_ceil(self.step(key));
            }
        }
        let faults = [
            (lost, "lost"),
            (self.duplicates, "twice"),
            (self.inversions, "out of order"),
            (self.strangers, "unknown"),
        ];
        let told: Vec<String> = faults
            .into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        if told.is_empty() {
            return Ok(());
        }
        Err(format!(
            "of {} messages that arrived: {}",
            self.arrived,
            told.join(", ")
        ))
    }

    const fn step(&self, key: u64) -> u64 {
        if key == self.flow.keys { 1 } else { self.flow.keys }
    }
}
