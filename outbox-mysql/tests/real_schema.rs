//! Making the tables, opening them, what is wrong with databases in the wild, and who may do what.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::{Place, Server, delivered, done, message, on_each_server, request, shell, unique};
use outbox_core::{
    DeadLetterQuery, Death, ErrorKind, Hold, HoldChange, HoldScope, HoldState, LeaseRequest, Membership,
    MemorySink, Message, Ordering, OutboxStore, Receive, Record, Relay, RelayConfig, RelayId, Subject,
};
use outbox_mysql::sqlx::{self, AssertSqlSafe, Connection, MySqlConnection};
use outbox_mysql::{
    Identifier, MysqlConfig, MysqlInbox, MysqlOutbox, MysqlStore, Role, grant_sql, migrate, migration_sql,
};

const ORDERINGS: [Ordering; 2] = [Ordering::Insert, Ordering::Sequenced];

/// A database without an outbox, which goes with it.
struct Empty {
    server: Server,
    config: MysqlConfig,
    database: String,
}

impl Empty {
    fn new(server: Server) -> Self {
        let database = unique("e");
        done(server, &server.url(), &format!("CREATE DATABASE `{database}`"));
        Self {
            server,
            config: MysqlConfig::new(server.database(&database)),
            database,
        }
    }

    fn run(&self, sql: &str) -> String {
        done(self.server, &self.server.database(&self.database), sql)
    }
}

impl Drop for Empty {
    fn drop(&mut self) {
        shell(
            self.server,
            &self.server.url(),
            format!("DROP DATABASE IF EXISTS `{}`", self.database),
        );
    }
}

async fn refused(config: &MysqlConfig) -> outbox_core::Error {
    let error = MysqlStore::connect(config.clone()).await.unwrap_err();
    println!("{error:?}");
    error
}

/// Enqueues by library and procedure, and reads it.
async fn is_alive(server: Server, database: &str, config: &MysqlConfig) {
    let mut connection = MySqlConnection::connect(&server.database(database))
        .await
        .unwrap();
    let mut tx = connection.begin().await.unwrap();
    let outbox = MysqlOutbox::new(config).unwrap();
    outbox
        .enqueue(&mut tx, &message("alive", Some("k"), "1"))
        .await
        .unwrap();
    let call = format!("CALL `{}_enqueue`('alive', 'k', '2')", config.prefix);
    sqlx::raw_sql(AssertSqlSafe(call))
        .execute(&mut *tx)
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let store = MysqlStore::connect(config.clone()).await.unwrap();
    let lease = LeaseRequest {
        relay: RelayId::new("alive"),
        want: store.capabilities().shards,
        ttl: Duration::from_secs(60),
    };
    let owned = store.lease(&lease).await.unwrap().held;
    assert_eq!(owned.len(), usize::from(store.capabilities().shards));
    let mut reader = store.reader().await.unwrap();
    let (records, _) = common::fetch(&mut reader, &request(&owned, 1_000)).await;
    let alive = records.iter().filter(|record| record.message.topic() == "alive");
    assert_eq!(alive.map(text).collect::<Vec<_>>(), ["1", "2"]);
    store
        .release(&lease.relay, &owned, Membership::Leaves)
        .await
        .unwrap();
}

fn text(record: &Record) -> String {
    String::from_utf8(record.message.payload().unwrap().to_vec()).unwrap()
}

async fn a_database_without_an_outbox_says_to_migrate(server: Server) {
    let empty = Empty::new(server);
    let error = refused(&empty.config).await;
    assert_eq!(error.kind(), ErrorKind::Schema);
    assert!(error.to_string().contains("run migrate"), "{error}");
    assert_eq!(empty.run("SHOW TABLES"), "", "nothing was made by asking");

    let nowhere = MysqlConfig::new(server.database(&unique("nowhere")));
    for error in [refused(&nowhere).await, migrate(&nowhere).await.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("no database of this name"), "{error}");
    }
}

async fn migrating_twice_changes_nothing(server: Server) {
    for ordering in ORDERINGS {
        let place = Place::with(server, |config| config.ordering = ordering).await;
        place.enqueue(&[message("t", None, "p")]).await;
        let catalog = catalog(server, &place.database);
        let again = migrate(&place.config).await.unwrap();
        assert_eq!((again.from, again.to), (Some(1), 1));
        assert_eq!(place.number("SELECT COUNT(*) FROM {}").await, 1);
        assert_eq!(catalog, self::catalog(server, &place.database));
    }
}

