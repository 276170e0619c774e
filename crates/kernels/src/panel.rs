//! The product of some rows of activations with one panel of sixteen weight rows.
//!
//! Lane `j` of a sum belongs to weight row `j` of the panel and is added up over the columns in their order, so a
//! row's result does not depend on how many rows are computed with it.

use crate::lanes::Lanes;
use crate::layout::{Codes, Columns, with_layout};
use crate::weight::{Panel, Weight};

/// Activations as the products read them.
#[derive(Clone, Copy)]
pub(crate) struct View {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// (rows, cols).
    pub(crate) values: *const f32,
    /// (rows, cols), in blocks of 32 columns around a scale; null in exact precision.
    pub(crate) quants: *const i8,
    /// (blocks, rows): the scale of each block.
    pub(crate) scales: *const f32,
    /// (blocks, rows): scale times the sum of the block's quants.
    pub(crate) sums: *const f32,
    /// (2 * blocks, rows): the sums of the quants of half a block.
    pub(crate) counts: *const i32,
}

/// Where the sums of a tile of rows go.
pub(crate) trait Sink<L: Lanes> {
    /// Takes row `row`'s sixteen sums.
    fn put(&mut self, row: usize, sums: L);
}

/// All rows of `x` times panel `index` of `weight`.
///
/// # Safety
/// `x` is valid, with quants if the weight has codes and `x.quants` is not null; the CPU has the unit of `L`.
#[inline(always)]
pub(crate) unsafe fn panel_product<L: Lanes>(
    weight: &Weight,
    index: usize,
    x: &View,
    sink: &mut impl Sink<L>,
) {
    let panel = weight.panel(index);
    // SAFETY: the caller vouches for `x`; the panel is of the weight's format.
    unsafe {
        with_layout!(
            weight.format(),
            codes: |C| if x.quants.is_null() {
                exact::<L, C>(panel, x, sink);
            } else {
                fast::<L, C>(panel, x, sink);
            },
            dense: |D| exact::<L, D>(panel, x, sink),
        );
    }
}

/// Splits the rows into tiles, as tall as the registers allow.
macro_rules! tiles {
    ($x:ident, $sink:ident, $panel:ident, $run:ident::<$l:ident, $f:ident>, $tall:literal, $short:literal) => {
        let mut row = 0;
        if $l::TALL {
            while row + $tall <= $x.rows {
                $run::<$l, $f, $tall>($panel, $x, row, $sink);
                row += $tall;
            }
            if row + 4 <= $x.rows && $tall > 4 {
                $run::<$l, $f, 4>($panel, $x, row, $sink);
                row += 4;
                if row + 4 <= $x.rows && $tall > 8 {
                    $run::<$l, $f, 4>($panel, $x, row, $sink);
                    row += 4;
                }
            }
        }
        while row + $short <= $x.rows {
            $run::<$l, $f, $short>($panel, $x, row, $sink);
            row += $short;
        }
        while row < $x.rows {
            $run::<$l, $f, 1>($panel, $x, row, $sink);
            row += 1;
        }
    };
}

/// Integer products of 8-bit activations, scaled block by block.
#[inline(always)]
unsafe fn fast<L: Lanes, C: Codes>(panel: Panel, x: &View, sink: &mut impl Sink<L>) {
    // SAFETY: tiles lie within the rows; the caller vouches for the rest.
    unsafe {
        tiles!(x, sink, panel, fast_tile::<L, C>, 8, 2);
    }
}

