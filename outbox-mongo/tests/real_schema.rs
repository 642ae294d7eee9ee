//! Making an outbox, and what is refused, on a real server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic in a test is a failure with a place"
)]

mod common;

use common::{Place, client, database, message, unique, url};
use futures::TryStreamExt;
use outbox_core::{Ordering, OutboxStore};
use outbox_mongo::mongodb::IndexModel;
use outbox_mongo::mongodb::bson::{Bson, Document, doc};
use outbox_mongo::{
    ErrorKind, Identifier, MongoConfig, MongoStore, Role, grant_script, migrate, migration_script,
};

#[tokio::test]
async fn migrating_again_changes_nothing() {
    let place = Place::new().await;
    place.enqueue(&[message("orders", Some("42"), "placed")]).await;
    let again = migrate(&place.config).await.unwrap();
    assert_eq!((again.from, again.to), (Some(1), 1));
    assert_eq!(place.fetch(10).await.len(), 1);
}

/// For how long the server keeps what was delivered is set anew each time.
#[tokio::test]
async fn the_archive_is_kept_as_long_as_configured() {
    let place = Place::new().await;
    let kept = async || {
        let told = place
            .db()
            .run_command(doc! { "listIndexes": "outbox" })
            .await
            .unwrap();
        let batch = told
            .get_document("cursor")
            .unwrap()
            .get_array("firstBatch")
            .unwrap();
        let named = batch
            .iter()
            .filter_map(|index| index.as_document())
            .find(|index| index.get_str("name") == Ok("processed"));
        let seconds = named.unwrap().get("expireAfterSeconds").unwrap().clone();
        match seconds {
            Bson::Int32(seconds) => i64::from(seconds),
            Bson::Int64(seconds) => seconds,
            other => panic!("{other}"),
        }
    };
    // As long as a server of 5.0 takes it: from now it must not reach before 1970.
    let never = 1_500_000_000;
    assert_eq!(kept().await, never, "the relay purges");
    for (days, expected) in [(7, 7 * 86_400), (20_000, never), (0, never)] {
        let config = MongoConfig {
            archive_ttl: std::time::Duration::from_secs(days * 86_400),
            ..place.config.clone()
        };
        migrate(&config).await.unwrap();
        assert_eq!(kept().await, expected);
    }
}

