//! All SQL text. Made once from a validated prefix; nothing of a message ever becomes part of it.

use outbox_core::{Identifier, Ordering};

use crate::config::SqliteConfig;

/// The database's clock in milliseconds since 1970, as SQLite of any age can tell it.
pub(crate) const NOW: &str = "CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)";

/// The version of the schema that this crate works with.
pub(crate) const VERSION: i64 = 1;

/// How many statements a connection of ours keeps prepared: all of them.
pub(crate) const STATEMENTS: usize = 64;

/// The migration from nothing to [`VERSION`], its bookkeeping included.
pub(crate) fn migration(config: &SqliteConfig) -> String {
    let mut text = String::from(include_str!("../migrations/0001_tables.sql"));
    if config.ordering == Ordering::Sequenced {
        text.push_str(include_str!("../migrations/0001_sequenced.sql"));
    }
    // The version comes last, so that a script that stopped half-way does not pass for a finished one. The
    // identity tells a file from another one that is put in its place.
    text.push_str(
        "\nCREATE TABLE \"{prefix}_meta\" (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;\n\
         INSERT INTO \"{prefix}_meta\" (name, value) VALUES\n    \
         ('identity', lower(hex(randomblob(16)))), ('ordering', '{ordering}'), ('version', '{version}');\n",
    );
    text.replace("{prefix}", config.prefix.as_str())
        .replace("{now}", NOW)
        .replace("{ordering}", ordering(config.ordering))
        .replace("{version}", &VERSION.to_string())
}

/// The ordering as it is stored.
pub(crate) const fn ordering(ordering: Ordering) -> &'static str {
    match ordering {
        Ordering::Insert => "insert",
        Ordering::Sequenced => "sequenced",
    }
}

/// Whether `?1` is a table.
pub(crate) const TABLE_EXISTS: &str =
    "SELECT EXISTS (SELECT 1 FROM main.sqlite_schema WHERE type = 'table' AND name = ?1 COLLATE NOCASE)";

/// The columns of a message, the same in every table that holds one.
const MESSAGE: &str = "message_id, topic, key, payload, headers, content_type, created_at";

/// A message as [`crate::row`] reads it. A text literal is TEXT in SQLite and differs from the same bytes as a BLOB:
/// cast, both are one key.
const READ: &str = "o.message_id, o.topic, CAST(o.key AS BLOB), CAST(o.payload AS BLOB), CAST(o.headers AS BLOB), \
                    o.content_type, o.created_at";

/// The row at `?1`, if it is still the message `?2`. A row whose id is illegal (checks can be switched off) is read
/// under an id of zeros and found under it.
const MATCH: &str = "id = ?1 AND (message_id = ?2 OR (?2 = zeroblob(16) \
                     AND (typeof(message_id) <> 'blob' OR length(message_id) <> 16)))";

/// The statements of one outbox.
#[derive(Debug)]
pub(crate) struct Sql {
    /// The outbox table's name as a value, for `sqlite_sequence`.
    pub(crate) table: String,
    pub(crate) now: String,
    pub(crate) meta: String,

    pub(crate) insert: String,
    pub(crate) schedule: String,

    pub(crate) mark: String,
    pub(crate) fetch: String,
    pub(crate) scan: String,
    pub(crate) by_position: String,

    pub(crate) leases: String,
    pub(crate) lease_write: String,
    pub(crate) relays: String,
    pub(crate) relay_write: String,
    pub(crate) relay_delete: String,

    pub(crate) archive: String,
    pub(crate) bury: String,
    pub(crate) delete: String,
    pub(crate) holds: String,
    pub(crate) hold_put: String,
    pub(crate) hold_clear: String,

    pub(crate) parked: String,
    pub(crate) hold_resume: String,
    pub(crate) hold_unpark: String,

    pub(crate) dead_list: String,
    pub(crate) dead_list_by_id: String,
    pub(crate) dead_requeue: String,
    pub(crate) dead_delete: String,

    pub(crate) due: String,
    pub(crate) next_due: String,
    pub(crate) promote: String,
    pub(crate) promoted: String,

    pub(crate) purge: String,

    pub(crate) backlog: String,
    pub(crate) oldest: String,
    pub(crate) hold_counts: String,
    pub(crate) dead_count: String,
    pub(crate) scheduled_count: String,
    pub(crate) processed_count: String,

    pub(crate) search: String,
    pub(crate) scheduled_by_id: String,
    pub(crate) scheduled_bounded: String,
    pub(crate) processed_by_id: String,
    pub(crate) dead_by_id: String,
    pub(crate) last_number: String,

    pub(crate) receive: String,
    pub(crate) forget: String,
}

