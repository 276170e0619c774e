//! Published failures of servers of this kind, each a test named after it (`reliability.md` lists them).

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use adapters::{AcquireError, AdapterCache, CacheSettings, Tier};
use engine::{Event, TokenStream};
use peft::{Adapter, LoraWeights};
use tokio::task::unconstrained;

use crate::held::{HeldStore, ask};
use crate::tiny::{PRECISION, answer, base, engine, generate, marker, publish, submit, targets};
use crate::user;

/// Room for `slots` adapters of rank 4 to 8.
fn settings(slots: usize) -> CacheSettings {
    CacheSettings {
        host_bytes: 1 << 20,
        device_bytes: slots << 15,
        page_bytes: Some(1 << 15),
        ..CacheSettings::new(PRECISION, 0)
    }
}

fn prompt() -> Vec<u32> {
    (0..37).map(|at| at * 13 % 320).collect()
}

/// vLLM #47724: a slot was evicted while a request was decoding on it, and the answer came from another user's weights.
#[tokio::test]
async fn vllm_47724_a_slot_is_not_evicted_while_a_request_decodes_on_it() {
    let (store, engine) = (crate::store().await, engine());
    let (ada, bob) = (user("ada"), user("bob"));
    publish(&store, &ada, marker(0, 4), None).await;
    publish(&store, &bob, marker(1, 4), None).await;
    let cache = AdapterCache::new(store, base(), settings(1));
    let lease = cache.acquire(&ada).await.unwrap().unwrap();
    let mut stream = submit(&engine, generate(&lease, prompt(), 400)).await;
    drop(lease);
    let Some(Event::Token(first)) = stream.next().await else { panic!("no token") };
    let mut tokens = vec![first.id];
    // The only slot is in use: another user waits, and does not get it before the answer is complete. A lease goes after
    // the last event is sent, so whoever has the slot finds all of the answer there.
    let full = cache.acquire_within(&bob, Duration::from_millis(5)).await;
    let refused = matches!(full, Err(AcquireError::Full { .. } | AcquireError::Late));
    tokens.extend(ready(&mut stream));
    assert!(refused || tokens.len() == 400, "{} tokens, {full:?}", tokens.len());
    let waits = ask(&cache, &bob).await;
    while let Some(event) = stream.next().await {
        if let Event::Token(token) = event {
            tokens.push(token.id);
        }
    }
    assert_eq!(tokens, vec![targets()[0].0; 400]);
    let lease = waits.await.unwrap().unwrap().unwrap();
    let own = answer(&engine, generate(&lease, prompt(), 5)).await;
    assert!(own.iter().all(|(token, _)| *token == targets()[1].0));
    // Negative control: the slot is given away after a hundred tokens. The answer goes on, with another's weights.
    let rest = [&prompt()[..], &tokens[..100]].concat();
    let tokens = answer(&engine, generate(&lease, rest, 5)).await;
    assert!(tokens.iter().all(|(token, _)| *token != targets()[0].0));
}

/// An adapter that acts in every block, no value of which is zero.
fn dense(rank: usize, scale: f32) -> LoraWeights {
    let mut weights = marker(0, rank);
    for tensors in weights.sites.iter_mut().flatten() {
        for (at, value) in tensors.a.iter_mut().chain(&mut tensors.b).enumerate() {
            *value += scale * ((at * 31 % 17) as f32 - 8.5);
        }
    }
    weights
}

/// The smaller adapter's factors with what the larger one has beyond its rank.
fn left_over(small: &LoraWeights, large: &LoraWeights) -> LoraWeights {
    let mut mixed = large.clone();
    for (mixed, small) in mixed.sites.iter_mut().zip(&small.sites) {
        let (Some(mixed), Some(small)) = (mixed, small) else { continue };
        mixed.a[..small.a.len()].copy_from_slice(&small.a);
        for (mixed, small) in mixed.b.chunks_mut(mixed.rank).zip(small.b.chunks(small.rank)) {
            mixed[..small.len()].copy_from_slice(small);
        }
    }
    mixed
}

/// The tokens that are there already.
fn ready(stream: &mut TokenStream) -> Vec<u32> {
    let mut tokens = Vec::new();
    let mut context = Context::from_waker(Waker::noop());
    while let Poll::Ready(Some(event)) = pin!(unconstrained(stream.next())).poll(&mut context) {
        if let Event::Token(token) = event {
            tokens.push(token.id);
        }
    }
    tokens
}

