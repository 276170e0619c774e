//! The kernels as candle operations, with the gradients that training needs.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use kernels::{RopeTable, SpanAttention};

use crate::decoder::Linear;

/// A contiguous CPU float32 tensor's values.
///
/// # Errors
/// When the tensor is of another type or strided.
pub fn slice_of<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
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
pub fn map(
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

/// `y = W x + bias` with W frozen, a stacked task adapter included: its gradient is that of `x` alone.
pub struct FrozenLinear(pub Linear);

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = layout.shape().dims2()?.0;
        let mut y = vec![0.0; rows * self.0.weight.rows()];
        self.0.forward(slice_of(storage, layout)?, &mut y);
        output(y, (rows, self.0.weight.rows()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let weight = &self.0.weight;
        let dx = map("frozen-linear-grad", dy, &[], x.shape(), |dy, _| {
            let mut dx = vec![0.0; dy.len() / weight.rows() * weight.cols()];
            self.0.transposed(dy, &mut dx);
            dx
        })?;
        Ok(Some(dx))
    }
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

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(dy.clone()), Some(dy.clone())))
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

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx = map("rms-norm-grad", x, &[dy], x.shape(), |x, rest| {
            let mut dx = vec![0.0; x.len()];
            kernels::rms_norm_grad(x, &self.weight, self.eps, rest[0], &mut dx);
            dx
        })?;
        Ok(Some(dx))
    }
}

/// Rotary positions on (rows, heads * head_dim).
#[derive(Clone)]
pub(crate) struct Rope {
    pub(crate) table: Arc<RopeTable>,
    pub(crate) positions: Arc<[u32]>,
}

impl Rope {
    fn turn(&self, inverse: bool, x: &[f32]) -> Vec<f32> {
        let mut y = x.to_vec();
        kernels::rope(&self.table, &self.positions, inverse, &mut y);
        y
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        output(self.turn(false, slice_of(storage, layout)?), layout.shape().clone())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        map("rope-grad", dy, &[], x.shape(), |dy, _| self.turn(true, dy)).map(Some)
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

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let both = map("swiglu-grad", gate, &[up, dy], (2, gate.elem_count()), |gate, rest| {
            let mut grads = vec![0.0; 2 * gate.len()];
            let (dgate, dup) = grads.split_at_mut(gate.len());
            kernels::swiglu_grad(gate, rest[0], rest[1], dgate, dup);
            grads
        })?;
        let part = |at: usize| both.get(at)?.reshape(gate.shape());
        Ok((Some(part(0)?), Some(part(1)?)))
    }
}

/// Causal attention within packed sequences, for training: inputs are (rows, heads * head_dim).
pub struct SpanAttend(pub SpanAttention);

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

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (queries, keys) = (q.elem_count(), k.elem_count());
        let all = map("span-attention-grad", q, &[k, v, dout], queries + 2 * keys, |q, rest| {
            let mut grads = vec![0.0; queries + 2 * keys];
            let (dq, rest_grads) = grads.split_at_mut(queries);
            let (dk, dv) = rest_grads.split_at_mut(keys);
            kernels::span_attention_grad(&self.0, q, rest[0], rest[1], rest[2], dq, dk, dv);
            grads
        })?;
        let part = |from: usize, of: &Tensor| all.narrow(0, from, of.elem_count())?.reshape(of.shape());
        Ok((Some(part(0, q)?), Some(part(queries, k)?), Some(part(queries + keys, v)?)))
    }
}
