//! Loads from the store into host memory. What a load makes of an adapter's files is kept beside them, packed: the next
//! one reads a quarter of the bytes and has little to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use peft::{Adapter, FrozenBase, PagePool, Storage, packing};
use store::{AdapterFiles, Rest};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use types::{AdapterId, GenerationId};

use crate::AcquireError;
use crate::flight::Hosted;
use crate::pace::Pace;
use crate::residency::CacheSettings;
use crate::source::Source;

/// How long after a load its result is packed: whoever waited for it is served first.
const AFTER: Duration = Duration::from_millis(100);

/// All loads of a cache.
pub(crate) struct Loads {
    source: Arc<dyn Source>,
    base: Arc<dyn FrozenBase>,
    settings: CacheSettings,
    pages: usize,
    page_bytes: usize,
    /// What packed forms are good for here.
    packing: [u8; 32],
    turns: Arc<Semaphore>,
    /// One packed form is made and written at a time.
    keeping: Arc<Semaphore>,
    pace: Arc<Pace>,
    done: AtomicU64,
    kept: AtomicU64,
}

impl Loads {
    pub(crate) fn new(
        source: Arc<dyn Source>,
        base: Arc<dyn FrozenBase>,
        settings: CacheSettings,
        pool: &PagePool,
        pace: Arc<Pace>,
    ) -> Arc<Self> {
        Arc::new(Self {
            packing: packing(&base.hash(), settings.storage),
            turns: Arc::new(Semaphore::new(settings.parallel_loads.max(1))),
            keeping: Arc::new(Semaphore::new(1)),
            pages: pool.pages(),
            page_bytes: pool.page_bytes(),
            done: AtomicU64::new(0),
            kept: AtomicU64::new(0),
            source,
            base,
            settings,
            pace,
        })
    }

