//! The same maths written plainly, in float64 sums: the oracle of the fast kernels' tests.

use crate::attention::KvStore;
use crate::low_rank::{LowRank, Numbers};
use crate::paging::{BLOCK, KvElement, Pages};
use crate::routing::Routing;
use crate::weight::Weight;

/// One layer of [`crate::fused_linear`]; `quantise` takes the activations of the frozen product in 8 bits.
///
/// # Panics
/// When a buffer is shorter than the shapes need.
pub fn linear_adapted(
    weight: &Weight,
    bias: Option<&[f32]>,
    x: &[f32],
    quantise: bool,
    adapters: &dyn Routing,
    y: &mut [f32],
) {
    let (n, k) = (weight.rows(), weight.cols());
    let rows = x.chunks_exact(k).enumerate().map(|(i, x)| match adapters.vectors(i).input {
        Some(scale) => x.iter().zip(scale).map(|(x, scale)| x * scale).collect(),
        None => x.to_vec(),
    });
    let rows: Vec<Vec<f32>> = rows.collect();
    let entered = |x: &Vec<f32>| if quantise { quantised(x) } else { x.clone() };
    let entered: Vec<Vec<f32>> = rows.iter().map(entered).collect();
    let under: Vec<Vec<f64>> = rows.iter().map(|x| update(adapters.under(), x, n)).collect();
    let own: Vec<Vec<f64>> = rows.iter().enumerate().map(|(i, x)| update(adapters.at(i), x, n)).collect();
    let at = |vector: Option<&[f32]>, j: usize| vector.map(|vector| f64::from(vector[j]));
    let mut row = vec![0.0; k];
    for j in 0..n {
        weight.decode_row(j, &mut row);
        for (i, x) in entered.iter().enumerate() {
            let vectors = adapters.vectors(i);
            let product = (dot(x, &row) + under[i][j]) * at(vectors.output, j).unwrap_or(1.0);
            let biases = at(bias, j).unwrap_or(0.0) + at(vectors.bias, j).unwrap_or(0.0);
            y[i * n + j] = (product + biases + own[i][j]) as f32;
        }
    }
}

/// `B (A x)` of a row, which enters quantised where the factors are kept in eight bits; zeros without an update.
fn update(low_rank: Option<LowRank<'_>>, x: &[f32], n: usize) -> Vec<f64> {
    let Some(update) = low_rank else { return vec![0.0; n] };
    let (a, b) = (update.a.to_f32(), update.b.to_f32());
    let x = if matches!(update.a, Numbers::I8(_)) { quantised(x) } else { x.to_vec() };
    let scale = |rank: usize| update.scales.get(rank).map_or(1.0, |&scale| f64::from(scale));
    let rows = a.chunks_exact(a.len() / update.rank).enumerate();
    let u: Vec<f64> = rows.map(|(rank, a)| dot(&a[..x.len()], &x) * scale(rank)).collect();
    let b = |j: usize, r: usize| f64::from(b[(j / 16 * update.rank + r) * 16 + j % 16]);
    (0..n).map(|j| u.iter().enumerate().map(|(r, u)| b(j, r) * u).sum()).collect()
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
    for sequence in pages.sequences() {
        let blocks = pages.of(sequence);
        for row in 0..sequence.rows {
            let position = sequence.start + row;
            let first = kv.window.map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..heads {
                let kv_head = head / (heads / layout.kv_heads);
                // Of the keys (0) or the values (1): (blocks, layers, 2, kv_heads, BLOCK * dim).
                let start = |p: usize, which: usize| {
                    let block = blocks[p / BLOCK] as usize * layout.layers + kv.layer;
                    ((2 * block + which) * layout.kv_heads + kv_head) * BLOCK * dim
                };
                // Two dimensions of bfloat16 keys lie side by side; of the values, every 32 are (16, 2) turned over.
                let key_at = |p: usize, d: usize| {
                    if E::BRAIN { d / 2 * 2 * BLOCK + p % BLOCK * 2 + d % 2 } else { d * BLOCK + p % BLOCK }
                };
                let value_at = |d: usize| {
                    if E::BRAIN && d < dim / 32 * 32 { d / 32 * 32 + d % 16 * 2 + d % 32 / 16 } else { d }
                };
                let key = |p: usize, d: usize| kv.numbers[start(p, 0) + key_at(p, d)].to_f32();
                let value =
                    |p: usize, d: usize| kv.numbers[start(p, 1) + p % BLOCK * dim + value_at(d)].to_f32();
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

/// [`crate::rms_norm`].
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let n = weight.len();
    for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
        let scale = 1.0 / (dot(x, x) / n as f64 + f64::from(eps)).sqrt();
        for i in 0..n {
            y[i] = (f64::from(x[i]) * scale * f64::from(weight[i])) as f32;
        }
    }
}

/// [`crate::swiglu`].
pub fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        let gate = f64::from(*gate);
        *y = (gate / (1.0 + (-gate).exp()) * f64::from(*up)) as f32;
    }
}

/// [`crate::rope`] of rows of heads, for the inverse frequencies of its table.
pub fn rope(inverse_frequencies: &[f32], positions: &[u32], inverse: bool, x: &mut [f32]) {
    let (half, row) = (inverse_frequencies.len(), x.len() / positions.len());
    for (x, &position) in x.chunks_exact_mut(row).zip(positions) {
        for head in x.chunks_exact_mut(2 * half) {
            for (i, frequency) in inverse_frequencies.iter().enumerate() {
                // As the table: the angle is a float32.
                let angle = f64::from(position as f32 * frequency) * if inverse { -1.0 } else { 1.0 };
                let (sin, cos) = angle.sin_cos();
                let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
                (head[i], head[i + half]) = ((a * cos - b * sin) as f32, (b * cos + a * sin) as f32);
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
