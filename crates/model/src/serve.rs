//! The serving pass: rows of many sequences, each with its own adapter, over the paged KV pool.
//!
//! The same decoder as [`BaseModel::hidden`], on plain buffers that one step leaves to the next: after the first steps
//! nothing is allocated. Training keeps the differentiable form; a test holds the two together.

use kernels::{
    Input, Layer, Means, NoAdapters, PagedSequence, Pages, Precision, Rotary, RowMaxima, Scratch, Team,
    at_a_line, first_at_a_line, fused_linear,
};
use peft::{Adapter, AdapterBatch};
use types::{Site, SiteId};

use crate::decoder::{BaseModel, Block};
use crate::error::ModelError;
use crate::kv::{BLOCK_LEN, KvPool};
use crate::profile::{Phase, PhaseTime, Timed, Watch};

/// A step's rows, sequence after sequence. Cleared and filled again for every step.
#[derive(Debug, Clone, Default)]
pub struct BatchInput {
    tokens: Vec<u32>,
    blocks: Vec<u32>,
    sequences: Vec<PagedSequence>,
    /// Rows whose logits are wanted.
    wanted: Vec<usize>,
}

impl BatchInput {
    /// A step without rows, with room for so many of each.
    #[must_use]
    pub fn with_capacity(sequences: usize, rows: usize, blocks: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(rows),
            blocks: Vec::with_capacity(blocks),
            sequences: Vec::with_capacity(sequences),
            wanted: Vec::with_capacity(sequences),
        }
    }

    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.blocks.clear();
        self.sequences.clear();
        self.wanted.clear();
    }

    /// Adds a sequence's part of the step: consecutive tokens from position `start` on, in blocks that reach the last
    /// of them; ids from the size of the vocabulary on are the virtual tokens of the rows' adapter; `want_logits` asks for the logits after the last token.
    pub fn push(&mut self, tokens: &[u32], start: usize, blocks: &[u32], want_logits: bool) {
        let first_block = self.blocks.len();
        self.sequences.push(PagedSequence { first_block, blocks: blocks.len(), rows: tokens.len(), start });
        self.blocks.extend_from_slice(blocks);
        self.tokens.extend_from_slice(tokens);
        if want_logits {
            self.wanted.push(self.tokens.len().saturating_sub(1));
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    fn check(&self, base: &BaseModel, kv: &KvPool, adapters: &AdapterBatch) -> Result<(), ModelError> {
        let config = base.config();
        if self.sequences.is_empty() {
            return Err(ModelError::Batch("no sequence".into()));
        }
        for sequence in &self.sequences {
            let end = sequence.start + sequence.rows;
            let blocks = &self.blocks[sequence.first_block..][..sequence.blocks];
            let known = |block: &u32| (*block as usize) < kv.blocks();
            if sequence.rows == 0 || end > blocks.len() * BLOCK_LEN || !blocks.iter().all(known) {
                return Err(ModelError::Batch(format!("positions up to {end} in {} blocks", blocks.len())));
            }
            if end > config.context {
                let problem = format!("position {} is beyond the context of {}", end - 1, config.context);
                return Err(ModelError::Batch(problem));
            }
        }
        let own = |row| adapters.row(row).map_or(0, Adapter::virtual_tokens);
        let is_unknown = |&(row, &token): &(usize, &u32)| {
            (token as usize).checked_sub(config.vocab).is_some_and(|index| index >= own(row))
        };
        match self.tokens.iter().enumerate().find(is_unknown) {
            Some((_, &token)) => Err(config.unknown_token(token)),
            None => Ok(()),
        }
    }
}

/// The logits of the sequences that wanted them, in their order.
#[derive(Debug, Default)]
pub struct Logits {
    values: Vec<f32>,
    rows: usize,
    vocab: usize,
    maxima: RowMaxima,
}

impl Logits {
    /// The rows, each with one value per token of the vocabulary.
    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values[first_at_a_line(&self.values)..][..self.rows * self.vocab].chunks_exact(self.vocab.max(1))
    }

    /// The largest logit of a row and its token, the first among equals; none when it is not finite or a logit is NaN.
    ///
    /// # Panics
    /// When there is no such row.
    #[must_use]
    pub fn largest(&self, row: usize) -> Option<(u32, f32)> {
        self.maxima.of(row).map(|(token, logit)| (token as u32, logit))
    }
}

/// What one model thread computes with: its workers, its precision, and the buffers of a step.
#[derive(Debug)]
pub struct Runtime {
    team: Team,
    precision: Precision,
    scratch: Scratch,
    /// The residual stream.
    x: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    last: Vec<f32>,
    watch: Option<Box<Watch>>,
}

impl Runtime {
    /// Workers on `threads` threads, the caller's among them.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn new(threads: usize, precision: Precision) -> std::io::Result<Self> {
        Ok(Self {
            team: Team::new(threads)?,
            precision,
            scratch: Scratch::default(),
            x: Vec::new(),
            q: Vec::new(),
            k: Vec::new(),
            v: Vec::new(),
            attended: Vec::new(),
            gate: Vec::new(),
            up: Vec::new(),
            last: Vec::new(),
            watch: None,
        })
    }

    /// Measures from now on, beginning at zero, what passes spend in each phase.
    pub fn watch(&mut self) {
        self.watch = Some(Box::new(Watch::new()));
    }

    /// What passes have spent in each phase; none if it is not measured.
    #[must_use]
    pub fn times(&self) -> Option<[PhaseTime; Phase::ALL.len()]> {
        self.watch.as_ref().map(|watch| watch.times())
    }

    /// Its threads, the caller's among them.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.team.size()
    }

    /// Has the passes that follow use `threads` of them, at least one, and the others sleep. What is computed does not
    /// depend on it.
    pub fn keep(&self, threads: usize) {
        self.team.keep(threads);
    }
}

