-- Written from time to time, and read by nobody: that it can be written is what counts.
CREATE TABLE pulse (
    id    BIGINT NOT NULL PRIMARY KEY CHECK (id = 1),
    at_us BIGINT NOT NULL
);
