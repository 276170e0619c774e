//! Everything that must survive: histories, jobs, adapter generations and heads, and adapter files.
//!
//! One [`Store`] holds rows in SQLite and adapter files in a blob store, and keeps the two in step:
//! a file is on disk before a row names it, and a row is gone before its file is deleted. What a
//! method has acknowledged survives a crash and a power cut.
//!
//! What it is not: no cache (`adapters` keeps files in memory), no limits (the caller checks
//! [`Store::history_stats`] first), no reading of adapter files (they are bytes with a length and a
//! hash here), no wire types. SQL exists only in `sql`, the blob store only in `blobs`.
//!
//! Time comes from the clock given at opening. Every lookup is scoped by tenant: what belongs to
//! another tenant does not exist.

mod adapters;
mod beats;
mod blobs;
mod checkpoints;
mod disk;
mod error;
mod forget;
mod history;
mod jobs;
mod lessons;
mod lineage;
mod moves;
mod packed;
mod pauses;
mod reading;
mod records;
mod sql;
mod store;
mod users;
mod wipe;

pub use error::StoreError;
pub use lessons::item_hash;
pub use pauses::{Pause, PauseScope, Pauses};
pub use reading::{Rest, thread_time};
pub use records::{
    AdapterFile, AdapterFiles, Appended, Claimed, Cost, Demand, Expected, Fence, Fingerprint, Forgotten,
    GenerationCursor, GenerationRecord, HistoryCursor, Lesson, Manifest, NewGeneration, OldLoss, Origin,
    Page, Policy, Progress, ProgressPoint, QueueStats, Selection, SharedRecord, Spent, Standing, UserRecord,
};
pub use store::Store;
