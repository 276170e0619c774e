//! The random draw of a token: temperature, min-p, top-k, top-p, over the whole vocabulary without sorting it.

use std::cmp::Ordering;

use types::SamplingParams;

/// Tokens whose weights are added up before one of them is looked for.
const CHUNK: usize = 1024;

/// A token drawn from the filtered distribution; `max` is the largest logit. Weights are relative to the most likely
/// token's; `weights` and `candidates` are room to work in.
pub(crate) fn draw(
    params: &SamplingParams,
    logits: &[f32],
    max: f32,
    position: u32,
    weights: &mut Vec<f32>,
    candidates: &mut Vec<(u32, f32)>,
) -> u32 {
    weights.resize(logits.len(), 0.0);
    model::softmax_weights(logits, max, params.temperature, weights);
    let random = uniform(params.seed, position);
    let total: f64 = weights.chunks(CHUNK).map(|chunk| sum(chunk, params.min_p)).sum();
    if params.top_k == 0 && params.top_p >= 1.0 {
        return by_id(weights, params.min_p, random * total);
    }
    select(params, weights, total, candidates);
    let total: f64 = candidates.iter().map(|(_, weight)| f64::from(*weight)).sum();
    let mut left = random * total;
    let drawn = candidates.iter().find(|(_, weight)| {
        left -= f64::from(*weight);
        left < 0.0
    });
    drawn.or(candidates.last()).map_or(0, |(id, _)| *id)
}

/// The sum of the weights of at least `min`, in eight chains.
fn sum(weights: &[f32], min: f32) -> f64 {
    let (eights, rest) = weights.as_chunks::<8>();
    let mut sums = [0.0f64; 8];
    for eight in eights {
        for (sum, &weight) in sums.iter_mut().zip(eight) {
            *sum += if weight >= min { f64::from(weight) } else { 0.0 };
        }
    }
    let rest = rest.iter().filter(|weight| **weight >= min).map(|weight| f64::from(*weight));
    sums.iter().sum::<f64>() + rest.sum::<f64>()
}

/// The token at `left` of the running sum in the order of the ids.
fn by_id(weights: &[f32], min: f32, mut left: f64) -> u32 {
    let mut last = 0;
    for (index, chunk) in weights.chunks(CHUNK).enumerate() {
        let whole = sum(chunk, min);
        if left >= whole {
            left -= whole;
            continue;
        }
        for (at, &weight) in chunk.iter().enumerate().filter(|(_, weight)| **weight >= min && **weight > 0.0)
        {
            last = index * CHUNK + at;
            left -= f64::from(weight);
            if left < 0.0 {
                return last as u32;
            }
        }
    }
    // Rounding has left a little: the last token that counts.
    let kept = weights.iter().rposition(|weight| *weight >= min && *weight > 0.0);
    kept.unwrap_or(last) as u32
}

/// The tokens that min-p, top-k and top-p leave, the most likely first. Only as many are looked at as it takes.
fn select(params: &SamplingParams, weights: &[f32], total: f64, candidates: &mut Vec<(u32, f32)>) {
    let (top_k, top_p) = (params.top_k as usize, f64::from(params.top_p));
    candidates.clear();
    // Once for all: how many pass differs from draw to draw.
    candidates.reserve(weights.len());
    for threshold in [1e-2f32, 1e-4, 1e-7, 0.0] {
        candidates.clear();
        let mut mass = 0.0;
        for (index, chunk) in weights.chunks(16).enumerate() {
            if !chunk.iter().fold(false, |any, weight| any | (*weight > threshold)) {
                continue;
            }
            for (at, &weight) in chunk.iter().enumerate() {
                if weight > threshold && weight >= params.min_p {
                    candidates.push(((index * 16 + at) as u32, weight));
                    mass += f64::from(weight);
                }
            }
        }
        if if top_k > 0 { candidates.len() >= top_k } else { mass >= top_p * total } {
            break;
        }
    }
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, descending);
        candidates.truncate(top_k);
    }
    candidates.sort_unstable_by(descending);
    if top_p < 1.0 {
        let total = if top_k > 0 { candidates.iter().map(|(_, w)| f64::from(*w)).sum() } else { total };
        let mut mass = 0.0;
        let kept = candidates.iter().take_while(|(_, weight)| {
            let more = mass < top_p * total;
            mass += f64::from(*weight);
            more
        });
        let kept = kept.count().max(1);
        candidates.truncate(kept);
    }
}

/// The largest first, the lowest id first among equals.
pub(crate) fn descending(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// A number in 0..1 from seed and position (splitmix64, Steele et al. 2014).
pub(crate) fn uniform(seed: u64, position: u32) -> f64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(u64::from(position) + 1));
    for multiplier in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        z = (z ^ (z >> 30)).wrapping_mul(multiplier);
    }
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}
