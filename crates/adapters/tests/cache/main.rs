//! The cache over a real store: tiers, single flight, leases, heads that move, and what must never happen.
#![expect(clippy::unwrap_used, reason = "tests")]

mod failures;
mod handed;
mod held;
mod markers;
mod packed;
mod same_bits;
mod tiny;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use adapters::{AcquireError, AdapterCache, CacheSettings, Tier};
use peft::{BaseShape, LoraConfig, LoraTensors, LoraWeights, Numbers, Precision, generation_id};
use serde_json::json;
use store::{AdapterFiles, NewGeneration, Store};
use testkit::SmallBase;
use types::{AdapterId, GenerationId, SystemClock};

const BASE: [u8; 32] = [7; 32];

fn shape() -> BaseShape {
    BaseShape { layers: 2, dims: [(16, 16); 7] }
}

fn base() -> Arc<SmallBase> {
    Arc::new(SmallBase::new(shape(), BASE))
}

fn user(name: &str) -> AdapterId {
    AdapterId::new("tenant".parse().unwrap(), name.parse().unwrap())
}

/// An adapter whose every value is `mark`.
fn generation(mark: f32, base: [u8; 32]) -> NewGeneration {
    generation_of(LoraConfig::oppu(), mark, base)
}

fn generation_of(config: LoraConfig, mark: f32, base: [u8; 32]) -> NewGeneration {
    let mut sites = vec![None; shape().sites()];
    for (id, rank, scale) in config.sites(&shape()).unwrap() {
        sites[id.index()] = Some(LoraTensors {
            rank,
            scale,
            a: vec![mark; rank * 16],
            b: vec![mark; 16 * rank],
            ..LoraTensors::default()
        });
    }
    let weights = LoraWeights { config, sites };
    let (config, weights) = (weights.config.to_json(""), weights.to_safetensors(&shape()).unwrap());
    NewGeneration {
        id: generation_id(&base, &config, &weights),
        parent: None,
        base,
        config: config.into(),
        weights: weights.into(),
        meta: json!({}),
    }
}

async fn publish(store: &Store, id: &AdapterId, mark: f32, expected: Option<GenerationId>) -> GenerationId {
    publish_with_files(store, id, mark, expected).await.0
}

async fn publish_with_files(
    store: &Store,
    id: &AdapterId,
    mark: f32,
    expected: Option<GenerationId>,
) -> (GenerationId, AdapterFiles) {
    let new = generation(mark, BASE);
    let files = new.files();
    (store.publish(id, new, expected, None).await.unwrap().id, files)
}

async fn store() -> Store {
    Store::in_memory(Arc::new(SystemClock)).await.unwrap()
}

fn mark(lease: &peft::Lease) -> f32 {
    let q = types::SiteId::new(0, types::Site::Q);
    match lease.adapter.site(q).unwrap().a {
        Numbers::F32(a) => a[0],
        Numbers::Bf16(a) => f32::from_bits(u32::from(a[0]) << 16),
        Numbers::I8(_) => panic!("not in eight bits"),
    }
}

/// Adapters of this base lie in one page each.
const PAGE: usize = 64 << 10;

/// Host memory for `host` of these adapters and slots for `device`.
async fn settings(host: usize, device: usize) -> CacheSettings {
    let store = store().await;
    publish(&store, &user("one"), 1.0, None).await;
    let one = AdapterCache::new(store, base(), CacheSettings::new(Precision::Fast, 1 << 20));
    one.acquire(&user("one")).await.unwrap();
    let bytes = one.residency().host.bytes;
    CacheSettings {
        host_bytes: bytes * host,
        device_bytes: PAGE * device,
        page_bytes: Some(PAGE),
        ..CacheSettings::new(Precision::Fast, 0)
    }
}

/// A load comes in pieces, each of which looks whether requests run.
#[tokio::test]
async fn loads_make_way_while_requests_run() {
    let store = store().await;
    let wide = generation_of(LoraConfig { r: 256, alpha: 256.0, ..LoraConfig::oppu() }, 0.5, BASE);
    let bytes = wide.weights.len();
    store.publish(&user("ada"), wide, None, None).await.unwrap();
    let looks = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&looks);
    let busy = Arc::new(move || {
        seen.fetch_add(1, Ordering::Relaxed);
        true
    });
    let cache = AdapterCache::new(store, base(), CacheSettings { busy, ..settings(4, 4).await });
    let lease = cache.acquire(&user("ada")).await.unwrap().unwrap();
    assert_eq!(mark(&lease), 0.5);
    // Two files in pieces of 64 KiB; what is made of them comes in pieces of a length in time.
    let hashed = 1 + bytes.div_ceil(64 << 10);
    assert!(bytes > 64 << 10);
    assert!(looks.load(Ordering::Relaxed) > hashed, "{looks:?}");
}

