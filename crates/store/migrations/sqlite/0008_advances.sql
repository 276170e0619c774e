-- The furthest step that a job had written down in this work: who gets further has its attempts back.
ALTER TABLE checkpoints ADD COLUMN furthest INTEGER NOT NULL DEFAULT 0;
