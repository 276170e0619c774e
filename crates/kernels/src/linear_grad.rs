//! The gradient of the frozen product with respect to its input; the weight itself gets none.

use std::cell::Cell;

use rayon::prelude::*;

use crate::lanes::{Lanes, isa, multiversion};
use crate::panel::decode_panel;
use crate::weight::{PANEL, Weight};

thread_local! {
    static DECODED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// `dx = dy W`: `dy` is (rows, output features), `dx` (rows, input features). Each row is summed over the
/// output features in their order.
///
/// # Panics
/// When a buffer's length does not fit the weight's shape.
pub fn linear_transposed(weight: &Weight, dy: &[f32], dx: &mut [f32]) {
    let (n, k) = (weight.rows(), weight.cols());
    let m = dy.len() / n;
    assert_eq!(dy.len(), m * n, "dy does not divide into rows of {n}");
    assert_eq!(dx.len(), m * k, "dx is not {m} x {k}");
    // Every task decodes the whole weight, so few, tall tasks.
    let tall = m.div_ceil(rayon::current_num_threads()).next_multiple_of(4).max(4);
    dx.par_chunks_mut(tall * k).zip(dy.par_chunks(tall * n)).for_each(|(dx, dy)| {
        stripe(isa(), weight, dy, dx);
    });
}

multiversion! {
    fn stripe(weight: &Weight, dy: &[f32], dx: &mut [f32]) = stripe_body<Lanes>
}

#[inline(always)]
fn stripe_body<L: Lanes>(weight: &Weight, dy: &[f32], dx: &mut [f32]) {
    let (n, k) = (weight.rows(), weight.cols());
    dx.fill(0.0);
    let mut decoded = DECODED.take();
    decoded.resize(PANEL * k, 0.0);
    for (index, first) in (0..n).step_by(PANEL).enumerate() {
        let count = PANEL.min(n - first);
        // SAFETY: this code is compiled for the unit of `L`.
        unsafe { decode_panel::<L>(weight, index, &mut decoded[..PANEL * k]) };
        let panel = &decoded[..count * k];
        let mut dx = dx.chunks_exact_mut(4 * k);
        let mut dy = dy.chunks_exact(4 * n);
        for (dx, dy) in dx.by_ref().zip(dy.by_ref()) {
            add_panel::<L, 4>(panel, first, n, k, dy, dx);
        }
        let rest = dx.into_remainder().chunks_exact_mut(k).zip(dy.remainder().chunks_exact(n));
        for (dx, dy) in rest {
            add_panel::<L, 1>(panel, first, n, k, dy, dx);
        }
    }
    DECODED.set(decoded);
}

/// `dx += dy[:, first..] panel` for `M` rows.
#[inline(always)]
fn add_panel<L: Lanes, const M: usize>(
    panel: &[f32],
    first: usize,
    n: usize,
    k: usize,
    dy: &[f32],
    dx: &mut [f32],
) {
    let count = panel.len() / k;
    let body = k - k % 16;
    let mut at = 0;
    while at < body {
        let mut sums = [L::zero(); M];
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `at + 16 <= k`, rows of `panel` and `dx` are `k` long.
            *sum = unsafe { L::load(dx.as_ptr().add(i * k + at)) };
        }
        for j in 0..count {
            // SAFETY: as above.
            let w = unsafe { L::load(panel.as_ptr().add(j * k + at)) };
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = sum.fma(L::splat(dy[i * n + first + j]), w);
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { sum.store(dx.as_mut_ptr().add(i * k + at)) };
        }
        at += 16;
    }
    for i in 0..M {
        for at in body..k {
            for j in 0..count {
                dx[i * k + at] += dy[i * n + first + j] * panel[j * k + at];
            }
        }
    }
}
