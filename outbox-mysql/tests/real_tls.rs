//! Encrypted, verified connections, logins, and that no secret is told whatever happens.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Place, Server, delivered, done, fetch, on_each_server, request, shell};
use outbox_core::{
    DeadLetterQuery, Death, Error, ErrorKind, LeaseRequest, Membership, MemorySink, Message, OutboxStore,
    Outcome, Relay, RelayConfig, RelayId,
};
use outbox_mysql::sqlx::{self, AssertSqlSafe, Connection, MySqlConnection};
use outbox_mysql::{Identifier, MysqlConfig, MysqlStore, Role, grant_sql, migrate};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tracing_subscriber::fmt::MakeWriter;

/// `host:port` of the shared server.
fn address(server: Server) -> String {
    let url = server.url();
    let (_, place) = url.split_once('@').unwrap();
    place.split_once('/').unwrap().0.to_owned()
}

/// The login that exists only for these tests, and needs TLS.
fn login(server: Server, address: &str, password: &str, database: &str, options: &str) -> String {
    format!(
        "mysql://{}:{password}@{address}/{database}?{options}",
        server.told("_USER")
    )
}

/// Of a database in which nothing is granted.
fn stranger(server: Server, options: &str) -> String {
    let password = server.told("_PASSWORD");
    login(server, &address(server), &password, "mysql", options)
}

fn ca(server: Server) -> String {
    format!("ssl-ca={}", server.told("_CA"))
}

async fn refusal(url: &str) -> Error {
    let config = MysqlConfig {
        connect_timeout: Duration::from_secs(5),
        ..MysqlConfig::new(url)
    };
    let error = migrate(&config).await.unwrap_err();
    println!("{error:?}");
    error
}

/// An outbox on which the login may run a relay.
struct Granted(Place);

impl Granted {
    async fn new(server: Server) -> Self {
        let granted = Self(Place::with(server, |config| config.shards = 1).await);
        done(server, &granted.owner(), &granted.grants());
        granted
    }

    fn owner(&self) -> String {
        self.0.server.database(&self.0.database)
    }

    fn grants(&self) -> String {
        let user = Identifier::new(&self.0.server.told("_USER")).unwrap();
        [Role::Produce, Role::Relay]
            .map(|role| grant_sql(&self.0.config, role, &user))
            .concat()
    }

    fn url(&self, options: &str) -> String {
        let server = self.0.server;
        let password = server.told("_PASSWORD");
        login(server, &address(server), &password, &self.0.database, options)
    }

    fn verified(&self) -> String {
        self.url(&format!("ssl-mode=VERIFY_IDENTITY&{}", ca(self.0.server)))
    }
}

/// The login outlives the database.
impl Drop for Granted {
    fn drop(&mut self) {
        let revoke = self
            .grants()
            .replace("GRANT ", "REVOKE ")
            .replace(" TO ", " FROM ");
        shell(self.0.server, &self.owner(), revoke);
    }
}

async fn a_verified_server_and_a_login_by_password_work(server: Server) {
    let granted = Granted::new(server).await;
    for mode in ["VERIFY_IDENTITY", "VERIFY_CA", "REQUIRED"] {
        let url = granted.url(&format!("ssl-mode={mode}&{}", ca(server)));
        let store = MysqlStore::connect(MysqlConfig {
            url: url.clone().into(),
            ..granted.0.config.clone()
        })
        .await
        .unwrap();
        let _reader = store.reader().await.unwrap();
        let mut connection = MySqlConnection::connect(&url).await.unwrap();
        for (status, least) in [("Ssl_cipher", 4), ("Ssl_version", 4)] {
            let asked = format!("SHOW SESSION STATUS LIKE '{status}'");
            let (_, told): (String, String) = sqlx::query_as(AssertSqlSafe(asked))
                .fetch_one(&mut connection)
                .await
                .unwrap();
            assert!(told.len() > least, "{mode}: {status} {told}");
        }
        let user: String = sqlx::query_scalar("SELECT CURRENT_USER()")
            .fetch_one(&mut connection)
            .await
            .unwrap();
        assert_eq!(user, format!("{}@%", server.told("_USER")));
    }
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

/// A CA that has signed nothing: `ca.pem`.
fn another_ca(dir: &Path) {
    fs::write(
        dir.join("cnf"),
        "[req]\ndistinguished_name=name\n[name]\n[ca]\nbasicConstraints=critical,CA:TRUE\n\
         keyUsage=critical,keyCertSign,cRLSign\n",
    )
    .unwrap();
    openssl(
        dir,
        "req -config cnf -x509 -extensions ca -days 30 -subj /CN=another -nodes -newkey ec \
         -pkeyopt ec_paramgen_curve:P-256 -keyout ca.key -out ca.pem",
    );
}

async fn a_server_of_an_unknown_ca_is_refused(server: Server) {
    let dir = tempfile::tempdir().unwrap();
    another_ca(dir.path());
    for mode in ["VERIFY_IDENTITY", "VERIFY_CA"] {
        for ca in [
            format!("&ssl-ca={}", dir.path().join("ca.pem").display()),
            // The system's CAs do not know the test's.
            String::new(),
        ] {
            let error = refusal(&stranger(server, &format!("ssl-mode={mode}{ca}"))).await;
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{mode} {ca}");
            assert!(error.to_string().contains("ssl-ca"), "{error}");
        }
    }
}

async fn a_ca_that_cannot_be_read_is_told(server: Server) {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("none.pem");
    let options = format!("ssl-mode=VERIFY_IDENTITY&ssl-ca={}", missing.display());
    let error = refusal(&stranger(server, &options)).await;
    assert!(
        matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Invalid),
        "{error:?}"
    );
    assert!(!format!("{error:?}").contains(&server.told("_PASSWORD")));
}

