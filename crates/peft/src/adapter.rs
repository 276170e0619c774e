//! An adapter as it is served: read-only numbers by site, and the lease that pins it.

use std::fmt;
use std::sync::Arc;

use kernels::{LowRank, Numbers, RouteTable, Vectors, pack_b, quantise_low_rank, row_norms};
use types::{AdapterId, GenerationId, Site, SiteId};

use crate::base::FrozenBase;
use crate::error::PeftError;
use crate::files::LoraFile;
use crate::kind::AdapterConfig;
use crate::pages::{PagePool, Plan};
use crate::site::{AdapterSite, Effects, Factors, NOT_FINITE, SiteVectors, Values};
use crate::storage::Storage;
use crate::weights::{AdapterWeights, Ia3Scale, Ia3Weights, LoraTensors, LoraWeights, PromptWeights};

/// All tensors of an adapter.
#[derive(Debug)]
pub(crate) struct Tensors {
    /// By the sites' names: what it does there in any layer.
    effects: [Effects; Site::ALL.len()],
    /// By [`SiteId::index`].
    sites: Vec<Option<AdapterSite>>,
    /// The embeddings of virtual tokens, each a tensor of its own.
    prompt: Vec<Values>,
    bytes: usize,
}

/// One immutable generation of an adapter in memory.
#[derive(Debug)]
pub struct Adapter {
    // Dropped in this order: who watches is told when the memory is free.
    routes: RouteTable<Tensors>,
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

impl Tensors {
    fn new(sites: Vec<Option<AdapterSite>>, prompt: Vec<Values>) -> Self {
        let mut effects = [Effects::default(); Site::ALL.len()];
        for (at, site) in sites.iter().enumerate() {
            let here = site.as_ref().map(AdapterSite::effects).unwrap_or_default();
            effects[at % Site::ALL.len()].join(here);
        }
        let mut tensors = Self { effects, sites, prompt, bytes: 0 };
        let listed = tensors.sites.len() * RouteTable::<Self>::SITE_BYTES;
        let lists = size_of_val(tensors.sites.as_slice()) + size_of_val(tensors.prompt.as_slice()) + listed;
        tensors.bytes = tensors.values().map(Values::bytes).sum::<usize>() + lists;
        tensors
    }

    fn listed(self) -> RouteTable<Self> {
        let sites = self.sites.len();
        RouteTable::new(Arc::new(self), sites, |tensors, site| tensors.sites.get(site)?.as_ref()?.update())
    }

    /// All of them, in a fixed order.
    fn values(&self) -> impl Iterator<Item = &Values> {
        self.sites.iter().flatten().flat_map(AdapterSite::values).chain(&self.prompt)
    }

    /// The same with other values for each, in the order of [`Tensors::values`].
    fn map(&self, mut other: impl FnMut(&Values) -> Values) -> Self {
        let sites = self.sites.iter().map(|site| site.as_ref().map(|site| site.map(&mut other))).collect();
        let prompt = self.prompt.iter().map(&mut other).collect();
        Self { effects: self.effects, sites, prompt, bytes: self.bytes }
    }
}

impl Adapter {
    /// An adapter of any kind, made ready to serve beside its base.
    ///
    /// # Errors
    /// When the weights do not fit the base, or are not finite as they are kept: scaled, and in fewer bits.
    pub fn build(
        weights: &AdapterWeights,
        base: &dyn FrozenBase,
        storage: impl Into<Storage>,
    ) -> Result<Self, PeftError> {
        let storage = storage.into();
        match weights {
            AdapterWeights::Lora(lora) => Self::of_lora(lora, base, storage),
            AdapterWeights::Ia3(ia3) => Self::of_ia3(ia3, base),
            AdapterWeights::Prompt(prompt) => Self::of_prompt(prompt, base, storage),
        }
    }

