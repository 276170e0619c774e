//! The cache's sizes, and what can be seen of it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use peft::Storage;
use types::DEFAULT_MAX_RANK;

use crate::pace::Busy;

/// Loads at a time, unless set otherwise: enough to keep the disk busy, few enough to bound memory.
const PARALLEL_LOADS: usize = 4;
/// Requests that may wait for an adapter, unless set otherwise.
const WAITING: usize = 1024;

/// The sizes of the tiers.
#[derive(Clone)]
pub struct CacheSettings {
    /// How weights are kept.
    pub storage: Storage,
    /// Bytes of host memory for adapters.
    pub host_bytes: usize,
    /// Bytes of the pool that adapters in use lie in, reserved at the start.
    pub device_bytes: usize,
    /// Bytes of its pages; `None` takes what the base and the largest rank need ([`peft::PagePool::page_bytes_for`]).
    pub page_bytes: Option<usize>,
    /// Largest rank of an adapter.
    pub max_rank: usize,
    /// Loads from the store at a time.
    pub parallel_loads: usize,
    /// Requests that may wait for a load or for pages.
    pub waiting: usize,
    /// Called with the time that each load took.
    pub on_load: Arc<dyn Fn(Duration) + Send + Sync>,
    /// Whether requests run: then a load takes a thirtieth of a core, several together a fifth, else what there is.
    pub busy: Busy,
}

impl CacheSettings {
    /// The same number of bytes for both tiers in memory.
    #[must_use]
    pub fn new(storage: impl Into<Storage>, bytes: usize) -> Self {
        Self {
            storage: storage.into(),
            host_bytes: bytes,
            device_bytes: bytes,
            page_bytes: None,
            max_rank: DEFAULT_MAX_RANK,
            parallel_loads: PARALLEL_LOADS,
            waiting: WAITING,
            on_load: Arc::new(|_| {}),
            busy: Arc::new(|| false),
        }
    }
}

impl fmt::Debug for CacheSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { storage, host_bytes, device_bytes, page_bytes, max_rank, parallel_loads, waiting, .. } =
            self;
        f.debug_struct("CacheSettings")
            .field("storage", storage)
            .field("host_bytes", host_bytes)
            .field("device_bytes", device_bytes)
            .field("page_bytes", page_bytes)
            .field("max_rank", max_rank)
            .field("parallel_loads", parallel_loads)
            .field("waiting", waiting)
            .finish_non_exhaustive()
    }
}

/// Where an adapter's newest copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// In a slot: the next request starts at once.
    Device,
    /// In host memory.
    Host,
    /// In the store alone.
    Store,
}

/// What is resident in one tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierResidency {
    /// Adapters that new requests can get.
    pub adapters: usize,
    /// Bytes in use; in the device tier those of older generations that are still leased too.
    pub bytes: usize,
    /// Bytes there are.
    pub budget: usize,
    /// Adapters dropped for want of room since the start.
    pub evictions: u64,
}

/// What is resident, and the counters since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Residency {
    /// Host memory.
    pub host: TierResidency,
    /// Slots.
    pub device: TierResidency,
    /// Requests whose adapter was in a slot.
    pub hits: u64,
    /// Requests whose adapter was in host memory.
    pub host_hits: u64,
    /// Requests that had to load or wait for a load.
    pub misses: u64,
    /// Loads from the store.
    pub loads: u64,
    /// Adapters written to the store in the form that they are served in.
    pub packed: u64,
    /// Copies from host memory into slots.
    pub uploads: u64,
    /// Requests that wait for a load or for pages.
    pub waiting: usize,
}