/// Stands before the server at another address, which is in no certificate; and hides, when told to, that it offers TLS.
async fn stand_in(server: Server, hides_tls: bool) -> String {
    let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let at = listener.local_addr().unwrap().to_string();
    let behind = address(server);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut server = TcpStream::connect(&behind).await.unwrap();
            let mut greeting = vec![0; 4];
            server.read_exact(&mut greeting).await.unwrap();
            let length = usize::from(greeting[0]) + 256 * usize::from(greeting[1]);
            greeting.resize(4 + length, 0);
            server.read_exact(&mut greeting[4..]).await.unwrap();
            if hides_tls {
                // The version's end; then the connection's number, 8 bytes of the challenge, a NUL, and what it is able to do.
                let version = 5 + greeting[5..].iter().position(|byte| *byte == 0).unwrap();
                greeting[version + 1 + 4 + 8 + 1 + 1] &= !0x08;
            }
            client.write_all(&greeting).await.unwrap();
            tokio::spawn(async move { copy_bidirectional(&mut client, &mut server).await });
        }
    });
    at
}

async fn another_hosts_certificate_is_refused(server: Server) {
    let granted = Granted::new(server).await;
    let at = stand_in(server, false).await;
    let password = server.told("_PASSWORD");
    let through = |options: &str| login(server, &at, &password, &granted.0.database, options);
    let error = refusal(&through(&format!("ssl-mode=VERIFY_IDENTITY&{}", ca(server)))).await;
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("valid for this host"), "{error}");
    // The certificate itself is good: whoever does not ask for the name gets in.
    let config = MysqlConfig {
        url: through(&format!("ssl-mode=VERIFY_CA&{}", ca(server))).into(),
        ..granted.0.config.clone()
    };
    MysqlStore::connect(config).await.unwrap();
}

async fn what_was_asked_for_is_never_less(server: Server) {
    let at = stand_in(server, true).await;
    let password = server.told("_PASSWORD");
    for mode in ["REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY"] {
        let options = format!("ssl-mode={mode}&{}", ca(server));
        let error = refusal(&login(server, &at, &password, "mysql", &options)).await;
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{mode}");
        assert!(error.to_string().contains("offer TLS"), "{error}");
    }
}

async fn a_wrong_login_is_denied(server: Server) {
    let tls = format!("ssl-mode=VERIFY_IDENTITY&{}", ca(server));
    let wrong = login(server, &address(server), "wrong", "mysql", &tls);
    assert_eq!(refusal(&wrong).await.kind(), ErrorKind::Denied);
    let nobody = format!("mysql://nobody:wrong@{}/mysql?{tls}", address(server));
    assert_eq!(refusal(&nobody).await.kind(), ErrorKind::Denied);
    // Whom nothing is granted.
    let error = refusal(&stranger(server, &tls)).await;
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("grant_sql"), "{error}");
}

on_each_server!(
    a_verified_server_and_a_login_by_password_work,
    a_server_of_an_unknown_ca_is_refused,
    a_ca_that_cannot_be_read_is_told,
    another_hosts_certificate_is_refused,
    what_was_asked_for_is_never_less,
    a_wrong_login_is_denied,
);

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

/// The forms in which a text could be told: as it is, as hex, as a list of numbers.
fn forms(canary: &str) -> [String; 3] {
    let hex = canary.bytes().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    let numbers: Vec<String> = canary.bytes().map(|byte| byte.to_string()).collect();
    [canary.to_owned(), hex, numbers.join(", ")]
}

/// What errors and values say of themselves.
#[derive(Default)]
struct Told(String);

impl Told {
    fn tell(&mut self, what: &dyn std::fmt::Debug) {
        let _ = writeln!(self.0, "{what:?} {what:#?}");
    }
}

