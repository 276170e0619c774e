//! Gradients and optimiser steps of every kind against HF peft and torch in float32 (fixtures: `tests/reference`).
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kernels::{Products, Span};
use model::{BaseModel, LoadOptions, PackedPass, load};
use peft::{Adapter, AdapterBatch, AdapterConfig, AdapterWeights, Ia3Scale, LoraConfig, TargetModules};
use types::{Example, Site, SiteId};

use crate::buffers::Pool;
use crate::evaluate::{Loss, evaluate};
use crate::optimiser::Adam;
use crate::recipe::Recipe;
use crate::run::Run;
use crate::trainer::{TrainJob, step, train};

/// Bases with what was trained on them by torch: biases of q, k and v (Qwen2), norms of queries and keys (Qwen3) and a
/// window (Mistral) have a way back of their own.
const BASES: [(&str, &[&str]); 4] = [
    (
        "tiny-llama",
        &[
            "lora-qv",
            "lora-all",
            "lora-patterns",
            "lora-rslora",
            "lora-layers",
            "lora-bias",
            "dora",
            "ia3",
            "prompt",
        ],
    ),
    ("tiny-qwen2", &["lora-all", "dora", "prompt"]),
    ("tiny-qwen3", &["lora-all", "dora", "prompt"]),
    ("tiny-mistral", &["lora-all"]),
];

fn fixture(base: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(base)
}

pub(crate) fn base(name: &str) -> BaseModel {
    load(&fixture(name), LoadOptions::default()).unwrap().model
}

/// Every base, with the names of its own and an adapter's, by turns.
fn each(mut check: impl FnMut(&BaseModel, &str, &str)) {
    for (name, kinds) in BASES {
        let base = base(name);
        kinds.iter().for_each(|kind| check(&base, name, kind));
    }
}

struct Setup {
    start: AdapterWeights,
    examples: Vec<Example>,
    recipe: Recipe,
    tensors: HashMap<String, Tensor>,
    json: serde_json::Value,
}