    /// Both files of an adapter, made ready to serve: [`AdapterWeights::parse`] and [`Adapter::build`] in one, LoRA site by
    /// site, so that its float32 values are never there all at once. Calls `between` after every piece of work; a piece
    /// takes a fraction of a millisecond, DoRA's sites the time of a product with as many rows as the rank.
    ///
    /// # Errors
    /// Names the field or tensor that is wrong.
    pub fn load(
        config: &[u8],
        weights: &[u8],
        base: &dyn FrozenBase,
        storage: impl Into<Storage>,
        between: &mut dyn FnMut(),
    ) -> Result<Self, PeftError> {
        let (shape, storage) = (base.shape(), storage.into());
        let config = match AdapterConfig::parse(config, &shape)? {
            AdapterConfig::Lora(config) => config,
            config => return Self::build(&AdapterWeights::read(config, weights, &shape)?, base, storage),
        };
        let file = LoraFile::open(config, weights, &shape)?;
        let mut sites: Vec<Option<AdapterSite>> = Vec::new();
        sites.resize_with(shape.sites(), || None);
        for &(id, rank, scale) in &file.expected {
            between();
            sites[id.index()] = Some(site_of(id, &file.site(id, rank, scale)?, base, storage)?);
        }
        Ok(Self::of(sites, Vec::new()))
    }

    /// A LoRA adapter without DoRA, which needs nothing of its base. Folds each site's scale into B.
    ///
    /// # Panics
    /// With DoRA: see [`Adapter::build`].
    #[must_use]
    pub fn new(weights: &LoraWeights, storage: impl Into<Storage>) -> Self {
        let storage = storage.into();
        let site = |site: &LoraTensors| {
            assert!(site.magnitude.is_none(), "DoRA needs the base");
            lora_site(site, storage)
        };
        Self::of(weights.sites.iter().map(|at| at.as_ref().map(site)).collect(), Vec::new())
    }

    fn of_lora(weights: &LoraWeights, base: &dyn FrozenBase, storage: Storage) -> Result<Self, PeftError> {
        by_site(base, &weights.sites, |id, site| site_of(id, site, base, storage))
    }

    fn of_ia3(weights: &Ia3Weights, base: &dyn FrozenBase) -> Result<Self, PeftError> {
        let site = |id: SiteId, scale: &Ia3Scale| {
            let (out, input) = base.shape().dims(id.site);
            let (values, len) = match scale {
                Ia3Scale::Output(values) => (values, out),
                Ia3Scale::Input(values) => (values, input),
            };
            if values.len() != len {
                let problem = format!("does not fit a layer of {input} to {out}");
                return Err(PeftError::tensor(format!("{}.ia3_l", id.module_path()), problem));
            }
            let vector = Some(Values::vector(values));
            if matches!(scale, Ia3Scale::Input(_)) {
                let vectors = SiteVectors { input: vector, ..SiteVectors::default() };
                return AdapterSite { vectors: vectors.boxed(), ..AdapterSite::default() }.finite(id);
            }
            // It scales the base's bias as well.
            let bias = base.linear(id).1.map(|bias| {
                let more: Vec<f32> =
                    values.iter().zip(bias).map(|(scale, bias)| (scale - 1.0) * bias).collect();
                Values::vector(&more)
            });
            let vectors = SiteVectors { output: vector, bias, ..SiteVectors::default() };
            AdapterSite { vectors: vectors.boxed(), ..AdapterSite::default() }.finite(id)
        };
        by_site(base, &weights.sites, site)
    }

    fn of_prompt(
        weights: &PromptWeights,
        base: &dyn FrozenBase,
        storage: Storage,
    ) -> Result<Self, PeftError> {
        let (tokens, width) = (weights.config.virtual_tokens, base.shape().width());
        if tokens == 0 || weights.width != width || weights.embeddings.len() != tokens * width {
            let problem = format!("does not fit {tokens} embeddings of {width}");
            return Err(PeftError::tensor("prompt_embeddings", problem));
        }
        let embeddings = weights.embeddings.chunks_exact(width);
        let embeddings: Vec<Values> = embeddings.map(|values| Values::new(values, 1.0, storage)).collect();
        if !embeddings.iter().all(Values::is_finite) {
            return Err(PeftError::tensor("prompt_embeddings", NOT_FINITE));
        }
        Ok(Self::of(Vec::new(), embeddings))
    }

    pub(crate) fn of(sites: Vec<Option<AdapterSite>>, prompt: Vec<Values>) -> Self {
        Self { routes: Tensors::new(sites, prompt).listed(), _watch: None }
    }

