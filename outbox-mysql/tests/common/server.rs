//! A server of a test's own, to be stopped, restarted and misused.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outbox_mysql::sqlx::{Connection, MySqlConnection};
use tempfile::TempDir;

use crate::common::{Server, until};

/// The user that servers run as when the tests run as root, as whom neither starts; scripts/services makes it.
const USER: &str = "outboxtest";

/// Running on 127.0.0.1, with the administrator `root` without a password. Gone when it is dropped.
pub(crate) struct OwnServer {
    kind: Server,
    dir: TempDir,
    port: u16,
    running: Mutex<Option<Child>>,
}

impl OwnServer {
    pub(crate) async fn start(kind: Server) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("outbox-mysql-")
            .tempdir()
            .unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        // Below those that systems give to clients: it has to be free again when the server comes back.
        let port = loop {
            let port = fastrand::u16(20_000..32_000);
            if TcpListener::bind(("127.0.0.1", port)).is_ok() {
                break port;
            }
        };
        let server = Self {
            kind,
            dir,
            port,
            running: Mutex::new(None),
        };
        for folder in [server.data(), server.temporary()] {
            fs::create_dir(&folder).unwrap();
            if is_root() {
                let owned = Command::new("chown")
                    .arg(format!("{USER}:"))
                    .arg(folder)
                    .status()
                    .unwrap();
                assert!(owned.success(), "scripts/services start makes the user {USER}");
            }
        }
        let made = match kind {
            Server::Mysql => server
                .command("mysqld")
                .args([
                    "--initialize-insecure",
                    "--skip-log-bin",
                    "--innodb-flush-method=nosync",
                ])
                .status(),
            Server::Mariadb => server
                .command("mariadb-install-db")
                .args(["--auth-root-authentication-method=normal", "--skip-test-db"])
                .status(),
        };
        assert!(made.unwrap().success(), "{}", server.log());
        server.again().await;
        server
    }

    pub(crate) fn url(&self) -> String {
        format!("mysql://root@127.0.0.1:{}/mysql", self.port)
    }

    /// Starts it again, and waits until it answers.
    pub(crate) async fn again(&self) {
        let (program, own) = match self.kind {
            Server::Mysql => ("mysqld", "--mysqlx=OFF"),
            Server::Mariadb => ("mariadbd", "--character-set-server=utf8mb4"),
        };
        // Without a binary log InnoDB shows others a commit before it is on the disk: what a relay has sent then may be
        // gone after a crash.
        let started = self
            .command(program)
            .args([
                own,
                "--bind-address=127.0.0.1",
                "--innodb-flush-log-at-trx-commit=1",
            ])
            .args(["--log-bin=binlog", "--sync-binlog=1", "--server-id=1"])
            .arg(format!("--port={}", self.port))
            .arg(format!("--socket={}", self.data().join("socket").display()))
            .arg(format!("--pid-file={}", self.data().join("pid").display()))
            .spawn()
            .unwrap();
        *self.running() = Some(started);
        until(Duration::from_secs(60), async || {
            let ended = self.running().as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "{}", self.log());
            MySqlConnection::connect(&self.url()).await.ok()
        })
        .await
        .unwrap_or_else(|| panic!("no answer: {}", self.log()));
    }

    /// As power failures do.
    pub(crate) fn crash(&self) {
        let mut child = self.running().take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// In order.
    pub(crate) async fn stop(&self) {
        let mut child = self.running().take().unwrap();
        let told = Command::new("kill").arg(child.id().to_string()).status().unwrap();
        assert!(told.success());
        until(Duration::from_secs(60), async || child.try_wait().unwrap())
            .await
            .unwrap_or_else(|| panic!("does not stop: {}", self.log()));
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Not the system's, where a server that starts deletes what others have there.
    fn temporary(&self) -> PathBuf {
        self.dir.path().join("tmp")
    }

    fn running(&self) -> MutexGuard<'_, Option<Child>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Of the server's programs, which are told where the data is.
    fn command(&self, program: &str) -> Command {
        let program = format!("{}/{program}", self.kind.told("_BIN"));
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
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .unwrap();
        command
            .arg("--no-defaults")
            .arg(format!("--datadir={}", self.data().display()))
            .arg(format!("--tmpdir={}", self.temporary().display()))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        command
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        if let Some(mut child) = self.running().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn is_root() -> bool {
    let own = Command::new("id").arg("-u").output().unwrap();
    own.stdout.starts_with(b"0")
}
