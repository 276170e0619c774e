//! AdamW (Loshchilov and Hutter 2019) and clipping on flat vectors, as torch computes them.

/// The numbers of AdamW that do not change from step to step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// Decay of the gradients' mean.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// What keeps the quotient of the two finite.
    pub epsilon: f64,
}

impl Default for Adam {
    /// Those of torch and of HF transformers, which OPPU uses.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

/// First and second moments of the gradients.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AdamW {
    pub(crate) first: Vec<f32>,
    pub(crate) second: Vec<f32>,
}

impl AdamW {
    pub(crate) fn new(len: usize) -> Self {
        Self { first: vec![0.0; len], second: vec![0.0; len] }
    }

    /// One step; `step` counts from 0. The decay goes to every value, biases included, as with torch's optimiser given
    /// all parameters in one group.
    pub(crate) fn step(
        &mut self,
        adam: Adam,
        step: u32,
        rate: f64,
        decay: f64,
        grads: &[f32],
        values: &mut [f32],
    ) {
        let Adam { beta1, beta2, epsilon } = adam;
        let count = f64::from(step) + 1.0;
        let correction = (1.0 - beta1.powf(count), (1.0 - beta2.powf(count)).sqrt());
        let keep = (1.0 - rate * decay) as f32;
        let size = (rate / correction.0) as f32;
        let (second_scale, epsilon) = (correction.1 as f32, epsilon as f32);
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((value, grad), (first, second)) in values.iter_mut().zip(grads).zip(moments) {
            *value *= keep;
            *first += (1.0 - beta1) as f32 * (grad - *first);
            *second = beta2 as f32 * *second + (1.0 - beta2) as f32 * grad * grad;
            *value -= size * *first / (second.sqrt() / second_scale + epsilon);
        }
    }
}

/// Scales the gradients so that their norm is at most `limit`, as torch's `clip_grad_norm_` does; false when the norm
/// is not finite.
pub(crate) fn clip(grads: &mut [f32], limit: f64) -> bool {
    let norm = grads.iter().map(|grad| f64::from(*grad) * f64::from(*grad)).sum::<f64>().sqrt();
    let factor = limit / (norm + 1e-6);
    if factor < 1.0 {
        grads.iter_mut().for_each(|grad| *grad *= factor as f32);
    }
    norm.is_finite()
}
