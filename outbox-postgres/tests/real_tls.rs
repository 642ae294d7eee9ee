//! Encrypted, verified connections, logins, and that no secret is told whatever happens.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;
#[path = "common/server.rs"]
mod server;

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Place, delivered, done, fetch, request, url, variable};
use outbox_core::{
    DeadLetterQuery, Death, Error, ErrorKind, LeaseRequest, Membership, MemorySink, Message, OutboxStore,
    Outcome, Relay, RelayConfig, RelayId,
};
use outbox_postgres::sqlx::{Connection, PgConnection};
use outbox_postgres::{Identifier, PostgresConfig, PostgresStore, Role, grant_sql, migrate};
use server::Server;
use tracing_subscriber::fmt::MakeWriter;

/// `host:port` of the shared server.
fn address() -> String {
    url()
        .split_once('@')
        .unwrap()
        .1
        .split_once('/')
        .unwrap()
        .0
        .to_owned()
}

/// The login that exists only for these tests.
fn login(password: &str, options: &str) -> String {
    let user = variable("OUTBOX_TEST_POSTGRES_USER");
    format!("postgres://{user}:{password}@{}/postgres?{options}", address())
}

fn verified() -> String {
    let ca = variable("OUTBOX_TEST_POSTGRES_CA");
    login(
        &variable("OUTBOX_TEST_POSTGRES_PASSWORD"),
        &format!("sslmode=verify-full&sslrootcert={ca}"),
    )
}

async fn refusal(url: &str) -> Error {
    let config = PostgresConfig {
        connect_timeout: Duration::from_secs(5),
        ..PostgresConfig::new(url)
    };
    let error = migrate(&config).await.unwrap_err();
    println!("{error:?}");
    error
}

/// An outbox on which the login may run a relay.
async fn granted() -> Place {
    let place = Place::with(|config| config.shards = 1).await;
    let user = Identifier::new(&variable("OUTBOX_TEST_POSTGRES_USER")).unwrap();
    done(&url(), &grant_sql(&place.config, Role::Relay, &user));
    done(&url(), &grant_sql(&place.config, Role::Produce, &user));
    place
}

#[tokio::test]
async fn a_verified_server_and_a_login_by_password_work() {
    let place = granted().await;
    let store = PostgresStore::connect(PostgresConfig {
        url: format!("{}&application_name={}", verified(), place.config.schema).into(),
        ..place.config.clone()
    })
    .await
    .unwrap();
    let _reader = store.reader().await.unwrap();
    let sessions = done(
        &url(),
        &format!(
            "SELECT count(*), bool_and(ssl), min(usename) FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)
             WHERE application_name = '{}'",
            place.config.schema
        ),
    );
    assert_eq!(sessions, format!("2|t|{}", variable("OUTBOX_TEST_POSTGRES_USER")));
}

/// Runs openssl in a folder.
fn openssl(dir: &Path, arguments: &str) {
    let output = Command::new("openssl")
        .args(arguments.split(' '))
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A CA, and a certificate of its for `db.example`: `ca.pem`, `server.key`, `server.pem`.
fn certificates(dir: &Path) {
    fs::write(
        dir.join("cnf"),
        "[req]\ndistinguished_name=name\n[name]\n[ca]\nbasicConstraints=critical,CA:TRUE\n\
         keyUsage=critical,keyCertSign,cRLSign\n[server]\nbasicConstraints=critical,CA:FALSE\n\
         extendedKeyUsage=serverAuth\nsubjectAltName=DNS:db.example\n",
    )
    .unwrap();
    let key = "-nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256";
    openssl(
        dir,
        &format!(
            "req -config cnf -x509 -extensions ca -days 30 -subj /CN=another {key} -keyout ca.key -out ca.pem"
        ),
    );
    openssl(
        dir,
        &format!("req -config cnf -new -subj /CN=db.example {key} -keyout server.key -out server.csr"),
    );
    openssl(
        dir,
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile cnf -extensions server -days 30 \
         -out server.pem",
    );
}

#[tokio::test]
async fn a_server_of_an_unknown_ca_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let password = variable("OUTBOX_TEST_POSTGRES_PASSWORD");
    for mode in ["verify-full", "verify-ca"] {
        for ca in [
            format!("&sslrootcert={}", dir.path().join("ca.pem").display()),
            // The system's CAs do not know the test's.
            String::new(),
        ] {
            let error = refusal(&login(&password, &format!("sslmode={mode}{ca}"))).await;
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{mode} {ca}");
            assert!(error.to_string().contains("sslrootcert"), "{error}");
        }
    }
}