    /// Pages of `page_bytes` that it takes; `None` if a tensor is larger than a page.
    #[must_use]
    pub fn pages(&self, page_bytes: usize) -> Option<usize> {
        Plan::new(page_bytes, self.tensors().values().map(Values::bytes)).map(|plan| plan.pages())
    }

    /// The same adapter with its tensors in pages of a pool; `None` if there are too few free ones. Calls `between` as
    /// [`Adapter::load`] does.
    #[must_use]
    pub fn upload(&self, pool: &PagePool, between: &mut dyn FnMut()) -> Option<Self> {
        let values: Vec<Numbers<'_>> = self.tensors().values().map(Values::numbers).collect();
        let mut spans = pool.store(&values, between)?.into_iter();
        let paged = self.tensors().map(|own| spans.next().map_or_else(|| own.clone(), Values::Paged));
        Some(Self { routes: paged.listed(), _watch: None })
    }

    /// Another handle on the same weights that calls `dropped` when it goes, after what it alone held is free.
    #[must_use]
    pub fn watched(&self, dropped: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self { routes: self.routes.clone(), _watch: Some(Watch(Some(Box::new(dropped)))) }
    }

    /// By [`SiteId::index`]; empty if it has none.
    pub(crate) fn sites(&self) -> &[Option<AdapterSite>] {
        &self.tensors().sites
    }

    /// The embeddings of virtual tokens.
    pub(crate) fn prompt(&self) -> &[Values] {
        &self.tensors().prompt
    }

    /// All tensors, site by site, then the prompt's.
    pub(crate) fn values(&self) -> impl Iterator<Item = &Values> {
        self.tensors().values()
    }

    fn tensors(&self) -> &Tensors {
        self.routes.owner()
    }

    /// Its updates by site.
    #[inline]
    pub(crate) fn routes(&self) -> &RouteTable<Tensors> {
        &self.routes
    }

    fn at(&self, id: SiteId) -> Option<&AdapterSite> {
        self.tensors().sites.get(id.index())?.as_ref()
    }

    /// The low-rank update at a site, if the adapter has one there.
    #[must_use]
    pub fn site(&self, id: SiteId) -> Option<LowRank<'_>> {
        self.at(id)?.update()
    }

    /// What else it does at a site.
    #[must_use]
    pub fn vectors(&self, id: SiteId) -> Vectors<'_> {
        let Some(vectors) = self.at(id).and_then(|site| site.vectors.as_ref()) else {
            return Vectors::default();
        };
        Vectors {
            input: vectors.input.as_ref().and_then(Values::floats),
            output: vectors.output.as_ref().and_then(Values::floats),
            bias: vectors.bias.as_ref().and_then(Values::floats),
        }
    }

    /// By the sites' names: what it does there in any layer.
    pub(crate) fn effects(&self) -> &[Effects; Site::ALL.len()] {
        &self.tensors().effects
    }

    /// Tokens of its own that stand before a prompt (prompt tuning); in a sequence they have the ids from the size of the
    /// vocabulary on.
    #[must_use]
    pub fn virtual_tokens(&self) -> usize {
        self.tensors().prompt.len()
    }

    /// Writes the embedding of a virtual token to `out`; false if there is none of that width.
    #[must_use]
    pub fn embed(&self, index: usize, out: &mut [f32]) -> bool {
        match self.tensors().prompt.get(index).map(Values::numbers) {
            Some(Numbers::F32(values)) if values.len() == out.len() => out.copy_from_slice(values),
            Some(Numbers::Bf16(values)) if values.len() == out.len() => {
                out.iter_mut().zip(values).for_each(|(out, &value)| *out = kernels::from_bf16(value));
            }
            _ => return false,
        }
        true
    }

    /// Bytes it holds in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.tensors().bytes
    }
}

/// What a LoRA adapter does at a site, if it fits the base there.
fn site_of(
    id: SiteId,
    site: &LoraTensors,
    base: &dyn FrozenBase,
    storage: Storage,
) -> Result<AdapterSite, PeftError> {
    let (out, input) = base.shape().dims(id.site);
    let vector = |values: &Option<Vec<f32>>| values.as_ref().is_none_or(|values| values.len() == out);
    let fits = site.rank > 0
        && site.a.len() == site.rank * input
        && site.b.len() == out * site.rank
        && vector(&site.bias)
        && vector(&site.magnitude);
    if !fits {
        let problem = format!("does not fit a layer of {input} to {out}");
        return Err(PeftError::tensor(format!("{}.lora", id.module_path()), problem));
    }
    match &site.magnitude {
        None => lora_site(site, storage),
        Some(magnitude) => dora_site(id, site, magnitude, base, storage)?,
    }
    .finite(id)
}

