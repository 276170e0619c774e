//! The low-rank updates of a batch: every row's way down (`A x`) and up again (`B u`), and the form its factors are kept in.

use crate::input::Prepared;
use crate::lanes::{Lanes, brain_to_f32};
use crate::linear::Target;
use crate::weight::PANEL;

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

/// Batches up to this many rows fetch the rows' B ahead; in larger ones rows share adapters that are in the cache.
const PREFETCHED: usize = 64;

/// `u = A x`.
///
/// # Safety
/// The route's A is (rank, x.len()); `u` has `rank` values.
#[inline(always)]
pub(crate) unsafe fn shrink<L: Lanes>(route: &Route, x: &[f32], u: &mut [f32]) {
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

/// Adds `B u` to a panel's columns of the rows that have an adapter.
///
/// # Safety
/// `prepared` describes valid buffers, `A x` computed; the panel's columns belong to this task.
#[inline(always)]
pub(crate) unsafe fn expand<L: Lanes>(
    target: Target<'_>,
    panel: usize,
    width: usize,
    site: usize,
    prepared: &Prepared,
) {
    let rows = prepared.view.rows;
    for row in 0..rows {
        // SAFETY: the caller vouches for the buffers; B has a panel of (rank, 16) for every panel of the weight.
        unsafe {
            let route = *prepared.routes.add(site * rows + row);
            if route.rank == 0 {
                continue;
            }
            let u = prepared.shrunk.add((site * rows + row) * prepared.rank_stride);
            let mut sums = L::zero();
            let at = panel * route.rank * PANEL;
            if rows <= PREFETCHED {
                // Every row's B may be another's: the next panel's part comes while the frozen product is computed.
                let width = if route.brain { 2 } else { 4 };
                let next = route.b.wrapping_add((at + route.rank * PANEL) * width);
                for line in 0..(route.rank * PANEL * width).div_ceil(64) {
                    L::prefetch(next.wrapping_add(line * 64));
                }
            }
            for rank in 0..route.rank {
                let b = if route.brain {
                    L::load_brain(route.b.add((at + rank * PANEL) * 2))
                } else {
                    L::load(route.b.cast::<f32>().add(at + rank * PANEL))
                };
                sums = sums.fma(b, L::splat(*u.add(rank)));
            }
            let y = target.y.part(row * target.n + panel * PANEL, width);
            if width == PANEL {
                L::load(y.as_ptr()).add(sums).store(y.as_mut_ptr());
            } else {
                y.iter_mut().zip(sums.to_array()).for_each(|(y, sum)| *y += sum);
            }
        }
    }
}

/// B of shape (output features, rank) in the panels of [`LowRank::b`].
///
/// # Panics
/// When `b` does not divide by `rank`.
#[must_use]
pub fn pack_b(b: &[f32], rank: usize) -> Vec<f32> {
    let n = b.len() / rank;
    assert_eq!(b.len(), n * rank, "B does not divide into rows of {rank}");
    let mut packed = vec![0.0; n.div_ceil(PANEL) * PANEL * rank];
    for (row, values) in b.chunks_exact(rank).enumerate() {
        for (at, &value) in values.iter().enumerate() {
            packed[(row / PANEL * rank + at) * PANEL + row % PANEL] = value;
        }
    }
    packed
}

/// The dot product of two rows of the same length: sixteen lanes, their tree, then the tail.
#[inline(always)]
pub(crate) fn dot<L: Lanes>(x: &[f32], w: &[f32]) -> f32 {
    assert_eq!(x.len(), w.len());
    let body = x.len() - x.len() % 16;
    let mut sums = L::zero();
    let mut at = 0;
    while at < body {
        // SAFETY: `at + 16 <= body`, within both.
        sums = unsafe { sums.fma(L::load(x.as_ptr().add(at)), L::load(w.as_ptr().add(at))) };
        at += 16;
    }
    let mut sum = sums.sum();
    for at in body..x.len() {
        sum += x[at] * w[at];
    }
    sum
}
