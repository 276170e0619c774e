//! Writes adapters trained on the tiny Llama fixture, and the logits with one of them, for
//! `tests/reference/roundtrip.py`.
//!
//! `roundtrip DIR` makes `DIR/adapter` and `DIR/other` (each as HF peft stores an adapter) and `DIR/logits.json`, the
//! logits with `DIR/adapter` after it was read back. `DIR/other` is there for the negative control.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::{BLOCK_LEN, BaseModel, BatchInput, KvPool, LoadOptions, Logits, Precision, Runtime, load};
use peft::{Adapter, AdapterBatch, AdapterWeights};
use train::{Recipe, train};
use types::Example;

const SEQUENCE_LEN: u32 = 24;

type Fallible<T> = Result<T, Box<dyn Error>>;

fn main() -> Fallible<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: roundtrip DIR")?);
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama");
    let base = load(&fixture, LoadOptions::default())?.model;

    let adapter = trained(&base, 1, &folder.join("adapter"))?;
    trained(&base, 2, &folder.join("other"))?;

    let vocab = u32::try_from(base.config().vocab)?;
    let input_ids = [sequence(3, vocab), sequence(4, vocab)];
    let mut kv = KvPool::new(base.config(), (SEQUENCE_LEN as usize).div_ceil(BLOCK_LEN), Precision::Exact)?;
    let mut logits = Vec::new();
    for ids in &input_ids {
        logits.push(logits_of(&base, &mut kv, ids, &adapter)?);
    }
    let json = serde_json::json!({ "input_ids": input_ids, "logits": logits });
    std::fs::write(folder.join("logits.json"), serde_json::to_vec(&json)?)?;
    Ok(())
}

/// Tokens that look random and are the same in every run.
fn sequence(seed: u32, vocab: u32) -> Vec<u32> {
    (0..SEQUENCE_LEN).map(|at| (seed * 131 + at * (7 + seed) + at * at * 3) % vocab).collect()
}

/// Trains an adapter, stores it in `folder` and reads it back from there.
fn trained(base: &BaseModel, seed: u32, folder: &Path) -> Fallible<Arc<Adapter>> {
    let vocab = u32::try_from(base.config().vocab)?;
    let examples: Vec<Example> =
        (0..4).map(|i| Example { tokens: sequence(10 * seed + i, vocab), answer_start: 8 }).collect();
    let recipe = Recipe { epochs: 8, batch: 2, learning_rate: 1e-2, seed: u64::from(seed), ..Recipe::oppu() };
    let weights = train(base, None, &examples, &recipe, |_| ControlFlow::Continue(()))?.weights;

    std::fs::create_dir_all(folder)?;
    let (config, tensors) = (folder.join("adapter_config.json"), folder.join("adapter_model.safetensors"));
    let files = weights.to_files(&base.shape(), "tiny-llama")?;
    std::fs::write(&config, files.config)?;
    std::fs::write(&tensors, files.weights)?;
    let stored = AdapterWeights::parse(&std::fs::read(config)?, &std::fs::read(tensors)?, &base.shape())?;
    Ok(Arc::new(Adapter::build(&stored, base, Precision::Exact)?))
}

/// Logits after each token, `[tokens][vocab]`.
fn logits_of(
    base: &BaseModel,
    kv: &mut KvPool,
    ids: &[u32],
    adapter: &Arc<Adapter>,
) -> Fallible<Vec<Vec<f32>>> {
    let blocks: Vec<u32> = (0..u32::try_from(ids.len().div_ceil(BLOCK_LEN))?).collect();
    let adapters = AdapterBatch::new([Some(adapter)]);
    let (mut runtime, mut output) = (Runtime::new(2, Precision::Exact)?, Logits::default());
    let mut logits = Vec::new();
    for (start, &id) in ids.iter().enumerate() {
        let mut input = BatchInput::default();
        input.push(&[id], start, &blocks, true);
        base.forward(&mut runtime, &input, kv, &adapters, &mut output)?;
        logits.extend(output.rows().map(<[f32]>::to_vec));
    }
    Ok(logits)
}