/// vLLM #42125 and #30931: a prefix cache keyed by the adapter's name reused the keys and values of an older version.
#[tokio::test]
async fn vllm_42125_30931_a_swap_under_the_same_name_reuses_no_old_keys() {
    let (store, warm) = (crate::store().await, engine());
    let ada = user("ada");
    let first = publish(&store, &ada, dense(4, 0.01), None).await;
    let cache = AdapterCache::new(store.clone(), base(), settings(2));
    let old = cache.acquire(&ada).await.unwrap().unwrap();
    let before = answer(&warm, generate(&old, prompt(), 8)).await;
    let second = publish(&store, &ada, dense(4, 0.02), Some(first)).await;
    cache.announce(&ada, &second, None);
    let new = cache.acquire(&ada).await.unwrap().unwrap();
    assert_eq!(new.generation, second);
    let cold = answer(&engine(), generate(&new, prompt(), 8)).await;
    assert_eq!(answer(&warm, generate(&new, prompt(), 8)).await, cold);
    assert_ne!(cold, before);
    // Negative control: the new weights under the old generation's name meet its keys.
    let mut confused = new.clone();
    confused.generation = old.generation;
    assert_ne!(answer(&warm, generate(&confused, prompt(), 8)).await, cold);
}

/// SGLang #8103: a slot was not cleared, and a smaller adapter computed with what the larger one had left.
#[tokio::test]
async fn sglang_8103_a_smaller_adapter_finds_nothing_of_the_larger_one() {
    let store = crate::store().await;
    let (ada, bob) = (user("ada"), user("bob"));
    let large = dense(64, 0.01);
    publish(&store, &ada, large.clone(), None).await;
    let mut small = marker(1, 8);
    // Too weak to force a token, so that every left-over would show.
    small.sites.iter_mut().flatten().flat_map(|tensors| &mut tensors.b).for_each(|value| *value *= 0.01);
    publish(&store, &bob, small.clone(), None).await;
    let left_over = left_over(&small, &large);
    // Just the pages that rank 64 takes.
    let built = Adapter::build(&large.into(), &*base(), PRECISION).unwrap();
    let pages = built.pages(1 << 15).unwrap();
    let cache = AdapterCache::new(store.clone(), base(), settings(pages));
    let engine = engine();
    let large = cache.acquire(&ada).await.unwrap().unwrap();
    assert_eq!(cache.residency().device.bytes, cache.residency().device.budget, "it has every page");
    let out = answer(&engine, generate(&large, prompt(), 8)).await;
    drop(large);
    let lease = cache.acquire(&bob).await.unwrap().unwrap();
    assert_eq!(cache.tier(&ada), Tier::Host);
    let used = answer(&engine, generate(&lease, prompt(), 8)).await;
    let fresh = AdapterCache::new(store.clone(), base(), settings(pages));
    let mut lease = fresh.acquire(&bob).await.unwrap().unwrap();
    assert_eq!(used, answer(&crate::tiny::engine(), generate(&lease, prompt(), 8)).await);
    assert_ne!(used, out, "negative control: the two adapters differ");
    // Negative control: what a view of rank 64 would read in pages that nobody has wiped.
    lease.adapter = Arc::new(Adapter::build(&left_over.into(), &*base(), PRECISION).unwrap());
    assert_ne!(used, answer(&crate::tiny::engine(), generate(&lease, prompt(), 8)).await);
}

/// LoRAX's queue, SGLang #8162: the adapter at the front of the queue was loaded while everybody waited.
#[tokio::test]
async fn lorax_queue_sglang_8162_a_cold_load_delays_no_hot_user() {
    let (store, engine) = (crate::store().await, engine());
    let hot = user("hot");
    publish(&store, &hot, marker(0, 4), None).await;
    let cold: Vec<_> = (0..6).map(|at| user(&format!("cold{at}"))).collect();
    for (at, id) in cold.iter().enumerate() {
        publish(&store, id, marker(at + 1, 4), None).await;
    }
    let source = HeldStore::new(store);
    let cache = AdapterCache::over(Arc::clone(&source) as _, base(), settings(4));
    cache.acquire(&hot).await.unwrap();
    // More loads than may run at once, none of which ends.
    let mut waiting = Vec::new();
    for id in &cold {
        source.hold(id);
        waiting.push(ask(&cache, id).await);
    }
    for _ in 0..20 {
        let lease = cache.acquire(&hot).await.unwrap().unwrap();
        let tokens = answer(&engine, generate(&lease, prompt(), 8)).await;
        assert!(tokens.iter().all(|(token, _)| *token == targets()[0].0));
    }
    assert!(source.started.load(Ordering::SeqCst) > 1, "the cold loads have begun");
    assert!(waiting.iter().all(|request| !request.is_finished()), "none of which has ended");
    cold.iter().for_each(|id| source.free(id));
    // There are fewer slots than requests: who has one gives it back, whoever that is.
    let mut waiting: Vec<_> = waiting.into_iter().enumerate().collect();
    while !waiting.is_empty() {
        let Some(ready) = waiting.iter().position(|(_, request)| request.is_finished()) else {
            tokio::task::yield_now().await;
            continue;
        };
        let (at, request) = waiting.remove(ready);
        let lease = request.await.unwrap().unwrap().unwrap();
        let tokens = answer(&engine, generate(&lease, prompt(), 3)).await;
        assert!(tokens.iter().all(|(token, _)| *token == targets()[at + 1].0));
    }
}
