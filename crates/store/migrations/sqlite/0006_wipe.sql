-- Erasures from before wiping (`wipe.rs`) may have left traces in the file: the opening that comes to this wipes them.
PRAGMA user_version = 1;
