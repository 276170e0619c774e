//! The thread's rounds one by one on a tiny random model: seeded panics, readers that leave, deadlines.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::OnceLock;

use model::{LoadOptions, Precision};
use types::{FinishReason, SamplingParams};

use super::*;
use crate::request::{Engine as _, SubmitError, TokenStream};
use crate::thread::{ModelEngine, Settings};

fn base() -> Arc<BaseModel> {
    static BASE: OnceLock<Arc<BaseModel>> = OnceLock::new();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama");
    let load = || Arc::new(model::load(&fixture, LoadOptions::default()).unwrap().model);
    Arc::clone(BASE.get_or_init(load))
}

/// Handle and thread of an engine that runs four sequences at a time and lets eight wait.
fn engine() -> (ModelEngine, Runner) {
    let settings = Settings {
        batch: 4,
        queue: 8,
        step_tokens: 40,
        precision: Precision::Fast,
        kv_bytes: 64 * KvPool::block_bytes(base().config(), Precision::Fast),
        prefix_cache: true,
        guest_floor: 0.2,
        threads: 1,
        eos: vec![],
    };
    ModelEngine::assemble(base(), settings).unwrap()
}

fn job(seed: u64) -> Generate {
    let params = SamplingParams {
        max_tokens: 20 + (seed * 11 % 30) as u32,
        temperature: 0.9,
        seed,
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    let length = 3 + (seed * 7 % 40) as u32;
    let prompt = (0..length).map(|at| (at * 13 + seed as u32 * 29) % 320).collect();
    Generate { prompt, tenant: "t".parse().unwrap(), adapter: None, params, deadline: None, group: None }
}

async fn collect(mut stream: TokenStream) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    events
}

/// The events of jobs that are handed in together, run to the end with these faults; and the thread's last state.
async fn run(jobs: &[Generate], faults: &[Fault]) -> (Vec<Vec<Event>>, Runner) {
    let (engine, mut runner) = engine();
    runner.faults = faults.to_vec();
    let streams: Vec<TokenStream> = jobs.iter().map(|job| engine.submit(job.clone()).unwrap()).collect();
    drop(engine);
    loop {
        match caught(|| runner.turn()) {
            Ok(true) => {}
            Ok(false) => break,
            Err(reason) => assert!(runner.recover(&reason), "{reason}"),
        }
    }
    let mut all = Vec::new();
    for stream in streams {
        all.push(collect(stream).await);
    }
    (all, runner)
}

fn reason(events: &[Event]) -> &str {
    match events.last() {
        Some(Event::Failed { deadline: false, reason }) => reason,
        other => panic!("it has not failed: {other:?}"),
    }
}

#[tokio::test]
async fn a_panic_over_one_sequence_ends_that_one_only() {
    let jobs: Vec<Generate> = (0..6).map(job).collect();
    let (sound, _) = run(&jobs, &[]).await;
    for (job, events) in jobs.iter().zip(&sound) {
        assert_eq!(events.len(), job.params.max_tokens as usize + 1);
        assert!(matches!(events.last(), Some(Event::Finished { reason: FinishReason::Length, .. })));
    }
    // The first of the batch, the last of it, one that waits for a place.
    for id in [0, 3, 5] {
        for (fault, named, tokens) in [
            (Fault::Sampling(id), "choice of a token", 2..=2),
            // The end of its prompt may be published with the beginning.
            (Fault::Publishing(id), "publishing", 0..=1),
        ] {
            let (all, runner) = run(&jobs, &[fault]).await;
            for (at, (events, sound)) in all.iter().zip(&sound).enumerate() {
                if at != id as usize {
                    assert_eq!(events, sound, "{fault:?}: {at}");
                    continue;
                }
                let reason = reason(events);
                assert!(reason.contains(named) && reason.contains("a seeded fault"), "{reason}");
                let got = &events[..events.len() - 1];
                assert!(tokens.contains(&got.len()) && sound.starts_with(got), "{fault:?}: {got:?}");
            }
            runner.blocks.check([]);
            assert_eq!(runner.blocks.available(), runner.blocks.blocks(), "{fault:?}");
            assert_eq!(runner.shared.snapshot().failed, 1);
        }
    }
}

#[tokio::test]
async fn a_panic_in_a_plan_ends_who_runs_and_no_other() {
    let jobs: Vec<Generate> = (0..6).map(job).collect();
    let (sound, _) = run(&jobs, &[]).await;
    let (all, runner) = run(&jobs, &[Fault::Planning(1)]).await;
    let failed: Vec<bool> =
        all.iter().map(|events| matches!(events.last(), Some(Event::Failed { .. }))).collect();
    assert!(reason(&all[1]).contains("a step of the engine panicked"));
    assert!(failed.contains(&false), "somebody was not there yet: {failed:?}");
    for (at, (events, sound)) in all.iter().zip(&sound).enumerate() {
        assert!(failed[at] || events == sound, "{at}");
    }
    runner.blocks.check([]);
    assert_eq!(runner.shared.snapshot().failed, failed.iter().filter(|failed| **failed).count() as u64);
}

