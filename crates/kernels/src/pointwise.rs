//! Row-wise maths between the linear layers, with the gradients training needs: RMS norm (Zhang and
//! Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020).

use crate::lanes::multiversion;

/// `y = x / rms(x) * weight` per row of `weight.len()` values, `rms(x) = sqrt(mean(x²) + eps)`.
///
/// # Panics
/// When `x` and `y` differ in length or do not divide into rows.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == y.len() && x.len().is_multiple_of(weight.len()));
    norm(x, weight, eps, y);
}

/// The gradient of [`rms_norm`] with respect to `x`.
///
/// # Panics
/// When the lengths differ or do not divide into rows.
pub fn rms_norm_grad(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    assert!(x.len() == dy.len() && x.len() == dx.len() && x.len().is_multiple_of(weight.len()));
    norm_grad(x, weight, eps, dy, dx);
}

multiversion! {
    fn norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) = norm_body
}

multiversion! {
    fn norm_grad(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) = norm_grad_body
}

/// Sum of `f(i)` over `0..n` in sixteen lanes, a shape the compiler turns into vector code.
#[inline(always)]
fn lane_sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let body = n - n % 16;
    for at in (0..body).step_by(16) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(at + lane);
        }
    }
    let tail = (body..n).fold(0.0, |sum, at| sum + f(at));
    lanes.iter().sum::<f32>() + tail
}

#[inline(always)]
fn norm_body(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let n = weight.len();
    for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
        let scale = 1.0 / (lane_sum(n, |i| x[i] * x[i]) / n as f32 + eps).sqrt();
        for i in 0..n {
            y[i] = x[i] * scale * weight[i];
        }
    }
}

/// With `s = 1 / rms`: `dx = s (w dy - x s² mean(w dy x))`.
#[inline(always)]
fn norm_grad_body(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let n = weight.len();
    for ((x, dy), dx) in x.chunks_exact(n).zip(dy.chunks_exact(n)).zip(dx.chunks_exact_mut(n)) {
        let scale = 1.0 / (lane_sum(n, |i| x[i] * x[i]) / n as f32 + eps).sqrt();
        let along = lane_sum(n, |i| weight[i] * dy[i] * x[i]) / n as f32 * scale * scale;
        for i in 0..n {
            dx[i] = scale * (weight[i] * dy[i] - x[i] * along);
        }
    }
}

/// Cosines and sines of the rotary angles, by position.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    /// (positions, 2, half): cosines, then sines.
    values: Box<[f32]>,
}

impl RopeTable {
    /// The table of `positions` positions for the given inverse frequencies (one per pair of values).
    #[must_use]
    pub fn new(inverse_frequencies: &[f32], positions: usize) -> Self {
        let half = inverse_frequencies.len();
        let mut values = Vec::with_capacity(positions * half * 2);
        for position in 0..positions {
            // The product is formed in float32, as Hugging Face transformers does.
            let angle = |f: &f32| position as f32 * f;
            values.extend(inverse_frequencies.iter().map(|f| angle(f).cos()));
            values.extend(inverse_frequencies.iter().map(|f| angle(f).sin()));
        }
        Self { half, values: values.into() }
    }

    /// Number of positions.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.values.len().checked_div(self.half * 2).unwrap_or(0)
    }

    fn at(&self, position: u32) -> (&[f32], &[f32]) {
        self.values[position as usize * self.half * 2..][..self.half * 2].split_at(self.half)
    }
}

/// Rotates the heads of each row in place: value `i` pairs with `i + half` ("half-split" layout).
/// `x` is (positions.len(), heads, 2 * half); `inverse` rotates back, which is also the gradient.
///
/// # Panics
/// When `x` does not divide into that shape or a position lies beyond the table.
pub fn rope(table: &RopeTable, positions: &[u32], inverse: bool, x: &mut [f32]) {
    let head = table.half * 2;
    assert!(!positions.is_empty() && x.len().is_multiple_of(positions.len() * head));
    let row = x.len() / positions.len();
    for (x, &position) in x.chunks_exact_mut(row).zip(positions) {
        let (cos, sin) = table.at(position);
        for head in x.chunks_exact_mut(head) {
            let (low, high) = head.split_at_mut(table.half);
            for i in 0..table.half {
                let (a, b, sin) = (low[i], high[i], if inverse { -sin[i] } else { sin[i] });
                low[i] = a * cos[i] - b * sin;
                high[i] = b * cos[i] + a * sin;
            }
        }
    }
}

/// `y = silu(gate) * up`, `silu(v) = v / (1 + e^-v)`.
///
/// # Panics
/// When the lengths differ.
pub fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == y.len());
    for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
        *y = gate * sigmoid(gate) * up;
    }
}

/// The gradients of [`swiglu`] with respect to `gate` and `up`.
///
/// # Panics
/// When the lengths differ.
pub fn swiglu_grad(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    assert!([up.len(), dy.len(), dgate.len(), dup.len()].iter().all(|&len| len == gate.len()));
    for i in 0..gate.len() {
        let s = sigmoid(gate[i]);
        dup[i] = dy[i] * gate[i] * s;
        dgate[i] = dy[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
    }
}

fn sigmoid(v: f32) -> f32 {
    1.0 / (1.0 + (-v).exp())
}
