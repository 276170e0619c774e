//! The low-rank updates of a batch: every row's way down (`A x`) and up again (`B u`), and the form its factors are kept in.

use std::fmt;

use rayon::prelude::*;

use crate::isa::isa;
use crate::lanes::{Lanes, brain_to_f32, multiversion};
use crate::panel::{TILE, View};
use crate::weight::PANEL;

/// Low-rank factors in the precision they are kept in.
#[derive(Debug, Clone, Copy)]
pub enum Numbers<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [u16]),
    /// Eight bits, none below -127; [`LowRank::scales`] has what they are multiplied with.
    I8(&'a [i8]),
}

impl Numbers<'_> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::I8(values) => values.len(),
        }
    }

    /// In float32; codes as they are.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(values) => values.to_vec(),
            Self::Bf16(values) => values.iter().map(|&value| brain_to_f32(value)).collect(),
            Self::I8(codes) => codes.iter().map(|&code| f32::from(code)).collect(),
        }
    }

    fn start(&self) -> *const u8 {
        match *self {
            Self::F32(values) => values.as_ptr().cast(),
            Self::Bf16(values) => values.as_ptr().cast(),
            Self::I8(codes) => codes.as_ptr().cast(),
        }
    }

    fn kept(&self) -> Kept {
        match self {
            Self::F32(_) => Kept::Single,
            Self::Bf16(_) => Kept::Brain,
            Self::I8(_) => Kept::Codes,
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
    /// A, shape (rank, input features); in eight bits, rows are filled up with zeros to [`codes_stride`].
    pub a: Numbers<'a>,
    /// B with the scale folded in, in panels (output features / 16 rounded up, rank, 16): [`crate::pack_b`].
    pub b: Numbers<'a>,
    /// In eight bits, one factor for each rank: the scale of its row of A times that of its column of B. Else empty.
    pub scales: &'a [f32],
}

impl LowRank<'_> {
    /// Whether it fits a layer of `n` outputs and `k` inputs.
    ///
    /// # Errors
    /// Says what does not.
    pub fn fits(&self, n: usize, k: usize) -> Result<(), String> {
        Route::new(self).and_then(|route| route.fits(n, k)).map_err(|misfit| misfit.to_string())
    }
}

/// Why an update does not fit a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Misfit {
    Mixed,
    NoRank,
    Blocks { k: usize },
    A { rank: usize, k: usize },
    B { n: usize, rank: usize },
    Scales { scales: usize },
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mixed => f.write_str("A and B are kept in different precisions"),
            Self::NoRank => f.write_str("an update of rank 0"),
            Self::Blocks { k } => write!(f, "{k} columns are no whole blocks"),
            Self::A { rank, k } => write!(f, "A is not {rank} x {k}"),
            Self::B { n, rank } => write!(f, "B is not {n} x {rank}"),
            Self::Scales { scales } => write!(f, "there are not {scales} scales"),
        }
    }
}

/// Codes of one row of A in eight bits, for so many input features.
#[must_use]
pub const fn codes_stride(cols: usize) -> usize {
    cols.next_multiple_of(CHUNK)
}

/// Columns of A that are multiplied at a time in eight bits: two blocks of quants.
const CHUNK: usize = 64;

/// A row's adapter at one site, as the kernels read it: all on one cache line.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Route {
    /// 0 without an adapter.
    pub(crate) rank: usize,
    pub(crate) kept: Kept,
    pub(crate) a: *const u8,
    pub(crate) b: *const u8,
    /// For each rank, in eight bits.
    pub(crate) scales: *const f32,
    /// Values of A and of B.
    lens: [usize; 2],
}

const _: () = assert!(size_of::<Route>() == crate::memory::LINE);

/// How the factors are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    Single,
    Brain,
    Codes,
}

impl Kept {
    pub(crate) const fn width(self) -> usize {
        match self {
            Self::Single => 4,
            Self::Brain => 2,
            Self::Codes => 1,
        }
    }
}

impl Route {
    pub(crate) const NONE: Self = Self {
        rank: 0,
        kept: Kept::Single,
        a: std::ptr::null(),
        b: std::ptr::null(),
        scales: std::ptr::null(),
        lens: [0; 2],
    };

    /// The route of an update.
    ///
    /// # Errors
    /// When its parts contradict each other.
    pub(crate) fn new(update: &LowRank<'_>) -> Result<Self, Misfit> {
        let LowRank { rank, a, b, scales } = *update;
        let kept = a.kept();
        let scales_wanted = if kept == Kept::Codes { rank } else { 0 };
        if kept != b.kept() {
            Err(Misfit::Mixed)
        } else if rank == 0 {
            Err(Misfit::NoRank)
        } else if scales.len() != scales_wanted {
            Err(Misfit::Scales { scales: scales_wanted })
        } else {
            let lens = [a.len(), b.len()];
            Ok(Self { rank, kept, a: a.start(), b: b.start(), scales: scales.as_ptr(), lens })
        }
    }

