-- Expected durations come of those that became ready: those who wait are not read for it, and cost no entry.
CREATE INDEX session_ready ON session (template, provider, created_us, id) WHERE ready_us IS NOT NULL;
DROP INDEX session_history;
