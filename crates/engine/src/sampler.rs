//! The choice of the next token from its logits.

use std::collections::HashMap;

use types::SamplingParams;

use crate::draw::{descending, draw};

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

/// Room to work in, used again from choice to choice so that none is allocated in a step.
#[derive(Debug, Default)]
pub struct Scratch {
    logits: Vec<f32>,
    weights: Vec<f32>,
    candidates: Vec<(u32, f32)>,
}

/// One sequence's sampling state: its settings and what it has seen.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// Occurrences in the answer; prompt tokens are there with 0. Kept only when a penalty needs it, and then with room for
    /// the whole answer.
    seen: HashMap<u32, u32>,
    penalised: bool,
}

impl Sampler {
    /// A sampler for a sequence with this prompt.
    #[must_use]
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let penalised = params.repetition_penalty != 1.0
            || params.frequency_penalty != 0.0
            || params.presence_penalty != 0.0;
        let mut seen = HashMap::new();
        if penalised {
            seen.extend(prompt.iter().map(|&id| (id, 0)));
            seen.reserve(params.max_tokens as usize);
        }
        Self { params, seen, penalised }
    }

    /// The settings.
    #[must_use]
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Chooses the token at `position` of the answer; `largest` is the largest logit, as [`model::Logits::largest`] has it;
    /// `banned` tokens cannot be chosen. `None` when no finite logit is left.
    ///
    /// Order: repetition, frequency and presence penalty, bias; temperature, min-p, top-k, top-p. The random
    /// number depends on seed and position alone.
    pub fn choose(
        &mut self,
        logits: &[f32],
        largest: Option<(u32, f32)>,
        position: u32,
        banned: &[u32],
        scratch: &mut Scratch,
    ) -> Option<Choice> {
        let Scratch { logits: copy, weights, candidates } = scratch;
        let as_they_are = self.seen.is_empty() && self.params.logit_bias.is_empty() && banned.is_empty();
        let (adjusted, best) = if as_they_are {
            (logits, largest?)
        } else {
            copy.clear();
            copy.extend_from_slice(logits);
            self.adjust(copy, banned);
            (&copy[..], best(copy)?)
        };
        let greedy = self.params.temperature <= 0.0;
        let id =
            if greedy { best.0 } else { draw(&self.params, adjusted, best.1, position, weights, candidates) };
        if self.penalised {
            *self.seen.entry(id).or_default() += 1;
        }
        let (logprob, top) = self.logprobs(logits, id, candidates);
        Some(Choice { id, logprob, top })
    }

    fn adjust(&self, logits: &mut [f32], banned: &[u32]) {
        let params = &self.params;
        for (&id, &count) in &self.seen {
            let Some(logit) = logits.get_mut(id as usize) else { continue };
            let penalty = params.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            if count > 0 {
                *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
            }
        }
        for &(id, bias) in &params.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        for &id in banned {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    fn logprobs(&self, logits: &[f32], id: u32, candidates: &mut Vec<(u32, f32)>) -> (f32, Vec<(u32, f32)>) {
        let Some(wanted) = self.params.logprobs else { return (0.0, Vec::new()) };
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from((logit - max).exp())).sum();
        let log_sum = max + sum.ln() as f32;
        let wanted = (wanted as usize).min(logits.len());
        let mut top: Vec<(u32, f32)> = Vec::new();
        if wanted > 0 {
            candidates.clear();
            candidates.extend((0u32..).zip(logits.iter().copied()));
            candidates.select_nth_unstable_by(wanted - 1, descending);
            candidates.truncate(wanted);
            candidates.sort_unstable_by(descending);
            top.extend(candidates.iter().map(|(id, logit)| (*id, logit - log_sum)));
        }
        (logits.get(id as usize).map_or(0.0, |logit| logit - log_sum), top)
    }
}

