//! What happens to a row before its products: norm or gate, 8-bit quantisation, and the way down through its adapter.
//!
//! All in one pass over the row, while it is in the cache. Quantisation is symmetric in blocks of 32 (`Q8_1` of
//! llama.cpp): `scale = max |x| / 127`, `quant = round(x / scale)`, ties to even.

use crate::lanes::{Lanes, brain_to_f32, multiversion};
use crate::linear::dot;
use crate::panel::{TILE, View};
use crate::pointwise::{inverse_rms, silu};

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

/// Low-rank factors in the precision they are kept in.
#[derive(Debug, Clone, Copy)]
pub enum Numbers<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [u16]),
}

impl Numbers<'_> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One adapter's update of one site: `y += B (A x)`.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// Its rank at this site, at least 1.
    pub rank: usize,
    /// A, shape (rank, input features).
    pub a: Numbers<'a>,
    /// B with the scale folded in, in panels (output features / 16 rounded up, rank, 16): [`crate::pack_b`].
    pub b: Numbers<'a>,
}

/// A row's adapter at one site, as the kernels keep it for the time of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    /// 0 without an adapter.
    pub(crate) rank: usize,
    pub(crate) brain: bool,
    pub(crate) a: *const u8,
    pub(crate) b: *const u8,
}

impl Route {
    pub(crate) const NONE: Self = Self { rank: 0, brain: false, a: std::ptr::null(), b: std::ptr::null() };

    pub(crate) fn new(update: &LowRank<'_>) -> Self {
        let (brain, a, b) = match (update.a, update.b) {
            (Numbers::F32(a), Numbers::F32(b)) => (false, a.as_ptr().cast(), b.as_ptr().cast()),
            (Numbers::Bf16(a), Numbers::Bf16(b)) => (true, a.as_ptr().cast(), b.as_ptr().cast()),
            _ => panic!("A and B are kept in different precisions"),
        };
        Self { rank: update.rank, brain, a, b }
    }
}

/// Where the prepared rows go.
#[derive(Clone, Copy)]
pub(crate) struct Prepared {
    pub(crate) view: View,
    /// (sites, rows).
    pub(crate) routes: *const Route,
    pub(crate) sites: usize,
    /// (sites, rows, rank_stride): `A x` of each row at each site.
    pub(crate) shrunk: *mut f32,
    pub(crate) rank_stride: usize,
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
        let values = match input {
            // Read where they are.
            Input::Plain(x) => &x[row * cols..][..cols],
            Input::Norm { x, weight, eps } => {
                // SAFETY: tasks have disjoint rows; the buffer holds `rows * cols` values.
                let values = unsafe { row_of(*out, row) };
                let x = &x[row * cols..][..cols];
                let scale = inverse_rms(x, eps);
                for i in 0..cols {
                    values[i] = x[i] * scale * weight[i];
                }
                values
            }
            Input::SwiGlu { gate, up } => {
                // SAFETY: as above.
                let values = unsafe { row_of(*out, row) };
                let (gate, up) = (&gate[row * cols..][..cols], &up[row * cols..][..cols]);
                for i in 0..cols {
                    values[i] = silu(gate[i]) * up[i];
                }
                values
            }
        };
        if !out.view.quants.is_null() {
            // SAFETY: as above.
            unsafe { quantise::<L>(values, row, &out.view) };
        }
        for site in 0..out.sites {
            // SAFETY: `routes` and `shrunk` have the stated shapes.
            unsafe {
                let route = *out.routes.add(site * out.view.rows + row);
                let to = out.shrunk.add((site * out.view.rows + row) * out.rank_stride);
                shrink::<L>(&route, values, std::slice::from_raw_parts_mut(to, route.rank));
            }
        }
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
    // SAFETY: all places are those of this row; a block has 32 values.
    unsafe {
        let tile = view.tile(row);
        let place = row % TILE;
        // NaN and infinity make it NaN, which no comparison below would see.
        let mut poison = L::zero();
        for block in 0..view.cols / 32 {
            let values = values.as_ptr().add(block * 32);
            let (low, high) = (L::load(values), L::load(values.add(16)));
            poison = poison.fma(low, L::zero()).fma(high, L::zero());
            let max = L::zero().max_abs(low).max_abs(high).max_lane();
            let scale = max / 127.0;
            let inverse = L::splat(if max > 0.0 { 127.0 / max } else { 0.0 });
            let at = block * tile.rows + place;
            let quants = tile.quants.cast_mut().add(at * 32);
            let counts = [low.mul(inverse).store_i8(quants), high.mul(inverse).store_i8(quants.add(16))];
            *tile.scales.cast_mut().add(at) = scale;
            *tile.sums.cast_mut().add(at) = scale * (counts[0] + counts[1]) as f32;
            *tile.counts.cast_mut().add(2 * at) = counts[0];
            *tile.counts.cast_mut().add(2 * at + 1) = counts[1];
        }
        if poison.sum().is_nan() {
            for block in 0..view.cols / 32 {
                *tile.scales.cast_mut().add(block * tile.rows + place) = f32::NAN;
            }
        }
    }
}

/// `u = A x`.
///
/// # Safety
/// The route's A is (rank, x.len()); `u` has `rank` values.
#[inline(always)]
unsafe fn shrink<L: Lanes>(route: &Route, x: &[f32], u: &mut [f32]) {
    let cols = x.len();
    for (rank, u) in u.iter_mut().enumerate() {
        // SAFETY: the caller vouches for A.
        unsafe {
            *u = if route.brain {
                dot_brain::<L>(std::slice::from_raw_parts(route.a.cast::<u16>().add(rank * cols), cols), x)
            } else {
                let a = std::slice::from_raw_parts(route.a.cast::<f32>().add(rank * cols), cols);
                dot::<L>(x, a)
            };
        }
    }
}

/// As [`dot`] for one bfloat16 row, in two chains.
#[inline(always)]
fn dot_brain<L: Lanes>(a: &[u16], x: &[f32]) -> f32 {
    assert_eq!(a.len(), x.len());
    let body = a.len() - a.len() % 32;
    let mut sums = [L::zero(); 2];
    let mut at = 0;
    while at < body {
        // SAFETY: `at + 32 <= body`, within both.
        unsafe {
            let (a, x) = (a.as_ptr().add(at), x.as_ptr().add(at));
            sums[0] = sums[0].fma(L::load_brain(a.cast()), L::load(x));
            sums[1] = sums[1].fma(L::load_brain(a.add(16).cast()), L::load(x.add(16)));
        }
        at += 32;
    }
    let mut sum = sums[0].add(sums[1]).sum();
    for at in body..a.len() {
        sum += brain_to_f32(a[at]) * x[at];
    }
    sum
}