async fn migrating_from_many_connections_at_once_makes_one_outbox(server: Server) {
    let empty = Empty::new(server);
    let all: Vec<_> = (0..16)
        .map(|number| {
            let prefix = ["outbox", "audit"][number % 2];
            let config = empty.config.clone().with_prefix(prefix).unwrap();
            tokio::spawn(async move { migrate(&config).await.unwrap().from.is_none() })
        })
        .collect();
    let mut made = 0;
    for one in all {
        made += usize::from(one.await.unwrap());
    }
    assert_eq!(made, 2);
    for prefix in ["outbox", "audit"] {
        let config = empty.config.clone().with_prefix(prefix).unwrap();
        is_alive(server, &empty.database, &config).await;
    }
}

async fn eight_outboxes_are_made_at_once(server: Server) {
    let empty = Empty::new(server);
    let config = |number: usize| empty.config.clone().with_prefix(&format!("o{number}")).unwrap();
    let all: Vec<_> = (0..8)
        .map(|number| {
            let config = config(number);
            tokio::spawn(async move { migrate(&config).await.unwrap() })
        })
        .collect();
    for one in all {
        assert_eq!(one.await.unwrap().from, None);
    }
    for number in 0..8 {
        is_alive(server, &empty.database, &config(number)).await;
    }
}

async fn migrating_beside_a_running_relay_and_producers_disturbs_nobody(server: Server) {
    let place = Place::new(server).await;
    let sink = MemorySink::new();
    let relay = Relay::new(Arc::new(place.store.clone()), Box::new(sink.clone()));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(relay.run(async { drop(stopped.await) }));
    let migrating: Vec<_> = (0..4)
        .map(|_| {
            let config = place.config.clone();
            tokio::spawn(async move {
                for _ in 0..5 {
                    assert_eq!(migrate(&config).await.unwrap().from, Some(1));
                }
            })
        })
        .collect();
    for number in 0..100 {
        place
            .enqueue(&[message("t", Some("k"), &number.to_string())])
            .await;
    }
    for one in migrating {
        one.await.unwrap();
    }
    let delivered = tokio::time::timeout(Duration::from_secs(30), sink.wait_for(100))
        .await
        .unwrap();
    let expected: Vec<_> = (0..100).map(|number| number.to_string()).collect();
    assert_eq!(delivered.iter().map(text).collect::<Vec<_>>(), expected);
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
}

/// Whatever is missing: the server has no transactions over tables.
async fn what_was_half_made_is_finished_as_it_was_begun(server: Server) {
    for (ordering, other) in [
        (Ordering::Insert, Ordering::Sequenced),
        (Ordering::Sequenced, Ordering::Insert),
    ] {
        let place = Place::with(server, |config| {
            config.shards = 8;
            config.ordering = ordering;
        })
        .await;
        let whole = catalog(server, &place.database);
        place
            .sql("INSERT INTO {} (topic, payload) VALUES ('t', 'kept')")
            .await;
        for gone in [
            "DROP TABLE {_hold}, {_inbox}, {_scheduled}",
            "DROP TABLE {_lease}; DROP VIEW {_status}",
            "DELETE FROM {_lease} WHERE shard > 3",
            "DROP PROCEDURE {_enqueue}",
            "DROP PROCEDURE {_enqueue_bytes}; DROP TABLE {_sequence}",
            "SELECT 1",
        ] {
            done(
                server,
                &server.database(&place.database),
                &place.named(&format!("DELETE FROM {{_meta}} WHERE name = 'version'; {gone}")),
            );
            let config = MysqlConfig {
                shards: 16,
                ..place.config.clone()
            };
            let error = refused(&config).await;
            assert_eq!(error.kind(), ErrorKind::Schema, "{gone}");
            assert!(error.to_string().contains("run migrate"), "{error}");
            let wrong = MysqlConfig {
                ordering: other,
                ..config.clone()
            };
            assert_eq!(migrate(&wrong).await.unwrap_err().kind(), ErrorKind::Schema);
            let made = migrate(&config).await.unwrap();
            assert_eq!((made.from, made.to), (None, 1), "{gone}");
            let store = MysqlStore::connect(config).await.unwrap();
            assert_eq!(store.capabilities().shards, 8);
            assert_eq!(place.number("SELECT COUNT(*) FROM {_lease}").await, 8);
            assert_eq!(place.number("SELECT COUNT(*) FROM {}").await, 1);
            // Without the next number, which counts what was there.
            assert_eq!(catalog(server, &place.database), whole, "{gone}");
        }
        place.sql("DELETE FROM {}").await;
        is_alive(server, &place.database, &place.config).await;
    }
}

