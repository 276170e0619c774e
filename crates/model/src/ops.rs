//! The kernels as candle operations, for measuring losses.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use kernels::{RopeTable, SpanAttention};

/// A contiguous CPU float32 tensor's values.
///
/// # Errors
/// When the tensor is of another type or strided.
pub(crate) fn slice_of<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (from, to) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::Msg("the tensor is not contiguous".into()))?;
    Ok(&storage.as_slice::<f32>()?[from..to])
}

fn output(values: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(values), shape.into()))
}

/// Runs a closure over the values of tensors of the same device; the result is a new tensor.
struct Map<'a, F> {
    name: &'static str,
    shape: Shape,
    run: F,
    rest: &'a [&'a Tensor],
}

impl<F: Fn(&[f32], &[&[f32]]) -> Vec<f32>> CustomOp1 for Map<'_, F> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let guards: Vec<_> = self.rest.iter().map(|tensor| tensor.storage_and_layout()).collect();
        let rest: Vec<&[f32]> = guards
            .iter()
            .map(|(storage, layout)| match &**storage {
                candle_core::Storage::Cpu(storage) => slice_of(storage, layout),
                _ => Err(candle_core::Error::Msg("the tensor is not on the CPU".into())),
            })
            .collect::<Result<_>>()?;
        output((self.run)(slice_of(storage, layout)?, &rest), self.shape.clone())
    }
}

/// `run` over the values of `first` and `rest`, without a gradient; `shape` is the result's.
///
/// # Errors
/// When a tensor is not float32 on the CPU.
pub(crate) fn map(
    name: &'static str,
    first: &Tensor,
    rest: &[&Tensor],
    shape: impl Into<Shape>,
    run: impl Fn(&[f32], &[&[f32]]) -> Vec<f32>,
) -> Result<Tensor> {
    let rest: Vec<Tensor> = rest.iter().map(|tensor| tensor.contiguous()).collect::<Result<_>>()?;
    let rest: Vec<&Tensor> = rest.iter().collect();
    first.contiguous()?.apply_op1_no_bwd(&Map { name, shape: shape.into(), run, rest: &rest })
}

/// The sum of two tensors of one shape: the residual connection.
pub(crate) struct Residual;

impl CustomOp2 for Residual {
    fn name(&self) -> &'static str {
        "residual"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, y) = (slice_of(s1, l1)?, slice_of(s2, l2)?);
        output(x.iter().zip(y).map(|(x, y)| x + y).collect(), l1.shape().clone())
    }
}

/// RMS norm over the last dimension with a frozen weight.
pub(crate) struct RmsNorm {
    pub(crate) weight: Arc<[f32]>,
    pub(crate) eps: f32,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice_of(storage, layout)?;
        let mut y = vec![0.0; x.len()];
        kernels::rms_norm(x, &self.weight, self.eps, &mut y);
        output(y, layout.shape().clone())
    }
}

/// Rotary positions on (rows, heads * head_dim).
#[derive(Clone)]
pub(crate) struct Rope {
    pub(crate) table: Arc<RopeTable>,
    pub(crate) positions: Arc<[u32]>,
}

impl Rope {
    fn turn(&self, x: &[f32]) -> Vec<f32> {
        let mut y = x.to_vec();
        kernels::rope(&self.table, &self.positions, false, &mut y);
        y
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        output(self.turn(slice_of(storage, layout)?), layout.shape().clone())
    }
}

/// `silu(gate) * up`.
pub(crate) struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice_of(s1, l1)?, slice_of(s2, l2)?);
        let mut y = vec![0.0; gate.len()];
        kernels::swiglu(gate, up, &mut y);
        output(y, l1.shape().clone())
    }
}

/// Causal attention within packed sequences: inputs are (rows, heads * head_dim).
pub(crate) struct SpanAttend(pub(crate) SpanAttention);

impl CustomOp3 for SpanAttend {
    fn name(&self) -> &'static str {
        "span-attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let q = slice_of(s1, l1)?;
        let mut out = vec![0.0; q.len()];
        kernels::span_attention(&self.0, q, slice_of(s2, l2)?, slice_of(s3, l3)?, &mut out);
        output(out, l1.shape().clone())
    }
}