#[tokio::test]
async fn a_ca_that_cannot_be_read_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let password = variable("OUTBOX_TEST_POSTGRES_PASSWORD");
    let missing = dir.path().join("none.pem");
    let error = refusal(&login(
        &password,
        &format!("sslmode=verify-full&sslrootcert={}", missing.display()),
    ))
    .await;
    assert!(
        matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Invalid),
        "{error:?}"
    );
    assert!(!format!("{error:?}").contains(&password));
}

/// A server that offers no TLS, and then one whose certificate is another host's.
#[tokio::test]
async fn what_was_asked_for_is_never_less() {
    let server = Server::start("");
    let verify = |mode: &str| format!("{}?sslmode={mode}", server.url());
    for mode in ["require", "verify-ca", "verify-full"] {
        let error = refusal(&verify(mode)).await;
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{mode}");
        assert!(error.to_string().contains("offer TLS"), "{error}");
    }

    certificates(&server.certificates());
    for file in ["server.key", "server.pem"] {
        server.own(&server.certificates().join(file));
    }
    let settings = server.data().join("postgresql.conf");
    let folder = server.certificates();
    let more = format!(
        "{}ssl = on\nssl_cert_file = '{}'\nssl_key_file = '{}'\n",
        fs::read_to_string(&settings).unwrap(),
        folder.join("server.pem").display(),
        folder.join("server.key").display()
    );
    server.stop("fast");
    fs::write(&settings, more).unwrap();
    server.again();
    let ca = format!("&sslrootcert={}", folder.join("ca.pem").display());
    let error = refusal(&format!("{}{ca}", verify("verify-full"))).await;
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("valid for this host"), "{error}");
    // The certificate itself is good: whoever does not ask for the name gets in.
    let config = PostgresConfig::new(format!("{}{ca}", verify("verify-ca")));
    assert_eq!(migrate(&config).await.unwrap().from, None);
}

#[tokio::test]
async fn a_wrong_login_is_denied() {
    let ca = variable("OUTBOX_TEST_POSTGRES_CA");
    let tls = format!("sslmode=verify-full&sslrootcert={ca}");
    let error = refusal(&login("wrong", &tls)).await;
    assert_eq!(error.kind(), ErrorKind::Denied);
    let nobody = format!("postgres://nobody:wrong@{}/postgres?{tls}", address());
    assert_eq!(refusal(&nobody).await.kind(), ErrorKind::Denied);
    // Without TLS nobody but the administrator is let in.
    let plain = login(&variable("OUTBOX_TEST_POSTGRES_PASSWORD"), "sslmode=disable");
    assert_eq!(refusal(&plain).await.kind(), ErrorKind::Denied);
    // Whom nothing is granted.
    let place = Place::new().await;
    let error = PostgresStore::connect(PostgresConfig {
        url: verified().into(),
        ..place.config.clone()
    })
    .await
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
}

