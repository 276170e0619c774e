//! The cache itself: least recently used out first, never while leased.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use dashmap::DashMap;
use lru::LruCache;
use peft::{Adapter, AdapterWeights, FrozenBase, Lease, Precision};
use store::{GenerationRecord, Store};
use tokio::sync::{OnceCell, Semaphore};
use types::{AdapterId, GenerationId};

use crate::error::AcquireError;

/// Loads that may run at once, so that a burst of cold users cannot take all of the disk and memory.
const PARALLEL_LOADS: usize = 4;

/// Adapters in memory, at most `budget` bytes of them beyond those that running sequences hold. Clones share
/// the cache.
#[derive(Clone)]
pub struct AdapterCache(Arc<Inner>);

struct Inner {
    store: Store,
    base: Arc<dyn FrozenBase>,
    precision: Precision,
    budget: usize,
    resident: Mutex<Resident>,
    loading: DashMap<(AdapterId, GenerationId), Arc<OnceCell<Arc<Adapter>>>>,
    loads: Semaphore,
    counters: Counters,
}

/// The newest loaded generation of each resident user. An older one lives on in its leases alone.
struct Resident {
    adapters: LruCache<AdapterId, (GenerationId, Arc<Adapter>)>,
    bytes: usize,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    loads: AtomicU64,
    evictions: AtomicU64,
    load_micros: AtomicU64,
}

/// What is resident, and the counters since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Residency {
    /// Adapters in memory.
    pub adapters: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Bytes they may have.
    pub budget: usize,
    /// Requests whose adapter was in memory.
    pub hits: u64,
    /// Requests that had to load or wait for a load.
    pub misses: u64,
    /// Loads from the store.
    pub loads: u64,
    /// Adapters dropped for want of room.
    pub evictions: u64,
    /// Microseconds spent in loads.
    pub load_micros: u64,
}

impl AdapterCache {
    /// An empty cache over a store, for adapters of a base, kept in a precision.
    #[must_use]
    pub fn new(store: Store, base: Arc<dyn FrozenBase>, precision: Precision, budget: usize) -> Self {
        let resident = Resident { adapters: LruCache::unbounded(), bytes: 0 };
        Self(Arc::new(Inner {
            store,
            base,
            precision,
            budget,
            resident: Mutex::new(resident),
            loading: DashMap::new(),
            loads: Semaphore::new(PARALLEL_LOADS),
            counters: Counters::default(),
        }))
    }

    /// A lease on the user's head; `None` when the user has no adapter (or does not exist).
    ///
    /// # Errors
    /// When the adapter exists and cannot be read: never silently the base.
    pub async fn acquire(&self, id: &AdapterId) -> Result<Option<Lease>, AcquireError> {
        let Some(head) = self.0.store.head(id).await? else { return Ok(None) };
        if head.base != self.0.base.hash() {
            return Err(AcquireError::OtherBase { generation: head.id });
        }
        let counters = &self.0.counters;
        let lease = |adapter| Lease { id: id.clone(), generation: head.id, adapter };
        if let Some((generation, adapter)) = self.0.lock().adapters.get(id)
            && *generation == head.id
        {
            counters.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(Some(lease(Arc::clone(adapter))));
        }
        counters.misses.fetch_add(1, Ordering::Relaxed);
        let key = (id.clone(), head.id);
        let cell = Arc::clone(&self.0.loading.entry(key.clone()).or_default());
        let loaded = cell.get_or_try_init(|| self.0.load(id, &head)).await.map(Arc::clone);
        self.0.loading.remove_if(&key, |_, current| Arc::ptr_eq(current, &cell));
        loaded.map(|adapter| Some(lease(adapter)))
    }

    /// Tells that a user's head has moved: what is resident of the user is stale and makes room. Running
    /// sequences keep their generation.
    pub fn announce(&self, id: &AdapterId, head: &GenerationId) {
        let mut resident = self.0.lock();
        if resident.adapters.peek(id).is_some_and(|(generation, _)| generation != head) {
            resident.remove(id);
        }
    }

    /// Forgets an erased user.
    pub fn forget(&self, id: &AdapterId) {
        self.0.lock().remove(id);
    }

    /// What is resident.
    #[must_use]
    pub fn residency(&self) -> Residency {
        let (adapters, bytes) = {
            let resident = self.0.lock();
            (resident.adapters.len(), resident.bytes)
        };
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.0.counters;
        Residency {
            adapters,
            bytes,
            budget: self.0.budget,
            hits: read(&counters.hits),
            misses: read(&counters.misses),
            loads: read(&counters.loads),
            evictions: read(&counters.evictions),
            load_micros: read(&counters.load_micros),
        }
    }
}

impl Inner {
    /// The state is whole after every statement, so a panic elsewhere leaves it usable.
    fn lock(&self) -> MutexGuard<'_, Resident> {
        self.resident.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn load(&self, id: &AdapterId, head: &GenerationRecord) -> Result<Arc<Adapter>, AcquireError> {
        // A load that ended between our look and our turn has left the adapter behind.
        if let Some((generation, adapter)) = self.lock().adapters.get(id)
            && *generation == head.id
        {
            return Ok(Arc::clone(adapter));
        }
        let _turn = self.loads.acquire().await.map_err(|_| AcquireError::Stopped)?;
        let start = Instant::now();
        let files = self.store.fetch(id, &head.id).await?;
        let base = Arc::clone(&self.base);
        let precision = self.precision;
        let parse = move || {
            let weights = AdapterWeights::parse(&files.config, &files.weights, &base.shape())?;
            Adapter::build(&weights, &*base, precision)
        };
        let adapter = tokio::task::spawn_blocking(parse).await.map_err(|_| AcquireError::Stopped)??;
        let adapter = Arc::new(adapter);
        self.counters.loads.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.counters.load_micros.fetch_add(micros, Ordering::Relaxed);
        let evicted = self.lock().insert(id, head.id, Arc::clone(&adapter), self.budget);
        self.counters.evictions.fetch_add(evicted, Ordering::Relaxed);
        Ok(adapter)
    }
}

impl Resident {
    fn remove(&mut self, id: &AdapterId) {
        if let Some((_, old)) = self.adapters.pop(id) {
            self.bytes -= old.bytes();
        }
    }

    /// Puts an adapter in and makes room by dropping the least recently used ones that nobody holds.
    fn insert(
        &mut self,
        id: &AdapterId,
        generation: GenerationId,
        adapter: Arc<Adapter>,
        budget: usize,
    ) -> u64 {
        self.remove(id);
        self.bytes += adapter.bytes();
        self.adapters.put(id.clone(), (generation, adapter));
        let mut evicted = 0;
        while self.bytes > budget {
            let unused = |(_, (_, adapter)): &(&AdapterId, &(GenerationId, Arc<Adapter>))| {
                Arc::strong_count(adapter) == 1
            };
            let Some(victim) = self.adapters.iter().rev().find(unused).map(|(id, _)| id.clone()) else {
                break;
            };
            self.remove(&victim);
            evicted += 1;
        }
        evicted
    }
}
