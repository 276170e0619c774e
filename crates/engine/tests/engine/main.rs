//! The model thread on a tiny random model: batching, preemption, cancellation, refusals.
#![expect(clippy::unwrap_used, reason = "tests")]

mod kinds;
mod prefix;

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use engine::{Engine, Event, Generate, ModelEngine, Settings, SubmitError, TokenStream};
use model::{BaseModel, KvPool, LoadOptions, Precision};
use peft::{Adapter, AdapterWeights, Lease};
use types::{AdapterId, FinishReason, GenerationId, SamplingParams};

fn fixture() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama")
}

fn base() -> Arc<BaseModel> {
    static BASE: OnceLock<Arc<BaseModel>> = OnceLock::new();
    let load = || Arc::new(model::load(&fixture(), LoadOptions::default()).unwrap().model);
    Arc::clone(BASE.get_or_init(load))
}

fn lease(kind: &str) -> Lease {
    let read = |file: &str| std::fs::read(fixture().join(kind).join(file)).unwrap();
    let (config, weights) = (read("adapter_config.json"), read("adapter_model.safetensors"));
    let weights = AdapterWeights::parse(&config, &weights, &base().shape()).unwrap();
    Lease {
        id: AdapterId::new("t".parse().unwrap(), kind.parse().unwrap()),
        generation: GenerationId::from_bytes([1; 32]),
        adapter: Arc::new(Adapter::build(&weights, &*base(), PRECISION).unwrap()),
    }
}

const PRECISION: Precision = Precision::Fast;

fn settings(blocks: usize) -> Settings {
    Settings {
        batch: 4,
        queue: 8,
        step_tokens: 24,
        precision: PRECISION,
        kv_bytes: blocks * KvPool::block_bytes(base().config(), PRECISION),
        prefix_cache: true,
        guest_floor: 0.2,
        threads: 2,
        eos: vec![],
    }
}

fn job(seed: u64, adapter: Option<Lease>) -> Generate {
    let length = 3 + (seed * 7 % 40) as u32;
    let params = SamplingParams {
        max_tokens: 5 + (seed * 11 % 30) as u32,
        temperature: 0.9,
        top_k: 40,
        seed,
        logprobs: Some(3),
        ..SamplingParams::default()
    };
    let prompt = (0..length).map(|at| (at * 13 + seed as u32 * 29) % 320).collect();
    Generate { prompt, tenant: "t".parse().unwrap(), adapter, params, deadline: None, group: None }
}

fn jobs() -> Vec<Generate> {
    let kinds = ["lora-qv", "lora-all", "lora-patterns"].map(lease);
    (0..12).map(|seed| job(seed, kinds.get(seed as usize % 4).cloned())).collect()
}

async fn collect(mut stream: TokenStream) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    events
}

/// The tokens of a prompt that were there already, taken out of the events so that the rest can be compared.
fn cached(events: &mut [Event]) -> usize {
    match events.last_mut() {
        Some(Event::Finished { usage, .. }) => std::mem::take(&mut usage.cached_tokens) as usize,
        _ => 0,
    }
}

/// Submits when the queue has room, all at once otherwise, and returns every sequence's events.
async fn run(engine: &ModelEngine, jobs: &[Generate]) -> Vec<Vec<Event>> {
    let mut all = run_counted(engine, jobs).await;
    for events in &mut all {
        cached(events);
    }
    all
}

/// As [`run`], with the tokens that were there already.
async fn run_counted(engine: &ModelEngine, jobs: &[Generate]) -> Vec<Vec<Event>> {
    let mut tasks = Vec::new();
    tokio::spawn(engine.carry());
    for job in jobs {
        let stream = loop {
            match engine.submit(job.clone()) {
                Ok(stream) => break stream,
                Err(SubmitError::Busy { .. }) => tokio::time::sleep(Duration::from_millis(1)).await,
                Err(error) => panic!("{error}"),
            }
        };
        tasks.push(tokio::spawn(collect(stream)));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await.unwrap());
    }
    all
}

