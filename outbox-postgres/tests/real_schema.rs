//! Making the schema, opening it, what is wrong with databases in the wild, and who may do what.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::{Place, delivered, done, message, psql, request, unique, url, variable};
use outbox_core::{
    DeadLetterQuery, Death, ErrorKind, Hold, HoldChange, HoldScope, HoldState, Membership, MemorySink,
    Message, MessageId, Ordering, OutboxStore, Receive, Record, Relay, RelayConfig, ShardSettlement,
};
use outbox_postgres::sqlx::{self, AssertSqlSafe, Connection, PgConnection};
use outbox_postgres::{
    Identifier, PostgresConfig, PostgresInbox, PostgresOutbox, PostgresStore, Role, grant_sql, migrate,
    migration_sql,
};

/// A configuration whose outbox nobody has made, and whose schema goes with it.
struct Empty(PostgresConfig);

impl Empty {
    fn new() -> Self {
        Self(PostgresConfig {
            schema: Identifier::new(&unique("e")).unwrap(),
            ..PostgresConfig::new(url())
        })
    }
}

impl Drop for Empty {
    fn drop(&mut self) {
        psql(
            &url(),
            format!("DROP SCHEMA IF EXISTS \"{}\" CASCADE", self.0.schema),
        );
    }
}

async fn refused(config: &PostgresConfig) -> outbox_core::Error {
    let error = PostgresStore::connect(config.clone()).await.unwrap_err();
    println!("{error:?}");
    error
}

#[tokio::test]
async fn a_database_without_an_outbox_says_to_migrate() {
    let empty = Empty::new();
    let error = refused(&empty.0).await;
    assert_eq!(error.kind(), ErrorKind::Schema);
    assert!(error.to_string().contains("run migrate"), "{error}");
    // Nothing was made by asking.
    let schemas = done(
        &url(),
        &format!(
            "SELECT count(*) FROM pg_namespace WHERE nspname = '{}'",
            empty.0.schema
        ),
    );
    assert_eq!(schemas, "0");
}

