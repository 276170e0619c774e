-- All times are milliseconds since the Unix epoch, UTC. All hashes are 32 bytes.

-- A user's id is never reused: it names one life of a user. Whoever is erased and comes back gets
-- another id, so nothing that still holds the old one can touch the new life.
CREATE TABLE users (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant     TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    items      INTEGER NOT NULL DEFAULT 0, -- rows in items
    bytes      INTEGER NOT NULL DEFAULT 0, -- UTF-8 bytes of their inputs and outputs
    head       BLOB,                       -- the generation that new requests get
    created_at INTEGER NOT NULL,
    UNIQUE (tenant, name),
    FOREIGN KEY (id, head) REFERENCES generations (user_id, id)
) STRICT;

CREATE TABLE items (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT, -- order of arrival
    user_id    INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    id         TEXT    NOT NULL,
    input      TEXT,
    output     TEXT    NOT NULL,
    metadata   TEXT,                              -- JSON
    created_at INTEGER NOT NULL,
    UNIQUE (user_id, id)
) STRICT;
CREATE INDEX items_in_order ON items (user_id, created_at, seq);

-- Answers to uploads that carried an idempotency key.
CREATE TABLE requests (
    user_id     INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    key         TEXT    NOT NULL,
    hash        BLOB    NOT NULL,
    accepted    INTEGER NOT NULL,
    duplicates  INTEGER NOT NULL,
    total_items INTEGER NOT NULL,
    job         TEXT,
    created_at  INTEGER NOT NULL,
    PRIMARY KEY (user_id, key)
) STRICT;

CREATE TABLE jobs (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT, -- order of the queue
    id          TEXT    NOT NULL UNIQUE,
    user_id     INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    state       TEXT    NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed')),
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
    finished_at INTEGER
) STRICT;
CREATE UNIQUE INDEX jobs_one_queued ON jobs (user_id) WHERE state = 'queued';
CREATE UNIQUE INDEX jobs_one_running ON jobs (user_id) WHERE state = 'running';
CREATE INDEX jobs_open ON jobs (seq) WHERE state IN ('queued', 'running');
CREATE INDEX jobs_of_user ON jobs (user_id, seq);

CREATE TABLE generations (
    seq            INTEGER PRIMARY KEY AUTOINCREMENT, -- order of publishing
    user_id        INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    id             BLOB    NOT NULL,
    parent         BLOB,
    base           BLOB    NOT NULL, -- hash of the base model
    folder         TEXT    NOT NULL, -- where its files are in the blob store
    config_bytes   INTEGER NOT NULL,
    config_sha256  BLOB    NOT NULL,
    weights_bytes  INTEGER NOT NULL,
    weights_sha256 BLOB    NOT NULL,
    meta           TEXT    NOT NULL, -- JSON
    created_at     INTEGER NOT NULL,
    UNIQUE (user_id, id)
) STRICT;

-- Blob folders that no generation owns: the intent of a publish that is under way (pending), or
-- what is left of something erased. Opening the store deletes them all.
CREATE TABLE garbage (
    folder  TEXT    PRIMARY KEY,
    tenant  TEXT    NOT NULL,
    name    TEXT    NOT NULL,
    pending INTEGER NOT NULL
) STRICT;
