-- The outbox: what producers have committed and the relay has not delivered. AUTOINCREMENT, so that a position is
-- never given twice; one writer, so that the order of ids is the order of commits.
CREATE TABLE "{prefix}" (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id   BLOB NOT NULL DEFAULT (randomblob(16))
                 CHECK (typeof(message_id) = 'blob' AND length(message_id) = 16),
    topic        TEXT NOT NULL
                 CHECK (typeof(topic) = 'text' AND length(CAST(topic AS BLOB)) BETWEEN 1 AND 249
                        AND length(topic) = length(CAST(topic AS BLOB))
                        AND topic NOT GLOB '*[^A-Za-z0-9._-]*' AND topic NOT IN ('.', '..')),
    key          BLOB CHECK (length(CAST(key AS BLOB)) <= 1024),
    payload      BLOB,
    headers      BLOB CHECK (headers IS NULL OR json_valid(CAST(headers AS TEXT))),
    content_type TEXT CHECK (typeof(content_type) IN ('text', 'null') AND content_type <> ''),
    created_at   INTEGER NOT NULL DEFAULT ({now}) CHECK (typeof(created_at) = 'integer'),
    key_seq      INTEGER
);

-- What waits. Of a topic: its name; of a key: topic and key; of a keyless message: its position. The columns that a
-- scope does not use hold their defaults, so that the primary key is total.
CREATE TABLE "{prefix}_hold" (
    scope           TEXT NOT NULL CHECK (scope IN ('topic', 'key', 'message')),
    topic           TEXT NOT NULL DEFAULT '',
    key             BLOB NOT NULL DEFAULT x'',
    message         INTEGER NOT NULL DEFAULT 0,
    head            INTEGER NOT NULL,
    head_message_id BLOB NOT NULL,
    attempts        INTEGER NOT NULL,
    parked          INTEGER NOT NULL CHECK (parked IN (0, 1)),
    due_at          INTEGER NOT NULL,
    reason          TEXT NOT NULL,
    PRIMARY KEY (scope, topic, key, message)
) WITHOUT ROWID;

CREATE TABLE "{prefix}_dead" (
    position     INTEGER NOT NULL,
    message_id   BLOB NOT NULL,
    topic        TEXT NOT NULL,
    key          BLOB,
    payload      BLOB,
    headers      BLOB,
    content_type TEXT,
    created_at   INTEGER NOT NULL,
    key_seq      INTEGER,
    attempts     INTEGER NOT NULL,
    reason       TEXT NOT NULL,
    died_at      INTEGER NOT NULL DEFAULT ({now}),
    PRIMARY KEY (position, message_id)
);
CREATE INDEX "{prefix}_dead_id" ON "{prefix}_dead" (message_id);

-- Not before deliver_at (milliseconds since 1970); position and number are given at promotion.
CREATE TABLE "{prefix}_scheduled" (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    deliver_at   INTEGER NOT NULL CHECK (typeof(deliver_at) = 'integer'),
    message_id   BLOB NOT NULL DEFAULT (randomblob(16))
                 CHECK (typeof(message_id) = 'blob' AND length(message_id) = 16),
    topic        TEXT NOT NULL
                 CHECK (typeof(topic) = 'text' AND length(CAST(topic AS BLOB)) BETWEEN 1 AND 249
                        AND length(topic) = length(CAST(topic AS BLOB))
                        AND topic NOT GLOB '*[^A-Za-z0-9._-]*' AND topic NOT IN ('.', '..')),
    key          BLOB CHECK (length(CAST(key AS BLOB)) <= 1024),
    payload      BLOB,
    headers      BLOB CHECK (headers IS NULL OR json_valid(CAST(headers AS TEXT))),
    content_type TEXT CHECK (typeof(content_type) IN ('text', 'null') AND content_type <> ''),
    created_at   INTEGER NOT NULL DEFAULT ({now}) CHECK (typeof(created_at) = 'integer')
);
CREATE INDEX "{prefix}_scheduled_due" ON "{prefix}_scheduled" (deliver_at, id);

-- The archive, when the relay is configured to keep what it delivered.
CREATE TABLE "{prefix}_processed" (
    position     INTEGER NOT NULL,
    message_id   BLOB NOT NULL,
    topic        TEXT NOT NULL,
    key          BLOB,
    payload      BLOB,
    headers      BLOB,
    content_type TEXT,
    created_at   INTEGER NOT NULL,
    key_seq      INTEGER,
    processed_at INTEGER NOT NULL DEFAULT ({now})
);
CREATE INDEX "{prefix}_processed_age" ON "{prefix}_processed" (processed_at);

CREATE TABLE "{prefix}_lease" (
    shard INTEGER PRIMARY KEY,
    owner TEXT,
    epoch INTEGER NOT NULL DEFAULT 0,
    until INTEGER NOT NULL DEFAULT 0
);
INSERT INTO "{prefix}_lease" (shard) VALUES (0);

CREATE TABLE "{prefix}_relay" (
    relay TEXT PRIMARY KEY,
    until INTEGER NOT NULL
) WITHOUT ROWID;

-- The last number of each key, where messages are numbered.
CREATE TABLE "{prefix}_sequence" (
    topic TEXT NOT NULL,
    key   BLOB NOT NULL,
    last  INTEGER NOT NULL,
    PRIMARY KEY (topic, key)
) WITHOUT ROWID;

-- What a consumer has handled.
CREATE TABLE "{prefix}_inbox" (
    consumer    TEXT NOT NULL,
    message_id  BLOB NOT NULL CHECK (typeof(message_id) = 'blob' AND length(message_id) = 16),
    received_at INTEGER NOT NULL DEFAULT ({now}),
    PRIMARY KEY (consumer, message_id)
) WITHOUT ROWID;
CREATE INDEX "{prefix}_inbox_age" ON "{prefix}_inbox" (received_at);

-- The status that the classical pattern keeps in a column: asked for here, written nowhere.
CREATE VIEW "{prefix}_status" AS
SELECT o.id AS position, o.message_id, o.topic, CAST(o.key AS BLOB) AS key, o.created_at,
       coalesce((SELECT CASE max(h.parked) WHEN 1 THEN 'parked' WHEN 0 THEN 'retrying' END
                   FROM "{prefix}_hold" h
                  WHERE (h.scope = 'topic' AND h.topic = o.topic)
                     OR (h.scope = 'key' AND h.topic = o.topic AND h.key = CAST(o.key AS BLOB))
                     OR (h.scope = 'message' AND h.message = o.id AND o.key IS NULL)), 'pending') AS status
  FROM "{prefix}" o
UNION ALL
SELECT NULL, message_id, topic, CAST(key AS BLOB), created_at, 'scheduled' FROM "{prefix}_scheduled"
UNION ALL
SELECT position, message_id, topic, CAST(key AS BLOB), created_at, 'processed' FROM "{prefix}_processed"
UNION ALL
SELECT position, message_id, topic, CAST(key AS BLOB), created_at, 'dead' FROM "{prefix}_dead";
