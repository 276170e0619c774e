-- The user's last turn, counted over all users: who was served longest ago comes first among a tenant's.
ALTER TABLE users ADD COLUMN served INTEGER NOT NULL DEFAULT 0;
