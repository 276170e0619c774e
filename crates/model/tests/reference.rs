//! The decoder against HF transformers and peft in float32 (fixtures and their scripts: `tests/reference`).
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use model::{
    BLOCK_LEN, BaseModel, BatchInput, KvPool, LoadOptions, Logits, ModelError, PackedPass, Precision,
    Runtime, load,
};
use peft::{Adapter, AdapterBatch, AdapterWeights};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn base(name: &str) -> BaseModel {
    load(&fixtures().join(name), LoadOptions::default()).unwrap().model
}

fn adapter(folder: &Path, base: &BaseModel) -> Arc<Adapter> {
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
    let (config, weights) = (read("adapter_config.json"), read("adapter_model.safetensors"));
    let weights = AdapterWeights::parse(&config, &weights, &base.shape()).unwrap();
    Arc::new(Adapter::build(&weights, base, Precision::Exact).unwrap())
}

/// Every kind of adapter there is a fixture of, for each of these models.
const KINDS: [&str; 10] = [
    "lora-qv",
    "lora-all",
    "lora-patterns",
    "lora-rslora",
    "lora-all-linear",
    "lora-layers",
    "lora-bias",
    "dora",
    "ia3",
    "prompt",
];

/// The ids with the adapter's virtual tokens before them.
fn with_virtual(base: &BaseModel, ids: &[u32], adapter: Option<&Arc<Adapter>>) -> Vec<u32> {
    let count = adapter.map_or(0, |adapter| adapter.virtual_tokens()) as u32;
    let vocab = base.config().vocab as u32;
    (vocab..vocab + count).chain(ids.iter().copied()).collect()
}

/// A forward pass in float32.
fn forward(
    base: &BaseModel,
    input: &BatchInput,
    kv: &mut KvPool,
    adapters: &AdapterBatch,
) -> Result<Vec<Vec<f32>>, ModelError> {
    let mut logits = Logits::default();
    let mut runtime = Runtime::new(2, Precision::Exact).unwrap();
    base.forward(&mut runtime, input, kv, adapters, &mut logits)?;
    Ok(logits.rows().map(<[f32]>::to_vec).collect())
}