#[tokio::test]
async fn migrating_twice_changes_nothing() {
    for ordering in [Ordering::Insert, Ordering::Sequenced] {
        let place = Place::with(|config| config.ordering = ordering).await;
        place.enqueue(&[message("t", Some("k"), "p")]).await;
        let again = migrate(&place.config).await.unwrap();
        assert_eq!((again.from, again.to), (Some(1), 1));
        assert_eq!(place.number("SELECT count(*) FROM {}").await, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn migrating_from_many_connections_at_once_makes_one_outbox() {
    for _ in 0..3 {
        let empty = Empty::new();
        // Two outboxes, in a schema that is not there yet.
        let all: Vec<_> = (0..16)
            .map(|number| {
                let prefix = ["outbox", "audit"][number % 2];
                let config = empty.0.clone().with_prefix(prefix).unwrap();
                tokio::spawn(async move { migrate(&config).await.unwrap().from.is_none() })
            })
            .collect();
        let mut made = 0;
        for one in all {
            made += usize::from(one.await.unwrap());
        }
        assert_eq!(made, 2);
        PostgresStore::connect(empty.0.clone()).await.unwrap();
    }
}

/// Whatever the default of the database or of the role is: what we rest on is READ COMMITTED.
#[tokio::test(flavor = "multi_thread")]
async fn a_default_of_another_isolation_level_changes_nothing() {
    let options = format!(
        "{}?options=-c%20default_transaction_isolation%3Dserializable",
        url()
    );
    let empty = Empty::new();
    let config = PostgresConfig {
        url: options.clone().into(),
        ..empty.0.clone()
    };
    let all: Vec<_> = (0..8)
        .map(|_| {
            let config = config.clone();
            tokio::spawn(async move { migrate(&config).await })
        })
        .collect();
    for one in all {
        one.await.unwrap().unwrap();
    }
    let store = PostgresStore::connect(config.clone()).await.unwrap();
    let all: Vec<_> = (0..8)
        .map(|number| {
            let store = store.clone();
            tokio::spawn(async move {
                let request = outbox_core::LeaseRequest {
                    relay: outbox_core::RelayId::new(format!("relay-{number}")),
                    want: 8,
                    ttl: Duration::from_secs(60),
                };
                for _ in 0..20 {
                    store.lease(&request).await.unwrap();
                }
            })
        })
        .collect();
    for one in all {
        one.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn migrating_beside_a_running_relay_and_producers_disturbs_nobody() {
    let place = Place::new().await;
    let sink = MemorySink::new();
    let relay = Relay::new(Arc::new(place.store.clone()), Box::new(sink.clone()));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(relay.run(async { drop(stopped.await) }));
    let migrating: Vec<_> = (0..8)
        .map(|_| {
            let config = place.config.clone();
            tokio::spawn(async move {
                for _ in 0..5 {
                    assert_eq!(migrate(&config).await.unwrap().from, Some(1));
                }
            })
        })
        .collect();
    for number in 0..200 {
        place
            .enqueue(&[message("t", Some("k"), &number.to_string())])
            .await;
    }
    for one in migrating {
        one.await.unwrap();
    }
    let delivered = tokio::time::timeout(Duration::from_secs(30), sink.wait_for(200))
        .await
        .unwrap();
    let payloads: Vec<_> = delivered.iter().map(text).collect();
    assert_eq!(
        payloads,
        (0..200).map(|number| number.to_string()).collect::<Vec<_>>()
    );
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
}

fn text(record: &Record) -> String {
    String::from_utf8(record.message.payload().unwrap().to_vec()).unwrap()
}

#[tokio::test]
async fn the_ordering_is_fixed_when_the_outbox_is_made() {
    let place = Place::new().await;
    let other = PostgresConfig {
        ordering: Ordering::Sequenced,
        ..place.config.clone()
    };
    let error = refused(&other).await;
    assert_eq!(error.kind(), ErrorKind::Schema);
    assert!(
        error.to_string().contains("another outbox under a new prefix"),
        "{error}"
    );
    assert_eq!(migrate(&other).await.unwrap_err().kind(), ErrorKind::Schema);
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let place = Place::new().await;
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

/// Each of these loses messages, or would one day; the error says what is wrong.
#[tokio::test]
async fn what_the_relay_relies_on_is_checked() {
    for (damage, said) in [
        ("ALTER SEQUENCE {_id_seq} CACHE 20", "sequence"),
        ("ALTER SEQUENCE {_id_seq} CYCLE", "sequence"),
        ("ALTER SEQUENCE {_id_seq} INCREMENT 2", "sequence"),
        ("ALTER SEQUENCE {_id_seq} INCREMENT -1", "sequence"),
        (
            "ALTER TABLE {} ALTER id DROP DEFAULT; DROP SEQUENCE {_id_seq}",
            "sequence",
        ),
        (
            "ALTER TABLE {} ALTER id SET DEFAULT nextval('{_id_seq}')",
            "default",
        ),
        ("ALTER TABLE {} ALTER id DROP DEFAULT", "default"),
        // The position first, and the transaction's number after it.
        (
            "ALTER TABLE {} ALTER id SET DEFAULT nextval('{_id_seq}') + (pg_current_xact_id() IS NULL)::int",
            "default",
        ),
        // Another sequence than the one that is read.
        (
            "CREATE SEQUENCE {_other}; ALTER TABLE {} ALTER id SET DEFAULT \
             nextval(CASE WHEN pg_current_xact_id() IS NOT NULL THEN '{_other}'::regclass END)",
            "default",
        ),
        ("DELETE FROM {_meta} WHERE name = 'version'", "version"),
        (
            "UPDATE {_meta} SET value = 'one' WHERE name = 'version'",
            "version",
        ),
        ("DELETE FROM {_meta} WHERE name = 'shards'", "shards"),
        ("DROP TABLE {_meta}", "run migrate"),
    ] {
        let place = Place::new().await;
        place
            .sql(&damage.replace("{_other}", &place.table("_other")))
            .await;
        let error = refused(&place.config).await;
        assert_eq!(error.kind(), ErrorKind::Schema, "{damage}");
        assert!(error.to_string().contains(said), "{damage}: {error}");
    }
}

/// A dump that is restored, into another place and after other search paths, is the outbox that it was.
#[tokio::test]
async fn a_renamed_schema_is_still_an_outbox() {
    let place = Place::new().await;
    place.enqueue(&[message("t", Some("k"), "p")]).await;
    let renamed = Identifier::new(&unique("n")).unwrap();
    place
        .sql(&format!(
            "ALTER SCHEMA \"{}\" RENAME TO \"{renamed}\"",
            place.config.schema
        ))
        .await;
    let config = PostgresConfig {
        schema: renamed.clone(),
        ..place.config.clone()
    };
    let _guard = Empty(config.clone());
    PostgresStore::connect(config.clone()).await.unwrap();
    let path = format!("{}?options=-c%20search_path%3D{renamed}", url());
    PostgresStore::connect(PostgresConfig {
        url: path.into(),
        ..config
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_table_of_the_applications_own_is_never_touched() {
    for own in ["outbox", "outbox_dead", "outbox_enqueue", "outbox_status"] {
        let empty = Empty::new();
        let schema = &empty.0.schema;
        done(
            &url(),
            &format!(
                "CREATE SCHEMA \"{schema}\"; CREATE TABLE \"{schema}\".{own} (mine int);
                 INSERT INTO \"{schema}\".{own} VALUES (1)"
            ),
        );
        let error = match migrate(&empty.0).await {
            // A function may have the name that a table has.
            Ok(_) if own == "outbox_enqueue" => continue,
            made => made.unwrap_err(),
        };
        assert_eq!(error.kind(), ErrorKind::Schema);
        assert!(error.to_string().contains("another prefix"), "{error}");
        let tables = done(
            &url(),
            &format!("SELECT count(*) FROM pg_class WHERE relnamespace = '\"{schema}\"'::regnamespace"),
        );
        assert_eq!(tables, "1", "all or nothing");
        assert_eq!(done(&url(), &format!("SELECT mine FROM \"{schema}\".{own}")), "1");
    }
}

#[tokio::test]
async fn a_version_table_of_the_applications_own_is_none_of_ours() {
    let empty = Empty::new();
    let schema = &empty.0.schema;
    done(
        &url(),
        &format!("CREATE SCHEMA \"{schema}\"; CREATE TABLE \"{schema}\".outbox_meta (mine int)"),
    );
    for error in [refused(&empty.0).await, migrate(&empty.0).await.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Schema);
    }
}

#[tokio::test]
async fn several_outboxes_share_a_schema_or_a_database() {
    let place = Place::new().await;
    let other = place.config.clone().with_prefix("audit").unwrap();
    migrate(&other).await.unwrap();
    let elsewhere = Place::new().await;
    PostgresOutbox::new(&other)
        .unwrap()
        .enqueue(&mut place.connect().await, &message("t", None, "p"))
        .await
        .unwrap();
    let store = PostgresStore::connect(other).await.unwrap();
    assert_eq!(store.stats().await.unwrap().backlog.value(), 1);
    for none in [&place.store, &elsewhere.store] {
        assert_eq!(none.stats().await.unwrap().backlog.value(), 0);
    }
    // Leases are each outbox's own.
    assert_eq!(place.lease().await.len(), 64);
    assert_eq!(elsewhere.lease().await.len(), 64);
}

/// The prefix of one is the beginning of the other's.
#[tokio::test]
async fn names_that_grow_out_of_another_are_refused_or_harmless() {
    let place = Place::new().await;
    for prefix in ["outbox_dead", "outbox_", "outbox_inbox", "outbox_hold"] {
        let config = place.config.clone().with_prefix(prefix).unwrap();
        if let Err(error) = migrate(&config).await {
            assert_eq!(error.kind(), ErrorKind::Schema, "{prefix}: {error:?}");
        }
    }
    place.enqueue(&[message("t", None, "p")]).await;
    assert_eq!(place.fetch(10).await.len(), 1);
}

#[tokio::test]
async fn the_migration_in_the_servers_shell_makes_the_same() {
    for ordering in [Ordering::Insert, Ordering::Sequenced] {
        let place = Place::with(|config| {
            config.ordering = ordering;
            config.shards = 7;
        })
        .await;
        let empty = Empty::new();
        let config = PostgresConfig {
            ordering,
            shards: 7,
            ..empty.0.clone()
        };
        done(
            &url(),
            &format!(
                "BEGIN; CREATE SCHEMA \"{}\"; {} COMMIT",
                config.schema,
                migration_sql(&config)
            ),
        );
        assert_eq!(catalog(&place.config), catalog(&config));
        PostgresStore::connect(config.clone()).await.unwrap();
        assert_eq!(migrate(&config).await.unwrap().from, Some(1));
        let facts = |config: &PostgresConfig| {
            let meta = format!("\"{}\".\"{}_meta\"", config.schema, config.prefix);
            done(
                &url(),
                &format!("SELECT name, value FROM {meta} WHERE name <> 'identity' ORDER BY name"),
            )
        };
        assert_eq!(facts(&place.config), facts(&config));
    }
}

/// Everything in a schema, as the server's own program dumps it, without the schema's name.
fn catalog(config: &PostgresConfig) -> String {
    let output = Command::new(format!("{}/pg_dump", variable("OUTBOX_TEST_POSTGRES_BIN")))
        .args(["--schema-only", "-n", config.schema.as_str(), &url()])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .unwrap()
        .replace(config.schema.as_str(), "SCHEMA")
        .lines()
        // Newer versions put a random word into these.
        .filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[tokio::test]
async fn the_number_of_shards_is_that_of_the_database() {
    let place = Place::with(|config| config.shards = 8).await;
    let config = PostgresConfig {
        shards: 64,
        ..place.config.clone()
    };
    let store = PostgresStore::connect(config.clone()).await.unwrap();
    assert_eq!(store.capabilities().shards, 8);
    assert_eq!(migrate(&config).await.unwrap().from, Some(1));
    for number in 0..100 {
        place
            .enqueue(&[message("t", Some(&number.to_string()), "p")])
            .await;
    }
    assert_eq!(place.number("SELECT max(shard)::bigint FROM {}").await, 7);
    assert_eq!(place.number("SELECT count(*) FROM {_lease}").await, 8);
    assert_eq!(place.fetch(200).await.len(), 100);
    for record in place.fetch(200).await {
        let expected = outbox_core::shard_of(record.message.key().map(AsRef::as_ref), record.message.id(), 8);
        assert_eq!(record.shard, expected);
    }
}

#[tokio::test]
async fn dropped_tables_are_a_matter_of_schema_and_the_store_recovers() {
    let place = Place::new().await;
    place.lease().await;
    place.sql("ALTER TABLE {_lease} RENAME TO away").await;
    let error = place
        .store
        .release(&place.relay, &[], Membership::Leaves)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema, "{error:?}");
    assert!(error.to_string().contains("run migrate"));
    let schema = place.config.schema.clone();
    place
        .sql(&format!("ALTER TABLE \"{schema}\".away RENAME TO outbox_lease"))
        .await;
    place.lease().await;
}

/// Names that have broken quoting elsewhere, each in several surroundings: refused, or harmless.
#[tokio::test]
async fn hostile_identifiers_are_refused_or_harmless() {
    let empty = Empty::new();
    let schema = &empty.0.schema;
    done(
        &url(),
        &format!(
            "CREATE SCHEMA \"{schema}\"; CREATE TABLE \"{schema}\".canary (a text);
             INSERT INTO \"{schema}\".canary VALUES ('alive')"
        ),
    );
    let mut connection = PgConnection::connect(&url()).await.unwrap();

    let hostile = [
        "",
        " ",
        "a b",
        "a-b",
        "a.b",
        "a;b",
        "a,b",
        "a'b",
        "a\"b",
        "a`b",
        "a]b",
        "[a",
        "a\\b",
        "a/b",
        "a\0b",
        "a\nb",
        "a\rb",
        "a\tb",
        "a(b",
        "a)b",
        "a*b",
        "a%b",
        "a?b",
        "a$1b",
        "a:b",
        "a@b",
        "a$b",
        "a#b",
        "a{b",
        "a}b",
        "a|b",
        "a=b",
        "a<b",
        "a>b",
        "a+b",
        "a~b",
        "a^b",
        "a&b",
        "a!b",
        "--",
        "/*",
        "*/",
        "1a",
        "9",
        "ä",
        "а",
        "ｏutbox",
        "out\u{200b}box",
        "\u{202e}xobtuo",
        "💥",
        "İ",
        "ſ",
        "\u{212a}",
        "public.outbox",
        "pg_temp.x",
        "pg_catalog.x",
        "x\"; DROP TABLE canary; --",
        "x'; DROP TABLE canary; --",
        "x$outbox$; DROP TABLE canary; --",
        "$outbox$",
        "$$",
        "U&\"x\"",
        "E'x'",
        "x\" (a); DROP TABLE canary; --",
        "\"",
        "\"\"",
        "'",
        "''",
        ";",
        "{prefix}",
        "{schema}",
        "{shards}",
        "pg_",
        "PG_x",
        "pg_class",
        "Pg_Toast",
        "%s",
        "${x}",
    ];
    let reserved = [
        "select",
        "table",
        "order",
        "group",
        "index",
        "from",
        "where",
        "drop",
        "values",
        "null",
        "default",
        "trigger",
        "view",
        "user",
        "oid",
        "ctid",
        "public",
        "xmin",
        "_",
        "__",
        "A",
        "z9",
        "true",
        "outbox_outbox",
        "Outbox",
    ];
    let mut corpus: Vec<String> = Vec::new();
    for name in hostile {
        corpus.extend([
            name.to_owned(),
            format!("x{name}"),
            format!("{name}x"),
            format!("{name}\"; --"),
        ]);
    }
    corpus.extend(reserved.map(str::to_owned));
    corpus.extend([40, 41, 42, 63, 64, 1000, 100_000].map(|length| "a".repeat(length)));
    corpus.sort_unstable();
    corpus.dedup();
    assert!(corpus.len() >= 200, "{}", corpus.len());

    let mut accepted = 0;
    for name in &corpus {
        let quoted = serde_json::to_string(name).unwrap();
        let parsed = serde_json::from_str::<Identifier>(&quoted);
        let Ok(prefix) = Identifier::new(name) else {
            assert!(parsed.is_err(), "{name:?}");
            continue;
        };
        let legal = name.len() <= 63
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        assert!(legal, "{name:?}");
        accepted += 1;
        let config = PostgresConfig {
            prefix,
            ordering: Ordering::Sequenced,
            ..empty.0.clone()
        };
        if config.prefix.as_str().len() > Identifier::MAX_PREFIX_BYTES {
            assert_eq!(migrate(&config).await.unwrap_err().kind(), ErrorKind::Invalid);
            continue;
        }
        if let Err(error) = migrate(&config).await {
            // "a" has a table of the name that "a_sequence" would have.
            assert_eq!(error.kind(), ErrorKind::Schema, "{name}: {error:?}");
            continue;
        }
        PostgresOutbox::new(&config)
            .unwrap()
            .enqueue(&mut connection, &message("t", Some("k"), "p"))
            .await
            .unwrap();
        let function = format!("SELECT \"{schema}\".\"{}_enqueue\"('t', 'k', 'p')", config.prefix);
        sqlx::query(AssertSqlSafe(function))
            .execute(&mut connection)
            .await
            .unwrap();
        // As the name of a role, and of a schema.
        assert!(grant_sql(&config, Role::Relay, &config.prefix).contains(&format!("TO \"{name}\"")));
        let store = PostgresStore::connect(config).await.unwrap();
        assert_eq!(store.stats().await.unwrap().backlog.value(), 2);
    }
    assert!(accepted >= reserved.len());
    assert_eq!(
        done(&url(), &format!("SELECT a FROM \"{schema}\".canary")),
        "alive"
    );
}

/// What comes with a message never becomes SQL.
#[tokio::test]
async fn hostile_messages_are_data() {
    let place = Place::with(|config| config.ordering = Ordering::Sequenced).await;
    let hostile = [
        "'; DROP TABLE outbox; --",
        "\"; DROP TABLE outbox; --",
        "x' OR '1'='1",
        "$1",
        "$outbox$",
        "{1,2}",
        "\\x00",
        "NULL",
        "\0",
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
    place.enqueue(&messages).await;
    let records = place.fetch(100).await;
    assert_eq!(records.len(), hostile.len());
    for record in &records {
        let sent = messages
            .iter()
            .find(|sent| sent.id() == record.message.id())
            .unwrap();
        assert_eq!(record.message.key(), sent.key());
        assert_eq!(record.message.payload(), sent.payload());
        assert_eq!(record.message.headers(), sent.headers());
    }
    // The same of reasons, which come from brokers, and of relays' names.
    let owned = place.lease().await;
    let mut parts = delivered(&owned, &records);
    for part in &mut parts {
        part.dead = std::mem::take(&mut part.delivered)
            .into_iter()
            .zip(hostile)
            .map(|(record, reason)| Death {
                record,
                attempts: 1,
                reason: reason.into(),
            })
            .collect();
    }
    place.store.settle(&place.settlement(parts)).await.unwrap();
    let letters = place.store.dead_letters().unwrap();
    assert_eq!(
        letters.list(&DeadLetterQuery::default()).await.unwrap().len(),
        hostile.len()
    );
}

/// A database that was made for other texts could not keep every one.
#[tokio::test]
async fn a_database_in_another_encoding_is_refused() {
    let name = unique("latin");
    done(
        &url(),
        &format!("CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"),
    );
    let base = url();
    let (server, _) = base.rsplit_once('/').unwrap();
    let config = PostgresConfig::new(format!("{server}/{name}"));
    let error = migrate(&config).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
    assert!(error.to_string().contains("LATIN1"), "{error}");
    assert_eq!(refused(&config).await.kind(), ErrorKind::Unsupported);
    done(&url(), &format!("DROP DATABASE {name} WITH (FORCE)"));
}

/// Three roles of the server's, which go with it: who owns the outbox, who produces, who relays.
struct Roles {
    place: Place,
    owner: Identifier,
    producer: Identifier,
    relay: Identifier,
}

impl Roles {
    async fn new(ordering: Ordering) -> Self {
        let name = |role: &str| Identifier::new(&unique(role)).unwrap();
        let (owner, producer, relay) = (name("owner"), name("producer"), name("relay"));
        done(
            &url(),
            &format!("CREATE ROLE {owner}; CREATE ROLE {producer}; CREATE ROLE {relay}"),
        );
        let place = Place::with(|config| {
            config.ordering = ordering;
            config.archive = true;
        })
        .await;
        // Made anew by the owner, who is no superuser.
        let schema = &place.config.schema;
        place
            .sql(&format!(
                "DROP SCHEMA \"{schema}\" CASCADE; CREATE SCHEMA \"{schema}\" AUTHORIZATION {owner}"
            ))
            .await;
        let roles = Self {
            owner,
            producer,
            relay,
            place,
        };
        migrate(&roles.config(&roles.owner)).await.unwrap();
        for (role, name) in [(Role::Produce, &roles.producer), (Role::Relay, &roles.relay)] {
            let grants = grant_sql(&roles.place.config, role, name);
            done(&roles.config_url(&roles.owner), &grants);
        }
        roles
    }

    fn config_url(&self, role: &Identifier) -> String {
        format!("{}?options=-c%20role%3D{role}", url())
    }

    fn config(&self, role: &Identifier) -> PostgresConfig {
        PostgresConfig {
            url: self.config_url(role).into(),
            ..self.place.config.clone()
        }
    }

    async fn connect(&self, role: &Identifier) -> PgConnection {
        PgConnection::connect(&self.config_url(role)).await.unwrap()
    }

    /// That the role may not do it; not that it fails for another reason.
    fn denied(&self, role: &Identifier, sql: &str) {
        let output = psql(&self.config_url(role), self.place.named(sql));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success()
                && (said.contains("permission denied") || said.contains("must be owner")),
            "{sql}: {said}"
        );
    }
}

impl Drop for Roles {
    fn drop(&mut self) {
        let schema = &self.place.config.schema;
        psql(
            &url(),
            format!(
                "DROP SCHEMA IF EXISTS \"{schema}\" CASCADE; DROP ROLE {}; DROP ROLE {}; DROP ROLE {}",
                self.owner, self.producer, self.relay
            ),
        );
    }
}

fn later() -> SystemTime {
    SystemTime::now() + Duration::from_secs(3600)
}

fn scheduled(key: &str) -> Message {
    Message::builder("t")
        .key(key.to_owned())
        .payload("later")
        .deliver_at(later())
        .build()
        .unwrap()
}

#[tokio::test]
async fn a_producer_may_enqueue_and_receive_and_nothing_else() {
    for ordering in [Ordering::Insert, Ordering::Sequenced] {
        let roles = Roles::new(ordering).await;
        let (place, producer) = (&roles.place, &roles.producer);
        let mut connection = roles.connect(producer).await;
        let outbox = &place.outbox;
        let one = message("t", Some("k"), "p");
        outbox.enqueue(&mut connection, &one).await.unwrap();
        outbox
            .enqueue_many(
                &mut connection,
                &[message("t", Some("k"), "p"), message("t", None, "p")],
            )
            .await
            .unwrap();
        outbox.enqueue(&mut connection, &scheduled("k")).await.unwrap();
        outbox
            .enqueue_many(&mut connection, &[scheduled("k"), message("t", Some("l"), "p")])
            .await
            .unwrap();
        for sql in [
            "SELECT {_enqueue}('t', 'k', 'p')",
            "SELECT {_enqueue}('t', NULL, 'p', '{\"a\": \"b\"}', 'text/plain')",
            "SELECT {_enqueue_bytes}('t', '\\x00', '\\xff')",
            "SELECT {_enqueue}('t', 'k', 'p', deliver_at => now() + interval '1 hour')",
        ] {
            done(&roles.config_url(producer), &place.named(sql));
        }
        if ordering == Ordering::Insert {
            done(
                &roles.config_url(producer),
                &place.named("INSERT INTO {} (topic, key, payload) VALUES ('t', 'k', 'p')"),
            );
        }
        let rows = if ordering == Ordering::Insert { 8 } else { 7 };
        assert_eq!(place.number("SELECT count(*) FROM {}").await, rows);
        assert_eq!(place.number("SELECT count(*) FROM {_scheduled}").await, 3);

        let inbox = PostgresInbox::new(&place.config).unwrap();
        assert_eq!(
            inbox.receive(&mut connection, "c", one.id()).await.unwrap(),
            Receive::Fresh
        );
        assert_eq!(
            inbox.receive(&mut connection, "c", one.id()).await.unwrap(),
            Receive::Duplicate
        );
        assert_eq!(
            inbox
                .purge(&mut connection, Duration::from_secs(7200), 10)
                .await
                .unwrap(),
            0
        );

        for sql in [
            "SELECT count(*) FROM {}",
            "SELECT payload FROM {}",
            "DELETE FROM {}",
            "UPDATE {} SET payload = NULL",
            "TRUNCATE {}",
            "INSERT INTO {} (id, topic) VALUES (1, 't')",
            "SELECT setval('{_id_seq}', 1)",
            "SELECT last_value FROM {_id_seq}",
            "SELECT * FROM {_lease}",
            "UPDATE {_lease} SET owner = 'me'",
            "SELECT * FROM {_relay}",
            "SELECT * FROM {_dead}",
            "DELETE FROM {_dead}",
            "INSERT INTO {_dead} DEFAULT VALUES",
            "SELECT * FROM {_hold}",
            "DELETE FROM {_hold}",
            "SELECT * FROM {_scheduled}",
            "DELETE FROM {_scheduled}",
            "SELECT * FROM {_processed}",
            "SELECT * FROM {_status}",
            "UPDATE {_meta} SET value = '0'",
            "ALTER TABLE {} ADD mine int",
            "DROP TABLE {}",
        ] {
            roles.denied(producer, sql);
        }
        let error = PostgresStore::connect(roles.config(producer)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
        assert!(error.to_string().contains("grant_sql"), "{error}");
    }
}

#[tokio::test]
async fn a_relay_may_do_all_of_a_relay_and_an_operator_and_alter_nothing() {
    for ordering in [Ordering::Insert, Ordering::Sequenced] {
        let roles = Roles::new(ordering).await;
        let place = &roles.place;
        let mut producer = roles.connect(&roles.producer).await;
        for number in 0..6 {
            let one = message("t", Some(&format!("k{}", number % 3)), &number.to_string());
            place.outbox.enqueue(&mut producer, &one).await.unwrap();
        }
        place
            .outbox
            .enqueue(&mut producer, &scheduled("k0"))
            .await
            .unwrap();

        let config = roles.config(&roles.relay);
        assert_eq!(migrate(&config).await.unwrap().from, Some(1), "it may look");
        let store = PostgresStore::connect(config).await.unwrap();
        let lease = outbox_core::LeaseRequest {
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
        let mut part = |record: &Record| -> usize {
            match parts.iter().position(|part| part.shard == record.shard) {
                Some(index) => index,
                None => {
                    let epoch = owned.iter().find(|own| own.shard == record.shard).unwrap().epoch;
                    parts.push(ShardSettlement::new(record.shard, epoch));
                    parts.len() - 1
                }
            }
        };
        let (first, second) = (part(&records[0]), part(&records[1]));
        parts[first].dead.push(Death {
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
        parts[second].holds.push(HoldChange::Put(hold.clone()));
        let settled = store.settle(&place.settlement(parts)).await.unwrap();
        assert!(settled.lost.is_empty());

        assert_eq!(store.holds(&owned).await.unwrap().len(), 1);
        let parking = store.parking().unwrap();
        assert_eq!(parking.parked(10).await.unwrap().len(), 1);
        assert!(parking.resume(&hold.reference()).await.unwrap());
        assert!(
            !parking.bury(&hold.reference()).await.unwrap(),
            "it is not parked"
        );
        place.sql("UPDATE {_hold} SET parked = true").await;
        assert!(parking.bury(&hold.reference()).await.unwrap());

        let letters = store.dead_letters().unwrap();
        let dead = letters.list(&DeadLetterQuery::default()).await.unwrap();
        assert_eq!(dead.len(), 2);
        assert_eq!(letters.requeue(&[dead[0].record]).await.unwrap(), 1);
        assert_eq!(letters.discard(&[dead[1].record]).await.unwrap(), 1);

        place.sql("UPDATE {_scheduled} SET deliver_at = now()").await;
        let promotion = store
            .scheduled()
            .unwrap()
            .promote(&place.relay, &owned, 10)
            .await
            .unwrap();
        assert_eq!(promotion.promoted, 1);
        let stats = store.stats().await.unwrap();
        assert_eq!(
            (stats.backlog.value(), stats.dead, stats.processed.value()),
            (2, 0, 4)
        );
        assert_eq!(
            store
                .retention()
                .unwrap()
                .purge(Duration::ZERO, 10)
                .await
                .unwrap(),
            4
        );
        assert_eq!(
            done(
                &roles.config_url(&roles.relay),
                &place.named("SELECT count(*) FROM {_status}")
            ),
            "2"
        );
        store
            .release(&place.relay, &owned, Membership::Leaves)
            .await
            .unwrap();

        for sql in [
            "ALTER TABLE {} ADD mine int",
            "ALTER TABLE {} ALTER id DROP DEFAULT",
            "ALTER SEQUENCE {_id_seq} CACHE 20",
            "SELECT setval('{_id_seq}', 1)",
            "CREATE TABLE {_mine} (a int)",
            "DROP TABLE {_dead}",
            "TRUNCATE {}",
            "UPDATE {} SET payload = NULL",
            "UPDATE {_meta} SET value = '0'",
            "CREATE INDEX ON {} (topic)",
        ] {
            roles.denied(&roles.relay, &sql.replace("{_mine}", &place.table("_mine")));
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

#[tokio::test]
async fn the_owner_hands_rights_to_no_stranger() {
    let roles = Roles::new(Ordering::Insert).await;
    let stranger = Identifier::new(&unique("stranger")).unwrap();
    done(&url(), &format!("CREATE ROLE {stranger}"));
    for sql in [
        "SELECT {_enqueue}('t', 'k', 'p')",
        "SELECT count(*) FROM {_status}",
        "INSERT INTO {_inbox} (consumer, message_id) VALUES ('c', gen_random_uuid())",
    ] {
        roles.denied(&stranger, sql);
    }
    done(&url(), &format!("DROP ROLE {stranger}"));
    let id = MessageId::new();
    let mut connection = roles.connect(&roles.producer).await;
    let inbox = PostgresInbox::new(&roles.place.config).unwrap();
    inbox.receive(&mut connection, "c", id).await.unwrap();
}
