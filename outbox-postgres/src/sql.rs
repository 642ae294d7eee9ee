//! All SQL text. Made once from validated names; nothing of a message ever becomes part of it.

use std::fmt;
use std::sync::Arc;

use outbox_core::{Identifier, Ordering};
use sqlx::postgres::{PgArguments, Postgres};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};

use crate::config::PostgresConfig;

/// The version of the schema that this crate works with.
pub(crate) const VERSION: i64 = 1;

/// The migration from nothing to [`VERSION`], its bookkeeping included.
pub(crate) fn migration(config: &PostgresConfig) -> String {
    let mut text = String::from(include_str!("../migrations/0001_tables.sql"));
    // The version comes last, so that a script that stopped half-way does not pass for a finished one. The identity
    // tells an outbox from another one that is put in its place.
    text.push_str(
        "\nCREATE TABLE {schema}.\"{prefix}_meta\" (name text PRIMARY KEY, value text NOT NULL);\n\
         INSERT INTO {schema}.\"{prefix}_meta\" (name, value) VALUES\n    \
         ('identity', gen_random_uuid()::text), ('ordering', '{ordering}'), ('shards', '{shards}'),\n    \
         ('version', '{version}');\n",
    );
    let (numbered, insert) = match config.ordering {
        Ordering::Insert => ("", INSERT_ONE),
        Ordering::Sequenced => (NUMBERED, NUMBER_AND_INSERT_ONE),
    };
    text.replace("{numbered}", numbered)
        .replace("{insert_one}", insert)
        .replace("{schema}", &format!("\"{}\"", config.schema))
        .replace("{prefix}", config.prefix.as_str())
        .replace("{shards}", &config.shards.to_string())
        .replace("{ordering}", ordering(config.ordering))
        .replace("{version}", &VERSION.to_string())
}

const INSERT_ONE: &str = "\
INSERT INTO {schema}.\"{prefix}\" (message_id, topic, key, payload, headers, content_type)
        VALUES (id, topic, key, payload, headers, content_type);";

/// A bare INSERT would have no number, and is told by the constraint's name.
const NUMBERED: &str = "\n                 CONSTRAINT \"{prefix}_use_enqueue_function\" CHECK ((key IS NULL) = (key_seq IS NULL))";

/// The counter is locked before the position is drawn: of one key, the order of positions is the order of commits.
const NUMBER_AND_INSERT_ONE: &str = "\
IF key IS NOT NULL THEN
            INSERT INTO {schema}.\"{prefix}_sequence\" AS s (topic, key, last) VALUES (topic, key, 1)
            ON CONFLICT ON CONSTRAINT \"{prefix}_sequence_pkey\" DO UPDATE SET last = s.last + 1
            RETURNING s.last INTO number;
        END IF;
        INSERT INTO {schema}.\"{prefix}\" (message_id, topic, key, payload, headers, content_type, key_seq)
        VALUES (id, topic, key, payload, headers, content_type, number);";

/// The ordering as it is stored.
pub(crate) const fn ordering(ordering: Ordering) -> &'static str {
    match ordering {
        Ordering::Insert => "insert",
        Ordering::Sequenced => "sequenced",
    }
}

