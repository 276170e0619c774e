//! The choice of the next token from its logits.

use std::collections::HashMap;

use types::SamplingParams;

/// The outcome of one choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The token.
    pub id: u32,
    /// Natural log of its probability under the model; 0 unless log-probabilities were asked for.
    pub logprob: f32,
    /// The most likely tokens with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// One sequence's sampling state: its settings and what it has seen.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// Occurrences in the answer; prompt tokens are there with 0. Kept only when a penalty needs it.
    seen: HashMap<u32, u32>,
    penalised: bool,
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler for a sequence with this prompt.
    #[must_use]
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let penalised = params.repetition_penalty != 1.0
            || params.frequency_penalty != 0.0
            || params.presence_penalty != 0.0;
        let seen = if penalised { prompt.iter().map(|&id| (id, 0)).collect() } else { HashMap::new() };
        Self { params, seen, penalised, candidates: Vec::new() }
    }

    /// The settings.
    #[must_use]
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Chooses the token at `position` of the answer; `banned` tokens cannot be chosen. `None` when no
    /// finite logit is left.
    ///
    /// Order: repetition, frequency and presence penalty, bias; temperature, min-p, top-k, top-p. The random
    /// number depends on seed and position alone.
    pub fn choose(&mut self, logits: &[f32], position: u32, banned: &[u32]) -> Option<Choice> {
        self.candidates.clear();
        self.candidates.extend((0u32..).zip(logits.iter().copied()));
        self.adjust(banned);
        let best = best(&self.candidates)?;
        let id = if self.params.temperature <= 0.0 { best.0 } else { self.sample(best.1, position) };
        if self.penalised {
            *self.seen.entry(id).or_default() += 1;
        }
        let (logprob, top) = self.logprobs(logits, id);
        Some(Choice { id, logprob, top })
    }

    fn adjust(&mut self, banned: &[u32]) {
        let params = &self.params;
        for (&id, &count) in &self.seen {
            let Some((_, logit)) = self.candidates.get_mut(id as usize) else { continue };
            let penalty = params.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            if count > 0 {
                *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
            }
        }
        for &(id, bias) in &params.logit_bias {
            if let Some((_, logit)) = self.candidates.get_mut(id as usize) {
                *logit += bias;
            }
        }
        for &id in banned {
            if let Some((_, logit)) = self.candidates.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// A token drawn from the filtered distribution; `max` is the largest logit.
    fn sample(&mut self, max: f32, position: u32) -> u32 {
        let params = &self.params;
        let candidates = &mut self.candidates;
        for (_, weight) in candidates.iter_mut() {
            *weight = ((*weight - max) / params.temperature).exp();
        }
        candidates.retain(|(_, weight)| *weight > 0.0 && *weight >= params.min_p);
        let descending = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let top_k = params.top_k as usize;
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, descending);
            candidates.truncate(top_k);
        }
        if params.top_p < 1.0 || top_k > 0 {
            candidates.sort_unstable_by(descending);
        }
        if params.top_p < 1.0 {
            let total: f64 = candidates.iter().map(|(_, weight)| f64::from(*weight)).sum();
            let mut mass = 0.0;
            let kept = candidates.iter().take_while(|(_, weight)| {
                let more = mass < f64::from(params.top_p) * total;
                mass += f64::from(*weight);
                more
            });
            let kept = kept.count().max(1);
            candidates.truncate(kept);
        }
        let total: f64 = candidates.iter().map(|(_, weight)| f64::from(*weight)).sum();
        let mut left = uniform(params.seed, position) * total;
        for &(id, weight) in candidates.iter() {
            left -= f64::from(weight);
            if left < 0.0 {
                return id;
            }
        }
        candidates.last().map_or(0, |(id, _)| *id)
    }

    fn logprobs(&self, logits: &[f32], id: u32) -> (f32, Vec<(u32, f32)>) {
        let Some(wanted) = self.params.logprobs else { return (0.0, Vec::new()) };
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from((logit - max).exp())).sum();
        let log_sum = max + sum.ln() as f32;
        let wanted = (wanted as usize).min(logits.len());
        let mut top: Vec<(u32, f32)> = Vec::new();
        if wanted > 0 {
            top.extend((0u32..).zip(logits.iter().copied()));
            let descending = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
            top.select_nth_unstable_by(wanted - 1, descending);
            top.truncate(wanted);
            top.sort_unstable_by(descending);
            top.iter_mut().for_each(|(_, logit)| *logit -= log_sum);
        }
        (logits.get(id as usize).map_or(0.0, |logit| logit - log_sum), top)
    }
}

