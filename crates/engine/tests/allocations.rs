//! A step of the engine allocates nothing once it is warm: plan, model, sampling, prefix index and the way to the reader,
//! whatever a request asks for, with one exception: the likeliest tokens that come with log-probabilities are handed to the
//! reader in a list of their own.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::alloc::System;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::{Engine, Event, Generate, ModelEngine, Settings, TokenStream};
use model::{BaseModel, KvPool, LoadOptions, Precision};
use peft::{Adapter, AdapterWeights, Lease};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use types::{AdapterId, GenerationId, SamplingParams};

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

async fn read(streams: &mut [TokenStream], tokens: usize) {
    for _ in 0..tokens {
        for stream in &mut *streams {
            assert!(matches!(stream.next().await, Some(Event::Token(_))));
        }
    }
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama")
}

fn lease(base: &BaseModel) -> Lease {
    let read = |file: &str| std::fs::read(fixture().join("lora-all").join(file)).unwrap();
    let (config, weights) = (read("adapter_config.json"), read("adapter_model.safetensors"));
    let weights = AdapterWeights::parse(&config, &weights, &base.shape()).unwrap();
    Lease {
        id: AdapterId::new("t".parse().unwrap(), "u".parse().unwrap()),
        generation: GenerationId::from_bytes([1; 32]),
        adapter: Arc::new(Adapter::build(&weights, base, Precision::Fast).unwrap()),
    }
}

/// The token that ends an answer.
const EOS: u32 = 1;

/// What the requests ask for: greedy, drawn from everything, drawn from the likeliest; with an adapter; with penalties, so
/// that most tokens are new ones; with no end for long.
fn asked() -> Vec<(SamplingParams, bool)> {
    let plain = SamplingParams { max_tokens: 400, ignore_eos: true, ..SamplingParams::default() };
    let penalised = SamplingParams {
        repetition_penalty: 1.3,
        frequency_penalty: 0.5,
        presence_penalty: 0.5,
        temperature: 0.8,
        ..plain.clone()
    };
    let endless =
        SamplingParams { min_tokens: 400, stop_token_ids: vec![2, 3], ignore_eos: false, ..plain.clone() };
    vec![
        (SamplingParams { temperature: 0.0, ..plain.clone() }, false),
        (SamplingParams { temperature: 0.8, ..plain.clone() }, false),
        (SamplingParams { temperature: 0.8, top_k: 20, ..plain.clone() }, false),
        (plain, true),
        (penalised, false),
        (endless, false),
    ]
}

#[tokio::test]
async fn a_step_allocates_nothing_after_warm_up() {
    let base = Arc::new(model::load(&fixture(), LoadOptions::default()).unwrap().model);
    let lease = lease(&base);
    let settings = Settings {
        batch: 6,
        queue: 8,
        step_tokens: 64,
        kv_bytes: 256 * KvPool::block_bytes(base.config(), Precision::Fast),
        prefix_cache: true,
        guest_floor: 0.2,
        threads: 2,
        precision: Precision::Fast,
        eos: vec![EOS],
    };
    let engine = ModelEngine::start(base, settings).unwrap();
    tokio::spawn(engine.carry());
    let submit = |(seed, (params, adapted)): (u64, (SamplingParams, bool))| {
        let prompt = (0..20).map(|at| (at * 13 + seed as u32 * 29) % 320).collect();
        let (tenant, params) = ("t".parse().unwrap(), SamplingParams { seed, ..params });
        let adapter = adapted.then(|| lease.clone());
        engine.submit(Generate { prompt, tenant, adapter, params, deadline: None, group: None }).unwrap()
    };
    // What a step allocates it allocates in every run. A run counts when enough steps fall between the two looks; a
    // reader that the system has put aside makes its channel grow, so not every run is clean.
    let mut seen = Vec::new();
    for _ in 0..20 {
        let mut streams: Vec<TokenStream> = (0..).zip(asked()).map(submit).collect();
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
