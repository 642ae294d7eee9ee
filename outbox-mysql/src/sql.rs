//! All SQL text.
//!
//! Producers' statements are prepared and bound. What relay and operators say is a script, whose only variable parts are
//! numbers and hexadecimal digits: nothing of a message can ever become SQL. A list goes in as JSON of numbers and
//! hexadecimal strings, which `JSON_TABLE` makes rows of; a list of what is to be left out, as a list of constants, which
//! both servers sort and search, where they would go through a table once for each row.

mod literal;
mod tables;

use std::fmt::{self, Display, Write};
use std::sync::Arc;

use outbox_core::cursor::{Look, Plan};
use outbox_core::{
    DeadLetterQuery, Death, Held, HoldChanges, HoldName, HoldRef, Identifier, OrderKey, Ordering, OwnedShard,
    RecordRef, Settlement, Shard, Subject,
};
use sqlx::mysql::{MySql, MySqlArguments};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};

pub(crate) use self::literal::Field;
use self::literal::{json, list, literal, no_number_of, none_of, text};
pub(crate) use self::tables::{META, READ_ONLY, SERVER, WRITERS, grants, migration, ordering, tables};
use crate::config::MysqlConfig;
use crate::hold::{named, whole};

/// The version of the schema that this crate works with.
pub(crate) const VERSION: i64 = 1;

/// Text of our own as sqlx wants it. This is the only place that vouches for SQL text.
pub(crate) fn safe(text: Arc<String>) -> SqlStr {
    AssertSqlSafe(text).into_sql_str()
}

/// A statement of a producer or a consumer, on a connection of theirs.
#[derive(Clone)]
pub(crate) struct Statement(Arc<str>);

impl Statement {
    fn new(text: String) -> Self {
        Self(text.into())
    }

    /// To be bound and run.
    pub(crate) fn query<'q>(&self) -> Query<'q, MySql, MySqlArguments> {
        sqlx::query(AssertSqlSafe(Arc::clone(&self.0)))
    }
}

impl fmt::Debug for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The columns of a message, the same in every table that holds one.
const MESSAGE: &str = "message_id, topic, `key`, payload, headers, content_type, created_at";

/// The same of the table `o`.
const OF_O: &str = "o.message_id, o.topic, o.`key`, o.payload, o.headers, o.content_type, o.created_at";

const NOW: &str = "UTC_TIMESTAMP(6)";

/// A time as microseconds since 1970.
fn since_1970(time: &str) -> String {
    format!("TIMESTAMPDIFF(MICROSECOND, '1970-01-01', {time})")
}

/// A time as milliseconds from now.
fn left(time: &str) -> String {
    format!("TIMESTAMPDIFF(MICROSECOND, {NOW}, {time}) DIV 1000")
}

/// What lies so many milliseconds ahead.
fn ahead(millis: impl Display) -> String {
    format!("{NOW} + INTERVAL ({millis}) * 1000 MICROSECOND")
}

/// Locks the rows of one table beside a `JSON_TABLE`: MySQL must be told which, and MariaDB cannot be.
fn locking(mysql: &str, mariadb: &str, table: &str) -> String {
    format!("/*!80000 FOR {mysql} OF {table} */ /*M! {mariadb} */")
}

/// How many columns [`read`] has.
const READ: usize = 9;

/// A message of the table `o` as [`crate::row`] reads it. What is too large for the server to send stays there, and its
/// size comes instead.
fn read(key_seq: &str) -> String {
    let size = "COALESCE(OCTET_LENGTH(o.payload), 0) + COALESCE(OCTET_LENGTH(o.headers), 0)";
    let large = format!("{size} > @@max_allowed_packet");
    format!(
        "o.message_id, o.topic, o.`key`, IF({large}, NULL, o.payload), IF({large}, NULL, o.headers), o.content_type, {}, \
         IF({large}, {size}, NULL), {key_seq}",
        since_1970("o.created_at")
    )
}

/// The statements of one outbox.
#[derive(Debug)]
pub(crate) struct Sql {
    prefix: Identifier,
    ordering: Ordering,
    archive: bool,
    outbox: String,
    hold: String,
    dead: String,
    scheduled: String,
    processed: String,
    lease: String,
    relay: String,
    numbers: String,
    meta: String,
    /// The statement that producers run most.
    insert_one: Statement,
    pub(crate) receive: Statement,
    pub(crate) forget: Statement,
}

impl Sql {
    pub(crate) fn new(config: &MysqlConfig) -> Self {
        let table = |suffix: &str| format!("`{}{suffix}`", config.prefix);
        let inbox = table("_inbox");
        Self {
            insert_one: insert(&table(""), config.ordering, 1),
            prefix: config.prefix.clone(),
            ordering: config.ordering,
            archive: config.archive,
            outbox: table(""),
            hold: table("_hold"),
            dead: table("_dead"),
            scheduled: table("_scheduled"),
            processed: table("_processed"),
            lease: table("_lease"),
            relay: table("_relay"),
            numbers: table("_sequence"),
            meta: table("_meta"),
            receive: Statement::new(format!(
                "INSERT INTO {inbox} (consumer, message_id) VALUES (?, ?)"
            )),
            forget: Statement::new(format!(
                "DELETE FROM {inbox} WHERE received_at <= {NOW} - INTERVAL ? * 1000 MICROSECOND \
                 ORDER BY received_at LIMIT ?"
            )),
        }
    }
}

/// A savepoint that is there only in a transaction.
pub(crate) const SAVEPOINT: &str = "outbox_enqueue_needs_a_transaction";

