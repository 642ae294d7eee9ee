//! Making the collections, and checking that they are what this version works with.

use futures::TryStreamExt;
use mongodb::IndexModel;
use mongodb::bson::oid::ObjectId;
use mongodb::bson::{Bson, DateTime, Document, Timestamp, doc};
use mongodb::error::ErrorKind as Driver;
use mongodb::options::IndexOptions;
use outbox_core::{Error, ErrorKind, Identifier, MessageId, Migrated, Ordering, Position, Result, Role};

use crate::commands::{Collections, Names, by_death, by_flow, by_place};
use crate::config::MongoConfig;
use crate::error::STANDALONE;
use crate::row::{position, uuid};
use crate::session::{Sessions, Told, write};

const DURING: &str = "migrate";
const CHECK: &str = "check schema";

/// What this version makes and works with.
const VERSION: i64 = 1;
/// `$dateAdd` came with it, by which leases and holds run in the server's time.
const OLDEST: i32 = 13;
/// How many seconds a hold that is over stays, so that clearing it is an update like others.
const OVER: i32 = 60;

/// Makes the outbox, or brings it to this version; changes nothing where it is already.
///
/// Safe to run from several processes at once, and beside running relays and producers: every step does nothing where it
/// is done, and the version comes last. What was interrupted half-way is finished by the next call.
///
/// # Errors
/// [`ErrorKind::Schema`] when the outbox is of a newer version or was made with another ordering;
/// [`ErrorKind::Unsupported`] for a server that stands alone or is older than 5.0; others as the server gives them.
///
/// ```no_run
/// # async fn example() -> outbox_mongo::Result<()> {
/// use outbox_mongo::{MongoConfig, migrate};
///
/// let config = MongoConfig::new("mongodb://owner:secret@db.example/shop?replicaSet=rs0");
/// assert_eq!(migrate(&config).await?.to, 1);
/// # Ok(())
/// # }
/// ```
pub async fn migrate(config: &MongoConfig) -> Result<Migrated> {
    config.check()?;
    let sessions = Sessions::open(config).await?;
    server(&sessions).await?;
    let found = Facts::read(&sessions).await?;
    let from = match &found {
        Some(facts) => facts.version()?,
        None => None,
    };
    let run = |commands| sessions.call(DURING, run(&sessions.collections, commands));
    let names = &sessions.collections.names;
    if from.is_none() {
        run(vec![begun(names, config)]).await?;
        // What is half-made goes on as it was begun.
        let facts = Facts::read(&sessions).await?.ok_or_else(|| missing(config))?;
        facts.check_ordering(config)?;
        run(making(names, facts.shards(config)?, config)).await?;
        run(vec![made(names)]).await?;
    }
    check(&sessions, config).await?;
    // Asked first, because changing an index waits for all transactions, and all wait for it.
    let indexes = Indexes::read(&sessions).await?;
    if indexes.kept() != Some(i64::from(seconds(config))) {
        run(vec![keeping(names, config)]).await?;
    }
    if indexes.named(DEAD_BEFORE).is_some() {
        run(vec![doc! { "dropIndexes": names.name(""), "index": DEAD_BEFORE }]).await?;
    }
    if indexes.named(DEAD).is_none() {
        run(vec![
            doc! { "createIndexes": names.name(""), "indexes": [of_the_dead()] },
        ])
        .await?;
    }
    Ok(Migrated { from, to: VERSION })
}

/// The commands that make this outbox in an empty place, for teams with migrations of their own, as MongoDB's shell
/// (`mongosh`) takes them in the outbox's database. They may be run again.
///
/// ```
/// let script = outbox_mongo::migration_script(&outbox_mongo::MongoConfig::new("mongodb://localhost/shop"));
/// assert!(script.contains("createIndexes"));
/// ```
#[must_use]
pub fn migration_script(config: &MongoConfig) -> String {
    let names = Names::new(&config.prefix);
    let all = std::iter::once(begun(&names, config))
        .chain(making(&names, config.shards, config))
        .chain([made(&names), keeping(&names, config)]);
    let mut script = String::from(
        "// Run it with mongosh, connected to the database of the outbox.\n\
         const run = (command) => {\n    try {\n        db.runCommand(EJSON.parse(command, { relaxed: false }));\n    } \
         catch (error) {\n        if (error.code !== 48 && error.code !== 85) throw error; // it exists\n    }\n};\n",
    );
    for command in all {
        script += &format!("run({});\n", quoted(&command));
    }
    script
}

