//! What a row's adapter does to a fused layer besides a low-rank update of its own: scales of the input and of the product,
//! a bias, and the update that lies under all rows.

use crate::input::Prepared;
use crate::isa::Isa;
use crate::lanes::{Lanes, multiversion};
use crate::linear::Target;
use crate::low_rank::{Route, up};
use crate::weight::PANEL;

/// The vectors of one adapter at one site: `y = output * (W (input * x)) + bias of the base + bias + B (A (input * x))`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Vectors<'a> {
    /// One factor per input feature.
    pub input: Option<&'a [f32]>,
    /// One factor per output feature, on the frozen product alone.
    pub output: Option<&'a [f32]>,
    /// One value per output feature.
    pub bias: Option<&'a [f32]>,
}

/// [`Vectors`] as the kernels keep them for the time of a call; null where there is none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowVectors {
    pub(crate) input: *const f32,
    output: *const f32,
    bias: *const f32,
}

impl RowVectors {
    /// # Panics
    /// When a vector has not the length of a layer of `n` outputs and `k` inputs.
    pub(crate) fn new(vectors: &Vectors<'_>, n: usize, k: usize) -> Self {
        let start = |vector: Option<&[f32]>, len: usize| {
            vector.map_or(std::ptr::null(), |vector| {
                assert_eq!(vector.len(), len, "an adapter's vector has not {len} values");
                vector.as_ptr()
            })
        };
        Self {
            input: start(vectors.input, k),
            output: start(vectors.output, n),
            bias: start(vectors.bias, n),
        }
    }
}

/// The columns of a panel where they are not sixteen, a row has vectors, or an update lies under all rows. A row
/// without any of it goes through the same additions as elsewhere.
#[derive(Clone, Copy)]
pub(crate) struct Adapted<'a> {
    isa: Isa,
    target: Target<'a>,
    panel: usize,
    /// Columns that are there, at most sixteen.
    width: usize,
    /// By row; null if no row has any.
    vectors: *const RowVectors,
    /// The update under all rows; of rank 0 if there is none.
    under: Route,
    /// (rows, rank): its `A x`.
    shrunk: *const f32,
}

impl<'a> Adapted<'a> {
    /// # Safety
    /// `prepared` describes valid buffers for as long as this lives; the columns belong to the caller; the CPU has the
    /// unit.
    pub(crate) unsafe fn new(
        isa: Isa,
        target: Target<'a>,
        panel: usize,
        width: usize,
        site: usize,
        prepared: &Prepared,
    ) -> Self {
        let (rows, vectors) = (prepared.view.rows, prepared.vectors);
        Self {
            isa,
            target,
            panel,
            width,
            vectors: if vectors.is_null() { vectors } else { vectors.wrapping_add(site * rows) },
            under: prepared.under[site],
            shrunk: prepared.under_shrunk.wrapping_add(site * rows * prepared.under_rank),
        }
    }

    /// Takes row `row`'s sums.
    pub(crate) fn put(&self, row: usize, sums: &[f32; PANEL]) {
        put(self.isa, self, row, sums);
    }
}

multiversion! {
    fn put(to: &Adapted<'_>, row: usize, sums: &[f32; PANEL]) = put_body<Lanes>
}

#[inline(always)]
fn put_body<L: Lanes>(to: &Adapted<'_>, row: usize, sums: &[f32; PANEL]) {
    let Adapted { target, panel, width, under, .. } = *to;
    // SAFETY: the vectors have the layer's lengths (checked when they were listed), `shrunk` a value per row and rank;
    // tasks own disjoint columns, and one part is alive at a time.
    unsafe {
        let mut sums = L::load(sums.as_ptr());
        if under.rank > 0 {
            let [update] = up(&under, panel, to.shrunk.add(row * under.rank), 0);
            sums = sums.add(update);
        }
        let vectors = if to.vectors.is_null() { None } else { Some(*to.vectors.add(row)) };
        if let Some(vectors) = vectors.filter(|vectors| !vectors.output.is_null()) {
            sums = sums.mul(part(vectors.output, panel, width));
        }
        if let Some(bias) = target.bias {
            sums = sums.add(part(bias.as_ptr(), panel, width));
        }
        if let Some(vectors) = vectors.filter(|vectors| !vectors.bias.is_null()) {
            sums = sums.add(part(vectors.bias, panel, width));
        }
        let y = target.y.part(row * target.n + panel * PANEL, width);
        if target.add {
            sums = part::<L>(y.as_ptr(), 0, width).add(sums);
        }
        if width == PANEL {
            sums.store(y.as_mut_ptr());
        } else {
            y.copy_from_slice(&sums.to_array()[..width]);
        }
    }
}

/// A panel's part of a vector with a value per output; zeros where it is not `width` wide.
///
/// # Safety
/// The vector has `width` values at the panel, at most sixteen; the CPU has the unit of `L`.
#[inline(always)]
pub(crate) unsafe fn part<L: Lanes>(vector: *const f32, panel: usize, width: usize) -> L {
    // SAFETY: `width` values are left at the panel.
    unsafe {
        let start = vector.add(panel * PANEL);
        if width == PANEL {
            return L::load(start);
        }
        let mut padded = [0.0; PANEL];
        padded[..width].copy_from_slice(std::slice::from_raw_parts(start, width));
        L::load(padded.as_ptr())
    }
}
