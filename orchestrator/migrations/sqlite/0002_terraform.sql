-- A machine that Terraform makes: reserved on a node before anything of it exists, forgotten when nothing of it is left.
-- No reference to the desktop's row: this one must outlive every mistake about that one.
CREATE TABLE machine (
    number     INTEGER NOT NULL PRIMARY KEY CHECK (number >= 0 AND number < 268435456),
    node       TEXT    NOT NULL,
    memory_mib INTEGER NOT NULL CHECK (memory_mib > 0),
    -- Terraform's lock on the state: its id, and what Terraform said of it.
    lock_id    TEXT,
    lock       TEXT    CHECK (json_valid(lock)),
    -- Terraform's state, as it was last saved under the lock.
    state      BLOB,
    CHECK ((lock_id IS NULL) = (lock IS NULL))
) STRICT;
