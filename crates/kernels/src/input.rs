//! What happens to a row before its products: norm or gate, its adapter's scale, 8-bit quantisation, and the way down
//! through its adapter.
//!
//! All in one pass over the row, while it is in the cache. Quantisation is symmetric in blocks of 32 (`Q8_1` of
//! llama.cpp): `scale = max |x| / 127`, `quant = round(x / scale)`, ties to even.

use crate::lanes::{Lanes, multiversion};
use crate::linear::LAYERS;
use crate::low_rank::{Route, shrink};
use crate::panel::{Summary, TILE, Tile, View};
use crate::pointwise::{fused_silu, norm_row, silu};
use crate::vectors::RowVectors;

/// What a fused linear layer reads.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// The rows as they are.
    Plain(&'a [f32]),
    /// RMS norm of the rows.
    Norm {
        /// The rows.
        x: &'a [f32],
        /// One factor per column.
        weight: &'a [f32],
        /// Added to the mean square.
        eps: f32,
    },
    /// `silu(gate) * up`.
    SwiGlu {
        /// What is gated through `silu`.
        gate: &'a [f32],
        /// What it multiplies.
        up: &'a [f32],
    },
}

impl Input<'_> {
    /// Values of all rows together.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Plain(x) | Self::Norm { x, .. } => x.len(),
            Self::SwiGlu { gate, .. } => gate.len(),
        }
    }
}

/// Where the prepared rows go.
#[derive(Clone, Copy)]
pub(crate) struct Prepared {
    pub(crate) view: View,
    /// (sites, rows).
    pub(crate) routes: *const Route,
    pub(crate) sites: usize,
    /// By site, whether any row has an adapter.
    pub(crate) adapted: [bool; LAYERS],
    /// (sites, rows, rank_stride): `A x` of each row at each site.
    pub(crate) shrunk: *mut f32,
    pub(crate) rank_stride: usize,
    /// (sites, rows); null if no row's adapter has any.
    pub(crate) vectors: *const RowVectors,
    /// Whether a row's values are scaled; then they are all in the buffer of values.
    pub(crate) scaled: bool,
    /// By site.
    pub(crate) under: [Route; LAYERS],
    /// The largest rank among them.
    pub(crate) under_rank: usize,
    /// By site from `site * rows * under_rank` on: (rows, the site's rank).
    pub(crate) under_shrunk: *mut f32,
}

// SAFETY: tasks write disjoint rows, and reading begins when all are written.
unsafe impl Sync for Prepared {}