    /// As [`LowRank::fits`].
    #[inline(always)]
    pub(crate) fn fits(&self, n: usize, k: usize) -> Result<(), Misfit> {
        let (rank, [a, b]) = (self.rank, self.lens);
        let stride = if self.kept == Kept::Codes { codes_stride(k) } else { k };
        let is = |len, stride| rank.checked_mul(stride) == Some(len);
        if self.kept == Kept::Codes && !k.is_multiple_of(32) {
            Err(Misfit::Blocks { k })
        } else if !is(a, stride) {
            Err(Misfit::A { rank, k })
        } else if !is(b, n.next_multiple_of(PANEL)) {
            Err(Misfit::B { n, rank })
        } else {
            Ok(())
        }
    }

    /// What the way down reads, and how many bytes: A, and its scales.
    pub(crate) fn way_down(&self) -> [(*const u8, usize); 2] {
        let scales = if self.kept == Kept::Codes { self.rank * size_of::<f32>() } else { 0 };
        [(self.a, self.lens[0] * self.kept.width()), (self.scales.cast(), scales)]
    }
}

/// Batches up to this many rows fetch their factors ahead; in larger ones rows share adapters that are in the cache.
pub(crate) const PREFETCHED: usize = 64;

/// Ranks whose products with a row go side by side.
const ABREAST: usize = 4;

/// `u = A x` of the row whose prepared values are `x`.
///
/// # Safety
/// The route's A is (rank, x.len()); `u` has `rank` values; for codes the row's quants are in the view.
#[inline(always)]
pub(crate) unsafe fn shrink<L: Lanes>(route: &Route, x: &[f32], row: usize, view: &View, u: &mut [f32]) {
    let cols = x.len();
    // SAFETY: the caller vouches for A and for the row.
    unsafe {
        match route.kept {
            Kept::Single => {
                for (rank, u) in u.iter_mut().enumerate() {
                    let a = std::slice::from_raw_parts(route.a.cast::<f32>().add(rank * cols), cols);
                    *u = dot::<L>(x, a);
                }
            }
            Kept::Brain => {
                let mut rank = 0;
                while rank + 2 <= u.len() {
                    dots_of_brain::<L, 2>(route.a.cast::<u16>().add(rank * cols), x, &mut u[rank..rank + 2]);
                    rank += 2;
                }
                if rank < u.len() {
                    dots_of_brain::<L, 1>(route.a.cast::<u16>().add(rank * cols), x, &mut u[rank..]);
                }
            }
            Kept::Codes => {
                let mut rank = 0;
                while rank + ABREAST <= u.len() {
                    dots_of_codes::<L, ABREAST>(route, rank, row, view, u);
                    rank += ABREAST;
                }
                while rank < u.len() {
                    dots_of_codes::<L, 1>(route, rank, row, view, u);
                    rank += 1;
                }
            }
        }
    }
}

/// The dot products of consecutive bfloat16 rows with `x`: even and odd sixteens apart, their tree, then the tail.
///
/// # Safety
/// `a` is (M, x.len()).
#[inline(always)]
unsafe fn dots_of_brain<L: Lanes, const M: usize>(a: *const u16, x: &[f32], u: &mut [f32]) {
    let cols = x.len();
    let body = cols - cols % 32;
    let (mut even, mut odd) = ([L::zero(); M], [L::zero(); M]);
    // SAFETY: `at + 32 <= body`, within `x` and every row; the tail likewise.
    unsafe {
        for at in (0..body).step_by(32) {
            let (low, high) = (L::load(x.as_ptr().add(at)), L::load(x.as_ptr().add(at + 16)));
            for i in 0..M {
                let a = a.add(i * cols + at);
                even[i] = even[i].fma(L::load_brain(a.cast()), low);
                odd[i] = odd[i].fma(L::load_brain(a.add(16).cast()), high);
            }
        }
        for i in 0..M {
            let mut sum = even[i].add(odd[i]).sum();
            for at in body..cols {
                sum += brain_to_f32(*a.add(i * cols + at)) * x[at];
            }
            u[i] = sum;
        }
    }
}

