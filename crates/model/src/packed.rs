//! Whole sequences packed one after another, without KV and without gradients: for measuring losses.

use candle_core::Tensor;
use kernels::{Input, Layer, Means, Precision, Rayon, Scratch, Span};
use peft::AdapterBatch;
use types::SiteId;

use crate::config::ModelConfig;
use crate::decoder::{Linear, Pass};
use crate::error::ModelError;
use crate::ops::{SpanAttend, map};

/// The pass over packed sequences, in float32.
#[derive(Debug)]
pub struct PackedPass<'a> {
    /// The sequences' rows.
    pub spans: &'a [Span],
    /// Every row's adapter.
    pub adapters: &'a AdapterBatch,
    /// Dimensions of the model it runs on.
    pub config: &'a ModelConfig,
}

impl Pass for PackedPass<'_> {
    fn linear(&mut self, id: SiteId, linear: &Linear, x: &Tensor) -> Result<Tensor, ModelError> {
        let adapters = self.adapters.site(id).over(linear.under.as_ref().map(|under| under.low_rank()));
        let (rows, width) = (x.dims2()?.0, linear.weight.rows());
        Ok(map("fused-linear", x, &[], (rows, width), |x, _| {
            let mut y = vec![0.0; rows * width];
            let means = Means { isa: kernels::isa(), workers: &Rayon, precision: Precision::Exact };
            let (weight, bias) = (&linear.weight, linear.bias.as_deref());
            let layer = Layer { weight, bias, adapters: &adapters, y: &mut y, add: false };
            kernels::fused_linear(&mut Scratch::default(), means, Input::Plain(x), &mut [layer]);
            y
        })?)
    }

    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, ModelError> {
        let shape = self.config.span_attention(layer, self.spans);
        Ok(q.apply_op3_no_bwd(k, v, &SpanAttend(shape))?)
    }

    fn embed(&self, row: usize, index: usize, out: &mut [f32]) -> bool {
        self.adapters.row(row).is_some_and(|adapter| adapter.embed(index, out))
    }
}
