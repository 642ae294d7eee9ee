//! A server of a test's own, to be stopped, restarted and misused: of the program that scripts/services builds.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use outbox_mongo::mongodb::Client;
use outbox_mongo::mongodb::bson::doc;
use tempfile::TempDir;

/// Running on 127.0.0.1. Gone when it is dropped.
pub(crate) struct OwnServer {
    dir: TempDir,
    pub(crate) port: u16,
    arguments: Vec<String>,
    running: Mutex<Option<Child>>,
}

impl OwnServer {
    /// With further arguments.
    pub(crate) async fn start(arguments: &[&str]) -> Self {
        let server = Self::started(arguments);
        server.answers().await;
        server
    }

    /// The same, not waited for.
    pub(crate) fn started(arguments: &[&str]) -> Self {
        // Below those that systems give to clients: it has to be free again when the server comes back.
        let port = loop {
            let port = fastrand::u16(20_000..32_000);
            if TcpListener::bind(("127.0.0.1", port)).is_ok() {
                break port;
            }
        };
        let server = Self {
            dir: tempfile::Builder::new()
                .prefix("outbox-mongo-")
                .tempdir()
                .unwrap(),
            port,
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            running: Mutex::new(None),
        };
        server.run();
        server
    }

    fn run(&self) {
        let child = Command::new(format!(
            "{}/secantusd-rs",
            crate::common::variable("OUTBOX_TEST_MONGO_BIN")
        ))
        .args([
            "--host",
            "127.0.0.1",
            "--cache-size",
            "128M",
            "--log-file-max",
            "16MB",
            "--sync-on-commit",
        ])
        .args(["--port", &self.port.to_string()])
        .arg("--storage-path")
        .arg(self.dir.path().join("data"))
        .args(&self.arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
        *self.running() = Some(child);
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn url(&self) -> String {
        format!("mongodb://127.0.0.1:{}/outbox_test", self.port)
    }

    /// As a crash ends it.
    pub(crate) fn kill(&self) {
        if let Some(mut child) = self.running().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again, and waits until it answers.
    pub(crate) async fn again(&self) {
        self.run();
        self.answers().await;
    }

    async fn answers(&self) {
        let url = format!(
            "{}?serverSelectionTimeoutMS=500&directConnection=true",
            self.url()
        );
        let begin = Instant::now();
        loop {
            let client = Client::with_uri_str(&url).await.unwrap();
            if client
                .database("admin")
                .run_command(doc! { "ping": 1 })
                .await
                .is_ok()
            {
                return;
            }
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "the server does not come up"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        self.kill();
    }
}
