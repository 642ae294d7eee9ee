//! Relays whose clocks are wrong. The processes run under libfaketime, which takes what it is to add from a file.
#![allow(dead_code, reason = "for faults")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// The clocks of all relays of a stage.
#[derive(Debug)]
pub(crate) struct Clocks {
    library: String,
    file: PathBuf,
}

impl Clocks {
    /// Right ones.
    pub(super) fn new(folder: &Path) -> Self {
        let clocks = Self {
            library: library().unwrap_or_else(|| panic!("faketime is not installed")),
            file: folder.join("clock"),
        };
        clocks.set_by(0);
        clocks
    }

    /// Sets them to so many seconds before or after the time that it is. A process sees it within a second.
    pub(crate) fn set_by(&self, seconds: i64) {
        // Renamed, so that nobody reads half of it.
        let new = self.file.with_extension("new");
        std::fs::write(&new, format!("{seconds:+}\n")).unwrap();
        std::fs::rename(new, &self.file).unwrap();
    }

    /// What a relay needs to see them. Time that is measured goes on as it does: only the time of day is wrong.
    pub(super) fn environment(&self) -> [(&'static str, String); 4] {
        [
            ("LD_PRELOAD", self.library.clone()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.display().to_string()),
            ("FAKETIME_CACHE_DURATION", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
    }
}

/// Whether clocks can be wrong on this machine.
pub(crate) fn can_be_set() -> bool {
    library().is_some()
}

/// What has to be loaded into a process, as the program of the same package says.
fn library() -> Option<String> {
    let asked = Command::new("faketime")
        .args(["-f", "+0", "sh", "-c", "echo $LD_PRELOAD"])
        .output();
    let said = asked.ok().filter(|output| output.status.success())?;
    let library = String::from_utf8(said.stdout).ok()?.trim().to_owned();
    (!library.is_empty()).then_some(library)
}