/// The command that makes a role, with what an account needs and no more, as MongoDB's shell takes it in the outbox's
/// database. The third role is the owner, who migrates.
///
/// ```
/// use outbox_mongo::{Identifier, MongoConfig, Role, grant_script};
///
/// let config = MongoConfig::new("mongodb://localhost/shop");
/// let script = grant_script(&config, Role::Produce, &Identifier::new("shop_app")?)?;
/// assert!(script.contains("createRole"));
/// # Ok::<(), outbox_mongo::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Invalid`] for a configuration whose URL names no database.
pub fn grant_script(config: &MongoConfig, role: Role, name: &Identifier) -> Result<String> {
    let database = config.database()?;
    let names = Names::new(&config.prefix);
    let may = |suffix: &str, actions: &[&str]| {
        doc! { "resource": { "db": &database, "collection": names.name(suffix) }, "actions": actions.to_vec() }
    };
    let all = ["find", "insert", "update", "remove"];
    let privileges = match role {
        Role::Produce => vec![
            may("", &["insert"]),
            may("_scheduled", &["insert"]),
            may("_sequence", &["find", "insert", "update"]),
            may("_inbox", &all),
            may("_meta", &["find"]),
        ],
        Role::Relay => vec![
            may(
                "",
                &[
                    "find",
                    "insert",
                    "update",
                    "remove",
                    "changeStream",
                    "bypassDocumentValidation",
                ],
            ),
            may("_scheduled", &all),
            may("_hold", &all),
            may("_lease", &all),
            may("_sequence", &["find", "insert", "update"]),
            may("_meta", &["find"]),
        ],
    };
    let command = doc! { "createRole": name.as_str(), "privileges": privileges, "roles": [] };
    Ok(format!(
        "db.runCommand(EJSON.parse({}, {{ relaxed: false }}));\n",
        quoted(&command)
    ))
}

