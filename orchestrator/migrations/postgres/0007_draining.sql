-- Whether it gives no places. One of an older version says nothing of it, and gives them as far as the others know.
ALTER TABLE replica ADD COLUMN draining BOOLEAN NOT NULL DEFAULT false;