/// The products of `M` ranks' codes with a row's quants: integers within blocks, float32 over them.
///
/// # Safety
/// As for [`shrink`]; the ranks `first..first + M` are there.
#[inline(always)]
unsafe fn dots_of_codes<L: Lanes, const M: usize>(
    route: &Route,
    first: usize,
    row: usize,
    view: &View,
    u: &mut [f32],
) {
    let (tile, place, stride) = (view.tile(row), row % TILE, codes_stride(view.cols));
    let blocks = view.cols / 32;
    let mut sums = [L::zero(); M];
    // SAFETY: blocks below `cols / 32`; rows of A are filled up to whole chunks.
    unsafe {
        let a = route.a.cast::<i8>().add(first * stride);
        for chunk in 0..blocks.div_ceil(2) {
            let (low, high) = (2 * chunk, 2 * chunk + 1);
            let at = |block: usize| block * tile.height + place;
            let scale = |block: usize| (*tile.summaries.add(at(block))).scale;
            let (x, scale) = if high < blocks {
                (
                    L::signed(tile.quants.add(at(low) * 32), Some(tile.quants.add(at(high) * 32))),
                    L::halves(scale(low), scale(high)),
                )
            } else {
                (L::signed(tile.quants.add(at(low) * 32), None), L::halves(scale(low), 0.0))
            };
            for i in 0..M {
                let dots = L::signed_dot(a.add(i * stride + chunk * CHUNK), x);
                sums[i] = sums[i].fma(L::from_ints(dots), scale);
            }
        }
        for i in 0..M {
            u[first + i] = sums[i].sum() * *route.scales.add(first + i);
        }
    }
}

/// `B u` for the columns of a panel, of `M` rows whose `u` are `stride` apart.
///
/// # Safety
/// The route's B has a panel of (rank, 16) there; every row's `u` has `rank` values.
#[inline(always)]
pub(crate) unsafe fn up<L: Lanes, const M: usize>(
    route: &Route,
    panel: usize,
    u: *const f32,
    stride: usize,
) -> [L; M] {
    // SAFETY: the caller vouches for B and `u`.
    unsafe {
        let b = route.b.add(panel * route.rank * PANEL * route.kept.width());
        match route.kept {
            Kept::Single => sums_of(b, route.rank, u, stride, |b| L::load(b.cast()), 64),
            Kept::Brain => sums_of(b, route.rank, u, stride, |b| L::load_brain(b), 32),
            Kept::Codes => sums_of(b, route.rank, u, stride, |b| L::load_i8(b), 16),
        }
    }
}

/// As [`up`] of one panel's B, of which `load` reads sixteen values, which take `bytes`.
///
/// # Safety
/// As for [`up`].
#[inline(always)]
pub(crate) unsafe fn sums_of<L: Lanes, const M: usize>(
    b: *const u8,
    rank: usize,
    u: *const f32,
    stride: usize,
    load: impl Fn(*const u8) -> L,
    bytes: usize,
) -> [L; M] {
    let mut sums = [L::zero(); M];
    for rank in 0..rank {
        // SAFETY: the caller vouches for B and `u`.
        unsafe {
            let b = load(b.add(rank * bytes));
            for i in 0..M {
                sums[i] = sums[i].fma(b, L::splat(*u.add(i * stride + rank)));
            }
        }
    }
    sums
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

/// Adds an adapter's update to every row of `y`, which is (rows, output features): `y[i] += B (A x[i])`, with A (rank,
/// input features) and B (output features, rank).
///
/// # Panics
/// When a buffer's length does not fit.
pub fn adapt(rank: usize, a: &[f32], b: &[f32], x: &[f32], y: &mut [f32]) {
    let (k, n) = (a.len() / rank, b.len() / rank);
    let rows = x.len() / k;
    assert!(a.len() == rank * k && b.len() == rank * n, "A or B does not divide into ranks of {rank}");
    assert!(x.len() == rows * k && y.len() == rows * n, "x or y does not fit {rows} rows");
    let b = pack_b(b, rank);
    y.par_chunks_mut(n).zip(x.par_chunks(k)).with_min_len(8).for_each(|(y, x)| {
        let mut u = vec![0.0; rank];
        matvec(isa(), a, x, &mut u);
        add_update(isa(), &b, &u, y);
    });
}

multiversion! {
    fn add_update(b: &[f32], u: &[f32], y: &mut [f32]) = add_update_body<Lanes>
}

#[inline(always)]
fn add_update_body<L: Lanes>(b: &[f32], u: &[f32], y: &mut [f32]) {
    for (b, y) in b.chunks_exact(u.len() * PANEL).zip(y.chunks_mut(PANEL)) {
        let mut sums = L::zero();
        for (b, &u) in b.chunks_exact(PANEL).zip(u) {
            // SAFETY: the chunk has sixteen values.
            sums = sums.fma(unsafe { L::load(b.as_ptr()) }, L::splat(u));
        }
        y.iter_mut().zip(sums.to_array()).for_each(|(y, sum)| *y += sum);
    }
}

multiversion! {
    /// `out[i] = matrix[i] . x`, `matrix` of shape (out.len(), x.len()).
    fn matvec(matrix: &[f32], x: &[f32], out: &mut [f32]) = matvec_body<Lanes>
}

#[inline(always)]
fn matvec_body<L: Lanes>(matrix: &[f32], x: &[f32], out: &mut [f32]) {
    for (out, row) in out.iter_mut().zip(matrix.chunks_exact(x.len())) {
        *out = dot::<L>(x, row);
    }
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
