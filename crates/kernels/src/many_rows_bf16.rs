//! Products of many rows with a frozen matrix in bfloat16: both factors are rounded to it, to the nearest, and summed in
//! float32.
//!
//! AVX-512 BF16 multiplies and adds two pairs a lane in one instruction (VDPBF16PS, `crate::bf16_x86`), which is twice the
//! rate of float32; elsewhere the rounded numbers are widened, for the same meaning without the gain. Sums run over pairs of the inner
//! dimension in one fixed order: a row's result depends neither on its company nor on the number of threads, but
//! may differ in the last bits between the two.

use std::cell::Cell;

use rayon::prelude::*;

use crate::buffer::at_a_line;
use crate::isa::isa;
use crate::lanes::{Lanes, brain_to_f32, f32_to_brain, multiversion};
use crate::many_rows::{BACK_COLUMNS, BLOCK_ROWS, ask_for_block, decode, decode_turned, in_parts};
use crate::parallel::Shared;
use crate::weight::{PANEL, Weight};

thread_local! {
    static ROUNDED: Cell<Vec<u16>> = const { Cell::new(Vec::new()) };
    static PAIRED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Pairs of weights a task works with at a time: they stay in the second-level cache.
const PAIRS: usize = 48 * 1024;

/// Output features that a backward task takes at a time.
const BACK_OUTPUTS: usize = 512;

/// Numbers of a pair of weight columns of sixteen lanes.
const PAIR: usize = 2 * PANEL;

/// How pairs of bfloat16 numbers lie in memory and are multiplied.
pub(crate) trait Pairs<L: Lanes> {
    /// Sixteen pairs in registers.
    type Two: Copy;
    /// Rounds sixteen pairs and stores them.
    ///
    /// # Safety
    /// `to` is valid for writing 32 numbers; the CPU has the unit.
    unsafe fn put(even: L, odd: L, to: *mut u16);
    /// What `put` stored.
    ///
    /// # Safety
    /// `from` is valid for reading 32 numbers; the CPU has the unit.
    unsafe fn two(from: *const u16) -> Self::Two;
    /// Adds every lane's products with the two numbers at `x`.
    ///
    /// # Safety
    /// `x` is valid for reading two numbers; the CPU has the unit.
    unsafe fn add(sum: L, weights: Self::Two, x: *const u16) -> L;
    /// Rounds sixteen numbers.
    ///
    /// # Safety
    /// `to` is valid for writing sixteen numbers; the CPU has the unit.
    unsafe fn round(numbers: L, to: *mut u16);
}

/// For CPUs without an instruction for it.
pub(crate) struct Widened;

impl<L: Lanes> Pairs<L> for Widened {
    type Two = [L; 2];
    #[inline(always)]
    unsafe fn put(even: L, odd: L, to: *mut u16) {
        // SAFETY: the caller vouches for the memory.
        unsafe {
            <Self as Pairs<L>>::round(even, to);
            <Self as Pairs<L>>::round(odd, to.add(PANEL));
        }
    }
    #[inline(always)]
    unsafe fn two(from: *const u16) -> [L; 2] {
        // SAFETY: the caller vouches for the memory.
        unsafe { [L::load_brain(from.cast()), L::load_brain(from.add(PANEL).cast())] }
    }
    #[inline(always)]
    unsafe fn add(sum: L, weights: [L; 2], x: *const u16) -> L {
        // SAFETY: the caller vouches for the memory.
        let [even, odd] = unsafe { [*x, *x.add(1)] }.map(|x| L::splat(brain_to_f32(x)));
        sum.fma(weights[1], odd).fma(weights[0], even)
    }
    #[inline(always)]
    unsafe fn round(numbers: L, to: *mut u16) {
        // SAFETY: the caller vouches for the memory.
        unsafe { to.cast::<[u16; 16]>().write_unaligned(numbers.to_array().map(f32_to_brain)) }
    }
}

/// Whether products in bfloat16 are faster than in float32 on this CPU.
pub(crate) fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return crate::bf16_x86::detected();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `y = x Wᵀ`: see [`crate::linear_many`].
pub(crate) fn forwards(weight: &Weight, x: &[f32], y: &mut [f32], native: bool) {
    let (n, k) = (weight.rows(), weight.cols());
    let most = (PAIRS / (PANEL * k.div_ceil(2))).clamp(1, 8);
    let m = x.len() / k;
    with_rounded(x, k, native, |x| {
        let y = Shared::new(y);
        in_parts(weight.panels(), most, m, |own, rows| {
            let part = Part { weight, own, rows, x, y, width: n };
            #[cfg(target_arch = "x86_64")]
            if native {
                return crate::bf16_x86::forwards(part);
            }
            widened_forwards(isa(), part);
        });
    });
}

/// `dx = dy W`: see [`crate::linear_transposed`].
pub(crate) fn backwards(weight: &Weight, dy: &[f32], dx: &mut [f32], native: bool) {
    let (n, k) = (weight.rows(), weight.cols());
    let m = dy.len() / n;
    with_rounded(dy, n, native, |dy| {
        let dx = Shared::new(dx);
        in_parts(k.div_ceil(PANEL), BACK_COLUMNS / PANEL, m, |own, rows| {
            let own = own.map(|group| (group * PANEL).min(k));
            let part = Part { weight, own, rows, x: dy, y: dx, width: k };
            #[cfg(target_arch = "x86_64")]
            if native {
                return crate::bf16_x86::backwards(part);
            }
            widened_backwards(isa(), part);
        });
    });
}

/// A task: some panels forwards, some columns backwards, of some rows.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    weight: &'a Weight,
    own: [usize; 2],
    rows: [usize; 2],
    x: Rounded<'a>,
    y: Shared<'a>,
    /// Values of a row of `y`.
    width: usize,
}

