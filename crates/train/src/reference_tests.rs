//! Gradients and optimiser steps of every kind against HF peft and torch in float32 (fixtures: `tests/reference`).
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kernels::Span;
use model::{BaseModel, LoadOptions, PackedPass, load};
use peft::{Adapter, AdapterBatch, AdapterConfig, AdapterWeights, Ia3Scale};
use types::{Example, SiteId};

use crate::buffers::Pool;
use crate::evaluate::{Loss, evaluate};
use crate::recipe::Recipe;
use crate::run::Run;
use crate::trainer::{TrainJob, step, train};

const KINDS: [&str; 9] = [
    "lora-qv",
    "lora-all",
    "lora-patterns",
    "lora-rslora",
    "lora-layers",
    "lora-bias",
    "dora",
    "ia3",
    "prompt",
];

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama").join(path)
}

pub(crate) fn base() -> BaseModel {
    load(&fixture(""), LoadOptions::default()).unwrap().model
}

struct Setup {
    start: AdapterWeights,
    examples: Vec<Example>,
    recipe: Recipe,
    tensors: HashMap<String, Tensor>,
    json: serde_json::Value,
}

fn setup(base: &BaseModel, kind: &str) -> Setup {
    let read = |file: &str| std::fs::read(fixture(kind).join(file)).unwrap();
    let start = AdapterWeights::parse(
        &read("adapter_config.json"),
        &read("adapter_model.safetensors"),
        &base.shape(),
    )
    .unwrap();
    let folder = fixture(&format!("train-{kind}"));
    let tensors = candle_core::safetensors::load(folder.join("grads.safetensors"), &Device::Cpu).unwrap();
    let ids: Vec<Vec<u32>> = tensors["input_ids"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let labels: Vec<Vec<i64>> = tensors["labels"].to_vec2().unwrap();
    let example = |(tokens, labels): (Vec<u32>, Vec<i64>)| {
        let answer_start = labels.iter().position(|label| *label >= 0).unwrap();
        assert!(labels[answer_start..].iter().all(|label| *label >= 0));
        Example { tokens, answer_start }
    };
    let examples = ids.into_iter().zip(labels).map(example).collect();
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("train.json")).unwrap()).unwrap();
    let mut adapter = start.config();
    if let AdapterConfig::Lora(lora) = &mut adapter {
        lora.dropout = 0.0;
    }
    let learning_rate = json["learning_rate"].as_f64().unwrap();
    let recipe = Recipe { adapter, epochs: 50, batch: 2, learning_rate, ..Recipe::oppu() };
    Setup { start, examples, recipe, tensors, json }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Every tensor of an adapter with the end of its name in peft's files.
fn named(weights: &AdapterWeights, base: &BaseModel) -> Vec<(String, Vec<f32>)> {
    let path = |id: SiteId, which: &str| format!("{}.{which}", id.module_path());
    let ids = || base.shape().site_ids().collect::<Vec<_>>().into_iter();
    match weights {
        AdapterWeights::Lora(lora) => ids()
            .zip(&lora.sites)
            .filter_map(|(id, site)| site.as_ref().map(|site| (id, site)))
            .flat_map(|(id, site)| {
                let mut all = vec![
                    (path(id, "lora_A.weight"), site.a.clone()),
                    (path(id, "lora_B.weight"), site.b.clone()),
                ];
                all.extend(site.bias.clone().map(|bias| (path(id, "lora_B.bias"), bias)));
                all.extend(site.magnitude.clone().map(|m| (path(id, "lora_magnitude_vector"), m)));
                all
            })
            .collect(),
        AdapterWeights::Ia3(ia3) => ids()
            .zip(&ia3.sites)
            .filter_map(|(id, site)| {
                let (Ia3Scale::Output(scale) | Ia3Scale::Input(scale)) = site.as_ref()?;
                Some((path(id, "ia3_l"), scale.clone()))
            })
            .collect(),
        AdapterWeights::Prompt(prompt) => vec![("prompt_embeddings".into(), prompt.embeddings.clone())],
    }
}

