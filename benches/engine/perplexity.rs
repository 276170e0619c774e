//! What fast precision costs: the perplexity of real text in 8-bit activations and bfloat16 KV over that in float32, and
//! the same with an adapter that was trained on other text of the kind, in each precision it can be kept in.

use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::Context;
use atelier::demo::histories;
use atelier::service::cores;
use model::{BLOCK_LEN, BaseModel, BatchInput, KvPool, LoadOptions, Logits, Precision, Runtime};
use peft::{Adapter, AdapterBatch, AdapterConfig, AdapterWeights, LoraConfig, Storage, TargetModules};
use text::{Special, Tokenizer};
use train::Recipe;
use types::{Example, Site};

use crate::Bench;
use crate::ours::served;
use crate::progress::progress;
use crate::row::{Goal, Row};

/// Tokens that see each other.
const WINDOW: usize = 512;
/// Tokens of one step.
const STEP: usize = 128;

/// Tokens that the adapter is trained on, and those of an example.
const TRAINED: usize = 40 * EXAMPLE;
const EXAMPLE: usize = 256;

/// The rows.
pub(crate) fn rows(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let wanted = if bench.quick { 4_096 } else { 50_176 };
    let loaded = model::load(&bench.model, LoadOptions { max_context: Some(WINDOW) })?;
    let tokenizer = Tokenizer::new(&loaded.tokenizer.context("the file has no tokenizer")?)?;
    let mut plays: Vec<_> = std::fs::read_dir(histories(&bench.cache)?)?.collect::<Result<_, _>>()?;
    plays.sort_by_key(std::fs::DirEntry::file_name);
    let mut tokens = Vec::new();
    for play in plays {
        tokens.extend(tokenizer.encode(&std::fs::read_to_string(play.path())?, Special::Literal)?);
    }
    let least = wanted + TRAINED;
    anyhow::ensure!(tokens.len() >= least, "the plays have only {} of {least} tokens", tokens.len());
    // From the end of the last play, of which nothing is measured.
    let (measured, trained) = (&tokens[..wanted], &tokens[tokens.len() - TRAINED..]);
    let progress = progress("perplexity", 1 + 5 * wanted / WINDOW);
    let weights = train(&loaded.model, trained)?;
    progress.inc(1);
    let measure = |precision, kept: Option<Storage>| -> anyhow::Result<f64> {
        let build = |kept| Adapter::build(&weights, &loaded.model, kept).map(Arc::new);
        let mut text = Text::new(&loaded.model, kept.map(build).transpose()?, precision)?;
        let mut nats = 0.0;
        for window in measured.chunks_exact(WINDOW) {
            nats += text.nats(window)?;
            progress.inc(1);
        }
        Ok((nats / (wanted - wanted / WINDOW) as f64).exp())
    };
    let (fast, exact) = (measure(Precision::Fast, None)?, measure(Precision::Exact, None)?);
    let exact_adapter = measure(Precision::Exact, Some(Storage::F32))?;
    anyhow::ensure!(exact_adapter < 0.95 * exact, "the adapter has learnt nothing: {exact_adapter}");
    let name = format!("perplexity on {wanted} tokens of Shakespeare's histories, fast / exact precision");
    let mut rows = vec![Row::against(name, &[fast], &[exact]).goal(Goal::AtMost(1.005))];
    for (kept, bits) in [(Storage::Int8, "8 bits"), (Storage::Bf16, "bfloat16")] {
        let name = format!(
            "the same with an adapter trained on other scenes (rank 8, all seven sites), fast and in {bits} / exact and in float32"
        );
        let fast = measure(Precision::Fast, Some(kept))?;
        rows.push(Row::against(name, &[fast], &[exact_adapter]).goal(Goal::AtMost(1.005)));
    }
    progress.finish_and_clear();
    Ok(rows)
}

/// A rank-8 adapter on all sites, else trained as a user's is by default.
fn train(base: &BaseModel, tokens: &[u32]) -> anyhow::Result<AdapterWeights> {
    let examples: Vec<Example> = tokens
        .chunks_exact(EXAMPLE)
        .map(|tokens| Example { tokens: tokens.to_vec(), answer_start: 1 })
        .collect();
    let sites = Site::ALL.map(Site::module);
    let adapter = AdapterConfig::Lora(LoraConfig {
        target_modules: TargetModules::names(&sites),
        ..LoraConfig::oppu()
    });
    let recipe = Recipe { adapter, ..served()?.training.recipe(base.parameters()) };
    Ok(train::train(base, None, &examples, &recipe, |_| ControlFlow::Continue(()))?.weights)
}

/// A model that reads a window at a time.
struct Text<'a> {
    base: &'a BaseModel,
    adapter: Option<Arc<Adapter>>,
    runtime: Runtime,
    kv: KvPool,
    logits: Logits,
    weights: Vec<f32>,
}

impl<'a> Text<'a> {
    fn new(base: &'a BaseModel, adapter: Option<Arc<Adapter>>, precision: Precision) -> anyhow::Result<Self> {
        let threads = cores();
        let kv = KvPool::new(base.config(), WINDOW / BLOCK_LEN, precision)?;
        let runtime = Runtime::new(threads, precision)?;
        let weights = vec![0.0; base.config().vocab];
        Ok(Self { base, adapter, runtime, kv, logits: Logits::default(), weights })
    }

    /// The sum of `-ln p` of every token but the first, given those before it.
    fn nats(&mut self, window: &[u32]) -> anyhow::Result<f64> {
        let blocks: Vec<u32> = (0..(WINDOW / BLOCK_LEN) as u32).collect();
        let mut nats = 0.0;
        for first in (0..window.len()).step_by(STEP) {
            let (mut input, mut adapters) = (BatchInput::default(), AdapterBatch::default());
            for (at, token) in window.iter().enumerate().skip(first).take(STEP) {
                // A piece of its own for every token, so that each has its logits.
                input.push(&[*token], at, &blocks, true);
                adapters.push(self.adapter.as_ref(), 1);
            }
            self.base.forward(&mut self.runtime, &input, &mut self.kv, &adapters, &mut self.logits)?;
            for (logits, &next) in self.logits.rows().zip(&window[first + 1..]) {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                model::softmax_weights(logits, max, 1.0, &mut self.weights);
                let sum: f64 = self.weights.iter().map(|weight| f64::from(*weight)).sum();
                nats += sum.ln() + f64::from(max - logits[next as usize]);
            }
        }
        Ok(nats)
    }
}