/// Producers.
impl Sql {
    /// Inserts so many messages: their six columns, and the number where messages are numbered.
    pub(crate) fn insert(&self, rows: usize) -> Statement {
        match rows {
            1 => self.insert_one.clone(),
            _ => insert(&self.outbox, self.ordering, rows),
        }
    }

    /// Plans so many messages: their six columns, and when they are due.
    pub(crate) fn schedule(&self, rows: usize) -> Statement {
        let place = "(?,?,?,?,?,?,'1970-01-01' + INTERVAL ? MICROSECOND)";
        Statement::new(format!(
            "INSERT INTO {} (message_id, topic, `key`, payload, headers, content_type, deliver_at) VALUES {}",
            self.scheduled,
            list(std::iter::repeat_n(place, rows))
        ))
    }

    /// Fails outside a transaction, where counters would be free again before the messages are there.
    pub(crate) fn in_transaction() -> String {
        format!("SAVEPOINT {SAVEPOINT}; RELEASE SAVEPOINT {SAVEPOINT}")
    }

    /// Draws numbers for so many keys: topic, key and how many.
    pub(crate) fn draw(&self, keys: usize) -> Statement {
        Statement::new(format!(
            "INSERT INTO {} (topic, `key`, last) VALUES {} ON DUPLICATE KEY UPDATE last = last + VALUES(last)",
            self.numbers,
            list(std::iter::repeat_n("(?,?,?)", keys))
        ))
    }

    /// The last numbers of so many keys: topic and key.
    pub(crate) fn drawn(&self, keys: usize) -> Statement {
        Statement::new(format!(
            "SELECT topic, `key`, last FROM {} WHERE (topic, `key`) IN ({})",
            self.numbers,
            list(std::iter::repeat_n("(?,?)", keys))
        ))
    }

    /// Writes rows, which a SELECT gives as the columns of a message and `n`, in the order of `n`, with their numbers
    /// where messages are numbered: the counters are locked before the first position is drawn.
    fn write(&self, rows: &str) -> String {
        let (outbox, numbers) = (&self.outbox, &self.numbers);
        match self.ordering {
            Ordering::Insert => {
                format!("INSERT INTO {outbox} ({MESSAGE}) SELECT {OF_O} FROM ({rows}) o ORDER BY o.n")
            }
            Ordering::Sequenced => format!(
                "INSERT INTO {numbers} (topic, `key`, last) SELECT g.topic, g.`key`, g.fresh FROM \
                     (SELECT o.topic, o.`key`, COUNT(*) AS fresh FROM ({rows}) o WHERE o.`key` IS NOT NULL \
                      GROUP BY o.topic, o.`key`) g ORDER BY g.topic, g.`key` \
                 ON DUPLICATE KEY UPDATE last = {numbers}.last + VALUES(last); \
                 INSERT INTO {outbox} ({MESSAGE}, key_seq) SELECT {OF_O}, \
                     s.last - COUNT(*) OVER (PARTITION BY o.topic, o.`key`) \
                            + ROW_NUMBER() OVER (PARTITION BY o.topic, o.`key` ORDER BY o.n) \
                 FROM ({rows}) o LEFT JOIN {numbers} s ON s.topic = o.topic AND s.`key` = o.`key` ORDER BY o.n"
            ),
        }
    }
}

fn insert(outbox: &str, ordering: Ordering, rows: usize) -> Statement {
    let (number, place) = match ordering {
        Ordering::Insert => ("", "(?,?,?,?,?,?)"),
        Ordering::Sequenced => (", key_seq", "(?,?,?,?,?,?,?)"),
    };
    Statement::new(format!(
        "INSERT INTO {outbox} (message_id, topic, `key`, payload, headers, content_type{number}) VALUES {}",
        list(std::iter::repeat_n(place, rows))
    ))
}

/// Shards and their epochs as a table of `s` and `e`, in the order in which everybody locks leases. What is joined with it
/// is looked up, and nothing else is locked; a list would make the servers go through all leases.
fn named_shards(owned: &[OwnedShard]) -> String {
    let mut owned = owned.to_vec();
    owned.sort_unstable();
    let rows = json(owned.iter().map(|owned| {
        [
            Field::Number(i64::from(owned.shard.0)),
            Field::Number(owned.epoch.0),
        ]
    }));
    format!("JSON_TABLE({rows}, '$[*]' COLUMNS (s SMALLINT PATH '$[0]', e BIGINT PATH '$[1]')) j")
}

/// That the relay holds the lease `l`, under the epoch that it was given.
fn holds(relay: &str, owned: &[OwnedShard], now: &str) -> String {
    let epochs = owned
        .iter()
        .map(|owned| format!("({},{})", owned.shard, owned.epoch.0));
    // A list is not empty.
    let epochs = list(epochs.chain(["(-1,-1)".to_owned()]));
    format!(
        "(l.shard, l.epoch) IN ({epochs}) AND l.owner = {} AND l.until > {now}",
        text(relay)
    )
}

/// Leases.
impl Sql {
    /// Renews the membership and what the relay still holds, never to an earlier end, should an answer that was not waited
    /// for come last. The answers: 2, the relays that are over; 3, how many
    /// others are alive; 4, what is held.
    pub(crate) fn renew(&self, relay: &str, ttl: i64) -> String {
        let Self {
            relay: relays, lease, ..
        } = self;
        let (name, until) = (text(relay), ahead(ttl));
        format!(
            "INSERT INTO {relays} (relay, until) VALUES ({name}, {until}) \
             ON DUPLICATE KEY UPDATE until = GREATEST(until, {until}); \
             UPDATE {lease} SET until = GREATEST(until, {until}) WHERE owner = {name} AND until > {NOW} ORDER BY shard; \
             SELECT relay FROM {relays} WHERE until <= {NOW}; \
             SELECT COUNT(*) FROM {relays} WHERE until > {NOW} AND relay <> {name}; \
             {}",
            self.held(&name)
        )
    }

