//! Making the tables, and the rights to them.

use std::fmt::Write;

use outbox_core::{Identifier, Ordering};

use super::literal::list;
use super::{MESSAGE, SAVEPOINT, Sql, VERSION};
use crate::config::MysqlConfig;

/// Making the tables.
impl Sql {
    /// Which tables and procedures are there whose names are those of ours.
    pub(crate) fn tables(&self) -> String {
        let prefix = &self.prefix;
        let names = list(SUFFIXES.iter().map(|suffix| format!("'{prefix}{suffix}'")));
        format!(
            "SELECT TABLE_NAME FROM information_schema.TABLES WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME IN ({names}) \
             UNION ALL SELECT ROUTINE_NAME FROM information_schema.ROUTINES WHERE ROUTINE_SCHEMA = DATABASE() \
             AND ROUTINE_NAME IN ('{prefix}_enqueue', '{prefix}_enqueue_bytes')"
        )
    }

    /// Facts that were noted when the outbox was made.
    pub(crate) fn facts(&self) -> String {
        format!("SELECT name, value FROM {}", self.meta)
    }

    /// Keeps others out that migrate this outbox, for as long as the connection lives.
    pub(crate) fn lock(&self, seconds: u64) -> String {
        let name = self.lock_name();
        format!("SELECT GET_LOCK({name}, {seconds})")
    }

    pub(crate) fn unlock(&self) -> String {
        format!("SELECT RELEASE_LOCK({})", self.lock_name())
    }

    /// A lock is the whole server's, and its name short.
    fn lock_name(&self) -> String {
        format!(
            "CONCAT('outbox ', LEFT(SHA2(CONCAT(DATABASE(), '.', '{}'), 256), 40))",
            self.prefix
        )
    }

    /// What is noted first: from then on the tables of these names are ours.
    pub(crate) fn found(&self, config: &MysqlConfig) -> String {
        format!(
            "CREATE TABLE IF NOT EXISTS {meta} (name VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL, \
             value VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL, PRIMARY KEY (name)) ENGINE = InnoDB;\n\
             INSERT IGNORE INTO {meta} (name, value) VALUES ('identity', UUID()), ('ordering', '{}'), ('shards', '{}')",
            ordering(config.ordering),
            config.shards,
            meta = self.meta
        )
    }

    /// What is noted last: a migration that stopped half-way does not pass for a finished one.
    pub(crate) fn made(&self) -> String {
        format!(
            "INSERT INTO {} (name, value) VALUES ('version', '{VERSION}') ON DUPLICATE KEY UPDATE value = VALUES(value)",
            self.meta
        )
    }
}

pub(crate) const META: &str = "_meta";

const SUFFIXES: [&str; 12] = [
    "",
    "_hold",
    "_dead",
    "_scheduled",
    "_processed",
    "_lease",
    "_relay",
    "_sequence",
    "_inbox",
    META,
    "_status",
    "_id_seq",
];

macro_rules! read_only {
    () => {
        "CONCAT(@@global.read_only) NOT IN ('0', 'OFF')"
    };
}

/// What the server is, and whether it can be used. MariaDB says its name in its version.
pub(crate) const SERVER: &str = concat!("SELECT VERSION(), ", read_only!());

/// Whether the server takes no writes. A number, or a word since MariaDB 12.
pub(crate) const READ_ONLY: &str = read_only!();

/// Tells whether other servers take writes as well.
pub(crate) const WRITERS: &str = "SHOW GLOBAL VARIABLES WHERE (Variable_name = 'wsrep_on' AND Value = 'ON') \
     OR (Variable_name = 'group_replication_single_primary_mode' AND Value = 'OFF')";

const BEGIN_PROCEDURE: &str = "-- begin procedure\n";
const END_PROCEDURE: &str = "-- end procedure\n";