/// A command as a text literal of the shell's.
fn quoted(command: &Document) -> String {
    let json = Bson::Document(command.clone())
        .into_canonical_extjson()
        .to_string();
    format!("'{}'", json.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// Notes what the outbox is to be, unless it is noted already.
fn begun(names: &Names, config: &MongoConfig) -> Document {
    let new = doc! {
        "shards": i32::from(config.shards),
        "ordering": ordering(config.ordering),
        "born": ObjectId::new(),
    };
    noted(names, doc! { "$setOnInsert": new })
}

/// The last step: whatever has a version is whole.
fn made(names: &Names) -> Document {
    noted(names, doc! { "$set": { "version": VERSION } })
}

/// For how long the server itself keeps what was delivered.
fn keeping(names: &Names, config: &MongoConfig) -> Document {
    doc! { "collMod": names.name(""), "index": { "name": "processed", "expireAfterSeconds": seconds(config) } }
}

fn seconds(config: &MongoConfig) -> i32 {
    match config.archive_ttl.as_secs() {
        0 => NEVER,
        seconds => i32::try_from(seconds).unwrap_or(NEVER).min(NEVER),
    }
}

/// The indexes of the messages, as they are now.
struct Indexes(Vec<IndexModel>);

impl Indexes {
    async fn read(sessions: &Sessions) -> Result<Self> {
        let outbox = sessions.collections.outbox::<Document>();
        let indexes = async {
            let cursor = outbox.list_indexes().await?;
            cursor.try_collect().await
        };
        Ok(Self(sessions.call(DURING, indexes).await?))
    }

    fn named(&self, name: &str) -> Option<&IndexOptions> {
        let mut options = self.0.iter().filter_map(|index| index.options.as_ref());
        options.find(|options| options.name.as_deref() == Some(name))
    }

    /// For how many seconds what was delivered is kept.
    fn kept(&self) -> Option<i64> {
        let kept = self.named("processed")?.expire_after?;
        i64::try_from(kept.as_secs()).ok()
    }
}

/// The name of the index of the dead letters.
const DEAD: &str = "dead_letters";
/// What it was called when it was sparse: of two fields, one of which every message has, such an index has an entry for each.
const DEAD_BEFORE: &str = "dead";

/// Costs nothing as long as nothing dies: what is alive has no entry in it.
fn of_the_dead() -> Document {
    doc! { "name": DEAD, "key": by_death(), "partialFilterExpression": { "dead.ts": { "$exists": true } } }
}

/// The longest that is asked of an index, 47 years: from now that far back must be after 1970, or servers of 5.0 refuse it.
const NEVER: i32 = 1_500_000_000;

fn noted(names: &Names, change: Document) -> Document {
    doc! {
        "update": names.name("_meta"),
        "updates": [{ "q": { "_id": FACTS }, "u": change, "upsert": true }],
    }
}

/// Makes what is not there: each command does nothing where it is done.
fn making(names: &Names, shards: u16, config: &MongoConfig) -> Vec<Document> {
    let mut commands: Vec<Document> = ["", "_scheduled", "_hold", "_lease", "_sequence", "_inbox"]
        .into_iter()
        .map(|suffix| doc! { "create": names.name(suffix) })
        .collect();
    // A collection may be there because somebody enqueued before the outbox was made.
    for (suffix, when, kind) in [("", "ts", "timestamp"), ("_scheduled", "due", "date")] {
        let numbered = suffix.is_empty() && config.ordering == Ordering::Sequenced;
        commands.push(doc! {
            "collMod": names.name(suffix),
            "validator": validator(when, kind, shards, numbered),
            // What was there before can be changed, so that it can die.
            "validationLevel": "moderate",
        });
    }
    let indexes = [
        (
            "",
            vec![
                doc! { "name": "flow", "key": by_flow() },
                doc! { "name": "place", "key": by_place() },
                of_the_dead(),
                doc! {
                    "name": "processed", "key": { "processed.at": 1 }, "sparse": true, "expireAfterSeconds": seconds(config),
                },
            ],
        ),
        (
            "_scheduled",
            vec![doc! { "name": "due", "key": { "shard": 1, "due": 1, "_id": 1 } }],
        ),
        (
            "_hold",
            vec![
                doc! { "name": "shard", "key": { "shard": 1 } },
                doc! { "name": "over", "key": { "over": 1 }, "expireAfterSeconds": OVER },
            ],
        ),
        ("_inbox", vec![doc! { "name": "age", "key": { "at": 1 } }]),
    ];
    for (suffix, indexes) in indexes {
        commands.push(doc! { "createIndexes": names.name(suffix), "indexes": indexes });
    }
    let leases: Vec<Document> = (0..shards)
        .map(|shard| {
            let new = doc! { "owner": null, "epoch": 0_i64, "until": EPOCH, "fence": 0_i64 };
            doc! { "q": { "_id": i32::from(shard) }, "u": { "$setOnInsert": new }, "upsert": true }
        })
        .collect();
    commands.push(doc! { "update": names.name("_lease"), "updates": leases });
    commands
}

async fn run(collections: &Collections, commands: Vec<Document>) -> Told<()> {
    for command in commands {
        let majority = doc! { "w": "majority" };
        let mut command = command;
        command.insert("writeConcern", majority);
        match write(collections, None, command).await {
            Err(error) if matches!(code(&error), Some(EXISTS | OTHER_OPTIONS | GONE)) => {}
            other => drop(other?),
        }
    }
    Ok(())
}

/// The beginning of time, when nothing is leased any more.
pub(crate) const EPOCH: DateTime = DateTime::from_millis(0);

/// A collection of that name is there.
const EXISTS: i32 = 48;
/// An index of that name is there which keeps what was delivered for another time: that is changed by itself.
const OTHER_OPTIONS: i32 = 85;
/// An index of that name is not there, or not any more.
const GONE: i32 = 27;

fn code(error: &mongodb::error::Error) -> Option<i32> {
    match error.kind.as_ref() {
        Driver::Command(command) => Some(command.code),
        _ => None,
    }
}

/// What a message needs to be found and settled: without it nobody would ever read it, or read it for ever. `when` is its
/// position or its time; where messages are numbered, one with a key needs its number.
fn validator(when: &str, kind: &str, shards: u16, numbered: bool) -> Document {
    let id = |byte: u8| uuid(MessageId::from_bytes([byte; 16]));
    let mut schema = doc! {
        "bsonType": "object",
        "required": ["flow", "id", "topic", when],
        "properties": {
            "shard": { "bsonType": "int", "minimum": 0, "maximum": i32::from(shards) - 1 },
            "flow": { "bsonType": "string" },
            "topic": { "bsonType": "string" },
            when: { "bsonType": kind },
        },
        "anyOf": [{ "required": ["shard"] }, { "required": ["dead"] }, { "required": ["processed"] }],
    };
    if numbered {
        let keyless = doc! { "properties": { "flow": { "pattern": "^[^/]*/-" } } };
        schema.insert(
            "allOf",
            vec![doc! { "anyOf": [{ "required": ["seq"] }, keyless] }],
        );
    }
    // Binaries are ordered by length, then by subtype: between these two are the UUIDs, and nothing else.
    doc! { "$jsonSchema": schema, "id": { "$gte": id(0), "$lte": id(255) } }
}

/// What is known of an outbox that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outbox {
    pub(crate) shards: u16,
    /// Made with it: another one is another outbox.
    pub(crate) born: Option<ObjectId>,
    /// No position that was given is above it.
    pub(crate) now: Position,
}

/// Whether the outbox is there, of this version and ordering, and what it is like.
pub(crate) async fn check(sessions: &Sessions, config: &MongoConfig) -> Result<Outbox> {
    let now = server(sessions).await?;
    let facts = Facts::read(sessions).await?.ok_or_else(|| missing(config))?;
    if facts.version()? != Some(VERSION) {
        return Err(missing(config));
    }
    facts.check_ordering(config)?;
    Ok(Outbox {
        shards: facts.shards(config)?,
        born: facts.0.get_object_id("born").ok(),
        now: now.map_or(Position::MAX, position),
    })
}

fn missing(config: &MongoConfig) -> Error {
    Error::new(
        ErrorKind::Schema,
        CHECK,
        "there is no outbox of this name: run migrate",
    )
    .with("outbox", config.place())
}

/// Whether this server can be used at all; the last timestamp that it gave, if it says so.
async fn server(sessions: &Sessions) -> Result<Option<Timestamp>> {
    let database = &sessions.collections.database;
    let told = sessions
        .call(CHECK, async { database.run_command(doc! { "hello": 1 }).await })
        .await?;
    let unsupported = |text: &'static str| Err(Error::new(ErrorKind::Unsupported, CHECK, text));
    if told.get_i32("maxWireVersion").unwrap_or_default() < OLDEST {
        return unsupported("MongoDB 5.0 or newer is needed");
    }
    if told.get_str("setName").is_err() && told.get_str("msg") != Ok("isdbgrid") {
        return unsupported(STANDALONE);
    }
    Ok(told.get_timestamp("operationTime").ok())
}

/// What was noted when the outbox was made.
#[derive(Debug)]
struct Facts(Document);

/// The name of the one document of `_meta`.
const FACTS: &str = "outbox";

pub(crate) const fn ordering(ordering: Ordering) -> &'static str {
    match ordering {
        Ordering::Insert => "insert",
        Ordering::Sequenced => "sequenced",
    }
}