/// Stopped after every other of the migration's parts.
async fn a_migration_that_stopped_anywhere_is_finished(server: Server) {
    let begun = MysqlConfig {
        shards: 4,
        ..MysqlConfig::default()
    };
    let sql = migration_sql(&begun);
    let parts: Vec<&str> = sql.split("\n\n").collect();
    assert!(parts.len() > 12, "{}", parts.len());
    for stop in (1..parts.len()).step_by(2) {
        let empty = Empty::new(server);
        empty.run(&parts[..stop].join("\n\n"));
        assert_eq!(refused(&empty.config).await.kind(), ErrorKind::Schema);
        assert_eq!(migrate(&empty.config).await.unwrap().from, None, "{stop}");
        let store = MysqlStore::connect(empty.config.clone()).await.unwrap();
        assert_eq!(store.capabilities().shards, 4);
        is_alive(server, &empty.database, &empty.config).await;
    }
}

async fn the_ordering_is_fixed_when_the_outbox_is_made(server: Server) {
    let place = Place::new(server).await;
    let other = MysqlConfig {
        ordering: Ordering::Sequenced,
        ..place.config.clone()
    };
    for error in [refused(&other).await, migrate(&other).await.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Schema);
        assert!(
            error.to_string().contains("another outbox under a new prefix"),
            "{error}"
        );
    }
}

async fn a_newer_version_is_refused(server: Server) {
    let place = Place::new(server).await;
    place
        .sql("UPDATE {_meta} SET value = '999' WHERE name = 'version'")
        .await;
    for error in [
        refused(&place.config).await,
        migrate(&place.config).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Schema);
        assert!(error.to_string().contains("newer"), "{error}");
    }
}

async fn what_was_noted_of_the_outbox_is_checked(server: Server) {
    for (damage, said) in [
        ("DELETE FROM {_meta} WHERE name = 'version'", "run migrate"),
        (
            "UPDATE {_meta} SET value = 'one' WHERE name = 'version'",
            "version",
        ),
        ("DELETE FROM {_meta} WHERE name = 'shards'", "shards"),
        ("DELETE FROM {_meta} WHERE name = 'ordering'", "ordering"),
        ("DROP TABLE {_meta}", "run migrate"),
    ] {
        let place = Place::new(server).await;
        place.sql(damage).await;
        let error = refused(&place.config).await;
        assert_eq!(error.kind(), ErrorKind::Schema, "{damage}");
        assert!(error.to_string().contains(said), "{damage}: {error}");
    }
}

async fn a_table_of_the_applications_own_is_never_touched(server: Server) {
    for own in [
        "outbox",
        "outbox_dead",
        "outbox_inbox",
        "outbox_status",
        "outbox_meta",
    ] {
        let empty = Empty::new(server);
        empty.run(&format!(
            "CREATE TABLE {own} (mine INT); INSERT INTO {own} VALUES (1)"
        ));
        let error = migrate(&empty.config).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Schema, "{error:?}");
        if own != "outbox_meta" {
            assert!(error.to_string().contains("another prefix"), "{error}");
        }
        assert_eq!(refused(&empty.config).await.kind(), ErrorKind::Schema);
        assert_eq!(empty.run("SHOW TABLES"), own, "nothing was made");
        assert_eq!(empty.run(&format!("SELECT mine FROM {own}")), "1");
        // The remedy.
        let other = empty.config.clone().with_prefix("mine").unwrap();
        migrate(&other).await.unwrap();
    }
}

async fn several_outboxes_share_a_database(server: Server) {
    let place = Place::new(server).await;
    let other = place.config.clone().with_prefix("audit").unwrap();
    migrate(&other).await.unwrap();
    let elsewhere = Place::new(server).await;
    let mut connection = place.connect().await;
    MysqlOutbox::new(&other)
        .unwrap()
        .enqueue(&mut connection, &message("t", None, "p"))
        .await
        .unwrap();
    let store = MysqlStore::connect(other.clone()).await.unwrap();
    assert_eq!(store.stats().await.unwrap().backlog.value(), 1);
    for none in [&place.store, &elsewhere.store] {
        assert_eq!(none.stats().await.unwrap().backlog.value(), 0);
    }
    // Leases are each outbox's own, and so is what was received.
    assert_eq!(place.lease().await.len(), 64);
    assert_eq!(elsewhere.lease().await.len(), 64);
    let id = message("t", None, "p").id();
    for config in [&place.config, &other] {
        let inbox = MysqlInbox::new(config).unwrap();
        let receive = inbox.receive(&mut connection, "c", id).await.unwrap();
        assert_eq!(receive, Receive::Fresh);
    }
}

