-- As on SQLite (../sqlite), where the reasons are: what that schema refuses, this one refuses as well.
-- Times are microseconds since 1970 (UTC). Enums are text with a CHECK. Nothing secret is stored.
-- A text with JSON is cast in its CHECK, which fails on anything else.

CREATE TABLE session (
    id              TEXT   NOT NULL PRIMARY KEY,
    origin          TEXT   NOT NULL CHECK (origin IN ('v1', 'prototype')),
    template        TEXT   NOT NULL,
    provider        TEXT   NOT NULL,
    "user"          TEXT   NOT NULL,
    language        TEXT,
    time_zone       TEXT,
    keyboard        TEXT,
    phase           TEXT   NOT NULL CHECK (phase IN
        ('queued', 'preparing', 'ready', 'connected', 'disconnected', 'ending', 'ended', 'failed')),
    seq             BIGINT NOT NULL CHECK (seq >= 1),
    created_us      BIGINT NOT NULL,
    expires_us      BIGINT NOT NULL CHECK (expires_us >= created_us),
    activity_us     BIGINT NOT NULL,
    heartbeat_us    BIGINT,
    ready_us        BIGINT,
    disconnected_us BIGINT,
    keep_us         BIGINT,
    ends_us         BIGINT,
    queue_position  BIGINT CHECK (queue_position >= 1),
    expected        TEXT   NOT NULL CHECK (expected::json IS NOT NULL),
    end_reason      TEXT   CHECK (end_reason IN
        ('requested', 'idle', 'never_connected', 'abandoned', 'expired', 'machine_lost', 'failed')),
    failure         TEXT   CHECK (failure IS NULL OR failure::json IS NOT NULL),
    CHECK ((phase IN ('ending', 'ended', 'failed')) = (end_reason IS NOT NULL)),
    CHECK (phase <> 'failed' OR failure IS NOT NULL),
    CHECK (phase NOT IN ('ready', 'connected', 'disconnected') OR ready_us IS NOT NULL),
    CHECK (queue_position IS NULL OR phase = 'queued')
);

CREATE INDEX session_live ON session (created_us) WHERE phase NOT IN ('ended', 'failed');
CREATE INDEX session_queued ON session (created_us, id) WHERE phase = 'queued';
CREATE INDEX session_history ON session (template, provider, created_us);

-- No transaction that fails gives its number back: it is never used twice.
CREATE SEQUENCE desktop_number AS BIGINT MINVALUE 1 MAXVALUE 268435455 NO CYCLE;

CREATE TABLE desktop (
    number         BIGINT NOT NULL PRIMARY KEY DEFAULT nextval('desktop_number')
        CHECK (number >= 0 AND number < 268435456),
    session_id     TEXT   NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    provider       TEXT   NOT NULL,
    phase          TEXT   NOT NULL CHECK (phase IN
        ('planned', 'creating', 'booting', 'configuring', 'ready', 'claimed', 'destroying', 'stuck', 'gone')),
    created_us     BIGINT NOT NULL,
    claimed_us     BIGINT,
    destroying_us  BIGINT,
    address        TEXT,
    certificate    TEXT   CHECK (length(certificate) = 64),
    stuck_reason   TEXT,
    -- A desktop that was ever claimed can only move towards gone.
    CHECK (claimed_us IS NULL OR phase IN ('claimed', 'destroying', 'stuck', 'gone')),
    CHECK (phase <> 'claimed' OR claimed_us IS NOT NULL),
    CHECK ((phase IN ('destroying', 'stuck', 'gone')) = (destroying_us IS NOT NULL)),
    CHECK (phase NOT IN ('ready', 'claimed') OR (address IS NOT NULL AND certificate IS NOT NULL))
);

ALTER SEQUENCE desktop_number OWNED BY desktop.number;

-- A session has at most one desktop of which something may exist.
CREATE UNIQUE INDEX desktop_live ON desktop (session_id) WHERE phase <> 'gone';
CREATE INDEX desktop_session ON desktop (session_id);

CREATE FUNCTION desktop_only_forward() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a desktop only moves towards gone';
END $$;

