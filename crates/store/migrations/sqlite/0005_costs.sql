-- What a job has cost, over all its claims: what a worker that died, was told to stop or failed had done counts too.
ALTER TABLE jobs ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0;       -- through training since the last claim
ALTER TABLE jobs ADD COLUMN beat_at INTEGER;                         -- last sign of life since the last claim
ALTER TABLE jobs ADD COLUMN spent_tokens INTEGER NOT NULL DEFAULT 0; -- in claims before the last
ALTER TABLE jobs ADD COLUMN spent_seconds REAL NOT NULL DEFAULT 0;
