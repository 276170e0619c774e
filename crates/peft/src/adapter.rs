//! An adapter as it is served: read-only weights by site, and the lease that pins it.

use std::sync::Arc;

use kernels::{LowRank, Numbers, Precision, pack_b};
use types::{AdapterId, GenerationId, SiteId};

use crate::base::FrozenBase;
use crate::error::PeftError;
use crate::weights::{AdapterWeights, LoraWeights};

/// The low-rank update of one site, ready to serve: A as (rank, input features), B times the scale in the kernels'
/// panels.
#[derive(Debug)]
struct AdapterSite {
    rank: usize,
    a: Values,
    b: Values,
}

#[derive(Debug)]
enum Values {
    F32(Box<[f32]>),
    Bf16(Box<[u16]>),
}

impl Values {
    fn new(values: &[f32], precision: Precision) -> Self {
        match precision {
            Precision::Exact => Self::F32(values.into()),
            Precision::Fast => Self::Bf16(values.iter().map(|&value| kernels::to_bf16(value)).collect()),
        }
    }

    fn numbers(&self) -> Numbers<'_> {
        match self {
            Self::F32(values) => Numbers::F32(values),
            Self::Bf16(values) => Numbers::Bf16(values),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => size_of_val::<[f32]>(values),
            Self::Bf16(values) => size_of_val::<[u16]>(values),
        }
    }
}

/// One immutable generation of an adapter in memory.
#[derive(Debug)]
pub struct Adapter {
    sites: Vec<Option<AdapterSite>>,
    bytes: usize,
}

impl Adapter {
    /// An adapter of any kind, made ready to serve beside its base.
    ///
    /// # Errors
    /// When the weights do not fit the base.
    pub fn build(
        weights: &AdapterWeights,
        _base: &dyn FrozenBase,
        precision: Precision,
    ) -> Result<Self, PeftError> {
        match weights {
            AdapterWeights::Lora(lora) => Ok(Self::new(lora, precision)),
            AdapterWeights::Ia3(_) | AdapterWeights::Prompt(_) => {
                Err(PeftError::field("peft_type", "is not served yet"))
            }
        }
    }

    /// Folds each site's scale into B. Fast precision keeps bfloat16, exact precision float32.
    #[must_use]
    pub fn new(weights: &LoraWeights, precision: Precision) -> Self {
        let site = |rank: usize, scale: f32, a: &[f32], b: &[f32]| {
            let scaled: Vec<f32> = b.iter().map(|v| v * scale).collect();
            let (a, b) = (Values::new(a, precision), Values::new(&pack_b(&scaled, rank), precision));
            AdapterSite { rank, a, b }
        };
        let sites: Vec<Option<AdapterSite>> = weights
            .sites
            .iter()
            .map(|at| at.as_ref().map(|t| site(t.rank, t.scale as f32, &t.a, &t.b)))
            .collect();
        let values: usize = sites.iter().flatten().map(|site| site.a.bytes() + site.b.bytes()).sum();
        let bytes = values + size_of_val(sites.as_slice());
        Self { sites, bytes }
    }

    /// The update at a site, if the adapter acts there.
    #[must_use]
    pub fn site(&self, id: SiteId) -> Option<LowRank<'_>> {
        let site = self.sites.get(id.index())?.as_ref()?;
        Some(LowRank { rank: site.rank, a: site.a.numbers(), b: site.b.numbers() })
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
