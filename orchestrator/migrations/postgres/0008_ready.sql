-- Expected durations come of those that became ready: the others are not read for it.
CREATE INDEX session_ready ON session (template, provider, created_us, id) WHERE ready_us IS NOT NULL;
