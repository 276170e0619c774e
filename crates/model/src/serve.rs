//! The serving pass: rows of many sequences, each with its own adapter, over the paged KV pool.

use candle_core::Tensor;
use kernels::{PagedSequence, Span};
use peft::AdapterBatch;
use types::SiteId;

use crate::config::ModelConfig;
use crate::decoder::{BaseModel, Linear, Pass};
use crate::error::ModelError;
use crate::kv::{BLOCK_LEN, KvPool};
use crate::ops::{SpanAttend, map};

/// One sequence's part of a step: consecutive tokens at consecutive positions.
#[derive(Debug, Clone)]
pub struct SequenceRows {
    /// The tokens, at least one.
    pub tokens: Vec<u32>,
    /// Position of the first.
    pub start: usize,
    /// The sequence's blocks; they reach the last position.
    pub blocks: Vec<u32>,
    /// Whether the logits after the last token are wanted.
    pub want_logits: bool,
}

/// A step's rows, sequence after sequence.
#[derive(Debug, Clone, Default)]
pub struct BatchInput {
    /// The sequences.
    pub sequences: Vec<SequenceRows>,
}

impl BatchInput {
    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.tokens.len()).sum()
    }
}

/// The logits of the sequences that wanted them, in their order.
#[derive(Debug)]
pub struct Logits {
    values: Vec<f32>,
    vocab: usize,
}

impl Logits {
    /// The rows, each with one value per token of the vocabulary.
    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.vocab)
    }
}

impl BaseModel {
    /// One forward pass. `adapters` routes every row of `input`, in order, to its adapter or to none.
    ///
    /// # Errors
    /// When a token, position or block is out of range; the pool then holds no sequence's state but that of
    /// the sequences in `input`, which must be given up.
    pub fn forward(
        &self,
        input: &BatchInput,
        kv: &mut KvPool,
        adapters: &AdapterBatch,
    ) -> Result<Logits, ModelError> {
        let vocab = self.config().vocab;
        let (mut tokens, mut positions, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        for sequence in &input.sequences {
            let end = sequence.start + sequence.tokens.len();
            let known = |block: &u32| (*block as usize) < kv.blocks();
            if sequence.tokens.is_empty()
                || end > sequence.blocks.len() * BLOCK_LEN
                || !sequence.blocks.iter().all(known)
            {
                return Err(ModelError::Batch(format!(
                    "positions up to {end} in {} blocks",
                    sequence.blocks.len()
                )));
            }
            tokens.extend_from_slice(&sequence.tokens);
            positions.extend((sequence.start as u32..).take(sequence.tokens.len()));
            if sequence.want_logits {
                wanted.push(tokens.len() - 1);
            }
        }
        let mut pass = Serving { input, kv, adapters, heads: self.config().heads };
        let hidden = self.hidden(&tokens, &positions, &mut pass)?;
        if wanted.is_empty() {
            return Ok(Logits { values: Vec::new(), vocab });
        }
        let width = self.config().hidden;
        let rows = map("gather", &hidden, &[], wanted.len() * width, |hidden, _| {
            wanted.iter().flat_map(|row| &hidden[row * width..][..width]).copied().collect()
        })?;
        let logits = map("head", &rows, &[], wanted.len() * vocab, |rows, _| {
            let mut logits = vec![0.0; wanted.len() * vocab];
            kernels::linear(&self.head().weight, None, rows, &mut logits);
            logits
        })?;
        Ok(Logits { values: logits.to_vec1()?, vocab })
    }
}

struct Serving<'a> {
    input: &'a BatchInput,
    kv: &'a mut KvPool,
    adapters: &'a AdapterBatch,
    heads: usize,
}

impl Pass for Serving<'_> {
    fn linear(&mut self, id: SiteId, linear: &Linear, x: &Tensor) -> Result<Tensor, ModelError> {
        fused_linear(id, linear, x, self.adapters)
    }

    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, ModelError> {
        let width = k.dims2()?.1;
        let (keys, values) = (k.flatten_all()?.to_vec1::<f32>()?, v.flatten_all()?.to_vec1::<f32>()?);
        let mut sequences = Vec::with_capacity(self.input.sequences.len());
        let mut first_row = 0;
        for sequence in &self.input.sequences {
            let rows = sequence.tokens.len();
            for row in 0..rows {
                let at = (first_row + row) * width;
                let (key, value) = (&keys[at..at + width], &values[at..at + width]);
                self.kv.store(layer, &sequence.blocks, sequence.start + row, key, value);
            }
            sequences.push(PagedSequence {
                blocks: &sequence.blocks,
                first_row,
                rows,
                start: sequence.start,
            });
            first_row += rows;
        }
        let view = self.kv.view(layer);
        Ok(map("paged-attention", q, &[], q.shape(), |q, _| {
            let mut out = vec![0.0; q.len()];
            kernels::paged_attention(&view, &sequences, self.heads, q, &mut out);
            out
        })?)
    }
}

/// The frozen product and every row's adapter, without a gradient.
fn fused_linear(
    id: SiteId,
    linear: &Linear,
    x: &Tensor,
    adapters: &AdapterBatch,
) -> Result<Tensor, ModelError> {
    let adapters = adapters.at(id);
    let rows = x.dims2()?.0;
    let width = linear.weight.rows();
    Ok(map("fused-linear", x, &[], (rows, width), |x, _| {
        let mut y = vec![0.0; rows * width];
        kernels::linear_adapted(&linear.weight, linear.bias.as_deref(), x, &adapters, &mut y);
        y
    })?)
}

/// Whole sequences packed one after another, without KV and without gradients: for measuring losses.
#[derive(Debug)]
pub struct PackedPass<'a> {
    /// The sequences' rows.
    pub spans: &'a [Span],
    /// Every row's adapter.
    pub adapters: &'a AdapterBatch,
    /// Dimensions of the model it runs on.
    pub config: &'a ModelConfig,
}

impl Pass for PackedPass<'_> {
    fn linear(&mut self, id: SiteId, linear: &Linear, x: &Tensor) -> Result<Tensor, ModelError> {
        fused_linear(id, linear, x, self.adapters)
    }

    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, ModelError> {
        let shape = self.config.span_attention(layer, self.spans);
        Ok(q.apply_op3_no_bwd(k, v, &SpanAttend(shape))?)
    }
}
