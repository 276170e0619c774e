//! The cache over a real store: budget, single flight, leases, heads that move.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::Arc;

use adapters::{AcquireError, AdapterCache};
use peft::{BaseShape, LoraConfig, LoraTensors, LoraWeights, Numbers, Precision, generation_id};
use serde_json::json;
use store::{NewGeneration, Store};
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
    let config = LoraConfig::oppu();
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
        config,
        weights,
        meta: json!({}),
    }
}

async fn publish(store: &Store, id: &AdapterId, mark: f32, expected: Option<GenerationId>) -> GenerationId {
    store.publish(id, generation(mark, BASE), expected, None).await.unwrap().id
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

#[tokio::test]
async fn more_users_than_fit_are_served_in_turn() {
    let store = store().await;
    let users: Vec<AdapterId> = (0..10).map(|at| user(&format!("user{at}"))).collect();
    for (at, id) in users.iter().enumerate() {
        publish(&store, id, at as f32 + 1.0, None).await;
    }
    let one = AdapterCache::new(store.clone(), base(), Precision::Fast, usize::MAX);
    one.acquire(&users[0]).await.unwrap();
    let bytes = one.residency().bytes;
    let cache = AdapterCache::new(store, base(), Precision::Fast, bytes * 3);
    for round in 0..3 {
        for (at, id) in users.iter().enumerate() {
            let lease = cache.acquire(id).await.unwrap().unwrap();
            assert_eq!(mark(&lease), at as f32 + 1.0, "round {round}");
            assert!(cache.residency().bytes <= bytes * 3);
        }
    }
    let residency = cache.residency();
    assert_eq!((residency.adapters, residency.loads, residency.evictions), (3, 30, 27));
    cache.acquire(&users[9]).await.unwrap();
    assert_eq!(cache.residency().hits, 1);
}

#[tokio::test]
async fn a_lease_outlives_eviction_and_swap() {
    let store = store().await;
    let (ada, bob) = (user("ada"), user("bob"));
    let first = publish(&store, &ada, 1.0, None).await;
    publish(&store, &bob, 2.0, None).await;
    // A budget of nothing: only leases keep adapters.
    let cache = AdapterCache::new(store.clone(), base(), Precision::Fast, 0);
    let old = cache.acquire(&ada).await.unwrap().unwrap();
    cache.acquire(&bob).await.unwrap();
    let second = publish(&store, &ada, 3.0, Some(first)).await;
    cache.announce(&ada, &second);
    let new = cache.acquire(&ada).await.unwrap().unwrap();
    assert_eq!((mark(&old), mark(&new)), (1.0, 3.0));
    assert_eq!((old.generation, new.generation), (first, second));
    // Without the announcement the next request would still get the new head: the store is asked.
    let third = publish(&store, &ada, 4.0, Some(second)).await;
    assert_eq!(cache.acquire(&ada).await.unwrap().unwrap().generation, third);
    drop((old, new));
    cache.forget(&ada);
    cache.acquire(&bob).await.unwrap();
    assert!(cache.residency().adapters <= 1);
}

#[tokio::test]
async fn many_requests_share_one_load() {
    let store = store().await;
    let ada = user("ada");
    publish(&store, &ada, 1.0, None).await;
    let cache = AdapterCache::new(store, base(), Precision::Fast, 1 << 20);
    let tasks: Vec<_> = (0..32)
        .map(|_| {
            let (cache, ada) = (cache.clone(), ada.clone());
            tokio::spawn(async move { cache.acquire(&ada).await.unwrap().unwrap() })
        })
        .collect();
    for task in tasks {
        assert_eq!(mark(&task.await.unwrap()), 1.0);
    }
    assert_eq!(cache.residency().loads, 1);
}

#[tokio::test]
async fn a_damaged_or_foreign_adapter_is_an_error_and_never_the_base() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), Arc::new(SystemClock)).await.unwrap();
    let (ada, bob) = (user("ada"), user("bob"));
    publish(&store, &ada, 1.0, None).await;
    store.publish(&bob, generation(1.0, [9; 32]), None, None).await.unwrap();
    let cache = AdapterCache::new(store, base(), Precision::Fast, 1 << 20);
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
