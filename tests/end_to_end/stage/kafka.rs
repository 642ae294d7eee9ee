//! Kafka for the proof: the shared broker, or one that may be killed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use outbox::MessageId;
use outbox::kafka::rdkafka::ClientConfig;
use outbox::kafka::rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use outbox::kafka::rdkafka::client::DefaultClientContext;

/// The broker that all tests share.
pub(crate) fn broker() -> String {
    std::env::var("OUTBOX_TEST_KAFKA").unwrap_or_else(|_| {
        panic!("OUTBOX_TEST_KAFKA is not set: run scripts/services start kafka; eval \"$(scripts/services env kafka)\"")
    })
}

/// Makes a topic of a name of its own.
pub(crate) async fn new_topic(servers: &str, partitions: i32) -> String {
    let topic = format!("proof-{}", MessageId::new());
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", servers)
        .create()
        .unwrap();
    let new = NewTopic::new(&topic, partitions, TopicReplication::Fixed(1));
    let made = admin.create_topics([&new], &AdminOptions::new()).await.unwrap();
    made.into_iter().for_each(|made| drop(made.unwrap()));
    topic
}

/// A broker of the test's own, which nobody misses while it is down.
#[derive(Debug)]
pub(crate) struct OwnBroker {
    /// Stands for a checkout: `scripts/services` keeps the servers of each checkout apart.
    checkout: PathBuf,
}

impl OwnBroker {
    /// Starts it; its data lives as long as it does.
    pub(crate) fn start(folder: &Path) -> Self {
        let checkout = folder.join("checkout");
        std::fs::create_dir(&checkout).unwrap();
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts");
        std::os::unix::fs::symlink(scripts, checkout.join("scripts")).unwrap();
        let broker = Self { checkout };
        broker.services("start");
        broker
    }

    /// Where it is, before and after a restart.
    pub(crate) fn servers(&self) -> String {
        self.variable("OUTBOX_TEST_KAFKA")
    }

    /// Kills it without warning.
    pub(crate) fn kill(&self) {
        let pid = std::fs::read_to_string(self.variable("OUTBOX_TEST_KAFKA_PID")).unwrap();
        super::relay::signal(pid.trim(), "KILL");
    }

    /// Brings it back, with its data.
    pub(crate) fn restart(&self) {
        self.services("start");
    }

    fn variable(&self, name: &str) -> String {
        let lines = self.services("env");
        let value = lines.lines().find_map(|line| {
            line.strip_prefix("export ")?
                .strip_prefix(name)?
                .strip_prefix('=')
        });
        value.unwrap().to_owned()
    }

    fn services(&self, command: &str) -> String {
        let output = Command::new(self.checkout.join("scripts/services"))
            .args([command, "kafka"])
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        assert!(output.status.success(), "scripts/services {command} kafka failed");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for OwnBroker {
    fn drop(&mut self) {
        let services = self.checkout.join("scripts/services");
        let _ = Command::new(services).args(["clean", "kafka"]).status();
        // The folder that was made for this checkout, outside of it.
        if let Ok(base) = std::fs::read_link(self.checkout.join("target/services")) {
            let _ = std::fs::remove_dir_all(base);
        }
    }
}
