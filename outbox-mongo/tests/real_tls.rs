//! TLS and logins, against servers of the tests' own with a certificate of the tests' own CA.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

mod common;
#[path = "common/server.rs"]
mod server;

use std::time::Duration;

use common::{until, variable};
use outbox_core::{Error, ErrorKind, OutboxStore};
use outbox_mongo::{MongoConfig, MongoStore, migrate};
use server::OwnServer;

/// A server that speaks TLS alone.
fn secured() -> OwnServer {
    let certificate = variable("OUTBOX_TEST_MONGO_CERTIFICATE");
    OwnServer::started(&["--tls-cert-file", &certificate, "--tls-key-file", &certificate])
}

fn config(server: &OwnServer, host: &str, options: &str) -> MongoConfig {
    MongoConfig {
        connect_timeout: Duration::from_secs(3),
        ..MongoConfig::new(format!("mongodb://{host}:{}/outbox_test?{options}", server.port))
    }
}

/// What is said when the outbox cannot be reached so. The server is up.
async fn refusal(server: &OwnServer, host: &str, options: &str) -> Error {
    migrate(&config(server, host, options)).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verified_server_works_and_no_other() {
    let server = secured();
    let ca = variable("OUTBOX_TEST_MONGO_CA");
    let good = config(&server, "localhost", &format!("tls=true&tlsCAFile={ca}"));
    let made = until(Duration::from_secs(60), async || migrate(&good).await.ok()).await;
    assert_eq!(made.unwrap().to, 1);
    let store = MongoStore::connect(good).await.unwrap();
    assert_eq!(store.stats().await.unwrap().backlog.value(), 0);

    // A CA that nobody knows, another host's name, plain text to a server that wants TLS.
    for (host, options) in [
        ("localhost", "tls=true".to_owned()),
        ("127.0.0.2", format!("tls=true&tlsCAFile={ca}")),
        ("localhost", "tls=false".to_owned()),
    ] {
        let error = refusal(&server, host, &options).await;
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    }
    let error = refusal(&server, "localhost", "tls=true&tlsCAFile=/nonexistent").await;
    assert!(!error.to_string().is_empty());
}

/// TLS that was asked for is never given up because the server has none.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_for_is_never_less() {
    let server = OwnServer::start(&[]).await;
    let error = refusal(&server, "localhost", "tls=true").await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    migrate(&config(&server, "localhost", "")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_login_is_denied_and_told_without_the_password() {
    let server = OwnServer::started(&["--auth"]);
    let url = format!(
        "mongodb://app:canary@127.0.0.1:{}/outbox_test?authSource=admin",
        server.port
    );
    let config = MongoConfig {
        connect_timeout: Duration::from_secs(3),
        ..MongoConfig::new(url)
    };
    let denied = until(Duration::from_secs(60), async || {
        let error = migrate(&config).await.unwrap_err();
        (error.kind() != ErrorKind::Unavailable).then_some(error)
    });
    let error = denied.await.unwrap();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
    let told = format!("{error} {error:?} {config:?}");
    assert!(!told.contains("canary"), "{told}");
    // Without a login as well.
    let nobody = MongoConfig::new(server.url());
    let error = migrate(&nobody).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
}
