//! What is understood, and what is refused how.

use outbox::mongo::MongoConfig;
use outbox::mysql::MysqlConfig;
use outbox::postgres::PostgresConfig;
use outbox::sqlite::SqliteConfig;

use super::*;

fn load(text: &str, environment: &[(&str, &str)]) -> Result<Settings> {
    let mut root = Node::parse("o.toml", text)?;
    let environment = environment
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    root.overlay_all(environment)?;
    Settings::read(root)
}

fn refusal(text: &str, environment: &[(&str, &str)]) -> String {
    let failure = load(text, environment).unwrap_err();
    assert_eq!(failure.code, Code::Usage, "{}", failure.line);
    failure.line
}

fn kafka(text: &str, environment: &[(&str, &str)]) -> KafkaConfig {
    match load(text, environment).unwrap().sink {
        Some(SinkSettings::Kafka { config, .. }) => config,
        other => panic!("{other:?}"),
    }
}

const STORE: &str = "[store]\ntype = 'sqlite'\npath = 'a.db'\n";

#[test]
fn the_example_shows_all_settings_and_their_defaults() {
    let example = example(ExampleStore::Sqlite);
    let shown = load(&example, &[]).unwrap();
    assert_eq!(shown.relay.config, RelayConfig::default());
    // With every default written out the meaning is the same.
    let written: String = example
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.is_empty() && !rest.starts_with(' ') && !rest.starts_with("rate_limit") => {
                rest
            }
            _ => line,
        })
        .filter(|line| {
            !line.starts_with("sasl.") && !line.starts_with("security.") && !line.starts_with("compression.")
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let spelt = load(&written, &[]).unwrap();
    assert_eq!(spelt.relay.config, RelayConfig::default());
    assert_eq!(spelt.relay.name, shown.relay.name);
    assert_eq!((&shown.relay.listen, shown.relay.listen_public), (&None, false));
    assert_eq!(spelt.relay.listen.as_deref(), Some("127.0.0.1:9090"));
    let StoreSettings::Sqlite(store) = spelt.store else {
        panic!("{:?}", spelt.store)
    };
    assert_eq!(store, SqliteConfig::new("app.db"));
    assert_eq!(kafka(&written, &[]), KafkaConfig::new("localhost:9092"));
    // Nothing that can be set is missing.
    for field in fields(&RelayConfig::default()).chain(fields(&SqliteConfig::default())) {
        let known = |line: &str| line.trim_start_matches('#').starts_with(&format!("{field} = "));
        assert!(
            field == "limits" || example.lines().any(known),
            "{field} is missing"
        );
    }
}

/// What is written out for PostgreSQL is what the crate does by itself.
#[test]
fn the_example_for_postgres_shows_the_defaults() {
    let default = PostgresConfig::new("postgres://relay@localhost/app");
    shows_the_defaults(ExampleStore::Postgres, &format!("{default:?}"));
}

#[test]
fn the_example_for_mysql_shows_the_defaults() {
    let default = MysqlConfig::new("mysql://relay@localhost/app");
    shows_the_defaults(ExampleStore::Mysql, &format!("{default:?}"));
}

#[test]
fn the_example_for_mongo_shows_the_defaults() {
    let default = MongoConfig::new("mongodb://relay@localhost/app");
    shows_the_defaults(ExampleStore::Mongo, &format!("{default:?}"));
}

fn shows_the_defaults(store: ExampleStore, default: &str) {
    let example = example(store);
    let store = |text: &str| match load(text, &[]).unwrap().store {
        StoreSettings::Postgres(config) => format!("{config:?}"),
        StoreSettings::Mysql(config) => format!("{config:?}"),
        StoreSettings::Mongo(config) => format!("{config:?}"),
        other => panic!("{other:?}"),
    };
    let written: String = example
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.is_empty() && !rest.starts_with(' ') => rest,
            _ => line,
        })
        .take_while(|line| !line.starts_with("[sink]"))
        .flat_map(|line| [line, "\n"])
        .collect();
    assert_eq!(store(&example), default);
    assert_eq!(store(&written), default);
    // Nothing that can be set is missing: the names are those that `Debug` shows.
    for field in default.split(", ").filter_map(|part| part.split_once(": ")) {
        let name = field.0.rsplit(' ').next().unwrap();
        let known = |line: &str| line.trim_start_matches('#').starts_with(&format!("{name} = "));
        let inner = ["limits", "max_headers", "require_key"].contains(&name);
        assert!(inner || example.lines().any(known), "{name} is missing");
    }
}

