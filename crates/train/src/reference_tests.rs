//! Gradients and optimiser steps against HF peft and torch in float32 (fixture: `tests/reference`).
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use model::{BaseModel, LoadOptions, load};
use peft::{Adapter, LoraWeights};
use types::{Example, Site, SiteId};

use crate::evaluate::{Loss, evaluate};
use crate::pack::Pack;
use crate::recipe::Recipe;
use crate::trainer::{gradients, train, vars_of};

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama").join(path)
}

fn tensors(path: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture(path), &Device::Cpu).unwrap()
}

struct Setup {
    base: BaseModel,
    start: LoraWeights,
    examples: Vec<Example>,
    recipe: Recipe,
}

fn setup() -> Setup {
    let base = load(&fixture(""), LoadOptions::default()).unwrap().model;
    let read = |file: &str| std::fs::read(fixture("lora-qv").join(file)).unwrap();
    let start =
        LoraWeights::parse(&read("adapter_config.json"), &read("adapter_model.safetensors"), &base.shape())
            .unwrap();
    let batch = tensors("train-lora-qv/grads.safetensors");
    let ids: Vec<Vec<u32>> = batch["input_ids"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let labels: Vec<Vec<i64>> = batch["labels"].to_vec2().unwrap();
    let example = |(tokens, labels): (Vec<u32>, Vec<i64>)| {
        let answer_start = labels.iter().position(|label| *label >= 0).unwrap();
        let end = labels.iter().rposition(|label| *label >= 0).unwrap() + 1;
        assert!(labels[answer_start..end].iter().all(|label| *label >= 0));
        Example { tokens: tokens[..end].to_vec(), answer_start }
    };
    let examples = ids.into_iter().zip(labels).map(example).collect();
    let mut recipe = Recipe { epochs: 20, batch: 2, learning_rate: 1e-3, ..Recipe::oppu() };
    recipe.lora.dropout = 0.0;
    Setup { base, start, examples, recipe }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The fixture's tensor whose name ends in the site's path and `lora_A` or `lora_B`.
fn named<'a>(tensors: &'a HashMap<String, Tensor>, id: SiteId, which: &str) -> &'a Tensor {
    let path = id.module_path();
    let is = |name: &&String| name.contains(&path) && name.contains(&format!("lora_{which}"));
    &tensors[tensors.keys().find(is).unwrap()]
}

/// The largest difference of any gradient from the fixture's, with examples packed in rows of `limit`.
fn gradient_difference(setup: &Setup, limit: usize) -> f32 {
    let expected = tensors("train-lora-qv/grads.safetensors");
    let sites = vars_of(&setup.start, &setup.base).unwrap();
    let vars: Vec<Var> = sites.iter().flatten().flat_map(|s| [s.a.clone(), s.b.clone()]).collect();
    let packs = Pack::all(&setup.examples, 100, limit);
    let (loss, grads) = gradients(&setup.base, &sites, &vars, &packs, &setup.recipe, 0).unwrap();
    let expected_loss = values(&expected["loss"])[0];
    assert!((loss as f32 - expected_loss).abs() < 1e-5, "{loss} instead of {expected_loss}");
    let mut largest = 0.0f32;
    for layer in 0..setup.base.config().layers {
        for site in [Site::Q, Site::V] {
            let id = SiteId::new(layer, site);
            let vars = sites[id.index()].as_ref().unwrap();
            for (var, which) in [(&vars.a, "A"), (&vars.b, "B")] {
                let ours = values(grads.get(var).unwrap());
                largest = largest.max(worst(&ours, &values(named(&expected, id, which))));
            }
        }
    }
    largest
}

#[test]
fn gradients_equal_torch() {
    let mut setup = setup();
    for limit in [1, 1000] {
        let difference = gradient_difference(&setup, limit);
        assert!(difference < 1e-5, "packs of {limit} rows: {difference}");
    }
    // Negative control: one input token changed must show.
    setup.examples[0].tokens[0] ^= 1;
    let difference =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| gradient_difference(&setup, 1000)));
    assert!(difference.is_err() || difference.is_ok_and(|difference| difference > 1e-5));
}

#[test]
fn twenty_steps_equal_torch() {
    let setup = setup();
    let trained = train(&setup.base, Some(&setup.start), &setup.examples, &setup.recipe, |_| {
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture("train-lora-qv/train.json")).unwrap()).unwrap();
    let expected: Vec<f64> = serde_json::from_value(json["losses"].clone()).unwrap();
    assert_eq!(trained.losses.len(), expected.len());
    for (step, (ours, expected)) in trained.losses.iter().zip(&expected).enumerate() {
        assert!((ours - expected).abs() < 1e-4, "step {step}: {ours} instead of {expected}");
    }
    let last = tensors("train-lora-qv/train.safetensors");
    for layer in 0..setup.base.config().layers {
        for site in [Site::Q, Site::V] {
            let id = SiteId::new(layer, site);
            let ours = trained.weights.sites[id.index()].as_ref().unwrap();
            assert!(worst(&ours.a, &values(named(&last, id, "A"))) < 1e-4);
            assert!(worst(&ours.b, &values(named(&last, id, "B"))) < 1e-4);
        }
    }
    // The serving path sees the same loss as the training path.
    let adapter = Arc::new(Adapter::new(&trained.weights, peft::Precision::Exact));
    let losses = evaluate(&setup.base, Some(&adapter), &setup.examples, 100, 1000).unwrap();
    let nats: f64 =
        losses.iter().map(|l| l.nats).sum::<f64>() / losses.iter().map(|l| l.tokens).sum::<usize>() as f64;
    let expected = json["loss_after_last_step"].as_f64().unwrap();
    assert!((nats - expected).abs() < 1e-4, "{nats} instead of {expected}");
    assert!((Loss::bits_per_token(&losses) - expected / std::f64::consts::LN_2).abs() < 2e-4);
}

#[test]
fn training_is_reproducible_and_can_be_stopped() {
    let Setup { base, examples, recipe, .. } = setup();
    let recipe = Recipe { epochs: 3, learning_rate: 1e-2, lora: peft::LoraConfig::oppu(), ..recipe };
    let run = |seed| {
        let recipe = Recipe { seed, ..recipe.clone() };
        train(&base, None, &examples, &recipe, |_| std::ops::ControlFlow::Continue(())).unwrap().weights
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    let stopped = train(&base, None, &examples, &recipe, |report| {
        if report.step == 2 { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) }
    });
    assert!(matches!(stopped, Err(crate::TrainError::Stopped)));
    let mut broken = setup().start;
    broken.sites.iter_mut().flatten().for_each(|site| site.b[0] = f32::NAN);
    let diverged = train(&base, Some(&broken), &examples, &recipe, |_| std::ops::ControlFlow::Continue(()));
    assert!(matches!(diverged, Err(crate::TrainError::Diverged { step: 0, .. })));
    assert!(matches!(
        train(&base, None, &[], &recipe, |_| std::ops::ControlFlow::Continue(())),
        Err(crate::TrainError::NoExamples)
    ));
}
