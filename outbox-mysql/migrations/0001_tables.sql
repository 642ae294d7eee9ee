-- The outbox: what producers have committed and the relay has not delivered. A row is written once and deleted once,
-- and no indexed column ever changes.
--
-- Two columns are one longer than they may be: a server that is not strict cuts what is longer still, and then the
-- constraint refuses it.
CREATE TABLE IF NOT EXISTS `{prefix}` (
    id           BIGINT NOT NULL AUTO_INCREMENT,
    message_id   BINARY(16) NOT NULL DEFAULT (UNHEX(REPLACE(UUID(), '-', ''))),
    topic        VARCHAR(250) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    `key`        VARBINARY(1025),
    payload      LONGBLOB,
    headers      LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    content_type LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    created_at   DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
    key_seq      BIGINT,
    shard        SMALLINT AS (CAST(CONV(LEFT(SHA2(COALESCE(`key`, message_id), 256), 8), 16, 10) AS UNSIGNED) % {shards}) STORED,
    PRIMARY KEY (id),
    KEY `{prefix}_shard` (shard, id),
    CONSTRAINT `{prefix}_topic` CHECK (topic NOT REGEXP '[^A-Za-z0-9._-]' AND CHAR_LENGTH(topic) BETWEEN 1 AND 249 AND topic NOT IN ('.', '..')),
    CONSTRAINT `{prefix}_key` CHECK (OCTET_LENGTH(`key`) <= 1024),
    CONSTRAINT `{prefix}_headers` CHECK (headers IS NULL OR JSON_VALID(headers)),
    CONSTRAINT `{prefix}_content_type` CHECK (content_type <> ''){numbered}
) ENGINE = InnoDB;

-- What waits. Of a topic: its name; of a key: topic and key; of a keyless message: its position. The columns that a
-- scope does not use hold their defaults, so that the primary key is total.
CREATE TABLE IF NOT EXISTS `{prefix}_hold` (
    shard           SMALLINT NOT NULL,
    scope           VARCHAR(8) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    topic           VARCHAR(249) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT '',
    `key`           VARBINARY(1024) NOT NULL DEFAULT '',
    message         BIGINT NOT NULL DEFAULT 0,
    head            BIGINT NOT NULL,
    head_message_id BINARY(16) NOT NULL,
    attempts        BIGINT NOT NULL,
    parked          BOOLEAN NOT NULL,
    due_at          DATETIME(6) NOT NULL,
    reason          LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    PRIMARY KEY (shard, scope, topic, `key`, message)
) ENGINE = InnoDB;

CREATE TABLE IF NOT EXISTS `{prefix}_dead` (
    position     BIGINT NOT NULL,
    message_id   BINARY(16) NOT NULL,
    topic        VARCHAR(249) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    `key`        VARBINARY(1024),
    payload      LONGBLOB,
    headers      LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    content_type LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    created_at   DATETIME(6) NOT NULL,
    key_seq      BIGINT,
    attempts     BIGINT NOT NULL,
    reason       LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    died_at      DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
    PRIMARY KEY (position, message_id),
    KEY `{prefix}_dead_message` (message_id)
) ENGINE = InnoDB;

-- Not before deliver_at; position and number are given at promotion.
CREATE TABLE IF NOT EXISTS `{prefix}_scheduled` (
    id           BIGINT NOT NULL AUTO_INCREMENT,
    deliver_at   DATETIME(6) NOT NULL,
    message_id   BINARY(16) NOT NULL DEFAULT (UNHEX(REPLACE(UUID(), '-', ''))),
    topic        VARCHAR(250) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    `key`        VARBINARY(1025),
    payload      LONGBLOB,
    headers      LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    content_type LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    created_at   DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
    shard        SMALLINT AS (CAST(CONV(LEFT(SHA2(COALESCE(`key`, message_id), 256), 8), 16, 10) AS UNSIGNED) % {shards}) STORED,
    PRIMARY KEY (id),
    KEY `{prefix}_scheduled_due` (shard, deliver_at, id),
    CONSTRAINT `{prefix}_scheduled_topic` CHECK (topic NOT REGEXP '[^A-Za-z0-9._-]' AND CHAR_LENGTH(topic) BETWEEN 1 AND 249 AND topic NOT IN ('.', '..')),
    CONSTRAINT `{prefix}_scheduled_key` CHECK (OCTET_LENGTH(`key`) <= 1024),
    CONSTRAINT `{prefix}_scheduled_headers` CHECK (headers IS NULL OR JSON_VALID(headers)),
    CONSTRAINT `{prefix}_scheduled_content_type` CHECK (content_type <> '')
) ENGINE = InnoDB;