    /// Takes what is free. The second answer is what is held.
    pub(crate) fn take(&self, relay: &str, ttl: i64, most: usize) -> String {
        let (name, until) = (text(relay), ahead(ttl));
        format!(
            "UPDATE {} SET owner = {name}, epoch = epoch + 1, until = {until} \
             WHERE owner IS NULL OR until <= {NOW} ORDER BY shard LIMIT {most}; {}",
            self.lease,
            self.held(&name)
        )
    }

    fn held(&self, name: &str) -> String {
        format!(
            "SELECT shard, epoch FROM {} WHERE owner = {name} AND until > {NOW} ORDER BY shard",
            self.lease
        )
    }

    /// Strikes members off that are over, one statement each: each locks one row.
    pub(crate) fn strike<'r>(&self, relays: impl Iterator<Item = &'r str>) -> String {
        let strike = |relay| {
            format!(
                "DELETE FROM {} WHERE relay = {} AND until <= {NOW}",
                self.relay,
                text(relay)
            )
        };
        relays.map(strike).collect::<Vec<_>>().join("; ")
    }

    pub(crate) fn release(&self, relay: &str, owned: &[OwnedShard], leaves: bool) -> String {
        let name = text(relay);
        let mut script = format!(
            "UPDATE {} STRAIGHT_JOIN {} l FORCE INDEX (PRIMARY) ON l.shard = j.s \
             SET l.owner = NULL, l.until = '1970-01-01' WHERE l.owner = {name} AND l.epoch = j.e",
            named_shards(owned),
            self.lease,
        );
        if leaves {
            let _ = write!(script, "; DELETE FROM {} WHERE relay = {name}", self.relay);
        }
        script
    }

    /// The leases, and the relays that are alive.
    pub(crate) fn owners(&self) -> String {
        format!(
            "SELECT shard, epoch, owner, GREATEST({}, 0) FROM {} ORDER BY shard; \
             SELECT relay FROM {} WHERE until > {NOW} ORDER BY relay",
            left("until"),
            self.lease,
            self.relay
        )
    }

    /// Begins a transaction and locks the leases of these shards: against a take-over, and against the same settlement,
    /// repeated while the server still runs the first. The answer at [`FENCED`] are those that the relay holds, once they
    /// are locked: it may have waited beyond their end. Those of which [`fence`](Self::fence) is true are the same.
    fn fenced(&self, relay: &str, owned: &[OwnedShard]) -> String {
        format!(
            "START TRANSACTION; \
             SELECT COUNT(*) FROM {} STRAIGHT_JOIN {lease} l FORCE INDEX (PRIMARY) ON l.shard = j.s {}; \
             SET @outbox_now = {NOW}; \
             SELECT l.shard FROM {lease} l WHERE {}",
            named_shards(owned),
            locking("UPDATE", "FOR UPDATE", "l"),
            Self::fence(relay, owned),
            lease = self.lease,
        )
    }

    /// The lease `l` is held, as was seen when it was locked.
    fn fence(relay: &str, owned: &[OwnedShard]) -> String {
        holds(relay, owned, "@outbox_now")
    }
}

/// Where the answer is of which shards are held.
pub(crate) const FENCED: usize = 3;

/// Settling.
impl Sql {
    /// One transaction, which changes nothing unless all of these shards are held. See [`fenced`](Self::fenced) for the
    /// answers.
    pub(crate) fn settle(&self, settlement: &Settlement) -> String {
        let relay = settlement.relay.as_str();
        let owned: Vec<OwnedShard> = settlement
            .shards
            .iter()
            .map(|part| OwnedShard {
                shard: part.shard,
                epoch: part.epoch,
            })
            .collect();
        // Not `SET … = (SELECT …)`: that would lock the leases of all others as well, which are looked at one by one.
        let mut script = format!(
            "{}; SELECT COUNT(*) = {} INTO @outbox_held FROM {} l WHERE {}",
            self.fenced(relay, &owned),
            owned.len(),
            self.lease,
            Self::fence(relay, &owned),
        );
        self.delivered(&mut script, settlement);
        self.buried(&mut script, settlement);
        self.holds_changed(&mut script, settlement);
        script.push_str("; COMMIT");
        script
    }

    /// From the outbox, rows that are each looked up by the primary key whatever is known of the table: one that is nearly
    /// empty would be read whole, and would wait there for the rows of open transactions. One table by itself, because
    /// MySQL goes through rows twice that it deletes from a join. A row of another message, or of a shard that is none of
    /// these, is left alone.
    fn outbox_rows(&self, records: &[&RecordRef], shards: &str) -> String {
        format!(
            "FROM {} o FORCE INDEX (PRIMARY) WHERE o.id IN ({}) AND o.message_id IN ({}) AND o.shard IN ({shards}) \
             AND @outbox_held",
            self.outbox,
            list(records.iter().map(|record| record.position)),
            list(records.iter().map(|record| literal(record.id.as_bytes())))
        )
    }