/// A URL may stand in a file, and is told nowhere.
#[test]
fn a_url_may_stand_in_a_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "postgres://relay:canary@localhost/app\n").unwrap();
    let text = |more: &str| {
        format!(
            "[store]\ntype = 'postgres'\nurl_from_file = {:?}\n{more}",
            file.path().display().to_string()
        )
    };
    let settings = load(&text(""), &[]).unwrap();
    assert_eq!(settings.store.describe(), "postgres://localhost:5432/app");
    assert!(!format!("{settings:?}").contains("canary"));
    let twice = refusal(&text("url = 'postgres://relay:canary@localhost/app'"), &[]);
    assert!(
        twice.contains("given twice") && !twice.contains("canary"),
        "{twice}"
    );
    let missing = refusal(
        "[store]\ntype = 'postgres'\nurl_from_file = '/nowhere/at/all'",
        &[],
    );
    assert!(missing.contains("store.url_from_file"), "{missing}");
}

fn fields(config: &impl serde::Serialize) -> impl Iterator<Item = String> {
    let value = serde_json::to_value(config).unwrap();
    value
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect::<Vec<_>>()
        .into_iter()
}

#[test]
fn durations_are_written_as_people_write_them() {
    let settings = load(
        &format!(
            "{STORE}[relay]\nlease = '1m 30s'\nretry = {{ initial = '10ms', max = '2s' }}\nrate_limit = 7\n"
        ),
        &[],
    )
    .unwrap();
    let config = settings.relay.config;
    assert_eq!(config.lease, std::time::Duration::from_secs(90));
    assert_eq!(config.retry.initial, std::time::Duration::from_millis(10));
    assert_eq!(config.rate_limit, Some(7));
}

#[test]
fn the_environment_has_the_last_word() {
    let text =
        format!("{STORE}[sink]\ntype = 'kafka'\nbootstrap_servers = 'a:1'\noptions.sasl.username = 'file'\n");
    let environment = [
        ("OUTBOX_STORE__PATH", "123"),
        ("OUTBOX_RELAY__BATCH_ROWS", "77"),
        ("OUTBOX_RELAY__ON_FAILURE", "park"),
        ("OUTBOX_RELAY__RATE_LIMIT", "5"),
        ("OUTBOX_STORE__ARCHIVE", "true"),
        ("OUTBOX_SINK__BOOTSTRAP_SERVERS", "b:2"),
        ("OUTBOX_SINK__OPTIONS__SASL_USERNAME", "007"),
        ("OUTBOX_SINK__OPTIONS__SECURITY_PROTOCOL", "SASL_PLAINTEXT"),
        ("OUTBOX_SINK__OPTIONS__SASL_MECHANISM", "PLAIN"),
        ("OUTBOX_SINK__OPTIONS__SASL_PASSWORD", "true"),
        ("OUTBOX_TEST_KAFKA", "not ours"),
    ];
    let settings = load(&text, &environment).unwrap();
    let StoreSettings::Sqlite(store) = &settings.store else {
        panic!("{:?}", settings.store)
    };
    assert_eq!((store.path.to_str(), store.archive), (Some("123"), true));
    assert_eq!(settings.relay.config.batch_rows, 77);
    assert_eq!(settings.relay.config.on_failure, outbox::OnFailure::Park);
    assert_eq!(settings.relay.config.rate_limit, Some(5));
    let config = kafka(&text, &environment);
    assert_eq!(config.bootstrap_servers, "b:2");
    assert_eq!(config.options["sasl.username"], "007");
    assert_eq!(config.options["sasl.password"], "true");
}

