//! The cache: carries out what the tiers decide, on tokio, and wakes those who wait.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use peft::{Adapter, FrozenBase, Lease, PagePool};
use store::{AdapterFiles, Store};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use types::{AdapterId, GenerationId};

use crate::AcquireError;
use crate::loads::Loads;
use crate::pace::Pace;
use crate::residency::{CacheSettings, Residency, Tier, TierResidency};
use crate::source::{Head, Source};
use crate::tiers::{Landed, Load, Placement, Request, Sizes, Tiers};

/// Heads that are remembered, a few hundred bytes each.
const HEADS: usize = 16_384;

/// Adapters in memory, over the store. Clones share the state.
///
/// A request gets its adapter as a [`Lease`] on a slot. If there is none, the adapter is loaded into host memory (one
/// load per adapter at a time, a few in all) and copied into free pages, for which slots that nobody leases make room.
/// Meanwhile only those who want this adapter wait, and for pages those who came later.
#[derive(Clone)]
pub struct AdapterCache(Arc<Inner>);

struct Inner {
    source: Arc<dyn Source>,
    base: Arc<dyn FrozenBase>,
    pool: PagePool,
    /// Where loads and placements run, whoever causes them.
    runtime: Handle,
    host_bytes: usize,
    state: Mutex<State>,
    /// A lease is gone while requests wait: one of them looks for room.
    room: Notify,
    pace: Arc<Pace>,
    loads: Arc<Loads>,
}

/// The tiers of adapters as they are served.
type Rules = Tiers<AdapterId, GenerationId, Arc<Adapter>, Slot>;

struct State {
    tiers: Rules,
    readers: HashMap<u64, oneshot::Sender<Wake>>,
}

/// What a slot holds: the adapter in its pages, and the handle that its leases share while there are any.
struct Slot {
    body: Adapter,
    lent: Weak<Adapter>,
}

/// What a waiting request is told.
enum Wake {
    Ready(Lease),
    Again,
    Failed(AcquireError),
}

/// Messages to send once the state is unlocked: a message nobody reads drops a lease, which takes the lock.
type Mail = Vec<(Option<oneshot::Sender<Wake>>, Wake)>;

/// How a request goes on.
enum Step {
    Ask(u64),
    Done(Option<Lease>),
    Wait(u64, oneshot::Receiver<Wake>),
}

impl AdapterCache {
    /// An empty cache over a store, for adapters of a base. Reserves the device pool.
    ///
    /// # Panics
    /// Outside a tokio runtime: adapters are loaded on the one that it is made on.
    #[must_use]
    pub fn new(store: Store, base: Arc<dyn FrozenBase>, settings: CacheSettings) -> Self {
        Self::over(Arc::new(store), base, settings)
    }

    /// As [`AdapterCache::new`], over any source.
    ///
    /// # Panics
    /// As [`AdapterCache::new`].
    #[must_use]
    pub fn over(source: Arc<dyn Source>, base: Arc<dyn FrozenBase>, settings: CacheSettings) -> Self {
        let enough = || PagePool::page_bytes_for(&base.shape(), settings.storage, settings.max_rank);
        let page_bytes = settings.page_bytes.unwrap_or_else(enough);
        let pool = PagePool::new(page_bytes, settings.device_bytes);
        let sizes = Sizes {
            host_bytes: settings.host_bytes,
            pages: pool.pages(),
            waiting: settings.waiting,
            heads: HEADS,
        };
        let state = State { tiers: Tiers::new(sizes), readers: HashMap::new() };
        let pace = Arc::new(Pace::new(Arc::clone(&settings.busy)));
        let (sourced, based) = (Arc::clone(&source), Arc::clone(&base));
        let loads = Loads::new(sourced, based, settings.clone(), &pool, Arc::clone(&pace));
        Self(Arc::new(Inner {
            source,
            base,
            pool,
            runtime: Handle::current(),
            host_bytes: settings.host_bytes,
            state: Mutex::new(state),
            room: Notify::new(),
            pace,
            loads,
        }))
    }

