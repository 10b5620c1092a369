-- Those who wait are counted at every request.
CREATE INDEX session_queued ON session (created_us, id) WHERE phase = 'queued';
CREATE INDEX idempotency_session ON idempotency (session_id);

-- One row: whether this database is a copy that was put in the place of a later one, and what follows from that.
CREATE TABLE lineage (
    one       INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    -- When it was copied; nothing once the copy is in use.
    copied_us INTEGER,
    -- Of the last restore: the highest number that the copy knew, the one above which numbers went on, and when that was noticed.
    known     INTEGER CHECK (known >= 0),
    resumed   INTEGER CHECK (resumed >= known AND resumed < 268435456),
    at_us     INTEGER,
    CHECK ((known IS NULL) = (at_us IS NULL) AND (resumed IS NULL) = (at_us IS NULL))
) STRICT;
INSERT INTO lineage (one) VALUES (1);