/// The largest finite logit, the lowest id among equals; `None` when there is none or one is NaN.
fn best(candidates: &[(u32, f32)]) -> Option<(u32, f32)> {
    let mut best: Option<(u32, f32)> = None;
    for &(id, logit) in candidates {
        if logit.is_nan() {
            return None;
        }
        if best.is_none_or(|(_, largest)| logit > largest) {
            best = Some((id, logit));
        }
    }
    best.filter(|(_, logit)| logit.is_finite())
}

/// A number in 0..1 from seed and position (splitmix64, Steele et al. 2014).
fn uniform(seed: u64, position: u32) -> f64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(u64::from(position) + 1));
    for multiplier in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        z = (z ^ (z >> 30)).wrapping_mul(multiplier);
    }
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(params: SamplingParams, logits: &[f32], position: u32) -> u32 {
        Sampler::new(params, &[]).choose(logits, position, &[]).map_or(u32::MAX, |choice| choice.id)
    }

    #[test]
    fn samples_follow_the_distribution() {
        let logits = [1.0f32, 3.0, 2.0, -1.0];
        let mut counts = [0u32; 4];
        for position in 0..20_000 {
            counts[choose(SamplingParams { seed: 7, ..SamplingParams::default() }, &logits, position)
                as usize] += 1;
        }
        let total: f32 = logits.iter().map(|l| l.exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            let (share, expected) = (*count as f32 / 20_000.0, logit.exp() / total);
            assert!((share - expected).abs() < 0.015, "{share} instead of {expected}");
        }
    }

    #[test]
    fn filters_keep_what_they_should() {
        let logits = [1.0f32, 3.0, 2.0, -1.0];
        let all = |params: SamplingParams| {
            let mut ids: Vec<u32> = (0..500).map(|p| choose(params.clone(), &logits, p)).collect();
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        let default = SamplingParams::default();
        assert_eq!(all(default.clone()), [0, 1, 2, 3]);
        assert_eq!(all(SamplingParams { top_k: 2, ..default.clone() }), [1, 2]);
        // Probabilities: .09, .66, .24, .01.
        assert_eq!(all(SamplingParams { top_p: 0.6, ..default.clone() }), [1]);
        assert_eq!(all(SamplingParams { top_p: 0.7, ..default.clone() }), [1, 2]);
        assert_eq!(all(SamplingParams { min_p: 0.1, ..default.clone() }), [0, 1, 2]);
        assert_eq!(all(SamplingParams { temperature: 0.0, ..default }), [1]);
    }

    #[test]
    fn penalties_and_bias_change_the_choice() {
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let logits = [2.0, 1.9, 0.0];
        let mut sampler = Sampler::new(SamplingParams { presence_penalty: 0.5, ..greedy.clone() }, &[1]);
        let ids: Vec<u32> = (0..3).filter_map(|p| sampler.choose(&logits, p, &[])).map(|c| c.id).collect();
        assert_eq!(ids, [0, 1, 0]);
        let biased = SamplingParams { logit_bias: vec![(2, 5.0)], ..greedy.clone() };
        assert_eq!(choose(biased, &logits, 0), 2);
        let repeated = SamplingParams { repetition_penalty: 2.0, ..greedy.clone() };
        assert_eq!(Sampler::new(repeated, &[0]).choose(&logits, 0, &[]).map(|c| c.id), Some(1));
        assert_eq!(Sampler::new(greedy.clone(), &[]).choose(&logits, 0, &[0]).map(|c| c.id), Some(1));
        assert_eq!(Sampler::new(greedy, &[]).choose(&[f32::NAN, 1.0], 0, &[]), None);
    }

    #[test]
    fn log_probabilities_are_those_of_the_model() {
        let params =
            SamplingParams { logprobs: Some(2), temperature: 0.3, top_k: 1, ..SamplingParams::default() };
        let choice = Sampler::new(params, &[]).choose(&[0.0, 1.0, 2.0], 0, &[]);
        let log_sum = (1.0f32 + 1.0f32.exp() + 2.0f32.exp()).ln();
        let choice = choice.unwrap_or(Choice { id: 9, logprob: 0.0, top: Vec::new() });
        assert_eq!(choice.id, 2);
        assert!((choice.logprob - (2.0 - log_sum)).abs() < 1e-5);
        assert_eq!(choice.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [2, 1]);
    }
}
