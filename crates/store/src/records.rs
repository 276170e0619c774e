//! What goes into the store and what comes out, beyond the shared vocabulary of `types`.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use types::{
    AdapterId, AdapterName, GenerationId, HistoryStats, ItemId, Job, JobId, Timestamp, TrainingOptions,
};

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
    /// What earlier claims of it have cost.
    pub spent: Spent,
}

/// What a job has cost.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Spent {
    /// Tokens that went through training.
    pub tokens: u64,
    /// Seconds that workers had it.
    pub seconds: f64,
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
    pub config: Bytes,
    /// Content of `adapter_model.safetensors`.
    pub weights: Bytes,
    /// Hyper-parameters, gate report, item count: kept and returned as given.
    pub meta: serde_json::Value,
}

impl NewGeneration {
    /// Its files, not copied.
    #[must_use]
    pub fn files(&self) -> AdapterFiles {
        AdapterFiles { config: self.config.clone(), weights: self.weights.clone() }
    }
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

/// One of the files of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterFile {
    /// `adapter_config.json`.
    Config,
    /// `adapter_model.safetensors`.
    Weights,
}

/// The files of a generation, length and SHA-256 checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdapterFiles {
    /// Content of `adapter_config.json`.
    pub config: Bytes,
    /// Content of `adapter_model.safetensors`.
    pub weights: Bytes,
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

/// What a job is to do, beyond reading the history.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Demand {
    /// Items that have come.
    pub new_items: u64,
    /// Not to wait for more items.
    pub urgent: bool,
    /// To learn from fresh weights.
    pub from_scratch: bool,
    /// Hyper-parameters in place of the tenant's.
    pub training: Option<TrainingOptions>,
}

/// When a queued job is worth doing. One that is urgent or has been tried before does not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Fewest new items.
    pub min_new_items: u64,
    /// Time without further items.
    pub debounce_millis: i64,
    /// How long after its last job ended a user waits of whom two jobs in a row have published nothing, because the gate
    /// kept them back or they failed; twice as long after the third, and so on.
    pub rest_millis: i64,
    /// Longest wait for any of these.
    pub max_staleness_millis: i64,
    /// How long a job runs before it gives way to another user's that could begin.
    pub turn_millis: i64,
}

impl Policy {
    /// Nothing waits, and nobody gives way (a day is a long turn).
    pub const AT_ONCE: Self = Self {
        min_new_items: 0,
        debounce_millis: 0,
        rest_millis: 0,
        max_staleness_millis: 0,
        turn_millis: 24 * 60 * 60 * 1000,
    };
}

/// How the holder of a claim stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The job is still this worker's.
    Held,
    /// It is, but its tenant or user is paused: the worker should give it back.
    Paused,
    /// It is, but it has had its turn, and another user's job could begin: it should give way.
    Awaited,
    /// It is not: the worker must stop.
    Lost,
}

/// What a training was made of.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Lesson {
    /// From fresh weights, rather than on from the head.
    pub from_scratch: bool,
    /// The history's length.
    pub items: u64,
    /// Items learnt for the first time.
    pub new_items: u64,
    /// Items learnt again.
    pub replayed_items: u64,
    /// [`item_hash`](crate::item_hash) of every item in the weights, those of the generations they grew from among them.
    pub manifest: Vec<[u8; 32]>,
    /// The same of the items that were held out to judge them. What they grew from was judged by items too: those are
    /// added when it is published.
    pub judged: Vec<[u8; 32]>,
    /// How well old items were known when everything was last learnt from fresh weights: what updates since then are
    /// measured by.
    pub baseline: Vec<OldLoss>,
}

/// The loss of one item under some weights that have learnt it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OldLoss {
    /// Its [`item_hash`](crate::item_hash).
    pub item: [u8; 32],
    /// Of the whole answer.
    pub nats: f64,
    /// Tokens of the answer.
    pub tokens: u32,
}

/// Which items have gone into a generation's weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// Those with these hashes, ascending.
    Items(Vec<[u8; 32]>),
    /// It was trained before manifests were kept: it may be any.
    Unknown,
}

impl Manifest {
    /// Of these hashes, in any order.
    pub(crate) fn of(mut hashes: Vec<[u8; 32]>) -> Self {
        hashes.sort_unstable();
        hashes.dedup();
        Self::Items(hashes)
    }

    /// The items of both; unknown if one is.
    pub(crate) fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Items(mut all), Self::Items(others)) => {
                all.extend(others);
                Self::of(all)
            }
            _ => Self::Unknown,
        }
    }

    /// Whether one of these items may have gone in.
    #[must_use]
    pub fn has_any(&self, items: &[[u8; 32]]) -> bool {
        match self {
            Self::Items(hashes) => items.iter().any(|item| hashes.binary_search(item).is_ok()),
            Self::Unknown => true,
        }
    }
}

/// What one training cost and came to. A job has two if it was an update that turned out to be of no use: that, without
/// numbers, and the training from fresh weights that took its place. One that failed or was called off has no numbers
/// either.
#[derive(Debug, Clone, PartialEq)]
pub struct ProgressPoint {
    /// The job.
    pub job: JobId,
    /// When it ended.
    pub at: Timestamp,
    /// From fresh weights, rather than on from the head.
    pub from_scratch: bool,
    /// The history's length.
    pub items: u64,
    /// Items learnt for the first time.
    pub new_items: u64,
    /// Items learnt again.
    pub replayed_items: u64,
    /// Tokens that went through training.
    pub tokens: u64,
    /// Seconds that workers had it, all attempts.
    pub seconds: f64,
    /// Bits per held-out answer token under the base; absent if the training came to no numbers.
    pub base_bits: Option<f64>,
    /// The same under the head before it.
    pub head_bits: Option<f64>,
    /// The same under the new weights.
    pub new_bits: Option<f64>,
    /// The generation, if it was published.
    pub generation: Option<GenerationId>,
}

/// What trainings of one sort have cost a user in all.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cost {
    /// How many there were.
    pub trainings: u64,
    /// Tokens that went through them.
    pub tokens: u64,
    /// Seconds they took.
    pub seconds: f64,
}

/// How a user's trainings went.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// A page of them, in the order in which they ended.
    pub points: Page<ProgressPoint, i64>,
    /// What those cost that went on from the head, all pages.
    pub updates: Cost,
    /// What those cost that began with fresh weights, all pages.
    pub from_scratch: Cost,
}

/// Items to forget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// All of them.
    All,
    /// One.
    Item(ItemId),
    /// All from the first time to the second, both included; open where absent.
    Times(Option<Timestamp>, Option<Timestamp>),
    /// All from the first item to the second in the history's order, both included; open where absent.
    Items(Option<ItemId>, Option<ItemId>),
}

/// What was forgotten.
#[derive(Debug, Clone, PartialEq)]
pub struct Forgotten {
    /// Items deleted.
    pub items: u64,
    /// Generations deleted, because they had learnt from one of them or were judged by one.
    pub generations: Vec<GenerationId>,
    /// The generation that serves until the job is done; `None`: the base.
    pub head: Option<GenerationId>,
    /// The job that learns what is left from fresh weights; absent if nothing is left or nothing was deleted.
    pub job: Option<Job>,
}