    /// A lease on the user's head; `None` when the user has no adapter (or does not exist). Waits as long as it takes.
    ///
    /// # Errors
    /// When the adapter exists and cannot be had: never silently the base.
    pub async fn acquire(&self, id: &AdapterId) -> Result<Option<Lease>, AcquireError> {
        self.0.acquire(id, &AtomicBool::new(false)).await
    }

    /// As [`AdapterCache::acquire`], within a time.
    ///
    /// # Errors
    /// [`AcquireError::Full`] if it was there and all slots were leased the whole time, [`AcquireError::Late`] if it
    /// was not loaded; else as [`AdapterCache::acquire`].
    pub async fn acquire_within(
        &self,
        id: &AdapterId,
        patience: Duration,
    ) -> Result<Option<Lease>, AcquireError> {
        let wants_room = AtomicBool::new(false);
        match tokio::time::timeout(patience, self.0.acquire(id, &wants_room)).await {
            Ok(result) => result,
            Err(_) if wants_room.load(Ordering::Relaxed) => {
                Err(AcquireError::Full { waiting: self.0.lock().tiers.waiting() })
            }
            Err(_) => Err(AcquireError::Late),
        }
    }

    /// Brings a user's adapter into host memory while its request waits for its turn elsewhere. Returns at once; what
    /// goes wrong is for the request to see.
    pub fn prefetch(&self, id: &AdapterId) {
        let inner = &self.0;
        if !matches!(inner.fetch_ahead(id), Request::Ask) {
            return;
        }
        let (inner, id) = (Arc::clone(inner), id.clone());
        self.0.runtime.spawn(async move {
            let stamp = inner.source.moves(&id);
            if let Ok(head) = inner.source.head(&id).await
                && inner.learn(&id, head, stamp).is_ok()
            {
                inner.fetch_ahead(&id);
            }
        });
    }

    /// Tells that a user's head has moved: what is resident of the user is stale and makes room, and if it was in use
    /// the new head comes into host memory, from its `files` if the caller has them; if it was not, it is made ready to be
    /// loaded quickly. Running sequences keep their generation.
    pub fn announce(&self, id: &AdapterId, head: &GenerationId, files: Option<AdapterFiles>) {
        self.0.tell(|state| {
            let was_used = state.tiers.has_slot(id);
            let tickets = state.tiers.invalidate(id, Some(*head));
            if !was_used {
                let files = files.into_iter();
                files.for_each(|files| self.0.loads.prepare(&self.0.runtime, id, *head, files));
            } else if let Some(load) = state.tiers.fetch(id, *head, self.0.source.moves(id)) {
                self.0.start(load, files);
            }
            state.address(&tickets, |_| Wake::Again)
        });
    }

    /// Forgets an erased user.
    pub fn forget(&self, id: &AdapterId) {
        self.0.tell(|state| {
            let tickets = state.tiers.invalidate(id, None);
            state.address(&tickets, |_| Wake::Again)
        });
    }

    /// Where a user's adapter is.
    #[must_use]
    pub fn tier(&self, id: &AdapterId) -> Tier {
        let state = self.0.lock();
        match (state.tiers.has_slot(id), state.tiers.has_host(id)) {
            (true, _) => Tier::Device,
            (false, true) => Tier::Host,
            (false, false) => Tier::Store,
        }
    }

    /// What is resident.
    #[must_use]
    pub fn residency(&self) -> Residency {
        let (counts, (hosted, host_bytes), (slots, free), waiting) = {
            let tiers = &self.0.lock().tiers;
            (tiers.counts(), tiers.host(), tiers.slots(), tiers.waiting())
        };
        let pool = &self.0.pool;
        let (loads, packed) = self.0.loads.counts();
        Residency {
            host: TierResidency {
                adapters: hosted,
                bytes: host_bytes,
                budget: self.0.host_bytes,
                evictions: counts.host_evictions,
            },
            device: TierResidency {
                adapters: slots,
                bytes: (pool.pages() - free) * pool.page_bytes(),
                budget: pool.pages() * pool.page_bytes(),
                evictions: counts.slot_evictions,
            },
            hits: counts.slot_hits,
            host_hits: counts.host_hits,
            misses: counts.misses,
            loads,
            packed,
            uploads: counts.placements,
            waiting,
        }
    }
}