-- The archive, when the relay is configured to keep what it delivered.
CREATE TABLE IF NOT EXISTS `{prefix}_processed` (
    id           BIGINT NOT NULL AUTO_INCREMENT,
    position     BIGINT NOT NULL,
    message_id   BINARY(16) NOT NULL,
    topic        VARCHAR(249) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    `key`        VARBINARY(1024),
    payload      LONGBLOB,
    headers      LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    content_type LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    created_at   DATETIME(6) NOT NULL,
    key_seq      BIGINT,
    processed_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
    PRIMARY KEY (id),
    KEY `{prefix}_processed_age` (processed_at)
) ENGINE = InnoDB;

CREATE TABLE IF NOT EXISTS `{prefix}_lease` (
    shard SMALLINT NOT NULL,
    owner VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    epoch BIGINT NOT NULL DEFAULT 0,
    until DATETIME(6) NOT NULL DEFAULT '1970-01-01',
    PRIMARY KEY (shard)
) ENGINE = InnoDB;
INSERT IGNORE INTO `{prefix}_lease` (shard) VALUES {each_shard};

CREATE TABLE IF NOT EXISTS `{prefix}_relay` (
    relay VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    until DATETIME(6) NOT NULL,
    PRIMARY KEY (relay)
) ENGINE = InnoDB;

-- The last number of each key, where messages are numbered.
CREATE TABLE IF NOT EXISTS `{prefix}_sequence` (
    topic VARCHAR(249) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    `key` VARBINARY(1024) NOT NULL,
    last  BIGINT NOT NULL,
    PRIMARY KEY (topic, `key`)
) ENGINE = InnoDB;

-- What a consumer has handled.
CREATE TABLE IF NOT EXISTS `{prefix}_inbox` (
    consumer    VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    message_id  BINARY(16) NOT NULL,
    received_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
    PRIMARY KEY (consumer, message_id),
    KEY `{prefix}_inbox_age` (received_at)
) ENGINE = InnoDB;

-- The status that the classical pattern keeps in a column: asked for here, written nowhere.
CREATE OR REPLACE SQL SECURITY INVOKER VIEW `{prefix}_status` AS
SELECT o.id AS position, o.message_id, o.topic, o.`key`, o.created_at,
       COALESCE((SELECT CASE WHEN MAX(h.parked) = 1 THEN 'parked' WHEN COUNT(*) > 0 THEN 'retrying' END
                   FROM `{prefix}_hold` h
                  WHERE (h.scope = 'topic' AND h.topic = o.topic)
                     OR (h.scope = 'key' AND h.topic = o.topic AND h.`key` = o.`key`)
                     OR (h.scope = 'message' AND h.message = o.id AND o.`key` IS NULL)), 'pending') AS status
  FROM `{prefix}` o
UNION ALL
SELECT NULL, message_id, topic, `key`, created_at, 'scheduled' FROM `{prefix}_scheduled`
UNION ALL
SELECT position, message_id, topic, `key`, created_at, 'processed' FROM `{prefix}_processed`
UNION ALL
SELECT position, message_id, topic, `key`, created_at, 'dead' FROM `{prefix}_dead`;

-- Enqueues bytes, in the caller's transaction.
DROP PROCEDURE IF EXISTS `{prefix}_enqueue_bytes`;
-- begin procedure
CREATE PROCEDURE `{prefix}_enqueue_bytes`(
    p_topic VARCHAR(250) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin, p_key VARBINARY(1025), p_payload LONGBLOB,
    p_headers LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    p_content_type LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin, p_deliver_at DATETIME(6)
) SQL SECURITY INVOKER
BEGIN
    IF p_deliver_at > UTC_TIMESTAMP(6) THEN
        INSERT INTO `{prefix}_scheduled` (topic, `key`, payload, headers, content_type, deliver_at)
        VALUES (p_topic, p_key, p_payload, p_headers, p_content_type, p_deliver_at);
    ELSE
        {insert_one}
    END IF;
END;
-- end procedure

-- The same for text, whose bytes are its UTF-8 whatever the client's character set.
DROP PROCEDURE IF EXISTS `{prefix}_enqueue`;
CREATE PROCEDURE `{prefix}_enqueue`(
    p_topic VARCHAR(250) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    p_key VARCHAR(1025) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin,
    p_payload LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin
) SQL SECURITY INVOKER
    CALL `{prefix}_enqueue_bytes`(p_topic, CAST(p_key AS BINARY), CAST(p_payload AS BINARY), NULL, NULL, NULL);