multiversion! {
    /// Prepares the rows `from..to`.
    pub(crate) fn prepare(input: Input<'_>, from: usize, to: usize, out: &Prepared) = prepare_body<Lanes>
}

#[inline(always)]
fn prepare_body<L: Lanes>(input: Input<'_>, from: usize, to: usize, out: &Prepared) {
    let cols = out.view.cols;
    for row in from..to {
        let values: &[f32] = match input {
            Input::Plain(x) if out.scaled => {
                // SAFETY: tasks have disjoint rows; the buffer holds `rows * cols` values.
                let values = unsafe { row_of(*out, row) };
                values.copy_from_slice(&x[row * cols..][..cols]);
                values
            }
            // Read where they are.
            Input::Plain(x) => &x[row * cols..][..cols],
            Input::Norm { x, weight, eps } => {
                // SAFETY: tasks have disjoint rows; the buffer holds `rows * cols` values.
                let values = unsafe { row_of(*out, row) };
                let x = &x[row * cols..][..cols];
                norm_row(x, weight, eps, values);
                values
            }
            Input::SwiGlu { gate, up } => {
                // SAFETY: as above.
                let values = unsafe { row_of(*out, row) };
                let (gate, up) = (&gate[row * cols..][..cols], &up[row * cols..][..cols]);
                for i in 0..cols {
                    let gated = if L::FUSED { fused_silu(gate[i]) } else { silu(gate[i]) };
                    values[i] = gated * up[i];
                }
                values
            }
        };
        // SAFETY: as above; what `values` names is in the buffer and not used any more.
        let values = if out.scaled { unsafe { scale(out, row) } } else { values };
        if !out.view.quants.is_null() {
            // SAFETY: as above.
            unsafe { quantise::<L>(values, row, &out.view) };
        }
        for (site, under) in out.under.iter().enumerate().filter(|(_, under)| under.rank > 0) {
            let at = (site * out.view.rows * out.under_rank) + row * under.rank;
            // SAFETY: `under_shrunk` has the stated shape.
            unsafe {
                let to = std::slice::from_raw_parts_mut(out.under_shrunk.add(at), under.rank);
                shrink::<L>(under, values, row, &out.view, to);
            }
        }
        for site in 0..out.sites {
            // SAFETY: `routes` and `shrunk` have the stated shapes.
            unsafe {
                let route = *out.routes.add(site * out.view.rows + row);
                let to = out.shrunk.add((site * out.view.rows + row) * out.rank_stride);
                let to = std::slice::from_raw_parts_mut(to, route.rank);
                shrink::<L>(&route, values, row, &out.view, to);
            }
        }
    }
}

/// Scales a row by its adapter's vector, if it has one; all layers of the call have the same.
///
/// # Safety
/// The row is in the buffer of prepared values, and nobody else uses it; `vectors` has an entry for it.
#[inline(always)]
unsafe fn scale<'a>(out: &Prepared, row: usize) -> &'a [f32] {
    // SAFETY: the caller vouches for the row; the scale has a value per column.
    unsafe {
        let values = row_of(*out, row);
        let scale = (*out.vectors.add(row)).input;
        if !scale.is_null() {
            let scale = std::slice::from_raw_parts(scale, values.len());
            values.iter_mut().zip(scale).for_each(|(value, scale)| *value *= scale);
        }
        values
    }
}

/// A row of the buffer of prepared values.
///
/// # Safety
/// The buffer is there, and nobody else uses the row.
#[inline(always)]
unsafe fn row_of<'a>(out: Prepared, row: usize) -> &'a mut [f32] {
    let start = out.view.values.cast_mut().wrapping_add(row * out.view.cols);
    // SAFETY: the caller vouches for the row.
    unsafe { std::slice::from_raw_parts_mut(start, out.view.cols) }
}

/// # Safety
/// The view's buffers have the shapes it states; the CPU has the unit of `L`.
#[inline(always)]
unsafe fn quantise<L: Lanes>(values: &[f32], row: usize, view: &View) {
    let blocks = view.cols / 32;
    let tile = view.tile(row);
    let place = row % TILE;
    // NaN and infinity make it NaN, which no comparison would see.
    let mut poison = L::zero();
    let mut block = 0;
    // SAFETY: all places are those of this row; a block has 32 values.
    unsafe {
        while block + 4 <= blocks {
            poison = quantise_blocks::<L, 4>(values, block, place, &tile, poison);
            block += 4;
        }
        while block < blocks {
            poison = quantise_blocks::<L, 1>(values, block, place, &tile, poison);
            block += 1;
        }
        if poison.sum().is_nan() {
            for block in 0..blocks {
                (*tile.summaries.cast_mut().add(block * tile.height + place)).scale = f32::NAN;
            }
        }
    }
}

/// # Safety
/// As for [`quantise`]; the blocks are there.
#[inline(always)]
unsafe fn quantise_blocks<L: Lanes, const N: usize>(
    values: &[f32],
    block: usize,
    place: usize,
    tile: &Tile,
    mut poison: L,
) -> L {
    // SAFETY: the caller vouches for the places.
    unsafe {
        let value = |i: usize, half: usize| L::load(values.as_ptr().add((block + i) * 32 + half * 16));
        let mut largest = [L::zero(); N];
        for (i, largest) in largest.iter_mut().enumerate() {
            let (low, high) = (value(i, 0), value(i, 1));
            poison = poison.fma(low, L::zero()).fma(high, L::zero());
            *largest = largest.max_abs(low).max_abs(high);
        }
        let largest = L::max_lanes(largest);
        let scales = largest.map(|max| max / 127.0);
        let inverses = largest.map(|max| if max > 0.0 { 127.0 / max } else { 0.0 });
        for i in 0..N {
            let at = (block + i) * tile.height + place;
            let inverse = L::splat(inverses[i]);
            let quants = tile.quants.cast_mut().add(at * 32);
            let counts = L::store_block(value(i, 0).mul(inverse), value(i, 1).mul(inverse), quants);
            let sum = scales[i] * (counts[0] + counts[1]) as f32;
            tile.summaries.cast_mut().add(at).write(Summary { scale: scales[i], sum, counts });
        }
    }
    poison
}
