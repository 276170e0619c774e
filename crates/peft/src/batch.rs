//! The routing of a batch: which row uses which adapter.

use std::sync::Arc;

use kernels::AdapterRows;
use types::SiteId;

use crate::adapter::Adapter;

/// Every row's adapter, grouped once per step and used at every site.
#[derive(Debug, Clone, Default)]
pub struct AdapterBatch {
    groups: Vec<(Arc<Adapter>, Vec<u32>)>,
}

impl AdapterBatch {
    /// Routes row `i` to the adapter at place `i` of `rows`; `None` is the base alone.
    pub fn new<'a>(rows: impl IntoIterator<Item = Option<&'a Arc<Adapter>>>) -> Self {
        let mut groups: Vec<(Arc<Adapter>, Vec<u32>)> = Vec::new();
        for (row, adapter) in (0u32..).zip(rows) {
            let Some(adapter) = adapter else { continue };
            match groups.iter_mut().find(|(known, _)| Arc::ptr_eq(known, adapter)) {
                Some((_, rows)) => rows.push(row),
                None => groups.push((Arc::clone(adapter), vec![row])),
            }
        }
        Self { groups }
    }

    /// The adapters that act at a site, with their rows.
    #[must_use]
    pub fn at(&self, id: SiteId) -> Vec<AdapterRows<'_>> {
        self.groups
            .iter()
            .filter_map(|(adapter, rows)| {
                adapter.site(id).map(|site| AdapterRows { rows, rank: site.rank, a: &site.a, b: &site.b })
            })
            .collect()
    }

    /// Number of different adapters.
    #[must_use]
    pub fn adapters(&self) -> usize {
        self.groups.len()
    }
}
