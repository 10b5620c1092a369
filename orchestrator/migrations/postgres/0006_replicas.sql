-- Orchestrators that share this database. One whose lease is over is dead to the others, by this server's clock.
CREATE TABLE replica (
    id           TEXT   NOT NULL PRIMARY KEY,
    -- For people.
    name         TEXT   NOT NULL,
    -- Of their secret key: all must have the same.
    installation TEXT   NOT NULL,
    until_us     BIGINT NOT NULL
);

-- Who works for a session, and a number that grows with every new owner: what an earlier one says late is not written.
ALTER TABLE session ADD COLUMN owner TEXT;
ALTER TABLE session ADD COLUMN fence BIGINT NOT NULL DEFAULT 0 CHECK (fence >= 0);
CREATE INDEX session_owner ON session (owner) WHERE phase NOT IN ('ended', 'failed');

CREATE FUNCTION session_fenced() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a new owner has a new fence, and a fence only grows';
END $$;

CREATE TRIGGER session_fenced BEFORE UPDATE ON session FOR EACH ROW
WHEN (NEW.fence < OLD.fence OR (NEW.owner IS DISTINCT FROM OLD.owner AND NEW.fence = OLD.fence))
EXECUTE FUNCTION session_fenced();

-- The orchestrator that planned it: some desktops are on its own machine.
ALTER TABLE desktop ADD COLUMN host TEXT;