    fn delivered(&self, script: &mut String, settlement: &Settlement) {
        let delivered: Vec<&RecordRef> = settlement
            .shards
            .iter()
            .flat_map(|part| &part.delivered)
            .collect();
        let shards = list(settlement.shards.iter().map(|part| part.shard));
        for records in delivered.chunks(LOOKED_UP) {
            let from = self.outbox_rows(records, &shards);
            if self.archive {
                let _ = write!(
                    script,
                    "; INSERT INTO {} (position, {MESSAGE}, key_seq) SELECT o.id, {OF_O}, o.key_seq {from}",
                    self.processed
                );
            }
            let _ = write!(script, "; DELETE o {from}");
        }
    }

    fn buried(&self, script: &mut String, settlement: &Settlement) {
        let dead: Vec<(Shard, &Death)> = settlement
            .shards
            .iter()
            .flat_map(|part| part.dead.iter().map(|death| (part.shard, death)))
            .collect();
        for deaths in dead.chunks(LOOKED_UP) {
            let rows = json(deaths.iter().map(|(shard, death)| {
                [
                    Field::Number(i64::from(shard.0)),
                    Field::Number(death.record.position.0),
                    Field::Bytes(death.record.id.as_bytes()),
                    Field::Number(i64::from(death.attempts)),
                    Field::Bytes(death.reason.as_bytes()),
                ]
            }));
            let from = format!(
                "FROM JSON_TABLE({rows}, '$[*]' COLUMNS (s SMALLINT PATH '$[0]', i BIGINT PATH '$[1]', m CHAR(32) PATH '$[2]', \
                 a BIGINT PATH '$[3]', r LONGTEXT PATH '$[4]')) j STRAIGHT_JOIN {} o FORCE INDEX (PRIMARY) \
                 ON o.id = j.i AND o.shard = j.s AND o.message_id = UNHEX(j.m) WHERE @outbox_held",
                self.outbox
            );
            let _ = write!(
                script,
                "; INSERT INTO {} (position, {MESSAGE}, key_seq, attempts, reason) \
                 SELECT o.id, {OF_O}, o.key_seq, j.a, CONVERT(UNHEX(j.r) USING utf8mb4) {from} \
                 ON DUPLICATE KEY UPDATE attempts = VALUES(attempts), reason = VALUES(reason); DELETE o {from}",
                self.dead
            );
        }
    }

    fn holds_changed(&self, script: &mut String, settlement: &Settlement) {
        let mut changes = HoldChanges::default();
        for part in &settlement.shards {
            part.holds
                .iter()
                .for_each(|change| changes.add(part.shard, change));
        }
        let columns = "s SMALLINT PATH '$[0]', c VARCHAR(16) PATH '$[1]', t VARCHAR(498) PATH '$[2]', \
                       k VARCHAR(2048) PATH '$[3]', i BIGINT PATH '$[4]'";
        let topic = "CONVERT(UNHEX(j.t) USING utf8mb4) COLLATE utf8mb4_bin";
        let scope = "CONVERT(UNHEX(j.c) USING ascii) COLLATE ascii_bin";
        if changes.cleared().next().is_some() {
            let _ = write!(
                script,
                "; DELETE h FROM JSON_TABLE({}, '$[*]' COLUMNS ({columns})) j \
                 STRAIGHT_JOIN {} h FORCE INDEX (PRIMARY) ON h.shard = j.s AND h.scope = {scope} AND h.topic = {topic} \
                 AND h.`key` = UNHEX(j.k) AND h.message = j.i WHERE @outbox_held",
                json(changes.cleared().map(named)),
                self.hold
            );
        }
        if changes.put().next().is_some() {
            let _ = write!(
                script,
                "; INSERT INTO {} (shard, scope, topic, `key`, message, head, head_message_id, attempts, parked, due_at, \
                 reason) SELECT j.s, {scope}, {topic}, UNHEX(j.k), j.i, j.head, UNHEX(j.m), j.a, j.p, {}, \
                 CONVERT(UNHEX(j.r) USING utf8mb4) FROM JSON_TABLE({}, '$[*]' COLUMNS ({columns}, \
                 head BIGINT PATH '$[5]', m CHAR(32) PATH '$[6]', a BIGINT PATH '$[7]', p BIGINT PATH '$[8]', \
                 d BIGINT PATH '$[9]', r LONGTEXT PATH '$[10]')) j WHERE @outbox_held \
                 ON DUPLICATE KEY UPDATE head = VALUES(head), head_message_id = VALUES(head_message_id), \
                 attempts = VALUES(attempts), parked = VALUES(parked), due_at = VALUES(due_at), reason = VALUES(reason)",
                self.hold,
                ahead("j.d"),
                json(changes.put().map(|(name, hold)| whole(name, hold)))
            );
        }
    }
}

/// So many rows are looked up by one statement: with many more a server might go through the table instead.
const LOOKED_UP: usize = 1_000;

/// Holds.
impl Sql {
    fn hold_columns() -> String {
        format!(
            "shard, scope, topic, `key`, head, head_message_id, attempts, parked, GREATEST({}, 0), reason",
            left("due_at")
        )
    }

    pub(crate) fn holds(&self, owned: &[OwnedShard]) -> String {
        let shards = list(owned.iter().map(|owned| owned.shard));
        let shards = if shards.is_empty() { "NULL" } else { &shards };
        format!(
            "SELECT {} FROM {} WHERE shard IN ({shards})",
            Self::hold_columns(),
            self.hold
        )
    }

    pub(crate) fn all_holds(&self) -> String {
        format!("SELECT {} FROM {}", Self::hold_columns(), self.hold)
    }