/// The largest difference of any tensor from the fixture's, which has no other.
fn difference(ours: &AdapterWeights, base: &BaseModel, theirs: &HashMap<String, Tensor>) -> f32 {
    let ours = named(ours, base);
    let others = theirs.keys().filter(|name| !["input_ids", "labels", "loss"].contains(&name.as_str()));
    assert_eq!(ours.len(), others.count());
    ours.iter().fold(0.0, |largest, (name, ours)| {
        let (_, tensor) = theirs.iter().find(|(full, _)| full.ends_with(name.as_str())).unwrap();
        largest.max(worst(ours, &values(tensor)))
    })
}

/// Loss and gradients of the first step.
pub(crate) fn gradients(
    base: &BaseModel,
    recipe: &Recipe,
    start: &AdapterWeights,
    examples: &[Example],
) -> (f64, AdapterWeights) {
    let job = TrainJob { recipe, start: Some(start), examples, resume: None };
    let mut runs = [(0, Run::new(base, &job).unwrap())];
    step(base, &mut Pool::default(), &mut runs, &mut || ());
    runs[0].1.gradients()
}

#[test]
fn gradients_of_every_kind_equal_torch() {
    let base = base();
    for kind in KINDS {
        let Setup { start, mut examples, recipe, tensors, .. } = setup(&base, kind);
        // In one pass and in two; all kept for the way back, and nothing.
        for (micro_batch_tokens, activation_bytes) in [(1, 1 << 30), (1000, 1 << 30), (1000, 0)] {
            let recipe = Recipe { micro_batch_tokens, activation_bytes, ..recipe.clone() };
            let (loss, grads) = gradients(&base, &recipe, &start, &examples);
            let expected = values(&tensors["loss"])[0];
            assert!((loss as f32 - expected).abs() < 1e-5, "{kind}: {loss} instead of {expected}");
            let difference = difference(&grads, &base, &tensors);
            assert!(difference < 1e-5, "{kind}, passes of {micro_batch_tokens} rows: {difference}");
        }
        // Negative control: one input token changed must show.
        examples[0].tokens[0] ^= 1;
        let (_, grads) = gradients(&base, &recipe, &start, &examples);
        assert!(difference(&grads, &base, &tensors) > 1e-4, "{kind}: a changed token does not show");
    }
}

#[test]
fn fifty_steps_of_every_kind_equal_torch() {
    let base = base();
    for kind in KINDS {
        let Setup { start, examples, recipe, json, .. } = setup(&base, kind);
        let trained = train(&base, Some(&start), &examples, &recipe, |_| ControlFlow::Continue(())).unwrap();
        let expected: Vec<f64> = serde_json::from_value(json["losses"].clone()).unwrap();
        assert_eq!((trained.losses.len(), expected.len()), (50, 50));
        for (step, (ours, expected)) in trained.losses.iter().zip(&expected).enumerate() {
            assert!((ours - expected).abs() < 1e-4, "{kind}, step {step}: {ours} instead of {expected}");
        }
        // Negative control: another decay must show.
        let other = Recipe { weight_decay: 0.5, ..recipe };
        let other = train(&base, Some(&start), &examples, &other, |_| ControlFlow::Continue(())).unwrap();
        let apart = other.losses.iter().zip(&expected).any(|(ours, expected)| (ours - expected).abs() > 1e-4);
        assert!(apart, "{kind}: another weight decay does not show");
        if kind != "lora-qv" {
            continue;
        }
        let last = fixture("train-lora-qv/train.safetensors");
        let last = candle_core::safetensors::load(last, &Device::Cpu).unwrap();
        let difference = difference(&trained.weights, &base, &last);
        assert!(difference < 1e-4, "weights after the last step: {difference}");
        let losses = evaluate(&base, &[Some(&trained.weights)], &examples, 100, 1000, &mut || ()).unwrap();
        let tokens = losses[0].iter().map(|loss| loss.tokens).sum::<usize>() as f64;
        let nats = losses[0].iter().map(|loss| loss.nats).sum::<f64>() / tokens;
        let expected = json["loss_after_last_step"].as_f64().unwrap();
        assert!((nats - expected).abs() < 1e-4, "{nats} instead of {expected}");
        assert!((Loss::bits_per_token(&losses[0]) - expected / std::f64::consts::LN_2).abs() < 2e-4);
    }
}