/// The tables, views and procedures; nothing happens to those that are there.
pub(crate) fn tables(config: &MysqlConfig) -> String {
    let (numbered, insert) = match config.ordering {
        Ordering::Insert => ("", INSERT_ONE),
        Ordering::Sequenced => (NUMBERED, NUMBER_AND_INSERT_ONE),
    };
    include_str!("../../migrations/0001_tables.sql")
        .replace("{numbered}", numbered)
        .replace("{insert_one}", insert)
        .replace("{savepoint}", SAVEPOINT)
        .replace("{prefix}", config.prefix.as_str())
        .replace("{shards}", &config.shards.to_string())
        .replace(
            "{each_shard}",
            &list((0..config.shards).map(|shard| format!("({shard})"))),
        )
}

/// The whole migration, for the server's own shell.
pub(crate) fn migration(config: &MysqlConfig) -> String {
    let sql = Sql::new(config);
    format!("{};\n\n{}\n{};\n", sql.found(config), tables(config), sql.made())
        .replace(BEGIN_PROCEDURE, "DELIMITER //\n")
        .replace(&format!("END;\n{END_PROCEDURE}"), "END//\nDELIMITER ;\n")
}

const INSERT_ONE: &str = "\
INSERT INTO `{prefix}` (topic, `key`, payload, headers, content_type)
        VALUES (p_topic, p_key, p_payload, p_headers, p_content_type);";

/// A bare INSERT would have no number, and is told by the constraint's name.
const NUMBERED: &str =
    ",\n    CONSTRAINT `{prefix}_use_enqueue_procedure` CHECK ((`key` IS NULL) = (key_seq IS NULL))";

/// The counter is locked before the position is drawn: of one key, the order of positions is the order of commits. The
/// savepoint is not there, and the call fails, where no transaction is open to keep the lock.
const NUMBER_AND_INSERT_ONE: &str = "\
IF p_key IS NOT NULL THEN
            SAVEPOINT {savepoint};
            RELEASE SAVEPOINT {savepoint};
            INSERT INTO `{prefix}_sequence` (topic, `key`, last) VALUES (p_topic, p_key, 1)
            ON DUPLICATE KEY UPDATE last = last + 1;
        END IF;
        INSERT INTO `{prefix}` (topic, `key`, payload, headers, content_type, key_seq)
        VALUES (p_topic, p_key, p_payload, p_headers, p_content_type,
                (SELECT s.last FROM `{prefix}_sequence` s WHERE s.topic = p_topic AND s.`key` = p_key));";

/// The ordering as it is stored.
pub(crate) const fn ordering(ordering: Ordering) -> &'static str {
    match ordering {
        Ordering::Insert => "insert",
        Ordering::Sequenced => "sequenced",
    }
}

/// The rights of one role, for a database's owner to run.
pub(crate) fn grants(config: &MysqlConfig, account: &Identifier, relay: bool) -> String {
    let mut text = String::new();
    let mut grant = |rights: &str, what: &str, suffixes: &[&str]| {
        for suffix in suffixes {
            let _ = writeln!(
                text,
                "GRANT {rights} ON {what}`{}{suffix}` TO '{account}'@'%';",
                config.prefix
            );
        }
    };
    if relay {
        grant("SELECT, INSERT, DELETE", "", &[""]);
        grant(
            "SELECT, INSERT, UPDATE, DELETE",
            "",
            &[
                "_hold",
                "_dead",
                "_scheduled",
                "_processed",
                "_lease",
                "_relay",
                "_sequence",
            ],
        );
        grant("SELECT", "", &["_meta", "_status"]);
    } else {
        let own = format!("INSERT ({MESSAGE})");
        grant(&own, "", &[""]);
        grant(&format!("INSERT ({MESSAGE}, deliver_at)"), "", &["_scheduled"]);
        if config.ordering == Ordering::Sequenced {
            grant("INSERT (key_seq)", "", &[""]);
            grant("SELECT, INSERT, UPDATE", "", &["_sequence"]);
        }
        grant("SELECT, INSERT, DELETE", "", &["_inbox"]);
        grant("EXECUTE", "PROCEDURE ", &["_enqueue", "_enqueue_bytes"]);
    }
    text
}
