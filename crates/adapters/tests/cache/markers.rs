//! Adapter k always says token k: any other token is a leak.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use adapters::{AdapterCache, CacheSettings};
use engine::{Event, ModelEngine};
use peft::Lease;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use store::Store;
use types::{AdapterId, GenerationId};

use crate::tiny::{PRECISION, base, engine, generate, marker, publish, submit, targets};
use crate::user;

const USERS: usize = 64;
const SLOTS: usize = 8;
const READERS: usize = 24;
const SWAPS: usize = 200;
/// Generations of a user; each has a token of its own.
const GENERATIONS: usize = 4;

fn target(user: usize, swaps: usize) -> usize {
    user + USERS * (swaps % GENERATIONS)
}

/// What has been published.
struct World {
    store: Store,
    cache: AdapterCache,
    engine: ModelEngine,
    /// The token of every generation of every user, and which of the user's swaps made it.
    tokens: Mutex<HashMap<(usize, GenerationId), (u32, usize)>>,
    /// Swaps of each user that were over.
    swaps: Vec<AtomicUsize>,
    heads: Mutex<Vec<GenerationId>>,
    generated: AtomicU64,
    foreign: AtomicU64,
    answers: AtomicU64,
    cancelled: AtomicU64,
    /// A lease that another request held before: what a slot used again too early would hold.
    leak: Option<Mutex<Option<Lease>>>,
}

fn id(number: usize) -> AdapterId {
    user(&format!("user{number}"))
}

impl World {
    async fn new(leaks: bool) -> Arc<Self> {
        assert!(targets().len() >= USERS * GENERATIONS, "{} tokens can be forced", targets().len());
        let store = crate::store().await;
        let settings = CacheSettings {
            host_bytes: 16 * 24 * 1024,
            device_bytes: SLOTS << 15,
            page_bytes: Some(1 << 15),
            ..CacheSettings::new(PRECISION, 0)
        };
        let cache = AdapterCache::new(store.clone(), base(), settings);
        let (mut tokens, mut heads) = (HashMap::new(), Vec::new());
        for number in 0..USERS {
            let head = publish(&store, &id(number), marker(target(number, 0), 4), None).await;
            tokens.insert((number, head), (targets()[target(number, 0)].0, 0));
            heads.push(head);
        }
        Arc::new(Self {
            store,
            cache,
            engine: engine(),
            tokens: Mutex::new(tokens),
            swaps: (0..USERS).map(|_| AtomicUsize::new(0)).collect(),
            heads: Mutex::new(heads),
            generated: AtomicU64::new(0),
            foreign: AtomicU64::new(0),
            answers: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            leak: leaks.then(|| Mutex::new(None)),
        })
    }

    /// One request after the other until `wanted` tokens are generated.
    async fn read(self: Arc<Self>, seed: u64, wanted: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        while self.generated.load(Ordering::Relaxed) < wanted {
            // Some users come more often than others.
            let number = rng.random_range(0..USERS).min(rng.random_range(0..USERS));
            let swaps = self.swaps[number].load(Ordering::SeqCst);
            if rng.random_bool(0.1) {
                self.cache.prefetch(&id(number));
            }
            let mut lease = self.cache.acquire(&id(number)).await.unwrap().unwrap();
            let (own, swap) = self.tokens.lock().unwrap()[&(number, lease.generation)];
            assert!(swap >= swaps, "a generation that was head no more when the request came");
            if let Some(leak) = &self.leak
                && let Some(other) = leak.lock().unwrap().replace(lease.clone())
                && rng.random_bool(0.05)
            {
                lease.adapter = other.adapter;
            }
            let prompt = (0..rng.random_range(1..40)).map(|_| rng.random_range(0..320)).collect();
            let max_tokens = rng.random_range(1..48);
            let job = generate(&lease, prompt, max_tokens);
            drop(lease);
            let patience = if rng.random_bool(0.1) { rng.random_range(0..max_tokens) } else { u32::MAX };
            self.follow(job, own, patience).await;
        }
    }

    async fn follow(&self, job: engine::Generate, own: u32, patience: u32) {
        let mut stream = submit(&self.engine, job).await;
        let mut read = 0;
        while let Some(event) = stream.next().await {
            match event {
                Event::Token(token) => {
                    self.generated.fetch_add(1, Ordering::Relaxed);
                    // The token of its own generation, from the first to the last.
                    self.foreign.fetch_add(u64::from(token.id != own), Ordering::Relaxed);
                    read += 1;
                    if read > patience {
                        self.cancelled.fetch_add(1, Ordering::Relaxed);
                        return;
                    }
                }
                Event::Finished { .. } => {
                    self.answers.fetch_add(1, Ordering::Relaxed);
                }
                Event::Failed { reason, .. } => panic!("{reason}"),
            }
        }
    }

    /// Publishes new generations of random users, evenly over the run.
    async fn swap(self: Arc<Self>, wanted: u64) {
        let mut rng = StdRng::seed_from_u64(0);
        for swap in 0..SWAPS {
            while self.generated.load(Ordering::Relaxed) < wanted * swap as u64 / SWAPS as u64 {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            let number = rng.random_range(0..USERS).min(rng.random_range(0..USERS));
            let swaps = self.swaps[number].load(Ordering::SeqCst) + 1;
            let weights = marker(target(number, swaps), 1 << (2 + swaps % 3));
            let new = crate::tiny::generation(weights);
            let token = targets()[target(number, swaps)].0;
            self.tokens.lock().unwrap().insert((number, new.id), (token, swaps));
            let expected = self.heads.lock().unwrap()[number];
            let head = self.store.publish(&id(number), new, Some(expected), None).await.unwrap().id;
            self.heads.lock().unwrap()[number] = head;
            self.swaps[number].store(swaps, Ordering::SeqCst);
            if rng.random_bool(0.5) {
                self.cache.announce(&id(number), &head);
            }
        }
    }

    async fn run(self: &Arc<Self>, wanted: u64) {
        let mut tasks = vec![tokio::spawn(Arc::clone(self).swap(wanted))];
        for seed in 1..=READERS as u64 {
            tasks.push(tokio::spawn(Arc::clone(self).read(seed, wanted)));
        }
        for task in tasks {
            task.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_token_of_another_adapter_or_generation() {
    let world = World::new(false).await;
    world.run(100_000).await;
    let residency = world.cache.residency();
    assert_eq!(world.foreign.load(Ordering::Relaxed), 0);
    assert!(world.generated.load(Ordering::Relaxed) >= 100_000);
    assert!(world.answers.load(Ordering::Relaxed) > 1000 && world.cancelled.load(Ordering::Relaxed) > 100);
    // It was what it says: slots and host memory had to be given up and filled again, all the time.
    assert!(residency.device.evictions > 1000 && residency.host.evictions > 500, "{residency:?}");
    assert!(residency.loads > 500 && residency.hits > 100, "{residency:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_used_again_too_early_would_be_seen() {
    let world = World::new(true).await;
    world.run(3_000).await;
    assert!(world.foreign.load(Ordering::Relaxed) > 0);
}
