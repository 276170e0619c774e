-- The file `packed` in a generation's folder, if there is one: what it is good for, and its length and hash. It can be
-- made anew from the other two at any time.
ALTER TABLE generations ADD COLUMN packed_for BLOB CHECK (length(packed_for) = 32);
ALTER TABLE generations ADD COLUMN packed_bytes INTEGER;
ALTER TABLE generations ADD COLUMN packed_sha256 BLOB CHECK (length(packed_sha256) = 32);