/// An adapter with what `build` makes of each site.
fn by_site<T>(
    base: &dyn FrozenBase,
    sites: &[Option<T>],
    build: impl Fn(SiteId, &T) -> Result<AdapterSite, PeftError>,
) -> Result<Adapter, PeftError> {
    let shape = base.shape();
    if sites.len() != shape.sites() {
        let problem = format!("has {} sites; this base has {}", sites.len(), shape.sites());
        return Err(PeftError::tensor("the adapter", problem));
    }
    let site = |(id, site): (SiteId, &Option<T>)| site.as_ref().map(|site| build(id, site)).transpose();
    let sites = shape.site_ids().zip(sites).map(site).collect::<Result<_, _>>()?;
    Ok(Adapter::of(sites, Vec::new()))
}

fn scaled(values: &[f32], scale: f32) -> Vec<f32> {
    values.iter().map(|value| value * scale).collect()
}

/// A (rank, input features) and B (output features, rank) times `scale`.
fn factors(rank: usize, a: &[f32], b: &[f32], scale: f32, storage: Storage) -> Factors {
    if storage == Storage::Int8 && (a.len() / rank).is_multiple_of(32) {
        let (a, b, scales) = quantise_low_rank(a, &scaled(b, scale), rank);
        let (a, b) = (Values::I8(a.into()), Values::I8(b.into()));
        return Factors { rank, a, b, scales: Some(Values::vector(&scales)) };
    }
    let (a, b) = (Values::new(a, 1.0, storage), Values::new(&pack_b(b, rank), scale, storage));
    Factors { rank, a, b, scales: None }
}

fn lora_site(site: &LoraTensors, storage: Storage) -> AdapterSite {
    let scale = site.scale as f32;
    let low_rank = Some(factors(site.rank, &site.a, &site.b, scale, storage));
    let bias = site.bias.as_ref().map(|bias| Values::vector(&scaled(bias, scale)));
    AdapterSite { low_rank, vectors: SiteVectors { bias, ..SiteVectors::default() }.boxed() }
}

/// `y = m / n * (W x + s B A x)` with n the row norms of W + s B A: an output scale, and B times s m / n.
fn dora_site(
    id: SiteId,
    site: &LoraTensors,
    magnitude: &[f32],
    base: &dyn FrozenBase,
    storage: Storage,
) -> Result<AdapterSite, PeftError> {
    let rank = site.rank;
    let mut b = scaled(&site.b, site.scale as f32);
    let packed = pack_b(&b, rank);
    let own = LowRank { rank, a: Numbers::F32(&site.a), b: Numbers::F32(&packed), scales: &[] };
    let updates: Vec<LowRank<'_>> = base.under(id).into_iter().chain([own]).collect();
    let norms = row_norms(base.linear(id).0, &updates);
    let output: Vec<f32> = magnitude.iter().zip(&norms).map(|(m, n)| m / n).collect();
    if !output.iter().all(|scale| scale.is_finite()) {
        let name = format!("{}.lora_magnitude_vector", id.module_path());
        return Err(PeftError::tensor(name, "belongs to a row of the matrix that has no length"));
    }
    for (row, output) in b.chunks_exact_mut(rank).zip(&output) {
        row.iter_mut().for_each(|value| *value *= output);
    }
    let low_rank = Some(factors(rank, &site.a, &b, 1.0, storage));
    let bias = site.bias.as_ref().map(|bias| {
        let scale = site.scale as f32;
        let scaled: Vec<f32> = bias.iter().zip(&output).map(|(bias, output)| bias * scale * output).collect();
        Values::vector(&scaled)
    });
    let vectors = SiteVectors { output: Some(Values::vector(&output)), bias, ..SiteVectors::default() };
    Ok(AdapterSite { low_rank, vectors: vectors.boxed() })
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