#[tokio::test]
async fn more_users_than_fit_are_served_in_turn() {
    let store = store().await;
    let users: Vec<AdapterId> = (0..10).map(|at| user(&format!("user{at}"))).collect();
    for (at, id) in users.iter().enumerate() {
        publish(&store, id, at as f32 + 1.0, None).await;
    }
    let cache = AdapterCache::new(store, base(), settings(5, 3).await);
    for round in 0..3 {
        for (at, id) in users.iter().enumerate() {
            let lease = cache.acquire(id).await.unwrap().unwrap();
            assert_eq!(mark(&lease), at as f32 + 1.0, "round {round}");
            let residency = cache.residency();
            assert!(residency.host.bytes <= residency.host.budget);
            assert!(residency.device.bytes <= residency.device.budget);
        }
    }
    let residency = cache.residency();
    assert_eq!((residency.host.adapters, residency.loads, residency.host.evictions), (5, 30, 25));
    assert_eq!((residency.device.adapters, residency.uploads, residency.device.evictions), (3, 30, 27));
    let tiers: Vec<Tier> = users.iter().map(|id| cache.tier(id)).collect();
    assert_eq!(tiers[..5], [Tier::Store; 5]);
    assert_eq!(tiers[5..], [Tier::Host, Tier::Host, Tier::Device, Tier::Device, Tier::Device]);
    cache.acquire(&users[9]).await.unwrap();
    cache.acquire(&users[5]).await.unwrap();
    let residency = cache.residency();
    assert_eq!((residency.hits, residency.host_hits, residency.misses), (1, 1, 30));
}

#[tokio::test]
async fn a_lease_outlives_eviction_and_swap() {
    let store = store().await;
    let (ada, bob) = (user("ada"), user("bob"));
    let first = publish(&store, &ada, 1.0, None).await;
    publish(&store, &bob, 2.0, None).await;
    // Two slots and no host memory: only leases and slots keep adapters.
    let cache = AdapterCache::new(store.clone(), base(), settings(0, 2).await);
    let old = cache.acquire(&ada).await.unwrap().unwrap();
    let second = publish(&store, &ada, 3.0, Some(first)).await;
    cache.announce(&ada, &second, None);
    let new = cache.acquire(&ada).await.unwrap().unwrap();
    assert_eq!((mark(&old), mark(&new)), (1.0, 3.0));
    assert_eq!((old.generation, new.generation), (first, second));
    // Both slots are leased, one by a generation that is head no more: there is no room for another user.
    let full = cache.acquire_within(&bob, Duration::from_millis(20)).await;
    assert!(matches!(full, Err(AcquireError::Full { .. } | AcquireError::Late)), "{full:?}");
    drop(old);
    assert_eq!(mark(&cache.acquire(&bob).await.unwrap().unwrap()), 2.0);
    // Without an announcement too the next request gets the new head.
    let third = publish(&store, &ada, 4.0, Some(second)).await;
    assert_eq!(cache.acquire(&ada).await.unwrap().unwrap().generation, third);
    assert_eq!(mark(&new), 3.0);
    store.set_head(&ada, Some(first), Some(third)).await.unwrap();
    drop(new);
    assert_eq!(mark(&cache.acquire(&ada).await.unwrap().unwrap()), 1.0);
    store.erase_user(&ada).await.unwrap();
    assert!(cache.acquire(&ada).await.unwrap().is_none(), "an erased user");
    cache.forget(&ada);
    assert_eq!(cache.tier(&ada), Tier::Store);
}

#[tokio::test]
async fn an_adapter_that_no_pool_holds_is_refused() {
    let store = store().await;
    publish(&store, &user("ada"), 1.0, None).await;
    let cache = AdapterCache::new(store, base(), settings(2, 0).await);
    let refused = cache.acquire(&user("ada")).await;
    assert!(matches!(refused, Err(AcquireError::TooLarge { pages: 0, .. })), "{refused:?}");
}

#[tokio::test]
async fn many_requests_share_one_load() {
    let store = store().await;
    let ada = user("ada");
    publish(&store, &ada, 1.0, None).await;
    let cache = AdapterCache::new(store, base(), settings(4, 4).await);
    let tasks: Vec<_> = (0..32)
        .map(|_| {
            let (cache, ada) = (cache.clone(), ada.clone());
            tokio::spawn(async move { cache.acquire(&ada).await.unwrap().unwrap() })
        })
        .collect();
    for task in tasks {
        assert_eq!(mark(&task.await.unwrap()), 1.0);
    }
    let residency = cache.residency();
    assert_eq!((residency.loads, residency.uploads), (1, 1));
}

#[tokio::test]
async fn a_damaged_or_foreign_adapter_is_an_error_and_never_the_base() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), Arc::new(SystemClock)).await.unwrap();
    let (ada, bob) = (user("ada"), user("bob"));
    publish(&store, &ada, 1.0, None).await;
    store.publish(&bob, generation(1.0, [9; 32]), None, None).await.unwrap();
    let cache = AdapterCache::new(store, base(), settings(4, 4).await);
    assert!(cache.acquire(&user("nobody")).await.unwrap().is_none());
    assert!(matches!(cache.acquire(&bob).await, Err(AcquireError::OtherBase { .. })));
    damage(folder.path());
    assert!(matches!(cache.acquire(&ada).await, Err(AcquireError::Store(_))));
    // The next request tries again rather than remembering the failure.
    assert!(cache.acquire(&ada).await.is_err());
    assert_eq!(cache.residency().loads, 0);
}

/// Changes a byte in every stored weights file.
fn damage(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if entry.path().is_dir() {
            damage(&entry.path());
        } else if entry.file_name() == "adapter_model.safetensors" {
            let mut bytes = std::fs::read(entry.path()).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            std::fs::write(entry.path(), bytes).unwrap();
        }
    }
}
