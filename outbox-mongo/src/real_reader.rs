//! Reading where no find can be told all that it is to leave out, on a real server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

use std::sync::Arc;

use outbox_core::{Fetched, Held, Message, OrderKey, OwnedShard, Shard};

use crate::reader::{MongoReader, Most};
use crate::reading::{Reading, loses_and_repeats_nothing};
use crate::real_commands::{Heard, names};

fn reader(heard: &Heard, most: Most) -> MongoReader {
    let mut reader = MongoReader::new(&heard.store, None);
    reader.most = most;
    reader
}

fn reading(heard: &Heard, owned: &[OwnedShard], most: Most) -> Reading {
    Reading::new(reader(heard, most), owned)
}

#[tokio::test(flavor = "multi_thread")]
async fn finds_that_are_told_a_part_of_what_is_left_out_lose_and_repeat_nothing() {
    for seed in 0..8 {
        let mut random = fastrand::Rng::with_seed(seed);
        let heard = Heard::new(false).await;
        let owned = heard.lease().await;
        let all = Most {
            held: 1 << 20,
            places: 400_000,
        };
        let part = Most {
            held: *random.choice(&[0, 50, 200, 1 << 20]).unwrap(),
            places: *random.choice(&[1, 7, 40, 400_000]).unwrap(),
        };
        let enqueue = async |messages: &[Message]| heard.enqueue(messages).await;
        let (whole, parts) = (reader(&heard, all), reader(&heard, part));
        loses_and_repeats_nothing(seed, &owned, enqueue, whole, parts).await;
        heard.remove().await;
    }
}

/// A key of which there is more than a page is read on beside the others, unless it is held by then.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_meanwhile_is_not_read_on() {
    let heard = Heard::new(false).await;
    let messages: Vec<Message> = (0..9)
        .map(|number| {
            let builder = Message::builder("a").key("hot");
            builder.payload(number.to_string()).build().unwrap()
        })
        .collect();
    heard.enqueue(&messages).await;
    let owned = heard.lease().await;
    // What is hot is read before the ring and behind it in turns.
    for (told, pages, topic) in [
        (0, 1, true),
        (0, 2, false),
        (0, 2, true),
        (1 << 20, 1, false),
        (1 << 20, 2, false),
        (1 << 20, 2, true),
    ] {
        let most = Most {
            held: told,
            places: 400_000,
        };
        let mut reading = reading(&heard, &owned, most);
        for _ in 0..pages {
            assert_eq!(reading.batch(3).await, (3, true));
        }
        let mut held = Held::default();
        let hot = reading.read[0].message.order_key().unwrap();
        match topic {
            true => drop(held.topics.insert("a".into())),
            false => drop(held.keys.insert((reading.read[0].shard, hot))),
        }
        reading.request.held = Arc::new(held);
        assert_eq!(reading.batch(3).await.0, 0);
        reading.request.held = Arc::default();
        reading.read_all(3).await;
        let all: Vec<String> = (0..9).map(|number| number.to_string()).collect();
        assert_eq!(reading.texts(), all);
    }
    heard.remove().await;
}

/// More is held than a command takes, which has at most 16 MiB.
#[tokio::test(flavor = "multi_thread")]
async fn more_keys_can_be_held_than_fit_into_a_command() {
    let heard = Heard::new(false).await;
    let keyed = |key: String| Message::builder("a").key(key).payload("free").build().unwrap();
    let owned = heard.lease().await;
    let mut held = Held::default();
    // Nobody asks whether they are there.
    for number in 0..17_000_u16 {
        let key = OrderKey {
            topic: "a".into(),
            key: format!("{number:01024}").into(),
        };
        held.keys.insert((Shard(number % 64), key));
    }
    let mut reading = Reading::new(MongoReader::new(&heard.store, None), &owned);
    reading.request.held = Arc::new(held);
    heard
        .enqueue(&[keyed("1".to_owned()), keyed("2".to_owned())])
        .await;
    reading.read_all(100).await;
    assert_eq!(reading.read.len(), 2);
    // That nothing waits is known after one turn, in one snapshot.
    let (fetched, said) = heard.during(reading.reader.fetch(&reading.request)).await;
    assert!(matches!(fetched.unwrap(), Fetched::Batch { records, more: false } if records.is_empty()));
    let said = names(&said);
    assert!((18..60).contains(&said.len()), "{said:?}");
    assert_eq!(
        said.iter().filter(|name| **name == "commitTransaction").count(),
        1
    );
    heard.remove().await;
}