/// The prefix of one is the beginning of the other's.
async fn names_that_grow_out_of_another_are_refused_or_harmless(server: Server) {
    let place = Place::new(server).await;
    for prefix in [
        "outbox_dead",
        "outbox_",
        "outbox_inbox",
        "outbox_hold",
        "outbox_enqueue",
        "outbox_scheduled",
    ] {
        let config = place.config.clone().with_prefix(prefix).unwrap();
        match migrate(&config).await {
            Ok(_) => is_alive(server, &place.database, &config).await,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Schema, "{prefix}: {error:?}"),
        }
    }
    is_alive(server, &place.database, &place.config).await;
}

async fn any_name_that_is_allowed_works(server: Server) {
    let empty = Empty::new(server);
    let longest = "a".repeat(Identifier::MAX_PREFIX_BYTES);
    for (prefix, ordering) in [
        ("select", Ordering::Insert),
        ("_", Ordering::Sequenced),
        (&*longest, Ordering::Insert),
        (&*longest, Ordering::Sequenced),
    ] {
        let empty = Empty::new(server);
        let config = MysqlConfig {
            ordering,
            shards: 2,
            ..empty.config.clone().with_prefix(prefix).unwrap()
        };
        migrate(&config).await.unwrap();
        is_alive(server, &empty.database, &config).await;
    }
    let longer = "a".repeat(Identifier::MAX_PREFIX_BYTES + 1);
    let config = empty.config.clone().with_prefix(&longer).unwrap();
    assert_eq!(migrate(&config).await.unwrap_err().kind(), ErrorKind::Invalid);
}

async fn the_migration_in_the_servers_shell_makes_the_same(server: Server) {
    for ordering in ORDERINGS {
        let adjust = |config: &mut MysqlConfig| {
            config.ordering = ordering;
            config.shards = 7;
        };
        let place = Place::with(server, adjust).await;
        let mut empty = Empty::new(server);
        adjust(&mut empty.config);
        let sql = migration_sql(&empty.config);
        empty.run(&sql);
        assert_eq!(catalog(server, &place.database), catalog(server, &empty.database));
        let store = MysqlStore::connect(empty.config.clone()).await.unwrap();
        assert_eq!(store.capabilities().shards, 7);
        is_alive(server, &empty.database, &empty.config).await;
        // Again, as after a stop half-way, and by the library.
        empty.run(&sql);
        assert_eq!(migrate(&empty.config).await.unwrap().from, Some(1));
        assert_eq!(catalog(server, &place.database), catalog(server, &empty.database));
        let facts = |database: &str| {
            let facts = "SELECT name, value FROM outbox_meta WHERE name <> 'identity' ORDER BY name";
            done(server, &server.database(database), facts)
        };
        assert_eq!(facts(&place.database), facts(&empty.database));
    }
}