/// Activations in bfloat16, each row filled up to a whole pair with a zero.
#[derive(Clone, Copy)]
pub(crate) struct Rounded<'a> {
    numbers: &'a [u16],
    stride: usize,
}

/// Rows of `cols` values, rounded in parallel into a buffer that is used again.
fn with_rounded(x: &[f32], cols: usize, native: bool, f: impl FnOnce(Rounded<'_>)) {
    let stride = cols.next_multiple_of(2);
    let mut numbers = ROUNDED.take();
    let len = x.len() / cols * stride;
    if numbers.len() < len {
        numbers.resize(len, 0);
    }
    numbers[..len].par_chunks_mut(16 * stride).zip(x.par_chunks(16 * cols)).for_each(|(to, from)| {
        #[cfg(target_arch = "x86_64")]
        if native {
            return crate::bf16_x86::round(from, to, cols);
        }
        let _ = native;
        widened_round(isa(), from, to, cols);
    });
    f(Rounded { numbers: &numbers[..len], stride });
    ROUNDED.set(numbers);
}

multiversion! {
    fn widened_round(from: &[f32], to: &mut [u16], cols: usize) = widened_round_body<Lanes>
}

#[inline(always)]
fn widened_round_body<L: Lanes>(from: &[f32], to: &mut [u16], cols: usize) {
    round_body::<L, Widened>(from, to, cols);
}

/// Rounds rows of `cols` values.
#[inline(always)]
pub(crate) fn round_body<L: Lanes, P: Pairs<L>>(from: &[f32], to: &mut [u16], cols: usize) {
    for (from, to) in from.chunks_exact(cols).zip(to.chunks_exact_mut(cols.next_multiple_of(2))) {
        let (from, rest) = from.as_chunks::<PANEL>();
        let (to, rest_to) = to.as_chunks_mut::<PANEL>();
        for (from, to) in from.iter().zip(to) {
            // SAFETY: sixteen numbers each; this code is compiled for the unit.
            unsafe { P::round(L::load(from.as_ptr()), to.as_mut_ptr()) };
        }
        let mut padded = [0.0; PANEL];
        padded[..rest.len()].copy_from_slice(rest);
        rest_to.iter_mut().zip(padded).for_each(|(to, from)| *to = f32_to_brain(from));
    }
}

multiversion! {
    fn widened_forwards(part: Part<'_>) = widened_forwards_body<Lanes>
}

#[inline(always)]
fn widened_forwards_body<L: Lanes>(part: Part<'_>) {
    forwards_body::<L, Widened>(part);
}

#[inline(always)]
pub(crate) fn forwards_body<L: Lanes, P: Pairs<L>>(part: Part<'_>) {
    let Part { weight, own: [first, last], rows, x, y, width } = part;
    let k = weight.cols();
    let pairs = k.div_ceil(2);
    let mut buffer = PAIRED.take();
    let paired = at_a_line(&mut buffer, (last - first) * PANEL * pairs).as_mut_ptr().cast::<u16>();
    let mut block = [[0.0; PANEL]; PANEL];
    for (at, index) in (first..last).enumerate() {
        for column in (0..k).step_by(PANEL) {
            let count = PANEL.min(k - column);
            block[count..].fill([0.0; PANEL]);
            // SAFETY: the panel has these columns, the block sixteen times sixteen values, the buffer `pairs` pairs
            // a panel; this code is compiled for the unit.
            unsafe {
                decode::<L>(weight, index, column, count, block.as_mut_ptr().cast());
                put_pairs::<L, P>(&block, count, paired.add((at * pairs + column / 2) * PAIR));
            }
        }
    }
    for row in (rows[0]..rows[1]).step_by(BLOCK_ROWS) {
        let tile = Tile {
            x: x.numbers[row * x.stride..].as_ptr(),
            x_stride: x.stride,
            weights: paired,
            weights_stride: pairs * PAIR,
            pairs,
            y: y.start().wrapping_add(row * width + first * PANEL),
            y_stride: width,
            columns: (last * PANEL).min(width) - first * PANEL,
            add: false,
        };
        // SAFETY: the block's rows lie in `x` and `y`; tasks have disjoint rows or columns.
        unsafe { tile.run::<L, P>(BLOCK_ROWS.min(rows[1] - row)) };
    }
    PAIRED.set(buffer);
}

multiversion! {
    fn widened_backwards(part: Part<'_>) = widened_backwards_body<Lanes>
}

#[inline(always)]
fn widened_backwards_body<L: Lanes>(part: Part<'_>) {
    backwards_body::<L, Widened>(part);
}

#[inline(always)]
pub(crate) fn backwards_body<L: Lanes, P: Pairs<L>>(part: Part<'_>) {
    let Part { weight, own: [from, to], rows, x: dy, y: dx, width: k } = part;
    let n = weight.rows();
    let groups = (to - from).div_ceil(PANEL);
    let stride = BACK_OUTPUTS / 2 * PAIR;
    let mut buffer = PAIRED.take();
    let paired = at_a_line(&mut buffer, groups * stride / 2).as_mut_ptr().cast::<u16>();
    let mut turned = [[0.0; PANEL]; PANEL];
    for first in (0..n).step_by(BACK_OUTPUTS) {
        let count = BACK_OUTPUTS.min(n - first);
        for panel in 0..count.div_ceil(PANEL) {
            for group in 0..groups {
                let own = [from + group * PANEL, to];
                // SAFETY: the panel has these columns, the block sixteen times sixteen values, the buffer all pairs of
                // `BACK_OUTPUTS` outputs a group; this code is compiled for the unit.
                unsafe {
                    decode_turned::<L>(weight, first / PANEL + panel, own, turned.as_mut_ptr().cast());
                    let out = paired.add(group * stride + panel * PANEL / 2 * PAIR);
                    put_pairs::<L, P>(&turned, PANEL, out);
                }
            }
        }
        for row in (rows[0]..rows[1]).step_by(BLOCK_ROWS) {
            ask_for_block::<L, u16>(dy.numbers, dy.stride, [row + BLOCK_ROWS, rows[1]], [first, count]);
            let tile = Tile {
                x: dy.numbers[row * dy.stride + first..].as_ptr(),
                x_stride: dy.stride,
                weights: paired,
                weights_stride: stride,
                pairs: count.div_ceil(2),
                y: dx.start().wrapping_add(row * k + from),
                y_stride: k,
                columns: to - from,
                add: first > 0,
            };
            // SAFETY: the block's rows lie in `dy` and `dx`; tasks have disjoint rows or columns.
            unsafe { tile.run::<L, P>(BLOCK_ROWS.min(rows[1] - row)) };
        }
    }
    PAIRED.set(buffer);
}

/// Rounds the first `count` rows of a block, by pairs; an odd last one is paired with the zeros after it.
///
/// # Safety
/// `to` is valid for writing `count` rows, rounded up to pairs; the CPU has the unit.
#[inline(always)]
unsafe fn put_pairs<L: Lanes, P: Pairs<L>>(block: &[[f32; PANEL]; PANEL], count: usize, to: *mut u16) {
    for pair in 0..count.div_ceil(2) {
        // SAFETY: rows of sixteen values; the caller vouches for the rest.
        unsafe {
            let [even, odd] = [0, 1].map(|at| L::load(block[2 * pair + at].as_ptr()));
            P::put(even, odd, to.add(pair * PAIR));
        }
    }
}

/// Some rows times panels that lie one after another.
#[derive(Clone, Copy)]
struct Tile {
    x: *const u16,
    x_stride: usize,
    weights: *const u16,
    /// From a panel to the next.
    weights_stride: usize,
    /// Half the inner dimension.
    pairs: usize,
    y: *mut f32,
    y_stride: usize,
    /// Columns of `y`.
    columns: usize,
    /// Whether the result is added to what is there.
    add: bool,
}

impl Tile {
    /// # Safety
    /// Rows, panels and columns are valid, those of `y` for writing by this thread alone; the CPU has the unit.
    #[inline(always)]
    unsafe fn run<L: Lanes, P: Pairs<L>>(&self, rows: usize) {
        let panels = self.columns.div_ceil(PANEL);
        let mut panel = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while L::TALL && panel + 2 <= panels {
                self.rows::<L, P, 2>(rows, panel);
                panel += 2;
            }
            while panel < panels {
                self.rows::<L, P, 1>(rows, panel);
                panel += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<L: Lanes, P: Pairs<L>, const W: usize>(&self, rows: usize, panel: usize) {
        let mut row = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while L::TALL && row + 12 <= rows {
                self.products::<L, P, 12, W>(row, panel);
                row += 12;
            }
            while row + 4 <= rows {
                self.products::<L, P, 4, W>(row, panel);
                row += 4;
            }
            while row < rows {
                self.products::<L, P, 1, W>(row, panel);
                row += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn products<L: Lanes, P: Pairs<L>, const M: usize, const W: usize>(
        &self,
        row: usize,
        panel: usize,
    ) {
        let mut sums = [[L::zero(); W]; M];
        // SAFETY: rows `row..row + M` and panels `panel..panel + W` are the caller's.
        unsafe {
            let y = self.y.add(row * self.y_stride + panel * PANEL);
            let width = |at: usize| PANEL.min(self.columns - (panel + at) * PANEL);
            let weights = self.weights.add(panel * self.weights_stride);
            // Three places to start from leave those of all rows to the instructions' addresses.
            let third = M.div_ceil(3);
            let x = self.x.add(row * self.x_stride);
            let mut from = [0, 1, 2].map(|at| x.wrapping_add(at * third * self.x_stride));
            for pair in 0..self.pairs {
                let mut two = [P::two(weights.add(pair * PAIR)); W];
                for (at, two) in two.iter_mut().enumerate().skip(1) {
                    *two = P::two(weights.add(at * self.weights_stride + pair * PAIR));
                }
                for i in 0..M {
                    let x = from[i / third].wrapping_add(i % third * self.x_stride);
                    for at in 0..W {
                        sums[i][at] = P::add(sums[i][at], two[at], x);
                    }
                }
                from = from.map(|from| from.wrapping_add(2));
            }
            for i in 0..M {
                for at in 0..W {
                    self.put(sums[i][at], y.add(i * self.y_stride + at * PANEL), width(at));
                }
            }
        }
    }

    /// The first `width` lanes to memory.
    #[inline(always)]
    unsafe fn put<L: Lanes>(&self, sums: L, to: *mut f32, width: usize) {
        // SAFETY: the caller vouches for `width` values.
        unsafe {
            if width == PANEL {
                return if self.add { L::load(to).add(sums) } else { sums }.store(to);
            }
            let to = std::slice::from_raw_parts_mut(to, width);
            let sums = sums.to_array();
            if self.add {
                to.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum);
            } else {
                to.copy_from_slice(&sums[..width]);
            }
        }
    }
}
