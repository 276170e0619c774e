//! The whole loop in figures: serving at one and eight users, training, resident memory, beside the floor.
//!
//! `cargo xtask bench loop [--quick] [--json]` runs it and writes `benches/RESULTS.md`. One JSON object a line. The
//! floor is what bytes over bandwidth or operations over peak allow on a two-core Zen 4 with AVX-512 (27 GB/s from
//! memory, 917 GOP/s in int8, 392 GFLOP/s in BF16).
#![expect(clippy::print_stdout, clippy::expect_used, reason = "a benchmark")]

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use atelier::fetch;
use atelier::service::cores;
use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use engine::{Engine, Event, Generate, ModelEngine, Settings};
use model::{BaseModel, LoadOptions};
use peft::{Adapter, Lease, LoraConfig, LoraTensors, LoraWeights, Precision, TargetModules};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use train::Recipe;
use types::{AdapterId, Example, GenerationId, SamplingParams, Site};

/// One line of the table.
struct Row {
    name: &'static str,
    /// The median of ours, and the smallest and largest.
    ours: [f64; 3],
    /// The median of the peer, if there is one.
    peer: Option<f64>,
    /// What the machine allows at most.
    floor: Option<f64>,
}

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let runs = if quick { 1 } else { 5 };
    let cache = fetch::cache_folder(None).expect("a cache folder");
    let path = fetch::default_model(&cache).expect("the default model");
    let base = Arc::new(model::load(&path, LoadOptions { max_context: Some(2048) }).expect("it loads").model);
    let loaded = resident_mib();
    let mut rows = serving(&base, &path, runs);
    let served = resident_mib();
    let mut speeds: Vec<f64> = (0..runs).map(|_| training(&base)).collect();
    rows.push(Row {
        name: "training, rank 8 on q and v, 4 x 256, loss on all tokens, tok/s",
        ours: spread(&mut speeds),
        peer: None,
        floor: Some(725.0),
    });
    for (name, mib) in [
        ("resident memory, model loaded, MiB", loaded),
        ("resident memory after serving (the peer's copy of the model included), MiB", served),
        ("resident memory at its peak, training 4 x 256, MiB", peak_mib()),
    ] {
        rows.push(Row { name, ours: [mib; 3], peer: None, floor: None });
    }
    for Row { name, ours: [median, low, high], peer, floor } in rows {
        let ratio = peer.map(|peer| median / peer);
        println!(
            "{}",
            json!({
                "name": name, "ours": median, "low": low, "high": high, "peer": peer, "ratio": ratio, "floor": floor,
                "goal": null, "holds": null,
            })
        );
    }
}

/// Our engine and candle's quantised Llama on the same file, by turns.
fn serving(base: &Arc<BaseModel>, path: &Path, runs: usize) -> Vec<Row> {
    let settings = Settings {
        batch: 16,
        queue: 64,
        step_tokens: 512,
        kv_bytes: 512 << 20,
        // Every run computes its prompts.
        prefix_cache: false,
        guest_floor: 0.2,
        threads: cores(),
        precision: Precision::Fast,
        eos: Vec::new(),
    };
    let engine = ModelEngine::start(Arc::clone(base), settings).expect("it starts");
    let mut candle = Candle::load(path);
    let all: Vec<Arc<Adapter>> = (0..8).map(|seed| adapter(base, seed, &Site::ALL)).collect();
    let mut measure =
        |name, floor, users: usize, prompt, answer, adapters: &[Arc<Adapter>], with_peer: bool| {
            let (mut ours, mut peers) = (Vec::new(), Vec::new());
            for _ in 0..runs {
                ours.push(serve(&engine, users, prompt, answer, adapters));
                if with_peer {
                    peers.push(candle.measure(prompt, answer));
                }
            }
            let peer = (!peers.is_empty()).then(|| spread(&mut peers)[0]);
            Row { name, ours: spread(&mut ours), peer, floor }
        };
    vec![
        measure("decode, 1 user, no adapter, tok/s (peer: candle)", Some(290.0), 1, 8, 64, &[], true),
        measure("decode, 1 user, rank 8 on all seven sites, tok/s", None, 1, 8, 64, &all, false),
        measure("decode, 8 users, no adapter, tok/s", Some(2_300.0), 8, 8, 64, &[], false),
        measure(
            "decode, 8 users with 8 adapters, rank 8 on all seven sites, tok/s",
            None,
            8,
            8,
            64,
            &all,
            false,
        ),
        measure("prompt of 512 tokens, tok/s (peer: candle)", Some(4_300.0), 1, 512, 1, &[], true),
    ]
}

/// Median, smallest, largest.
fn spread(values: &mut [f64]) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [values[values.len() / 2], values[0], values[values.len() - 1]]
}

/// The peer: candle-transformers' quantised Llama.
struct Candle(ModelWeights);