/// Everything in a database as the server tells it, without the database's name, layout and comments.
fn catalog(server: Server, database: &str) -> Vec<String> {
    let run = |sql: &str| done(server, &server.database(database), sql);
    let mut told = Vec::new();
    for table in run("SHOW TABLES").lines() {
        let create = run(&format!("SHOW CREATE TABLE `{table}`"));
        told.push(create);
    }
    told.push(run(
        "SELECT ROUTINE_NAME, ROUTINE_DEFINITION, SECURITY_TYPE FROM information_schema.ROUTINES \
         WHERE ROUTINE_SCHEMA = DATABASE() ORDER BY ROUTINE_NAME",
    ));
    told.push(run(
        "SELECT SPECIFIC_NAME, PARAMETER_NAME, DTD_IDENTIFIER, COLLATION_NAME FROM information_schema.PARAMETERS \
         WHERE SPECIFIC_SCHEMA = DATABASE() ORDER BY SPECIFIC_NAME, ORDINAL_POSITION",
    ));
    told.iter()
        .map(|text| {
            let text = text.replace(database, "DATABASE").replace(r"\n", " ");
            let words = text.split_whitespace();
            words
                .filter(|word| !word.starts_with("AUTO_INCREMENT="))
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect()
}

async fn the_number_of_shards_is_that_of_the_database(server: Server) {
    let place = Place::with(server, |config| config.shards = 8).await;
    let config = MysqlConfig {
        shards: 64,
        ..place.config.clone()
    };
    let store = MysqlStore::connect(config.clone()).await.unwrap();
    assert_eq!(store.capabilities().shards, 8);
    assert_eq!(migrate(&config).await.unwrap().from, Some(1));
    let messages: Vec<_> = (0..100)
        .map(|number| message("t", Some(&number.to_string()), "p"))
        .collect();
    place.enqueue(&messages).await;
    assert_eq!(place.number("SELECT COUNT(*) FROM {_lease}").await, 8);
    let records = place.fetch(200).await;
    assert_eq!(records.len(), 100);
    for record in records {
        let expected = outbox_core::shard_of(record.message.key().map(AsRef::as_ref), record.message.id(), 8);
        assert_eq!(record.shard, expected);
    }
}

async fn dropped_tables_are_a_matter_of_schema_and_the_store_recovers(server: Server) {
    let place = Place::new(server).await;
    place.lease().await;
    place.sql("RENAME TABLE {_lease} TO away").await;
    let error = place
        .store
        .release(&place.relay, &[], Membership::Leaves)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema, "{error:?}");
    assert!(error.to_string().contains("run migrate"));
    place.sql("RENAME TABLE away TO {_lease}").await;
    place.lease().await;
}

/// What comes with a message never becomes SQL.
async fn hostile_messages_are_data(server: Server) {
    let place = Place::with(server, |config| {
        config.shards = 1;
        config.ordering = Ordering::Sequenced;
    })
    .await;
    let hostile = [
        "'; DROP TABLE outbox; --",
        "\"; DROP TABLE outbox; --",
        "\\'; DROP TABLE outbox; -- ",
        "x' OR '1'='1",
        "?",
        "{prefix}",
        "*/ DROP TABLE outbox; /*",
        "\\x00",
        "NULL",
        "\0",
        "\u{bf27}",
    ];
    let messages: Vec<Message> = hostile
        .iter()
        .map(|text| {
            Message::builder("t")
                .key((*text).to_owned())
                .payload((*text).to_owned())
                .header("h", (*text).to_owned())
                .content_type("a/b")
                .build()
                .unwrap()
        })
        .collect();
    let mut tx = outbox_mysql::begin(&place.pool).await.unwrap();
    place.outbox.enqueue_many(&mut tx, &messages).await.unwrap();
    tx.commit().await.unwrap();
    let records = place.fetch(100).await;
    assert_eq!(records.len(), hostile.len());
    for (record, sent) in records.iter().zip(&messages) {
        assert_eq!(record.message.key(), sent.key());
        assert_eq!(record.message.payload(), sent.payload());
        assert_eq!(record.message.headers(), sent.headers());
    }
    // The same of reasons, which come from brokers.
    let owned = place.lease().await;
    let mut parts = delivered(&owned, &records);
    let dead = std::mem::take(&mut parts[0].delivered).into_iter().zip(hostile);
    parts[0].dead = dead
        .map(|(record, reason)| Death {
            record,
            attempts: 1,
            reason: reason.into(),
        })
        .collect();
    place.store.settle(&place.settlement(parts)).await.unwrap();
    let letters = place.store.dead_letters().unwrap();
    let listed = letters.list(&DeadLetterQuery::default()).await.unwrap();
    let reasons: Vec<_> = listed.iter().map(|letter| letter.reason.as_str()).collect();
    assert_eq!(reasons, hostile);
}

/// An outbox, and three accounts of the server's: a producer, a relay, and one to whom nothing is granted.
struct Roles {
    place: Place,
    producer: Identifier,
    relay: Identifier,
    stranger: Identifier,
}

impl Roles {
    async fn new(server: Server, ordering: Ordering) -> Self {
        let place = Place::with(server, |config| {
            config.ordering = ordering;
            config.archive = true;
            config.shards = 1;
        })
        .await;
        let [producer, relay, stranger] = ["p", "r", "s"].map(|role| Identifier::new(&unique(role)).unwrap());
        for name in [&producer, &relay, &stranger] {
            done(server, &server.url(), &format!("CREATE USER '{name}'@'%'"));
        }
        let owner = server.database(&place.database);
        for (role, name) in [(Role::Produce, &producer), (Role::Relay, &relay)] {
            done(server, &owner, &grant_sql(&place.config, role, name));
        }
        Self {
            place,
            producer,
            relay,
            stranger,
        }
    }

    fn url(&self, account: &Identifier) -> String {
        let url = self.place.server.database(&self.place.database);
        let (_, address) = url.rsplit_once('@').unwrap();
        format!("mysql://{account}@{address}")
    }

    fn config(&self, account: &Identifier) -> MysqlConfig {
        MysqlConfig {
            url: self.url(account).into(),
            ..self.place.config.clone()
        }
    }

    fn run(&self, account: &Identifier, sql: &str) -> String {
        done(self.place.server, &self.url(account), &self.place.named(sql))
    }

    /// That the account may not do it; not that it fails for another reason.
    fn denied(&self, account: &Identifier, sql: &str) {
        let output = shell(self.place.server, &self.url(account), self.place.named(sql));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.to_lowercase().contains("denied"),
            "{sql}: {said}"
        );
    }
}

