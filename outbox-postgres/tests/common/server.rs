//! A server of a test's own, to be stopped, restarted and misused.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::common::variable;

/// The user that servers run as when the tests run as root, with whom no PostgreSQL starts; scripts/services makes it.
const USER: &str = "outboxtest";

/// Running on 127.0.0.1, with the administrator `postgres` and no password for anybody. Gone when it is dropped.
pub(crate) struct Server {
    dir: TempDir,
    pub(crate) port: u16,
}

impl Server {
    /// With further lines of configuration.
    pub(crate) fn start(settings: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("outbox-pg-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let server = Self { dir, port };
        fs::create_dir(server.data()).unwrap();
        server.own(&server.data());
        server.run(
            "initdb",
            &[
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C",
                "--no-sync",
            ],
        );
        let settings = format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = ''\nfsync = off\n{settings}\n"
        );
        fs::write(server.data().join("postgresql.conf"), settings).unwrap();
        server.again();
        server
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A folder beside the data, which the server may enter.
    pub(crate) fn certificates(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    /// Gives a file to the server, which nobody else may read.
    pub(crate) fn own(&self, path: &Path) {
        let mode = if path.is_dir() { 0o700 } else { 0o600 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        if is_root() {
            let owned = Command::new("chown")
                .arg(format!("{USER}:"))
                .arg(path)
                .status()
                .unwrap();
            assert!(owned.success(), "scripts/services start makes the user {USER}");
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Starts it again.
    pub(crate) fn again(&self) {
        let log = self.data().join("log");
        self.run("pg_ctl", &["-w", "-s", "-l", &log.to_string_lossy(), "start"]);
    }

    /// `immediate` is a crash; `fast` is an orderly end.
    pub(crate) fn stop(&self, how: &str) {
        self.run("pg_ctl", &["-w", "-s", "-m", how, "stop"]);
    }

    fn command(&self, program: &str) -> Command {
        let program = format!("{}/{program}", variable("OUTBOX_TEST_POSTGRES_BIN"));
        let mut command = if is_root() {
            let mut command = Command::new("setpriv");
            command.args([
                &format!("--reuid={USER}"),
                &format!("--regid={USER}"),
                "--clear-groups",
                &program,
            ]);
            command
        } else {
            Command::new(program)
        };
        command.arg("-D").arg(self.data()).current_dir("/");
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        // Not through pipes, which the server would inherit and keep open.
        let printed = self.dir.path().join("printed");
        let file = fs::File::create(&printed).unwrap();
        let status = self
            .command(program)
            .args(arguments)
            .stdin(std::process::Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .status()
            .unwrap();
        assert!(
            status.success(),
            "{program}: {}{}",
            fs::read_to_string(printed).unwrap_or_default(),
            fs::read_to_string(self.data().join("log")).unwrap_or_default()
        );
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self
            .command("pg_ctl")
            .args(["-w", "-s", "-m", "immediate", "stop"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status();
    }
}

fn is_root() -> bool {
    let own = Command::new("id").arg("-u").output().unwrap();
    own.stdout.starts_with(b"0")
}
