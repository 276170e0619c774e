//! An adapter as it is served: read-only weights by site, and the lease that pins it.

use std::fmt;
use std::sync::Arc;

use kernels::{LowRank, Numbers, Precision, pack_b};
use types::{AdapterId, GenerationId, SiteId};

use crate::base::FrozenBase;
use crate::error::PeftError;
use crate::pages::{self, PagePool, Plan, Span};
use crate::weights::{AdapterWeights, LoraWeights};

/// The low-rank update of one site, ready to serve: A as (rank, input features), B times the scale in the kernels'
/// panels.
#[derive(Debug)]
struct AdapterSite {
    rank: usize,
    a: Values,
    b: Values,
}

#[derive(Debug, Clone)]
enum Values {
    F32(Box<[f32]>),
    Bf16(Box<[u16]>),
    Paged(Span),
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
            Self::Paged(span) => span.numbers(),
        }
    }

    fn bytes(&self) -> usize {
        pages::bytes(&self.numbers())
    }
}

/// One immutable generation of an adapter in memory.
#[derive(Debug)]
pub struct Adapter {
    // Dropped in this order: who watches is told when the memory is free.
    sites: Arc<[Option<AdapterSite>]>,
    bytes: usize,
    _watch: Option<Watch>,
}

/// Called when the adapter it belongs to is dropped.
struct Watch(Option<Box<dyn FnOnce() + Send + Sync>>);

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(dropped) = self.0.take() {
            dropped();
        }
    }
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
        Self { sites: sites.into(), bytes, _watch: None }
    }

    /// Its tensors, in a fixed order.
    fn tensors(&self) -> impl Iterator<Item = &Values> {
        self.sites.iter().flatten().flat_map(|site| [&site.a, &site.b])
    }

    /// Pages of `page_bytes` that it takes; `None` if a tensor is larger than a page.
    #[must_use]
    pub fn pages(&self, page_bytes: usize) -> Option<usize> {
        Plan::new(page_bytes, self.tensors().map(Values::bytes)).map(|plan| plan.pages())
    }

    /// The same adapter with its tensors in pages of a pool; `None` if there are too few free ones.
    #[must_use]
    pub fn upload(&self, pool: &PagePool) -> Option<Self> {
        let tensors: Vec<Numbers<'_>> = self.tensors().map(Values::numbers).collect();
        let mut spans = pool.store(&tensors)?.into_iter().map(Values::Paged);
        let mut site =
            |site: &AdapterSite| Some(AdapterSite { rank: site.rank, a: spans.next()?, b: spans.next()? });
        let sites = self.sites.iter().map(|at| at.as_ref().and_then(&mut site)).collect();
        Some(Self { sites, bytes: self.bytes, _watch: None })
    }

    /// Another handle on the same weights that calls `dropped` when it goes, after what it alone held is free.
    #[must_use]
    pub fn watched(&self, dropped: impl FnOnce() + Send + Sync + 'static) -> Self {
        let _watch = Some(Watch(Some(Box::new(dropped))));
        Self { sites: Arc::clone(&self.sites), bytes: self.bytes, _watch }
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
