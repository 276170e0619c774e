-- What a job that has begun to train learns, so that what it costs is booked however it ends; NULL: it has not begun.
ALTER TABLE jobs ADD COLUMN learns_scratch INTEGER;  -- as `scratch` in `progress`, and so on
ALTER TABLE jobs ADD COLUMN learns_items INTEGER;
ALTER TABLE jobs ADD COLUMN learns_new INTEGER;
ALTER TABLE jobs ADD COLUMN learns_replayed INTEGER;
