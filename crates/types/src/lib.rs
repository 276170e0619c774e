//! The words everyone shares: ids, values and the clock.
//!
//! What it is not: no I/O, no tensors, no async. Everything here is plain data that other crates
//! parse into at the edge, so that inside nothing is left to re-check.

mod clock;
mod example;
mod history;
mod ids;
mod job;
mod provenance;
mod sampling;
mod site;
mod tokenizer;
mod training;

pub use clock::{Clock, ManualClock, SystemClock, Timestamp};
pub use example::Example;
pub use history::{HistoryItem, HistoryStats, NewItem};
pub use ids::{
    AdapterId, AdapterName, GenerationId, IdError, ItemId, JobId, Owner, TenantId, UserId, hash_from_hex,
};
pub use job::{GateReport, Job, JobOutcome, JobProgress, JobState};
pub use provenance::{HistoryRange, Provenance, TrainingCourse};
pub use sampling::{FinishReason, SamplingParams, Usage};
pub use site::{Site, SiteId};
pub use tokenizer::{GgufVocabulary, TokenizerSource};
pub use training::{
    AdapterKind, DEFAULT_MAX_RANK, OptionError, RecipeName, TrainPrecision, TrainingLimits, TrainingOptions,
};
