//! Loads that are held: who waits for them, and who does not.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;

use adapters::{AcquireError, AdapterCache, Answer, CacheSettings, Head, Source, Tier};
use peft::{Lease, LoraConfig, Precision, TargetModules};
use store::{AdapterFiles, Rest, Store, StoreError};
use tokio::sync::Notify;
use types::{AdapterId, GenerationId};

use crate::{BASE, base, generation_of, mark, publish, settings, store, user};

/// A store whose loads can be held, and whose reads are counted.
pub(crate) struct HeldStore {
    store: Store,
    held: Mutex<HashSet<AdapterId>>,
    freed: Notify,
    pub(crate) heads: AtomicUsize,
    pub(crate) started: AtomicUsize,
    /// Whose loads have begun, in their order.
    order: Mutex<Vec<AdapterId>>,
}

impl HeldStore {
    pub(crate) fn new(store: Store) -> Arc<Self> {
        let (heads, started) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (held, order) = (Mutex::default(), Mutex::default());
        Arc::new(Self { store, held, freed: Notify::new(), heads, started, order })
    }

    pub(crate) fn hold(&self, id: &AdapterId) {
        self.held.lock().unwrap().insert(id.clone());
    }

    pub(crate) fn free(&self, id: &AdapterId) {
        self.held.lock().unwrap().remove(id);
        self.freed.notify_waiters();
    }
}

impl Source for HeldStore {
    fn moves(&self, id: &AdapterId) -> u64 {
        self.store.head_moves(id)
    }

    fn head<'a>(&'a self, id: &'a AdapterId) -> Answer<'a, Option<Head>> {
        self.heads.fetch_add(1, Ordering::SeqCst);
        Source::head(&self.store, id)
    }

    fn files<'a>(
        &'a self,
        id: &'a AdapterId,
        generation: GenerationId,
        rest: Arc<Rest>,
    ) -> Answer<'a, AdapterFiles> {
        Box::pin(async move {
            self.order.lock().unwrap().push(id.clone());
            self.started.fetch_add(1, Ordering::SeqCst);
            loop {
                let freed = self.freed.notified();
                if !self.held.lock().unwrap().contains(id) {
                    break;
                }
                freed.await;
            }
            self.store.files(id, generation, rest).await
        })
    }
}

/// A request under way.
pub(crate) type Request = tokio::task::JoinHandle<Result<Option<Lease>, AcquireError>>;

/// Asks in the background, and returns when the request waits or is done.
pub(crate) async fn ask(cache: &AdapterCache, id: &AdapterId) -> Request {
    let before = cache.residency().waiting;
    let request = tokio::spawn({
        let (cache, id) = (cache.clone(), id.clone());
        async move { cache.acquire(&id).await }
    });
    while cache.residency().waiting == before && !request.is_finished() {
        tokio::task::yield_now().await;
    }
    request
}

pub(crate) async fn got(request: Request) -> Lease {
    request.await.unwrap().unwrap().unwrap()
}

