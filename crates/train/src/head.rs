//! Cross-entropy through the frozen output layer, in chunks: the logits of all rows never exist at once.

use kernels::{Products, linear_many, linear_transposed, softmax_loss};
use model::BaseModel;
use rayon::prelude::*;

use crate::buffers::{Pool, norm, norm_grad};
use crate::pack::Pack;
use crate::site::Member;

/// Rows whose logits exist at a time.
const CHUNK: usize = 128;

/// An answer token: its job, the row that predicts it, and itself.
type Target = (usize, usize, u32);

fn targets(pack: &Pack) -> Vec<Target> {
    let segments = pack.segments.iter();
    segments
        .flat_map(|segment| segment.targets.iter().map(move |&(row, token)| (segment.job, row, token)))
        .collect()
}

/// Some answer tokens on their way through the output layer.
struct Outcome {
    /// The rows of the last block's output, and the same normed.
    last: Vec<f32>,
    normed: Vec<f32>,
    /// The logits; their gradients if there are shares.
    logits: Vec<f32>,
    /// In nats.
    losses: Vec<f32>,
}

impl Outcome {
    fn new(
        base: &BaseModel,
        pool: &mut Pool,
        products: Products,
        x: &[f32],
        targets: &[Target],
        share: impl Fn(usize) -> Option<f32> + Sync,
    ) -> Self {
        let head = &base.head().weight;
        let (vocab, width) = (head.rows(), head.cols());
        let rows = targets.len();
        let (mut last, mut normed) = (pool.take(rows * width), pool.take(rows * width));
        for (last, &(_, row, _)) in last.chunks_exact_mut(width).zip(targets) {
            last.copy_from_slice(&x[row * width..][..width]);
        }
        norm(&last, base.final_norm(), base.config().norm_eps, &mut normed);
        let mut logits = pool.take(rows * vocab);
        linear_many(head, products, &normed, &mut logits);
        let each = logits.par_chunks_mut(vocab).zip(targets);
        let losses =
            each.map(|(logits, &(job, _, token))| softmax_loss(logits, token as usize, share(job))).collect();
        Self { last, normed, logits, losses }
    }

    fn release(self, pool: &mut Pool) {
        [self.last, self.normed, self.logits].into_iter().for_each(|buffer| pool.give(buffer));
    }
}

/// Losses of a pass's answer tokens, segment by segment, given the last block's output `x`.
pub(crate) fn losses(base: &BaseModel, pool: &mut Pool, pack: &Pack, x: &[f32]) -> Vec<f32> {
    let mut losses = Vec::new();
    for targets in targets(pack).chunks(CHUNK) {
        let mut outcome = Outcome::new(base, pool, pack.products, x, targets, |_| None);
        losses.append(&mut outcome.losses);
        outcome.release(pool);
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
    let width = head.cols();
    let mut dx = pool.zeros(x.len());
    let shares: Vec<f32> = members.iter().map(|member| member.share).collect();
    for targets in targets(pack).chunks(CHUNK) {
        let mut outcome = Outcome::new(base, pool, pack.products, x, targets, |job| Some(shares[job]));
        for (loss, target) in outcome.losses.iter().zip(targets) {
            *members[target.0].loss += f64::from(*loss);
        }
        linear_transposed(head, pack.products, &outcome.logits, &mut outcome.normed);
        norm_grad(&outcome.last, base.final_norm(), base.config().norm_eps, &mut outcome.normed);
        for (grad, &(_, row, _)) in outcome.normed.chunks_exact(width).zip(targets) {
            dx[row * width..][..width].copy_from_slice(grad);
        }
        outcome.release(pool);
    }
    dx
}
