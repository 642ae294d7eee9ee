//! What the oracle found, as people read it.

use std::collections::BTreeMap;
use std::fmt;

/// The oracle's findings: figures, and of each law how often it was broken and by what first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Report {
    pub(crate) committed: usize,
    pub(crate) rolled_back: usize,
    pub(crate) unknown: usize,
    pub(crate) arrived: usize,
    pub(crate) distinct: usize,
    pub(crate) dead: usize,
    pub(crate) lost: usize,
    pub(crate) phantoms: usize,
    pub(crate) damaged: usize,
    pub(crate) gaps: usize,
    pub(crate) duplicates: usize,
    /// How often keys went back, all together; and the one that did most often.
    pub(crate) rewinds: usize,
    pub(crate) most_rewinds: usize,
    /// The most records of a key that one rewind repeated.
    pub(crate) most_repeats: usize,
    broken: BTreeMap<&'static str, Broken>,
}

#[derive(Debug, Clone, Default)]
struct Broken {
    times: usize,
    first: Vec<String>,
}

/// How many offenders of each law are named.
const NAMED: usize = 5;

impl Report {
    /// Notes that a law was broken.
    pub(super) fn violation(&mut self, law: &'static str, what: String) {
        let broken = self.broken.entry(law).or_default();
        broken.times += 1;
        if broken.first.len() < NAMED {
            broken.first.push(what);
        }
    }

    /// The laws that were broken.
    pub(crate) fn broken(&self) -> Vec<&'static str> {
        self.broken.keys().copied().collect()
    }

    /// Fails the test, with everything that was found, when a law was broken.
    pub(crate) fn assert_kept(&self) {
        assert!(self.broken.is_empty(), "the promise was broken\n{self}");
    }
}

/// A small table, then the offenders.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: [(&str, &[(&str, usize)]); 4] = [
            (
                "I1",
                &[
                    ("committed", self.committed),
                    ("delivered", self.distinct),
                    ("dead", self.dead),
                    ("unknown", self.unknown),
                    ("lost", self.lost),
                ],
            ),
            (
                "I2",
                &[
                    ("rolled back", self.rolled_back),
                    ("phantoms", self.phantoms),
                    ("damaged", self.damaged),
                ],
            ),
            ("I3", &[("gaps", self.gaps)]),
            (
                "I4",
                &[
                    ("records", self.arrived),
                    ("duplicates", self.duplicates),
                    ("rewinds", self.rewinds),
                    ("most of a key", self.most_rewinds),
                    ("longest", self.most_repeats),
                ],
            ),
        ];
        for (law, figures) in rows {
            write!(f, "  {law} {}", self.verdict(law))?;
            for (name, figure) in figures {
                write!(f, "  {name} {figure}")?;
            }
            writeln!(f)?;
        }
        let [effects, liveness, resources] = ["I5", "I6", "I7"].map(|law| self.verdict(law));
        writeln!(f, "  I5 {effects}  I6 {liveness}  I7 {resources}")?;
        for (law, broken) in &self.broken {
            writeln!(f, "  {law} was broken {} times, first by", broken.times)?;
            for what in &broken.first {
                writeln!(f, "    {what}")?;
            }
        }
        Ok(())
    }
}

impl Report {
    fn verdict(&self, law: &str) -> &'static str {
        if self.broken.contains_key(law) {
            "BROKEN"
        } else {
            "kept  "
        }
    }
}