impl Inner {
    /// The state is whole after every statement, so a panic elsewhere leaves it usable.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn acquire(
        self: &Arc<Self>,
        id: &AdapterId,
        wants_room: &AtomicBool,
    ) -> Result<Option<Lease>, AcquireError> {
        let mut ticket = None;
        loop {
            match self.request(id, ticket)? {
                Step::Done(lease) => return Ok(lease),
                Step::Ask(stamp) => {
                    let head = self.source.head(id).await?;
                    self.learn(id, head, stamp)?;
                }
                Step::Wait(number, reader) => {
                    ticket = Some(number);
                    let waiting = Waiting { inner: self, ticket: number, wants_room };
                    match waiting.wait(reader).await? {
                        Wake::Ready(lease) => return Ok(Some(lease)),
                        Wake::Failed(error) => return Err(error),
                        Wake::Again => {}
                    }
                }
            }
        }
    }

    fn request(self: &Arc<Self>, id: &AdapterId, ticket: Option<u64>) -> Result<Step, AcquireError> {
        let mut state = self.lock();
        let stamp = self.source.moves(id);
        match state.tiers.request(id, stamp, ticket) {
            Request::Ask => Ok(Step::Ask(stamp)),
            Request::Base => Ok(Step::Done(None)),
            Request::Busy => Err(AcquireError::Full { waiting: state.tiers.waiting() }),
            Request::Ready { slot, generation } => {
                Ok(Step::Done(Some(self.lend(&mut state, id, slot, generation)?)))
            }
            Request::Wait { ticket, load } => {
                let (sender, reader) = oneshot::channel();
                state.readers.insert(ticket, sender);
                load.into_iter().for_each(|load| self.start(load, None));
                self.pump(&mut state);
                Ok(Step::Wait(ticket, reader))
            }
        }
    }

    /// Starts the load of a prefetch, if one is needed.
    fn fetch_ahead(self: &Arc<Self>, id: &AdapterId) -> Request<AdapterId, GenerationId> {
        let mut state = self.lock();
        let mut request = state.tiers.prefetch(id, self.source.moves(id));
        if let Request::Wait { load, .. } = &mut request {
            load.take().into_iter().for_each(|load| self.start(load, None));
        }
        request
    }

    fn learn(self: &Arc<Self>, id: &AdapterId, head: Option<Head>, stamp: u64) -> Result<(), AcquireError> {
        let foreign = head.filter(|head| head.base != self.base.hash());
        self.tell(|state| {
            let tickets = match foreign {
                Some(_) => state.tiers.invalidate(id, None),
                None => state.tiers.learn(id, head.map(|head| head.generation), stamp),
            };
            state.address(&tickets, |_| Wake::Again)
        });
        match foreign {
            Some(head) => Err(AcquireError::OtherBase { generation: head.generation }),
            None => Ok(()),
        }
    }

    /// A lease on a slot that the tiers have pinned for it.
    fn lend(
        self: &Arc<Self>,
        state: &mut State,
        id: &AdapterId,
        number: u64,
        generation: GenerationId,
    ) -> Result<Lease, AcquireError> {
        // A slot is there as long as the state is locked after it was found.
        let slot = state.tiers.slot_mut(id, number).ok_or(AcquireError::Stopped)?;
        let adapter = match slot.lent.upgrade() {
            Some(adapter) => {
                // The leases that share a handle share its pin.
                let _others = state.tiers.unpin(number);
                adapter
            }
            None => {
                let inner = Arc::downgrade(self);
                let released = move || inner.upgrade().into_iter().for_each(|inner| inner.released(number));
                let adapter = Arc::new(slot.body.watched(released));
                slot.lent = Arc::downgrade(&adapter);
                adapter
            }
        };
        Ok(Lease { id: id.clone(), generation, adapter })
    }

    /// The last lease on a slot is gone. Called where it was dropped, the model's thread among others: it only counts.
    fn released(&self, number: u64) {
        let wanted = self.lock().tiers.unpin(number);
        if wanted {
            self.room.notify_one();
        }
    }

    /// Starts the placements that have room, and the loads of those whose turn is near.
    fn pump(self: &Arc<Self>, state: &mut State) {
        for placement in state.tiers.pump() {
            let inner = Arc::clone(self);
            self.runtime.spawn_blocking(move || inner.place(placement));
        }
        state.tiers.returns().into_iter().for_each(|load| self.start(load, None));
    }

    fn place(self: &Arc<Self>, placement: Placement<AdapterId, Arc<Adapter>>) {
        let Placement { number, key, payload, pages } = placement;
        let slot = payload.upload(&self.pool, &mut self.pace.rests());
        let slot = slot.map(|body| Slot { body, lent: Weak::new() });
        drop(payload);
        debug_assert!(slot.is_some(), "the tiers count the pool's pages wrongly");
        let land = |tiers: &mut Rules, stamp| tiers.placed(number, &key, slot, pages, stamp);
        self.land(&key, land, || AcquireError::Full { waiting: 0 });
    }

    /// Runs a load in the background, from the store if the `files` are not given; nobody's leaving ends it.
    fn start(self: &Arc<Self>, load: Load<AdapterId, GenerationId>, files: Option<AdapterFiles>) {
        let inner = Arc::clone(self);
        self.runtime.spawn(async move {
            let Load { number, key, generation } = load;
            let (hosted, error) = match inner.loads.load(&key, generation, files).await {
                Ok(hosted) => (Some(hosted), AcquireError::Stopped),
                Err(error) => (None, error),
            };
            let land = |tiers: &mut Rules, stamp| tiers.loaded(number, &key, hosted, stamp);
            inner.land(&key, land, || error);
        });
    }

    /// Tells the tiers of a load or placement, and those who waited for it.
    fn land(
        self: &Arc<Self>,
        id: &AdapterId,
        land: impl FnOnce(&mut Rules, u64) -> Landed<GenerationId>,
        error: impl FnOnce() -> AcquireError,
    ) {
        self.tell(|state| {
            let stamp = self.source.moves(id);
            match land(&mut state.tiers, stamp) {
                Landed::Quiet => Mail::new(),
                Landed::Again(tickets) => state.address(&tickets, |_| Wake::Again),
                Landed::Failed(tickets) => {
                    let error = error();
                    state.address(&tickets, |_| Wake::Failed(error.clone()))
                }
                Landed::Ready { slot, generation, tickets } => state.address(&tickets, |state| {
                    self.lend(state, id, slot, generation).map_or_else(Wake::Failed, Wake::Ready)
                }),
            }
        });
    }

    /// Changes the state, starts the placements that this makes possible, then, when it is unlocked, wakes requests and
    /// frees what is no longer needed.
    fn tell(self: &Arc<Self>, change: impl FnOnce(&mut State) -> Mail) {
        let (mail, _trash) = {
            let mut state = self.lock();
            let mail = change(&mut state);
            self.pump(&mut state);
            (mail, state.tiers.take_trash())
        };
        for (reader, wake) in mail {
            // Whoever has left needs no answer; a lease in it is given back here.
            let _unread = reader.map(|reader| reader.send(wake));
        }
    }
}

