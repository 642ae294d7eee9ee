//! The program `outbox`.

fn main() {}
