-- Whether its disk is being cloned, and on which storage: a storage takes only so many clones at a time.
ALTER TABLE machine ADD COLUMN storage TEXT NOT NULL DEFAULT '';
ALTER TABLE machine ADD COLUMN cloning INTEGER NOT NULL DEFAULT 0 CHECK (cloning IN (0, 1));
