//! A frozen linear layer with its LoRA update as one operation: nothing but its output is kept for the way back.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use model::{Linear, map, slice_of};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Dropout on the input of A; the same mask again from the same seed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mask {
    pub(crate) seed: u64,
    /// Probability that a value is dropped.
    pub(crate) dropout: f64,
}

impl Mask {
    /// Zeroes values with the probability `dropout` and scales up the rest.
    fn apply(self, x: &[f32]) -> Vec<f32> {
        let kept = (1.0 / (1.0 - self.dropout)) as f32;
        let threshold = (self.dropout * f64::from(u32::MAX)) as u32;
        let mut rng = SmallRng::seed_from_u64(self.seed);
        x.iter().map(|x| if rng.random::<u32>() < threshold { 0.0 } else { x * kept }).collect()
    }
}

/// `y = W x + bias + scale B (A drop(x))` of `x` (rows, input), `A` (rank, input), `B` (output, rank); gradients go
/// to all three, none to `W`.
pub(crate) struct AdaptedLinear {
    pub(crate) frozen: Linear,
    pub(crate) scale: f32,
    pub(crate) mask: Option<Mask>,
}

impl CustomOp3 for AdaptedLinear {
    fn name(&self) -> &'static str {
        "adapted-linear"
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
        let (x, a, b) = (slice_of(s1, l1)?, slice_of(s2, l2)?, slice_of(s3, l3)?);
        let (rows, width) = (l1.shape().dims2()?.0, self.frozen.weight.rows());
        let mut y = vec![0.0; rows * width];
        self.frozen.forward(x, &mut y);
        let scaled: Vec<f32> = b.iter().map(|b| b * self.scale).collect();
        let rank = l2.shape().dims2()?.0;
        match self.mask {
            Some(mask) => kernels::adapt(rank, a, &scaled, &mask.apply(x), &mut y),
            None => kernels::adapt(rank, a, &scaled, x, &mut y),
        }
        Ok((CpuStorage::F32(y), (rows, width).into()))
    }

    /// With `u = A drop(x)` and `du = scale dy B`: `dB = scale dyᵀ u`, `dA = duᵀ drop(x)`,
    /// `dx = dy W + undrop(du A)`.
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (x, a, b, dy) = (x.detach(), a.detach(), b.detach(), dy.detach());
        let dropped = match self.mask {
            Some(mask) => map("dropout", &x, &[], x.shape(), |x, _| mask.apply(x))?,
            None => x.clone(),
        };
        let u = dropped.matmul(&a.t()?)?;
        let du = (dy.matmul(&b)? * f64::from(self.scale))?;
        let db = (dy.t()?.matmul(&u)? * f64::from(self.scale))?;
        let da = du.t()?.matmul(&dropped)?;
        let low_rank = du.matmul(&a)?;
        let dx = map("adapted-linear-grad", &dy, &[&low_rank], x.shape(), |dy, rest| {
            let mut dx = vec![0.0; rest[0].len()];
            self.frozen.transposed(dy, &mut dx);
            let low_rank = self.mask.map(|mask| mask.apply(rest[0]));
            let low_rank = low_rank.as_deref().unwrap_or(rest[0]);
            dx.iter_mut().zip(low_rank).for_each(|(dx, update)| *dx += update);
            dx
        })?;
        Ok((Some(dx), Some(da), Some(db)))
    }
}
