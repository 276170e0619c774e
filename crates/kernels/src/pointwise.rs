//! Row-wise maths between the linear layers, with the gradients training needs: RMS norm (Zhang and
//! Sennrich 2019) and SwiGLU (Shazeer 2020).

use crate::lanes::multiversion;

/// `y = x / rms(x) * weight` per row of `weight.len()` values, `rms(x) = sqrt(mean(x²) + eps)`.
///
/// # Panics
/// When `x` and `y` differ in length or do not divide into rows.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == y.len() && x.len().is_multiple_of(weight.len()));
    norm(x, weight, eps, y);
}

/// The gradient of [`rms_norm`] with respect to `x`, in place of `dy`.
///
/// # Panics
/// When the lengths differ or do not divide into rows.
pub fn rms_norm_grad(x: &[f32], weight: &[f32], eps: f32, dy: &mut [f32]) {
    assert!(x.len() == dy.len() && x.len().is_multiple_of(weight.len()));
    norm_grad(x, weight, eps, dy);
}

multiversion! {
    fn norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) = norm_body
}

multiversion! {
    fn norm_grad(x: &[f32], weight: &[f32], eps: f32, dy: &mut [f32]) = norm_grad_body
}

/// Sum of `f(i, values[i])` in sixteen lanes, a shape the compiler turns into vector code.
#[inline(always)]
pub(crate) fn lane_sum(values: &[f32], f: impl Fn(usize, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (body, tail) = values.as_chunks::<16>();
    for (at, part) in body.iter().enumerate() {
        for lane in 0..16 {
            lanes[lane] += f(16 * at + lane, part[lane]);
        }
    }
    let tail = tail.iter().enumerate().fold(0.0, |sum, (at, &value)| sum + f(16 * body.len() + at, value));
    lanes.iter().sum::<f32>() + tail
}

/// The largest value; NaN counts for nothing.
#[inline(always)]
pub(crate) fn lane_max(values: &[f32]) -> f32 {
    lane_max_or_nan(values).0
}

/// [`lane_max`], and whether there is a NaN.
#[inline(always)]
fn lane_max_or_nan(values: &[f32]) -> (f32, bool) {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (mut lanes, mut nan) = ([f32::NEG_INFINITY; 16], [0u32; 16]);
    let (body, tail) = values.as_chunks::<16>();
    for part in body {
        for lane in 0..16 {
            lanes[lane] = larger(lanes[lane], part[lane]);
            nan[lane] |= u32::from(part[lane].is_nan());
        }
    }
    let max = lanes.iter().chain(tail).copied().fold(f32::NEG_INFINITY, larger);
    (max, nan.iter().any(|&nan| nan > 0) || tail.iter().any(|value| value.is_nan()))
}

/// The largest value and its place, the first among equals; none when it is not finite or a value is NaN.
#[must_use]
pub fn largest(values: &[f32]) -> Option<(usize, f32)> {
    let mut found = None;
    find_largest(values, &mut found);
    found
}

multiversion! {
    fn find_largest(values: &[f32], found: &mut Option<(usize, f32)>) = find_largest_body
}

#[inline(always)]
fn find_largest_body(values: &[f32], found: &mut Option<(usize, f32)>) {
    let (max, has_nan) = lane_max_or_nan(values);
    if has_nan || !max.is_finite() {
        return;
    }
    let (body, _) = values.as_chunks::<16>();
    let among = |part: &[f32; 16]| part.iter().fold(false, |any, value| any | (*value == max));
    let first = body.iter().position(among).map_or(16 * body.len(), |part| 16 * part);
    let place = values[first..].iter().position(|value| *value == max);
    *found = place.map(|place| (first + place, values[first + place]));
}

/// `1 / rms(x)`.
#[inline(always)]
pub(crate) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (lane_sum(x, |_, x| x * x) / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn norm_body(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let n = weight.len();
    for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
        norm_row(x, weight, eps, y);
    }
}

/// [`rms_norm`] of one row.
#[inline(always)]
pub(crate) fn norm_row(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let scale = inverse_rms(x, eps);
    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
        *y = x * scale * weight;
    }
}

/// [`rms_norm`] of each head of a row, in place.
#[inline(always)]
pub(crate) fn norm_heads(x: &mut [f32], weight: &[f32], eps: f32) {
    for head in x.chunks_exact_mut(weight.len()) {
        let scale = inverse_rms(head, eps);
        for (x, weight) in head.iter_mut().zip(weight) {
            *x = *x * scale * weight;
        }
    }
}

/// With `s = 1 / rms`: `dx = s (w dy - x s² mean(w dy x))`.
#[inline(always)]
fn norm_grad_body(x: &[f32], weight: &[f32], eps: f32, dy: &mut [f32]) {
    let n = weight.len();
    for (x, dy) in x.chunks_exact(n).zip(dy.chunks_exact_mut(n)) {
        let scale = inverse_rms(x, eps);
        let along = lane_sum(x, |i, x| weight[i] * dy[i] * x) / n as f32 * scale * scale;
        for i in 0..n {
            dy[i] = scale * (weight[i] * dy[i] - x[i] * along);
        }
    }
}

