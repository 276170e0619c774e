//! What goes into the store and what comes out, beyond the shared vocabulary of `types`.

use std::fmt;
use std::str::FromStr;

use types::{AdapterId, AdapterName, GenerationId, HistoryStats, Job, JobId, Timestamp};

use crate::StoreError;

/// One page of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Page<T, C> {
    /// The entries, in the list's order.
    pub entries: Vec<T>,
    /// Where the next page starts (pass it as `after`); absent on the last page.
    pub next: Option<C>,
}

impl<T, C> Page<T, C> {
    /// Cuts `entries`, of which one more than `limit` was asked for, to a page.
    pub(crate) fn cut(mut entries: Vec<T>, limit: u32, cursor: impl Fn(&T) -> C) -> Self {
        let limit = limit as usize;
        let more = entries.len() > limit;
        entries.truncate(limit);
        let next = entries.last().filter(|_| more).map(cursor);
        Self { entries, next }
    }
}

/// A place in a history; its text form (`Display`, `FromStr`) is opaque to clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HistoryCursor {
    pub(crate) created_at: Timestamp,
    pub(crate) seq: i64,
}

impl HistoryCursor {
    /// Before every item.
    pub(crate) const START: Self = Self { created_at: Timestamp(i64::MIN), seq: i64::MIN };
}

impl fmt::Display for HistoryCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.created_at.0, self.seq)
    }
}

impl FromStr for HistoryCursor {
    type Err = StoreError;
    fn from_str(text: &str) -> Result<Self, StoreError> {
        let parse = || {
            let (created_at, seq) = text.split_once('.')?;
            Some(Self { created_at: Timestamp(created_at.parse().ok()?), seq: seq.parse().ok()? })
        };
        parse().ok_or_else(foreign_cursor)
    }
}

/// The answer to an upload.
#[derive(Debug, Clone, PartialEq)]
pub struct Appended {
    /// Items that are new.
    pub accepted: u64,
    /// Items that were there already, with the same content.
    pub duplicates: u64,
    /// Items of the user after this upload.
    pub total_items: u64,
    /// The job that trains on these items. If nothing was new: the user's latest job, if there is one.
    pub job: Option<Job>,
    /// The same request was answered before; the counts are those of that answer, the job is as it is now.
    pub replayed: bool,
}

/// The right to work on a job, from one claim; a later claim takes it away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// The job.
    pub job: JobId,
    /// Grows with every claim of the job.
    pub token: i64,
}

/// A job that a worker has got.
#[derive(Debug, Clone, PartialEq)]
pub struct Claimed {
    /// The job, running.
    pub job: Job,
    /// What the worker shows with every report.
    pub fence: Fence,
}

/// The queue in figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueStats {
    /// Jobs that wait.
    pub queued: u64,
    /// Jobs that a worker holds.
    pub running: u64,
    /// When the job that has waited longest was enqueued.
    pub oldest_queued: Option<Timestamp>,
}

/// A generation to publish.
#[derive(Debug, Clone, PartialEq)]
pub struct NewGeneration {
    /// Hash of base, config and weights: the same id must always mean the same bytes.
    pub id: GenerationId,
    /// The generation its training started from.
    pub parent: Option<GenerationId>,
    /// Hash of the base model it belongs to.
    pub base: [u8; 32],
    /// Content of `adapter_config.json`.
    pub config: Vec<u8>,
    /// Content of `adapter_model.safetensors`.
    pub weights: Vec<u8>,
    /// Hyper-parameters, gate report, item count: kept and returned as given.
    pub meta: serde_json::Value,
}

/// Which head a change may replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Whatever it is.
    Any,
    /// This one and no other; `None`: there is none.
    Is(Option<GenerationId>),
}

impl Expected {
    pub(crate) fn admits(self, head: Option<GenerationId>) -> bool {
        self == Self::Any || self == Self::Is(head)
    }
}

impl From<Option<GenerationId>> for Expected {
    fn from(head: Option<GenerationId>) -> Self {
        Self::Is(head)
    }
}

/// How a generation came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A training job made it.
    Trained,
    /// Somebody uploaded it.
    Imported,
}

impl Origin {
    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Trained => "trained",
            Self::Imported => "imported",
        }
    }
}

/// What a file must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint {
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256.
    pub sha256: [u8; 32],
}

/// A place in a list of generations; its text form (`Display`, `FromStr`) is opaque to clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GenerationCursor(pub(crate) i64);

impl fmt::Display for GenerationCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for GenerationCursor {
    type Err = StoreError;
    fn from_str(text: &str) -> Result<Self, StoreError> {
        text.parse().map(Self).map_err(|_| foreign_cursor())
    }
}

fn foreign_cursor() -> StoreError {
    StoreError::Invalid { field: "cursor", reason: "is not one that this server gave out" }
}

/// A published generation, without its files.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationRecord {
    /// Its id.
    pub id: GenerationId,
    /// The generation its training started from.
    pub parent: Option<GenerationId>,
    /// Hash of the base model it belongs to.
    pub base: [u8; 32],
    /// How it came to be.
    pub origin: Origin,
    /// The file `adapter_config.json`.
    pub config: Fingerprint,
    /// The file `adapter_model.safetensors`.
    pub weights: Fingerprint,
    /// As given at publishing.
    pub meta: serde_json::Value,
    /// When it was first published.
    pub created_at: Timestamp,
    /// Not deleted until it is unpinned.
    pub pinned: bool,
    /// Whether new requests get it.
    pub is_head: bool,
}

impl GenerationRecord {
    /// Bytes of config and weights together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.config.bytes + self.weights.bytes
    }
}

/// A shared adapter at a glance.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedRecord {
    /// Its name.
    pub name: AdapterName,
    /// The generation that new requests get.
    pub head: Option<GenerationRecord>,
    /// When it was first uploaded.
    pub created_at: Timestamp,
}

/// The files of a generation, length and SHA-256 checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFiles {
    /// Content of `adapter_config.json`.
    pub config: Vec<u8>,
    /// Content of `adapter_model.safetensors`.
    pub weights: Vec<u8>,
}

/// A user at a glance.
#[derive(Debug, Clone, PartialEq)]
pub struct UserRecord {
    /// Who.
    pub id: AdapterId,
    /// How much history.
    pub history: HistoryStats,
    /// The generation that new requests get.
    pub head: Option<GenerationRecord>,
    /// The latest job.
    pub job: Option<Job>,
    /// When the user's first request came.
    pub created_at: Timestamp,
}