impl Drop for Roles {
    fn drop(&mut self) {
        let server = self.place.server;
        for name in [&self.producer, &self.relay, &self.stranger] {
            shell(server, &server.url(), format!("DROP USER IF EXISTS '{name}'@'%'"));
        }
    }
}

fn scheduled(key: &str) -> Message {
    Message::builder("t")
        .key(key.to_owned())
        .payload("later")
        .deliver_at(SystemTime::now() + Duration::from_secs(3600))
        .build()
        .unwrap()
}

async fn enqueued(place: &Place, connection: &mut MySqlConnection, messages: &[Message]) {
    let mut tx = connection.begin().await.unwrap();
    place.outbox.enqueue_many(&mut tx, messages).await.unwrap();
    tx.commit().await.unwrap();
}

async fn a_producer_may_enqueue_and_receive_and_nothing_else(server: Server) {
    for ordering in ORDERINGS {
        let roles = Roles::new(server, ordering).await;
        let (place, producer) = (&roles.place, &roles.producer);
        let mut connection = MySqlConnection::connect(&roles.url(producer)).await.unwrap();
        let one = message("t", Some("k"), "p");
        let headers = Message::builder("t")
            .header("h", "v")
            .content_type("a/b")
            .build()
            .unwrap();
        enqueued(place, &mut connection, std::slice::from_ref(&one)).await;
        enqueued(
            place,
            &mut connection,
            &[message("t", Some("k"), "p"), headers, scheduled("k")],
        )
        .await;
        for call in [
            "{_enqueue}('t', 'k', 'p')",
            "{_enqueue_bytes}('t', X'00', X'FF', '{\"a\": \"b\"}', 'text/plain', NULL)",
            "{_enqueue_bytes}('t', 'k', 'p', NULL, NULL, UTC_TIMESTAMP(6) + INTERVAL 1 HOUR)",
        ] {
            roles.run(producer, &format!("START TRANSACTION; CALL {call}; COMMIT"));
        }
        let key = if ordering == Ordering::Insert {
            "'k'"
        } else {
            "NULL"
        };
        roles.run(
            producer,
            &format!("INSERT INTO {{}} (topic, `key`, payload) VALUES ('t', {key}, 'p')"),
        );
        assert_eq!(place.number("SELECT COUNT(*) FROM {}").await, 6);
        assert_eq!(place.number("SELECT COUNT(*) FROM {_scheduled}").await, 2);

        let inbox = MysqlInbox::new(&place.config).unwrap();
        for expected in [Receive::Fresh, Receive::Duplicate] {
            let receive = inbox.receive(&mut connection, "c", one.id()).await.unwrap();
            assert_eq!(receive, expected);
        }
        let age = Duration::from_secs(7200);
        assert_eq!(inbox.purge(&mut connection, age, 10).await.unwrap(), 0);

        for sql in [
            "SELECT COUNT(*) FROM {}",
            "SELECT payload FROM {}",
            "DELETE FROM {}",
            "UPDATE {} SET payload = NULL",
            "TRUNCATE {}",
            "INSERT INTO {} (id, topic) VALUES (1, 't')",
            "SELECT * FROM {_lease}",
            "UPDATE {_lease} SET owner = 'me'",
            "SELECT * FROM {_relay}",
            "SELECT * FROM {_dead}",
            "DELETE FROM {_dead}",
            "INSERT INTO {_dead} (position) VALUES (1)",
            "SELECT * FROM {_hold}",
            "DELETE FROM {_hold}",
            "SELECT * FROM {_scheduled}",
            "UPDATE {_scheduled} SET deliver_at = '1970-01-01'",
            "DELETE FROM {_scheduled}",
            "SELECT * FROM {_processed}",
            "SELECT * FROM {_status}",
            "SELECT * FROM {_meta}",
            "UPDATE {_meta} SET value = '0'",
            "DELETE FROM {_sequence}",
            "UPDATE {_inbox} SET consumer = 'me'",
            "ALTER TABLE {} ADD mine INT",
            "DROP TABLE {}",
            "DROP PROCEDURE {_enqueue}",
        ] {
            roles.denied(producer, sql);
        }
        if ordering == Ordering::Insert {
            roles.denied(producer, "SELECT * FROM {_sequence}");
            roles.denied(producer, "INSERT INTO {} (topic, key_seq) VALUES ('t', 1)");
        }
        let error = refused(&roles.config(producer)).await;
        assert!(
            matches!(error.kind(), ErrorKind::Denied | ErrorKind::Schema),
            "{error:?}"
        );
    }
}

