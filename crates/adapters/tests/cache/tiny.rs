//! The tiny model with adapters that force one token each.

use std::sync::{Arc, OnceLock};

use engine::{Engine, Event, Generate, ModelEngine, SampledToken, Settings, SubmitError, TokenStream};
use model::{BaseModel, KvPool};
use peft::{
    AdapterWeights, Lease, LoraConfig, LoraTensors, LoraWeights, Precision, TargetModules, generation_id,
};
use safetensors::SafeTensors;
use serde_json::json;
use store::{NewGeneration, Store};
use testkit::{fixture, tiny_model};
use types::{AdapterId, GenerationId, SamplingParams, Site, SiteId};

pub(crate) const PRECISION: Precision = Precision::Fast;

pub(crate) fn base() -> Arc<BaseModel> {
    static BASE: OnceLock<Arc<BaseModel>> = OnceLock::new();
    Arc::clone(BASE.get_or_init(|| tiny_model().0))
}

pub(crate) fn engine() -> ModelEngine {
    engine_that(true)
}

/// An engine that keeps the beginnings of prompts for others, or does not.
pub(crate) fn engine_that(prefix_cache: bool) -> ModelEngine {
    let settings = Settings {
        batch: 16,
        queue: 64,
        step_tokens: 96,
        kv_bytes: 200 * KvPool::block_bytes(base().config(), PRECISION),
        prefix_cache,
        guest_floor: 0.2,
        threads: 1,
        precision: PRECISION,
        eos: vec![],
    };
    ModelEngine::start(base(), settings).unwrap()
}

pub(crate) fn generate(lease: &Lease, prompt: Vec<u32>, max_tokens: u32) -> Generate {
    job(Some(lease.clone()), prompt, max_tokens)
}

/// As [`generate`], of the base without a lease.
pub(crate) fn job(adapter: Option<Lease>, prompt: Vec<u32>, max_tokens: u32) -> Generate {
    let params = SamplingParams {
        max_tokens,
        temperature: 0.0,
        ignore_eos: true,
        logprobs: Some(5),
        ..SamplingParams::default()
    };
    Generate { prompt, tenant: "tenant".parse().unwrap(), adapter, params, deadline: None, group: None }
}

/// Hands a sequence in as soon as there is room for it.
pub(crate) async fn submit(engine: &ModelEngine, job: Generate) -> TokenStream {
    loop {
        match engine.submit(job.clone()) {
            Ok(stream) => return stream,
            Err(SubmitError::Busy { .. }) => tokio::time::sleep(std::time::Duration::from_millis(1)).await,
            Err(error) => panic!("{error}"),
        }
    }
}

/// A token with its most likely alternatives and the bits of their log-probabilities.
pub(crate) type Seen = (u32, Vec<(u32, u32)>);

pub(crate) fn seen(token: &SampledToken) -> Seen {
    (token.id, token.top.iter().map(|(id, p)| (*id, p.to_bits())).collect())
}

/// All tokens of an answer.
pub(crate) async fn answer(engine: &ModelEngine, job: Generate) -> Vec<Seen> {
    let mut stream = submit(engine, job).await;
    let mut tokens = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            Event::Token(token) => tokens.push(seen(&token)),
            Event::Finished { .. } => {}
            Event::Failed { reason, .. } => panic!("{reason}"),
        }
    }
    tokens
}