/// The rights of one role, for a database's owner to run.
pub(crate) fn grants(config: &PostgresConfig, role: &Identifier, relay: bool) -> String {
    let schema = &config.schema;
    let mut text = format!("GRANT USAGE ON SCHEMA \"{schema}\" TO \"{role}\";\n");
    let mut grant = |rights: &str, what: &str, suffixes: &[&str]| {
        for suffix in suffixes {
            text.push_str(&format!(
                "GRANT {rights} ON {what} \"{schema}\".\"{}{suffix}\" TO \"{role}\";\n",
                config.prefix
            ));
        }
    };
    if relay {
        grant("SELECT, INSERT, DELETE", "TABLE", &[""]);
        grant("SELECT, USAGE", "SEQUENCE", &["_id_seq"]);
        grant(
            "SELECT, INSERT, UPDATE, DELETE",
            "TABLE",
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
        grant("SELECT", "TABLE", &["_meta", "_status"]);
    } else {
        grant(&format!("INSERT ({MESSAGE})"), "TABLE", &[""]);
        grant("USAGE", "SEQUENCE", &["_id_seq"]);
        grant(
            &format!("INSERT ({MESSAGE}, deliver_at)"),
            "TABLE",
            &["_scheduled"],
        );
        if config.ordering == Ordering::Sequenced {
            grant("INSERT (key_seq)", "TABLE", &[""]);
            grant("SELECT, INSERT, UPDATE", "TABLE", &["_sequence"]);
        }
        grant("SELECT, INSERT, DELETE", "TABLE", &["_inbox"]);
    }
    text
}

/// Statements that name no outbox. Unprepared: they run once.
const fn once(text: &'static str) -> Once {
    Once(text)
}

/// A statement that is run once or so for a connection.
pub(crate) struct Once(&'static str);

impl Once {
    pub(crate) fn query<'q>(&self) -> Query<'q, Postgres, PgArguments> {
        sqlx::query(self.0).persistent(false)
    }
}

/// Keeps others out that migrate an outbox of the schema `$1`, until the transaction ends.
pub(crate) const LOCK: Once =
    once("SELECT pg_advisory_xact_lock(hashtextextended('outbox migrate ' || $1, 0))");
pub(crate) const SCHEMA_EXISTS: Once =
    once("SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = $1)");
pub(crate) const TABLE_EXISTS: Once = once("SELECT to_regclass($1) IS NOT NULL");
pub(crate) const SERVER: Once = once(
    "SELECT current_setting('server_version_num')::bigint, current_setting('server_encoding'), pg_is_in_recovery()",
);
/// Whether the sequence draws numbers as it must.
pub(crate) const SEQUENCE: Once = once(
    "SELECT seqcache = 1 AND seqincrement = 1 AND NOT seqcycle FROM pg_catalog.pg_sequence WHERE seqrelid = to_regclass($1)",
);
/// Whether positions are drawn after the transaction has its number, from the sequence `$2`: the expression may name it
/// in several ways, but depends on it. To look for the parts of it would not do, because their order is what matters.
pub(crate) const POSITION_DEFAULT: Once = once(
    "SELECT regexp_replace(pg_get_expr(d.adbin, d.adrelid), '\\s', '', 'g') LIKE \
       'nextval(CASEWHEN(pg_current_xact_id()ISNOTNULL)THEN''%''::regclassELSENULL::regclassEND)' \
       AND EXISTS (SELECT 1 FROM pg_catalog.pg_depend p WHERE p.classid = 'pg_catalog.pg_attrdef'::regclass \
         AND p.objid = d.oid AND p.refclassid = 'pg_catalog.pg_class'::regclass AND p.refobjid = to_regclass($2)) \
     FROM pg_catalog.pg_attrdef d \
     JOIN pg_catalog.pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum \
     WHERE d.adrelid = to_regclass($1) AND a.attname = 'id'",
);

/// The names of relations as values.
pub(crate) fn table(config: &PostgresConfig) -> String {
    format!("\"{}\".\"{}\"", config.schema, config.prefix)
}

pub(crate) fn sequence(config: &PostgresConfig) -> String {
    format!("\"{}\".\"{}_id_seq\"", config.schema, config.prefix)
}

pub(crate) fn meta_table(config: &PostgresConfig) -> String {
    format!("\"{}\".\"{}_meta\"", config.schema, config.prefix)
}

/// A fact that was noted when the outbox was made.
pub(crate) fn meta(config: &PostgresConfig) -> Statement {
    Statement {
        text: format!("SELECT value FROM {} WHERE name = $1", meta_table(config)).into(),
        persistent: false,
    }
}

pub(crate) fn create_schema(schema: &Identifier) -> String {
    format!("CREATE SCHEMA \"{schema}\"")
}

/// The text of one statement.
#[derive(Clone)]
pub(crate) struct Statement {
    text: Arc<str>,
    /// Whether the server keeps it prepared for the connection.
    persistent: bool,
}

impl Statement {
    /// To be bound and run. This is the only place that vouches for SQL text.
    pub(crate) fn query<'q>(&self) -> Query<'q, Postgres, PgArguments> {
        sqlx::query(AssertSqlSafe(Arc::clone(&self.text))).persistent(self.persistent)
    }
}

impl fmt::Debug for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Text of our own as sqlx wants it, for what is no prepared statement.
pub(crate) fn safe(text: String) -> SqlStr {
    AssertSqlSafe(text).into_sql_str()
}

/// The columns of a message, the same in every table that holds one.
const MESSAGE: &str = "message_id, topic, key, payload, headers, content_type, created_at";

/// A message as [`crate::row`] reads it.
const READ: &str =
    "o.message_id, o.topic, o.key, o.payload, o.headers::text, o.content_type, o.created_at, o.key_seq";

/// A time as milliseconds from now.
fn left(time: &str) -> String {
    format!("(extract(epoch FROM {time} - clock_timestamp()) * 1000)::bigint")
}

/// The statements of one outbox.
#[derive(Debug)]
pub(crate) struct Sql {
    pub(crate) insert: Statement,
    pub(crate) insert_many: Statement,
    pub(crate) insert_or_schedule: Statement,

    /// While nothing is held.
    pub(crate) fetch: Statement,
    /// While something is, which scans go past.
    pub(crate) fetch_past: Statement,

    pub(crate) lease: Statement,
    pub(crate) take: Statement,
    pub(crate) release: Statement,
    pub(crate) leases: Statement,
    pub(crate) relays: Statement,

    pub(crate) holds: Statement,
    pub(crate) deliver: Statement,
    pub(crate) settle: Statement,
    pub(crate) bury: Statement,

    pub(crate) parked: Statement,
    pub(crate) hold_resume: Statement,
    pub(crate) hold_unpark: Statement,

    pub(crate) dead_list: Statement,
    pub(crate) dead_requeue: Statement,
    pub(crate) dead_discard: Statement,

    pub(crate) next_due: Statement,
    pub(crate) promote: Statement,

    pub(crate) purge: Statement,

    pub(crate) backlog: Statement,
    pub(crate) oldest: Statement,
    pub(crate) hold_counts: Statement,
    pub(crate) counts: Statement,
    pub(crate) processed_count: Statement,

    pub(crate) now: Statement,
    pub(crate) search: Statement,
    pub(crate) scheduled_by_id: Statement,
    pub(crate) scheduled_bounded: Statement,
    pub(crate) processed_by_id: Statement,
    pub(crate) dead_by_id: Statement,
    pub(crate) last_number: Statement,
    pub(crate) all_holds: Statement,

    pub(crate) receive: Statement,
    pub(crate) forget: Statement,
}

impl Sql {
    #[expect(clippy::too_many_lines, reason = "a list of statements, read one by one")]
    pub(crate) fn new(config: &PostgresConfig) -> Self {
        let PostgresConfig { schema, prefix, .. } = config;
        let table = |suffix: &str| format!("\"{schema}\".\"{prefix}{suffix}\"");
        let outbox = table("");
        let sequence = table("_id_seq");
        let hold = table("_hold");
        let dead = table("_dead");
        let scheduled = table("_scheduled");
        let processed = table("_processed");
        let lease = table("_lease");
        let relay = table("_relay");
        let numbers = table("_sequence");
        let inbox = table("_inbox");
        let statement = |text: String| Statement {
            text: text.into(),
            persistent: !config.pooler,
        };
        let sequenced = config.ordering == Ordering::Sequenced;

        // Rows to be written, in the order of `n`, with their numbers where messages are numbered. The counters are
        // locked in the order of keys, and all of them before the first position is drawn: the sort by `n` waits for
        // the last one.
        let insert = |rows: &str, rest: &str| {
            if sequenced {
                (
                    format!(
                        "WITH {rows}, counted AS ( \
                             INSERT INTO {numbers} AS s (topic, key, last) \
                             SELECT topic, key, count(*) FROM fresh WHERE key IS NOT NULL \
                             GROUP BY topic, key ORDER BY topic COLLATE \"C\", key \
                             ON CONFLICT (topic, key) DO UPDATE SET last = s.last + excluded.last \
                             RETURNING topic, key, last \
                         ){rest}"
                    ),
                    format!(
                        "INSERT INTO {outbox} (message_id, topic, key, payload, headers, content_type, created_at, key_seq) \
                         SELECT f.message_id, f.topic, f.key, f.payload, f.headers, f.content_type, f.created_at, \
                                c.last - count(*) OVER (PARTITION BY f.topic, f.key) \
                                       + row_number() OVER (PARTITION BY f.topic, f.key ORDER BY f.n) \
                           FROM fresh f LEFT JOIN counted c ON c.topic = f.topic AND c.key = f.key ORDER BY f.n"
                    ),
                )
            } else {
                (
                    format!("WITH {rows}{rest}"),
                    format!(
                        "INSERT INTO {outbox} (message_id, topic, key, payload, headers, content_type, created_at) \
                         SELECT message_id, topic, key, payload, headers, content_type, created_at FROM fresh ORDER BY n"
                    ),
                )
            }
        };
        let write = |rows: &str, rest: &str| {
            let (with, insert) = insert(rows, rest);
            format!("{with} {insert}")
        };
        let given = "given AS MATERIALIZED (SELECT message_id, topic, key, payload, headers::json, content_type, n, \
                         clock_timestamp() AS created_at FROM unnest($1::uuid[], $2::text[], $3::bytea[], $4::bytea[], \
                         $5::text[], $6::text[]) WITH ORDINALITY u(message_id, topic, key, payload, headers, content_type, n))";
        let given_due = "given AS MATERIALIZED (SELECT message_id, topic, key, payload, headers::json, content_type, n, \
                         clock_timestamp() AS created_at, 'epoch'::timestamptz + due * interval '1 microsecond' AS deliver_at \
                         FROM unnest($1::uuid[], $2::text[], $3::bytea[], $4::bytea[], $5::text[], $6::text[], $7::bigint[]) \
                         WITH ORDINALITY u(message_id, topic, key, payload, headers, content_type, due, n))";

        // The shards that the relay $3 holds under exactly these epochs, locked against a take-over, in one order.
        let held = format!(
            "held AS MATERIALIZED (SELECT l.shard FROM {lease} l \
             JOIN unnest($1::smallint[], $2::bigint[]) u(shard, epoch) ON l.shard = u.shard AND l.epoch = u.epoch \
             WHERE l.owner = $3 AND l.until > clock_timestamp() ORDER BY l.shard FOR SHARE OF l)"
        );
        // The places of rows that are named in `u`, each looked up by the primary key whatever is known of the table: one
        // that was analysed while it was empty, as it mostly is, is taken for one that stays empty, and a join that may
        // begin with the table would compare every row with every name. OFFSET 0 makes the subquery a fence. A row is
        // never updated, so that its place stays its own while the statement's snapshot can see it.
        let found = |names: &str| {
            format!(
                "{names} CROSS JOIN LATERAL (SELECT o.ctid AS place, o.message_id AS id_there FROM {outbox} o \
                 WHERE o.shard = u.shard AND o.id = u.id OFFSET 0) f WHERE f.id_there = u.message_id"
            )
        };
        // Of what is named, that whose shard is held.
        let ours = "u.shard = ANY (ARRAY(SELECT shard FROM held))";
        let delivered = format!(
            "o.ctid = ANY (ARRAY(SELECT f.place FROM {} AND {ours}))",
            found("unnest($4::smallint[], $5::bigint[], $6::uuid[]) u(shard, id, message_id)")
        );
        let given_up = found(
            "unnest($7::smallint[], $8::bigint[], $9::uuid[], $10::bigint[], $11::text[]) \
             u(shard, id, message_id, attempts, reason)",
        );
        let archived = if config.archive {
            format!(
                "kept AS (INSERT INTO {processed} (position, {MESSAGE}, key_seq) \
                 SELECT id, {MESSAGE}, key_seq FROM gone ORDER BY id), "
            )
        } else {
            String::new()
        };
        let bury = format!(
            "INSERT INTO {dead} (position, {MESSAGE}, key_seq, attempts, reason) \
             SELECT id, {MESSAGE}, key_seq, attempts, reason FROM dying \
             ON CONFLICT (position, message_id) DO UPDATE SET attempts = excluded.attempts, reason = excluded.reason"
        );
        // Names a hold.
        let hold_named = "shard = $1 AND scope = $2 AND topic = $3 AND key = $4 AND message = $5";
        let hold_columns = format!(
            "shard, scope, topic, key, head, head_message_id, attempts, parked, greatest({}, 0), reason",
            left("due_at")
        );

        Self {
            insert: statement(if sequenced {
                write(given, "").replacen("given AS", "fresh AS", 1)
            } else {
                format!(
                    "INSERT INTO {outbox} (message_id, topic, key, payload, headers, content_type) \
                     VALUES ($1, $2, $3, $4, $5::json, $6)"
                )
            }),
            insert_many: statement(write(given, "").replacen("given AS", "fresh AS", 1)),
            insert_or_schedule: statement(write(
                &format!(
                    "{given_due}, fresh AS MATERIALIZED (SELECT * FROM given \
                     WHERE deliver_at IS NULL OR deliver_at <= statement_timestamp())"
                ),
                &format!(
                    ", later AS (INSERT INTO {scheduled} (message_id, topic, key, payload, headers, content_type, \
                     created_at, deliver_at) SELECT message_id, topic, key, payload, headers, content_type, created_at, \
                     deliver_at FROM given WHERE deliver_at > statement_timestamp() ORDER BY n)"
                ),
            )),

            fetch: statement(fetch(&outbox, &sequence, false)),
            fetch_past: statement(fetch(&outbox, &sequence, true)),

            // Renews what the relay still holds, the membership first; never to an earlier end, should an answer that was not
            // waited for come last. Rows are locked in the order of shards, as
            // settlements lock them, so that the two never wait for each other in a circle.
            lease: statement(format!(
                "WITH clock AS MATERIALIZED (SELECT clock_timestamp() AS now), \
                 gone AS (DELETE FROM {relay} WHERE relay IN (SELECT r.relay FROM {relay} r, clock \
                          WHERE r.until <= clock.now AND r.relay <> $1 ORDER BY r.relay FOR UPDATE OF r SKIP LOCKED)), \
                 member AS (INSERT INTO {relay} (relay, until) SELECT $1, now + $2 * interval '1 millisecond' FROM clock \
                            ON CONFLICT (relay) DO UPDATE SET until = greatest({relay}.until, excluded.until)), \
                 own AS MATERIALIZED (SELECT l.shard FROM {lease} l WHERE l.owner = $1 AND l.until > clock_timestamp() \
                                      ORDER BY l.shard FOR NO KEY UPDATE), \
                 renewed AS (UPDATE {lease} l SET until = greatest(l.until, clock.now + $2 * interval '1 millisecond') FROM own, clock \
                             WHERE l.shard = own.shard RETURNING l.shard, l.epoch) \
                 SELECT (SELECT count(*) FROM {relay} r, clock WHERE r.until > clock.now AND r.relay <> $1) + 1, \
                        array_agg(shard ORDER BY shard), array_agg(epoch ORDER BY shard) FROM renewed"
            )),
            take: statement(format!(
                "WITH free AS MATERIALIZED (SELECT l.shard FROM {lease} l \
                     WHERE (l.owner IS NULL OR l.until <= clock_timestamp()) \
                     ORDER BY l.shard LIMIT $3 FOR NO KEY UPDATE SKIP LOCKED) \
                 UPDATE {lease} l SET owner = $1, epoch = l.epoch + 1, \
                        until = clock_timestamp() + $2 * interval '1 millisecond' \
                   FROM free WHERE l.shard = free.shard RETURNING l.shard, l.epoch"
            )),
            // One statement, so that a relay that is slow to go on keeps no locks on leases.
            release: statement(format!(
                "WITH gone AS (DELETE FROM {relay} WHERE relay = $3 AND $4), own AS MATERIALIZED (SELECT l.shard FROM {lease} l \
                     JOIN unnest($1::smallint[], $2::bigint[]) u(shard, epoch) ON l.shard = u.shard AND l.epoch = u.epoch \
                     WHERE l.owner = $3 ORDER BY l.shard FOR NO KEY UPDATE OF l) \
                 UPDATE {lease} l SET owner = NULL, until = '-infinity' FROM own WHERE l.shard = own.shard"
            )),
            leases: statement(format!(
                "SELECT shard, epoch, owner, CASE WHEN isfinite(until) THEN greatest({}, 0) ELSE 0 END \
                 FROM {lease} ORDER BY shard",
                left("until")
            )),
            relays: statement(format!(
                "SELECT relay FROM {relay} WHERE until > clock_timestamp() ORDER BY relay"
            )),

            holds: statement(format!("SELECT {hold_columns} FROM {hold} WHERE shard = ANY($1)")),
            deliver: statement(format!(
                "WITH {held}, gone AS (DELETE FROM {outbox} o WHERE {delivered}) \
                 SELECT shard FROM held"
            )),
            // What is given up or waits must stay so: the relay goes on with the key, and a crash of the server must not bring
            // back what was before it.
            settle: statement(format!(
                "WITH durable AS MATERIALIZED (SELECT set_config('synchronous_commit', CASE WHEN \
                     cardinality($7::smallint[]) + cardinality($12::smallint[]) + cardinality($17::smallint[]) > 0 \
                     THEN 'on' ELSE current_setting('synchronous_commit') END, true)), \
                 {held}, gone AS (DELETE FROM {outbox} o WHERE {delivered} RETURNING o.*), \
                 {archived}\
                 doomed AS MATERIALIZED (SELECT f.place, u.attempts, u.reason FROM {given_up} AND {ours}), \
                 dying AS (DELETE FROM {outbox} o USING doomed d WHERE o.ctid = ANY (ARRAY(SELECT place FROM doomed)) \
                     AND o.ctid = d.place RETURNING o.*, d.attempts, d.reason), \
                 buried AS ({bury}), \
                 cleared AS (DELETE FROM {hold} h USING \
                     unnest($12::smallint[], $13::text[], $14::text[], $15::bytea[], $16::bigint[]) \
                     u(shard, scope, topic, key, message) WHERE h.shard = u.shard AND h.scope = u.scope \
                     AND h.topic = u.topic AND h.key = u.key AND h.message = u.message AND {ours}), \
                 put AS (INSERT INTO {hold} (shard, scope, topic, key, message, head, head_message_id, attempts, parked, \
                                             due_at, reason) \
                     SELECT shard, scope, topic, key, message, head, head_message_id, attempts, parked, \
                            clock_timestamp() + due_in * interval '1 millisecond', reason \
                       FROM unnest($17::smallint[], $18::text[], $19::text[], $20::bytea[], $21::bigint[], $22::bigint[], \
                                   $23::uuid[], $24::bigint[], $25::boolean[], $26::bigint[], $27::text[]) \
                            u(shard, scope, topic, key, message, head, head_message_id, attempts, parked, due_in, reason) \
                      WHERE {ours} \
                     ON CONFLICT (shard, scope, topic, key, message) DO UPDATE SET head = excluded.head, \
                        head_message_id = excluded.head_message_id, attempts = excluded.attempts, \
                        parked = excluded.parked, due_at = excluded.due_at, reason = excluded.reason) \
                 SELECT shard FROM held, durable"
            )),
            bury: statement(format!(
                "WITH dying AS (DELETE FROM {outbox} o WHERE shard = $1 AND id = $2 AND message_id = $3 \
                 RETURNING o.*, $4::bigint AS attempts, $5::text AS reason) {bury}"
            )),

            parked: statement(format!(
                "SELECT {hold_columns} FROM {hold} WHERE parked ORDER BY head, shard, scope, topic, key LIMIT $1"
            )),
            hold_resume: statement(format!(
                "UPDATE {hold} SET parked = false, attempts = 0, due_at = clock_timestamp() \
                 WHERE {hold_named} AND parked AND head = $6 AND head_message_id = $7"
            )),
            hold_unpark: statement(format!(
                "DELETE FROM {hold} WHERE {hold_named} AND parked AND head = $6 AND head_message_id = $7 \
                 RETURNING attempts, reason"
            )),

            dead_list: statement(format!(
                "SELECT o.position, {READ}, o.attempts, o.reason, o.died_at FROM {dead} o \
                 WHERE ($1::text IS NULL OR o.topic = $1) AND (o.position, o.message_id) > ($2, $3) \
                 AND ($5::uuid[] IS NULL OR o.message_id = ANY ($5)) ORDER BY o.position, o.message_id LIMIT $4"
            )),
            // What comes back is numbered anew; its old number stays a hole.
            dead_requeue: statement(write(
                &format!(
                    "fresh AS MATERIALIZED (DELETE FROM {dead} d USING unnest($1::bigint[], $2::uuid[]) \
                     WITH ORDINALITY u(position, message_id, n) \
                     WHERE d.position = u.position AND d.message_id = u.message_id RETURNING d.*, u.n)"
                ),
                "",
            )),
            dead_discard: statement(format!(
                "DELETE FROM {dead} d USING unnest($1::bigint[], $2::uuid[]) u(position, message_id) \
                 WHERE d.position = u.position AND d.message_id = u.message_id"
            )),

            // When the next one is due, and which shards the relay $3 holds: neither needs a lock.
            next_due: statement(format!(
                "SELECT (SELECT min({}) FROM unnest($1::smallint[]) u(shard) CROSS JOIN LATERAL \
                     (SELECT deliver_at FROM {scheduled} s WHERE s.shard = u.shard ORDER BY deliver_at, id LIMIT 1) s), \
                 ARRAY(SELECT l.shard FROM {lease} l JOIN unnest($1::smallint[], $2::bigint[]) u(shard, epoch) \
                     ON l.shard = u.shard AND l.epoch = u.epoch WHERE l.owner = $3 AND l.until > clock_timestamp())",
                left("deliver_at")
            )),
            promote: statement({
                let (with, insert) = insert(
                    &format!(
                        "{held}, due AS MATERIALIZED (SELECT s.place FROM held u \
                             CROSS JOIN LATERAL (SELECT s.ctid AS place, s.deliver_at, s.id FROM {scheduled} s \
                             WHERE s.shard = u.shard AND s.deliver_at <= statement_timestamp() \
                             ORDER BY s.deliver_at, s.id LIMIT $4) s ORDER BY s.deliver_at, s.id LIMIT $4), \
                         gone AS (DELETE FROM {scheduled} s WHERE s.ctid = ANY (ARRAY(SELECT place FROM due)) \
                             RETURNING s.*), \
                         fresh AS MATERIALIZED (SELECT *, row_number() OVER (ORDER BY deliver_at, id) AS n FROM gone)"
                    ),
                    "",
                );
                format!("{with}, written AS ({insert} RETURNING 1) SELECT count(*) FROM written")
            }),

            purge: statement(format!(
                "DELETE FROM {processed} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {processed} \
                 WHERE processed_at <= clock_timestamp() - $1 * interval '1 millisecond' \
                 ORDER BY processed_at LIMIT $2 FOR UPDATE SKIP LOCKED))"
            )),

            backlog: statement(format!(
                "SELECT count(*) FROM (SELECT 1 FROM {outbox} LIMIT $1) o"
            )),
            oldest: statement(format!(
                "SELECT max(-{}) FROM {lease} l CROSS JOIN LATERAL \
                 (SELECT created_at FROM {outbox} o WHERE o.shard = l.shard ORDER BY o.id LIMIT 1) o",
                left("created_at")
            )),
            hold_counts: statement(format!(
                "SELECT count(*) FILTER (WHERE NOT parked), count(*) FILTER (WHERE parked) FROM {hold}"
            )),
            counts: statement(format!(
                "SELECT (SELECT count(*) FROM (SELECT 1 FROM {dead} LIMIT $1) d), \
                 (SELECT count(*) FROM (SELECT 1 FROM {scheduled} LIMIT $1) s)"
            )),
            processed_count: statement(format!(
                "SELECT count(*) FROM (SELECT 1 FROM {processed} LIMIT $1) p"
            )),

            now: statement("SELECT clock_timestamp()".to_owned()),
            // A search has no index but that of positions: it looks at the first $2 rows of each of the shards $1, and at
            // $3 in all. One row for each that matches, or one that only tells the counts.
            search: statement(format!(
                "WITH seen AS MATERIALIZED (SELECT s.* FROM unnest($1::smallint[]) u(shard) CROSS JOIN LATERAL \
                     (SELECT o.shard, o.id, row_number() OVER (ORDER BY o.id) AS line, \
                         coalesce(($4::uuid IS NULL OR o.message_id = $4) AND ($5::text IS NULL OR o.topic = $5) \
                             AND ($6::bytea IS NULL OR o.key = $6), false) AS matches \
                      FROM (SELECT * FROM {outbox} o WHERE o.shard = u.shard ORDER BY o.id LIMIT $2) o) s \
                     ORDER BY s.id LIMIT $3), \
                 told AS MATERIALIZED (SELECT count(*) FILTER (WHERE matches) AS matching, \
                     count(*) < $3 AND coalesce(max(line), 0) < $2 AS complete FROM seen) \
                 SELECT t.matching, t.complete, m.line - 1, o.shard, o.id, {READ} FROM told t \
                 LEFT JOIN LATERAL (SELECT * FROM seen WHERE matches ORDER BY id LIMIT $7) m ON true \
                 LEFT JOIN LATERAL (SELECT * FROM {outbox} o WHERE o.shard = m.shard AND o.id = m.id OFFSET 0) o ON true \
                 ORDER BY o.id"
            )),
            scheduled_by_id: statement(format!(
                "SELECT o.deliver_at, o.shard, o.message_id, o.topic, o.key, NULL::bytea, NULL::text, NULL::text, \
                        o.created_at, NULL::bigint \
                 FROM (SELECT * FROM {scheduled} o ORDER BY shard, deliver_at, id LIMIT $2) o WHERE o.message_id = $1 \
                 ORDER BY o.deliver_at, o.id LIMIT $3"
            )),
            scheduled_bounded: statement(format!(
                "SELECT count(*) FROM (SELECT 1 FROM {scheduled} LIMIT $1) s"
            )),
            processed_by_id: statement(format!(
                "SELECT o.position, {READ}, o.processed_at \
                 FROM (SELECT * FROM {processed} o ORDER BY processed_at DESC LIMIT $2) o WHERE o.message_id = $1 LIMIT $3"
            )),
            dead_by_id: statement(format!(
                "SELECT o.position, {READ}, o.attempts, o.reason, o.died_at FROM {dead} o WHERE o.message_id = $1 \
                 ORDER BY o.position LIMIT $2"
            )),
            last_number: statement(format!(
                "SELECT last FROM {numbers} WHERE topic = $1 AND key = $2"
            )),
            all_holds: statement(format!("SELECT {hold_columns} FROM {hold}")),

            receive: statement(format!(
                "INSERT INTO {inbox} (consumer, message_id) VALUES ($1, $2) ON CONFLICT DO NOTHING"
            )),
            forget: statement(format!(
                "DELETE FROM {inbox} WHERE (consumer, message_id) IN (SELECT consumer, message_id FROM {inbox} \
                 WHERE received_at <= clock_timestamp() - $1 * interval '1 millisecond' ORDER BY received_at LIMIT $2)"
            )),
        }
    }
}

/// Reads a batch in one statement, that is in one snapshot. What it answers and why it is exact is told in
/// [`crate::cursor`].
///
/// The first row tells the state of the server; then come single messages, keys that are read apart, and at last the
/// shards, each in the order of positions. Lists are arrays, so that there is one statement whatever their lengths,
/// and `NOT IN (SELECT unnest(…))` rather than `<> ALL (…)`, because only that is looked up in a hash table.
///
/// Where scans go past what is held, it is past `$19` rows at most, which are counted as they come: that has its price, so
/// otherwise they are not. The last column is 0, or tells of the row with that number: 1 that it is wanted, too, and 2 that it is
/// there for its position alone.
fn fetch(outbox: &str, sequence: &str, goes_past: bool) -> String {
    let skip = "o.id NOT IN (SELECT i FROM skip)";
    let given = READ
        .replace("o.payload", "CASE WHEN o.wanted THEN o.payload END")
        .replace("o.headers", "(CASE WHEN o.wanted THEN o.headers END)");
    let scan = |place: u8, asked: &str, range: &str, wanted: &str| {
        let range = format!("o.shard = u.shard AND o.id > least(u.after, server.low) {range}");
        let (given, rows) = if goes_past {
            (
                format!("{given}, CASE WHEN o.nth < $19 THEN 0 WHEN o.wanted THEN 1 ELSE 2 END"),
                format!(
                    "(SELECT o.*, row_number() OVER (ORDER BY o.id) AS nth, ({wanted}) AS wanted FROM \
                         (SELECT * FROM {outbox} o WHERE {range} ORDER BY o.id LIMIT $19) o) o \
                     WHERE o.wanted OR o.nth = $19"
                ),
            )
        } else {
            (
                format!("{READ}, 0"),
                format!("{outbox} o WHERE {range} AND {wanted}"),
            )
        };
        format!(
            "SELECT {place}, u.n, o.shard, o.id, {given} FROM server CROSS JOIN unnest({asked}, n) CROSS JOIN LATERAL \
                 (SELECT * FROM {rows} ORDER BY o.id LIMIT u.quota) o"
        )
    };
    let lanes = scan(
        2,
        "$10::smallint[], $11::text[], $12::bytea[], $13::bigint[], $14::bigint[], $15::bigint[]) \
         WITH ORDINALITY u(shard, topic, key, after, upto, quota",
        "AND o.id <= u.upto",
        &format!("o.topic = u.topic AND o.key = u.key AND {skip}"),
    );
    let shards = scan(
        3,
        "$16::smallint[], $17::bigint[], $18::bigint[]) WITH ORDINALITY u(shard, after, quota",
        "",
        &format!(
            "{skip} AND o.topic NOT IN (SELECT unnest($7::text[])) \
             AND (o.key IS NULL OR (o.topic, o.key) NOT IN (SELECT * FROM unnest($8::text[], $9::bytea[])))"
        ),
    );
    let none = "NULL::uuid, NULL::text, NULL::bytea, NULL::bytea";
    format!(
        // The sequence is read before the next transaction number is: who gets a later number draws later positions.
        // And it is asked under its lock. What `SELECT last_value` reads without one can be up to 32 too high: nextval()
        // writes down the value that it logs ahead, and then the true one.
        "WITH seen AS MATERIALIZED (SELECT pg_current_snapshot() AS snapshot, \
             coalesce(pg_sequence_last_value('{sequence}'::regclass), 0) AS last, \
             least($1::bigint, (SELECT min(u.below) FROM unnest($2::text[], $3::bigint[]) u(xid, below) \
                                WHERE pg_visible_in_snapshot(u.xid::xid8, pg_current_snapshot()))) AS low), \
         server AS MATERIALIZED (SELECT snapshot, last, low, age(pg_snapshot_xmax(snapshot)::xid) AS ahead, \
             pg_current_xact_id_if_assigned() IS NULL AS reads_only, pg_is_in_recovery() AS standby, \
             pg_postmaster_start_time()::text AS started FROM seen WHERE last IS NOT NULL), \
         skip AS MATERIALIZED (SELECT unnest($4::bigint[]) AS i) \
         SELECT 0::int, 0::bigint, 0::smallint, last, {none}, \
             concat_ws('|', snapshot, low, ahead, reads_only, standby), started, NULL::timestamptz, NULL::bigint, 0 FROM server \
         UNION ALL \
         SELECT 1, 0, o.*, 0 FROM unnest($5::smallint[], $6::bigint[]) u(shard, id) CROSS JOIN LATERAL \
             (SELECT o.shard, o.id, {READ} FROM {outbox} o WHERE o.shard = u.shard AND o.id = u.id \
                 AND o.topic NOT IN (SELECT unnest($7::text[])) OFFSET 0) o \
         UNION ALL {lanes} UNION ALL {shards}"
    )
}
