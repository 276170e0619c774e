//! The routing of a batch: which row uses which adapter.

use std::sync::Arc;

use kernels::{Listing, LowRank, Numbers, Routing, Vectors};
use types::{Site, SiteId};

use crate::adapter::Adapter;
use crate::site::Effects;

/// Every row's adapter, listed once per step and used at every site. Cleared and filled again for every step.
#[derive(Debug, Clone, Default)]
pub struct AdapterBatch {
    adapters: Vec<Arc<Adapter>>,
    /// Each row's place in `adapters`; [`NONE`] without one.
    rows: Vec<u32>,
    /// By the sites' names: what any of them does there in any layer.
    effects: [Effects; Site::ALL.len()],
}

const NONE: u32 = u32::MAX;

impl AdapterBatch {
    /// Routes row `i` to the adapter at place `i` of `rows`; `None` is the base alone.
    pub fn new<'a>(rows: impl IntoIterator<Item = Option<&'a Arc<Adapter>>>) -> Self {
        let mut batch = Self::default();
        rows.into_iter().for_each(|adapter| batch.push(adapter, 1));
        batch
    }

    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.adapters.clear();
        self.rows.clear();
        self.effects = Default::default();
    }

    /// Adds `rows` rows that all use `adapter`.
    pub fn push(&mut self, adapter: Option<&Arc<Adapter>>, rows: usize) {
        let place = adapter.map_or(NONE, |adapter| {
            let known = self.adapters.iter().position(|known| Arc::ptr_eq(known, adapter));
            known.unwrap_or_else(|| {
                self.adapters.push(Arc::clone(adapter));
                let all = self.effects.iter_mut().zip(adapter.effects());
                all.for_each(|(effects, more)| effects.join(*more));
                self.adapters.len() - 1
            }) as u32
        });
        self.rows.extend(std::iter::repeat_n(place, rows));
    }

    /// The rows' adapters at one site.
    #[must_use]
    pub fn site(&self, id: SiteId) -> SiteRouting<'_> {
        SiteRouting { batch: self, id, under: None }
    }

    /// Asks for what the adapters' tables say of a layer's sites from one on, up to another: a step reads much else before
    /// it comes to them again.
    pub fn ask_for(&self, from: SiteId, to: SiteId) {
        for adapter in &self.adapters {
            adapter.routes().ask_for(from.index()..to.index() + 1);
        }
    }

    /// A row's adapter.
    #[inline]
    #[must_use]
    pub fn row(&self, row: usize) -> Option<&Adapter> {
        self.adapters.get(*self.rows.get(row)? as usize).map(|adapter| &**adapter)
    }

    /// Number of different adapters.
    #[must_use]
    pub fn adapters(&self) -> usize {
        self.adapters.len()
    }
}

/// The rows' adapters at one site.
#[derive(Debug, Clone, Copy)]
pub struct SiteRouting<'a> {
    batch: &'a AdapterBatch,
    id: SiteId,
    under: Option<LowRank<'a>>,
}

impl<'a> SiteRouting<'a> {
    /// The same over an update that all rows share.
    #[must_use]
    pub fn over(self, under: Option<LowRank<'a>>) -> Self {
        Self { under, ..self }
    }

    fn effects(&self) -> Effects {
        self.batch.effects[self.id.site.index()]
    }
}

impl Routing for SiteRouting<'_> {
    fn at(&self, row: usize) -> Option<LowRank<'_>> {
        self.batch.row(row)?.site(self.id)
    }

    // Of all layers, which costs a site nothing: to ask every adapter at every site takes longer than some of the products.
    fn max_rank(&self) -> usize {
        self.effects().rank
    }

    fn list<'a>(&'a self, rows: usize, to: &mut Listing<'_, 'a>) {
        let site = self.id.index();
        (0..rows).for_each(|row| to.push_at(self.batch.row(row).map(Adapter::routes), site));
    }

    fn coded(&self) -> bool {
        let shared = self.under.is_some_and(|under| matches!(under.a, Numbers::I8(_)));
        shared || self.effects().coded
    }

    fn vectors(&self, row: usize) -> Vectors<'_> {
        self.batch.row(row).map_or(Vectors::default(), |adapter| adapter.vectors(self.id))
    }

    fn has_vectors(&self) -> bool {
        self.effects().vectors
    }

    fn under(&self) -> Option<LowRank<'_>> {
        self.under
    }
}
