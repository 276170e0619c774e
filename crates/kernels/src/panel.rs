//! The product of some rows of activations with one panel of sixteen weight rows.
//!
//! Lane `j` of a sum belongs to weight row `j` of the panel and is added up over the columns in their order, so a
//! row's result does not depend on how many rows are computed with it.

use crate::lanes::Lanes;
use crate::layout::{Codes, Columns, with_layout};
use crate::memory::LINE;
use crate::weight::{Panel, Weight};

/// Rows whose quants lie together.
pub(crate) const TILE: usize = 8;

/// Rows that share no cache line with others, so that threads can prepare them side by side.
pub(crate) const APART: usize = TILE / 2;

/// The most rows that are computed at a time.
pub(crate) const TALLEST: usize = 12;

/// Activations as the products read them. Quants lie in tiles of [`TILE`] rows, the last one lower: within a tile
/// (blocks of 32 columns, rows, 32), so that a tile is read from one end to the other; the [`Summary`] of each block of a
/// row likewise.
#[derive(Clone, Copy)]
pub(crate) struct View {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// (rows, cols).
    pub(crate) values: *const f32,
    /// Null in exact precision.
    pub(crate) quants: *const i8,
    pub(crate) summaries: *const Summary,
}

/// What a product wants to know of a block of quants besides them; those of [`APART`] rows fill a cache line.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Summary {
    pub(crate) scale: f32,
    /// The scale times the sum of the quants.
    pub(crate) sum: f32,
    /// The sums of the quants of each half.
    pub(crate) counts: [i32; 2],
}

/// One tile's part of a [`View`].
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// Places for rows in each block.
    pub(crate) height: usize,
    pub(crate) quants: *const i8,
    pub(crate) summaries: *const Summary,
}

/// Places for rows in a tile of so many: more than [`APART`] are as far apart as in a whole one.
fn height(rows: usize) -> usize {
    if rows > APART { TILE } else { rows }
}

impl View {
    /// The tile that row `row` lies in.
    #[inline(always)]
    pub(crate) fn tile(&self, row: usize) -> Tile {
        let first = row / TILE * TILE;
        let at = first * (self.cols / 32);
        Tile {
            height: height(TILE.min(self.rows - first)),
            quants: self.quants.wrapping_add(at * 32),
            summaries: self.summaries.wrapping_add(at),
        }
    }

    /// Places for rows in all tiles together.
    pub(crate) fn places(rows: usize) -> usize {
        rows / TILE * TILE + height(rows % TILE)
    }
}

/// Where the sums of a tile of rows go.
pub(crate) trait Sink<L: Lanes> {
    /// Whether a tile of [`TILE`] rows that is not the first shall ask for what will be read soon.
    fn asks(&self) -> bool;

    /// Four cache lines that will be read soon, if there are any.
    fn soon(&mut self) -> *const u8;

