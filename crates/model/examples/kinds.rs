//! Saves an adapter of every kind for a base, with the logits it gives here, for `tests/reference/roundtrip.py`.
//!
//! `kinds MODEL_FOLDER DIR` makes a folder `DIR/<kind>` for each, as HF peft stores an adapter, with the logits after it
//! was read back in `logits.json` beside its files.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::{BLOCK_LEN, BaseModel, BatchInput, KvPool, LoadOptions, Logits, Precision, Runtime, load};
use peft::{
    Adapter, AdapterBatch, AdapterWeights, BaseShape, Ia3Config, Ia3Scale, Ia3Weights, LoraConfig,
    LoraTensors, LoraWeights, PromptConfig, PromptWeights, TargetModules,
};

const LENGTH: u32 = 24;

type Fallible<T> = Result<T, Box<dyn Error>>;

fn main() -> Fallible<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(folder), Some(out)) = (arguments.next(), arguments.next()) else {
        return Err("usage: kinds MODEL_FOLDER DIR".into());
    };
    let base = load(&folder, LoadOptions::default())?.model;
    let shape = base.shape();
    let mut numbers = Numbers(7);
    for (name, config) in loras()? {
        let weights = lora(config, &shape, &mut numbers)?;
        save(&base, &AdapterWeights::Lora(weights), &out.join(name))?;
    }
    for (name, config) in [("ia3", Ia3Config::llama()), ("ia3-qwen", Ia3Config::qwen())] {
        let mut sites = vec![None; shape.sites()];
        for (id, feed_forward) in config.sites(&shape)? {
            let (n, k) = shape.dims(id.site);
            let values = numbers.take(1.0, 0.8, if feed_forward { k } else { n });
            sites[id.index()] =
                Some(if feed_forward { Ia3Scale::Input(values) } else { Ia3Scale::Output(values) });
        }
        save(&base, &AdapterWeights::Ia3(Ia3Weights { config, sites }), &out.join(name))?;
    }
    let (width, config) = (shape.width(), PromptConfig { virtual_tokens: 7 });
    let embeddings = numbers.take(0.0, 1.7, 7 * width);
    save(&base, &AdapterWeights::Prompt(PromptWeights { config, width, embeddings }), &out.join("prompt"))
}

/// LoRA with each thing that changes its maths. Scales are moderate: at 8, float32 sums in another order alone move the
/// logits by 1e-5, which is the tolerance.
fn loras() -> Fallible<Vec<(&'static str, LoraConfig)>> {
    let four = TargetModules::names(&["q_proj", "v_proj", "o_proj", "down_proj"]);
    let plain = LoraConfig { r: 4, alpha: 8.0, target_modules: four, ..LoraConfig::oppu() };
    let key = |key: &str| key.to_owned();
    let all = br#"{"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": "all-linear"}"#;
    Ok(vec![
        ("plain", plain.clone()),
        ("all-linear", LoraConfig::parse(all)?),
        ("rslora", LoraConfig { use_rslora: true, ..plain.clone() }),
        ("dora", LoraConfig { use_dora: true, ..plain.clone() }),
        ("bias", LoraConfig { lora_bias: true, ..plain.clone() }),
        (
            "patterns",
            LoraConfig {
                // The first that matches decides: sorted, the order would be another.
                rank_pattern: vec![(key("v_proj"), 6), (key(r"layers\.[02]\..*"), 2), (key("o_proj"), 3)],
                alpha_pattern: vec![(key("self_attn.q_proj"), 1.5), (key(".*"), 7.0)],
                ..plain.clone()
            },
        ),
        (
            "layers",
            LoraConfig {
                layers_to_transform: Some(vec![1]),
                layers_pattern: vec![key("layers")],
                exclude_modules: Some(TargetModules::names(&["o_proj"])),
                ..plain.clone()
            },
        ),
        (
            "expression",
            LoraConfig {
                target_modules: TargetModules::Pattern(r".*\.(self_attn\.[kv]|mlp\.up)_proj".into()),
                exclude_modules: Some(TargetModules::Pattern(r".*\.0\..*".into())),
                ..plain
            },
        ),
    ])
}

fn lora(config: LoraConfig, shape: &BaseShape, numbers: &mut Numbers) -> Fallible<LoraWeights> {
    let mut sites = vec![None; shape.sites()];
    for (id, rank, scale) in config.sites(shape)? {
        let (n, k) = shape.dims(id.site);
        sites[id.index()] = Some(LoraTensors {
            rank,
            scale,
            a: numbers.take(0.0, 0.3, rank * k),
            b: numbers.take(0.0, 0.2, n * rank),
            bias: config.lora_bias.then(|| numbers.take(0.0, 0.3, n)),
            magnitude: config.use_dora.then(|| numbers.take(1.2, 0.6, n)),
        });
    }
    Ok(LoraWeights { config, sites })
}

/// Numbers that look random and are the same in every run.
struct Numbers(u32);

impl Numbers {
    fn take(&mut self, mean: f32, spread: f32, len: usize) -> Vec<f32> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            mean + spread * ((self.0 >> 8) as f32 / (1 << 23) as f32 - 1.0)
        };
        (0..len).map(|_| next()).collect()
    }
}

/// Stores an adapter, reads it back from there and writes the logits it gives.
fn save(base: &BaseModel, weights: &AdapterWeights, folder: &Path) -> Fallible<()> {
    let files = weights.to_files(&base.shape(), "tiny")?;
    std::fs::create_dir_all(folder)?;
    let paths = (folder.join("adapter_config.json"), folder.join("adapter_model.safetensors"));
    std::fs::write(&paths.0, files.config)?;
    std::fs::write(&paths.1, files.weights)?;
    let stored = AdapterWeights::parse(&std::fs::read(paths.0)?, &std::fs::read(paths.1)?, &base.shape())?;
    let adapter = Arc::new(Adapter::build(&stored, base, Precision::Exact)?);

    let vocab = u32::try_from(base.config().vocab)?;
    let ids: Vec<u32> = (0..LENGTH).map(|at| (at * 37 + at * at * 5 + 11) % vocab).collect();
    let own = u32::try_from(adapter.virtual_tokens())?;
    let all: Vec<u32> = (vocab..vocab + own).chain(ids.iter().copied()).collect();
    let blocks: Vec<u32> = (0..u32::try_from(all.len().div_ceil(BLOCK_LEN))?).collect();
    let mut kv = KvPool::new(base.config(), blocks.len(), Precision::Exact)?;
    let (mut runtime, mut output) = (Runtime::new(2, Precision::Exact)?, Logits::default());
    let mut logits = Vec::new();
    for (start, &id) in all.iter().enumerate() {
        let mut input = BatchInput::default();
        input.push(&[id], start, &blocks, true);
        base.forward(&mut runtime, &input, &mut kv, &AdapterBatch::new([Some(&adapter)]), &mut output)?;
        logits.extend(output.rows().map(<[f32]>::to_vec));
    }
    let logits = &logits[all.len() - ids.len()..];
    let json = serde_json::json!({ "input_ids": [ids], "logits": [logits] });
    std::fs::write(folder.join("logits.json"), serde_json::to_vec(&json)?)?;
    Ok(())
}
