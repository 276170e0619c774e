//! The training pass: differentiable in the adapter's A and B, and in nothing else.

use candle_core::{Tensor, Var};
use kernels::Span;
use model::{FrozenLinear, Linear, ModelConfig, ModelError, Pass, SpanAttend};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use types::SiteId;

/// The trainable matrices of one site.
pub(crate) struct SiteVars {
    /// Shape (rank, input features).
    pub(crate) a: Var,
    /// Shape (output features, rank).
    pub(crate) b: Var,
    pub(crate) rank: usize,
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
    /// Zeroes values with probability `dropout` and scales up the rest.
    fn drop_out(&mut self, x: &Tensor) -> Result<Tensor, ModelError> {
        if self.dropout <= 0.0 {
            return Ok(x.clone());
        }
        let kept = (1.0 / (1.0 - self.dropout)) as f32;
        let threshold = (self.dropout * f64::from(u32::MAX)) as u32;
        let mut rng = SmallRng::seed_from_u64(self.dropout_rng.random());
        let mask: Vec<f32> =
            (0..x.elem_count()).map(|_| if rng.random::<u32>() < threshold { 0.0 } else { kept }).collect();
        Ok(x.mul(&Tensor::from_vec(mask, x.shape(), x.device())?)?)
    }
}

impl Pass for Training<'_> {
    fn linear(&mut self, id: SiteId, linear: &Linear, x: &Tensor) -> Result<Tensor, ModelError> {
        let y = x.contiguous()?.apply_op1(FrozenLinear(linear.clone()))?;
        let sites = self.sites;
        let Some(site) = sites.get(id.index()).and_then(Option::as_ref) else { return Ok(y) };
        let shrunk = self.drop_out(x)?.matmul(&site.a.t()?)?;
        let update = (shrunk.matmul(&site.b.t()?)? * site.scale)?;
        Ok((y + update)?)
    }

    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, ModelError> {
        let shape = self.config.span_attention(layer, self.spans);
        let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
        Ok(q.apply_op3(&k, &v, SpanAttend(shape))?)
    }
}
