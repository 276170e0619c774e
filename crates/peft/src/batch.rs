//! The routing of a batch: which row uses which adapter.

use std::sync::Arc;

use kernels::{LowRank, Routing};
use types::SiteId;

use crate::adapter::Adapter;

/// Every row's adapter, listed once per step and used at every site. Cleared and filled again for every step.
#[derive(Debug, Clone, Default)]
pub struct AdapterBatch {
    adapters: Vec<Arc<Adapter>>,
    /// Each row's place in `adapters`; [`NONE`] without one.
    rows: Vec<u32>,
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
    }

    /// Adds `rows` rows that all use `adapter`.
    pub fn push(&mut self, adapter: Option<&Arc<Adapter>>, rows: usize) {
        let place = adapter.map_or(NONE, |adapter| {
            let known = self.adapters.iter().position(|known| Arc::ptr_eq(known, adapter));
            known.unwrap_or_else(|| {
                self.adapters.push(Arc::clone(adapter));
                self.adapters.len() - 1
            }) as u32
        });
        self.rows.extend(std::iter::repeat_n(place, rows));
    }

    /// The rows' adapters at one site.
    #[must_use]
    pub fn site(&self, id: SiteId) -> SiteRouting<'_> {
        SiteRouting { batch: self, id }
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
}

impl Routing for SiteRouting<'_> {
    fn at(&self, row: usize) -> Option<LowRank<'_>> {
        let adapter = self.batch.adapters.get(*self.batch.rows.get(row)? as usize)?;
        adapter.site(self.id)
    }

    fn max_rank(&self) -> usize {
        let ranks = self.batch.adapters.iter().filter_map(|adapter| adapter.site(self.id));
        ranks.map(|update| update.rank).max().unwrap_or(0)
    }
}
