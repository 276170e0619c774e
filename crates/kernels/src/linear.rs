//! The fused linear layer: the frozen product and every row's own adapter in one call.
//!
//! `y[i] = W x[i] + bias + B_s (A_s x[i])`, where `s` is the adapter of row `i`, if it has one (LoRA, Hu et
//! al. 2021; many adapters in one batch as in Punica, Chen et al. 2023, and S-LoRA, Sheng et al. 2023).

use std::cell::Cell;

use rayon::prelude::*;

use crate::format::Weight;
use crate::lanes::{Isa, Lanes, isa, multiversion};
use crate::parallel::Shared;

/// The low-rank adapter of some rows of a batch at one site.
#[derive(Debug, Clone, Copy)]
pub struct AdapterRows<'a> {
    /// The rows of the batch it acts on, each at most once over all adapters of the call.
    pub rows: &'a [u32],
    /// Its rank at this site, at least 1.
    pub rank: usize,
    /// A, shape (rank, input features).
    pub a: &'a [f32],
    /// B with the scale folded in, shape (output features, rank).
    pub b: &'a [f32],
}

/// Rows of the weight that one task computes.
const TASK_ROWS: usize = 32;

/// `y = x Wᵀ + bias`: `x` is (rows, input features), `y` (rows, output features).
///
/// # Panics
/// When a buffer's length does not fit the weight's shape.
pub fn linear(weight: &Weight, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    linear_adapted(weight, bias, x, &[], y);
}