    pub(crate) fn parked(&self, most: usize) -> String {
        format!(
            "SELECT {} FROM {} WHERE parked ORDER BY head, shard, scope, topic, `key` LIMIT {most}",
            Self::hold_columns(),
            self.hold
        )
    }

    /// A parked hold of this name and this head.
    fn is_hold(hold: &HoldRef) -> String {
        let name = HoldName::new(hold.shard, &hold.scope, hold.head);
        format!(
            "h.shard = {} AND h.scope = '{}' AND h.topic = {} AND h.`key` = {} AND h.message = {} AND h.parked \
             AND h.head = {} AND h.head_message_id = {}",
            hold.shard,
            name.scope,
            text(name.topic),
            literal(name.key),
            name.message,
            hold.head.position,
            literal(hold.head.id.as_bytes())
        )
    }

    pub(crate) fn resume(&self, hold: &HoldRef) -> String {
        format!(
            "UPDATE {} h SET h.parked = FALSE, h.attempts = 0, h.due_at = {NOW} WHERE {}",
            self.hold,
            Self::is_hold(hold)
        )
    }

    /// Moves the head of a parked hold to the dead letters. The second answer tells the hold.
    pub(crate) fn bury(&self, hold: &HoldRef) -> String {
        let Self {
            outbox,
            hold: holds,
            dead,
            ..
        } = self;
        let is_hold = Self::is_hold(hold);
        let from = format!(
            "FROM {holds} h STRAIGHT_JOIN {outbox} o FORCE INDEX (PRIMARY) ON o.id = h.head \
             AND o.message_id = h.head_message_id WHERE {is_hold}"
        );
        format!(
            "START TRANSACTION; SELECT h.head FROM {holds} h WHERE {is_hold} FOR UPDATE; \
             INSERT INTO {dead} (position, {MESSAGE}, key_seq, attempts, reason) \
             SELECT o.id, {OF_O}, o.key_seq, h.attempts, h.reason {from} \
             ON DUPLICATE KEY UPDATE attempts = VALUES(attempts), reason = VALUES(reason); \
             DELETE o {from}; DELETE h FROM {holds} h WHERE {is_hold}; COMMIT"
        )
    }
}

/// Dead letters, what is planned, the archive.
impl Sql {
    pub(crate) fn dead_list(&self, query: &DeadLetterQuery) -> String {
        let mut conditions = vec!["TRUE".to_owned()];
        if let Some(topic) = &query.topic {
            conditions.push(format!("o.topic = {}", text(topic)));
        }
        if let Some(RecordRef { position, id }) = query.after {
            conditions.push(format!(
                "(o.position > {position} OR (o.position = {position} AND o.message_id > {}))",
                literal(id.as_bytes())
            ));
        }
        if let Some(ids) = &query.ids {
            let ids = list(ids.iter().map(|id| literal(id.as_bytes())));
            let ids = if ids.is_empty() { "NULL" } else { &ids };
            conditions.push(format!("o.message_id IN ({ids})"));
        }
        format!(
            "SELECT o.position, {}, o.attempts, o.reason, {} FROM {} o WHERE {} \
             ORDER BY o.position, o.message_id LIMIT {}",
            read("o.key_seq"),
            since_1970("o.died_at"),
            self.dead,
            conditions.join(" AND "),
            query.limit
        )
    }

    /// Dead letters by name, with their order `n`, as the table `o`.
    fn dead_named(&self, records: &[RecordRef]) -> String {
        let rows = json(records.iter().map(|record| {
            [
                Field::Number(record.position.0),
                Field::Bytes(record.id.as_bytes()),
            ]
        }));
        format!(
            "FROM JSON_TABLE({rows}, '$[*]' COLUMNS (n FOR ORDINALITY, i BIGINT PATH '$[0]', m CHAR(32) PATH '$[1]')) j \
             STRAIGHT_JOIN {} o FORCE INDEX (PRIMARY) ON o.position = j.i AND o.message_id = UNHEX(j.m)",
            self.dead
        )
    }

    /// What comes back is numbered anew; its old number stays a hole. The second answer tells how many there were.
    pub(crate) fn dead_requeue(&self, records: &[RecordRef]) -> String {
        let from = self.dead_named(records);
        format!(
            "START TRANSACTION; SELECT o.position {from} {}; {}; DELETE o {from}; COMMIT",
            locking("UPDATE", "FOR UPDATE", "o"),
            self.write(&format!("SELECT {OF_O}, j.n {from}"))
        )
    }

    pub(crate) fn dead_discard(&self, records: &[RecordRef]) -> String {
        format!("DELETE o {}", self.dead_named(records))
    }

    /// When the next one is due; which shards the relay holds; and what is due, if anything is: neither needs a lock.
    pub(crate) fn next_due(&self, relay: &str, owned: &[OwnedShard], most: usize) -> String {
        let due = |shard: &OwnedShard, what: &str, condition: &str, limit: usize| {
            format!(
                "(SELECT {what} FROM {} FORCE INDEX (`{}_scheduled_due`) WHERE shard = {}{condition} \
                 ORDER BY deliver_at, id LIMIT {limit})",
                self.scheduled, self.prefix, shard.shard
            )
        };
        let each = |what: &str, condition: &str, limit: usize| {
            let selects: Vec<String> = owned
                .iter()
                .map(|shard| due(shard, what, condition, limit))
                .collect();
            selects.join(" UNION ALL ")
        };
        format!(
            "SELECT MIN({}) FROM ({}) d; \
             SELECT l.shard FROM {} l WHERE {}; \
             SELECT shard, id FROM ({}) d ORDER BY deliver_at, id LIMIT {most}",
            left("deliver_at"),
            each("deliver_at", "", 1),
            self.lease,
            holds(relay, owned, NOW),
            each(
                "shard, id, deliver_at",
                &format!(" AND deliver_at <= {NOW}"),
                most
            ),
        )
    }

