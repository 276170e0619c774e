//! What the rows' adapters add to a panel's columns: `B u`, tile by tile, beside the frozen product.

use std::mem::MaybeUninit;

use crate::input::Prepared;
use crate::lanes::{Lanes, multiversion};
use crate::linear::Target;
use crate::low_rank::{Kept, PREFETCHED, Route, sums_of, up};
use crate::memory::LINE;
use crate::panel::TALLEST;
use crate::weight::PANEL;

/// Rows of one adapter that read B together.
const ABREAST: usize = 4;

/// The way up of all rows at one site.
#[derive(Clone, Copy)]
pub(crate) struct Updates {
    /// By row.
    routes: *const Route,
    rows: usize,
    /// (rows, stride): each row's `A x`.
    shrunk: *const f32,
    stride: usize,
    /// The stripe's last panel and one; 0 if rows are so many that they share adapters.
    end: usize,
}

/// Sixteen values for each row of a tile.
#[repr(C, align(64))]
pub(crate) struct Updated([MaybeUninit<[f32; PANEL]>; TALLEST]);

impl Updated {
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Self([MaybeUninit::uninit(); TALLEST])
    }

    #[inline(always)]
    pub(crate) fn row(&self, at: usize) -> *const f32 {
        self.0[at].as_ptr().cast()
    }
}

impl Updates {
    /// Of a stripe of panels that ends before `end`; none if no row has an adapter there.
    pub(crate) fn new(prepared: &Prepared, site: usize, end: usize) -> Option<Self> {
        let rows = prepared.view.rows;
        prepared.adapted[site].then(|| Self {
            routes: prepared.routes.wrapping_add(site * rows),
            rows,
            shrunk: prepared.shrunk.wrapping_add(site * rows * prepared.rank_stride),
            stride: prepared.rank_stride,
            end: if rows <= PREFETCHED { end } else { 0 },
        })
    }

    /// Asks for a panel of all rows' B.
    pub(crate) fn ask<L: Lanes>(&self, panel: usize) {
        if panel < self.end {
            for row in 0..self.rows {
                // SAFETY: there is a route for every row.
                unsafe { self.ask_for::<L>(row, panel) };
            }
        }
    }

    /// # Safety
    /// There is a route for the row, and for those before it.
    #[inline(always)]
    unsafe fn ask_for<L: Lanes>(&self, row: usize, panel: usize) {
        // SAFETY: the caller vouches for the routes.
        let (route, last) = unsafe {
            let route = self.routes.add(row);
            (*route, if row > 0 { (*route.sub(1)).b } else { std::ptr::null() })
        };
        // Rows of one adapter follow each other.
        if route.b != last {
            let bytes = route.rank * PANEL * route.kept.width();
            for line in 0..bytes.div_ceil(LINE) {
                L::prefetch(route.b.wrapping_add(panel * bytes + line * LINE));
            }
        }
    }

    /// `B u` of `count` rows from `row` on, for a panel's columns; a row without an adapter has negative zeros, which
    /// change nothing when they are added.
    ///
    /// # Safety
    /// `self` is of valid buffers, `A x` computed; the rows are there, no more than a tile's; the CPU has the unit of `L`.
    #[inline(always)]
    pub(crate) unsafe fn of<L: Lanes>(&self, row: usize, count: usize, panel: usize, to: &mut Updated) {
        of_rows(L::ISA, self, row, count, panel, to);
    }

    /// Adds `B u` to the columns of a panel.
    ///
    /// # Safety
    /// As for [`Self::of`]; the columns belong to this task.
    pub(crate) unsafe fn add<L: Lanes>(&self, row: usize, count: usize, panel: usize, target: Target<'_>) {
        let width = PANEL.min(target.n - panel * PANEL);
        let mut updated = Updated::new();
        // SAFETY: the caller vouches for the rows and the columns.
        unsafe {
            self.of::<L>(row, count, panel, &mut updated);
            for at in 0..count {
                let y = target.y.part((row + at) * target.n + panel * PANEL, width);
                let update = L::load(updated.row(at));
                if width == PANEL {
                    L::load(y.as_ptr()).add(update).store(y.as_mut_ptr());
                } else {
                    y.iter_mut().zip(update.to_array()).for_each(|(y, update)| *y += update);
                }
            }
        }
    }
}

multiversion! {
    fn of_rows(updates: &Updates, row: usize, count: usize, panel: usize, to: &mut Updated) = of_rows_body<Lanes>
}

#[inline(always)]
fn of_rows_body<L: Lanes>(updates: &Updates, row: usize, count: usize, panel: usize, to: &mut Updated) {
    let (routes, stride) = (updates.routes.wrapping_add(row), updates.stride);
    let mut at = 0;
    while at < count {
        let to = to.0[at..].as_mut_ptr().cast::<f32>();
        // SAFETY: the caller of `of` vouches for the rows; B has a panel of (rank, 16) for every panel of the weight.
        unsafe {
            let route = *routes.add(at);
            let u = updates.shrunk.add((row + at) * stride);
            if route.rank == 0 {
                L::splat(-0.0).store(to);
                at += 1;
                continue;
            }
            let alike = |i: usize| (*routes.add(at + i)).b == route.b;
            if at + ABREAST <= count && alike(1) && alike(2) && alike(3) {
                if panel + 1 < updates.end {
                    updates.ask_for::<L>(row + at, panel + 1);
                }
                let sums: [L; ABREAST] = up(&route, panel, u, stride);
                for (i, sums) in sums.into_iter().enumerate() {
                    sums.store(to.add(i * PANEL));
                }
                at += ABREAST;
                continue;
            }
            if (route.kept, route.rank) == (Kept::Codes, 8) {
                let b = route.b.add(panel * 8 * PANEL);
                if panel + 1 < updates.end {
                    L::prefetch(b.wrapping_add(8 * PANEL));
                    L::prefetch(b.wrapping_add(8 * PANEL + LINE));
                }
                // The rank is known: no loop.
                let [sums] = sums_of::<L, 1>(b, 8, u, 0, |b| L::load_i8(b), PANEL);
                sums.store(to);
            } else {
                if panel + 1 < updates.end {
                    updates.ask_for::<L>(row + at, panel + 1);
                }
                up::<L, 1>(&route, panel, u, 0)[0].store(to);
            }
            at += 1;
        }
    }
}
