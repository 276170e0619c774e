//! What fast precision costs: the perplexity of real text in 8-bit activations and bfloat16 KV over that in float32.

use anyhow::Context;
use atelier::demo::histories;
use model::{BLOCK_LEN, BaseModel, BatchInput, KvPool, LoadOptions, Logits, Precision, Runtime};
use peft::AdapterBatch;
use text::{Special, Tokenizer};

use crate::Bench;
use crate::progress::progress;
use crate::row::{Goal, Row};

/// Tokens that see each other.
const WINDOW: usize = 512;
/// Tokens of one step.
const STEP: usize = 128;

/// The row.
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
    tokens.truncate(wanted);
    anyhow::ensure!(tokens.len() == wanted, "the plays have only {} tokens", tokens.len());
    let progress = progress("perplexity", 2 * wanted / WINDOW);
    let measure = |precision| -> anyhow::Result<f64> {
        let mut text = Text::new(&loaded.model, precision)?;
        let mut nats = 0.0;
        for window in tokens.chunks_exact(WINDOW) {
            nats += text.nats(window)?;
            progress.inc(1);
        }
        Ok((nats / (wanted - wanted / WINDOW) as f64).exp())
    };
    let (fast, exact) = (measure(Precision::Fast)?, measure(Precision::Exact)?);
    progress.finish_and_clear();
    let name = format!("perplexity on {wanted} tokens of Shakespeare's histories, fast / exact precision");
    Ok(vec![Row::against(name, &[fast], &[exact]).goal(Goal::AtMost(1.005))])
}

/// A model that reads a window at a time.
struct Text<'a> {
    base: &'a BaseModel,
    runtime: Runtime,
    kv: KvPool,
    logits: Logits,
    weights: Vec<f32>,
}

impl<'a> Text<'a> {
    fn new(base: &'a BaseModel, precision: Precision) -> anyhow::Result<Self> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let kv = KvPool::new(base.config(), WINDOW / BLOCK_LEN, precision)?;
        let runtime = Runtime::new(threads, precision)?;
        Ok(Self { base, runtime, kv, logits: Logits::default(), weights: vec![0.0; base.config().vocab] })
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
                adapters.push(None, 1);
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
