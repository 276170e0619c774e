//! Products of many rows with a frozen matrix, forwards and backwards: every panel is decoded once for all rows.
//!
//! The weight itself gets no gradient. Rows are summed in one fixed order each, in float32; the factors are float32 here,
//! bfloat16 in [`crate::many_rows_bf16`].

use std::cell::Cell;
use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::buffer::at_a_line;
use crate::isa::isa;
use crate::lanes::{Lanes, multiversion};
use crate::layout::{Columns, with_layout};
use crate::many_rows_bf16::{self, has_bf16};
use crate::matrices::Product;
use crate::parallel::Shared;
use crate::weight::{PANEL, Panel, Weight};

thread_local! {
    static DECODED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Decoded values a task works with at a time: they stay in the second-level cache.
const DECODED_VALUES: usize = 48 * 1024;

/// Rows that pass over the decoded values together, while they are in the first-level cache.
pub(crate) const BLOCK_ROWS: usize = 12;

/// Input columns of a backward task.
pub(crate) const BACK_COLUMNS: usize = 96;

/// Output features it decodes at a time.
const BACK_OUTPUTS: usize = 256;

/// In what numbers activations and weights are multiplied; sums are float32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Products {
    /// Float32, as in the reference implementation.
    #[default]
    F32,
    /// Rounded to bfloat16: at twice the rate where the CPU has instructions for it.
    Bf16,
}

impl Products {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::F32, Self::Bf16];

    /// The ones this CPU computes fastest.
    #[must_use]
    pub fn fastest() -> Self {
        if has_bf16() { Self::Bf16 } else { Self::F32 }
    }
}

/// `y = x Wᵀ`: `x` is (rows, input features), `y` (rows, output features). On the caller's rayon pool.
///
/// # Panics
/// When a buffer's length does not fit the weight's shape.
pub fn linear_many(weight: &Weight, products: Products, x: &[f32], y: &mut [f32]) {
    let (n, k) = (weight.rows(), weight.cols());
    let m = x.len() / k;
    assert_eq!(x.len(), m * k, "x does not divide into rows of {k}");
    assert_eq!(y.len(), m * n, "y is not {m} x {n}");
    if products == Products::Bf16 {
        return many_rows_bf16::forwards(weight, x, y, has_bf16());
    }
    let y = Shared::new(y);
    let most = (DECODED_VALUES / (PANEL * k)).clamp(1, 8);
    in_parts(weight.panels(), most, m, |own, rows| forwards(isa(), weight, own, rows, x, y));
}

/// `dx = dy W`: `dy` is (rows, output features), `dx` (rows, input features). Each row is summed over the output
/// features in their order. On the caller's rayon pool.
///
/// # Panics
/// When a buffer's length does not fit the weight's shape.
pub fn linear_transposed(weight: &Weight, products: Products, dy: &[f32], dx: &mut [f32]) {
    let (n, k) = (weight.rows(), weight.cols());
    let m = dy.len() / n;
    assert_eq!(dy.len(), m * n, "dy does not divide into rows of {n}");
    assert_eq!(dx.len(), m * k, "dx is not {m} x {k}");
    if products == Products::Bf16 {
        return many_rows_bf16::backwards(weight, dy, dx, has_bf16());
    }
    let dx = Shared::new(dx);
    in_parts(k.div_ceil(PANEL), BACK_COLUMNS / PANEL, m, |own, rows| {
        backwards(isa(), weight, own.map(|group| (group * PANEL).min(k)), rows, dy, dx);
    });
}

/// Calls `body` on the caller's rayon pool with every task's share of `parts` and of `rows`, each from a first one to
/// before a last; a task has about `most` parts.
pub(crate) fn in_parts(parts: usize, most: usize, rows: usize, body: impl Fn([usize; 2], [usize; 2]) + Sync) {
    let tasks = tasks(parts, most);
    let (stripes, each) = stripes(tasks, rows);
    (0..tasks * stripes).into_par_iter().for_each(|task| {
        let (at, row) = (task / stripes, task % stripes * each);
        body([at, at + 1].map(|at| at * parts / tasks), [row, (row + each).min(rows)]);
    });
}

