//! The same request before eviction, after eviction and reload, and after a restart: equal to the bit, for every kind of
//! adapter however it is kept.

use std::sync::Arc;

use adapters::{AdapterCache, CacheSettings};
use peft::{Adapter, AdapterWeights, Storage, generation_id};
use serde_json::json;
use store::{NewGeneration, Store};
use testkit::fixture;
use types::SystemClock;

use crate::tiny::{answer, base, engine, generate, marker, publish};
use crate::user;

/// Every kind that there is a fixture of.
const KINDS: [&str; 10] = [
    "lora-qv",
    "lora-all",
    "lora-patterns",
    "lora-rslora",
    "lora-all-linear",
    "lora-layers",
    "lora-bias",
    "dora",
    "ia3",
    "prompt",
];

const PAGE: usize = 1 << 15;

/// An adapter of the fixtures, and the pages that it takes.
fn fixture_of(kind: &str, storage: Storage) -> (NewGeneration, usize) {
    let folder = fixture("tiny-llama").join(kind);
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
    let (config, weights) = (read("adapter_config.json"), read("adapter_model.safetensors"));
    let base = base();
    let parsed = AdapterWeights::parse(&config, &weights, &base.shape()).unwrap();
    let pages = Adapter::build(&parsed, &*base, storage).unwrap().pages(PAGE).unwrap();
    let id = generation_id(base.hash(), &config, &weights);
    let (config, weights) = (config.into(), weights.into());
    (NewGeneration { id, parent: None, base: *base.hash(), config, weights, meta: json!({}) }, pages)
}

#[tokio::test]
async fn an_answer_is_the_same_after_eviction_and_after_a_restart() {
    for storage in [Storage::F32, Storage::Bf16, Storage::Int8] {
        for kind in KINDS {
            an_answer_is_the_same(kind, storage).await;
        }
    }
}

async fn an_answer_is_the_same(kind: &str, storage: Storage) {
    let folder = tempfile::tempdir().unwrap();
    let (ada, bob) = (user("ada"), user("bob"));
    let (generation, pages) = fixture_of(kind, storage);
    let rival = Adapter::build(&marker(1, 8).into(), &*base(), storage).unwrap().pages(PAGE).unwrap();
    let prompt = || -> Vec<u32> { (0..37).map(|at| at * 13 % 320).collect() };
    let mut answers = Vec::new();
    for start in 0..2 {
        let store = Store::open(folder.path(), Arc::new(SystemClock)).await.unwrap();
        if start == 0 {
            store.publish(&ada, generation.clone(), None, None).await.unwrap();
            publish(&store, &bob, marker(1, 8), None).await;
        }
        // Pages for one of them and no host memory: whoever comes pushes the other out.
        let one = CacheSettings {
            host_bytes: 0,
            device_bytes: pages.max(rival) * PAGE,
            page_bytes: Some(PAGE),
            ..CacheSettings::new(storage, 0)
        };
        let (cache, engine) = (AdapterCache::new(store.clone(), base(), one), engine());
        for _ in 0..2 {
            let lease = cache.acquire(&ada).await.unwrap().unwrap();
            answers.push(answer(&engine, generate(&lease, prompt(), 16)).await);
            drop(lease);
            // The first load is from the files, all others from what it has packed.
            while start == 0 && storage != Storage::F32 && cache.residency().packed == 0 {
                tokio::task::yield_now().await;
            }
            let lease = cache.acquire(&bob).await.unwrap().unwrap();
            let other = answer(&engine, generate(&lease, prompt(), 16)).await;
            assert_ne!(other, answers[0], "negative control: {kind}: the two adapters differ");
        }
        assert_eq!(cache.residency().device.evictions, 3, "{kind} in {storage:?}");
        store.close().await;
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{kind} in {storage:?}");
}