impl Sql {
    pub(crate) fn new(prefix: &Identifier) -> Self {
        let table = |suffix: &str| format!("main.\"{prefix}{suffix}\"");
        let outbox = table("");
        let hold = table("_hold");
        let dead = table("_dead");
        let scheduled = table("_scheduled");
        let processed = table("_processed");
        let lease = table("_lease");
        let relay = table("_relay");
        let sequence = table("_sequence");
        let inbox = table("_inbox");
        let meta = table("_meta");
        let dead_letter = format!("o.position, {READ}, o.key_seq, o.attempts, o.reason, o.died_at");
        let dead_list = |condition: &str| {
            format!(
                "SELECT {dead_letter} FROM {dead} o \
                 WHERE (?1 IS NULL OR o.topic = ?1) AND (o.position, o.message_id) > (?2, ?3) {condition} \
                 ORDER BY o.position, o.message_id LIMIT ?4"
            )
        };
        // Names a hold by scope, topic, key and message.
        let hold_named = "scope = ?1 AND topic = ?2 AND key = ?3 AND message = ?4";

        Self {
            table: prefix.as_str().to_owned(),
            now: format!("SELECT {NOW}"),
            meta: format!("SELECT value FROM {meta} WHERE name = ?1"),

            insert: format!(
                "INSERT INTO {outbox} (message_id, topic, key, payload, headers, content_type) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)"
            ),
            schedule: format!(
                "INSERT INTO {scheduled} (message_id, topic, key, payload, headers, content_type, deliver_at) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)"
            ),

            mark: format!(
                "SELECT coalesce((SELECT max(seq) FROM main.sqlite_sequence WHERE name = ?1 COLLATE NOCASE), 0), \
                 (SELECT value FROM {meta} WHERE name = 'identity')"
            ),
            // After a position: not one of these ids, topics or (topic, key) pairs. The lists are one parameter each, so
            // that there is one statement whatever their lengths; an absent one costs nothing.
            fetch: format!(
                "SELECT o.id, {READ}, o.key_seq FROM {outbox} o WHERE o.id > ?1 \
                 AND (?2 IS NULL OR o.id NOT IN (SELECT value FROM json_each(?2))) \
                 AND (?3 IS NULL OR o.topic NOT IN (SELECT value FROM json_each(?3))) \
                 AND (?4 IS NULL OR o.key IS NULL \
                      OR o.topic || '/' || hex(o.key) NOT IN (SELECT value FROM json_each(?4))) \
                 AND (?5 IS NULL OR o.key IS NULL \
                      OR o.topic || '/' || hex(o.key) NOT IN (SELECT value FROM json_each(?5))) \
                 ORDER BY o.id LIMIT ?6"
            ),
            scan: format!(
                "SELECT o.id, o.topic, CAST(o.key AS BLOB) FROM {outbox} o WHERE o.id > ?1 AND o.id <= ?2 ORDER BY o.id"
            ),
            by_position: format!("SELECT o.id, {READ}, o.key_seq FROM {outbox} o WHERE o.id = ?1"),

            leases: format!("SELECT shard, owner, epoch, until FROM {lease}"),
            lease_write: format!("UPDATE {lease} SET owner = ?2, epoch = ?3, until = ?4 WHERE shard = ?1"),
            relays: format!("SELECT relay, until FROM {relay}"),
            relay_write: format!(
                "INSERT INTO {relay} (relay, until) VALUES (?1, ?2) ON CONFLICT (relay) DO UPDATE SET until = ?2"
            ),
            relay_delete: format!("DELETE FROM {relay} WHERE relay = ?1"),

            archive: format!(
                "INSERT INTO {processed} (position, {MESSAGE}, key_seq) \
                 SELECT id, {MESSAGE}, key_seq FROM {outbox} WHERE {MATCH}"
            ),
            bury: format!(
                "INSERT OR REPLACE INTO {dead} \
                 (position, message_id, topic, key, payload, headers, content_type, created_at, key_seq, attempts, reason) \
                 SELECT id, ?2, topic, key, payload, headers, content_type, created_at, key_seq, ?3, ?4 \
                 FROM {outbox} WHERE {MATCH}"
            ),
            delete: format!("DELETE FROM {outbox} WHERE {MATCH}"),
            holds: format!(
                "SELECT scope, topic, key, head, head_message_id, attempts, parked, due_at - {NOW}, reason FROM {hold}"
            ),
            hold_put: format!(
                "INSERT OR REPLACE INTO {hold} \
                 (scope, topic, key, message, head, head_message_id, attempts, parked, due_at, reason) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, {NOW} + ?9, ?10)"
            ),
            hold_clear: format!("DELETE FROM {hold} WHERE {hold_named}"),

            parked: format!(
                "SELECT scope, topic, key, head, head_message_id, attempts, parked, 0, reason FROM {hold} \
                 WHERE parked = 1 ORDER BY head, scope, topic, key LIMIT ?1"
            ),
            hold_resume: format!(
                "UPDATE {hold} SET parked = 0, attempts = 0, due_at = {NOW} \
                 WHERE {hold_named} AND parked = 1 AND head = ?5 AND head_message_id = ?6"
            ),
            hold_unpark: format!(
                "DELETE FROM {hold} WHERE {hold_named} AND parked = 1 AND head = ?5 AND head_message_id = ?6 \
                 RETURNING attempts, reason"
            ),

            dead_list: dead_list(""),
            // One statement more, so that it goes by the index on the ids.
            dead_list_by_id: dead_list("AND o.message_id IN (SELECT unhex(value) FROM json_each(?5))"),
            dead_requeue: format!(
                "INSERT INTO {outbox} ({MESSAGE}) SELECT {MESSAGE} FROM {dead} WHERE position = ?1 AND message_id = ?2"
            ),
            dead_delete: format!("DELETE FROM {dead} WHERE position = ?1 AND message_id = ?2"),

            due: format!(
                "SELECT id FROM {scheduled} WHERE deliver_at <= {NOW} ORDER BY deliver_at, id LIMIT ?1"
            ),
            next_due: format!("SELECT min(deliver_at) - {NOW} FROM {scheduled}"),
            promote: format!(
                "INSERT INTO {outbox} ({MESSAGE}) SELECT {MESSAGE} FROM {scheduled} WHERE id = ?1"
            ),
            promoted: format!("DELETE FROM {scheduled} WHERE id = ?1"),

            purge: format!(
                "DELETE FROM {processed} WHERE rowid IN (SELECT rowid FROM {processed} \
                 WHERE processed_at <= {NOW} - ?1 ORDER BY processed_at LIMIT ?2)"
            ),

            backlog: format!("SELECT count(*) FROM (SELECT 1 FROM {outbox} LIMIT ?1)"),
            oldest: format!("SELECT {NOW} - created_at FROM {outbox} ORDER BY id LIMIT 1"),
            hold_counts: format!(
                "SELECT coalesce(sum(parked = 0), 0), coalesce(sum(parked = 1), 0) FROM {hold}"
            ),
            dead_count: format!("SELECT count(*) FROM {dead}"),
            scheduled_count: format!("SELECT count(*) FROM {scheduled}"),
            processed_count: format!("SELECT count(*) FROM (SELECT 1 FROM {processed} LIMIT ?1)"),

            // The outbox up to a bound, and of each row whether it is of the id, the topic, the topic and key.
            search: format!(
                "SELECT o.id, coalesce((?2 IS NULL OR o.message_id = ?2) AND (?3 IS NULL OR o.topic = ?3) \
                 AND (?4 IS NULL OR CAST(o.key AS BLOB) = ?4), 0) FROM {outbox} o ORDER BY o.id LIMIT ?1"
            ),
            scheduled_by_id: format!(
                "SELECT o.deliver_at, {READ}, NULL FROM {scheduled} o WHERE o.id IN \
                 (SELECT s.id FROM (SELECT id, message_id FROM {scheduled} ORDER BY id LIMIT ?2) s \
                  WHERE s.message_id = ?1 LIMIT ?3) ORDER BY o.id"
            ),
            scheduled_bounded: format!("SELECT count(*) FROM (SELECT 1 FROM {scheduled} LIMIT ?1)"),
            processed_by_id: format!(
                "SELECT o.position, {READ}, o.key_seq, o.processed_at FROM {processed} o WHERE o.rowid IN \
                 (SELECT p.row FROM (SELECT rowid AS row, message_id FROM {processed} \
                  ORDER BY processed_at DESC LIMIT ?2) p WHERE p.message_id = ?1 LIMIT ?3) ORDER BY o.position"
            ),
            dead_by_id: format!(
                "SELECT {dead_letter} FROM {dead} o WHERE o.message_id = ?1 ORDER BY o.position LIMIT ?3"
            ),
            last_number: format!("SELECT last FROM {sequence} WHERE topic = ?1 AND key = ?2"),

            receive: format!(
                "INSERT INTO {inbox} (consumer, message_id) VALUES (?1, ?2) ON CONFLICT DO NOTHING"
            ),
            forget: format!(
                "DELETE FROM {inbox} WHERE (consumer, message_id) IN (SELECT consumer, message_id FROM {inbox} \
                 WHERE received_at <= {NOW} - ?1 ORDER BY received_at LIMIT ?2)"
            ),
        }
    }
}
