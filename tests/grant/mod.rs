//! Grants on Kafka's topics. rdkafka has no call for them, so the request is written by hand.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

use std::io::{Read, Write};
use std::net::TcpStream;

/// What one may do, as the protocol numbers it.
#[allow(dead_code, reason = "each test file uses a part of it")]
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operation {
    Write = 4,
    Describe = 8,
}

/// Grants a user an operation on a topic, through a listener that lets everybody do so: `CreateAcls`, version 1.
pub(crate) fn grant(broker: &str, user: &str, topic: &str, operation: Operation) {
    fn string(request: &mut Vec<u8>, text: &str) {
        request.extend(i16::try_from(text.len()).unwrap().to_be_bytes());
        request.extend(text.as_bytes());
    }
    let mut request = vec![0, 30, 0, 1, 0, 0, 0, 1];
    string(&mut request, "test");
    request.extend([0, 0, 0, 1]);
    request.push(2); // a topic
    string(&mut request, topic);
    request.push(3); // of exactly this name
    string(&mut request, &format!("User:{user}"));
    string(&mut request, "*");
    request.extend([operation as u8, 3]); // allow
    let mut connection = TcpStream::connect(broker).unwrap();
    connection
        .write_all(&i32::try_from(request.len()).unwrap().to_be_bytes())
        .unwrap();
    connection.write_all(&request).unwrap();
    // Length, correlation, throttle time, number of results, the error of the one.
    let mut response = [0; 18];
    connection.read_exact(&mut response).unwrap();
    assert_eq!(response[16..], [0, 0], "the grant was refused");
}