fn setup(base: &BaseModel, name: &str, kind: &str) -> Setup {
    let read = |file: &str| std::fs::read(fixture(name).join(kind).join(file)).unwrap();
    let start = AdapterWeights::parse(
        &read("adapter_config.json"),
        &read("adapter_model.safetensors"),
        &base.shape(),
    )
    .unwrap();
    let folder = fixture(name).join(format!("train-{kind}"));
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
    let [beta1, beta2] = serde_json::from_value(json["betas"].clone()).unwrap();
    let adam = Adam { beta1, beta2, epsilon: json["epsilon"].as_f64().unwrap() };
    let recipe = Recipe { adapter, epochs: 50, batch: 2, learning_rate, adam, ..Recipe::oppu() };
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

/// Every tensor of an adapter beside the fixture's, which has no other.
fn side_by_side(
    ours: &AdapterWeights,
    base: &BaseModel,
    theirs: &HashMap<String, Tensor>,
) -> Vec<(Vec<f32>, Vec<f32>)> {
    let ours = named(ours, base);
    let others = theirs.keys().filter(|name| !["input_ids", "labels", "loss"].contains(&name.as_str()));
    assert_eq!(ours.len(), others.count());
    let beside = |(name, ours): (String, Vec<f32>)| {
        let (_, tensor) = theirs.iter().find(|(full, _)| full.ends_with(name.as_str())).unwrap();
        (ours, values(tensor))
    };
    ours.into_iter().map(beside).collect()
}

/// The largest difference of any tensor from the fixture's.
fn difference(ours: &AdapterWeights, base: &BaseModel, theirs: &HashMap<String, Tensor>) -> f32 {
    let pairs = side_by_side(ours, base, theirs);
    pairs.iter().fold(0.0, |largest, (ours, theirs)| largest.max(worst(ours, theirs)))
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
    each(|base, name, kind| {
        let Setup { start, mut examples, recipe, tensors, .. } = setup(base, name, kind);
        // In one pass and in two; all kept for the way back, and nothing.
        for (micro_batch_tokens, activation_bytes) in [(1, 1 << 30), (1000, 1 << 30), (1000, 0)] {
            let recipe = Recipe { micro_batch_tokens, activation_bytes, ..recipe.clone() };
            let (loss, grads) = gradients(base, &recipe, &start, &examples);
            let expected = values(&tensors["loss"])[0];
            assert!((loss as f32 - expected).abs() < 1e-5, "{name} {kind}: {loss} instead of {expected}");
            let difference = difference(&grads, base, &tensors);
            assert!(difference < 1e-5, "{name} {kind}, passes of {micro_batch_tokens} rows: {difference}");
        }
        // Negative control: one input token changed must show.
        examples[0].tokens[0] ^= 1;
        let (_, grads) = gradients(base, &recipe, &start, &examples);
        assert!(difference(&grads, base, &tensors) > 1e-4, "{name} {kind}: a changed token does not show");
    });
}

/// With dropout, whose masks the fixture's script draws as this crate does: DoRA's share of the frozen product reads the
/// thinned input, too.
#[test]
fn gradients_with_dropout_equal_torch() {
    let kinds = BASES.into_iter().flat_map(|(name, kinds)| kinds.iter().map(move |kind| (name, *kind)));
    let mut seen = 0;
    for (name, kind) in kinds.filter(|(_, kind)| ["lora-all", "dora"].contains(kind)) {
        let base = base(name);
        let Setup { start, examples, mut recipe, .. } = setup(&base, name, kind);
        let file = fixture(name).join(format!("train-{kind}/dropout.safetensors"));
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let with = |recipe: &mut Recipe, share: f64| match &mut recipe.adapter {
            AdapterConfig::Lora(lora) => lora.dropout = share,
            _ => unreachable!("{kind}"),
        };
        with(&mut recipe, 0.25);
        for (micro_batch_tokens, activation_bytes) in [(1, 1 << 30), (1000, 1 << 30), (1000, 0)] {
            let recipe = Recipe { micro_batch_tokens, activation_bytes, ..recipe.clone() };
            let (loss, grads) = gradients(&base, &recipe, &start, &examples);
            let expected = values(&tensors["loss"])[0];
            assert!((loss as f32 - expected).abs() < 1e-5, "{name} {kind}: {loss} instead of {expected}");
            let difference = difference(&grads, &base, &tensors);
            assert!(difference < 1e-5, "{name} {kind}, passes of {micro_batch_tokens} rows: {difference}");
        }
        // Negative controls: no dropout, and other masks.
        for (seed, share) in [(0, 0.0), (1, 0.25)] {
            with(&mut recipe, share);
            let (_, grads) = gradients(&base, &Recipe { seed, ..recipe.clone() }, &start, &examples);
            assert!(
                difference(&grads, &base, &tensors) > 1e-4,
                "{name} {kind}: {seed}, {share} does not show"
            );
        }
        seen += 1;
    }
    assert_eq!(seen, 7);
}

/// Rounding the factors of the frozen products to bfloat16 moves loss and gradients by what eight bits can, and no
/// more.
#[test]
fn gradients_in_bfloat16_are_near_torchs() {
    let share = |grads: &AdapterWeights, base: &BaseModel, theirs: &HashMap<String, Tensor>| {
        let (mut off, mut all) = (0.0, 0.0);
        for (ours, theirs) in side_by_side(grads, base, theirs) {
            assert_eq!(ours.len(), theirs.len());
            for (ours, theirs) in ours.iter().zip(theirs) {
                off += f64::from(ours - theirs).powi(2);
                all += f64::from(theirs).powi(2);
            }
        }
        (off / all).sqrt()
    };
    each(|base, name, kind| {
        let Setup { start, examples, recipe, tensors, .. } = setup(base, name, kind);
        let bf16 = Recipe { products: Products::Bf16, ..recipe.clone() };
        let (loss, grads) = gradients(base, &bf16, &start, &examples);
        let expected = f64::from(values(&tensors["loss"])[0]);
        assert!((loss / expected - 1.0).abs() < 2e-3, "{name} {kind}: {loss} instead of {expected}");
        let rounded = share(&grads, base, &tensors);
        assert!((2e-3..4e-2).contains(&rounded), "{name} {kind}: off by {rounded} of its length");
        let exact = share(&gradients(base, &recipe, &start, &examples).1, base, &tensors);
        assert!(exact < 1e-4, "{name} {kind}: float32 is off by {exact}");
    });
}

#[test]
fn fifty_steps_of_every_kind_equal_torch() {
    each(|base, name, kind| {
        let Setup { start, examples, recipe, json, .. } = setup(base, name, kind);
        let run = |recipe: &Recipe| {
            train(base, Some(&start), &examples, recipe, |_| ControlFlow::Continue(())).unwrap()
        };
        let trained = run(&recipe);
        let expected: Vec<f64> = serde_json::from_value(json["losses"].clone()).unwrap();
        assert_eq!((trained.losses.len(), expected.len()), (50, 50));
        for (step, (ours, expected)) in trained.losses.iter().zip(&expected).enumerate() {
            assert!((ours - expected).abs() < 1e-4, "{name} {kind}, step {step}: {ours}, not {expected}");
        }
        // Negative control: other numbers of the optimiser must show.
        let Adam { beta1, beta2, epsilon } = recipe.adam;
        for other in [
            Recipe { weight_decay: 0.5, ..recipe.clone() },
            Recipe { adam: Adam { beta1: beta1 - 0.1, ..recipe.adam }, ..recipe.clone() },
            Recipe { adam: Adam { beta2: beta2 - 0.1, ..recipe.adam }, ..recipe.clone() },
            Recipe { adam: Adam { epsilon: epsilon * 1e4, ..recipe.adam }, ..recipe.clone() },
        ] {
            let losses = run(&other).losses;
            let apart = losses.iter().zip(&expected).any(|(ours, expected)| (ours - expected).abs() > 1e-4);
            assert!(apart, "{name} {kind}: {other:?} does not show");
        }
        if (name, kind) != ("tiny-llama", "lora-qv") {
            return;
        }
        let last = fixture(name).join("train-lora-qv/train.safetensors");
        let last = candle_core::safetensors::load(last, &Device::Cpu).unwrap();
        let difference = difference(&trained.weights, base, &last);
        assert!(difference < 1e-4, "weights after the last step: {difference}");
        let losses = evaluate(base, &[Some(&trained.weights)], &examples, 100, 1000, &mut || ()).unwrap();
        let losses: Vec<Loss> = losses.into_iter().flatten().flatten().collect();
        let tokens = losses.iter().map(|loss| loss.tokens).sum::<usize>() as f64;
        let nats = losses.iter().map(|loss| loss.nats).sum::<f64>() / tokens;
        let expected = json["loss_after_last_step"].as_f64().unwrap();
        assert!((nats - expected).abs() < 1e-4, "{nats} instead of {expected}");
        assert!((Loss::bits_per_token(&losses) - expected / std::f64::consts::LN_2).abs() < 2e-4);
    });
}

/// Negative control: a base without what sets it apart has other gradients.
#[test]
fn what_sets_a_base_apart_is_seen_by_the_comparison() {
    let speciality: [(&str, &str, f64); 3] =
        [("tiny-qwen2", "bias", 0.0), ("tiny-qwen3", "_norm.weight", 1.0), ("tiny-mistral", "window", 0.0)];
    for (name, part, value) in speciality {
        let folder = tempfile::tempdir().unwrap();
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
        if part == "window" {
            config["sliding_window"] = serde_json::Value::Null;
        }
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let weights = fixture(name).join("model.safetensors");
        let mut weights = candle_core::safetensors::load(weights, &Device::Cpu).unwrap();
        for (_, tensor) in weights.iter_mut().filter(|(tensor, _)| tensor.ends_with(part)) {
            *tensor = Tensor::full(value as f32, tensor.shape(), &Device::Cpu).unwrap();
        }
        candle_core::safetensors::save(&weights, folder.path().join("model.safetensors")).unwrap();
        let other = load(folder.path(), LoadOptions::default()).unwrap().model;
        let Setup { start, examples, recipe, tensors, .. } = setup(&other, name, "lora-all");
        let (_, grads) = gradients(&other, &recipe, &start, &examples);
        let difference = difference(&grads, &other, &tensors);
        assert!(difference > 1e-3, "{name}: {difference}");
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
        base.head().product(Products::F32, &hidden[row * config.hidden..][..config.hidden], &mut logits);
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        sum.ln() - f64::from(logits[example.tokens[at] as usize])
    };
    (example.answer_start..example.tokens.len()).map(loss).sum()
}

/// Two sequences of a base's own, and one that begins as the first does.
fn examples(name: &str) -> Vec<Example> {
    let tensors = candle_core::safetensors::load(fixture(name).join("logits.safetensors"), &Device::Cpu);
    let ids: Vec<Vec<u32>> = tensors.unwrap()["input_ids"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let longer = [&ids[0][..], &[5, 6]].concat();
    let starts = [8, 14, 8];
    ids.into_iter()
        .chain([longer])
        .zip(starts)
        .map(|(tokens, answer_start)| Example { tokens, answer_start })
        .collect()
}

/// What three steps at a high rate make of a fresh adapter on all sites.
fn learnt(base: &BaseModel, use_dora: bool, examples: &[Example]) -> AdapterWeights {
    let target_modules = TargetModules::names(&Site::ALL.map(Site::module));
    let lora = LoraConfig { use_dora, target_modules, ..LoraConfig::oppu() };
    let recipe = Recipe {
        adapter: AdapterConfig::Lora(lora),
        epochs: 3,
        learning_rate: 0.1,
        warmup_ratio: 0.0,
        ..Recipe::oppu()
    };
    train(base, None, examples, &recipe, |_| ControlFlow::Continue(())).unwrap().weights
}

/// Every base alone and with adapters of all kinds in the same passes, examples with and without common beginnings: what
/// the gate sees is what is served.
#[test]
fn losses_are_those_of_serving() {
    for name in ["tiny-llama", "tiny-llama-tied", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"] {
        let base = base(name);
        let examples = examples(name);
        let kinds = BASES.iter().filter(|(of, _)| *of == name).flat_map(|(_, kinds)| *kinds);
        let mut all: Vec<AdapterWeights> = kinds.map(|kind| setup(&base, name, kind).start).collect();
        all.extend([false, true].map(|use_dora| learnt(&base, use_dora, &examples)));
        let weights: Vec<Option<&AdapterWeights>> =
            std::iter::once(None).chain(all.iter().map(Some)).collect();
        for micro_batch_tokens in [1, 64, 1000] {
            let losses = evaluate(&base, &weights, &examples, 100, micro_batch_tokens, &mut || ()).unwrap();
            assert_eq!(losses.len(), weights.len());
            for (weights, losses) in weights.iter().zip(&losses) {
                let build =
                    |weights| Arc::new(Adapter::build(weights, &base, peft::Precision::Exact).unwrap());
                let adapter = weights.map(build);
                assert_eq!(losses.len(), examples.len());
                for (example, loss) in examples.iter().zip(losses) {
                    let loss = loss.unwrap();
                    let served = served(&base, adapter.as_ref(), example);
                    assert!((loss.nats - served).abs() < 1e-4, "{name}: {} instead of {served}", loss.nats);
                    assert_eq!(loss.tokens, example.tokens.len() - example.answer_start);
                }
            }
            // Negative control: adapters and examples are told apart.
            let differ = |a: &[Option<Loss>], b: &[Option<Loss>]| {
                let mut pairs = a.iter().flatten().zip(b.iter().flatten());
                pairs.all(|(a, b)| (a.nats - b.nats).abs() > 1e-3)
            };
            assert!(differ(&losses[0], &losses[1]) && differ(&losses[1], &losses[2]), "{name}");
            // One whose answer begins too late has none; the others have theirs.
            let shortest = examples.iter().map(|example| example.answer_start).min().unwrap();
            let cut =
                evaluate(&base, &weights, &examples, shortest + 1, micro_batch_tokens, &mut || ()).unwrap();
            for losses in &cut {
                let late = |(example, loss): (&Example, &Option<Loss>)| {
                    loss.is_some() == (example.answer_start <= shortest)
                };
                assert!(examples.iter().zip(losses).all(late), "{name}: {losses:?}");
                assert!(losses.contains(&None), "{name}: all begin alike");
            }
        }
        let beyond = [Example { tokens: vec![1, 1 << 30, 2], answer_start: 1 }];
        assert!(evaluate(&base, &[None], &beyond, 100, 64, &mut || ()).is_err());
    }
}
