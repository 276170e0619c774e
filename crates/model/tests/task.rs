//! A task adapter merged into the base and stacked under the users' adapters: the same logits, the same gradients.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

#[path = "support/synthetic.rs"]
mod synthetic;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use kernels::{Format, Products, Span};
use model::{
    BLOCK_LEN, BaseModel, BatchInput, KvPool, Linear, LoadOptions, Logits, ModelError, PackedPass, Pass,
    Precision, Runtime, TaskMode, load,
};
use peft::{
    Adapter, AdapterBatch, AdapterWeights, FrozenBase, LoraConfig, LoraTensors, LoraWeights, TargetModules,
};
use synthetic::Synthetic;
use types::{Site, SiteId};

/// Merged and stacked logits on float32 bases differ by no more; they reach 15.
const BOUND: f32 = 1e-4;

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn base(name: &str) -> BaseModel {
    load(&fixtures(name), LoadOptions::default()).unwrap().model
}

fn files(folder: &Path) -> (Vec<u8>, Vec<u8>) {
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
    (read("adapter_config.json"), read("adapter_model.safetensors"))
}

fn with_task(name: &str, task: &str, mode: TaskMode) -> Result<BaseModel, ModelError> {
    let (config, weights) = files(&fixtures(name).join(task));
    base(name).with_task(&config, &weights, mode)
}

/// A user's adapter of the fixtures, made ready for this base.
fn user(base: &BaseModel, name: &str, kind: &str) -> Arc<Adapter> {
    let (config, weights) = files(&fixtures(name).join(kind));
    let weights = AdapterWeights::parse(&config, &weights, &base.shape()).unwrap();
    Arc::new(Adapter::build(&weights, base, Precision::Exact).unwrap())
}

/// Logits after each token, virtual tokens before them left out.
fn logits(base: &BaseModel, ids: &[u32], adapter: Option<&Arc<Adapter>>) -> Vec<Vec<f32>> {
    let (vocab, own) =
        (base.config().vocab as u32, adapter.map_or(0, |adapter| adapter.virtual_tokens()) as u32);
    let ids: Vec<u32> = (vocab..vocab + own).chain(ids.iter().copied()).collect();
    let blocks: Vec<u32> = (0..ids.len().div_ceil(BLOCK_LEN) as u32).collect();
    let mut kv = KvPool::new(base.config(), blocks.len(), Precision::Exact).unwrap();
    let (mut runtime, mut output) = (Runtime::new(2, Precision::Exact).unwrap(), Logits::default());
    let mut all = Vec::new();
    for (at, &id) in ids.iter().enumerate() {
        let mut input = BatchInput::default();
        input.push(&[id], at, &blocks, true);
        base.forward(&mut runtime, &input, &mut kv, &AdapterBatch::new([adapter]), &mut output).unwrap();
        all.extend(output.rows().map(<[f32]>::to_vec));
    }
    all.split_off(own as usize)
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn ids(base: &BaseModel) -> Vec<u32> {
    (0..24).map(|at| (at * 37 + at * at * 5 + 11) % base.config().vocab as u32).collect()
}

#[test]
fn merged_and_stacked_logits_agree_under_every_kind_of_adapter() {
    for (name, task) in
        [("tiny-llama", "lora-all"), ("tiny-qwen2", "lora-patterns"), ("tiny-qwen2", "lora-bias")]
    {
        let (plain, merged) = (base(name), with_task(name, task, TaskMode::Merge).unwrap());
        let stacked = with_task(name, task, TaskMode::Stack).unwrap();
        let ids = ids(&plain);
        for kind in ["", "lora-qv", "lora-bias", "dora", "ia3", "prompt"] {
            let of = |base: &BaseModel| (!kind.is_empty()).then(|| user(base, name, kind));
            let run = |base: &BaseModel| logits(base, &ids, of(base).as_ref());
            let (merged, stacked, without) = (run(&merged), run(&stacked), run(&plain));
            let difference = worst(&merged, &stacked);
            println!("{name} {task} under {kind:?}: {difference:.2e}");
            assert!(difference < BOUND, "{name} {task} under {kind:?}: {difference}");
            // Negative control: the task shows.
            assert!(worst(&merged, &without) > 1e-2, "{name} {task} under {kind:?}");
        }
    }
}

#[test]
fn a_merged_task_alone_is_what_peft_computes() {
    for kind in ["lora-all", "lora-rslora", "lora-bias", "dora"] {
        let base = with_task("tiny-qwen2", kind, TaskMode::Merge).unwrap();
        let path = fixtures("tiny-qwen2").join(kind).join("logits.safetensors");
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let ids: Vec<Vec<u32>> =
            tensors["input_ids"].to_dtype(candle_core::DType::U32).unwrap().to_vec2().unwrap();
        let expected: Vec<Vec<Vec<f32>>> = tensors["logits"].to_vec3().unwrap();
        let difference = worst(&logits(&base, &ids[0], None), &expected[0]);
        assert!(difference < BOUND, "{kind}: {difference}");
    }
}

#[test]
fn the_norms_of_dora_are_those_of_base_and_task() {
    let stacked = with_task("tiny-llama", "lora-all", TaskMode::Stack).unwrap();
    let ids = ids(&stacked);
    let right = logits(&stacked, &ids, Some(&user(&stacked, "tiny-llama", "dora")));
    // Negative control: norms of the base alone.
    let wrong = logits(&stacked, &ids, Some(&user(&base("tiny-llama"), "tiny-llama", "dora")));
    assert!(worst(&right, &wrong) > 1e-2);
}

#[test]
fn base_and_task_are_one_base_of_their_own() {
    let hash = |mode| *with_task("tiny-llama", "lora-qv", mode).unwrap().hash();
    assert_eq!(hash(TaskMode::Merge), hash(TaskMode::Stack));
    assert_ne!(hash(TaskMode::Merge), *base("tiny-llama").hash());
    assert_ne!(hash(TaskMode::Merge), *with_task("tiny-llama", "lora-all", TaskMode::Merge).unwrap().hash());
    let refused = with_task("tiny-llama", "dora", TaskMode::Stack).unwrap_err().to_string();
    assert!(refused.contains("use_dora") && refused.contains("merge it"), "{refused}");
    assert!(with_task("tiny-llama", "dora", TaskMode::Merge).is_ok());
    let refused = with_task("tiny-llama", "ia3", TaskMode::Merge).unwrap_err().to_string();
    assert!(refused.contains("peft_type"), "{refused}");
}

/// Keeps the linear layers it meets.
struct Recorder<'a> {
    inner: PackedPass<'a>,
    met: Vec<(SiteId, Linear)>,
}