async fn a_relay_may_do_all_of_a_relay_and_an_operator_and_alter_nothing(server: Server) {
    for ordering in ORDERINGS {
        let roles = Roles::new(server, ordering).await;
        let place = &roles.place;
        let mut producer = MySqlConnection::connect(&roles.url(&roles.producer))
            .await
            .unwrap();
        let messages: Vec<_> = (0..6)
            .map(|number| message("t", Some(&format!("k{}", number % 3)), &number.to_string()))
            .chain([scheduled("k0")])
            .collect();
        enqueued(place, &mut producer, &messages).await;

        let config = roles.config(&roles.relay);
        assert_eq!(migrate(&config).await.unwrap().from, Some(1), "it may look");
        let store = MysqlStore::connect(config).await.unwrap();
        let lease = LeaseRequest {
            relay: place.relay.clone(),
            want: 64,
            ttl: Duration::from_secs(60),
        };
        let owned = store.lease(&lease).await.unwrap().held;
        assert_eq!(store.lease(&lease).await.unwrap().held, owned);
        let mut reader = store.reader().await.unwrap();
        let (records, _) = common::fetch(&mut reader, &request(&owned, 10_000)).await;
        assert_eq!(records.len(), 6);

        // One is dead, one is parked, the rest is delivered and archived.
        let mut parts = delivered(&owned, &records[2..]);
        parts[0].dead.push(Death {
            record: records[0].reference(),
            attempts: 3,
            reason: "no".into(),
        });
        let hold = Hold {
            shard: records[1].shard,
            scope: HoldScope::Key(records[1].message.order_key().unwrap()),
            head: records[1].reference(),
            attempts: 1,
            state: HoldState::Parked,
            reason: "no".into(),
        };
        let passing = Hold {
            scope: HoldScope::Topic("passing".into()),
            ..hold.clone()
        };
        parts[0].holds.push(HoldChange::Put(hold.clone()));
        parts[0].holds.push(HoldChange::Put(passing.clone()));
        let settled = store.settle(&place.settlement(parts)).await.unwrap();
        assert!(settled.lost.is_empty());
        let mut parts = delivered(&owned, &records[5..]);
        parts[0].delivered.clear();
        parts[0].holds.push(HoldChange::Clear(passing.reference()));
        store.settle(&place.settlement(parts)).await.unwrap();

        assert_eq!(store.holds(&owned).await.unwrap().len(), 1);
        let parking = store.parking().unwrap();
        assert_eq!(parking.parked(10).await.unwrap().len(), 1);
        assert!(parking.resume(&hold.reference()).await.unwrap());
        assert!(
            !parking.bury(&hold.reference()).await.unwrap(),
            "it is not parked"
        );
        place.sql("UPDATE {_hold} SET parked = TRUE").await;
        assert!(parking.bury(&hold.reference()).await.unwrap());

        let letters = store.dead_letters().unwrap();
        let dead = letters.list(&DeadLetterQuery::default()).await.unwrap();
        assert_eq!(dead.len(), 2);
        assert_eq!(letters.requeue(&[dead[0].record]).await.unwrap(), 1);
        assert_eq!(letters.discard(&[dead[1].record]).await.unwrap(), 1);

        place
            .sql("UPDATE {_scheduled} SET deliver_at = UTC_TIMESTAMP(6)")
            .await;
        let planned = store.scheduled().unwrap();
        let promotion = planned.promote(&place.relay, &owned, 10).await.unwrap();
        assert_eq!(promotion.promoted, 1);
        let stats = store.stats().await.unwrap();
        assert_eq!(
            (stats.backlog.value(), stats.dead, stats.processed.value()),
            (2, 0, 4)
        );
        let inspection = store.inspection().unwrap();
        let key = records[0].message.order_key().unwrap();
        for (subject, backlog) in [
            (Subject::Message(records[0].message.id()), 1),
            (Subject::Message(records[2].message.id()), 0),
            (Subject::Key(key), 2),
            (Subject::Topic("t".into()), 2),
        ] {
            let facts = inspection.inspect(&subject, 100).await.unwrap();
            assert_eq!(facts.backlog.value(), backlog, "{subject:?}");
            assert_eq!(facts.found.len(), 1, "{subject:?}");
        }
        let retention = store.retention().unwrap();
        assert_eq!(retention.purge(Duration::ZERO, 10).await.unwrap(), 4);
        assert_eq!(roles.run(&roles.relay, "SELECT COUNT(*) FROM {_status}"), "2");
        store
            .release(&place.relay, &owned, Membership::Leaves)
            .await
            .unwrap();

        for sql in [
            "ALTER TABLE {} ADD mine INT",
            "ALTER TABLE {} AUTO_INCREMENT = 1000",
            "CREATE TABLE mine (a INT)",
            "CREATE INDEX mine ON {} (topic)",
            "DROP TABLE {_dead}",
            "DROP VIEW {_status}",
            "TRUNCATE {}",
            "UPDATE {} SET payload = NULL",
            "UPDATE {_meta} SET value = '0'",
            "INSERT INTO {_meta} VALUES ('a', 'b')",
            "DELETE FROM {_meta}",
            "SELECT * FROM {_inbox}",
            "DELETE FROM {_inbox}",
            "DROP PROCEDURE {_enqueue}",
        ] {
            roles.denied(&roles.relay, sql);
        }

        // A whole relay, whose statements nobody has listed.
        let sink = MemorySink::new();
        let relay = Relay::new(Arc::new(store), Box::new(sink.clone())).with_config(RelayConfig {
            retention: Duration::from_secs(1),
            ..RelayConfig::default()
        });
        tokio::time::timeout(Duration::from_secs(30), relay.drain(std::future::pending()))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(sink.delivered().len(), 2);
    }
}

