-- Positions. CACHE 1, because a session that keeps numbers in reserve would commit them long after their turn.
CREATE SEQUENCE {schema}."{prefix}_id_seq" AS bigint INCREMENT 1 MINVALUE 1 START 1 CACHE 1 NO CYCLE;

-- The outbox: what producers have committed and the relay has not delivered. A row is written once and deleted once;
-- its only index is the primary key.
--
-- The default of id gives the transaction its number before it draws a position. The relay's reader rests on that
-- order; do not change it.
CREATE TABLE {schema}."{prefix}" (
    shard        smallint NOT NULL GENERATED ALWAYS AS
                 ((('x' || left(encode(sha256(coalesce(key, uuid_send(message_id))), 'hex'), 8))::bit(32)::bigint % {shards})::smallint) STORED,
    id           bigint NOT NULL DEFAULT nextval(CASE WHEN pg_current_xact_id() IS NOT NULL
                                                      THEN '{schema}."{prefix}_id_seq"'::regclass END),
    message_id   uuid NOT NULL DEFAULT gen_random_uuid(),
    topic        text COLLATE "C" NOT NULL CHECK (topic ~ '^[A-Za-z0-9._-]+$' AND octet_length(topic) <= 249 AND topic NOT IN ('.', '..')),
    key          bytea CHECK (octet_length(key) <= 1024),
    payload      bytea,
    headers      json,
    content_type text COLLATE "C" CHECK (content_type <> ''),
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp() CHECK (isfinite(created_at)),
    key_seq      bigint{numbered},
    PRIMARY KEY (shard, id)
) WITH (
    -- Rows come and go: vacuum by their number, not by a share of a table that is empty most of the time, without
    -- pauses, and without cutting the file short, for which it would lock the table.
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_cost_delay = 0,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 100000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000,
    vacuum_truncate = false,
    toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 10000,
    toast.autovacuum_vacuum_cost_delay = 0, toast.vacuum_truncate = false
);
ALTER SEQUENCE {schema}."{prefix}_id_seq" OWNED BY {schema}."{prefix}".id;

-- What waits. Of a topic: its name; of a key: topic and key; of a keyless message: its position. The columns that a
-- scope does not use hold their defaults, so that the primary key is total.
CREATE TABLE {schema}."{prefix}_hold" (
    shard           smallint NOT NULL,
    scope           text NOT NULL CHECK (scope IN ('topic', 'key', 'message')),
    topic           text COLLATE "C" NOT NULL DEFAULT '',
    key             bytea NOT NULL DEFAULT '',
    message         bigint NOT NULL DEFAULT 0,
    head            bigint NOT NULL,
    head_message_id uuid NOT NULL,
    attempts        bigint NOT NULL CHECK (attempts BETWEEN 0 AND 4294967295),
    parked          boolean NOT NULL,
    due_at          timestamptz NOT NULL,
    reason          text NOT NULL,
    PRIMARY KEY (shard, scope, topic, key, message)
);

CREATE TABLE {schema}."{prefix}_dead" (
    position     bigint NOT NULL,
    message_id   uuid NOT NULL,
    topic        text COLLATE "C" NOT NULL,
    key          bytea,
    payload      bytea,
    headers      json,
    content_type text COLLATE "C",
    created_at   timestamptz NOT NULL,
    key_seq      bigint,
    attempts     bigint NOT NULL,
    reason       text NOT NULL,
    died_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (position, message_id)
);
CREATE INDEX "{prefix}_dead_message" ON {schema}."{prefix}_dead" (message_id);

-- Not before deliver_at; position and number are given at promotion.
CREATE TABLE {schema}."{prefix}_scheduled" (
    shard        smallint NOT NULL GENERATED ALWAYS AS
                 ((('x' || left(encode(sha256(coalesce(key, uuid_send(message_id))), 'hex'), 8))::bit(32)::bigint % {shards})::smallint) STORED,
    id           bigint GENERATED ALWAYS AS IDENTITY,
    -- From a time that never comes no span can be counted, and the relay would fail at it for ever.
    deliver_at   timestamptz NOT NULL CHECK (isfinite(deliver_at)),
    message_id   uuid NOT NULL DEFAULT gen_random_uuid(),
    topic        text COLLATE "C" NOT NULL CHECK (topic ~ '^[A-Za-z0-9._-]+$' AND octet_length(topic) <= 249 AND topic NOT IN ('.', '..')),
    key          bytea CHECK (octet_length(key) <= 1024),
    payload      bytea,
    headers      json,
    content_type text COLLATE "C" CHECK (content_type <> ''),
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp() CHECK (isfinite(created_at)),
    PRIMARY KEY (shard, deliver_at, id)
);

