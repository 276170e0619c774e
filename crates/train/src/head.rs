//! Cross-entropy through the frozen output layer, in chunks: the logits of all rows never exist at once.

use kernels::{linear_many, linear_transposed, softmax_weights};
use model::BaseModel;
use rayon::prelude::*;

use crate::buffers::{Pool, norm, norm_grad};
use crate::pack::Pack;
use crate::site::Member;

/// Rows whose logits exist at a time.
const CHUNK: usize = 128;

/// `-log softmax(logits)[target]` in nats; with a share, the logits become its gradient times the share.
fn row_loss(logits: &mut [f32], target: u32, share: Option<f32>) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let own = logits[target as usize];
    let mut weights = vec![0.0; logits.len()];
    softmax_weights(logits, max, 1.0, &mut weights);
    let mut sums = [0.0f64; 8];
    let (body, tail) = weights.as_chunks::<8>();
    for part in body {
        sums.iter_mut().zip(part).for_each(|(sum, weight)| *sum += f64::from(*weight));
    }
    let sum = sums.iter().sum::<f64>() + tail.iter().map(|weight| f64::from(*weight)).sum::<f64>();
    if let Some(share) = share {
        let scale = share / sum as f32;
        logits.iter_mut().zip(&weights).for_each(|(logit, weight)| *logit = weight * scale);
        logits[target as usize] -= share;
    }
    max + (sum.ln() as f32) - own
}

/// Losses of rows of the last hidden states, final norm applied.
pub(crate) fn losses(base: &BaseModel, x: &[f32], targets: &[u32]) -> Vec<f32> {
    let head = &base.head().weight;
    let (vocab, width) = (head.rows(), head.cols());
    let mut losses = Vec::with_capacity(targets.len());
    for (x, targets) in x.chunks(CHUNK * width).zip(targets.chunks(CHUNK)) {
        let mut logits = vec![0.0; targets.len() * vocab];
        linear_many(head, x, &mut logits);
        let rows = logits.par_chunks_mut(vocab).zip(targets);
        losses.par_extend(rows.map(|(logits, &target)| row_loss(logits, target, None)));
    }
    losses
}

/// Adds the losses of a pass's answer tokens to their jobs, and gives the gradient of the last block's output `x`.
pub(crate) fn loss_and_grad(
    base: &BaseModel,
    pool: &mut Pool,
    members: &mut [Member<'_>],
    pack: &Pack,
    x: &[f32],
) -> Vec<f32> {
    let head = &base.head().weight;
    let (vocab, width) = (head.rows(), head.cols());
    let eps = base.config().norm_eps;
    let mut dx = pool.zeros(x.len());
    let targets: Vec<(usize, usize, u32)> = pack
        .segments
        .iter()
        .flat_map(|segment| segment.targets.iter().map(|&(row, token)| (segment.job, row, token)))
        .collect();
    for targets in targets.chunks(CHUNK) {
        let rows = targets.len();
        let (mut last, mut normed) = (pool.take(rows * width), pool.take(rows * width));
        for (last, &(_, row, _)) in last.chunks_exact_mut(width).zip(targets) {
            last.copy_from_slice(&x[row * width..][..width]);
        }
        norm(&last, base.final_norm(), eps, &mut normed);
        let mut logits = pool.take(rows * vocab);
        linear_many(head, &normed, &mut logits);
        let shares: Vec<f32> = targets.iter().map(|target| members[target.0].share).collect();
        let losses: Vec<f32> = logits
            .par_chunks_mut(vocab)
            .zip(targets)
            .zip(shares)
            .map(|((logits, target), share)| row_loss(logits, target.2, Some(share)))
            .collect();
        for (loss, target) in losses.into_iter().zip(targets) {
            *members[target.0].loss += f64::from(loss);
        }
        linear_transposed(head, &logits, &mut normed);
        norm_grad(&last, base.final_norm(), eps, &mut normed);
        for (grad, &(_, row, _)) in normed.chunks_exact(width).zip(targets) {
            dx[row * width..][..width].copy_from_slice(grad);
        }
        [last, normed, logits].into_iter().for_each(|buffer| pool.give(buffer));
    }
    dx
}