#[test]
fn the_environment_alone_is_enough() {
    let settings = load(
        "",
        &[("OUTBOX_STORE__TYPE", "sqlite"), ("OUTBOX_SINK__TYPE", "stdout")],
    )
    .unwrap();
    assert!(matches!(settings.sink, Some(SinkSettings::Stdout)));
    assert!(refusal("", &[]).contains("there is no store"));
}

#[test]
fn complaints_name_place_setting_value_and_range() {
    for (section, expected) in [
        (
            "[relay]\nlease = '5ms'",
            "configuration: o.toml:5:1: configure relay: lease must be 100ms to 3600s (value: \"5ms\")",
        ),
        (
            "[relay]\nlease = 'soon'",
            "configuration: o.toml:5:1: relay.lease: expected a duration such as \"10s\", \"250ms\" or \"1h 30m\" (value: \"soon\")",
        ),
        (
            "[relay]\nretry = { initial = 5, max = '1s' }",
            "configuration: o.toml:5:11: relay.retry.initial: expected a duration such as \"10s\", \"250ms\" or \"1h 30m\" (value: 5)",
        ),
        (
            "[relay]\nlisten = true",
            "configuration: o.toml:5:1: relay.listen: expected a string (value: true)",
        ),
        (
            "[relay]\nbatch_rows = 'many'",
            "configuration: o.toml:5:1: relay.batch_rows: expected a whole number, 0 or more (value: \"many\")",
        ),
        (
            "[relay]\nbatch_rows = -1",
            "configuration: o.toml:5:1: relay.batch_rows: expected a whole number, 0 or more (value: -1)",
        ),
        (
            "[relay]\n\nleese = '5s'",
            "configuration: o.toml:6:1: relay.leese: unknown field `leese`",
        ),
        (
            "[relay.retry]\nmin = '5s'",
            "configuration: o.toml:5:1: relay.retry.min: unknown field `min`",
        ),
        (
            "[relay]\non_failure = 'pray'",
            "relay.on_failure: unknown variant `pray`",
        ),
        (
            "[relay]\nname = 'a b'",
            "o.toml:5:1: relay.name: expected 1 to 64 characters",
        ),
        ("[sinks]\n", "configuration: o.toml:4:2: unknown section `sinks`"),
        (
            "[sink]\ntype = 'stdout'\npath = 'x'",
            "o.toml:6:1: unknown field `sink.path`",
        ),
        (
            "[sink]\ntype = 'rabbit'",
            "sink.type: expected kafka or stdout (value: \"rabbit\")",
        ),
        ("[sink]\nbootstrap_servers = 'x'", "sink.type is missing"),
        ("[sink]\ntype = 'kafka'", "bootstrap_servers"),
        (
            "[sink]\ntype = 'kafka'\nbrokers = 'x'",
            "o.toml:6:1: sink.brokers: unknown field `brokers`",
        ),
    ] {
        let line = refusal(&format!("{STORE}{section}\n"), &[]);
        assert!(line.contains(expected), "{line}\n{expected}");
    }
}

#[test]
fn a_variable_is_named_as_the_place() {
    let line = refusal(STORE, &[("OUTBOX_RELAY__LEASE", "5ms")]);
    assert!(
        line.contains("OUTBOX_RELAY__LEASE: configure relay: lease must be"),
        "{line}"
    );
    let line = refusal(STORE, &[("OUTBOX_RELAY__LEESE", "5s")]);
    assert!(
        line.contains("OUTBOX_RELAY__LEESE: relay.leese: unknown field"),
        "{line}"
    );
    let line = refusal(STORE, &[("OUTBOX_RELY__LEASE", "5s")]);
    assert!(
        line.contains("OUTBOX_RELY__LEASE: unknown section `rely`"),
        "{line}"
    );
    let line = refusal(STORE, &[("OUTBOX_RELAY__BATCH_ROWS", "many")]);
    assert!(
        line.contains("OUTBOX_RELAY__BATCH_ROWS: relay.batch_rows: expected a whole number"),
        "{line}"
    );
}

