-- What a desktop that failed left to read, without secrets. It goes with its session.
CREATE TABLE log (
    number     INTEGER NOT NULL PRIMARY KEY CHECK (number >= 0 AND number < 268435456),
    session_id TEXT    NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    at_us      INTEGER NOT NULL,
    text       TEXT    NOT NULL CHECK (length(CAST(text AS BLOB)) <= 1000000)
) STRICT;

CREATE INDEX log_session ON log (session_id);