/// `y = silu(gate) * up`, `silu(v) = v / (1 + e^-v)`.
///
/// # Panics
/// When the lengths differ.
pub fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == y.len());
    gated(gate, up, y);
}

/// The gradients of [`swiglu`] with respect to `gate` and `up`, in their place.
///
/// # Panics
/// When the lengths differ.
pub fn swiglu_grad(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    assert!(gate.len() == up.len() && gate.len() == dy.len());
    gated_grad(gate, up, dy);
}

multiversion! {
    fn gated(gate: &[f32], up: &[f32], y: &mut [f32]) = gated_body
}

multiversion! {
    fn gated_grad(gate: &mut [f32], up: &mut [f32], dy: &[f32]) = gated_grad_body
}

#[inline(always)]
fn gated_body(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
        *y = silu(gate) * up;
    }
}

#[inline(always)]
fn gated_grad_body(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
        let s = sigmoid(*gate);
        let dup = dy * *gate * s;
        *gate = dy * *up * s * (1.0 + *gate * (1.0 - s));
        *up = dup;
    }
}

/// `v / (1 + e^-v)`.
#[inline(always)]
pub(crate) fn silu(v: f32) -> f32 {
    v * sigmoid(v)
}

/// As [`silu`], with products that are added without rounding between.
#[inline(always)]
pub(crate) fn fused_silu(v: f32) -> f32 {
    v / (1.0 + exp_with::<true>(-v))
}

#[inline(always)]
fn sigmoid(v: f32) -> f32 {
    1.0 / (1.0 + exp(-v))
}

/// `e^((logit - max) / temperature)` of every logit; 0 where it would be below 1e-37.
///
/// # Panics
/// When the lengths differ.
pub fn softmax_weights(logits: &[f32], max: f32, temperature: f32, weights: &mut [f32]) {
    assert_eq!(logits.len(), weights.len());
    powers(logits, max, temperature, weights);
}

multiversion! {
    fn powers(logits: &[f32], max: f32, temperature: f32, weights: &mut [f32]) = powers_body
}

#[inline(always)]
fn powers_body(logits: &[f32], max: f32, temperature: f32, weights: &mut [f32]) {
    for (weight, &logit) in weights.iter_mut().zip(logits) {
        let power = (logit - max) / temperature;
        *weight = if power < -85.0 { 0.0 } else { exp(power) };
    }
}

/// Values whose powers are summed in single precision.
const SUMMED: usize = 1024;

/// `-log softmax(logits)[target]` in nats; with a share, the logits become its gradient times the share, otherwise
/// they may become anything. NaN if one of them is.
///
/// # Panics
/// When there is no such target.
pub fn softmax_loss(logits: &mut [f32], target: usize, share: Option<f32>) -> f32 {
    let own = logits[target];
    let (mut max, mut sum) = (0.0, 0.0);
    powers_in_place(logits, &mut max, &mut sum);
    if let Some(share) = share {
        scale(logits, (f64::from(share) / sum) as f32);
        logits[target] -= share;
    }
    max + sum.ln() as f32 - own
}

multiversion! {
    fn powers_in_place(logits: &mut [f32], max: &mut f32, sum: &mut f64) = powers_in_place_body
}

multiversion! {
    fn scale(values: &mut [f32], by: f32) = scale_body
}

#[inline(always)]
fn powers_in_place_body(logits: &mut [f32], max: &mut f32, sum: &mut f64) {
    *max = lane_max(logits);
    for logits in logits.chunks_mut(SUMMED) {
        for logit in &mut *logits {
            // Smaller powers count for nothing, and their products with a share would be subnormal, hence slow.
            let power = *logit - *max;
            *logit = if power < -60.0 { 0.0 } else { exp(power) };
        }
        *sum += f64::from(lane_sum(logits, |_, logit| logit));
    }
}

#[inline(always)]
fn scale_body(values: &mut [f32], by: f32) {
    values.iter_mut().for_each(|value| *value *= by);
}

/// How a row is thinned out at random: the same key drops the same values.
#[derive(Debug, Clone, Copy)]
pub struct Thinning {
    /// What the draws follow from.
    pub key: u64,
    /// Draws, of 32 bits, below it drop their value.
    pub threshold: u32,
    /// What is left is multiplied with it.
    pub kept: f32,
}

/// `to = thinned(from)`, or `to += thinned(from)` with `add`.
///
/// # Panics
/// When the lengths differ.
pub fn thin_out(thinning: Thinning, from: &[f32], to: &mut [f32], add: bool) {
    assert_eq!(from.len(), to.len());
    thin(thinning, from, to, add);
}

multiversion! {
    fn thin(thinning: Thinning, from: &[f32], to: &mut [f32], add: bool) = thin_body
}

