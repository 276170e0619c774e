-- Learning by policy: jobs that can be called off, wait for more items, learn from fresh weights and go on from
-- checkpoints; turns between tenants; pauses; manifests; progress.

-- SQLite cannot change a CHECK, so the table is made anew. Nothing refers to it.
CREATE TABLE new_jobs (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT, -- order of the queue
    id          TEXT    NOT NULL UNIQUE,
    user_id     INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    state       TEXT    NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    attempts    INTEGER NOT NULL DEFAULT 0,
    token       INTEGER NOT NULL DEFAULT 0, -- fencing token; grows with every claim
    worker      TEXT,                       -- who claimed it last
    not_before  INTEGER NOT NULL,           -- while queued: not to be claimed earlier
    lease_until INTEGER,                    -- while running: claimable again from then on
    step        INTEGER,
    steps       INTEGER,
    loss        REAL,
    outcome     TEXT,                       -- JSON
    error       TEXT,
    created_at  INTEGER NOT NULL,
    started_at  INTEGER,
    finished_at INTEGER,
    new_items   INTEGER NOT NULL DEFAULT 0, -- items that have come since it was enqueued, with those it was enqueued for
    touched_at  INTEGER NOT NULL,           -- when the last of them came
    urgent      INTEGER NOT NULL DEFAULT 0, -- does not wait for more items
    scratch     INTEGER NOT NULL DEFAULT 0, -- learns from fresh weights
    training    TEXT,                       -- JSON: hyper-parameters that were asked for
    last_item   INTEGER                     -- items.seq of the last item it reads; set by the first claim
) STRICT;
INSERT INTO new_jobs (seq, id, user_id, state, attempts, token, worker, not_before, lease_until, step, steps, loss,
        outcome, error, created_at, started_at, finished_at, touched_at)
    SELECT seq, id, user_id, state, attempts, token, worker, not_before, lease_until, step, steps, loss,
        outcome, error, created_at, started_at, finished_at, created_at FROM jobs;
DROP TABLE jobs;
ALTER TABLE new_jobs RENAME TO jobs;
CREATE UNIQUE INDEX jobs_one_queued ON jobs (user_id) WHERE state = 'queued';
CREATE UNIQUE INDEX jobs_one_running ON jobs (user_id) WHERE state = 'running';
CREATE INDEX jobs_open ON jobs (seq) WHERE state IN ('queued', 'running');
CREATE INDEX jobs_of_user ON jobs (user_id, seq);

-- Tenants take turns: who was served longest ago is next.
CREATE TABLE turns (
    tenant TEXT    PRIMARY KEY,
    served INTEGER NOT NULL -- grows with every claim of any tenant
) STRICT;

-- Whose jobs are not claimed for now; an empty name means the whole tenant.
CREATE TABLE pauses (
    tenant TEXT NOT NULL,
    name   TEXT NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT;

-- How far an open job had come when it was last written down. Its file is in the blob store.
CREATE TABLE checkpoints (
    job_id     TEXT    PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    tenant     TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    folder     TEXT    NOT NULL,
    bytes      INTEGER NOT NULL,
    sha256     BLOB    NOT NULL,
    work       BLOB    NOT NULL, -- hash of what the job learns from, and how: another work does not go on from here
    created_at INTEGER NOT NULL
) STRICT;
-- However a job ends, its checkpoint goes, and however a checkpoint goes, its file does.
CREATE TRIGGER checkpoints_end AFTER UPDATE OF state ON jobs WHEN NEW.state NOT IN ('queued', 'running')
BEGIN
    DELETE FROM checkpoints WHERE job_id = NEW.id;
END;
CREATE TRIGGER checkpoints_leave_garbage AFTER DELETE ON checkpoints
BEGIN
    INSERT INTO garbage (folder, tenant, name, pending) VALUES (OLD.folder, OLD.tenant, OLD.name, 0);
END;

-- Which items have gone into a generation's weights, those of the generations it grew from among them.
-- A generation without a row (an imported one) has learnt from none of the user's items.
CREATE TABLE manifests (
    user_id    INTEGER NOT NULL,
    generation BLOB    NOT NULL,
    items      BLOB, -- their hashes, 32 bytes each, ascending; NULL: unknown, so it may be any
    PRIMARY KEY (user_id, generation),
    FOREIGN KEY (user_id, generation) REFERENCES generations (user_id, id) ON DELETE CASCADE
) STRICT;
INSERT INTO manifests (user_id, generation, items) SELECT user_id, id, NULL FROM generations
    WHERE origin = 'trained';

-- What every training of a user cost and came to, in the order in which they ended.
CREATE TABLE progress (
    seq            INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id        INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    job            TEXT    NOT NULL,
    at             INTEGER NOT NULL,
    scratch        INTEGER NOT NULL, -- from fresh weights on the whole history, or on from the head
    items          INTEGER NOT NULL, -- the history's length
    new_items      INTEGER NOT NULL, -- learnt for the first time
    replayed_items INTEGER NOT NULL, -- learnt again
    tokens         INTEGER NOT NULL,
    seconds        REAL    NOT NULL,
    base_bits      REAL,             -- per held-out answer token; NULL: not measured
    head_bits      REAL,
    new_bits       REAL,
    generation     BLOB              -- if it was published
) STRICT;
CREATE INDEX progress_of_user ON progress (user_id, seq);