impl Pass for Recorder<'_> {
    fn linear(&mut self, id: SiteId, linear: &Linear, x: &Tensor) -> Result<Tensor, ModelError> {
        self.met.push((id, linear.clone()));
        self.inner.linear(id, linear, x)
    }

    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, ModelError> {
        self.inner.attend(layer, q, k, v)
    }
}

fn linears(base: &BaseModel) -> Vec<(SiteId, Linear)> {
    let (adapters, spans) = (AdapterBatch::new([None]), [Span { first: 0, len: 1 }]);
    let inner = PackedPass { spans: &spans, adapters: &adapters, config: base.config() };
    let mut recorder = Recorder { inner, met: Vec::new() };
    base.hidden(&[1], &[0], &mut recorder).unwrap();
    recorder.met
}

#[test]
fn training_sees_the_task_too() {
    let merged = linears(&with_task("tiny-qwen2", "lora-all", TaskMode::Merge).unwrap());
    let stacked = linears(&with_task("tiny-qwen2", "lora-all", TaskMode::Stack).unwrap());
    for ((id, merged), (_, stacked)) in merged.iter().zip(&stacked) {
        let (n, k) = (merged.weight.rows(), merged.weight.cols());
        let values = |len: usize| (0..len).map(|at| (at * 29 % 17) as f32 / 8.5 - 1.0).collect::<Vec<f32>>();
        let (x, dy) = (values(3 * k), values(3 * n));
        let forward = |linear: &Linear| {
            let mut y = vec![0.0; 3 * n];
            linear.product(Products::F32, &x, &mut y);
            vec![y]
        };
        let backward = |linear: &Linear| {
            let mut dx = vec![0.0; 3 * k];
            linear.transposed(Products::F32, &dy, &mut dx);
            vec![dx]
        };
        let row = |linear: &Linear| {
            let mut row = vec![0.0; k];
            linear.row(n - 1, &mut row);
            vec![row]
        };
        assert!(worst(&forward(merged), &forward(stacked)) < 1e-5, "{id:?}");
        assert!(worst(&row(merged), &row(stacked)) < 1e-5, "{id:?}");
        assert!(worst(&backward(merged), &backward(stacked)) < 1e-5, "{id:?}");
        // Negative control: without what lies under it, it is another layer.
        let without = Linear { under: None, ..stacked.clone() };
        assert!(worst(&forward(merged), &forward(&without)) > 1e-2, "{id:?}");
        assert!(worst(&row(merged), &row(&without)) > 1e-3, "{id:?}");
        assert!(worst(&backward(merged), &backward(&without)) > 1e-2, "{id:?}");
    }
}

#[test]
fn quantised_sites_become_eight_bits_when_a_task_is_merged() {
    let shape = Synthetic {
        hidden: 128,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        feed_forward: 256,
        vocab: 100,
        context: 64,
        window: None,
        formats: &[Format::Q4_1],
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("synthetic.gguf");
    shape.write(&path, 1);
    let base = || load(&path, LoadOptions::default()).unwrap().model;
    let dims = base().shape();
    let values = |len: usize, step: usize| -> Vec<f32> {
        (0..len).map(|at| ((at * step) % 31) as f32 / 310.0 - 0.05).collect()
    };
    let task = LoraConfig {
        target_modules: TargetModules::names(&["q_proj"]),
        r: 2,
        alpha: 2.0,
        ..LoraConfig::oppu()
    };
    let site = |id: SiteId| {
        let (n, k) = dims.dims(id.site);
        let (a, b) = (values(2 * k, 7), values(2 * n, 11));
        (id.site == Site::Q).then(|| LoraTensors { rank: 2, scale: 1.0, a, b, ..LoraTensors::default() })
    };
    let weights = LoraWeights { config: task, sites: dims.site_ids().map(site).collect() };
    let files = AdapterWeights::Lora(weights).to_files(&dims, "base").unwrap();
    let with = |mode| base().with_task(&files.config, &files.weights, mode).unwrap();
    let (plain, merged, stacked) = (base(), with(TaskMode::Merge), with(TaskMode::Stack));
    for id in dims.site_ids() {
        let expected = if id.site == Site::Q { Format::Q8_0 } else { Format::Q4_1 };
        assert_eq!(FrozenBase::linear(&merged, id).0.format(), expected);
        assert_eq!(FrozenBase::linear(&stacked, id).0.format(), Format::Q4_1);
    }
    let ids: Vec<u32> = (0..20).map(|at| at * 7 % 100).collect();
    let run = |base: &BaseModel| logits(base, &ids, None);
    let (effect, error) = (worst(&run(&stacked), &run(&plain)), worst(&run(&stacked), &run(&merged)));
    println!("the task moves the logits by {effect:.2e}, 8 bits by {error:.2e}");
    assert!(error < effect / 10.0, "{error} of {effect}");
}