/// Everything that is logged, by anybody in this process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// The forms in which a text could be told: as it is, as the server's hex, as a list of numbers.
fn forms(canary: &str) -> [String; 3] {
    let hex = canary.bytes().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    let numbers: Vec<String> = canary.bytes().map(|byte| byte.to_string()).collect();
    [canary.to_owned(), hex, numbers.join(", ")]
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_told_whatever_happens() {
    let log = Log::default();
    tracing::subscriber::set_global_default(
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(log.clone())
            .finish(),
    )
    .unwrap();
    let mut told = String::new();
    let mut tell = |what: &dyn std::fmt::Debug| {
        let _ = writeln!(told, "{what:?} {what:#?}");
    };
    let place = granted().await;
    let ca = variable("OUTBOX_TEST_POSTGRES_CA");
    let config = |url: String| PostgresConfig {
        url: url.into(),
        connect_timeout: Duration::from_secs(2),
        statement_timeout: Duration::from_millis(500),
        ..place.config.clone()
    };

    // Connecting, well and badly.
    let tls = format!("sslmode=verify-full&sslrootcert={ca}");
    for (password, options) in [
        ("canary-password", tls.as_str()),
        ("canary%2Dpassword", tls.as_str()),
        ("canary-password", "sslmode=verify-full"),
        ("canary-password", "sslmode=disable"),
        ("canary-password", "sslmode=canary-password"),
        ("canary-password", "options=-c%20nonsense%3D1"),
    ] {
        let config = config(login(password, options));
        let error = PostgresStore::connect(config.clone()).await.unwrap_err();
        tell(&config);
        tell(&error);
        tell(&error.to_string());
    }
    let closed = config("postgres://app:canary-password@127.0.0.1:1/shop".into());
    let error = PostgresStore::connect(closed).await.unwrap_err();
    tell(&error);

    // Everything that a message goes through.
    let store = PostgresStore::connect(config(verified())).await.unwrap();
    tell(&store);
    let message = |content_type: &str| {
        Message::builder("t")
            .key("canary-key")
            .payload("canary-payload")
            .header("h", "canary-header")
            .content_type(content_type.to_owned())
            .build()
            .unwrap()
    };
    let mut connection = PgConnection::connect(&verified()).await.unwrap();
    for _ in 0..3 {
        place
            .outbox
            .enqueue(&mut connection, &message("a/b"))
            .await
            .unwrap();
    }
    // The server's detail would quote the row.
    place
        .sql("ALTER TABLE {} ADD CHECK (content_type IS DISTINCT FROM 'refuse/me')")
        .await;
    for enqueue in [
        place.outbox.enqueue(&mut connection, &message("refuse/me")).await,
        place
            .outbox
            .enqueue_many(&mut connection, &[message("refuse/me"), message("a/b")])
            .await,
    ] {
        let error = enqueue.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
        tell(&error);
        tell(&error.to_string());
    }
    let lease = LeaseRequest {
        relay: RelayId::new("relay"),
        want: 1,
        ttl: Duration::from_secs(60),
    };
    let owned = store.lease(&lease).await.unwrap().held;
    let mut reader = store.reader().await.unwrap();
    let (records, _) = fetch(&mut reader, &request(&owned, 10)).await;
    assert_eq!(records.len(), 3);
    tell(&reader);
    tell(&records);
    let mut parts = delivered(&owned, &records[..1]);
    parts[0].dead.push(Death {
        record: records[1].reference(),
        attempts: 1,
        reason: "no".into(),
    });
    let settlement = place.settlement(parts);
    tell(&settlement);
    // Too late, refused, and then done.
    let mut blocker = outbox_postgres::begin(&place.pool).await.unwrap();
    let lock = place.named("LOCK TABLE {_dead} IN ACCESS EXCLUSIVE MODE");
    outbox_postgres::sqlx::query(outbox_postgres::sqlx::AssertSqlSafe(lock))
        .execute(&mut *blocker)
        .await
        .unwrap();
    tell(&store.settle(&settlement).await.unwrap_err());
    blocker.rollback().await.unwrap();
    place
        .sql("ALTER TABLE {_dead} ADD CONSTRAINT never CHECK (attempts > 5)")
        .await;
    tell(&store.settle(&settlement).await.unwrap_err());
    place.sql("ALTER TABLE {_dead} DROP CONSTRAINT never").await;
    tell(&store.settle(&settlement).await.unwrap());
    tell(
        &store
            .dead_letters()
            .unwrap()
            .list(&DeadLetterQuery::default())
            .await
            .unwrap(),
    );
    store
        .release(&lease.relay, &owned, Membership::Leaves)
        .await
        .unwrap();

    // A whole relay, whose sink refuses.
    let sink = MemorySink::new();
    sink.fail_next(Outcome::Retry("later".into()));
    let relay = Relay::new(Arc::new(store), Box::new(sink.clone())).with_config(RelayConfig::default());
    tell(&relay);
    tokio::time::timeout(Duration::from_secs(30), relay.drain(std::future::pending()))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(sink.delivered().len(), 1);

    let logged = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
    // A log in which nothing is found must be one in which something would be.
    assert!(logged.contains("TRACE") || logged.contains("DEBUG"), "{logged}");
    println!("{} bytes of log, {} bytes told", logged.len(), told.len());
    let password = variable("OUTBOX_TEST_POSTGRES_PASSWORD");
    for canary in [
        "canary-password",
        "canary%2Dpassword",
        &password,
        "canary-payload",
        "canary-key",
        "canary-header",
    ] {
        for form in forms(canary) {
            for (place, text) in [("the log", &logged), ("an error or a Debug", &told)] {
                if let Some(at) = text.find(&form) {
                    let start = text[..at].rfind('\n').unwrap_or_default();
                    panic!(
                        "{canary} is in {place}: {}",
                        text[start..].lines().take(3).collect::<String>()
                    );
                }
            }
        }
    }
}
