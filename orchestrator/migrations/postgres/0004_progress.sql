-- What the last stage is at, so that whoever comes back to it is shown that at once.
ALTER TABLE stage ADD COLUMN progress TEXT CHECK (progress IS NULL OR progress::json IS NOT NULL);
