-- Times are microseconds since 1970 (UTC). Enums are text with a CHECK: the schema refuses rows that cannot be.
-- Nothing secret is stored: session secrets, tokens and passwords are derived from a key that is not in here.

CREATE TABLE session (
    id              TEXT    NOT NULL PRIMARY KEY,
    origin          TEXT    NOT NULL CHECK (origin IN ('v1', 'prototype')),
    template        TEXT    NOT NULL,
    provider        TEXT    NOT NULL,
    user            TEXT    NOT NULL,
    language        TEXT,
    time_zone       TEXT,
    keyboard        TEXT,
    phase           TEXT    NOT NULL CHECK (phase IN
        ('queued', 'preparing', 'ready', 'connected', 'disconnected', 'ending', 'ended', 'failed')),
    seq             INTEGER NOT NULL CHECK (seq >= 1),
    created_us      INTEGER NOT NULL,
    expires_us      INTEGER NOT NULL CHECK (expires_us >= created_us),
    activity_us     INTEGER NOT NULL,
    heartbeat_us    INTEGER,
    ready_us        INTEGER,
    disconnected_us INTEGER,
    keep_us         INTEGER,
    ends_us         INTEGER,
    queue_position  INTEGER CHECK (queue_position >= 1),
    expected        TEXT    NOT NULL CHECK (json_valid(expected)),
    end_reason      TEXT    CHECK (end_reason IN
        ('requested', 'idle', 'never_connected', 'abandoned', 'expired', 'machine_lost', 'failed')),
    failure         TEXT    CHECK (json_valid(failure)),
    CHECK ((phase IN ('ending', 'ended', 'failed')) = (end_reason IS NOT NULL)),
    CHECK (phase <> 'failed' OR failure IS NOT NULL),
    CHECK (phase NOT IN ('ready', 'connected', 'disconnected') OR ready_us IS NOT NULL),
    CHECK (queue_position IS NULL OR phase = 'queued')
) STRICT;

CREATE INDEX session_live ON session (created_us) WHERE phase NOT IN ('ended', 'failed');
CREATE INDEX session_history ON session (template, provider, created_us);

-- AUTOINCREMENT: a number is never used twice, whatever was deleted.
CREATE TABLE desktop (
    number         INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT CHECK (number < 268435456),
    session_id     TEXT    NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    provider       TEXT    NOT NULL,
    phase          TEXT    NOT NULL CHECK (phase IN
        ('planned', 'creating', 'booting', 'configuring', 'ready', 'claimed', 'destroying', 'stuck', 'gone')),
    created_us     INTEGER NOT NULL,
    claimed_us     INTEGER,
    destroying_us  INTEGER,
    address        TEXT,
    certificate    TEXT    CHECK (length(certificate) = 64),
    stuck_reason   TEXT,
    -- A desktop that was ever claimed can only move towards gone.
    CHECK (claimed_us IS NULL OR phase IN ('claimed', 'destroying', 'stuck', 'gone')),
    CHECK (phase <> 'claimed' OR claimed_us IS NOT NULL),
    CHECK ((phase IN ('destroying', 'stuck', 'gone')) = (destroying_us IS NOT NULL)),
    CHECK (phase NOT IN ('ready', 'claimed') OR (address IS NOT NULL AND certificate IS NOT NULL))
) STRICT;

-- A session has at most one desktop of which something may exist.
CREATE UNIQUE INDEX desktop_live ON desktop (session_id) WHERE phase <> 'gone';
CREATE INDEX desktop_session ON desktop (session_id);

CREATE TRIGGER desktop_only_forward BEFORE UPDATE ON desktop
WHEN OLD.phase = 'gone'
  OR NEW.number <> OLD.number
  OR NEW.session_id <> OLD.session_id
  OR (OLD.claimed_us IS NOT NULL AND NEW.claimed_us IS NOT OLD.claimed_us)
  OR (OLD.destroying_us IS NOT NULL AND NEW.destroying_us IS NOT OLD.destroying_us)
BEGIN
    SELECT RAISE(ABORT, 'a desktop only moves towards gone');
END;

-- A session is forgotten only when nothing of its desktop can exist.
CREATE TRIGGER desktop_not_forgotten BEFORE DELETE ON desktop WHEN OLD.phase <> 'gone'
BEGIN
    SELECT RAISE(ABORT, 'a desktop that may exist is not forgotten');
END;

CREATE TABLE stage (
    session_id  TEXT    NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    place       INTEGER NOT NULL,
    name        TEXT    NOT NULL CHECK (name IN
        ('queued', 'creating', 'booting', 'configuring', 'connecting', 'destroying')),
    started_us  INTEGER NOT NULL,
    duration_ms INTEGER CHECK (duration_ms >= 0),
    expected_ms INTEGER CHECK (expected_ms >= 0),
    PRIMARY KEY (session_id, place)
) STRICT, WITHOUT ROWID;

CREATE TABLE event (
    session_id TEXT    NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    seq        INTEGER NOT NULL,
    at_us      INTEGER NOT NULL,
    body       TEXT    NOT NULL CHECK (json_valid(body)),
    PRIMARY KEY (session_id, seq)
) STRICT, WITHOUT ROWID;

-- The key itself would give the session's secret to whoever reads it here, so only its SHA-256 is kept.
CREATE TABLE idempotency (
    key_sha256     TEXT NOT NULL PRIMARY KEY,
    request_sha256 TEXT NOT NULL,
    session_id     TEXT NOT NULL REFERENCES session (id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