#[tokio::test]
async fn who_cannot_be_taken_in_finds_an_end() {
    let jobs: Vec<Generate> = (0..3).map(job).collect();
    let (sound, _) = run(&jobs, &[]).await;
    let (all, _) = run(&jobs, &[Fault::Taking(1)]).await;
    assert_eq!(all, [sound[0].clone(), vec![], sound[2].clone()]);
}

#[tokio::test]
async fn an_engine_that_cannot_go_on_tells_everybody() {
    let (engine, mut runner) = engine();
    let streams: Vec<TokenStream> = (0..6).map(|seed| engine.submit(job(seed)).unwrap()).collect();
    assert!(runner.turn());
    assert_eq!(engine.stopped(), None);
    runner.faults = vec![Fault::Planning(0), Fault::Recovering];
    let late = engine.submit(job(7)).unwrap();
    runner.run();
    for stream in streams.into_iter().chain([late]) {
        assert!(reason(&collect(stream).await).starts_with("the engine has stopped"));
    }
    assert!(engine.stopped().unwrap().contains("Planning"));
    assert!(matches!(engine.submit(job(8)), Err(SubmitError::Stopped)));
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0));
}

#[tokio::test]
async fn a_thread_that_is_done_has_not_stopped_by_a_fault() {
    let (engine, runner) = engine();
    let shared = Arc::clone(&runner.shared);
    let stream = engine.submit(job(1)).unwrap();
    drop(engine);
    runner.run();
    assert!(matches!(collect(stream).await.last(), Some(Event::Finished { .. })));
    assert_eq!(shared.stopped(), None);
}

fn long(seed: u64) -> Generate {
    let mut job = job(seed);
    job.params.max_tokens = 200;
    job
}

/// Runs rounds until the first sequence has five tokens of its answer.
fn turn_to_the_fifth_token(runner: &mut Runner) {
    let tokens = |first: &Sequence| first.usage().completion_tokens;
    while runner.sequences.get(&0).is_none_or(|first| tokens(first) < 5) {
        assert!(runner.turn());
    }
}

#[tokio::test]
async fn no_token_is_computed_for_a_reader_that_has_left() {
    let (engine, mut runner) = engine();
    let (leaving, staying) = (engine.submit(long(1)).unwrap(), engine.submit(job(2)).unwrap());
    // Two more run, and the fifth waits.
    let others: Vec<TokenStream> = (3..5).map(|seed| engine.submit(job(seed)).unwrap()).collect();
    let queued = engine.submit(job(5)).unwrap();
    turn_to_the_fifth_token(&mut runner);
    assert_eq!((runner.scheduler.running(), runner.scheduler.waiting()), (4, 1));
    drop((leaving, queued));
    drop(engine);
    while runner.turn() {}
    let stats = runner.shared.snapshot();
    let theirs: u32 = [2, 3, 4].map(|seed| job(seed).params.max_tokens).iter().sum();
    assert_eq!((stats.cancelled, stats.generated_tokens), (2, 5 + u64::from(theirs)));
    assert_eq!(runner.blocks.available(), runner.blocks.blocks());
    for stream in others.into_iter().chain([staying]) {
        assert!(matches!(collect(stream).await.last(), Some(Event::Finished { .. })));
    }
}

#[tokio::test]
async fn a_deadline_ends_a_sequence_running_or_waiting() {
    let (engine, mut runner) = engine();
    let deadline = Instant::now() + Duration::from_secs(1 << 20);
    let late = |seed| Generate { deadline: Some(deadline), ..long(seed) };
    let running = engine.submit(late(1)).unwrap();
    let others: Vec<TokenStream> = (2..5).map(|seed| engine.submit(long(seed)).unwrap()).collect();
    let waiting = engine.submit(late(5)).unwrap();
    turn_to_the_fifth_token(&mut runner);
    // Negative control: until then nobody is ended.
    runner.sweep(deadline - Duration::from_nanos(1));
    assert_eq!((runner.scheduler.running(), runner.scheduler.waiting()), (4, 1));
    runner.sweep(deadline);
    assert_eq!((runner.scheduler.running(), runner.scheduler.waiting()), (3, 0));
    for (stream, tokens) in [(running, 5), (waiting, 0)] {
        let events = collect(stream).await;
        assert_eq!(events.len(), tokens + 1);
        assert!(matches!(events.last(), Some(Event::Failed { deadline: true, .. })), "{events:?}");
    }
    drop(engine);
    while runner.turn() {}
    assert_eq!(runner.shared.snapshot().generated_tokens, 5 + 3 * 200);
    for stream in others {
        assert_eq!(collect(stream).await.len(), 201);
    }
}
