-- It drains, and said so when it said last that it lives, until then (until_us). One of an older version says nothing of it.
ALTER TABLE replica ADD COLUMN draining_us BIGINT;