/// Input ids and expected logits of each sequence.
fn expected(folder: &Path) -> Vec<(Vec<u32>, Vec<Vec<f32>>)> {
    let tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(folder.join("logits.safetensors"), &Device::Cpu).unwrap();
    let ids: Vec<Vec<u32>> = tensors["input_ids"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let logits: Vec<Vec<Vec<f32>>> = tensors["logits"].to_vec3().unwrap();
    ids.into_iter().zip(logits).collect()
}

/// A sequence fed in pieces of the given lengths, logits after each piece.
fn feed(
    base: &BaseModel,
    kv: &mut KvPool,
    ids: &[u32],
    pieces: &[usize],
    adapter: Option<&Arc<Adapter>>,
) -> Vec<Vec<f32>> {
    let blocks: Vec<u32> = (0..ids.len().div_ceil(BLOCK_LEN) as u32).collect();
    let mut start = 0;
    let mut logits = Vec::new();
    for &len in pieces {
        let mut input = BatchInput::default();
        input.push(&ids[start..start + len], start, &blocks, true);
        let adapters = AdapterBatch::new((0..len).map(|_| adapter));
        logits.extend(forward(base, &input, kv, &adapters).unwrap());
        start += len;
    }
    logits
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The largest difference from the fixture, tokens fed one by one.
fn difference(base: &BaseModel, folder: &Path, adapter: Option<&Arc<Adapter>>) -> f32 {
    let mut kv = KvPool::new(base.config(), 8, Precision::Exact).unwrap();
    let mut largest = 0.0f32;
    for (ids, expected) in expected(folder) {
        let all = with_virtual(base, &ids, adapter);
        let ours = feed(base, &mut kv, &all, &vec![1; all.len()], adapter);
        assert_eq!(expected.len(), ids.len());
        for (ours, expected) in ours[all.len() - ids.len()..].iter().zip(&expected) {
            largest = largest.max(worst(ours, expected));
        }
    }
    largest
}

#[test]
fn base_logits_equal_transformers() {
    for name in ["tiny-llama", "tiny-llama-tied", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"] {
        let difference = difference(&base(name), &fixtures().join(name), None);
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn parameters_are_the_files_matrices() {
    for name in ["tiny-llama", "tiny-llama-tied", "tiny-qwen3"] {
        let files = std::fs::read_dir(fixtures().join(name)).unwrap().map(|entry| entry.unwrap().path());
        let of_the_model = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("model") && name.ends_with(".safetensors")
        };
        let matrices = files.filter(of_the_model).flat_map(|file| {
            let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
            tensors.into_values().filter(|tensor| tensor.rank() == 2)
        });
        let parameters: usize = matrices.map(|matrix| matrix.elem_count()).sum();
        assert_eq!(base(name).parameters(), parameters, "{name}");
    }
}

#[test]
fn adapter_logits_equal_peft() {
    let all = KINDS.as_slice();
    for (model, kinds) in [
        ("tiny-llama", all),
        ("tiny-qwen2", all),
        ("tiny-qwen3", &["lora-all", "dora", "prompt"]),
        ("tiny-mistral", &["lora-all"]),
    ] {
        let base = base(model);
        for kind in kinds {
            let folder = fixtures().join(model).join(kind);
            let adapter = adapter(&folder, &base);
            let with = difference(&base, &folder, Some(&adapter));
            println!("{model} {kind}: {with:.2e} from peft");
            // The logits reach 15, and float32 sums in another order move them by 5e-6.
            assert!(with < 1e-5, "{model} {kind}: {with}");
            // Negative control: without the adapter the same comparison must fail.
            let without = difference(&base, &folder, None);
            assert!(without > 1e-2, "{model} {kind} makes no difference: {without}");
        }
    }
}

#[test]
fn building_checks_the_base() {
    let (llama, qwen) = (base("tiny-llama"), base("tiny-qwen3"));
    assert_ne!(llama.shape(), qwen.shape());
    for kind in KINDS {
        let folder = fixtures().join("tiny-llama").join(kind);
        let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
        let (config, weights) = (read("adapter_config.json"), read("adapter_model.safetensors"));
        let weights = AdapterWeights::parse(&config, &weights, &llama.shape()).unwrap();
        let exact = Adapter::build(&weights, &llama, Precision::Exact).unwrap();
        let fast = Adapter::build(&weights, &llama, Precision::Fast).unwrap();
        // IA3 has nothing but vectors, which stay float32.
        assert_eq!(fast.bytes() == exact.bytes(), kind == "ia3", "{kind}");
        let fits = kind == "prompt" && llama.shape().width() == qwen.shape().width();
        assert_eq!(Adapter::build(&weights, &qwen, Precision::Exact).is_ok(), fits, "{kind}");
    }
}

#[test]
fn every_part_of_a_kind_is_seen_by_the_comparison() {
    // Negative control: one wrong number in whichever part makes the difference from peft too large.
    use peft::Ia3Scale;
    let base = base("tiny-qwen2");
    type Damage = fn(&mut AdapterWeights);
    let damages: [(&str, Damage); 5] = [
        ("dora", |weights| {
            let AdapterWeights::Lora(lora) = weights else { panic!() };
            lora.sites[0].as_mut().unwrap().magnitude.as_mut().unwrap()[3] += 0.05;
        }),
        ("lora-bias", |weights| {
            let AdapterWeights::Lora(lora) = weights else { panic!() };
            lora.sites[0].as_mut().unwrap().bias.as_mut().unwrap()[3] += 0.05;
        }),
        ("ia3", |weights| {
            let AdapterWeights::Ia3(ia3) = weights else { panic!() };
            let Some(Ia3Scale::Output(values)) = &mut ia3.sites[0] else { panic!() };
            values[3] += 0.05;
        }),
        ("ia3", |weights| {
            let AdapterWeights::Ia3(ia3) = weights else { panic!() };
            let Some(Ia3Scale::Input(values)) = &mut ia3.sites[6] else { panic!() };
            values[3] += 0.05;
        }),
        ("prompt", |weights| {
            let AdapterWeights::Prompt(prompt) = weights else { panic!() };
            prompt.embeddings[64] += 0.05;
        }),
    ];
    for (kind, damage) in damages {
        let folder = fixtures().join("tiny-qwen2").join(kind);
        let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
        let (config, weights) = (read("adapter_config.json"), read("adapter_model.safetensors"));
        let mut weights = AdapterWeights::parse(&config, &weights, &base.shape()).unwrap();
        damage(&mut weights);
        let adapter = Arc::new(Adapter::build(&weights, &base, Precision::Exact).unwrap());
        let with = difference(&base, &folder, Some(&adapter));
        assert!(with > 1e-3, "{kind}: {with}");
    }
}

#[test]
fn prefill_and_decode_agree_to_the_bit() {
    for name in ["tiny-llama", "tiny-mistral"] {
        let base = base(name);
        let mut kv = KvPool::new(base.config(), 8, Precision::Exact).unwrap();
        let (ids, _) = expected(&fixtures().join(name)).remove(0);
        let one_by_one = feed(&base, &mut kv, &ids, &vec![1; ids.len()], None);
        for pieces in [vec![ids.len()], vec![7, 1, ids.len() - 8], vec![ids.len() - 1, 1]] {
            let last = feed(&base, &mut kv, &ids, &pieces, None).pop().unwrap();
            assert_eq!(&last, one_by_one.last().unwrap(), "{name} in pieces {pieces:?}");
        }
    }
}

#[test]
fn eight_rows_with_eight_adapters_equal_eight_single_runs() {
    let base = base("tiny-llama");
    let folder = fixtures().join("tiny-llama");
    let file = |kind: &str| adapter(&folder.join(kind), &base);
    // Adapters of ranks 1 to 29 on different sites, and one of every kind among them.
    let rows: [Option<Arc<Adapter>>; 8] = [
        Some(file("lora-qv")),
        None,
        Some(file("dora")),
        Some(testing::adapter(&base, 3, 13)),
        Some(file("ia3")),
        Some(file("prompt")),
        Some(file("lora-bias")),
        Some(testing::adapter(&base, 7, 29)),
    ];
    let (ids, _) = expected(&folder).remove(0);
    let prompt = |row: usize| with_virtual(&base, &ids[row..row + 4 + row], rows[row].as_ref());
    let prompts: Vec<Vec<u32>> = (0..8).map(prompt).collect();
    let mut kv = KvPool::new(base.config(), 16, Precision::Exact).unwrap();
    let alone: Vec<Vec<f32>> = prompts
        .iter()
        .zip(&rows)
        .map(|(ids, adapter)| feed(&base, &mut kv, ids, &[ids.len()], adapter.as_ref()).remove(0))
        .collect();
    let mut input = BatchInput::default();
    for (ids, block) in prompts.iter().zip(0..) {
        input.push(ids, 0, &[block], true);
    }
    let route = |swap: bool| {
        AdapterBatch::new(prompts.iter().enumerate().flat_map(|(row, ids)| {
            // Virtual tokens have no meaning to another adapter.
            let row = if swap && row != 5 { (row + 1) % 8 } else { row };
            std::iter::repeat_n(rows[row].as_ref(), ids.len())
        }))
    };
    let run = |kv: &mut KvPool, swap| forward(&base, &input, kv, &route(swap)).unwrap();
    assert_eq!(run(&mut kv, false), alone);
    // Negative control: rows routed to their neighbour's adapter must not pass.
    let swapped = run(&mut kv, true);
    assert!((0..8).all(|row| (swapped[row] != alone[row]) == (row != 5)));
}

#[test]
fn serving_and_training_share_one_decoder() {
    for (model, kind) in [
        ("tiny-llama", "lora-all"),
        ("tiny-qwen3", ""),
        ("tiny-qwen2", "lora-qv"),
        ("tiny-qwen2", "dora"),
        ("tiny-llama", "ia3"),
        ("tiny-qwen2", "prompt"),
    ] {
        let base = base(model);
        let folder = fixtures().join(model);
        let adapter = (!kind.is_empty()).then(|| adapter(&folder.join(kind), &base));
        let (ids, _) = expected(&folder).remove(0);
        let ids = with_virtual(&base, &ids, adapter.as_ref());
        let mut kv = KvPool::new(base.config(), 8, Precision::Exact).unwrap();
        let served = feed(&base, &mut kv, &ids, &vec![1; ids.len()], adapter.as_ref());
        let adapters = AdapterBatch::new(ids.iter().map(|_| adapter.as_ref()));
        let spans = [kernels::Span { first: 0, len: ids.len() }];
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        let mut pass = PackedPass { spans: &spans, adapters: &adapters, config: base.config() };
        let hidden = base.hidden(&ids, &positions, &mut pass).unwrap();
        let hidden: Vec<f32> = hidden.flatten_all().unwrap().to_vec1().unwrap();
        let mut logits = vec![0.0; ids.len() * base.config().vocab];
        kernels::linear(&base.head().weight, None, &hidden, &mut logits);
        for (served, trained) in served.iter().zip(logits.chunks(base.config().vocab)) {
            assert!(worst(served, trained) < 2e-5, "{model}: {}", worst(served, trained));
        }
    }
}

#[test]
fn bad_batches_are_errors() {
    let base = base("tiny-llama");
    let mut kv = KvPool::new(base.config(), 2, Precision::Exact).unwrap();
    let none = AdapterBatch::default();
    let mut run = |tokens: Vec<u32>, start, blocks: Vec<u32>| {
        let mut input = BatchInput::default();
        input.push(&tokens, start, &blocks, true);
        forward(&base, &input, &mut kv, &none).map(|_| ())
    };
    assert!(run(vec![1, 2], 0, vec![0]).is_ok());
    assert!(run(vec![9999], 0, vec![0]).unwrap_err().to_string().contains("9999"));
    assert!(run(vec![1], 16, vec![0]).is_err(), "beyond its blocks");
    assert!(run(vec![1], 0, vec![7]).is_err(), "a block that is not there");
    assert!(run(vec![], 0, vec![0]).is_err(), "no token");
    // Virtual tokens belong to adapters that have them.
    let vocab = base.config().vocab as u32;
    let prompt = adapter(&fixtures().join("tiny-llama/prompt"), &base);
    let mut run = |token, adapter: Option<&Arc<Adapter>>| {
        let mut input = BatchInput::default();
        input.push(&[token], 0, &[0], true);
        forward(&base, &input, &mut kv, &AdapterBatch::new([adapter])).map(|_| ())
    };
    assert!(run(vocab + 4, Some(&prompt)).is_ok());
    for refused in [run(vocab + 5, Some(&prompt)), run(vocab + 4, None), run(u32::MAX, Some(&prompt))] {
        assert!(refused.unwrap_err().to_string().contains("vocabulary"));
    }
}

mod testing {
    //! A random adapter on all sites.
    use super::*;
    use peft::{LoraConfig, LoraTensors, LoraWeights};

    pub(crate) fn adapter(base: &BaseModel, seed: usize, rank: usize) -> Arc<Adapter> {
        let mut state = seed as u32 + 1;
        let mut random = |len: usize| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.5
            };
            (0..len).map(|_| next()).collect()
        };
        let shape = base.shape();
        let sites = shape
            .site_ids()
            .map(|id| {
                let (out, input) = shape.dims(id.site);
                Some(LoraTensors {
                    rank,
                    scale: 0.5,
                    a: random(rank * input),
                    b: random(out * rank),
                    ..LoraTensors::default()
                })
            })
            .collect();
        Arc::new(Adapter::new(&LoraWeights { config: LoraConfig::oppu(), sites }, model::Precision::Exact))
    }
}
