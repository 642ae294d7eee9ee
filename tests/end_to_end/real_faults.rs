//! Every fault on every store, as a table. Needs all databases and Kafka: `scripts/faults` starts them.
//!
//! `OUTBOX_FAULTS` names those that are wanted, by parts of their names, with commas; empty it names all, and without it each
//! store has a part of them. `OUTBOX_FAULTS_JSON` is a file to which what was found is added, in place of what it has of the
//! same stores and faults. `OUTBOX_FAULTS_KILLS` is how often a relay is killed where one is killed every second.
#![allow(
    dead_code,
    unused_macros,
    reason = "each binary uses a part of what all share"
)]

mod faults;
#[path = "../grant/mod.rs"]
mod grant;
#[path = "../proof/mod.rs"]
mod proof;
#[path = "../proxy/mod.rs"]
mod proxy;
#[path = "../proof/reader.rs"]
mod reader;
mod scenarios;
mod stage;
mod table;

mod mongo;
mod mysql;
mod postgres;
mod sqlite;

use faults::{of_relays, of_the_broker, of_the_disk, of_the_network, of_the_server, of_the_topic, try_all};
use stage::database::{Database, Killable};
use table::{SERVERS, STORES, finish};

/// All faults that a server can have, with the stores on a shared one and on one of their own.
fn on_a_server<Shared: Database + 'static, Own: Killable + 'static>(store: &str) {
    let _turn = stage::turn();
    let mut rows = Vec::new();
    try_all::<Shared>(store, STORES, of_relays(), &mut rows);
    try_all::<Shared>(store, STORES, of_the_topic(), &mut rows);
    try_all::<Shared>(store, SERVERS, of_the_network(), &mut rows);
    try_all::<Shared>(store, STORES, of_the_broker(), &mut rows);
    try_all::<Own>(store, SERVERS, of_the_server(), &mut rows);
    try_all::<Own>(store, SERVERS, of_the_disk(1024, Own::restart), &mut rows);
    finish(store, &rows);
}

#[test]
fn sqlite() {
    let _turn = stage::turn();
    let mut rows = Vec::new();
    try_all::<sqlite::Sqlite>("sqlite", STORES, of_relays(), &mut rows);
    try_all::<sqlite::Sqlite>("sqlite", STORES, of_the_topic(), &mut rows);
    try_all::<sqlite::Sqlite>("sqlite", &["sqlite"], of_the_disk(32, |_| ()), &mut rows);
    try_all::<sqlite::Sqlite>("sqlite", STORES, of_the_broker(), &mut rows);
    finish("sqlite", &rows);
}

#[test]
fn postgres() {
    on_a_server::<postgres::Postgres<postgres::Shared>, postgres::Postgres<postgres::Own>>("postgres");
}

#[test]
fn mysql() {
    on_a_server::<mysql::Mysql<mysql::Shared>, mysql::Mysql<mysql::Own>>("mysql");
}

#[test]
fn mariadb() {
    on_a_server::<mysql::Mysql<mysql::SharedMariadb>, mysql::Mysql<mysql::OwnMariadb>>("mariadb");
}

#[test]
fn mongo() {
    on_a_server::<mongo::Mongo<mongo::Shared>, mongo::Mongo<mongo::Own>>("mongo");
}
