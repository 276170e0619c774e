//! What an adapter needs of the frozen model it acts on.

use kernels::{LowRank, Weight};
use types::SiteId;

use crate::shape::BaseShape;

/// The frozen base, as adapters see it: its shapes, its identity, and its weights (DoRA needs their row norms).
pub trait FrozenBase: Send + Sync {
    /// The shapes of its sites.
    fn shape(&self) -> BaseShape;

    /// SHA-256 of its files: adapters belong to exactly one base.
    fn hash(&self) -> [u8; 32];

    /// The matrix of a site, shape (output features, input features), and its bias.
    fn linear(&self, id: SiteId) -> (&Weight, Option<&[f32]>);

    /// The update that lies under all adapters at a site: there the frozen matrix is W + B A.
    fn under(&self, _id: SiteId) -> Option<LowRank<'_>> {
        None
    }
}