impl Facts {
    /// None where there is no outbox.
    async fn read(sessions: &Sessions) -> Result<Option<Self>> {
        let meta = sessions.collections.meta();
        let told = sessions.call(CHECK, async { meta.find_one(doc! { "_id": FACTS }).await });
        Ok(told.await?.map(Self))
    }

    /// The version, which is not above ours; none where the outbox is half-made.
    fn version(&self) -> Result<Option<i64>> {
        let Ok(stored) = self.0.get_i64("version") else {
            return Ok(None);
        };
        if stored <= VERSION {
            return Ok(Some(stored));
        }
        Err(Error::new(
            ErrorKind::Schema,
            CHECK,
            "the outbox was made by a newer version of this crate: upgrade the program",
        )
        .with("found", stored)
        .with("known", VERSION))
    }

    fn check_ordering(&self, config: &MongoConfig) -> Result<()> {
        let made = self.0.get_str("ordering").unwrap_or_default();
        let expected = ordering(config.ordering);
        if made == expected {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Schema,
            CHECK,
            format!(
                "the outbox was made with the ordering \"{made}\" and is opened with \"{expected}\": configure the \
                 former, or make another outbox under a new prefix"
            ),
        )
        .with("outbox", config.place()))
    }

    fn shards(&self, config: &MongoConfig) -> Result<u16> {
        let shards = self.0.get_i32("shards").ok();
        let shards = shards.and_then(|shards| u16::try_from(shards).ok());
        shards.filter(|shards| *shards > 0).ok_or_else(|| {
            Error::new(
                ErrorKind::Schema,
                CHECK,
                "it is not told how many shards the outbox has: was it made by hand?",
            )
            .with("outbox", config.place())
        })
    }
}