/// The largest logit, the lowest id among equals; `None` when it is not finite or a logit is NaN.
fn best(logits: &[f32]) -> Option<(u32, f32)> {
    model::largest(logits).map(|(at, logit)| (at as u32, logit))
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use proptest::prelude::*;

    use super::*;
    use crate::draw::uniform;

    fn choose(params: SamplingParams, logits: &[f32], position: u32) -> u32 {
        chosen(&mut Sampler::new(params, &[]), logits, position, &[]).unwrap_or(u32::MAX)
    }

    fn chosen(sampler: &mut Sampler, logits: &[f32], position: u32, banned: &[u32]) -> Option<u32> {
        let choice = sampler.choose(logits, best(logits), position, banned, &mut Scratch::default());
        choice.map(|choice| choice.id)
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
        let ids: Vec<u32> = (0..3).filter_map(|p| chosen(&mut sampler, &logits, p, &[])).collect();
        assert_eq!(ids, [0, 1, 0]);
        let biased = SamplingParams { logit_bias: vec![(2, 5.0)], ..greedy.clone() };
        assert_eq!(choose(biased, &logits, 0), 2);
        let repeated = SamplingParams { repetition_penalty: 2.0, ..greedy.clone() };
        assert_eq!(chosen(&mut Sampler::new(repeated, &[0]), &logits, 0, &[]), Some(1));
        assert_eq!(chosen(&mut Sampler::new(greedy.clone(), &[]), &logits, 0, &[0]), Some(1));
        assert_eq!(chosen(&mut Sampler::new(greedy, &[]), &[f32::NAN, 1.0], 0, &[]), None);
    }

    #[test]
    fn log_probabilities_are_those_of_the_model() {
        let params =
            SamplingParams { logprobs: Some(2), temperature: 0.3, top_k: 1, ..SamplingParams::default() };
        let logits = [0.0, 1.0, 2.0];
        let choice =
            Sampler::new(params, &[]).choose(&logits, best(&logits), 0, &[], &mut Scratch::default());
        let log_sum = (1.0f32 + 1.0f32.exp() + 2.0f32.exp()).ln();
        let choice = choice.unwrap_or(Choice { id: 9, logprob: 0.0, top: Vec::new() });
        assert_eq!(choice.id, 2);
        assert!((choice.logprob - (2.0 - log_sum)).abs() < 1e-5);
        assert_eq!(choice.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [2, 1]);
    }

    /// The plain way: every logit with its id, each rule over all of them.
    fn plainly(
        params: &SamplingParams,
        seen: &[u32],
        answer: &[u32],
        logits: &[f32],
        banned: &[u32],
    ) -> Option<u32> {
        let mut all: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
        for (id, logit) in &mut all {
            let count = answer.iter().filter(|other| *other == id).count();
            if seen.contains(id) || count > 0 {
                let penalty = params.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
            if count > 0 {
                *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
            }
            for (_, bias) in params.logit_bias.iter().filter(|(other, _)| other == id) {
                *logit += bias;
            }
            if banned.contains(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if all.iter().any(|(_, logit)| logit.is_nan()) {
            return None;
        }
        all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal));
        let best = *all.first().filter(|(_, logit)| logit.is_finite())?;
        if params.temperature <= 0.0 {
            return Some(best.0);
        }
        for (_, weight) in &mut all {
            *weight = ((*weight - best.1) / params.temperature).exp();
        }
        all.retain(|(_, weight)| *weight > 0.0 && *weight >= params.min_p);
        // Without top-k and top-p the tokens stand in the order of their ids.
        all.sort_by_key(|(id, _)| *id);
        if params.top_k > 0 || params.top_p < 1.0 {
            all.sort_by(descending);
        }
        if params.top_k > 0 {
            all.truncate(params.top_k as usize);
        }
        if params.top_p < 1.0 {
            let total: f64 = all.iter().map(|(_, weight)| f64::from(*weight)).sum();
            let mut mass = 0.0;
            let mut kept = 0;
            while kept < all.len() && mass < f64::from(params.top_p) * total {
                mass += f64::from(all[kept].1);
                kept += 1;
            }
            all.truncate(kept.max(1));
        }
        let total: f64 = all.iter().map(|(_, weight)| f64::from(*weight)).sum();
        let mut left = uniform(params.seed, answer.len() as u32) * total;
        let drawn = all.iter().find(|(_, weight)| {
            left -= f64::from(*weight);
            left < 0.0
        });
        drawn.or(all.last()).map(|(id, _)| *id)
    }

    fn settings() -> impl Strategy<Value = SamplingParams> {
        let penalties = (
            prop_oneof![Just(1.0f32), 0.5f32..2.0],
            prop_oneof![Just(0.0f32), -1.0f32..1.0],
            prop_oneof![Just(0.0f32), -1.0f32..1.0],
            prop::collection::vec((0u32..60, -4.0f32..4.0), 0..3),
        );
        let filters = (
            prop_oneof![Just(0.0f32), 0.1f32..2.0],
            0u32..12,
            prop_oneof![Just(1.0f32), 0.05f32..1.0],
            prop_oneof![Just(0.0f32), 0.0f32..0.5],
        );
        (penalties, filters, any::<u64>()).prop_map(|(penalties, filters, seed)| SamplingParams {
            repetition_penalty: penalties.0,
            frequency_penalty: penalties.1,
            presence_penalty: penalties.2,
            logit_bias: penalties.3,
            temperature: filters.0,
            top_k: filters.1,
            top_p: filters.2,
            min_p: filters.3,
            seed,
            ..SamplingParams::default()
        })
    }

    proptest! {
        #[test]
        fn choices_equal_the_plain_way(
            params in settings(),
            // Coarse, so that there are ties.
            logits in prop::collection::vec((-20i32..20).prop_map(|logit| logit as f32 / 2.0), 1..50),
            prompt in prop::collection::vec(0u32..60, 0..8),
            banned in prop::collection::vec(0u32..60, 0..3),
        ) {
            let mut sampler = Sampler::new(params.clone(), &prompt);
            // What an earlier choice has left behind does no harm.
            let mut scratch = Scratch { logits: vec![9.0; 70], weights: vec![9.0; 70], candidates: vec![(3, 9.0); 70] };
            let mut answer = Vec::new();
            for position in 0..6 {
                let ours = sampler.choose(&logits, best(&logits), position, &banned, &mut scratch);
                let ours = ours.map(|choice| choice.id);
                prop_assert_eq!(ours, plainly(&params, &prompt, &answer, &logits, &banned));
                answer.extend(ours);
            }
        }

        #[test]
        fn the_best_is_the_first_of_the_largest(
            mut logits in prop::collection::vec((-4i32..5).prop_map(|logit| logit as f32), 1..100),
            spoiled in prop::option::weighted(0.3, (any::<prop::sample::Index>(), 0usize..3)),
        ) {
            if let Some((at, kind)) = spoiled {
                let at = at.index(logits.len());
                logits[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][kind];
            }
            let mut expected: Option<(u32, f32)> = None;
            for (id, &logit) in (0u32..).zip(&logits) {
                if expected.is_none_or(|(_, largest)| logit > largest) {
                    expected = Some((id, logit));
                }
            }
            let nan = logits.iter().any(|logit| logit.is_nan());
            prop_assert_eq!(best(&logits), expected.filter(|(_, logit)| logit.is_finite() && !nan));
        }
    }

    #[test]
    fn greedy_choices_without_penalties_copy_nothing() {
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let mut scratch = Scratch::default();
        let choice = Sampler::new(greedy, &[1]).choose(&[0.0; 64], Some((0, 0.0)), 0, &[], &mut scratch);
        assert_eq!(choice.map(|choice| choice.id), Some(0));
        assert_eq!((scratch.logits.capacity(), scratch.candidates.capacity()), (0, 0));
    }
}