/// An outbox that was made when the index of the dead letters had an entry for each message gets the one that has not.
#[tokio::test]
async fn the_index_of_the_dead_is_made_anew() {
    let place = Place::new().await;
    let outbox = place.collection("");
    let dead = async || {
        let indexes = outbox.list_indexes().await.unwrap();
        let indexes: Vec<IndexModel> = indexes.try_collect().await.unwrap();
        let dead = indexes
            .into_iter()
            .filter(|index| index.keys.contains_key("dead.ts"));
        dead.map(|index| index.options.unwrap()).collect::<Vec<_>>()
    };
    let made = dead().await;
    let [only] = made.as_slice() else {
        panic!("{made:?}")
    };
    let partial = doc! { "dead.ts": { "$exists": true } };
    assert_eq!(only.partial_filter_expression, Some(partial.clone()));
    // As it was: and what was interrupted between the two is finished.
    outbox.drop_index(only.name.clone().unwrap()).await.unwrap();
    let before = doc! { "name": "dead", "key": { "dead.ts": 1, "id": 1 }, "sparse": true };
    for there in [true, false] {
        if there {
            let make = doc! { "createIndexes": "outbox", "indexes": [before.clone()] };
            place.db().run_command(make).await.unwrap();
        } else {
            outbox.drop_index(only.name.clone().unwrap()).await.unwrap();
        }
        migrate(&place.config).await.unwrap();
        let now = dead().await;
        assert_eq!(now.len(), 1, "{now:?}");
        assert_eq!(now[0].partial_filter_expression, Some(partial.clone()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_may_migrate_at_the_same_time() {
    let config = MongoConfig::new(database(&url(), &unique("t")));
    let migrating = (0..8).map(|shards| {
        // Whoever is first decides how many shards there are.
        let config = MongoConfig {
            shards: 8 + shards,
            ..config.clone()
        };
        tokio::spawn(async move { migrate(&config).await })
    });
    for migrated in futures::future::join_all(migrating).await {
        assert_eq!(migrated.unwrap().unwrap().to, 1);
    }
    let store = MongoStore::connect(config.clone()).await.unwrap();
    let shards = store.capabilities().shards;
    assert!((8..16).contains(&shards));
    assert_eq!(store.stats().await.unwrap().leases.len(), usize::from(shards));
    drop_database(&config).await;
}

async fn drop_database(config: &MongoConfig) {
    use outbox_mongo::secrecy::ExposeSecret;
    let client = client(config.url.expose_secret()).await;
    client.default_database().unwrap().drop().await.unwrap();
}

/// What was interrupted half-way is finished, as it was begun.
#[tokio::test]
async fn what_is_half_made_is_finished() {
    let config = MongoConfig::new(database(&url(), &unique("t")));
    {
        use outbox_mongo::secrecy::ExposeSecret;
        let client = client(config.url.expose_secret()).await;
        let meta = client
            .default_database()
            .unwrap()
            .collection::<Document>("outbox_meta");
        let begun = doc! { "_id": "outbox", "shards": 5, "ordering": "insert" };
        meta.insert_one(begun).await.unwrap();
    }
    let error = MongoStore::connect(config.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema, "half is none");
    assert_eq!(migrate(&config).await.unwrap().from, None);
    let store = MongoStore::connect(config.clone()).await.unwrap();
    assert_eq!(store.capabilities().shards, 5);
    drop_database(&config).await;
}

#[tokio::test]
async fn what_does_not_fit_is_refused() {
    let place = Place::new().await;
    let sequenced = MongoConfig {
        ordering: Ordering::Sequenced,
        ..place.config.clone()
    };
    for refused in [
        MongoStore::connect(sequenced.clone()).await.map(drop),
        migrate(&sequenced).await.map(drop),
    ] {
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Schema);
        assert!(error.to_string().contains("\"insert\""), "{error}");
    }
    let missing = place.config.clone().with_prefix("other").unwrap();
    let error = MongoStore::connect(missing).await.unwrap_err();
    assert!(error.to_string().contains("run migrate"), "{error}");
    let newer = doc! { "$set": { "version": 2_i64 } };
    place
        .collection("_meta")
        .update_one(doc! {}, newer)
        .await
        .unwrap();
    let error = MongoStore::connect(place.config.clone()).await.unwrap_err();
    assert!(error.to_string().contains("newer version"), "{error}");
}

#[tokio::test]
async fn several_outboxes_are_in_one_database() {
    let place = Place::new().await;
    let other = place.config.clone().with_prefix("billing").unwrap();
    migrate(&other).await.unwrap();
    place.enqueue(&[message("orders", Some("42"), "placed")]).await;
    let other = MongoStore::connect(other).await.unwrap();
    assert_eq!(other.stats().await.unwrap().backlog.value(), 0);
    assert_eq!(place.store.stats().await.unwrap().backlog.value(), 1);
}

/// The script is what `migrate` does, in the shell's words: its commands, run here, make the same outbox.
#[tokio::test]
async fn the_script_makes_the_same_outbox() {
    let config = MongoConfig::new(database(&url(), &unique("t")));
    let database = {
        use outbox_mongo::secrecy::ExposeSecret;
        client(config.url.expose_secret())
            .await
            .default_database()
            .unwrap()
    };
    for _ in 0..2 {
        for line in migration_script(&config).lines() {
            let Some(command) = line
                .strip_prefix("run('")
                .and_then(|rest| rest.strip_suffix("');"))
            else {
                continue;
            };
            let command = command.replace("\\'", "'").replace("\\\\", "\\");
            let json: serde_json::Value = serde_json::from_str(&command).unwrap();
            let command = outbox_mongo::mongodb::bson::Bson::try_from(json).unwrap();
            let done = database.run_command(command.as_document().unwrap().clone()).await;
            assert!(done.is_ok() || line.contains("\"create\""), "{line}: {done:?}");
        }
    }
    assert_eq!(migrate(&config).await.unwrap().from, Some(1));
    let made = Place::new().await;
    for suffix in ["", "_scheduled", "_hold", "_inbox"] {
        let name = format!("outbox{suffix}");
        let names = async |of: &outbox_mongo::mongodb::Database| {
            let mut names = of.collection::<Document>(&name).list_index_names().await.unwrap();
            names.sort();
            names
        };
        assert_eq!(names(&database).await, names(&made.db()).await, "{name}");
    }
    drop_database(&config).await;
}

/// What a role is granted is a command that the server takes.
#[tokio::test]
async fn the_scripts_of_roles_are_commands() {
    let place = Place::new().await;
    for role in [Role::Produce, Role::Relay] {
        let name = Identifier::new(&unique("role")).unwrap();
        let script = grant_script(&place.config, role, &name).unwrap();
        let command = script
            .strip_prefix("db.runCommand(EJSON.parse('")
            .and_then(|rest| rest.split("', {").next())
            .unwrap();
        let json: serde_json::Value = serde_json::from_str(command).unwrap();
        let command = Bson::try_from(json).unwrap();
        let command = command.as_document().unwrap().clone();
        place.db().run_command(command).await.unwrap();
        let told = place
            .db()
            .run_command(doc! { "rolesInfo": name.as_str() })
            .await
            .unwrap();
        assert_eq!(told.get_array("roles").unwrap().len(), 1);
        place
            .db()
            .run_command(doc! { "dropRole": name.as_str() })
            .await
            .unwrap();
    }
}

/// After the database was replaced, whatever a relay knows is void: its next reader says so, once.
#[tokio::test]
async fn another_outbox_in_its_place_is_noticed() {
    use outbox_core::Fetched;
    let place = Place::new().await;
    let owned = place.lease().await;
    let request = common::request(&owned, 10);
    place.store.reader().await.unwrap().fetch(&request).await.unwrap();
    place.db().drop().await.unwrap();
    migrate(&place.config).await.unwrap();
    let mut reader = place.store.reader().await.unwrap();
    let told = reader.fetch(&request).await.unwrap();
    assert!(
        matches!(told, Fetched::Reset { ref reason } if reason.contains("another one")),
        "{told:?}"
    );
    assert!(matches!(
        reader.fetch(&request).await.unwrap(),
        Fetched::Batch { .. }
    ));
    let mut next = place.store.reader().await.unwrap();
    assert!(matches!(
        next.fetch(&request).await.unwrap(),
        Fetched::Batch { .. }
    ));
}
