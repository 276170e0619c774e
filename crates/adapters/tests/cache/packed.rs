//! What a load leaves in the store for the next one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use adapters::{AcquireError, AdapterCache, CacheSettings};
use peft::Storage;
use store::Store;
use tempfile::TempDir;
use types::{AdapterId, SystemClock};

use crate::{base, mark, publish, publish_with_files, user};

fn cache(store: &Store, storage: Storage) -> AdapterCache {
    AdapterCache::new(store.clone(), base(), CacheSettings::new(storage, 1 << 20))
}

async fn packed(cache: &AdapterCache, count: u64) {
    while cache.residency().packed < count {
        tokio::task::yield_now().await;
    }
}

/// A folder with a store in which a user has an adapter.
async fn published(mark: f32) -> (TempDir, Store, AdapterId) {
    let (folder, ada) = (tempfile::tempdir().unwrap(), user("ada"));
    let store = Store::open(folder.path(), Arc::new(SystemClock)).await.unwrap();
    publish(&store, &ada, mark, None).await;
    (folder, store, ada)
}

/// Files of this name below a folder.
fn named(folder: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(named(&path, name));
        } else if path.ends_with(name) {
            found.push(path);
        }
    }
    found
}

fn damage(folder: &Path, name: &str) {
    for file in named(folder, name) {
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
    }
}

#[tokio::test]
async fn the_next_load_reads_what_was_packed() {
    let (folder, store, ada) = published(1.0).await;
    let bob = user("bob");
    let first = cache(&store, Storage::Bf16);
    assert_eq!(mark(&first.acquire(&ada).await.unwrap().unwrap()), 1.0);
    packed(&first, 1).await;
    // Nobody has asked for this one yet.
    let (head, files) = publish_with_files(&store, &bob, 2.0, None).await;
    first.announce(&bob, &head, Some(files));
    packed(&first, 2).await;
    assert_eq!(first.residency().loads, 1);

    // With the weights damaged, it can come from nowhere else.
    damage(folder.path(), "adapter_model.safetensors");
    let second = cache(&store, Storage::Bf16);
    for (who, expected) in [(&ada, 1.0), (&bob, 2.0)] {
        assert_eq!(mark(&second.acquire(who).await.unwrap().unwrap()), expected);
    }
    // Damaged itself, it is not served.
    damage(folder.path(), "packed");
    let refused = cache(&store, Storage::Bf16).acquire(&ada).await;
    assert!(matches!(refused, Err(AcquireError::Store(_))), "{refused:?}");
}

#[tokio::test]
async fn what_is_damaged_is_made_anew() {
    let (folder, store, ada) = published(1.0).await;
    for _ in 0..3 {
        let cache = cache(&store, Storage::Bf16);
        assert_eq!(mark(&cache.acquire(&ada).await.unwrap().unwrap()), 1.0);
        packed(&cache, 1).await;
        damage(folder.path(), "packed");
    }
}

#[tokio::test]
async fn what_was_packed_in_other_numbers_is_not_served() {
    // Float32 has it to the bit, bfloat16 does not.
    let (folder, store, ada) = published(1.001).await;
    let half = cache(&store, Storage::Bf16);
    assert_eq!(mark(&half.acquire(&ada).await.unwrap().unwrap()), 1.0);
    packed(&half, 1).await;
    let whole = cache(&store, Storage::F32);
    assert_eq!(mark(&whole.acquire(&ada).await.unwrap().unwrap()), 1.001);
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(whole.residency().packed, 0, "float32 is in the files as it is served");
    assert_eq!(named(folder.path(), "packed").len(), 1);
}
