//! Generations whose files are handed on by whoever has published them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use adapters::{AdapterCache, CacheSettings, Tier};

use crate::held::{HeldStore, ask, got, in_host_memory};
use crate::{base, mark, publish, publish_with_files, settings, store, user};

#[tokio::test]
async fn what_has_just_been_published_is_not_read_back() {
    let (store, ada) = (store().await, user("ada"));
    let mut head = publish(&store, &ada, 1.0, None).await;
    let source = HeldStore::new(store.clone());
    let cache = AdapterCache::over(Arc::clone(&source) as _, base(), settings(4, 2).await);
    cache.acquire(&ada).await.unwrap().unwrap();
    for (number, (mark_of, handed_on)) in [(2.0, true), (3.0, false), (4.0, true)].into_iter().enumerate() {
        let files;
        (head, files) = publish_with_files(&store, &ada, mark_of, Some(head)).await;
        // A training thread announces too, and is on no runtime.
        let (announced, ada_again) = (cache.clone(), ada.clone());
        let announce = move || announced.announce(&ada_again, &head, handed_on.then_some(files));
        std::thread::spawn(announce).join().unwrap();
        in_host_memory(&cache, &ada).await;
        let lease = cache.acquire(&ada).await.unwrap().unwrap();
        assert_eq!((mark(&lease), lease.generation), (mark_of, head));
        // The first load, and the one without files.
        assert_eq!(source.started.load(Ordering::SeqCst), [1, 2, 2][number]);
    }
    // Who has no slot gets none by that.
    let bob = user("bob");
    let (other, files) = publish_with_files(&store, &bob, 5.0, None).await;
    cache.announce(&bob, &other, Some(files));
    assert_eq!((cache.tier(&bob), cache.residency().loads), (Tier::Store, 4));
}

#[tokio::test]
async fn a_late_announcement_serves_no_old_generation() {
    let (store, ada) = (store().await, user("ada"));
    let first = publish(&store, &ada, 1.0, None).await;
    let cache = AdapterCache::new(store.clone(), base(), settings(4, 2).await);
    cache.acquire(&ada).await.unwrap().unwrap();
    let (second, files) = publish_with_files(&store, &ada, 2.0, Some(first)).await;
    let third = publish(&store, &ada, 3.0, Some(second)).await;
    cache.announce(&ada, &second, Some(files));
    in_host_memory(&cache, &ada).await;
    let lease = cache.acquire(&ada).await.unwrap().unwrap();
    assert_eq!((mark(&lease), lease.generation), (3.0, third));
}

#[tokio::test]
async fn files_that_would_wait_for_their_turn_are_read_back() {
    let (store, ada, bob) = (store().await, user("ada"), user("bob"));
    let first = publish(&store, &ada, 1.0, None).await;
    publish(&store, &bob, 2.0, None).await;
    let source = HeldStore::new(store.clone());
    let settings = CacheSettings { parallel_loads: 1, ..settings(4, 2).await };
    let cache = AdapterCache::over(Arc::clone(&source) as _, base(), settings);
    cache.acquire(&ada).await.unwrap().unwrap();
    source.hold(&bob);
    let request = ask(&cache, &bob).await;
    while source.started.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    let (second, files) = publish_with_files(&store, &ada, 3.0, Some(first)).await;
    cache.announce(&ada, &second, Some(files));
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    source.free(&bob);
    assert_eq!(mark(&got(request).await), 2.0);
    assert_eq!(mark(&cache.acquire(&ada).await.unwrap().unwrap()), 3.0);
    assert_eq!(source.started.load(Ordering::SeqCst), 3);
}
