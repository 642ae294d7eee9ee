//! The process that moves messages: the relay, or a baseline.

use outbox::Relay;
use outbox::kafka::{KafkaConfig, KafkaSink};
use tokio::io::{AsyncBufReadExt, BufReader, Lines, Stdin};

use crate::baseline;
use crate::process::{System, Task, Usage};
use crate::results::Outcome;

/// Does what standard input says, until that ends; then tells what it took.
pub(crate) async fn run() -> Outcome<()> {
    // What it warns of disturbs what is measured.
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .init();
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    let task: Task = serde_json::from_str(&input.next_line().await?.ok_or("there is no task")?)?;
    let mut word = Word(input);
    match task.system {
        System::Outbox => {
            let store = task.spec.open().await?;
            // Opens a connection, as the baselines have theirs before they begin.
            store.stats().await?;
            let sink = KafkaSink::new(&KafkaConfig::new(&task.brokers))?;
            let relay = Relay::new(store, Box::new(sink)).with_config(task.relay);
            word.begins().await?;
            relay.run(word.ends()).await?;
        }
        System::Batched(_) | System::Locked(_) | System::Naive(_) => baseline::run(&task, word).await?,
    }
    println!("{}", serde_json::to_string(&Usage::of("self")?)?);
    Ok(())
}

/// When to begin and when to end, as who started this process says it.
pub(crate) struct Word(Lines<BufReader<Stdin>>);

impl Word {
    /// Says that all is ready, and waits for the word to begin.
    pub(crate) async fn begins(&mut self) -> Outcome<()> {
        println!("ready");
        self.0.next_line().await?.ok_or("told to stop before it began")?;
        Ok(())
    }

    /// Returns when it is time to end.
    pub(crate) async fn ends(mut self) {
        // Whatever comes, even an error, is the end.
        let _ = self.0.next_line().await;
    }
}