async fn a_stranger_is_not_even_let_in(server: Server) {
    let roles = Roles::new(server, Ordering::Insert).await;
    roles.denied(&roles.stranger, "SELECT 1");
    let config = roles.config(&roles.stranger);
    for error in [refused(&config).await, migrate(&config).await.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
        assert!(error.to_string().contains("grant_sql"), "{error}");
    }
}

async fn a_procedure_of_the_applications_own_is_never_touched(server: Server) {
    let empty = Empty::new(server);
    empty.run("CREATE PROCEDURE outbox_enqueue() SELECT 'mine'");
    let error = migrate(&empty.config).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema, "{error}");
    assert_eq!(empty.run("CALL outbox_enqueue()"), "mine");
}

/// Stopped after its very first statement.
async fn an_empty_table_of_facts_is_finished(server: Server) {
    let empty = Empty::new(server);
    let sql = migration_sql(&empty.config);
    empty.run(&sql[..sql.find(';').unwrap() + 1]);
    assert_eq!(migrate(&empty.config).await.unwrap().from, None);
}

on_each_server!(
    a_procedure_of_the_applications_own_is_never_touched,
    an_empty_table_of_facts_is_finished,
    a_database_without_an_outbox_says_to_migrate,
    migrating_twice_changes_nothing,
    migrating_from_many_connections_at_once_makes_one_outbox,
    eight_outboxes_are_made_at_once,
    migrating_beside_a_running_relay_and_producers_disturbs_nobody,
    what_was_half_made_is_finished_as_it_was_begun,
    a_migration_that_stopped_anywhere_is_finished,
    the_ordering_is_fixed_when_the_outbox_is_made,
    a_newer_version_is_refused,
    what_was_noted_of_the_outbox_is_checked,
    a_table_of_the_applications_own_is_never_touched,
    several_outboxes_share_a_database,
    names_that_grow_out_of_another_are_refused_or_harmless,
    any_name_that_is_allowed_works,
    the_migration_in_the_servers_shell_makes_the_same,
    the_number_of_shards_is_that_of_the_database,
    dropped_tables_are_a_matter_of_schema_and_the_store_recovers,
    hostile_messages_are_data,
    a_producer_may_enqueue_and_receive_and_nothing_else,
    a_relay_may_do_all_of_a_relay_and_an_operator_and_alter_nothing,
    a_stranger_is_not_even_let_in,
);
