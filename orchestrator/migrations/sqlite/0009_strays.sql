-- What a provider showed and no desktop owned. Nothing refers to it: it must outlive every mistake about who owns what.
CREATE TABLE stray (
    provider       TEXT    NOT NULL,
    -- The host whose machines they are; empty where every host sees the same.
    host           TEXT    NOT NULL,
    number         INTEGER NOT NULL CHECK (number >= 0 AND number < 268435456),
    first_us       INTEGER NOT NULL,
    last_us        INTEGER NOT NULL CHECK (last_us >= first_us),
    quarantined_us INTEGER CHECK (quarantined_us >= first_us),
    kept_us        INTEGER,
    tried_us       INTEGER,
    why            TEXT,
    over_us        INTEGER,
    outcome        TEXT    CHECK (outcome IN ('removed', 'released', 'vanished')),
    PRIMARY KEY (provider, host, number),
    -- Nothing is removed that was not in quarantine.
    CHECK (tried_us IS NULL OR quarantined_us IS NOT NULL),
    CHECK (outcome IS NULL OR outcome <> 'removed' OR tried_us IS NOT NULL),
    CHECK ((outcome IS NULL) = (over_us IS NULL))
) STRICT, WITHOUT ROWID;
