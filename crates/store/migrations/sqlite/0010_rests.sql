-- Jobs in a row that have published nothing, failed ones among them, and when the last of them ended: the next one waits.
ALTER TABLE users ADD COLUMN rejections INTEGER NOT NULL DEFAULT 0;
ALTER TABLE users ADD COLUMN rejected_at INTEGER NOT NULL DEFAULT 0;