impl BaseModel {
    /// One forward pass. `adapters` routes every row of `input`, in order, to its adapter or to none.
    ///
    /// # Errors
    /// When a token, position or block is out of range; nothing is computed then.
    pub fn forward(
        &self,
        runtime: &mut Runtime,
        input: &BatchInput,
        kv: &mut KvPool,
        adapters: &AdapterBatch,
        logits: &mut Logits,
    ) -> Result<(), ModelError> {
        input.check(self, kv, adapters)?;
        let config = self.config();
        let Runtime { team, precision, scratch, x, q, k, v, attended, gate, up, last, watch } = runtime;
        let workers = Timed { team, watch: watch.as_deref() };
        let means = Means { isa: kernels::isa(), workers: &workers, precision: *precision };
        workers.begin(Phase::Embedding);
        let (rows, hidden, vocab) = (input.rows(), config.hidden, config.vocab);
        let threads = means.workers.threads();
        let (query, key) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let x = at_a_line(x, rows * hidden);
        for (at, (&token, row)) in input.tokens.iter().zip(x.chunks_exact_mut(hidden)).enumerate() {
            match (token as usize).checked_sub(vocab) {
                None => self.embedding().decode_row(token as usize, row),
                Some(index) if adapters.row(at).is_some_and(|adapter| adapter.embed(index, row)) => {}
                Some(_) => return Err(config.unknown_token(token)),
            }
        }
        let pages = Pages::new(&input.blocks, &input.sequences);
        let eps = config.norm_eps;
        for (index, block) in self.blocks().iter().enumerate() {
            let site = |site: Site| {
                let under = block.linears[site.index()].under.as_ref();
                adapters.site(SiteId::new(index, site)).over(under.map(|under| under.low_rank()))
            };
            let [q, k] = [at_a_line(q, rows * query), at_a_line(k, rows * key)];
            let [v, attended] = [at_a_line(v, rows * key), at_a_line(attended, rows * query)];
            let [gate, up] =
                [at_a_line(gate, rows * config.feed_forward), at_a_line(up, rows * config.feed_forward)];

            workers.begin(Phase::Qkv);
            let [at_q, at_k, at_v, at_o, at_gate, at_up, at_down] = Site::ALL.map(site);
            adapters.ask_for(SiteId::new(index, Site::Gate), SiteId::new(index, Site::Down));
            let normed = Input::Norm { x, weight: &block.attention_norm, eps };
            scratch.announce(&[&at_o], rows, query, threads);
            fused_linear(
                scratch,
                means,
                normed,
                &mut [
                    layer(block, Site::Q, &at_q, q, false),
                    layer(block, Site::K, &at_k, k, false),
                    layer(block, Site::V, &at_v, v, false),
                ],
            );
            workers.begin(Phase::Attention);
            let rotary = Rotary {
                table: self.rope(),
                query_norm: block.query_norm.as_deref(),
                key_norm: block.key_norm.as_deref(),
                eps,
            };
            kv.attend(means, index, rotary, pages, config.heads, [q, k, v, attended]);
            workers.begin(Phase::O);
            scratch.announce(&[&at_gate, &at_up], rows, hidden, threads);
            fused_linear(
                scratch,
                means,
                Input::Plain(attended),
                &mut [layer(block, Site::O, &at_o, x, true)],
            );

            workers.begin(Phase::GateUp);
            adapters.ask_for(SiteId::new(index + 1, Site::Q), SiteId::new(index + 1, Site::O));
            let normed = Input::Norm { x, weight: &block.feed_forward_norm, eps };
            scratch.announce(&[&at_down], rows, config.feed_forward, threads);
            fused_linear(
                scratch,
                means,
                normed,
                &mut [
                    layer(block, Site::Gate, &at_gate, gate, false),
                    layer(block, Site::Up, &at_up, up, false),
                ],
            );
            workers.begin(Phase::Down);
            let gated = Input::SwiGlu { gate, up };
            if index + 1 < self.blocks().len() {
                let next = |site| adapters.site(SiteId::new(index + 1, site));
                scratch.announce(&[&next(Site::Q), &next(Site::K), &next(Site::V)], rows, hidden, threads);
            }
            fused_linear(scratch, means, gated, &mut [layer(block, Site::Down, &at_down, x, true)]);
        }
        workers.begin(Phase::Head);
        logits.rows = input.wanted.len();
        logits.vocab = vocab;
        let last = at_a_line(last, input.wanted.len() * hidden);
        for (&row, last) in input.wanted.iter().zip(last.chunks_exact_mut(hidden)) {
            last.copy_from_slice(&x[row * hidden..][..hidden]);
        }
        if !last.is_empty() {
            let y = at_a_line(&mut logits.values, input.wanted.len() * vocab);
            let normed = Input::Norm { x: last, weight: self.final_norm(), eps };
            let head =
                Layer { weight: &self.head().weight, bias: None, adapters: &NoAdapters, y, add: false };
            fused_linear(scratch, means, normed, &mut [head]);
            let y = &logits.values[first_at_a_line(&logits.values)..][..logits.rows * vocab];
            logits.maxima.find(means.workers, y, vocab);
        }
        Ok(())
    }
}

fn layer<'a>(
    block: &'a Block,
    site: Site,
    adapters: &'a dyn kernels::Routing,
    y: &'a mut [f32],
    add: bool,
) -> Layer<'a> {
    let linear = &block.linears[site.index()];
    Layer { weight: &linear.weight, bias: linear.bias.as_deref(), adapters, y, add }
}
