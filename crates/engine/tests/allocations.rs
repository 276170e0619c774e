//! A step of the engine allocates nothing once it is warm: plan, model, sampling, prefix index and the way to the reader.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::alloc::System;
use std::path::Path;
use std::sync::Arc;

use engine::{Engine, Event, Generate, ModelEngine, Settings, TokenStream};
use model::{KvPool, LoadOptions, Precision};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use types::SamplingParams;

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

async fn read(streams: &mut [TokenStream], tokens: usize) {
    for _ in 0..tokens {
        for stream in &mut *streams {
            assert!(matches!(stream.next().await, Some(Event::Token(_))));
        }
    }
}

#[tokio::test]
async fn a_step_allocates_nothing_after_warm_up() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama");
    let base = Arc::new(model::load(&fixture, LoadOptions::default()).unwrap().model);
    let settings = Settings {
        batch: 4,
        queue: 8,
        step_tokens: 64,
        kv_bytes: 128 * KvPool::block_bytes(base.config(), Precision::Fast),
        prefix_cache: true,
        guest_floor: 0.2,
        threads: 2,
        precision: Precision::Fast,
        eos: vec![1],
    };
    let engine = ModelEngine::start(base, settings).unwrap();
    let submit = |seed: u64| {
        let prompt = (0..20).map(|at| (at * 13 + seed as u32 * 29) % 320).collect();
        // Greedy, drawn from everything, drawn from the likeliest.
        let (temperature, top_k) = [(0.0, 0), (0.8, 0), (0.8, 20)][seed as usize];
        let params = SamplingParams {
            max_tokens: 400,
            temperature,
            top_k,
            seed,
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let tenant = "t".parse().unwrap();
        engine
            .submit(Generate { prompt, tenant, adapter: None, params, deadline: None, group: None })
            .unwrap()
    };
    // What a step allocates it allocates in every run. A run counts when enough steps fall between the two looks; a
    // reader that the system has put aside makes its channel grow, so not every run is clean.
    let mut seen = Vec::new();
    for _ in 0..20 {
        let mut streams: Vec<TokenStream> = (0..3).map(submit).collect();
        read(&mut streams, 150).await;
        let (region, steps) = (Region::new(COUNTING), engine.stats().steps);
        read(&mut streams, 200).await;
        let (change, steps) = (region.change(), engine.stats().steps - steps);
        seen.push((steps, change.allocations, change.reallocations));
        if steps >= 50 && change.allocations + change.reallocations == 0 {
            // Negative control: the counter counts.
            drop(std::hint::black_box(vec![1u8; 100]));
            assert!(region.change().allocations > change.allocations);
            return;
        }
        for mut stream in streams {
            while stream.next().await.is_some() {}
        }
    }
    panic!("no clean run; steps, allocations and reallocations of each: {seen:?}");
}
