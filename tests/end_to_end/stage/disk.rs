//! A small disk of a database's own, which can be full: memory, mounted. That takes an administrator on Linux.
#![allow(dead_code, reason = "for faults")]

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// It goes with its contents.
#[derive(Debug)]
pub(crate) struct Disk(PathBuf);

/// The folder that it is mounted on.
const NAME: &str = "disk";

/// What takes the room that is left.
const FILLER: &str = "filler";

impl Disk {
    /// One of so many MiB, in a folder.
    pub(super) fn mount(folder: &Path, size: u32) -> io::Result<Self> {
        let place = folder.join(NAME);
        std::fs::create_dir(&place)?;
        // A server that runs as another user has to get there, and to see nothing on the way.
        std::fs::set_permissions(folder, Permissions::from_mode(0o711))?;
        let disk = Self(place);
        let size = format!("size={size}m,mode=755");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(&disk.0))?;
        Ok(disk)
    }

    pub(super) fn folder(&self) -> &Path {
        &self.0
    }

    /// Whether a database that is to be made in this folder has a disk of its own.
    pub(super) fn is(folder: &Path) -> bool {
        folder.ends_with(NAME)
    }

    /// Takes all the room that is left, and again what becomes free meanwhile.
    pub(crate) fn fill(&self) {
        let free = Command::new("df")
            .args(["--output=avail", "-B1"])
            .arg(&self.0)
            .output()
            .unwrap();
        let free = String::from_utf8(free.stdout).unwrap();
        let free: u64 = free.lines().last().unwrap().trim().parse().unwrap();
        let file = self.0.join(FILLER);
        let taken = std::fs::metadata(&file).map_or(0, |file| file.len());
        if free > 0 {
            let size = (taken + free).to_string();
            // What was taken by others in the same moment is no failure.
            let _ = run(Command::new("fallocate").args(["-l", &size]).arg(&file));
        }
    }

    /// Gives the room back.
    pub(crate) fn free(&self) {
        std::fs::remove_file(self.0.join(FILLER)).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: what is still open goes when it is closed.
        let _ = run(Command::new("umount").arg("-l").arg(&self.0));
    }
}

/// Whether there can be one on this machine.
pub(crate) fn can_be_mounted() -> bool {
    let Ok(folder) = tempfile::tempdir() else {
        return false;
    };
    Disk::mount(folder.path(), 1).is_ok()
}

fn run(command: &mut Command) -> io::Result<()> {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(status.to_string()))
    }
}
