//! The same maths written plainly, in float64 sums: the oracle of the fast kernels' tests.

use crate::attention::{KvView, PagedSequence};
use crate::format::Weight;
use crate::linear::AdapterRows;

/// As [`crate::linear_adapted`].
///
/// # Panics
/// When a buffer is shorter than the shapes need.
pub fn linear_adapted(
    weight: &Weight,
    bias: Option<&[f32]>,
    x: &[f32],
    adapters: &[AdapterRows<'_>],
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
    for adapter in adapters {
        for &i in adapter.rows {
            let x = &x[i as usize * k..][..k];
            let u: Vec<f32> = adapter.a.chunks_exact(k).map(|a| dot(a, x) as f32).collect();
            for (j, b) in adapter.b.chunks_exact(adapter.rank).enumerate() {
                y[i as usize * n + j] += dot(b, &u) as f32;
            }
        }
    }
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
pub fn paged_attention(
    kv: &KvView<'_>,
    sequences: &[PagedSequence<'_>],
    heads: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let layout = kv.layout;
    let dim = layout.head_dim;
    let at = |blocks: &[u32], head: usize, position: usize| {
        let inside = (head * layout.block_len + position % layout.block_len) * dim;
        blocks[position / layout.block_len] as usize * layout.block_values() + inside
    };
    for sequence in sequences {
        for row in 0..sequence.rows {
            let position = sequence.start + row;
            let first = kv.window.map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..heads {
                let kv_head = head / (heads / layout.kv_heads);
                let mine = ((sequence.first_row + row) * heads + head) * dim;
                let scores: Vec<f64> = (first..=position)
                    .map(|p| dot(&q[mine..][..dim], &kv.keys[at(sequence.blocks, kv_head, p)..][..dim]))
                    .map(|score| score / (dim as f64).sqrt())
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for d in 0..dim {
                    let value = |p| f64::from(kv.values[at(sequence.blocks, kv_head, p) + d]);
                    let terms = scores.iter().zip(first..).map(|(s, p)| (s - max).exp() / total * value(p));
                    out[mine + d] = terms.sum::<f64>() as f32;
                }
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
