//! An adapter as it is served: read-only weights by site, and the lease that pins it.

use std::sync::Arc;

use types::{AdapterId, GenerationId, SiteId};

use crate::files::LoraWeights;

/// The low-rank update of one site, ready to serve.
#[derive(Debug)]
pub struct AdapterSite {
    /// Rank at this site.
    pub rank: usize,
    /// A, shape (rank, input features).
    pub a: Box<[f32]>,
    /// B times the scale, shape (output features, rank).
    pub b: Box<[f32]>,
}

/// One immutable generation of an adapter in memory.
#[derive(Debug)]
pub struct Adapter {
    sites: Vec<Option<AdapterSite>>,
    bytes: usize,
}

impl Adapter {
    /// Folds each site's scale into B.
    #[must_use]
    pub fn new(weights: &LoraWeights) -> Self {
        let fold = |scale: f32, b: &[f32]| b.iter().map(|v| v * scale).collect();
        let sites: Vec<Option<AdapterSite>> = weights
            .sites
            .iter()
            .map(|site| {
                site.as_ref().map(|t| AdapterSite {
                    rank: t.rank,
                    a: t.a.as_slice().into(),
                    b: fold(t.scale as f32, &t.b),
                })
            })
            .collect();
        let values: usize = sites.iter().flatten().map(|site| site.a.len() + site.b.len()).sum();
        let bytes = values * size_of::<f32>() + size_of_val(sites.as_slice());
        Self { sites, bytes }
    }

    /// The update at a site, if the adapter acts there.
    #[must_use]
    pub fn site(&self, id: SiteId) -> Option<&AdapterSite> {
        self.sites.get(id.index())?.as_ref()
    }

    /// Bytes it holds in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Pins a generation while a sequence uses it: as long as a clone lives, the weights stay.
#[derive(Debug, Clone)]
pub struct Lease {
    /// Whose adapter.
    pub id: AdapterId,
    /// Which version.
    pub generation: GenerationId,
    /// The weights.
    pub adapter: Arc<Adapter>,
}
