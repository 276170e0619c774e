//! Products of plain float32 matrices: the register tile that training's small and large products share.
//!
//! A lane of a vector is one column of the result, and every value is one chain of fused multiply-adds in the order of
//! the inner dimension: how the work is cut into tiles and tasks does not show in the result.

use rayon::prelude::*;

use crate::isa::isa;
use crate::lanes::{Lanes, multiversion};
use crate::parallel::Shared;
use crate::weight::PANEL;

/// The left factor of [`multiply`]: value (i, j) lies at `i * row + j * step`.
#[derive(Debug, Clone, Copy)]
pub struct Left<'a> {
    /// The buffer.
    pub values: &'a [f32],
    /// From a row to the next.
    pub row: usize,
    /// From a value of a row to the next.
    pub step: usize,
}

/// The right factor of [`multiply`]: row `j` begins at `j * stride`.
#[derive(Debug, Clone, Copy)]
pub struct Right<'a> {
    /// The buffer.
    pub values: &'a [f32],
    /// From a row to the next.
    pub stride: usize,
}

/// Rows and columns of a task.
const TASK: (usize, usize) = (48, 192);

/// `out = left right`, or `out += left right` with `add`: `left` is (m, k), `right` (k, n), `out` (m, n) without gaps.
/// On the caller's rayon pool.
///
/// # Panics
/// When a buffer is too short.
pub fn multiply([m, k, n]: [usize; 3], left: Left<'_>, right: Right<'_>, out: &mut [f32], add: bool) {
    assert_eq!(out.len(), m * n, "the result is not {m} x {n}");
    if m == 0 || n == 0 {
        return;
    }
    if k > 0 {
        assert!((m - 1) * left.row + (k - 1) * left.step < left.values.len(), "the left factor is too short");
        assert!((k - 1) * right.stride + n <= right.values.len(), "the right factor is too short");
    }
    let columns = n.div_ceil(TASK.1);
    let shared = Shared::new(out);
    (0..m.div_ceil(TASK.0) * columns).into_par_iter().for_each(|task| {
        let (row, column) = (task / columns * TASK.0, task % columns * TASK.1);
        let size = [TASK.0.min(m - row), k, TASK.1.min(n - column)];
        part(size, [row, column, n], left, right, shared, add);
    });
}

/// The part of `size` of a product that begins at row and column `at`; `at[2]` is the result's width.
fn part(
    [m, k, n]: [usize; 3],
    [row, column, width]: [usize; 3],
    left: Left<'_>,
    right: Right<'_>,
    out: Shared<'_>,
    add: bool,
) {
    let product = Product {
        left: left.values.as_ptr().wrapping_add(row * left.row),
        row: left.row,
        step: left.step,
        right: right.values.as_ptr().wrapping_add(column),
        stride: right.stride,
        len: k,
        out: out.start().wrapping_add(row * width + column),
        out_stride: width,
        add,
    };
    // SAFETY: `multiply` has checked the lengths; tasks have disjoint parts of the result.
    unsafe { product.run(m, n) }
}

/// A product on raw memory: value (i, j) of the left factor at `left + i * row + j * step`.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub(crate) left: *const f32,
    pub(crate) row: usize,
    pub(crate) step: usize,
    pub(crate) right: *const f32,
    pub(crate) stride: usize,
    /// The inner dimension.
    pub(crate) len: usize,
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
    /// Whether the result is added to what is there.
    pub(crate) add: bool,
}

multiversion! {
    /// [`Product::strip`], compiled once per vector unit; the promise made there holds here.
    fn strip(product: Product, m: usize, width: usize) = strip_body<Lanes>
}

#[inline(always)]
fn strip_body<L: Lanes>(product: Product, m: usize, width: usize) {
    // SAFETY: the caller of `Product::strip` vouches for the memory.
    unsafe {
        match (width == PANEL, product.step == 1) {
            (true, true) => product.rows::<L, true, true>(m, width),
            (true, false) => product.rows::<L, true, false>(m, width),
            (false, true) => product.rows::<L, false, true>(m, width),
            (false, false) => product.rows::<L, false, false>(m, width),
        }
    }
}