    /// Moves what is due, named by shard and id, to the outbox. The answer after [`FENCED`] are those that are moved.
    pub(crate) fn promote(&self, relay: &str, owned: &[OwnedShard], due: &[(Shard, i64)]) -> String {
        let rows = json(
            due.iter()
                .map(|(shard, id)| [Field::Number(i64::from(shard.0)), Field::Number(*id)]),
        );
        let from = format!(
            "FROM JSON_TABLE({rows}, '$[*]' COLUMNS (n FOR ORDINALITY, s SMALLINT PATH '$[0]', i BIGINT PATH '$[1]')) j \
             STRAIGHT_JOIN {} l FORCE INDEX (PRIMARY) ON l.shard = j.s AND {} STRAIGHT_JOIN {} o FORCE INDEX (PRIMARY) ON o.id = j.i AND o.shard = j.s",
            self.lease,
            Self::fence(relay, owned),
            self.scheduled,
        );
        format!(
            "{}; SELECT o.id {from} {}; {}; DELETE o {from}; COMMIT",
            self.fenced(relay, owned),
            locking("UPDATE", "FOR UPDATE", "o"),
            self.write(&format!("SELECT {OF_O}, j.n {from}"))
        )
    }

    pub(crate) fn purge(&self, age: i64, most: usize) -> String {
        format!(
            "DELETE FROM {} WHERE processed_at <= {NOW} - INTERVAL {age} * 1000 MICROSECOND \
             ORDER BY processed_at LIMIT {most}",
            self.processed
        )
    }
}

/// Counting and searching.
impl Sql {
    /// How many there are, up to `most`: in the outbox and in the archive; then the age of the oldest message, the holds
    /// that wait and that are parked, the dead letters, what is planned; then [`owners`](Self::owners).
    pub(crate) fn stats(&self, most: u64) -> String {
        let count = |table: &str| format!("SELECT COUNT(*) FROM (SELECT 1 FROM {table} LIMIT {most}) c; ");
        format!(
            "{}{}SELECT -({}) FROM {} ORDER BY id LIMIT 1; SELECT SUM(NOT parked), SUM(parked) FROM {}; {}{}{}",
            count(&self.outbox),
            count(&self.processed),
            left("created_at"),
            self.outbox,
            self.hold,
            count(&self.dead),
            count(&self.scheduled),
            self.owners()
        )
    }

    pub(crate) fn now() -> String {
        format!("SELECT {}", since_1970(NOW))
    }

    /// Looks at the first `bound` rows of the outbox, or of one shard. The first answer: how many there were, and how
    /// many of them are meant. The second: the first `most` of these, with how many rows of their shard are before them.
    pub(crate) fn search(
        &self,
        subject: &Subject,
        shard: Option<Shard>,
        bound: usize,
        most: usize,
    ) -> String {
        let meant = match subject {
            Subject::Message(id) => format!("o.message_id = {}", literal(id.as_bytes())),
            Subject::Key(key) => of_key(key),
            Subject::Topic(topic) => format!("o.topic = {}", text(topic)),
        };
        let (index, within) = match shard {
            Some(shard) => (
                format!("`{}_shard`", self.prefix),
                format!("WHERE o.shard = {shard}"),
            ),
            None => ("PRIMARY".to_owned(), String::new()),
        };
        let seen = format!(
            "(SELECT o.shard, o.id, COALESCE({meant}, FALSE) AS meant FROM {} o FORCE INDEX ({index}) {within} \
             ORDER BY o.id LIMIT {bound}) s",
            self.outbox
        );
        format!(
            "SELECT COUNT(*), COALESCE(SUM(s.meant), 0) FROM {seen}; \
             SELECT f.line - 1, o.shard, o.id, {} FROM (SELECT s.*, ROW_NUMBER() OVER (PARTITION BY s.shard ORDER BY s.id) \
             AS line FROM {seen}) f STRAIGHT_JOIN {} o FORCE INDEX (PRIMARY) ON o.id = f.id WHERE f.meant ORDER BY o.id LIMIT {most}",
            read("o.key_seq"),
            self.outbox
        )
    }

    /// Looks for an id among what is planned, archived and dead: three answers, and two that tell how many rows there
    /// are of the first two, up to `bound`, which is how many are looked at.
    pub(crate) fn elsewhere(&self, id: &[u8], bound: usize, most: usize) -> String {
        let Self {
            scheduled,
            processed,
            dead,
            ..
        } = self;
        let id = literal(id);
        format!(
            "SELECT {}, o.shard, {} FROM (SELECT * FROM {scheduled} ORDER BY id LIMIT {bound}) o \
             WHERE o.message_id = {id} ORDER BY o.deliver_at, o.id LIMIT {most}; \
             SELECT o.position, {}, {} FROM (SELECT * FROM {processed} ORDER BY id DESC LIMIT {bound}) o \
             WHERE o.message_id = {id} LIMIT {most}; \
             SELECT o.position, {}, o.attempts, o.reason, {} FROM {dead} o WHERE o.message_id = {id} \
             ORDER BY o.position LIMIT {most}; \
             SELECT COUNT(*) FROM (SELECT 1 FROM {scheduled} LIMIT {bound}) c; \
             SELECT COUNT(*) FROM (SELECT 1 FROM {processed} LIMIT {bound}) c",
            since_1970("o.deliver_at"),
            read("NULL"),
            read("o.key_seq"),
            since_1970("o.processed_at"),
            read("o.key_seq"),
            since_1970("o.died_at"),
        )
    }