/// The rows of a matrix of the fixture.
fn rows(name: &str, width: usize) -> Vec<Vec<f32>> {
    let file = std::fs::read(fixture("tiny-llama/model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let values: Vec<f32> = tensors
        .tensor(name)
        .unwrap()
        .data()
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    values.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Tokens that an adapter can force, each with the final hidden state that makes it by far the most likely.
pub(crate) fn targets() -> &'static [(u32, Vec<f32>)] {
    static TARGETS: OnceLock<Vec<(u32, Vec<f32>)>> = OnceLock::new();
    TARGETS.get_or_init(|| {
        let (_, width) = base().shape().dims(Site::Q);
        let head = rows("lm_head.weight", width);
        let norm = rows("model.norm.weight", width).concat();
        let strong = |(token, own): (usize, &Vec<f32>)| {
            let length = dot(own, own).sqrt();
            let rival = |other: &Vec<f32>| dot(own, other) / length;
            let rivals = head.iter().enumerate().filter(|(other, _)| *other != token);
            let next = rivals.map(|(_, other)| rival(other)).fold(f32::MIN, f32::max);
            (length > 1.2 * next).then(|| {
                let direction = own.iter().zip(&norm).map(|(own, norm)| own / norm / length * 8.0);
                (token as u32, direction.collect())
            })
        };
        head.iter().enumerate().filter_map(strong).collect()
    })
}

/// An adapter of this rank that forces the target, whatever the prompt.
///
/// In the last block, pairs of gate and up units get c and -c, where c is a product with the input: silu(c) c is c
/// squared for one of the two, so their sum is positive always. The way down adds the target's hidden state as often.
///
/// In the first block it changes keys and values, each target in its own way: nothing that depends on them is another's.
pub(crate) fn marker(target: usize, rank: usize) -> LoraWeights {
    let shape = base().shape();
    let sites = r".*\.(mlp\.(gate|up|down)_proj|layers\.0\.self_attn\.[kv]_proj)";
    let config = LoraConfig {
        r: rank,
        alpha: rank as f64,
        target_modules: TargetModules::Pattern(sites.to_owned()),
        ..LoraConfig::oppu()
    };
    let mut sites = vec![None; shape.sites()];
    for (id, rank, scale) in config.sites(&shape).unwrap() {
        let (out, input) = shape.dims(id.site);
        let (a, b) = (vec![0.0; rank * input], vec![0.0; out * rank]);
        sites[id.index()] = Some(LoraTensors { rank, scale, a, b, ..LoraTensors::default() });
    }
    for site in [Site::K, Site::V] {
        let Some(tensors) = &mut sites[SiteId::new(0, site).index()] else { panic!("it is targeted") };
        for (at, value) in tensors.a.iter_mut().chain(&mut tensors.b).enumerate() {
            *value = ((at * 7919 + target * 6151 + site.index()) % 101) as f32 / 101.0 - 0.5;
        }
    }
    let last = shape.layers - 1;
    for site in [Site::Gate, Site::Up] {
        let Some(tensors) = &mut sites[SiteId::new(last, site).index()] else { panic!("it is targeted") };
        for (at, a) in tensors.a.iter_mut().enumerate() {
            *a = ((at * 7919 + 13) % 101) as f32 / 101.0 - 0.5;
        }
        for unit in 0..8 {
            tensors.b[unit * rank + unit / 2] = if unit % 2 == 0 { 30.0 } else { -30.0 };
        }
    }
    let Some(down) = &mut sites[SiteId::new(last, Site::Down).index()] else { panic!("it is targeted") };
    down.a[..8].fill(1.0);
    for (row, value) in targets()[target].1.iter().enumerate() {
        down.b[row * rank] = value * 4.0;
    }
    LoraWeights { config, sites }
}

pub(crate) fn generation(weights: LoraWeights) -> NewGeneration {
    let base = base();
    let files = AdapterWeights::from(weights).to_files(&base.shape(), "tiny").unwrap();
    NewGeneration {
        id: generation_id(base.hash(), &files.config, &files.weights),
        parent: None,
        base: *base.hash(),
        config: files.config.into(),
        weights: files.weights.into(),
        meta: json!({}),
    }
}

pub(crate) async fn publish(
    store: &Store,
    id: &AdapterId,
    weights: LoraWeights,
    expected: Option<GenerationId>,
) -> GenerationId {
    store.publish(id, generation(weights), expected, None).await.unwrap().id
}
