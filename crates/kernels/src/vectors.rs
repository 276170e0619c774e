//! What a row's adapter does to a fused layer besides a low-rank update of its own: scales of the input and of the product,
//! a bias, and the update that lies under all rows.

use crate::lanes::Lanes;
use crate::linear::Target;
use crate::low_rank::{Route, up};
use crate::panel::Sink;
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

/// The columns of a panel, for layers where a row has vectors or an update lies under all rows. A row without any
/// goes through the same additions as in the plain sinks.
pub(crate) struct Adapted<'a, L> {
    pub(crate) target: Target<'a>,
    pub(crate) panel: usize,
    /// Columns that are there, at most sixteen.
    pub(crate) width: usize,
    pub(crate) bias: L,
    /// By row; null if no row has any.
    pub(crate) vectors: *const RowVectors,
    /// The update under all rows; of rank 0 if there is none.
    pub(crate) under: Route,
    /// (rows, rank): its `A x`.
    pub(crate) shrunk: *const f32,
}

impl<L: Lanes> Adapted<'_, L> {
    /// This panel's part of a vector with a value per output.
    ///
    /// # Safety
    /// The vector has as many values as the layer outputs.
    #[inline(always)]
    pub(crate) unsafe fn part(vector: *const f32, panel: usize, width: usize) -> L {
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
}

impl<L: Lanes> Sink<L> for Adapted<'_, L> {
    #[inline(always)]
    fn put(&mut self, row: usize, mut sums: L) {
        let Self { target, panel, width, .. } = *self;
        // SAFETY: the vectors have the layer's lengths (checked when they were listed), `shrunk` a value per row and rank;
        // tasks own disjoint columns, and one part is alive at a time.
        unsafe {
            if self.under.rank > 0 {
                let [under] = up(&self.under, panel, self.shrunk.add(row * self.under.rank), 0);
                sums = sums.add(under);
            }
            let vectors = if self.vectors.is_null() { None } else { Some(*self.vectors.add(row)) };
            if let Some(vectors) = vectors.filter(|vectors| !vectors.output.is_null()) {
                sums = sums.mul(Self::part(vectors.output, panel, width));
            }
            if target.bias.is_some() {
                sums = sums.add(self.bias);
            }
            if let Some(vectors) = vectors.filter(|vectors| !vectors.bias.is_null()) {
                sums = sums.add(Self::part(vectors.bias, panel, width));
            }
            let y = target.y.part(row * target.n + panel * PANEL, width);
            if target.add {
                sums = Self::part(y.as_ptr(), 0, width).add(sums);
            }
            if width == PANEL {
                sums.store(y.as_mut_ptr());
            } else {
                y.copy_from_slice(&sums.to_array()[..width]);
            }
        }
    }
}
