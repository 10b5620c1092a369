-- What is done for each session that is asked for does not become more with those who wait.

-- Expected durations come of those that became ready: the others are not read for it, and cost
-- no entry. (A change of one that became ready writes its entry again.)
CREATE INDEX session_ready ON session (template, provider, created_us, id) WHERE ready_us IS NOT NULL;
DROP INDEX session_history;

-- How many wait in the queue: to be known without counting them.
CREATE TABLE queue (
    one     INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    waiting INTEGER NOT NULL CHECK (waiting >= 0)
) STRICT;

INSERT INTO queue SELECT 1, count(*) FROM session WHERE phase = 'queued';

CREATE TRIGGER session_came AFTER INSERT ON session WHEN NEW.phase = 'queued'
BEGIN
    UPDATE queue SET waiting = waiting + 1;
END;

CREATE TRIGGER session_moved AFTER UPDATE OF phase ON session
WHEN (OLD.phase = 'queued') <> (NEW.phase = 'queued')
BEGIN
    UPDATE queue SET waiting = waiting + (NEW.phase = 'queued') - (OLD.phase = 'queued');
END;

CREATE TRIGGER session_forgotten AFTER DELETE ON session WHEN OLD.phase = 'queued'
BEGIN
    UPDATE queue SET waiting = waiting - 1;
END;