/// The loss of an example's answer by the path of serving, in float32.
fn served(base: &BaseModel, adapter: Option<&Arc<Adapter>>, example: &Example) -> f64 {
    let config = base.config();
    let before = adapter.map_or(0, |adapter| adapter.virtual_tokens());
    let own = (config.vocab..config.vocab + before).map(|id| id as u32);
    let tokens: Vec<u32> = own.chain(example.tokens[..example.tokens.len() - 1].iter().copied()).collect();
    let positions: Vec<u32> = (0..tokens.len() as u32).collect();
    let spans = [Span { first: 0, len: tokens.len() }];
    let adapters = AdapterBatch::new((0..tokens.len()).map(|_| adapter));
    let mut pass = PackedPass { spans: &spans, adapters: &adapters, config };
    let hidden = base.hidden(&tokens, &positions, &mut pass).unwrap();
    let hidden: Vec<f32> = hidden.flatten_all().unwrap().to_vec1().unwrap();
    let loss = |at: usize| {
        let row = before + at - 1;
        let mut logits = vec![0.0; config.vocab];
        base.head().product(&hidden[row * config.hidden..][..config.hidden], &mut logits);
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        sum.ln() - f64::from(logits[example.tokens[at] as usize])
    };
    (example.answer_start..example.tokens.len()).map(loss).sum()
}

/// Base and all kinds of adapters in the same passes, examples with and without common beginnings: what the gate sees is
/// what is served.
#[test]
fn losses_are_those_of_serving() {
    let base = base();
    let mut setups: Vec<Setup> = KINDS.iter().map(|kind| setup(&base, kind)).collect();
    let mut examples = std::mem::take(&mut setups[0].examples);
    examples.truncate(3);
    let first = examples[0].clone();
    examples.push(Example { tokens: [&first.tokens[..], &[5, 6]].concat(), ..first });
    let weights: Vec<Option<&AdapterWeights>> =
        std::iter::once(None).chain(setups.iter().map(|setup| Some(&setup.start))).collect();
    for micro_batch_tokens in [1, 64, 1000] {
        let losses = evaluate(&base, &weights, &examples, 100, micro_batch_tokens, &mut || ()).unwrap();
        assert_eq!(losses.len(), weights.len());
        for (weights, losses) in weights.iter().zip(&losses) {
            let build = |weights| Arc::new(Adapter::build(weights, &base, peft::Precision::Exact).unwrap());
            let adapter = weights.map(build);
            assert_eq!(losses.len(), examples.len());
            for (example, loss) in examples.iter().zip(losses) {
                let served = served(&base, adapter.as_ref(), example);
                assert!((loss.nats - served).abs() < 1e-4, "{} instead of {served}", loss.nats);
                assert_eq!(loss.tokens, example.tokens.len() - example.answer_start);
            }
        }
        // Negative control: adapters and examples are told apart.
        let differ = |a: &[Loss], b: &[Loss]| a.iter().zip(b).all(|(a, b)| (a.nats - b.nats).abs() > 1e-3);
        assert!(differ(&losses[0], &losses[1]) && differ(&losses[1], &losses[2]));
    }
    let beyond = [Example { tokens: vec![1, 1 << 30, 2], answer_start: 1 }];
    assert!(evaluate(&base, &[None], &beyond, 100, 64, &mut || ()).is_err());
}
