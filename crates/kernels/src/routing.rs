//! Which row has which adapter at one site.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use crate::lanes::{Lanes, Portable};
use crate::low_rank::{Kept, LowRank, Route};
use crate::vectors::Vectors;

/// Which row has which adapter at one site.
pub trait Routing: Sync {
    /// The adapter of a row.
    fn at(&self, row: usize) -> Option<LowRank<'_>>;

    /// The largest rank at this site; 0 if no row has an adapter.
    fn max_rank(&self) -> usize;

    /// Whether an update is kept in eight bits here, and the rows must be quantised for it.
    fn coded(&self) -> bool {
        false
    }

    /// What else the adapter of a row does.
    fn vectors(&self, _row: usize) -> Vectors<'_> {
        Vectors::default()
    }

    /// Whether any row's adapter does anything else.
    fn has_vectors(&self) -> bool {
        false
    }

    /// An update of the frozen matrix that all rows share, before what their own adapters do: W + B A in place of W.
    fn under(&self) -> Option<LowRank<'_>> {
        None
    }

    /// Lists the adapters of so many rows, one after the other.
    fn list<'a>(&'a self, rows: usize, to: &mut Listing<'_, 'a>) {
        (0..rows).for_each(|row| to.push(self.at(row)));
    }
}

/// No adapters.
#[derive(Debug, Clone, Copy)]
pub struct NoAdapters;

impl Routing for NoAdapters {
    fn at(&self, _: usize) -> Option<LowRank<'_>> {
        None
    }

    fn max_rank(&self) -> usize {
        0
    }
}

/// One adapter's updates of all its sites, as a step lists them: a cache line each, and no way through the adapter's own parts.
#[derive(Debug)]
pub struct RouteTable<T> {
    owner: Arc<T>,
    /// Into what the owner owns, or what nobody owns.
    routes: Arc<[Route]>,
}

impl<T> Clone for RouteTable<T> {
    fn clone(&self) -> Self {
        Self { owner: Arc::clone(&self.owner), routes: Arc::clone(&self.routes) }
    }
}

// SAFETY: the routes are read-only views of what the owner owns, or of what is there for ever.
unsafe impl<T: Send + Sync> Send for RouteTable<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for RouteTable<T> {}

impl<T: 'static> RouteTable<T> {
    /// Bytes it takes for a site.
    pub const SITE_BYTES: usize = size_of::<Route>();

    /// Of `sites` sites, of which `at` finds the owner's updates.
    ///
    /// # Panics
    /// When the parts of an update contradict each other.
    pub fn new(
        owner: Arc<T>,
        sites: usize,
        at: impl for<'a> Fn(&'a T, usize) -> Option<LowRank<'a>>,
    ) -> Self {
        // The updates are borrowed for as long as anyone may borrow the owner. Nobody has it for writing while this has a
        // share of it, so what is found now stays where it is for as long as this lives. An owner that lives only for a
        // while could name that while in its type, and `at` find what is borrowed for as long: hence `'static`.
        let routes = (0..sites).map(|site| route_of(at(&owner, site))).collect();
        Self { owner, routes }
    }

    /// Whose updates they are.
    #[inline]
    pub fn owner(&self) -> &Arc<T> {
        &self.owner
    }

    /// Asks for the entries of these sites, which will be listed soon.
    pub fn ask_for(&self, sites: Range<usize>) {
        for route in self.routes.get(sites).unwrap_or_default() {
            Portable::prefetch(std::ptr::from_ref(route).cast());
        }
    }
}

pub(crate) fn route_of(update: Option<LowRank<'_>>) -> Route {
    update.map_or(Route::NONE, |update| Route::new(&update).unwrap_or_else(|misfit| panic!("{misfit}")))
}

/// Takes the rows' adapters, which live as long as `'a`.
#[derive(Debug)]
pub struct Listing<'l, 'a> {
    routes: &'l mut Vec<Route>,
    /// What they must fit; without one they are not read through.
    shape: Option<Shape>,
    /// No shorter life will do for what is pushed.
    lives: PhantomData<fn(&'a ()) -> &'a ()>,
}

/// What adapters must fit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Outputs.
    pub(crate) n: usize,
    /// Inputs.
    pub(crate) k: usize,
    /// The largest rank.
    pub(crate) ranks: usize,
    /// Whether rows are quantised.
    pub(crate) fast: bool,
}

impl Shape {
    /// The route, if it fits.
    ///
    /// # Panics
    /// When it does not.
    #[inline(always)]
    pub(crate) fn checked(self, route: Route) -> Route {
        let Self { n, k, ranks, fast } = self;
        if route.rank > 0 {
            route.fits(n, k).unwrap_or_else(|misfit| panic!("{misfit}"));
            assert!(route.rank <= ranks, "rank {} beyond {ranks}", route.rank);
            assert!(fast || route.kept != Kept::Codes, "the routing hides an adapter in eight bits");
        }
        route
    }
}

impl<'l, 'a> Listing<'l, 'a> {
    pub(crate) fn new(routes: &'l mut Vec<Route>, shape: Option<Shape>) -> Self {
        Self { routes, shape, lives: PhantomData }
    }

    /// The next row's.
    ///
    /// # Panics
    /// When a call lists and it does not fit the layer, or is of a larger rank than the routing says.
    pub fn push(&mut self, update: Option<LowRank<'a>>) {
        self.push_route(route_of(update));
    }

    /// The next row's, as a table has it; none without a table or beyond its end.
    ///
    /// # Panics
    /// As [`Listing::push`].
    #[inline]
    pub fn push_at<T: 'static>(&mut self, table: Option<&'a RouteTable<T>>, site: usize) {
        let route = table.and_then(|table| table.routes.get(site));
        self.push_route(route.copied().unwrap_or(Route::NONE));
    }

    #[inline(always)]
    fn push_route(&mut self, route: Route) {
        self.routes.push(self.shape.map_or(route, |shape| shape.checked(route)));
    }
}