    pub(crate) fn last_number(&self, topic: &str, key: &[u8]) -> String {
        format!(
            "SELECT last FROM {} WHERE topic = {} AND `key` = {}",
            self.numbers,
            text(topic),
            literal(key)
        )
    }
}

/// What one fetch asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asking<'a> {
    pub(crate) plan: &'a Plan,
    /// Above it everything is read, whatever the positions are.
    pub(crate) low: i64,
    /// Nothing is stored below, as far as is known.
    pub(crate) floor: i64,
    pub(crate) owned: &'a [OwnedShard],
    /// Whether each shard is read by itself.
    pub(crate) few: bool,
    pub(crate) barred: &'a Barred,
}

impl Asking<'_> {
    /// Whether a scan begins before everything.
    pub(crate) fn begins_anew(&self) -> bool {
        let lanes = self.plan.lanes.iter().map(|lane| lane.after);
        let mut scans = lanes.chain(self.plan.shards.iter().map(|asked| asked.after));
        self.plan.stride < usize::MAX && scans.any(|after| after.min(self.low) == i64::MIN)
    }

    /// Up to where a scan goes that begins above a position, if not to the end. It has counted rows of all shards by then,
    /// those of others and those that are gone included: what it costs is bounded, and no more is needed.
    fn end(&self, base: i64) -> Option<i64> {
        let stride = i64::try_from(self.plan.stride).unwrap_or(i64::MAX);
        (self.plan.stride < usize::MAX).then(|| base.max(self.floor).saturating_add(stride))
    }
}

/// Reading.
impl Sql {
    /// The lowest position that there is.
    pub(crate) fn lowest(&self) -> String {
        format!("SELECT MIN(id) FROM {}", self.outbox)
    }

    /// What a plan asks for, in the order of its parts: the part, its index, and the row. One statement, that is one
    /// snapshot. The first part is the server's: whether it takes no writes. Then come the ends of scans though there is
    /// more, 1 of shards and 2 of lanes, each with the first row behind; so no limit cuts them off. 3 are singles, 4 lanes and 5
    /// shards.
    ///
    /// Who owns most shards goes through the table in its order; who owns few, through these alone.
    pub(crate) fn fetch(&self, asking: &Asking<'_>) -> String {
        let Asking {
            plan,
            low,
            owned,
            few,
            barred,
            ..
        } = *asking;
        let upto = |end: Option<i64>| end.map_or_else(String::new, |end| format!(" AND o.id <= {end}"));
        let mut ends = Vec::new();
        let mut behind = |part: u8, index: usize, end: Option<i64>| {
            ends.extend(end.map(|end| {
                format!(
                    "(SELECT {part}, {index}, o.shard, o.id{} FROM {} o FORCE INDEX (PRIMARY) WHERE o.id > {end} \
                     ORDER BY o.id LIMIT 1)",
                    ", NULL".repeat(READ),
                    self.outbox
                )
            }));
        };
        let select = |place: &str, index: &str, condition: &str, limit: usize| {
            format!(
                "(SELECT {place}, o.shard, o.id, {} FROM {} o FORCE INDEX ({index}) WHERE {condition} \
                 ORDER BY o.id LIMIT {limit})",
                read("o.key_seq"),
                self.outbox
            )
        };
        let by_shard = format!("`{}_shard`", self.prefix);
        let skip = no_number_of("o.id", &plan.skip);
        let mut parts = vec![format!("(SELECT 0, {READ_ONLY}, 0, 0{})", ", NULL".repeat(READ))];
        if !plan.singles.is_empty() {
            let ids = list(plan.singles.iter().map(|(_, id)| id));
            let condition = format!("o.id IN ({ids}) AND {}", barred.topics());
            parts.push(select("3, 0", "PRIMARY", &condition, plan.singles.len()));
        }
        for (index, lane) in plan.lanes.iter().enumerate() {
            let after = lane.after.min(low);
            let appear = appear(&plan.pending, after);
            let end = asking.end(after).filter(|end| *end < lane.upto);
            behind(2, index, end);
            let condition = format!(
                "o.shard = {} AND (o.id > {after} OR {appear}) AND o.id <= {} AND {} AND {skip}",
                lane.shard,
                end.unwrap_or(lane.upto),
                of_key(&lane.key)
            );
            parts.push(select(&format!("4, {index}"), &by_shard, &condition, lane.quota));
        }
        let passed = format!(
            "{skip} AND {} AND {}",
            barred.topics(),
            barred.keys(plan.lanes.iter().map(|lane| &lane.key))
        );
        let own = format!("o.shard IN ({})", list(owned.iter().map(|owned| owned.shard)));
        for asked in &plan.shards {
            let after = asked.after.min(low);
            // The server steps over what was returned already.
            let known = outside(&plan.known, asked.after);
            let mut part = |index: &str, whose: &str| {
                let condition = format!("{whose} AND {passed}");
                parts.push(select("5, 0", index, &condition, asked.quota));
            };
            if plan.pending.first().is_some_and(|(first, _)| *first <= after) {
                part("PRIMARY", &format!("{} AND {own}", appear(&plan.pending, after)));
            }
            let end = asking.end(after);
            let upto = upto(end);
            if few {
                for owned in owned {
                    let shard = owned.shard;
                    part(
                        &by_shard,
                        &format!("o.shard = {shard} AND o.id > {after}{upto}{known}"),
                    );
                }
            } else {
                part("PRIMARY", &format!("o.id > {after}{upto}{known} AND {own}"));
            }
            behind(1, 0, end);
        }
        let ends_and_server = 1 + ends.len();
        parts.splice(1..1, ends);
        let all = parts.join(" UNION ALL ");
        if few {
            let apart = plan.singles.len() + plan.lanes.iter().map(|lane| lane.quota).sum::<usize>();
            let most = ends_and_server + apart + plan.shards.iter().map(|asked| asked.quota).sum::<usize>();
            format!("{all} ORDER BY 1, 2, 4 LIMIT {most}")
        } else {
            all
        }
    }