/// One test, because the log is the whole process's.
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
    let mut told = Told::default();
    for server in common::SERVERS {
        connecting(server, &mut told).await;
        relaying(server, &mut told).await;
    }

    let logged = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
    // A log in which nothing is found must be one in which something would be.
    assert!(logged.contains("TRACE") || logged.contains("DEBUG"), "{logged}");
    println!("{} bytes of log, {} bytes told", logged.len(), told.0.len());
    let passwords = common::SERVERS.map(|server| server.told("_PASSWORD"));
    for canary in [
        "canary-password",
        "canary%2Dpassword",
        &passwords[0],
        &passwords[1],
        "canary-key",
        "canary-payload",
        "canary-header",
    ] {
        for form in forms(canary) {
            for (place, text) in [("the log", &logged), ("an error or a Debug", &told.0)] {
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

/// Connecting badly.
async fn connecting(server: Server, told: &mut Told) {
    let tls = format!("ssl-mode=VERIFY_IDENTITY&{}", ca(server));
    let closed = "127.0.0.1:1".to_owned();
    let at = address(server);
    for (address, password, options) in [
        (&at, "canary-password", tls.as_str()),
        (&at, "canary%2Dpassword", tls.as_str()),
        (&at, "canary-password", "ssl-mode=VERIFY_IDENTITY"),
        (&at, "canary-password", "ssl-mode=DISABLED"),
        (&at, "canary-password", "ssl-mode=canary-password"),
        (&at, "canary-password", "charset=canary-password"),
        (&closed, "canary-password", tls.as_str()),
    ] {
        let config = MysqlConfig {
            connect_timeout: Duration::from_secs(2),
            ..MysqlConfig::new(login(server, address, password, "mysql", options))
        };
        let error = MysqlStore::connect(config.clone()).await.unwrap_err();
        told.tell(&config);
        told.tell(&error);
        told.tell(&error.to_string());
    }
}

/// Everything that a message goes through.
async fn relaying(server: Server, told: &mut Told) {
    let granted = Granted::new(server).await;
    let place = &granted.0;
    let store = MysqlStore::connect(MysqlConfig {
        url: granted.verified().into(),
        statement_timeout: Duration::from_millis(1_000),
        ..place.config.clone()
    })
    .await
    .unwrap();
    told.tell(&store);
    let message = |content_type: &str| {
        Message::builder("t")
            .key("canary-key")
            .payload("canary-payload")
            .header("h", "canary-header")
            .content_type(content_type.to_owned())
            .build()
            .unwrap()
    };
    let mut connection = MySqlConnection::connect(&granted.verified()).await.unwrap();
    for _ in 0..3 {
        place
            .outbox
            .enqueue(&mut connection, &message("a/b"))
            .await
            .unwrap();
    }
    place
        .sql("ALTER TABLE {} ADD CONSTRAINT refuse CHECK (content_type IS NULL OR content_type <> 'refuse/me')")
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
        told.tell(&error);
        told.tell(&error.to_string());
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
    told.tell(&reader);
    told.tell(&records);
    let mut parts = delivered(&owned, &records[..1]);
    parts[0].dead.push(Death {
        record: records[1].reference(),
        attempts: 1,
        reason: "no".into(),
    });
    let settlement = place.settlement(parts);
    told.tell(&settlement);
    // Too late, refused, and then done.
    let mut blocker = outbox_mysql::begin(&place.pool).await.unwrap();
    let lock = place.named("SELECT * FROM {_lease} FOR UPDATE");
    sqlx::raw_sql(AssertSqlSafe(lock))
        .execute(&mut *blocker)
        .await
        .unwrap();
    told.tell(&store.settle(&settlement).await.unwrap_err());
    blocker.rollback().await.unwrap();
    place
        .sql("ALTER TABLE {_dead} ADD CONSTRAINT never CHECK (attempts > 5)")
        .await;
    told.tell(&store.settle(&settlement).await.unwrap_err());
    place.sql("ALTER TABLE {_dead} DROP CONSTRAINT never").await;
    told.tell(&store.settle(&settlement).await.unwrap());
    let letters = store.dead_letters().unwrap();
    told.tell(&letters.list(&DeadLetterQuery::default()).await.unwrap());
    store
        .release(&lease.relay, &owned, Membership::Leaves)
        .await
        .unwrap();

    // A whole relay, whose sink refuses.
    let sink = MemorySink::new();
    sink.fail_next(Outcome::Retry("later".into()));
    let relay = Relay::new(Arc::new(store), Box::new(sink.clone())).with_config(RelayConfig::default());
    told.tell(&relay);
    tokio::time::timeout(Duration::from_secs(30), relay.drain(std::future::pending()))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(sink.delivered().len(), 1);
}