#[inline(always)]
unsafe fn fast_tile<L: Lanes, C: Codes, const M: usize>(
    panel: Panel,
    x: &View,
    row: usize,
    sink: &mut impl Sink<L>,
) {
    let mut sums = [L::zero(); M];
    // SAFETY: all reads are of rows `row..row + M` and of blocks below `cols / 32`.
    unsafe {
        for block in 0..x.cols / 32 {
            let min: L = if C::MINS { C::min(panel, block) } else { L::zero() };
            let mut dots = [L::ints(0); M];
            for half in 0..2 {
                let at = (block * 2 + half) * x.rows + row;
                if C::OFFSET != 0 {
                    // The offset leaves the integer sum before it is scaled: exact.
                    for i in 0..M {
                        let start = -C::OFFSET * *x.counts.add(at + i);
                        if C::HALVES {
                            dots[i] = L::ints(start);
                        } else if half == 0 {
                            dots[i] = L::ints(start - C::OFFSET * *x.counts.add(at + x.rows + i));
                        }
                    }
                } else if C::HALVES {
                    dots = [L::ints(0); M];
                }
                for group in half * 4..half * 4 + 4 {
                    let codes = C::group::<L>(panel, block * 8 + group);
                    for i in 0..M {
                        let quants = x.quants.add((row + i) * x.cols + block * 32 + group * 4);
                        dots[i] = L::dot(dots[i], codes, quants, C::WIDE);
                    }
                }
                if C::HALVES || half == 1 {
                    let scale: L = C::scale(panel, block * 2 + half);
                    for i in 0..M {
                        let x_scale = L::splat(*x.scales.add(block * x.rows + row + i));
                        sums[i] = sums[i].fma(L::from_ints(dots[i]), scale.mul(x_scale));
                    }
                }
            }
            if C::MINS {
                for i in 0..M {
                    sums[i] = sums[i].fma(min, L::splat(*x.sums.add(block * x.rows + row + i)));
                }
            }
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        sink.put(row + i, sums);
    }
}

/// Float32 products of decoded weights; even and odd columns are summed apart and added at the end.
#[inline(always)]
unsafe fn exact<L: Lanes, C: Columns>(panel: Panel, x: &View, sink: &mut impl Sink<L>) {
    // SAFETY: tiles lie within the rows; the caller vouches for the rest.
    unsafe {
        tiles!(x, sink, panel, exact_tile::<L, C>, 12, 2);
    }
}

#[inline(always)]
unsafe fn exact_tile<L: Lanes, C: Columns, const M: usize>(
    panel: Panel,
    x: &View,
    row: usize,
    sink: &mut impl Sink<L>,
) {
    let (mut even, mut odd) = ([L::zero(); M], [L::zero(); M]);
    // SAFETY: all reads are of rows `row..row + M` and of columns below `cols`.
    unsafe {
        let start = x.values.add(row * x.cols);
        for group in 0..x.cols / 4 {
            let w: [L; 4] = C::four(panel, group);
            for i in 0..M {
                let x = start.add(i * x.cols + group * 4);
                even[i] = even[i].fma(w[0], L::splat(*x));
                odd[i] = odd[i].fma(w[1], L::splat(*x.add(1)));
            }
            for i in 0..M {
                let x = start.add(i * x.cols + group * 4);
                even[i] = even[i].fma(w[2], L::splat(*x.add(2)));
                odd[i] = odd[i].fma(w[3], L::splat(*x.add(3)));
            }
        }
        for column in x.cols / 4 * 4..x.cols {
            let w: L = C::one(panel, column);
            for i in 0..M {
                even[i] = even[i].fma(w, L::splat(*start.add(i * x.cols + column)));
            }
        }
    }
    for i in 0..M {
        sink.put(row + i, even[i].add(odd[i]));
    }
}

/// Decodes a whole panel to row-major (16, cols).
///
/// # Safety
/// The CPU has the unit of `L`.
#[inline(always)]
pub(crate) unsafe fn decode_panel<L: Lanes>(weight: &Weight, index: usize, out: &mut [f32]) {
    let cols = weight.cols();
    let panel = weight.panel(index);
    assert_eq!(out.len(), 16 * cols);
    // SAFETY: groups and columns lie within the row; the panel is of the weight's format.
    unsafe {
        with_layout!(
            weight.format(),
            codes: |C| decode::<L, C>(panel, cols, out),
            dense: |D| decode::<L, D>(panel, cols, out),
        );
    }
}

#[inline(always)]
unsafe fn decode<L: Lanes, C: Columns>(panel: Panel, cols: usize, out: &mut [f32]) {
    // SAFETY: the caller vouches for the panel.
    unsafe {
        for group in 0..cols / 4 {
            let four: [L; 4] = C::four(panel, group);
            let four = [four[0].to_array(), four[1].to_array(), four[2].to_array(), four[3].to_array()];
            for lane in 0..16 {
                let out = &mut out[lane * cols + group * 4..][..4];
                out.copy_from_slice(&[four[0][lane], four[1][lane], four[2][lane], four[3][lane]]);
            }
        }
        for column in cols / 4 * 4..cols {
            let one = C::one::<L>(panel, column).to_array();
            for (lane, value) in one.into_iter().enumerate() {
                out[lane * cols + column] = value;
            }
        }
    }
}