impl Product {
    /// All of it: `m` rows and `n` columns.
    ///
    /// # Safety
    /// Both factors are valid for reading in these dimensions, the result for writing by this thread alone.
    pub(crate) unsafe fn run(&self, m: usize, n: usize) {
        for column in (0..n).step_by(PANEL) {
            let mut part = *self;
            part.right = part.right.wrapping_add(column);
            part.out = part.out.wrapping_add(column);
            // SAFETY: within the factors (the caller's promise).
            unsafe { part.strip(m, PANEL.min(n - column)) };
        }
    }

    /// The first `width` columns, sixteen at most.
    ///
    /// # Safety
    /// As for [`Product::run`].
    pub(crate) unsafe fn strip(&self, m: usize, width: usize) {
        strip(isa(), *self, m, width);
    }

    #[inline(always)]
    unsafe fn rows<L: Lanes, const WHOLE: bool, const DENSE: bool>(&self, m: usize, width: usize) {
        let mut row = 0;
        // SAFETY: the caller vouches for the memory.
        unsafe {
            if L::TALL {
                while row + 12 <= m {
                    self.tile::<L, 12, WHOLE, DENSE>(row, width);
                    row += 12;
                }
            }
            while row + 6 <= m {
                self.tile::<L, 6, WHOLE, DENSE>(row, width);
                row += 6;
            }
            match m - row {
                5 => self.tile::<L, 5, WHOLE, DENSE>(row, width),
                4 => self.tile::<L, 4, WHOLE, DENSE>(row, width),
                3 => self.tile::<L, 3, WHOLE, DENSE>(row, width),
                2 => self.tile::<L, 2, WHOLE, DENSE>(row, width),
                1 => self.tile::<L, 1, WHOLE, DENSE>(row, width),
                _ => {}
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<L: Lanes, const M: usize, const WHOLE: bool, const DENSE: bool>(
        &self,
        row: usize,
        width: usize,
    ) {
        let mut sums = [L::zero(); M];
        let step = if DENSE { 1 } else { self.step };
        // SAFETY: rows `row..row + M`, columns below `width` and `len` steps lie in the factors.
        unsafe {
            let left = self.left.add(row * self.row);
            let out = self.out.add(row * self.out_stride);
            if self.add {
                for i in 0..M {
                    sums[i] = read::<L, WHOLE>(out.add(i * self.out_stride), width);
                }
            }
            // Two rows to start from, and four steps at a time, leave the places to the instructions' addresses: most
            // of what is issued are then products.
            let half = M.div_ceil(2);
            let mut from = [left, left.wrapping_add(half * self.row)];
            let mut right = self.right;
            let fours = if DENSE { self.len / 4 } else { 0 };
            for _ in 0..fours {
                for j in 0..4 {
                    let columns = read::<L, WHOLE>(right.add(j * self.stride), width);
                    for i in 0..M {
                        let value = *from[i / half].add(i % half * self.row + j);
                        sums[i] = sums[i].fma(L::splat(value), columns);
                    }
                }
                from = from.map(|from| from.wrapping_add(4));
                right = right.wrapping_add(4 * self.stride);
            }
            for j in fours * 4..self.len {
                let columns = read::<L, WHOLE>(self.right.add(j * self.stride), width);
                for i in 0..M {
                    sums[i] = sums[i].fma(L::splat(*left.add(i * self.row + j * step)), columns);
                }
            }
            for i in 0..M {
                let out = out.add(i * self.out_stride);
                if WHOLE {
                    sums[i].store(out);
                } else {
                    std::slice::from_raw_parts_mut(out, width).copy_from_slice(&sums[i].to_array()[..width]);
                }
            }
        }
    }
}

/// The first `width` lanes from memory, the others zero.
#[inline(always)]
unsafe fn read<L: Lanes, const WHOLE: bool>(from: *const f32, width: usize) -> L {
    // SAFETY: the caller vouches for `width` values, sixteen if `WHOLE`.
    unsafe {
        if WHOLE {
            return L::load(from);
        }
        let mut padded = [0.0; PANEL];
        padded[..width].copy_from_slice(std::slice::from_raw_parts(from, width));
        L::load(padded.as_ptr())
    }
}
