-- What was checked to be gone when a desktop was removed. It goes with its session.
CREATE TABLE receipt (
    number     INTEGER NOT NULL PRIMARY KEY CHECK (number >= 0 AND number < 268435456),
    session_id TEXT    NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    body       TEXT    NOT NULL CHECK (json_valid(body))
) STRICT;

CREATE INDEX receipt_session ON receipt (session_id);
