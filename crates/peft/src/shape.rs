//! What an adapter must know of the base it acts on.

use types::{Site, SiteId};

/// The shapes of a decoder's linear layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseShape {
    /// Number of blocks.
    pub layers: usize,
    /// (output features, input features) of each site, in the order of [`Site::ALL`].
    pub dims: [(usize, usize); 7],
}

impl BaseShape {
    /// (output features, input features) of a site.
    #[must_use]
    pub fn dims(&self, site: Site) -> (usize, usize) {
        self.dims[site.index()]
    }

    /// Width of the residual stream, and so of an embedding.
    #[must_use]
    pub fn width(&self) -> usize {
        self.dims(Site::Q).1
    }

    /// Number of sites in all blocks.
    #[must_use]
    pub fn sites(&self) -> usize {
        self.layers * Site::ALL.len()
    }

    /// All sites, block by block.
    pub fn site_ids(&self) -> impl Iterator<Item = SiteId> {
        let site_ids = |layer| Site::ALL.into_iter().map(move |site| SiteId::new(layer, site));
        (0..self.layers).flat_map(site_ids)
    }
}
