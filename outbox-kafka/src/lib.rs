#![doc = include_str!("../README.md")]

mod classify;
mod config;
mod consumer;
mod context;
mod error;
mod firsts;
mod handing;
mod headers;
mod producer;
mod refused;
mod sink;
mod suspects;
mod topics;
mod tracker;

pub use config::KafkaConfig;
pub use consumer::{ReceivedMessage, message_id};
pub use headers::{CONTENT_TYPE, OUTBOX_ID, OUTBOX_KEY_SEQ};
pub use rdkafka;
pub use sink::KafkaSink;