impl State {
    /// Messages to the holders of tickets.
    fn address(&mut self, tickets: &[u64], mut wake: impl FnMut(&mut Self) -> Wake) -> Mail {
        let mut mail = Mail::new();
        for ticket in tickets {
            let wake = wake(self);
            mail.push((self.readers.remove(ticket), wake));
        }
        mail
    }
}

/// A request that waits. Dropped, it waits no longer.
struct Waiting<'a> {
    inner: &'a Arc<Inner>,
    ticket: u64,
    /// Set when it leaves without an answer and only pages were missing.
    wants_room: &'a AtomicBool,
}

impl Waiting<'_> {
    async fn wait(self, mut reader: oneshot::Receiver<Wake>) -> Result<Wake, AcquireError> {
        loop {
            tokio::select! {
                wake = &mut reader => return wake.map_err(|_| AcquireError::Stopped),
                () = self.inner.room.notified() => self.inner.pump(&mut self.inner.lock()),
            }
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.inner.lock();
        // Who has got an answer is no longer among the readers.
        if state.readers.remove(&self.ticket).is_some() {
            self.wants_room.store(state.tiers.leave(self.ticket), Ordering::Relaxed);
            self.inner.pump(&mut state);
        }
        let trash = state.tiers.take_trash();
        drop(state);
        drop(trash);
    }
}
