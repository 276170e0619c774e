-- Who was judged by an item is forgotten with it, as is who has learnt from it; pauses say since when, by whom and why.

-- Hashes of the items that were held out to judge a generation, and those that it grew from; 32 bytes each, ascending.
-- NULL: unknown, so it may be any.
ALTER TABLE manifests ADD COLUMN judged BLOB;

-- Both names empty: a pause of the whole server.
ALTER TABLE pauses ADD COLUMN since INTEGER;   -- NULL: before this was kept
ALTER TABLE pauses ADD COLUMN paused_by TEXT;  -- the tenant whose key it was
ALTER TABLE pauses ADD COLUMN reason TEXT;