/// [`linear`] plus the adapters of the rows that have one.
///
/// # Panics
/// When a buffer's length does not fit, or an adapter names a row that is not there.
pub fn linear_adapted(
    weight: &Weight,
    bias: Option<&[f32]>,
    x: &[f32],
    adapters: &[AdapterRows<'_>],
    y: &mut [f32],
) {
    linear_adapted_with(isa(), weight, bias, x, adapters, y);
}

/// [`linear_adapted`] on a given vector unit, for tests and benches.
///
/// # Panics
/// As [`linear_adapted`], and when the CPU lacks the unit.
pub fn linear_adapted_with(
    isa: Isa,
    weight: &Weight,
    bias: Option<&[f32]>,
    x: &[f32],
    adapters: &[AdapterRows<'_>],
    y: &mut [f32],
) {
    let (n, k) = (weight.rows(), weight.cols());
    let m = x.len() / k;
    assert_eq!(x.len(), m * k, "x does not divide into rows of {k}");
    assert_eq!(y.len(), m * n, "y is not {m} x {n}");
    assert!(bias.is_none_or(|bias| bias.len() == n), "the bias has not {n} values");
    for adapter in adapters {
        assert_eq!(adapter.a.len(), adapter.rank * k, "A is not {} x {k}", adapter.rank);
        assert_eq!(adapter.b.len(), adapter.rank * n, "B is not {n} x {}", adapter.rank);
        assert!(adapter.rows.iter().all(|&row| (row as usize) < m), "an adapter names a row beyond {m}");
    }
    let shrunk: Vec<Vec<f32>> = adapters.par_iter().map(|adapter| shrink(isa, adapter, x, k)).collect();
    let out = Shared::new(y);
    (0..n.div_ceil(TASK_ROWS)).into_par_iter().for_each(|task| {
        let first = task * TASK_ROWS;
        let count = TASK_ROWS.min(n - first);
        tile(isa, weight, bias, first, count, x, m, out);
        for (adapter, shrunk) in adapters.iter().zip(&shrunk) {
            expand(isa, adapter, shrunk, n, first, count, out);
        }
    });
}

/// Adds an adapter's update alone to `y`, which is (rows, output features): `y[i] += B (A x[i])` for its rows.
///
/// # Panics
/// When a buffer's length does not fit, or the adapter names a row that is not there.
pub fn adapt(adapter: &AdapterRows<'_>, x: &[f32], y: &mut [f32]) {
    let (k, n) = (adapter.a.len() / adapter.rank, adapter.b.len() / adapter.rank);
    let fits = |row: &u32| (*row as usize + 1) * k <= x.len() && (*row as usize + 1) * n <= y.len();
    assert!(adapter.rows.iter().all(fits), "an adapter names a row that is not there");
    let shrunk = shrink(isa(), adapter, x, k);
    let out = Shared::new(y);
    (0..n.div_ceil(TASK_ROWS)).into_par_iter().for_each(|task| {
        let first = task * TASK_ROWS;
        expand(isa(), adapter, &shrunk, n, first, TASK_ROWS.min(n - first), out);
    });
}

/// `A x` for the adapter's rows: shape (adapter rows, rank).
fn shrink(isa: Isa, adapter: &AdapterRows<'_>, x: &[f32], k: usize) -> Vec<f32> {
    let mut out = vec![0.0; adapter.rows.len() * adapter.rank];
    for (&row, out) in adapter.rows.iter().zip(out.chunks_exact_mut(adapter.rank)) {
        matvec(isa, adapter.a, &x[row as usize * k..][..k], out);
    }
    out
}

multiversion! {
    /// `out[i] = matrix[i] . x`, `matrix` of shape (out.len(), x.len()).
    pub(crate) fn matvec(matrix: &[f32], x: &[f32], out: &mut [f32]) = matvec_body<Lanes>
}

#[inline(always)]
fn matvec_body<L: Lanes>(matrix: &[f32], x: &[f32], out: &mut [f32]) {
    let k = x.len();
    for (out, row) in out.iter_mut().zip(matrix.chunks_exact(k)) {
        *out = block::<L, 1, 1>([x], [row])[0][0];
    }
}

multiversion! {
    /// Adds `B (A x)` to the columns `first..first + count` of the adapter's rows.
    fn expand(
        adapter: &AdapterRows<'_>, shrunk: &[f32], n: usize, first: usize, count: usize, out: Shared<'_>,
    ) = expand_body<Lanes>
}

#[inline(always)]
fn expand_body<L: Lanes>(
    adapter: &AdapterRows<'_>,
    shrunk: &[f32],
    n: usize,
    first: usize,
    count: usize,
    out: Shared<'_>,
) {
    let rank = adapter.rank;
    let b = &adapter.b[first * rank..][..count * rank];
    for (&row, u) in adapter.rows.iter().zip(shrunk.chunks_exact(rank)) {
        // SAFETY: tasks own disjoint columns, and a row has at most one adapter.
        let y = unsafe { out.part(row as usize * n + first, count) };
        for (y, b) in y.iter_mut().zip(b.chunks_exact(rank)) {
            *y += block::<L, 1, 1>([u], [b])[0][0];
        }
    }
}

thread_local! {
    /// Decoded weight rows of the tile at hand.
    static DECODED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

multiversion! {
    /// The frozen product for the output columns `first..first + count`.
    fn tile(
        weight: &Weight, bias: Option<&[f32]>, first: usize, count: usize, x: &[f32], m: usize, out: Shared<'_>,
    ) = tile_body<Lanes>
}

#[inline(always)]
fn tile_body<L: Lanes>(
    weight: &Weight,
    bias: Option<&[f32]>,
    first: usize,
    count: usize,
    x: &[f32],
    m: usize,
    out: Shared<'_>,
) {
    let (n, k) = (weight.rows(), weight.cols());
    // Taken out and put back rather than borrowed in a closure: closures do not inherit the vector unit.
    let mut decoded = DECODED.take();
    decoded.resize(4 * k, 0.0);
    let mut column = first;
    while column < first + count {
        let wide = (first + count - column).min(4);
        for (row, values) in decoded.chunks_exact_mut(k).take(wide).enumerate() {
            weight.decode_row(column + row, values);
        }
        let mut row = 0;
        while row < m {
            let tall = if wide == 4 { (m - row).min(4) } else { 1 };
            let x = &x[row * k..][..tall * k];
            let mut sums = [[0.0; 4]; 4];
            match (tall, wide) {
                (4, 4) => sums = block::<L, 4, 4>(rows(x, k), rows(&decoded, k)),
                (_, 4) => {
                    for (x, sums) in x.chunks_exact(k).zip(&mut sums) {
                        *sums = block::<L, 1, 4>([x], rows(&decoded, k))[0];
                    }
                }
                _ => {
                    for (w, sum) in decoded.chunks_exact(k).take(wide).zip(&mut sums[0]) {
                        *sum = block::<L, 1, 1>([x], [w])[0][0];
                    }
                }
            }
            for (i, sums) in sums[..tall].iter().enumerate() {
                // SAFETY: tasks own disjoint columns; within a task one part is alive at a time.
                let y = unsafe { out.part((row + i) * n + column, wide) };
                y.copy_from_slice(&sums[..wide]);
                if let Some(bias) = bias {
                    y.iter_mut().zip(&bias[column..]).for_each(|(y, bias)| *y += bias);
                }
            }
            row += tall;
        }
        column += wide;
    }
    DECODED.set(decoded);
}

#[inline(always)]
fn rows<const N: usize>(matrix: &[f32], k: usize) -> [&[f32]; N] {
    std::array::from_fn(|i| &matrix[i * k..][..k])
}

/// The dot products of `M` rows with `N` rows of the same length. Each is summed in the same order
/// whatever `M` and `N` are: sixteen lanes, their tree, then the tail.
#[inline(always)]
pub(crate) fn block<L: Lanes, const M: usize, const N: usize>(
    x: [&[f32]; M],
    w: [&[f32]; N],
) -> [[f32; N]; M] {
    let k = w[0].len();
    assert!(x.iter().chain(&w).all(|row| row.len() == k));
    let body = k - k % 16;
    let mut sums = [[L::zero(); N]; M];
    let mut at = 0;
    while at < body {
        let mut panel = [L::zero(); N];
        for j in 0..N {
            // SAFETY: `at + 16 <= body <= k`, the length of every row (asserted).
            panel[j] = unsafe { L::load(w[j].as_ptr().add(at)) };
        }
        for i in 0..M {
            // SAFETY: as above.
            let x = unsafe { L::load(x[i].as_ptr().add(at)) };
            for j in 0..N {
                sums[i][j] = sums[i][j].fma(x, panel[j]);
            }
        }
        at += 16;
    }
    let mut dots = [[0.0; N]; M];
    for i in 0..M {
        for j in 0..N {
            let mut sum = sums[i][j].sum();
            for at in body..k {
                sum += x[i][at] * w[j][at];
            }
            dots[i][j] = sum;
        }
    }
    dots
}
