-- The losses of old items under the last generation from fresh weights that this one grew from, or is: 44 bytes for each,
-- its hash, its nats (float64) and its answer tokens (32 bits), little-endian. NULL: before this was kept, so of none.
ALTER TABLE manifests ADD COLUMN baseline BLOB;