-- The archive, when the relay is configured to keep what it delivered.
CREATE TABLE {schema}."{prefix}_processed" (
    position     bigint NOT NULL,
    message_id   uuid NOT NULL,
    topic        text COLLATE "C" NOT NULL,
    key          bytea,
    payload      bytea,
    headers      json,
    content_type text COLLATE "C",
    created_at   timestamptz NOT NULL,
    key_seq      bigint,
    processed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX "{prefix}_processed_age" ON {schema}."{prefix}_processed" (processed_at);

-- Short rows that are rewritten all the time: with room on their pages no index has to follow.
CREATE TABLE {schema}."{prefix}_lease" (
    shard smallint PRIMARY KEY,
    owner text COLLATE "C",
    epoch bigint NOT NULL DEFAULT 0,
    until timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0);
INSERT INTO {schema}."{prefix}_lease" (shard) SELECT generate_series(0, {shards} - 1);

CREATE TABLE {schema}."{prefix}_relay" (
    relay text COLLATE "C" PRIMARY KEY,
    until timestamptz NOT NULL
) WITH (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0);

-- The last number of each key, where messages are numbered.
CREATE TABLE {schema}."{prefix}_sequence" (
    topic text COLLATE "C" NOT NULL,
    key   bytea NOT NULL,
    last  bigint NOT NULL,
    PRIMARY KEY (topic, key)
) WITH (fillfactor = 50);

-- What a consumer has handled.
CREATE TABLE {schema}."{prefix}_inbox" (
    consumer    text COLLATE "C" NOT NULL,
    message_id  uuid NOT NULL,
    received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (consumer, message_id)
);
CREATE INDEX "{prefix}_inbox_age" ON {schema}."{prefix}_inbox" (received_at);

-- The status that the classical pattern keeps in a column: asked for here, written nowhere.
CREATE VIEW {schema}."{prefix}_status" AS
SELECT o.id AS position, o.message_id, o.topic, o.key, o.created_at,
       coalesce((SELECT CASE WHEN bool_or(h.parked) THEN 'parked' WHEN count(*) > 0 THEN 'retrying' END
                   FROM {schema}."{prefix}_hold" h
                  WHERE (h.scope = 'topic' AND h.topic = o.topic)
                     OR (h.scope = 'key' AND h.topic = o.topic AND h.key = o.key)
                     OR (h.scope = 'message' AND h.message = o.id AND o.key IS NULL)), 'pending') AS status
  FROM {schema}."{prefix}" o
UNION ALL
SELECT NULL, message_id, topic, key, created_at, 'scheduled' FROM {schema}."{prefix}_scheduled"
UNION ALL
SELECT position, message_id, topic, key, created_at, 'processed' FROM {schema}."{prefix}_processed"
UNION ALL
SELECT position, message_id, topic, key, created_at, 'dead' FROM {schema}."{prefix}_dead";

-- Enqueues bytes, in the caller's transaction; says the message's id.
CREATE FUNCTION {schema}."{prefix}_enqueue_bytes"(
    topic text, key bytea, payload bytea,
    headers json DEFAULT NULL, content_type text DEFAULT NULL, deliver_at timestamptz DEFAULT NULL
) RETURNS uuid LANGUAGE plpgsql AS $outbox$
#variable_conflict use_variable
DECLARE
    id uuid := gen_random_uuid();
    number bigint;
BEGIN
    IF deliver_at > statement_timestamp() THEN
        INSERT INTO {schema}."{prefix}_scheduled" (message_id, topic, key, payload, headers, content_type, deliver_at)
        VALUES (id, topic, key, payload, headers, content_type, deliver_at);
    ELSE
        {insert_one}
    END IF;
    RETURN id;
END
$outbox$;

-- The same for text, whose bytes are its UTF-8 whatever the client's encoding. A text literal that is put into a
-- bytea column by hand is not: there a backslash begins an escape.
CREATE FUNCTION {schema}."{prefix}_enqueue"(
    topic text, key text, payload text,
    headers json DEFAULT NULL, content_type text DEFAULT NULL, deliver_at timestamptz DEFAULT NULL
) RETURNS uuid LANGUAGE sql AS $outbox$
    SELECT {schema}."{prefix}_enqueue_bytes"($1, convert_to($2, 'UTF8'), convert_to($3, 'UTF8'), $4, $5, $6)
$outbox$;