/// Until an adapter has come into host memory.
pub(crate) async fn in_host_memory(cache: &AdapterCache, id: &AdapterId) {
    while cache.tier(id) != Tier::Host {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn who_waits_for_a_load_waits_alone() {
    let store = store().await;
    let [ada, bob, eve] = ["ada", "bob", "eve"].map(user);
    for (id, mark) in [(&ada, 1.0), (&bob, 2.0), (&eve, 3.0)] {
        publish(&store, id, mark, None).await;
    }
    let source = HeldStore::new(store);
    let cache = AdapterCache::over(Arc::clone(&source) as _, base(), settings(4, 2).await);
    source.hold(&ada);
    let waits = ask(&cache, &ada).await;
    let second = ask(&cache, &ada).await;
    assert_eq!(mark(&cache.acquire(&bob).await.unwrap().unwrap()), 2.0, "in company of a load that is held");
    assert_eq!(mark(&cache.acquire(&eve).await.unwrap().unwrap()), 3.0);
    assert!(!waits.is_finished() && !second.is_finished());
    // One of them leaves: the load goes on for the other.
    second.abort();
    source.free(&ada);
    assert_eq!(mark(&got(waits).await), 1.0);
    assert_eq!(source.started.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_load_that_takes_too_long_is_given_up_by_its_request_alone() {
    let store = store().await;
    let ada = user("ada");
    publish(&store, &ada, 1.0, None).await;
    let source = HeldStore::new(store);
    let cache = AdapterCache::over(Arc::clone(&source) as _, base(), settings(4, 2).await);
    source.hold(&ada);
    let late = cache.acquire_within(&ada, std::time::Duration::from_millis(10)).await;
    assert!(matches!(late, Err(AcquireError::Late)), "{late:?}");
    assert_eq!(cache.residency().waiting, 0);
    source.free(&ada);
    assert_eq!(mark(&cache.acquire(&ada).await.unwrap().unwrap()), 1.0);
    assert_eq!(source.started.load(Ordering::SeqCst), 1, "the load went on");
}

#[tokio::test]
async fn a_queued_request_finds_its_adapter_fetched() {
    let store = store().await;
    let ada = user("ada");
    publish(&store, &ada, 1.0, None).await;
    let source = HeldStore::new(store);
    let cache = AdapterCache::over(Arc::clone(&source) as _, base(), settings(4, 2).await);
    cache.prefetch(&ada);
    in_host_memory(&cache, &ada).await;
    // The load is over: the request needs none.
    source.hold(&ada);
    assert_eq!(mark(&cache.acquire(&ada).await.unwrap().unwrap()), 1.0);
    cache.prefetch(&ada);
    cache.prefetch(&user("nobody"));
    assert_eq!(source.started.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_hot_request_reads_nothing_from_the_store() {
    let store = store().await;
    let ada = user("ada");
    let first = publish(&store, &ada, 1.0, None).await;
    let source = HeldStore::new(store.clone());
    let cache = AdapterCache::over(Arc::clone(&source) as _, base(), settings(4, 2).await);
    for _ in 0..100 {
        cache.acquire(&ada).await.unwrap().unwrap();
        assert!(cache.acquire(&user("nobody")).await.unwrap().is_none());
    }
    assert_eq!(source.heads.load(Ordering::SeqCst), 2);
    // Negative control: a head that has moved is read again, announced or not.
    let second = publish(&store, &ada, 2.0, Some(first)).await;
    assert_eq!(cache.acquire(&ada).await.unwrap().unwrap().generation, second);
    assert_eq!(source.heads.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_head_that_moves_during_a_load_is_the_one_that_is_served() {
    let store = store().await;
    let ada = user("ada");
    let first = publish(&store, &ada, 1.0, None).await;
    for announced in [true, false] {
        let source = HeldStore::new(store.clone());
        let cache = AdapterCache::over(Arc::clone(&source) as _, base(), settings(4, 2).await);
        source.hold(&ada);
        let request = ask(&cache, &ada).await;
        while source.started.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let head = store.head(&ada).await.unwrap().unwrap().id;
        let second = publish(&store, &ada, if announced { 2.0 } else { 3.0 }, Some(head)).await;
        assert_ne!(second, first);
        if announced {
            cache.announce(&ada, &second, None);
        }
        source.free(&ada);
        assert_eq!(got(request).await.generation, second, "announced: {announced}");
        assert_eq!(cache.residency().device.adapters, 1, "the old one is not resident");
    }
}

#[tokio::test]
async fn an_erased_user_is_not_brought_back_by_a_load() {
    let store = store().await;
    let ada = user("ada");
    publish(&store, &ada, 1.0, None).await;
    let source = HeldStore::new(store.clone());
    let cache = AdapterCache::over(Arc::clone(&source) as _, base(), settings(4, 2).await);
    source.hold(&ada);
    let request = ask(&cache, &ada).await;
    store.erase_user(&ada).await.unwrap();
    cache.forget(&ada);
    source.free(&ada);
    assert!(request.await.unwrap().unwrap().is_none());
    assert_eq!((cache.residency().host.adapters, cache.residency().device.adapters), (0, 0));
}

#[tokio::test]
async fn who_waits_for_room_is_served_by_age() {
    let store = store().await;
    let users = users(&store, 6).await;
    let cache = AdapterCache::new(store, base(), settings(6, 1).await);
    // All are in host memory, so that only room is wanted.
    for id in &users {
        cache.acquire(id).await.unwrap();
    }
    let mut held = cache.acquire(&users[0]).await.unwrap().unwrap();
    let mut requests = Vec::new();
    for id in &users[1..] {
        requests.push(ask(&cache, id).await);
    }
    let left = requests.remove(1);
    left.abort();
    for (request, expected) in requests.into_iter().zip([1.0, 3.0, 4.0, 5.0]) {
        assert!(!request.is_finished());
        drop(held);
        held = got(request).await;
        assert_eq!(mark(&held), expected);
    }
}

/// Users whose marks are their numbers.
async fn users(store: &Store, count: usize) -> Vec<AdapterId> {
    let users: Vec<AdapterId> = (0..count).map(|at| user(&format!("user{at}"))).collect();
    for (at, id) in users.iter().enumerate() {
        publish(store, id, at as f32, None).await;
    }
    users
}

/// Lets everything run that can: nothing but what is held is left then.
async fn settle() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn as_many_loads_run_at_once_as_are_allowed() {
    // Negative control: where more are allowed, more are seen.
    for (allowed, expected) in [(3, 3), (1, 1), (6, 6), (100, 6)] {
        let store = store().await;
        let users = users(&store, 6).await;
        let source = HeldStore::new(store);
        let limited = CacheSettings { parallel_loads: allowed, ..settings(6, 6).await };
        let cache = AdapterCache::over(Arc::clone(&source) as _, base(), limited);
        let mut requests = Vec::new();
        for id in &users {
            source.hold(id);
            requests.push(ask(&cache, id).await);
        }
        while source.started.load(Ordering::SeqCst) < expected {
            tokio::task::yield_now().await;
        }
        settle().await;
        assert_eq!(source.started.load(Ordering::SeqCst), expected, "{allowed} are allowed");
        // Each that ends makes way for one.
        for (ended, request) in requests.into_iter().enumerate() {
            source.free(&users[ended]);
            got(request).await;
            settle().await;
            let begun = source.started.load(Ordering::SeqCst);
            assert_eq!(begun, (expected + ended + 1).min(users.len()), "{allowed} are allowed");
        }
    }
}

#[tokio::test]
async fn loads_begin_by_age() {
    // Two orders, so that no order of the names passes for it.
    for order in [[3, 0, 5, 1, 4, 2], [2, 4, 1, 5, 0, 3]] {
        let store = store().await;
        let users = users(&store, 6).await;
        let source = HeldStore::new(store);
        let limited = CacheSettings { parallel_loads: 1, ..settings(6, 6).await };
        let cache = AdapterCache::over(Arc::clone(&source) as _, base(), limited);
        source.hold(&users[order[0]]);
        let mut requests = Vec::new();
        for at in order {
            requests.push(ask(&cache, &users[at]).await);
        }
        settle().await;
        assert_eq!(*source.order.lock().unwrap(), [users[order[0]].clone()]);
        source.free(&users[order[0]]);
        for request in requests {
            got(request).await;
        }
        assert_eq!(*source.order.lock().unwrap(), order.map(|at| users[at].clone()));
    }
}

#[tokio::test]
async fn what_waits_for_pages_stays_within_the_host_budget() {
    let store = store().await;
    let users = users(&store, 8).await;
    let source = HeldStore::new(store);
    let cache = AdapterCache::over(Arc::clone(&source) as _, base(), settings(2, 1).await);
    let mut held = cache.acquire(&users[0]).await.unwrap().unwrap();
    let mut requests = Vec::new();
    for id in &users[1..] {
        requests.push(ask(&cache, id).await);
    }
    while cache.residency().loads < 8 {
        tokio::task::yield_now().await;
        let host = cache.residency().host;
        assert!(host.bytes <= host.budget, "{host:?}");
    }
    // A load is counted before it lands.
    while cache.residency().host.evictions < 6 {
        tokio::task::yield_now().await;
    }
    // The two that came first are at hand, as they would be without the others.
    assert_eq!([1, 2, 3, 7].map(|at| cache.tier(&users[at]) == Tier::Host), [true, true, false, false]);
    for (at, request) in requests.into_iter().enumerate() {
        assert!(!request.is_finished());
        // Who is still being loaded again is overtaken by a younger one that is at hand.
        in_host_memory(&cache, &users[at + 1]).await;
        drop(held);
        held = got(request).await;
        assert_eq!(mark(&held), at as f32 + 1.0, "by age");
        let host = cache.residency().host;
        assert!(host.bytes <= host.budget, "{host:?}");
    }
    // What could not be kept was loaded twice.
    assert_eq!(source.started.load(Ordering::SeqCst), 8 + 5);
}

#[tokio::test]
async fn who_waits_behind_a_forgotten_user_gets_the_room_that_is_there() {
    let store = store().await;
    let [large, small, other] = ["large", "small", "other"].map(user);
    publish(&store, &large, 1.0, None).await;
    for id in [&small, &other] {
        let half = LoraConfig { target_modules: TargetModules::names(&["q_proj"]), ..LoraConfig::oppu() };
        store.publish(id, generation_of(half, 2.0, BASE), None, None).await.unwrap();
    }
    // Two pages: the one adapter takes both, the others one each.
    let pages = CacheSettings {
        host_bytes: 1 << 20,
        device_bytes: 2048,
        page_bytes: Some(1024),
        ..CacheSettings::new(Precision::Fast, 0)
    };
    let cache = AdapterCache::new(store.clone(), base(), pages);
    // All come into host memory, so that only room is wanted, and the last of them keeps a page.
    cache.acquire(&small).await.unwrap();
    cache.acquire(&large).await.unwrap();
    let held = cache.acquire(&other).await.unwrap().unwrap();
    let first = ask(&cache, &large).await;
    let second = ask(&cache, &small).await;
    assert_eq!(cache.residency().waiting, 2, "the free page is not given to who came later");
    store.erase_user(&large).await.unwrap();
    cache.forget(&large);
    assert!(first.await.unwrap().unwrap().is_none());
    assert_eq!(mark(&got(second).await), 2.0, "while the other page is still leased");
    drop(held);
}

#[tokio::test]
async fn the_queue_for_adapters_is_bounded() {
    let store = store().await;
    let ada = user("ada");
    publish(&store, &ada, 1.0, None).await;
    let source = HeldStore::new(store);
    let bounded = CacheSettings { waiting: 3, ..settings(4, 2).await };
    let cache = AdapterCache::over(Arc::clone(&source) as _, base(), bounded);
    source.hold(&ada);
    let mut requests = Vec::new();
    for _ in 0..3 {
        requests.push(ask(&cache, &ada).await);
    }
    let full = cache.acquire(&ada).await;
    assert!(matches!(full, Err(AcquireError::Full { waiting: 3 })), "{full:?}");
    source.free(&ada);
    for request in requests {
        got(request).await;
    }
}

#[tokio::test]
async fn waiters_share_a_failure_and_the_next_request_tries_again() {
    let store = store().await;
    let ada = user("ada");
    let generation = publish(&store, &ada, 1.0, None).await;
    let source = Arc::new(Failing { store, fail: Mutex::new(true) });
    let cache = AdapterCache::over(Arc::clone(&source) as _, base(), settings(4, 2).await);
    let failed = cache.acquire(&ada).await;
    assert!(matches!(failed, Err(AcquireError::Store(_))), "{failed:?}");
    *source.fail.lock().unwrap() = false;
    assert_eq!(cache.acquire(&ada).await.unwrap().unwrap().generation, generation);
}

/// A store that cannot read.
struct Failing {
    store: Store,
    fail: Mutex<bool>,
}

impl Source for Failing {
    fn moves(&self, id: &AdapterId) -> u64 {
        self.store.head_moves(id)
    }

    fn head<'a>(&'a self, id: &'a AdapterId) -> Answer<'a, Option<Head>> {
        Source::head(&self.store, id)
    }

    fn files<'a>(
        &'a self,
        id: &'a AdapterId,
        generation: GenerationId,
        rest: Arc<Rest>,
    ) -> Answer<'a, AdapterFiles> {
        if *self.fail.lock().unwrap() {
            return Box::pin(std::future::poll_fn(|_| Poll::Ready(Err(StoreError::Stopped))));
        }
        self.store.files(id, generation, rest)
    }
}