    /// Takes the sixteen sums of each of the rows from `row` on.
    fn put<const M: usize>(&mut self, row: usize, sums: [L; M]);
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

/// Splits the rows into tiles, as tall as the registers allow: with many of them the first height, then once each of those
/// that follow it.
macro_rules! tiles {
    (
        $x:ident, $sink:ident, $panel:ident, $run:ident::<$l:ident, $f:ident>,
        [$tall:literal $(, $lower:literal)*], $middle:literal
    ) => {
        let mut row = 0;
        if $l::TALL {
            while row + $tall <= $x.rows {
                $run::<$l, $f, $tall>($panel, $x, row, $sink);
                row += $tall;
            }
            $(if row + $lower <= $x.rows {
                $run::<$l, $f, $lower>($panel, $x, row, $sink);
                row += $lower;
            })*
        }
        while row + $middle <= $x.rows {
            $run::<$l, $f, $middle>($panel, $x, row, $sink);
            row += $middle;
        }
        if row + 3 <= $x.rows {
            $run::<$l, $f, 3>($panel, $x, row, $sink);
            row += 3;
        }
        if row + 2 <= $x.rows {
            $run::<$l, $f, 2>($panel, $x, row, $sink);
            row += 2;
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
        tiles!(x, sink, panel, fast_tile::<L, C>, [8, 7, 6, 5], 4);
    }
}

/// What comes out of memory while a tile is computed.
mod ahead {
    pub(super) const NOTHING: u8 = 0;
    /// The next panel.
    pub(super) const PANEL: u8 = 1;
    /// What the sink says.
    pub(super) const SOON: u8 = 2;
}

#[inline(always)]
unsafe fn fast_tile<L: Lanes, C: Codes, const M: usize>(
    panel: Panel,
    x: &View,
    row: usize,
    sink: &mut impl Sink<L>,
) {
    // SAFETY: the caller vouches for it.
    unsafe {
        if row == 0 {
            fast_tile_with::<L, C, M, { ahead::PANEL }>(panel, x, row, sink);
        } else if M == TILE && sink.asks() {
            fast_tile_with::<L, C, M, { ahead::SOON }>(panel, x, row, sink);
        } else {
            fast_tile_with::<L, C, M, { ahead::NOTHING }>(panel, x, row, sink);
        }
    }
}

#[inline(always)]
unsafe fn fast_tile_with<L: Lanes, C: Codes, const M: usize, const AHEAD: u8>(
    panel: Panel,
    x: &View,
    row: usize,
    sink: &mut impl Sink<L>,
) {
    let mut sums = [L::zero(); M];
    let tile = x.tile(row);
    let height = if M > APART { TILE } else { tile.height };
    // Hidden from the compiler, which would unroll the loop and put each row's products one after another, where they
    // wait for each other.
    let pairs = std::hint::black_box(if C::HALVES { 2 } else { 4 });
    // Eight products of two codes each fit 16 bits.
    let shorts = L::SHORTS && C::NARROW && !C::HALVES;
    // SAFETY: all reads are of rows `row..row + M` and of blocks below `cols / 32`.
    unsafe {
        for block in 0..x.cols / 32 {
            let at = block * height + row % TILE;
            let quants = tile.quants.add(at * 32);
            let ahead = match AHEAD {
                ahead::PANEL => {
                    L::prefetch(panel.header.wrapping_add(panel.next + block * C::HEADER_BYTES));
                    panel.codes.wrapping_add(panel.next + block * C::BLOCK_BYTES)
                }
                ahead::SOON => sink.soon(),
                _ => std::ptr::null(),
            };
            for half in 0..(if C::HALVES { 2 } else { 1 }) {
                let mut dots = [L::ints(0); M];
                if C::OFFSET != 0 && !shorts && !(C::WIDE && L::CENTRED) {
                    // The offset leaves the integer sum before it is scaled: exact.
                    for i in 0..M {
                        dots[i] = L::ints(offset::<C>(&tile, at + i, half));
                    }
                }
                for pair in half * 2..half * 2 + pairs {
                    let low = C::group::<L>(panel, block * 8 + pair * 2);
                    let high = C::group::<L>(panel, block * 8 + pair * 2 + 1);
                    let quants = quants.add(pair * 8);
                    match AHEAD {
                        ahead::PANEL => {
                            let ahead = ahead.wrapping_add(pair * (C::BLOCK_BYTES / 4));
                            L::prefetch(ahead);
                            if C::BLOCK_BYTES > 4 * LINE {
                                L::prefetch(ahead.wrapping_add(LINE));
                            }
                        }
                        ahead::SOON if !ahead.is_null() => L::prefetch(ahead.wrapping_add(pair * LINE)),
                        _ => {}
                    }
                    for (weights, x) in [(low, quants), (high, quants.add(4))] {
                        for i in 0..M {
                            dots[i] = if shorts {
                                L::dot_short(dots[i], weights, x.add(i * 32))
                            } else {
                                L::dot(dots[i], weights, x.add(i * 32), C::WIDE)
                            };
                        }
                    }
                }
                if shorts {
                    for i in 0..M {
                        let start = if C::OFFSET == 0 { 0 } else { offset::<C>(&tile, at + i, half) };
                        dots[i] = L::widen(dots[i], start);
                    }
                }
                let scale: L = C::scale(panel, block * 2 + half);
                for i in 0..M {
                    let x_scale = L::splat((*tile.summaries.add(at + i)).scale);
                    sums[i] = sums[i].fma(L::from_ints(dots[i]), scale.mul(x_scale));
                }
            }
            if C::MINS {
                let min: L = C::min(panel, block);
                for i in 0..M {
                    sums[i] = sums[i].fma(min, L::splat((*tile.summaries.add(at + i)).sum));
                }
            }
        }
    }
    sink.put(row, sums);
}

/// What the codes' offset adds to a block's integer sum.
///
/// # Safety
/// The tile has a block at `at`.
#[inline(always)]
unsafe fn offset<C: Codes>(tile: &Tile, at: usize, half: usize) -> i32 {
    // SAFETY: the caller vouches for the block.
    let counts = unsafe { (*tile.summaries.add(at)).counts };
    -C::OFFSET * if C::HALVES { counts[half] } else { counts[0] + counts[1] }
}

/// Float32 products of decoded weights; even and odd columns are summed apart and added at the end.
#[inline(always)]
unsafe fn exact<L: Lanes, C: Columns>(panel: Panel, x: &View, sink: &mut impl Sink<L>) {
    // SAFETY: tiles lie within the rows; the caller vouches for the rest.
    unsafe {
        tiles!(x, sink, panel, exact_tile::<L, C>, [12, 4, 4], 2);
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
    sink.put(row, std::array::from_fn::<_, M, _>(|i| even[i].add(odd[i])));
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Where quants and summaries of a block of a row lie, in bytes from the first of each, and how long they are.
    fn pieces(view: &View, row: usize, block: usize) -> [(usize, usize); 2] {
        let tile = view.tile(row);
        let at = block * tile.height + row % TILE;
        let quants = tile.quants.wrapping_add(at * 32).addr();
        [(quants, 32), (tile.summaries.wrapping_add(at).addr(), size_of::<Summary>())]
    }

    #[test]
    fn rows_that_are_prepared_apart_share_no_cache_line() {
        let blocks = 3;
        for rows in 1..=3 * TILE + 1 {
            let (quants, summaries) = (std::ptr::null(), std::ptr::null());
            let view = View { rows, cols: 32 * blocks, values: std::ptr::null(), quants, summaries };
            // Who has a byte, and who a line: of the quants and of the summaries.
            let (mut bytes, mut lines) = ([(); 2].map(|()| HashMap::new()), [(); 2].map(|()| HashMap::new()));
            for (row, block) in (0..rows).flat_map(|row| (0..blocks).map(move |block| (row, block))) {
                for (of, (start, len)) in pieces(&view, row, block).into_iter().enumerate() {
                    assert!(
                        start + len <= View::places(rows) * blocks * len,
                        "{rows} rows: {row} lies outside"
                    );
                    for byte in start..start + len {
                        assert_eq!(bytes[of].insert(byte, row), None, "{rows} rows: {row} lies on another");
                        let owner = *lines[of].entry(byte / LINE).or_insert(row / APART);
                        assert_eq!(owner, row / APART, "{rows} rows: {row} shares a line");
                    }
                }
            }
        }
    }
}
