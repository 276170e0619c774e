//! The training pass: differentiable in the adapter's A and B, and in nothing else.

use candle_core::{Tensor, Var};
use kernels::Span;
use model::{FrozenLinear, Linear, ModelConfig, ModelError, Pass, SpanAttend};
use rand::Rng;
use rand::rngs::SmallRng;
use types::SiteId;

use crate::adapted::{AdaptedLinear, Mask};

/// The trainable matrices of one site.
pub(crate) struct SiteVars {
    /// Shape (rank, input features).
    pub(crate) a: Var,
    /// Shape (output features, rank).
    pub(crate) b: Var,
    pub(crate) rank: usize,
    /// alpha / rank, or alpha / sqrt(rank).
    pub(crate) scale: f64,
}

/// A pass over packed sequences.
pub(crate) struct Training<'a> {
    pub(crate) config: &'a ModelConfig,
    /// By [`SiteId::index`].
    pub(crate) sites: &'a [Option<SiteVars>],
    pub(crate) spans: &'a [Span],
    pub(crate) dropout: f64,
    pub(crate) dropout_rng: SmallRng,
}

impl Training<'_> {
    fn mask(&mut self) -> Option<Mask> {
        (self.dropout > 0.0).then(|| Mask { seed: self.dropout_rng.random(), dropout: self.dropout })
    }
}

impl Pass for Training<'_> {
    fn linear(&mut self, id: SiteId, linear: &Linear, x: &Tensor) -> Result<Tensor, ModelError> {
        let sites = self.sites;
        let Some(site) = sites.get(id.index()).and_then(Option::as_ref) else {
            return Ok(x.apply_op1(FrozenLinear(linear.clone()))?);
        };
        let op = AdaptedLinear { frozen: linear.clone(), scale: site.scale as f32, mask: self.mask() };
        Ok(x.apply_op3(&site.a, &site.b, op)?)
    }

    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, ModelError> {
        let shape = self.config.span_attention(layer, self.spans);
        Ok(q.apply_op3(k, v, SpanAttend(shape))?)
    }
}
