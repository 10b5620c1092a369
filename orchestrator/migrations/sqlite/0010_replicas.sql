-- Who works for a session, and a number that grows with every new owner. One orchestrator has the whole file; others share a PostgreSQL.
ALTER TABLE session ADD COLUMN owner TEXT DEFAULT 'one';
ALTER TABLE session ADD COLUMN fence INTEGER NOT NULL DEFAULT 0 CHECK (fence >= 0);
-- The orchestrator that planned it: some desktops are on its own machine.
ALTER TABLE desktop ADD COLUMN host TEXT;
