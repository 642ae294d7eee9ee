//! Servers of a test's own, which nobody else misses while they are down.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::disk::Disk;

/// A server that `scripts/services` has started for one test. Its data lives as long as it does.
#[derive(Debug)]
pub(crate) struct OwnServer {
    /// As `scripts/services` calls it.
    name: &'static str,
    /// Stands for a checkout: `scripts/services` keeps the servers of each checkout apart.
    checkout: PathBuf,
    /// Where its data are, if not where `scripts/services` puts them.
    disk: Option<PathBuf>,
}

impl OwnServer {
    /// Starts it; what it needs of the disk is named after this folder, or in it if it is a disk of the stage's own.
    pub(crate) fn start(name: &'static str, folder: &Path) -> Self {
        let disk = Disk::is(folder).then(|| folder.to_owned());
        let checkout = folder.join("checkout");
        std::fs::create_dir(&checkout).unwrap();
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts");
        std::os::unix::fs::symlink(scripts, checkout.join("scripts")).unwrap();
        let server = Self { name, checkout, disk };
        server.services("start");
        server
    }

    /// What `scripts/services env` says of it, after `OUTBOX_TEST_` and its name: before and after a restart the same.
    pub(crate) fn variable(&self, suffix: &str) -> String {
        let name = format!("export OUTBOX_TEST_{}{suffix}=", self.name.to_uppercase());
        let lines = self.services("env");
        let value = lines.lines().find_map(|line| line.strip_prefix(&name));
        value.unwrap().to_owned()
    }

    /// Ends it by this signal, without waiting.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = std::fs::read_to_string(self.checkout.join("target/services").join(self.name).join("pid"));
        super::relay::signal(pid.unwrap().trim(), signal);
    }

    /// Brings it back, with its data, and waits until it answers.
    pub(crate) fn restart(&self) {
        self.services("start");
    }

    fn services(&self, command: &str) -> String {
        let output = self.command(command).stderr(Stdio::inherit()).output().unwrap();
        assert!(
            output.status.success(),
            "scripts/services {command} {} failed",
            self.name
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn command(&self, command: &str) -> Command {
        let mut services = Command::new(self.checkout.join("scripts/services"));
        services.args([command, self.name]);
        if let Some(disk) = &self.disk {
            services.env("OUTBOX_SERVICES_DIR", disk);
        }
        services
    }
}

/// What a failed test leaves behind tells why: then the data stay, in a folder that is told.
impl Drop for OwnServer {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        let command = if failed { "stop" } else { "clean" };
        let _ = self.command(command).status();
        // The folder that was made for this checkout, outside of it.
        if let Ok(base) = std::fs::read_link(self.checkout.join("target/services")) {
            if failed {
                super::say(&format!("the server's data are kept in {}", base.display()));
            } else {
                let _ = std::fs::remove_dir_all(base);
            }
        }
    }
}
