//! Topics of a run: how many messages have arrived, and whether they are the right ones.

use std::time::{Duration, Instant};

use outbox::kafka::OUTBOX_ID;
use outbox::kafka::rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use outbox::kafka::rdkafka::client::DefaultClientContext;
use outbox::kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use outbox::kafka::rdkafka::message::{Headers, Message};
use outbox::kafka::rdkafka::producer::{FutureProducer, FutureRecord};
use outbox::kafka::rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::ledger::Ledger;
use crate::results::Outcome;

pub(crate) const PARTITIONS: i32 = 6;
/// How long a broker may take to answer, and a topic to give its next message.
const PATIENCE: Duration = Duration::from_secs(30);

/// A topic of one measurement. It was written to before, and what was written then does not count.
pub(crate) struct Topic {
    pub(crate) name: String,
    brokers: String,
    /// Asks for the end offsets; a consumer only because librdkafka lets no other client do so.
    watcher: BaseConsumer,
    /// Where each partition began to count.
    begin: Vec<i64>,
}

impl Topic {
    pub(crate) async fn create(brokers: &str) -> Outcome<Self> {
        let name = format!("bench-{}", outbox::MessageId::new());
        let new = NewTopic::new(&name, PARTITIONS, TopicReplication::Fixed(1));
        for result in admin(brokers)?
            .create_topics([&new], &AdminOptions::new())
            .await?
        {
            result.map_err(|(topic, error)| format!("{topic}: {error}"))?;
        }
        let mut topic = Self {
            name,
            brokers: brokers.to_owned(),
            watcher: ClientConfig::new().set("bootstrap.servers", brokers).create()?,
            begin: Vec::new(),
        };
        topic.warm_up().await?;
        topic.count_from_here()?;
        Ok(topic)
    }

    /// The first message to a partition costs the broker files.
    async fn warm_up(&self) -> Outcome<()> {
        let producer: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("acks", "all")
            .create()?;
        for partition in (0..PARTITIONS).cycle().take(60) {
            let record = FutureRecord::<(), _>::to(&self.name)
                .partition(partition)
                .payload("warm up");
            if let Err(error) = producer.send_result(record).map_err(|(error, _)| error)?.await? {
                return Err(error.0.into());
            }
        }
        Ok(())
    }

    /// What has arrived by now does not count.
    pub(crate) fn count_from_here(&mut self) -> Outcome<()> {
        self.begin = self.ends()?;
        Ok(())
    }

    /// How many messages have arrived.
    pub(crate) fn arrived(&self) -> Outcome<u64> {
        let arrived: i64 = self
            .ends()?
            .iter()
            .zip(&self.begin)
            .map(|(end, begin)| end - begin)
            .sum();
        Ok(u64::try_from(arrived)?)
    }

    /// All end offsets, with one question to the broker.
    fn ends(&self) -> Outcome<Vec<i64>> {
        let mut asked = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            asked.add_partition_offset(&self.name, partition, Offset::End)?;
        }
        let told = tokio::task::block_in_place(|| self.watcher.offsets_for_times(asked, PATIENCE))?;
        (0..PARTITIONS)
            .map(|partition| {
                match told
                    .find_partition(&self.name, partition)
                    .map(|found| found.offset())
                {
                    Some(Offset::Offset(end)) => Ok(end),
                    other => Err(format!(
                        "partition {partition} of {}: {other:?} instead of its end",
                        self.name
                    )
                    .into()),
                }
            })
            .collect()
    }

    /// A consumer of everything that counts, which takes messages one by one.
    pub(crate) fn consumer(&self) -> Outcome<BaseConsumer> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", &self.name)
            .set("enable.auto.commit", "false")
            .create()?;
        let mut places = TopicPartitionList::new();
        for (partition, begin) in (0..PARTITIONS).zip(&self.begin) {
            places.add_partition_offset(&self.name, partition, Offset::Offset(*begin))?;
        }
        consumer.assign(&places)?;
        Ok(consumer)
    }

    /// Reads the topic from its beginning and tells the ledger of every message.
    pub(crate) fn read_into(&self, ledger: &mut Ledger) -> Outcome<()> {
        tokio::task::block_in_place(|| {
            let consumer = self.consumer()?;
            let there = self.arrived()?;
            let mut heard = Instant::now();
            let mut read = 0;
            while read < there {
                match consumer.poll(Duration::from_millis(200)) {
                    Some(record) => {
                        let record = record?;
                        if !has_id(&record) {
                            ledger.strangers += 1;
                        }
                        ledger.arrive(record.key(), record.payload());
                        read += 1;
                        heard = Instant::now();
                    }
                    None if heard.elapsed() > PATIENCE => {
                        return Err(format!("{} gave {read} of {there} messages", self.name).into());
                    }
                    None => {}
                }
            }
            Ok(())
        })
    }

    pub(crate) async fn delete(self) -> Outcome<()> {
        admin(&self.brokers)?
            .delete_topics(&[&self.name], &AdminOptions::new())
            .await?;
        Ok(())
    }
}

/// Whether a record tells the message's id, which every system has to send: consumers need it.
fn has_id(record: &impl Message) -> bool {
    record
        .headers()
        .is_some_and(|headers| headers.iter().any(|header| header.key == OUTBOX_ID))
}

fn admin(brokers: &str) -> Outcome<AdminClient<DefaultClientContext>> {
    Ok(ClientConfig::new().set("bootstrap.servers", brokers).create()?)
}
