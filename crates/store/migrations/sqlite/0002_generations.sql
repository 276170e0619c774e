-- Whether a training job made the generation, or somebody uploaded it; all that are here already come from jobs.
ALTER TABLE generations ADD COLUMN origin TEXT NOT NULL DEFAULT 'trained' CHECK (origin IN ('trained', 'imported'));

-- A pinned generation is not deleted until it is unpinned.
ALTER TABLE generations ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0 CHECK (pinned IN (0, 1));
