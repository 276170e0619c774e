//! Adapter k always says token k: any other token is a leak.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use adapters::{AdapterCache, CacheSettings};
use engine::{Engine, Event, ModelEngine};
use peft::Lease;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use store::Store;
use tokio::sync::OnceCell;
use types::{AdapterId, GenerationId};

use crate::tiny::{
    PRECISION, Seen, answer, base, engine, engine_that, job, marker, publish, seen, submit, targets,
};
use crate::user;

const USERS: usize = 64;
const SLOTS: usize = 8;
const READERS: usize = 24;
const SWAPS: usize = 200;
/// Generations of a user; each has a token of its own.
const GENERATIONS: usize = 4;
/// Longest answer.
const LONGEST: u32 = 48;
/// Prompts that begin alike, whoever sends them: two blocks of the KV pool and more.
const ALIKE: usize = 2;

/// One of the prompts that begin alike.
fn alike(which: usize) -> Vec<u32> {
    (0..40).map(|at| at * 29 % 320).chain((0..5).map(|at| at * 7 + which as u32)).collect()
}

/// Bugs that the traffic must show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// A slot is used again too early: a request computes with weights that another had before.
    EarlyReuse,
    /// Keys and values are kept under one name for all users and generations.
    OneScope,
}

/// What an answer must be, computed once, by whoever wants it first.
type Expected = Arc<OnceCell<Vec<Seen>>>;

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
    /// Without a prefix cache.
    cold: ModelEngine,
    /// Answers to the prompts that begin alike, of every generation and of the base.
    expected: Mutex<HashMap<(Option<GenerationId>, usize), Expected>>,
    /// Answers that were compared with it, those of the base among them, and answers that were others.
    compared: AtomicU64,
    of_base: AtomicU64,
    mixed: AtomicU64,
    fault: Option<Fault>,
    /// A lease that another request held before.
    leak: Mutex<Option<Lease>>,
}

fn id(number: usize) -> AdapterId {
    user(&format!("user{number}"))
}

impl World {
    async fn new(fault: Option<Fault>) -> Arc<Self> {
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
            cold: engine_that(false),
            expected: Mutex::default(),
            compared: AtomicU64::new(0),
            of_base: AtomicU64::new(0),
            mixed: AtomicU64::new(0),
            fault,
            leak: Mutex::new(None),
        })
    }

    /// One request after the other until `wanted` tokens are generated.
    async fn read(self: Arc<Self>, seed: u64, wanted: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        while self.generated.load(Ordering::Relaxed) < wanted {
            // The base answers beside the users.
            if rng.random_bool(0.05) {
                let which = rng.random_range(0..ALIKE);
                let expected = self.expected(None, which).await;
                let job = job(None, alike(which), rng.random_range(1..LONGEST));
                self.of_base.fetch_add(1, Ordering::Relaxed);
                self.follow(job, None, u32::MAX, Some(&expected)).await;
                continue;
            }
            // Some users come more often than others.
            let number = rng.random_range(0..USERS).min(rng.random_range(0..USERS));
            let swaps = self.swaps[number].load(Ordering::SeqCst);
            if rng.random_bool(0.1) {
                self.cache.prefetch(&id(number));
            }
            let mut lease = self.cache.acquire(&id(number)).await.unwrap().unwrap();
            let (own, swap) = self.tokens.lock().unwrap()[&(number, lease.generation)];
            assert!(swap >= swaps, "a generation that was head no more when the request came");
            let which = rng.random_bool(0.3).then(|| rng.random_range(0..ALIKE));
            let (prompt, expected) = match which {
                Some(which) => (alike(which), Some(self.expected(Some(&lease), which).await)),
                None => ((0..rng.random_range(1..40)).map(|_| rng.random_range(0..320)).collect(), None),
            };
            match self.fault {
                Some(Fault::EarlyReuse) => {
                    let other = self.leak.lock().unwrap().replace(lease.clone());
                    if let Some(other) = other
                        && rng.random_bool(0.25)
                    {
                        lease.adapter = other.adapter;
                    }
                }
                Some(Fault::OneScope) => {
                    (lease.id, lease.generation) = (id(0), GenerationId::from_bytes([0; 32]));
                }
                None => {}
            }
            let max_tokens = rng.random_range(1..LONGEST);
            let job = job(Some(lease), prompt, max_tokens);
            let patience = if rng.random_bool(0.1) { rng.random_range(0..max_tokens) } else { u32::MAX };
            self.follow(job, Some(own), patience, expected.as_ref()).await;
        }
    }

    /// The whole answer to one of the prompts that begin alike, computed without what others have left.
    async fn expected(&self, lease: Option<&Lease>, which: usize) -> Expected {
        let key = (lease.map(|lease| lease.generation), which);
        let cell = Arc::clone(self.expected.lock().unwrap().entry(key).or_default());
        cell.get_or_init(|| answer(&self.cold, job(lease.cloned(), alike(which), LONGEST))).await;
        cell
    }

    /// Reads an answer: its own token again and again, and to the bit what is expected, as far as it goes.
    async fn follow(
        &self,
        job: engine::Generate,
        own: Option<u32>,
        patience: u32,
        expected: Option<&Expected>,
    ) {
        let mut stream = submit(&self.engine, job).await;
        let expected = expected.and_then(|expected| expected.get());
        self.compared.fetch_add(u64::from(expected.is_some()), Ordering::Relaxed);
        let (mut read, mut differs) = (0, false);
        while let Some(event) = stream.next().await {
            match event {
                Event::Token(token) => {
                    if let Some(own) = own {
                        self.generated.fetch_add(1, Ordering::Relaxed);
                        // The token of its own generation, from the first to the last.
                        self.foreign.fetch_add(u64::from(token.id != own), Ordering::Relaxed);
                    }
                    if !differs && expected.is_some_and(|expected| expected[read as usize] != seen(&token)) {
                        differs = true;
                        self.mixed.fetch_add(1, Ordering::Relaxed);
                    }
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
            let files = new.files();
            let head = self.store.publish(&id(number), new, Some(expected), None).await.unwrap().id;
            self.heads.lock().unwrap()[number] = head;
            self.swaps[number].store(swaps, Ordering::SeqCst);
            if rng.random_bool(0.5) {
                self.cache.announce(&id(number), &head, rng.random_bool(0.5).then_some(files));
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
    let world = World::new(None).await;
    world.run(100_000).await;
    let residency = world.cache.residency();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!((count(&world.foreign), count(&world.mixed)), (0, 0));
    assert!(count(&world.generated) >= 100_000);
    // Beginnings were found again, and each was its own.
    assert!(count(&world.compared) > 500 && count(&world.of_base) > 50);
    assert!(Engine::stats(&world.engine).prefix_tokens > 5_000);
    assert!(world.answers.load(Ordering::Relaxed) > 1000 && world.cancelled.load(Ordering::Relaxed) > 100);
    // It was what it says: slots and host memory had to be given up and filled again, all the time.
    assert!(residency.device.evictions > 1000 && residency.host.evictions > 500, "{residency:?}");
    assert!(residency.loads > 500 && residency.hits > 100, "{residency:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_used_again_too_early_would_be_seen() {
    let world = World::new(Some(Fault::EarlyReuse)).await;
    world.run(3_000).await;
    assert!(world.foreign.load(Ordering::Relaxed) > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_and_values_of_another_would_be_seen() {
    let world = World::new(Some(Fault::OneScope)).await;
    world.run(3_000).await;
    assert!(world.mixed.load(Ordering::Relaxed) > 0);
}