#[inline(always)]
fn thin_body(Thinning { key, threshold, kept }: Thinning, from: &[f32], to: &mut [f32], add: bool) {
    let (low, high) = (key as u32, (key >> 32) as u32);
    let factor = |at: usize| {
        // The finaliser of MurmurHash3 (Appleby), with half of the key between its halves.
        let mut h = (at as u32).wrapping_mul(0x9e37_79b9) ^ low;
        h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
        h = ((h ^ (h >> 13)) ^ high).wrapping_mul(0xc2b2_ae35);
        h ^= h >> 16;
        if h < threshold { 0.0 } else { kept }
    };
    let values = to.iter_mut().zip(from).enumerate();
    if add {
        values.for_each(|(at, (to, from))| *to += from * factor(at));
    } else {
        values.for_each(|(at, (to, from))| *to = from * factor(at));
    }
}

/// `e^v` within 2 units of the last place, without a branch or a call, so that loops over it become vector code: `2^n`
/// from the exponent's bits, the rest from a polynomial (Cephes' `expf`). Saturates beyond ±87; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(v: f32) -> f32 {
    exp_with::<false>(v)
}

/// As [`exp`]; with `FUSED`, products are added without rounding between, which is fast where the CPU can.
#[inline(always)]
pub(crate) fn exp_with<const FUSED: bool>(v: f32) -> f32 {
    const ROUNDER: f32 = 12_582_912.0;
    let fma = |a: f32, b: f32, c: f32| if FUSED { a.mul_add(b, c) } else { a * b + c };
    let v = if v > 88.0 { 88.0 } else { v };
    let v = if v < -87.0 { -87.0 } else { v };
    let shifted = fma(v, std::f32::consts::LOG2_E, ROUNDER);
    let n = shifted - ROUNDER;
    // ln 2 in two parts, so that the difference is exact.
    let r = fma(n, 2.121_944_4e-4, fma(n, -0.693_359_4, v));
    let p = fma(1.987_569_1e-4, r, 1.398_199_9e-3);
    let p = fma(p, r, 8.333_452e-3);
    let p = fma(p, r, 4.166_579_6e-2);
    let p = fma(p, r, 1.666_666_6e-1);
    let p = fma(p, r, 0.5);
    let p = fma(p, r * r, r) + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    p * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_is_the_first_of_its_size_and_nothing_hides_what_is_not_a_number() {
        for len in [1, 15, 16, 17, 100, 1000] {
            let mut values: Vec<f32> = (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.5).collect();
            let plain = |values: &[f32]| {
                let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                values.iter().position(|&value| value == max).map(|at| (at, max))
            };
            assert_eq!(largest(&values), plain(&values), "{len}");
            for at in [0, len / 2, len - 1] {
                let whole = values.clone();
                values[at] = 60.0;
                assert_eq!(largest(&values), Some((at, 60.0)), "{len}");
                for not_finite in [f32::NAN, -f32::NAN, f32::INFINITY] {
                    values[at] = not_finite;
                    assert_eq!(largest(&values), None, "{not_finite} at {at} of {len}");
                }
                values = whole;
            }
        }
        assert_eq!(largest(&[]), None);
        assert_eq!(largest(&[f32::NEG_INFINITY; 20]), None);
    }

    #[test]
    fn the_exponential_is_accurate() {
        for i in -860..=860 {
            let v = i as f32 * 0.1 + 0.003;
            for ours in [exp(v), exp_with::<true>(v)] {
                let (ours, exact) = (f64::from(ours), f64::from(v).exp());
                assert!((ours / exact - 1.0).abs() < 2.5e-7, "{v}: {ours} instead of {exact}");
            }
        }
        for exp in [exp, exp_with::<true>] {
            assert_eq!(exp(0.0), 1.0);
            assert!(exp(-1e30) < 1e-37 && exp(1e30) > 1e38);
            assert!(exp(f32::NAN).is_nan());
        }
    }

    #[test]
    fn the_loss_and_its_gradient_are_those_of_double_precision() {
        for (count, spread) in [(5, 3.0), (3000, 8.0), (2500, 200.0)] {
            let logits: Vec<f32> = (0..count).map(|i| (i as f32 * 0.77).sin() * spread).collect();
            let target = count / 3;
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let power = |logit: f32| f64::from(logit - max).exp();
            let sum: f64 = logits.iter().map(|&logit| power(logit)).sum();
            let expected = sum.ln() + f64::from(max - logits[target]);
            let mut grads = logits.clone();
            let loss = softmax_loss(&mut grads, target, Some(0.25));
            assert!((f64::from(loss) - expected).abs() < 1e-5 * expected.max(1.0), "{loss}, not {expected}");
            for (at, (&grad, &logit)) in grads.iter().zip(&logits).enumerate() {
                let own = if at == target { 1.0 } else { 0.0 };
                let expected = 0.25 * (power(logit) / sum - own);
                assert!((f64::from(grad) - expected).abs() < 1e-6, "{at}: {grad}, not {expected}");
            }
            assert_eq!(softmax_loss(&mut logits.clone(), target, None).to_bits(), loss.to_bits());
            // Negative control: another target has another loss.
            assert!((softmax_loss(&mut logits.clone(), target + 1, None) - loss).abs() > 1e-3);
        }
        assert!(softmax_loss(&mut [0.0, f32::NAN, 1.0], 0, Some(1.0)).is_nan());
        assert!(softmax_loss(&mut [0.0, f32::INFINITY, 1.0], 0, Some(1.0)).is_nan());
    }
}