CREATE TRIGGER desktop_only_forward BEFORE UPDATE ON desktop FOR EACH ROW
WHEN (OLD.phase = 'gone'
  OR NEW.number <> OLD.number
  OR NEW.session_id <> OLD.session_id
  OR (OLD.claimed_us IS NOT NULL AND NEW.claimed_us IS DISTINCT FROM OLD.claimed_us)
  OR (OLD.destroying_us IS NOT NULL AND NEW.destroying_us IS DISTINCT FROM OLD.destroying_us))
EXECUTE FUNCTION desktop_only_forward();

-- A session is forgotten only when nothing of its desktop can exist.
CREATE FUNCTION desktop_not_forgotten() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a desktop that may exist is not forgotten';
END $$;

CREATE TRIGGER desktop_not_forgotten BEFORE DELETE ON desktop FOR EACH ROW
WHEN (OLD.phase <> 'gone')
EXECUTE FUNCTION desktop_not_forgotten();

CREATE TABLE stage (
    session_id  TEXT   NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    place       BIGINT NOT NULL,
    name        TEXT   NOT NULL CHECK (name IN
        ('queued', 'creating', 'booting', 'configuring', 'connecting', 'destroying')),
    started_us  BIGINT NOT NULL,
    duration_ms BIGINT CHECK (duration_ms >= 0),
    expected_ms BIGINT CHECK (expected_ms >= 0),
    PRIMARY KEY (session_id, place)
);

CREATE TABLE event (
    session_id TEXT   NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    seq        BIGINT NOT NULL,
    at_us      BIGINT NOT NULL,
    body       TEXT   NOT NULL CHECK (body::json IS NOT NULL),
    PRIMARY KEY (session_id, seq)
);

-- The key itself would give the session's secret to whoever reads it here, so only its SHA-256 is kept.
CREATE TABLE idempotency (
    key_sha256     TEXT NOT NULL PRIMARY KEY,
    request_sha256 TEXT NOT NULL,
    session_id     TEXT NOT NULL REFERENCES session (id) ON DELETE CASCADE
);

CREATE INDEX idempotency_session ON idempotency (session_id);

-- A machine that Terraform makes: reserved on a node before anything of it exists, forgotten when nothing of it is left.
-- No reference to the desktop's row: this one must outlive every mistake about that one.
CREATE TABLE machine (
    number     BIGINT NOT NULL PRIMARY KEY CHECK (number >= 0 AND number < 268435456),
    node       TEXT   NOT NULL,
    memory_mib BIGINT NOT NULL CHECK (memory_mib > 0),
    -- Terraform's lock on the state: its id, and what Terraform said of it.
    lock_id    TEXT,
    lock       TEXT   CHECK (lock IS NULL OR lock::json IS NOT NULL),
    -- Terraform's state, as it was last saved under the lock.
    state      BYTEA,
    -- Whether its disk is being cloned, and on which storage: a storage takes only so many clones at a time.
    storage    TEXT   NOT NULL DEFAULT '',
    cloning    BIGINT NOT NULL DEFAULT 0 CHECK (cloning IN (0, 1)),
    CHECK ((lock_id IS NULL) = (lock IS NULL))
);

-- What a desktop that failed left to read, without secrets. It goes with its session.
CREATE TABLE log (
    number     BIGINT NOT NULL PRIMARY KEY CHECK (number >= 0 AND number < 268435456),
    session_id TEXT   NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    at_us      BIGINT NOT NULL,
    text       TEXT   NOT NULL CHECK (octet_length(text) <= 1000000)
);

CREATE INDEX log_session ON log (session_id);

-- One row: whether this database is a copy that was put in the place of a later one, and what follows from that.
CREATE TABLE lineage (
    one      BIGINT NOT NULL PRIMARY KEY CHECK (one = 1),
    -- Which server and which table this row was written into: a restored one is another.
    identity TEXT   NOT NULL,
    -- Of the last restore: the highest number that the copy knew, the one above which numbers went on, and when that was noticed.
    known    BIGINT CHECK (known >= 0),
    resumed  BIGINT CHECK (resumed >= known AND resumed < 268435456),
    at_us    BIGINT,
    CHECK ((known IS NULL) = (at_us IS NULL) AND (resumed IS NULL) = (at_us IS NULL))
);
INSERT INTO lineage (one, identity)
    SELECT 1, system_identifier || '/' || 'lineage'::regclass::oid FROM pg_control_system();
