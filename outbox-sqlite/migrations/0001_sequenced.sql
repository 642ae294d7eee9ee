-- Numbers each message of a key in its producer's transaction. Written without conflict clauses, because those of
-- the producer's own statement (INSERT OR IGNORE) would take their place.
CREATE TRIGGER "{prefix}_number" AFTER INSERT ON "{prefix}" WHEN NEW.key IS NOT NULL
BEGIN
    INSERT INTO "{prefix}_sequence" (topic, key, last)
        SELECT NEW.topic, CAST(NEW.key AS BLOB), 0
         WHERE NOT EXISTS (SELECT 1 FROM "{prefix}_sequence"
                            WHERE topic = NEW.topic AND key = CAST(NEW.key AS BLOB));
    UPDATE "{prefix}_sequence" SET last = last + 1 WHERE topic = NEW.topic AND key = CAST(NEW.key AS BLOB);
    UPDATE "{prefix}"
       SET key_seq = (SELECT last FROM "{prefix}_sequence" WHERE topic = NEW.topic AND key = CAST(NEW.key AS BLOB))
     WHERE id = NEW.id;
END;
