-- What the last stage is at, so that whoever comes back to it is shown that at once.
ALTER TABLE stage ADD COLUMN progress TEXT CHECK (progress::json IS NOT NULL);
