-- In a transaction of its own: it waits for those who use the table, and they must not wait for what it holds.
DROP INDEX session_history;
