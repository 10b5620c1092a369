-- Written from time to time, and read by nobody: that it can be written is what counts.
CREATE TABLE pulse (
    id    INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    at_us INTEGER NOT NULL
) STRICT;