#[tokio::test]
async fn company_and_preemption_change_nothing() {
    let jobs = jobs();
    let roomy = ModelEngine::start(base(), settings(64)).unwrap();
    let mut alone = Vec::new();
    for job in &jobs {
        alone.extend(run(&roomy, std::slice::from_ref(job)).await);
    }
    for (job, events) in jobs.iter().zip(&alone) {
        assert_eq!(events.len(), job.params.max_tokens as usize + 1);
        let Some(Event::Finished { reason, usage }) = events.last() else { panic!("{events:?}") };
        assert_eq!(*reason, FinishReason::Length);
        assert_eq!(usage.prompt_tokens as usize, job.prompt.len());
        assert_eq!(usage.completion_tokens, job.params.max_tokens);
    }
    assert_eq!(run(&roomy, &jobs).await, alone, "together");
    // A guest is lent threads and given pauses.
    let visit = roomy.guest().visit();
    for _ in 0..4 {
        assert_eq!(run(&roomy, &jobs).await, alone, "beside a guest");
    }
    drop(visit);
    // Six blocks hold one and a half of the longest sequences: they push each other out and start again.
    let tight = ModelEngine::start(base(), settings(6)).unwrap();
    assert_eq!(run(&tight, &jobs).await, alone, "with preemption");
    assert!(tight.stats().preemptions > 0);
    // Negative control: another adapter must show.
    let mut swapped = jobs.clone();
    swapped[0].adapter = Some(lease("lora-rslora"));
    assert_ne!(run(&roomy, &swapped).await[0], alone[0]);
}

async fn until(engine: &ModelEngine, condition: impl Fn(&engine::EngineStats) -> bool) {
    while !condition(&engine.stats()) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn long(seed: u64) -> Generate {
    let mut job = job(seed, None);
    job.params.max_tokens = 200;
    job
}

#[tokio::test]
async fn a_reader_that_leaves_frees_its_place() {
    let engine = ModelEngine::start(base(), settings(64)).unwrap();
    // Where this thread gets no processor for long, the answer may have ended before it leaves.
    for attempt in 1.. {
        let mut leaving = engine.submit(long(attempt)).unwrap();
        let staying = engine.submit(job(2, None)).unwrap();
        assert!(matches!(leaving.next().await, Some(Event::Token(_))));
        drop(leaving);
        assert!(matches!(collect(staying).await.last(), Some(Event::Finished { .. })));
        until(&engine, |stats| stats.running == 0).await;
        let stats = engine.stats();
        assert_eq!(stats.kv_blocks_used, 0);
        if stats.cancelled == 1 {
            break;
        }
        assert!(attempt < 100 && stats.cancelled == 0, "{stats:?}");
    }
}

#[tokio::test]
async fn a_deadline_that_has_passed_ends_a_sequence_before_it_runs() {
    let engine = ModelEngine::start(base(), settings(64)).unwrap();
    let mut late = long(1);
    late.deadline = Some(Instant::now());
    let events = collect(engine.submit(late).unwrap()).await;
    assert!(matches!(events[..], [Event::Failed { deadline: true, .. }]), "{events:?}");
    until(&engine, |stats| stats.kv_blocks_used == 0 && stats.failed == 1).await;
    assert_eq!(engine.stats().generated_tokens, 0);
}

#[tokio::test]
async fn what_cannot_run_is_refused_at_once() {
    let engine = ModelEngine::start(base(), settings(4)).unwrap();
    let refuse = |change: fn(&mut Generate)| {
        let mut job = job(1, None);
        change(&mut job);
        engine.submit(job).map(|_| ()).unwrap_err()
    };
    assert_eq!(refuse(|job| job.prompt.clear()), SubmitError::EmptyPrompt);
    assert_eq!(refuse(|job| job.prompt[0] = 320), SubmitError::TokenOutOfRange { id: 320, vocabulary: 320 });
    // Four blocks of sixteen tokens are the longest sequence this pool can hold.
    assert_eq!(
        refuse(|job| job.params.max_tokens = u32::MAX),
        SubmitError::TooLong { prompt: 10, max_tokens: u32::MAX, context: 64 }
    );
    assert!(ModelEngine::start(base(), Settings { kv_bytes: 10, ..settings(1) }).is_err());
}

#[tokio::test]
async fn a_full_queue_says_so() {
    let engine = ModelEngine::start(base(), settings(64)).unwrap();
    let mut streams = Vec::new();
    let busy = loop {
        match engine.submit(long(streams.len() as u64)) {
            Ok(stream) => streams.push(stream),
            Err(error) => break error,
        }
        assert!(streams.len() < 1000, "the queue has no bound");
    };
    assert_eq!(busy, SubmitError::Busy { waiting: 8 });
    drop(streams);
    until(&engine, |stats| stats.running == 0 && stats.waiting == 0).await;
    assert!(matches!(
        collect(engine.submit(job(3, None)).unwrap()).await.last(),
        Some(Event::Finished { .. })
    ));
}