impl Candle {
    fn load(path: &Path) -> Self {
        let mut file = std::fs::File::open(path).expect("the model file");
        let content = gguf_file::Content::read(&mut file).expect("a GGUF header");
        Self(ModelWeights::from_gguf(content, &mut file, &Device::Cpu).expect("candle loads it"))
    }

    /// As [`serve`] with one user.
    fn measure(&mut self, prompt: usize, answer: u32) -> f64 {
        let mut run = |tokens: &[u32], at: usize| {
            let input = Tensor::new(tokens, &Device::Cpu).and_then(|t| t.unsqueeze(0)).expect("a tensor");
            self.0.forward(&input, at).expect("candle runs");
        };
        let start = Instant::now();
        run(&tokens(prompt, 0), 0);
        if answer == 1 {
            return prompt as f64 / start.elapsed().as_secs_f64();
        }
        let start = Instant::now();
        for at in 0..answer - 1 {
            run(&[1000 + at], prompt + at as usize);
        }
        f64::from(answer - 1) / start.elapsed().as_secs_f64()
    }
}

fn tokens(count: usize, user: u32) -> Vec<u32> {
    (0..count as u32).map(|at| 1000 + at * 37 % 20_000 + user).collect()
}

/// Tokens per second: generated ones, or prompt tokens when the answer is one token.
fn serve(engine: &ModelEngine, users: usize, prompt: usize, answer: u32, adapters: &[Arc<Adapter>]) -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let jobs: Vec<Generate> = (0..users)
            .map(|user| Generate {
                prompt: tokens(prompt, user as u32),
                tenant: "bench".parse().expect("an id"),
                adapter: adapters.get(user).map(lease),
                params: SamplingParams {
                    max_tokens: answer,
                    temperature: 0.0,
                    ignore_eos: true,
                    ..SamplingParams::default()
                },
                deadline: None,
                group: None,
            })
            .collect();
        let submitted: Vec<_> =
            jobs.into_iter().map(|job| engine.submit(job).expect("it is taken")).collect();
        let (mut tokens, mut start) = (0u32, Instant::now());
        let whole = start;
        let mut first = true;
        for mut stream in submitted {
            while let Some(event) = stream.next().await {
                match event {
                    Event::Token(_) if first => {
                        // Decoding is measured from the first token on.
                        first = false;
                        if answer > 1 {
                            start = Instant::now();
                        }
                    }
                    Event::Token(_) => tokens += 1,
                    Event::Finished { .. } => {}
                    Event::Failed { reason, .. } => panic!("{reason}"),
                }
            }
        }
        if answer == 1 {
            prompt as f64 / whole.elapsed().as_secs_f64()
        } else {
            f64::from(tokens) / start.elapsed().as_secs_f64()
        }
    })
}

fn lease(adapter: &Arc<Adapter>) -> Lease {
    let id = AdapterId::new("bench".parse().expect("an id"), "user".parse().expect("an id"));
    Lease { id, generation: GenerationId::from_bytes([0; 32]), adapter: Arc::clone(adapter) }
}

/// A random rank-8 adapter.
fn adapter(base: &BaseModel, seed: u64, sites: &[Site]) -> Arc<Adapter> {
    let mut rng = StdRng::seed_from_u64(seed);
    let shape = base.shape();
    let mut random = |len: usize| (0..len).map(|_| rng.random_range(-0.01..0.01)).collect();
    let tensors = shape.site_ids().map(|id| {
        let (out, input) = shape.dims(id.site);
        sites.contains(&id.site).then(|| LoraTensors {
            rank: 8,
            scale: 1.0,
            a: random(8 * input),
            b: random(out * 8),
            ..LoraTensors::default()
        })
    });
    let names = sites.iter().map(|site| site.module().to_owned()).collect();
    let config = LoraConfig { target_modules: TargetModules::Names(names), ..LoraConfig::oppu() };
    let weights = LoraWeights { config, sites: tensors.collect() };
    Arc::new(Adapter::new(&weights, Precision::Fast))
}

/// Tokens per second of one optimiser step over 4 x 256 tokens.
fn training(base: &BaseModel) -> f64 {
    let example = |seed: u32| Example { tokens: tokens(257, seed), answer_start: 1 };
    let examples: Vec<Example> = (0..4).map(example).collect();
    let recipe = Recipe { epochs: 1, batch: 4, ..Recipe::oppu() };
    let start = Instant::now();
    let trained = train::train(base, None, &examples, &recipe, |_| ControlFlow::Continue(()));
    trained.expect("it trains").tokens as f64 / start.elapsed().as_secs_f64()
}

fn status_mib(field: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse::<f64>().ok());
    kib.unwrap_or(f64::NAN) / 1024.0
}

fn resident_mib() -> f64 {
    status_mib("VmRSS:")
}

fn peak_mib() -> f64 {
    status_mib("VmHWM:")
}