/// Into how many tasks so many parts are divided, of `most` parts each: as many for every thread.
fn tasks(parts: usize, most: usize) -> usize {
    parts.div_ceil(most).next_multiple_of(rayon::current_num_threads()).min(parts)
}

/// Rows are divided too when there are fewer tasks than would keep every thread busy to the end: each part decodes
/// the weights again.
fn stripes(tasks: usize, rows: usize) -> (usize, usize) {
    let wanted = (3 * rayon::current_num_threads()).div_ceil(tasks).min(rows.div_ceil(64)).max(1);
    let each = rows.div_ceil(wanted).next_multiple_of(BLOCK_ROWS).max(BLOCK_ROWS);
    (rows.div_ceil(each).max(1), each)
}

multiversion! {
    fn forwards(weight: &Weight, panels: [usize; 2], rows: [usize; 2], x: &[f32], y: Shared<'_>)
        = forwards_body<Lanes>
}

#[inline(always)]
fn forwards_body<L: Lanes>(weight: &Weight, panels: [usize; 2], rows: [usize; 2], x: &[f32], y: Shared<'_>) {
    let (n, k) = (weight.rows(), weight.cols());
    let mut buffer = DECODED.take();
    let decoded = at_a_line(&mut buffer, (panels[1] - panels[0]) * PANEL * k);
    for (at, index) in (panels[0]..panels[1]).enumerate() {
        let out = decoded[at * PANEL * k..][..PANEL * k].as_mut_ptr();
        // SAFETY: the panel has `k` columns, the buffer `k` times sixteen values; this code is compiled for the unit.
        unsafe { decode::<L>(weight, index, 0, k, out) };
    }
    for row in (rows[0]..rows[1]).step_by(BLOCK_ROWS) {
        for (at, index) in (panels[0]..panels[1]).enumerate() {
            let product = Product {
                left: x[row * k..].as_ptr(),
                row: k,
                step: 1,
                right: decoded[at * PANEL * k..].as_ptr(),
                stride: PANEL,
                len: k,
                out: y.start().wrapping_add(row * n + index * PANEL),
                out_stride: n,
                add: false,
            };
            // SAFETY: the block's rows lie in `x` and `y`; tasks have disjoint rows or columns.
            unsafe { product.strip(BLOCK_ROWS.min(rows[1] - row), PANEL.min(n - index * PANEL)) };
        }
    }
    DECODED.set(buffer);
}

multiversion! {
    fn backwards(weight: &Weight, columns: [usize; 2], rows: [usize; 2], dy: &[f32], dx: Shared<'_>)
        = backwards_body<Lanes>
}

#[inline(always)]
fn backwards_body<L: Lanes>(
    weight: &Weight,
    [from, to]: [usize; 2],
    rows: [usize; 2],
    dy: &[f32],
    dx: Shared<'_>,
) {
    let (n, k) = (weight.rows(), weight.cols());
    let mut buffer = DECODED.take();
    let groups = (to - from).div_ceil(PANEL);
    let decoded = at_a_line(&mut buffer, groups * PANEL * BACK_OUTPUTS);
    for first in (0..n).step_by(BACK_OUTPUTS) {
        let count = BACK_OUTPUTS.min(n - first);
        for panel in 0..count.div_ceil(PANEL) {
            for group in 0..groups {
                let out = &mut decoded[(group * BACK_OUTPUTS + panel * PANEL) * PANEL..][..PANEL * PANEL];
                let own = [from + group * PANEL, to];
                // SAFETY: the panel has these columns, `out` sixteen times sixteen values; this code is compiled for the unit.
                unsafe { decode_turned::<L>(weight, first / PANEL + panel, own, out.as_mut_ptr()) };
            }
        }
        for row in (rows[0]..rows[1]).step_by(BLOCK_ROWS) {
            ask_for_block::<L, f32>(dy, n, [row + BLOCK_ROWS, rows[1]], [first, count]);
            for group in 0..groups {
                let column = from + group * PANEL;
                let product = Product {
                    left: dy[row * n + first..].as_ptr(),
                    row: n,
                    step: 1,
                    right: decoded[group * BACK_OUTPUTS * PANEL..].as_ptr(),
                    stride: PANEL,
                    len: count,
                    out: dx.start().wrapping_add(row * k + column),
                    out_stride: k,
                    add: first > 0,
                };
                // SAFETY: the block's rows lie in `dy` and `dx`; tasks have disjoint rows or columns.
                unsafe { product.strip(BLOCK_ROWS.min(rows[1] - row), PANEL.min(to - column)) };
            }
        }
    }
    DECODED.set(buffer);
}

/// Asks for some columns, `count` from `first` on, of the block of rows from `row` on, if there are any before `end`:
/// pieces of rows lie far apart, and nobody else fetches them ahead.
#[inline(always)]
pub(crate) fn ask_for_block<L: Lanes, T>(
    values: &[T],
    stride: usize,
    [row, end]: [usize; 2],
    [first, count]: [usize; 2],
) {
    for row in row..(row + BLOCK_ROWS).min(end) {
        let piece = values[row * stride + first..][..count].as_ptr().cast::<u8>();
        (0..count * size_of::<T>()).step_by(64).for_each(|at| L::prefetch(piece.wrapping_add(at)));
    }
}

/// Columns `from..from + count` of panel `index`, sixteen values each.
///
/// # Safety
/// As for [`columns`].
#[inline(always)]
pub(crate) unsafe fn decode<L: Lanes>(
    weight: &Weight,
    index: usize,
    from: usize,
    count: usize,
    out: *mut f32,
) {
    // SAFETY: the caller vouches for the columns and the memory; the panel is of the weight's format.
    unsafe {
        with_layout!(
            weight.format(),
            codes: |C| columns::<L, C>(weight.panel(index), from, count, out),
            dense: |D| columns::<L, D>(weight.panel(index), from, count, out),
        );
    }
}

/// Rows of panel `index`, sixteen values each: those of the columns from `from` on, zeros from `to` on.
///
/// # Safety
/// `from` is a multiple of four, the panel has the columns, `out` is valid for sixteen times sixteen values; the CPU has
/// the unit of `L`.
#[inline(always)]
pub(crate) unsafe fn decode_turned<L: Lanes>(
    weight: &Weight,
    index: usize,
    [from, to]: [usize; 2],
    out: *mut f32,
) {
    let count = PANEL.min(to - from);
    let mut block = MaybeUninit::<[[f32; PANEL]; PANEL]>::uninit();
    let columns = block.as_mut_ptr().cast::<f32>();
    // SAFETY: the caller vouches for the columns and the memory; the block has sixteen times sixteen values, all written
    // before they are read.
    unsafe {
        decode::<L>(weight, index, from, count, columns);
        columns.add(count * PANEL).write_bytes(0, (PANEL - count) * PANEL);
        L::transpose(columns, out);
    }
}

/// Columns `from..from + count` of a panel, sixteen values each.
///
/// # Safety
/// `from` is a multiple of four, the panel has these columns, `out` is valid for sixteen times `count` values; the CPU
/// has the unit of `L`.
#[inline(always)]
unsafe fn columns<L: Lanes, C: Columns>(panel: Panel, from: usize, count: usize, out: *mut f32) {
    // SAFETY: the caller vouches for the columns and the memory.
    unsafe {
        for group in 0..count / 4 {
            let four: [L; 4] = C::four(panel, from / 4 + group);
            for (at, column) in four.into_iter().enumerate() {
                column.store(out.add((group * 4 + at) * PANEL));
            }
        }
        for column in count / 4 * 4..count {
            C::one::<L>(panel, from + column).store(out.add(column * PANEL));
        }
    }
}
