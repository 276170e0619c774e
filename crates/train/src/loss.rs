//! Cross-entropy through the frozen output layer, in chunks: the logits of all rows never exist at once.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use model::{Linear, map, slice_of};
use rayon::prelude::*;

/// Rows whose logits exist at a time.
const CHUNK: usize = 64;

/// `-log softmax(head x)[target]` per row; the gradient goes to `x` alone.
pub(crate) struct CrossEntropy {
    pub(crate) head: Linear,
    pub(crate) targets: Vec<u32>,
}

impl CrossEntropy {
    /// Calls `each(first row, logits, targets)` for every chunk of rows of `x`.
    fn chunks(&self, x: &[f32], mut each: impl FnMut(usize, Vec<f32>, &[u32])) {
        let weight = &self.head.weight;
        let (vocab, width) = (weight.rows(), weight.cols());
        for (chunk, (x, targets)) in x.chunks(CHUNK * width).zip(self.targets.chunks(CHUNK)).enumerate() {
            let mut logits = vec![0.0; targets.len() * vocab];
            kernels::linear(weight, self.head.bias.as_deref(), x, &mut logits);
            each(chunk * CHUNK, logits, targets);
        }
    }

    /// The loss of each row of `x`, in nats.
    pub(crate) fn losses(&self, x: &[f32]) -> Vec<f32> {
        let vocab = self.head.weight.rows();
        let mut losses = Vec::with_capacity(self.targets.len());
        self.chunks(x, |_, logits, targets| {
            let rows = logits.par_chunks(vocab).zip(targets.par_iter());
            losses.par_extend(rows.map(|(logits, &target)| {
                let (max, sum) = normaliser(logits);
                max + sum.ln() - logits[target as usize]
            }));
        });
        losses
    }
}

/// The largest logit and the sum of the others' exponentials relative to it.
fn normaliser(logits: &[f32]) -> (f32, f32) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - max).exp())).sum();
    (max, sum as f32)
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "head-cross-entropy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let losses = self.losses(slice_of(storage, layout)?);
        let shape = losses.len().into();
        Ok((CpuStorage::F32(losses), shape))
    }

    /// `dx = dloss (softmax - onehot(target)) W`, logits computed again.
    fn bwd(&self, x: &Tensor, _: &Tensor, dloss: &Tensor) -> Result<Option<Tensor>> {
        let (vocab, width) = (self.head.weight.rows(), self.head.weight.cols());
        let dx = map("head-cross-entropy-grad", x, &[dloss], x.shape(), |x, rest| {
            let mut dx = vec![0.0; x.len()];
            self.chunks(x, |first, mut logits, targets| {
                let scales = &rest[0][first..first + targets.len()];
                logits.par_chunks_mut(vocab).zip(targets).zip(scales).for_each(
                    |((logits, &target), &scale)| {
                        let (max, sum) = normaliser(logits);
                        logits.iter_mut().for_each(|logit| *logit = (*logit - max).exp() / sum * scale);
                        logits[target as usize] -= scale;
                    },
                );
                let part = &mut dx[first * width..][..targets.len() * width];
                kernels::linear_transposed(&self.head.weight, &logits, part);
            });
            dx
        })?;
        Ok(Some(dx))
    }
}
