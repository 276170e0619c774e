//! The same maths written plainly, in float64 sums: the oracle of the fast kernels' tests.

use crate::attention::KvStore;
use crate::lanes::brain_to_f32;
use crate::linear::Routing;
use crate::low_rank::Numbers;
use crate::paging::{BLOCK, KvElement, Pages};
use crate::weight::Weight;

/// One layer of [`crate::fused_linear`] in float32 activations.
///
/// # Panics
/// When a buffer is shorter than the shapes need.
pub fn linear_adapted(
    weight: &Weight,
    bias: Option<&[f32]>,
    x: &[f32],
    adapters: &dyn Routing,
    y: &mut [f32],
) {
    let (n, k) = (weight.rows(), weight.cols());
    let mut row = vec![0.0; k];
    for j in 0..n {
        weight.decode_row(j, &mut row);
        for (i, x) in x.chunks_exact(k).enumerate() {
            y[i * n + j] = (dot(x, &row) + bias.map_or(0.0, |bias| f64::from(bias[j]))) as f32;
        }
    }
    add_adapters(n, k, x, adapters, y);
}

/// The adapters' part alone: `y[i] += B (A x[i])`.
///
/// # Panics
/// When a buffer is shorter than the shapes need.
pub fn add_adapters(n: usize, k: usize, x: &[f32], adapters: &dyn Routing, y: &mut [f32]) {
    for (i, x) in x.chunks_exact(k).enumerate() {
        let Some(update) = adapters.at(i) else { continue };
        let (a, b) = (values(update.a), values(update.b));
        let scale = |rank: usize| update.scales.get(rank).map_or(1.0, |&scale| f64::from(scale));
        let rows = a.chunks_exact(a.len() / update.rank).enumerate();
        let u: Vec<f64> = rows.map(|(rank, a)| dot(&a[..k], x) * scale(rank)).collect();
        for j in 0..n {
            let b = |r: usize| f64::from(b[(j / 16 * update.rank + r) * 16 + j % 16]);
            y[i * n + j] += u.iter().enumerate().map(|(r, u)| b(r) * u).sum::<f64>() as f32;
        }
    }
}

fn values(numbers: Numbers<'_>) -> Vec<f32> {
    match numbers {
        Numbers::F32(values) => values.to_vec(),
        Numbers::Bf16(values) => values.iter().map(|&value| brain_to_f32(value)).collect(),
        Numbers::I8(codes) => codes.iter().map(|&code| f32::from(code)).collect(),
    }
}

/// What is left of `x` after 8-bit quantisation in blocks of 32.
#[must_use]
pub fn quantised(x: &[f32]) -> Vec<f32> {
    let block = |block: &[f32]| {
        let max = block.iter().map(|v| v.abs()).fold(0.0, f32::max);
        let (scale, inverse) = (max / 127.0, if max > 0.0 { 127.0 / max } else { 0.0 });
        block.iter().map(|v| (v * inverse).round_ties_even() * scale).collect::<Vec<_>>()
    };
    x.chunks(32).flat_map(block).collect()
}

/// As [`crate::linear_transposed`].
///
/// # Panics
/// When a buffer is shorter than the shapes need.
pub fn linear_transposed(weight: &Weight, dy: &[f32], dx: &mut [f32]) {
    let (n, k) = (weight.rows(), weight.cols());
    let mut sums = vec![0.0f64; dx.len()];
    let mut row = vec![0.0; k];
    for j in 0..n {
        weight.decode_row(j, &mut row);
        for (sums, dy) in sums.chunks_exact_mut(k).zip(dy.chunks_exact(n)) {
            for (sum, w) in sums.iter_mut().zip(&row) {
                *sum += f64::from(dy[j]) * f64::from(*w);
            }
        }
    }
    for (dx, sum) in dx.iter_mut().zip(sums) {
        *dx = sum as f32;
    }
}

/// As [`crate::paged_attention`].
///
/// # Panics
/// When a buffer is shorter than the shapes need.
pub fn paged_attention<E: KvElement>(
    kv: &KvStore<'_, E>,
    pages: Pages<'_>,
    heads: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let layout = kv.layout;
    let dim = layout.head_dim;
    let mut first_row = 0;
    for sequence in pages.sequences {
        let blocks = pages.of(sequence);
        for row in 0..sequence.rows {
            let position = sequence.start + row;
            let first = kv.window.map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..heads {
                let kv_head = head / (heads / layout.kv_heads);
                let start =
                    |p: usize| blocks[p / BLOCK] as usize * layout.block_values() + kv_head * BLOCK * dim;
                let key = |p: usize, d: usize| kv.keys[start(p) + d * BLOCK + p % BLOCK].to_f32();
                let value = |p: usize, d: usize| kv.values[start(p) + p % BLOCK * dim + d].to_f32();
                let mine = ((first_row + row) * heads + head) * dim;
                let q = &q[mine..][..dim];
                let product = |(d, q): (usize, &f32), p| f64::from(*q) * f64::from(key(p, d));
                let scores: Vec<f64> = (first..=position)
                    .map(|p| q.iter().enumerate().map(|dq| product(dq, p)).sum::<f64>())
                    .map(|score| score / (dim as f64).sqrt())
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for d in 0..dim {
                    let terms = scores
                        .iter()
                        .zip(first..)
                        .map(|(s, p)| (s - max).exp() / total * f64::from(value(p, d)));
                    out[mine + d] = terms.sum::<f64>() as f32;
                }
            }
        }
        first_row += sequence.rows;
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