#[test]
fn values_of_the_sink_are_never_shown() {
    for sink in [
        "options = 'sasl.password=canary'",
        "request_timeout = ['canary']",
        "outage_after = { x = 'canary' }",
        "options = { 'sasl.pasword' = 'canary' }",
        "options = { 'sasl.password' = ['canary'] }",
        "options = { 'sasl.password' = 'canary' }",
        "options = { 'enable.idempotence' = 'false', 'sasl.password' = 'canary' }",
        "password = 'canary'",
        "danger_accept_invalid_certificates = 'canary'",
        "options_from_file = 'canary'",
        "options_from_file = { 'sasl.password' = ['canary'] }",
    ] {
        let line = refusal(
            &format!("{STORE}[sink]\ntype = 'kafka'\nbootstrap_servers = 'x'\n{sink}\n"),
            &[],
        );
        assert!(!line.contains("canary"), "{sink}: {line}");
    }
}

#[test]
fn a_store_s_url_is_never_shown() {
    for url in [
        "url = 'postgres://relay:canary@db/app'",
        "url = ['canary']",
        "url.password = 'canary'",
        "url_from_file = 'canary'",
    ] {
        let line = refusal(&format!("{STORE}{url}\n"), &[]);
        assert!(
            line.contains("store.url") && !line.contains("canary"),
            "{url}: {line}"
        );
    }
    let line = refusal(STORE, &[("OUTBOX_STORE__URL", "postgres://relay:canary@db/app")]);
    assert!(
        line.contains("OUTBOX_STORE__URL: store.url") && !line.contains("canary"),
        "{line}"
    );
}

#[test]
fn what_is_no_plain_word_is_not_shown_as_a_type() {
    let url = "postgres://relay:canary@db/app";
    let long = "canary".repeat(6);
    for wrong in [url, "canary canary", "canary\n", "känary-canary", long.as_str()] {
        let texts = [
            (
                format!("[store]\ntype = {wrong:?}\n"),
                "store.type: expected sqlite, postgres",
            ),
            (
                format!("{STORE}[sink]\ntype = {wrong:?}\n"),
                "sink.type: expected kafka or stdout",
            ),
        ];
        for (text, expected) in texts {
            let line = refusal(&text, &[]);
            assert!(line.contains(expected) && !line.contains("canary"), "{line}");
        }
    }
    let line = refusal("", &[("OUTBOX_STORE__TYPE", "my-sql_8")]);
    assert!(
        line.contains("store.type: expected") && line.ends_with("(value: \"my-sql_8\")"),
        "{line}"
    );
}

#[test]
fn where_to_listen_may_be_a_number() {
    let listen = |section: &str, environment: &[(&str, &str)]| {
        load(&format!("{STORE}[relay]\n{section}\n"), environment)
            .unwrap()
            .relay
    };
    assert_eq!(listen("listen = 9090", &[]).listen.as_deref(), Some("9090"));
    let public = listen(
        "listen = ':9090'\nlisten_public = true",
        &[("OUTBOX_RELAY__LISTEN", "0.0.0.0:80")],
    );
    assert_eq!(
        (public.listen.as_deref(), public.listen_public),
        (Some("0.0.0.0:80"), true)
    );
}

#[test]
fn an_option_is_given_once() {
    let line = refusal(
        &format!(
            "{STORE}[sink]\ntype = 'kafka'\nbootstrap_servers = 'x'\n[sink.options]\nsasl.password = 'canary'\n\
             [sink.options_from_file]\nsasl.password = '/run/x'\n"
        ),
        &[],
    );
    assert!(
        line.contains("o.toml:10:6: the option `sasl.password` is given twice, also at o.toml:8:6"),
        "{line}"
    );
}

#[test]
fn secrets_are_read_without_the_newline_at_their_end() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for (content, secret) in [("a b\n", "a b"), ("a\n\n", "a\n"), ("a", "a"), ("a\r\n", "a")] {
        std::fs::write(file.path(), content).unwrap();
        assert_eq!(read_secret("sasl.password", file.path()).unwrap(), secret);
    }
    assert!(
        read_secret("sasl.password", Path::new("/nowhere"))
            .unwrap_err()
            .line
            .contains("sasl.password")
    );
}