    /// Loads that came to their end, and packed forms that were written.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.kept.load(Ordering::Relaxed))
    }

    /// Loads a generation, from the store if its `files` are not given.
    pub(crate) async fn load(
        self: &Arc<Self>,
        id: &AdapterId,
        generation: GenerationId,
        files: Option<AdapterFiles>,
    ) -> Result<Hosted<Arc<Adapter>>, AcquireError> {
        let _underway = self.pace.load();
        let (_turn, files) = turn(&self.turns, files).await?;
        let start = Instant::now();
        let adapter = match files {
            Some(files) => self.load_files(id, generation, files).await?,
            None => match self.unpack(id, generation).await? {
                Some(adapter) => adapter,
                None => {
                    let files = self.source.files(id, generation, self.rest()).await?;
                    self.load_files(id, generation, files).await?
                }
            },
        };
        let (pages, page_bytes) = (self.pages, self.page_bytes);
        let wanted = adapter.pages(page_bytes).filter(|wanted| *wanted <= pages);
        let wanted = wanted.ok_or(AcquireError::TooLarge { pages, page_bytes })?;
        self.done.fetch_add(1, Ordering::Relaxed);
        (self.settings.on_load)(start.elapsed());
        Ok(Hosted { bytes: adapter.bytes(), pages: wanted, payload: adapter })
    }

    /// Packs a new generation that nobody has asked for yet, in the background.
    pub(crate) fn prepare(
        self: &Arc<Self>,
        runtime: &Handle,
        id: &AdapterId,
        generation: GenerationId,
        files: AdapterFiles,
    ) {
        if !self.packs() {
            return;
        }
        let (loads, id) = (Arc::clone(self), id.clone());
        runtime.spawn(async move { noted(generation, loads.pack(&id, generation, files).await) });
    }

    /// Float32 is in the files as it is served.
    fn packs(&self) -> bool {
        self.settings.storage != Storage::F32
    }

    async fn pack(
        self: &Arc<Self>,
        id: &AdapterId,
        generation: GenerationId,
        files: AdapterFiles,
    ) -> Result<(), AcquireError> {
        let (turn, files) = turn(&self.keeping, Some(files)).await?;
        let files = match files {
            Some(files) => files,
            None => self.source.files(id, generation, self.rest()).await?,
        };
        let adapter = self.make(files).await?;
        self.keep(id, generation, adapter, turn).await
    }

    /// The adapter as it was packed; `None` if it was not, or not for this.
    async fn unpack(
        &self,
        id: &AdapterId,
        generation: GenerationId,
    ) -> Result<Option<Arc<Adapter>>, AcquireError> {
        let packed = self.source.packed(id, generation, &self.packing, self.rest()).await?;
        let Some(packed) = packed else { return Ok(None) };
        let (shape, pace) = (self.base.shape(), Arc::clone(&self.pace));
        let unpack = move || Adapter::unpack(&packed, &shape, &mut pace.rests());
        let adapter = spawn_blocking(unpack).await.map_err(|_| AcquireError::Stopped)?;
        if adapter.is_none() {
            tracing::warn!(%generation, "a packed adapter does not fit: its files are read instead");
        }
        Ok(adapter.map(Arc::new))
    }

    /// Makes the adapter of its files, and has it kept a little later if no other is being kept.
    async fn load_files(
        self: &Arc<Self>,
        id: &AdapterId,
        generation: GenerationId,
        files: AdapterFiles,
    ) -> Result<Arc<Adapter>, AcquireError> {
        let adapter = self.make(files).await?;
        if self.packs()
            && let Ok(turn) = Arc::clone(&self.keeping).try_acquire_owned()
        {
            let (loads, id, adapter) = (Arc::clone(self), id.clone(), Arc::clone(&adapter));
            tokio::spawn(async move {
                tokio::time::sleep(AFTER).await;
                noted(generation, loads.keep(&id, generation, adapter, turn).await);
            });
        }
        Ok(adapter)
    }

    async fn make(&self, files: AdapterFiles) -> Result<Arc<Adapter>, AcquireError> {
        let (base, storage, pace) = (Arc::clone(&self.base), self.settings.storage, Arc::clone(&self.pace));
        let make = move || Adapter::load(&files.config, &files.weights, &*base, storage, &mut pace.rests());
        Ok(Arc::new(spawn_blocking(make).await.map_err(|_| AcquireError::Stopped)??))
    }

    /// Packs an adapter and writes that to the store.
    async fn keep(
        &self,
        id: &AdapterId,
        generation: GenerationId,
        adapter: Arc<Adapter>,
        _turn: OwnedSemaphorePermit,
    ) -> Result<(), AcquireError> {
        let packed = spawn_blocking(move || adapter.pack()).await.map_err(|_| AcquireError::Stopped)?;
        let kept = self.source.keep(id, generation, self.packing, packed.into(), self.rest()).await?;
        self.kept.fetch_add(u64::from(kept), Ordering::Relaxed);
        Ok(())
    }

    fn rest(&self) -> Arc<Rest> {
        let pace = Arc::clone(&self.pace);
        Arc::new(move |time| pace.worked(time))
    }
}

/// A turn, at once with the files or later without: files that wait would be memory that nobody counts.
async fn turn(
    turns: &Arc<Semaphore>,
    files: Option<AdapterFiles>,
) -> Result<(OwnedSemaphorePermit, Option<AdapterFiles>), AcquireError> {
    if let Ok(turn) = Arc::clone(turns).try_acquire_owned() {
        return Ok((turn, files));
    }
    drop(files);
    let turn = Arc::clone(turns).acquire_owned().await.map_err(|_| AcquireError::Stopped)?;
    Ok((turn, None))
}

/// What goes wrong with packing is no harm: the next load makes up for it.
fn noted(generation: GenerationId, packed: Result<(), AcquireError>) {
    if let Err(error) = packed {
        tracing::warn!(%generation, %error, "an adapter is not packed");
    }
}