    /// What is stored, committed or not: the number of a span, or 0 for what was pending, and a position; and the highest
    /// position with -1. The second answer.
    pub(crate) fn look(&self, look: &Look, asking: &Asking<'_>) -> String {
        let Asking {
            plan, owned, barred, ..
        } = *asking;
        let select = |span: usize, condition: &str| {
            format!(
                "(SELECT {span}, o.id FROM {} o FORCE INDEX (PRIMARY) WHERE {condition} ORDER BY o.id LIMIT {})",
                self.outbox, look.limit
            )
        };
        let top = match look.top {
            // Never the highest by itself: the end of a busy table is full of what is deleted and not cleaned up.
            Some(top) => format!(
                "(SELECT o.id FROM {} o FORCE INDEX (PRIMARY) WHERE o.id > {top} ORDER BY o.id LIMIT {FAR}) o",
                self.outbox
            ),
            None => format!("{} o", self.outbox),
        };
        let mut parts = vec![format!("(SELECT -1, MAX(o.id) FROM {top})")];
        if !look.pending.is_empty() {
            let condition = format!(
                "{} AND {} AND {}",
                appear(&look.pending, i64::MAX),
                barred.topics(),
                barred.keys([])
            );
            parts.push(select(0, &condition));
        }
        for (index, span) in look.spans.iter().enumerate() {
            let whose = match span.lane.and_then(|lane| plan.lanes.get(lane)) {
                Some(lane) => format!("o.shard = {} AND {}", lane.shard, of_key(&lane.key)),
                None => format!(
                    "o.shard IN ({}) AND {} AND {}",
                    list(owned.iter().map(|owned| owned.shard)),
                    barred.topics(),
                    barred.keys(plan.lanes.iter().map(|lane| &lane.key))
                ),
            };
            let condition = format!("o.id > {} AND o.id <= {} AND {whose}", span.above, span.upto);
            parts.push(select(index + 1, &condition));
        }
        format!(
            "SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED; {}",
            parts.join(" UNION ALL ")
        )
    }
}

/// How far it is looked ahead for the highest position.
const FAR: usize = 20_000;

/// The row is one of those up to `upto` that can still appear.
fn appear(pending: &[(i64, i64)], upto: i64) -> String {
    let below = || {
        pending
            .iter()
            .filter(|(first, _)| *first <= upto)
            .map(|(first, last)| (*first, (*last).min(upto)))
    };
    let single = list(
        below()
            .filter(|(first, last)| first == last)
            .map(|(first, _)| first),
    );
    let ranges = below()
        .filter(|(first, last)| first != last)
        .map(|(first, last)| format!(" OR o.id BETWEEN {first} AND {last}"));
    let single = if single.is_empty() {
        "FALSE".to_owned()
    } else {
        format!("o.id IN ({single})")
    };
    format!("({single}{})", ranges.collect::<String>())
}

/// The row is in none of these ranges, as far as they lie below `upto`.
fn outside(known: &[(i64, i64)], upto: i64) -> String {
    let below = known.iter().filter(|(first, _)| *first <= upto);
    below
        .map(|(first, last)| format!(" AND o.id NOT BETWEEN {first} AND {}", (*last).min(upto)))
        .collect()
}

fn of_key(key: &OrderKey) -> String {
    format!(
        "o.topic = {} AND o.`key` = {}",
        text(&key.topic),
        literal(&key.key)
    )
}

/// What is held, as text: the relay hands over the same set until it changes.
#[derive(Debug)]
pub(crate) struct Barred {
    held: Arc<Held>,
    topics: String,
    keys: String,
}

impl Barred {
    pub(crate) fn new(held: &Arc<Held>) -> Self {
        Self {
            topics: none_of("o.topic", held.topics.iter().map(|topic| text(topic))),
            keys: list(held.keys.iter().map(|(_, key)| pair(key))),
            held: Arc::clone(held),
        }
    }

    pub(crate) fn follow(&mut self, held: &Arc<Held>) {
        if !Arc::ptr_eq(&self.held, held) {
            *self = Self::new(held);
        }
    }

    /// The row's topic is not held.
    fn topics(&self) -> &str {
        &self.topics
    }

    /// The row's key is neither held nor one of these.
    fn keys<'k>(&self, apart: impl IntoIterator<Item = &'k OrderKey>) -> String {
        let apart = list(apart.into_iter().map(pair));
        match (self.keys.as_str(), apart.as_str()) {
            ("", "") => "TRUE".to_owned(),
            (one, "") | ("", one) => format!("(o.`key` IS NULL OR (o.topic, o.`key`) NOT IN ({one}))"),
            (held, apart) => format!("(o.`key` IS NULL OR (o.topic, o.`key`) NOT IN ({held},{apart}))"),
        }
    }
}

fn pair(key: &OrderKey) -> String {
    format!("({},{})", text(&key.topic), literal(&key.key))
}
