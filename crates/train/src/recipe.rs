//! How an adapter is trained: OPPU's recipe with every number open.

use kernels::Products;
use peft::{AdapterConfig, LoraConfig, MAX_RANK, MAX_VIRTUAL_TOKENS};

use crate::error::TrainError;
use crate::optimiser::Adam;

/// Smallest epsilon of AdamW: far above what float32 takes for 0.
const MIN_EPSILON: f64 = 1e-16;

/// A base of fewer parameters is small: see [`Recipe::for_base`].
const SMALL_BASE: usize = 1_000_000_000;

/// Hyper-parameters of one training run (Tan et al., "Democratizing Large Language Models via Personalized
/// Parameter-Efficient Fine-tuning", 2024, and its released code).
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// What is trained.
    pub adapter: AdapterConfig,
    /// Passes over the examples.
    pub epochs: u32,
    /// Examples per optimiser step.
    pub batch: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Betas and epsilon of AdamW.
    pub adam: Adam,
    /// Share of the steps in which the rate rises from 0.
    pub warmup_ratio: f64,
    /// Largest norm of the gradient over all weights.
    pub clip: f64,
    /// Tokens of an example; the rest is cut off on the right.
    pub max_tokens: usize,
    /// Tokens that go through the model at once; bounds the memory, not the result's meaning.
    pub micro_batch_tokens: usize,
    /// Bytes of activations that are kept for the way back; what is not kept is computed again, to the same bits. The
    /// inputs of the blocks are kept in any case.
    pub activation_bytes: usize,
    /// Examples of a batch that begin with the same tokens compute them once, forward and backward. Their dropout is
    /// then the same there: each example's mask is distributed as ever, but not independent of the others'.
    pub share_prefix: bool,
    /// In what numbers activations are multiplied with the frozen weights, forward and backward. All else is float32:
    /// the adapter's own products, gradients, moments and sums.
    pub products: Products,
    /// Seed of initial weights, order and dropout.
    pub seed: u64,
}

impl Recipe {
    /// OPPU's numbers for a user's adapter, as released for a 7-billion-parameter base.
    #[must_use]
    pub fn oppu() -> Self {
        Self {
            adapter: AdapterConfig::Lora(LoraConfig::oppu()),
            epochs: 2,
            batch: 16,
            learning_rate: 1e-4,
            weight_decay: 1e-2,
            adam: Adam::default(),
            warmup_ratio: 0.1,
            clip: 0.3,
            max_tokens: 2048,
            micro_batch_tokens: 512,
            activation_bytes: 400 << 20,
            share_prefix: true,
            products: Products::F32,
            seed: 0,
        }
    }

    /// The numbers for a base of so many parameters where nobody has asked for others: OPPU's, but below a billion with
    /// a higher rate and more, smaller steps, as OPPU's hardly move such a base on a hundred items.
    #[must_use]
    pub fn for_base(parameters: usize) -> Self {
        let oppu = Self::oppu();
        if parameters < SMALL_BASE { Self { epochs: 3, batch: 4, learning_rate: 2e-3, ..oppu } } else { oppu }
    }

    /// Checks the limits.
    ///
    /// # Errors
    /// Names the first number that is outside.
    pub fn check(&self) -> Result<(), TrainError> {
        let within = |field, ok: bool, limits: &str| {
            if ok { Ok(()) } else { Err(TrainError::Recipe { field, problem: format!("must be {limits}") }) }
        };
        match &self.adapter {
            AdapterConfig::Lora(lora) => {
                within("rank", (1..=MAX_RANK).contains(&lora.r), &format!("from 1 to {MAX_RANK}"))?;
                within("alpha", lora.alpha > 0.0 && lora.alpha <= 1e4, "above 0, at most 10000")?;
                within("dropout", (0.0..1.0).contains(&lora.dropout), "from 0 to below 1")?;
            }
            AdapterConfig::Ia3(_) => {}
            AdapterConfig::Prompt(prompt) => {
                let most = (1..=MAX_VIRTUAL_TOKENS).contains(&prompt.virtual_tokens);
                within("virtual_tokens", most, "from 1 to 1024")?;
            }
        }
        within("epochs", (1..=100).contains(&self.epochs), "from 1 to 100")?;
        within("batch", (1..=1024).contains(&self.batch), "from 1 to 1024")?;
        within("learning_rate", self.learning_rate > 0.0 && self.learning_rate <= 1.0, "above 0, at most 1")?;
        within("weight_decay", (0.0..=1.0).contains(&self.weight_decay), "from 0 to 1")?;
        let Adam { beta1, beta2, epsilon } = self.adam;
        within("adam_beta1", (0.0..1.0).contains(&beta1), "from 0 to below 1")?;
        within("adam_beta2", (0.0..1.0).contains(&beta2), "from 0 to below 1")?;
        within("adam_epsilon", (MIN_EPSILON..=1.0).contains(&epsilon), "from 1e-16 to 1")?;
        within("warmup_ratio", (0.0..=1.0).contains(&self.warmup_ratio), "from 0 to 1")?;
        within("clip", self.clip > 0.0 && self.clip.is_finite(), "a positive number")?;
        within("max_tokens", (2..=1 << 20).contains(&self.max_tokens), "from 2 to 1048576")?;
        within("micro_batch_tokens", self.micro_batch_tokens > 0, "at least 1")
    }

    /// All that decides what comes out of a run, to the bit, in words: what only bounds the memory is left out.
    #[must_use]
    pub fn identity(&self) -> String {
        format!("{:?}", Self { activation_bytes: 0, ..self.clone() })
    }

    /// The share of values that dropout takes; none but LoRA's way down has any.
    pub(crate) fn dropout(&self) -> f64 {
        match &self.adapter {
            AdapterConfig::Lora(lora) => lora.dropout,
            AdapterConfig::Ia3(_) | AdapterConfig::Prompt(_) => 0.0,
        }
    }

    /// Optimiser steps for so many examples.
    #[must_use]
    pub fn steps(&self, examples: usize) -> u32 {
        let per_epoch = examples.div_ceil(self.batch.max(1));
        self.epochs.saturating_mul(u32::try_from(per_epoch).unwrap_or(u32::MAX))
    }
}

/// The rate of step `step` of `steps`: linear rise over the warm-up, linear decay to 0 after it, as
/// `get_linear_schedule_with_warmup` of Hugging Face transformers has it.
#[must_use]
pub fn learning_rate(recipe: &Recipe, step: u32, steps: u32) -> f64 {
    let warmup = (f64::from(steps) * recipe.warmup_ratio).ceil();
    let (step, steps) = (f64::from(step), f64::from(steps));
    let share = if step < warmup { step / warmup } else { (steps - step) / (steps - warmup).max(1.0) };
    recipe.learning_rate * share.max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_as_oppus_has_oppus_numbers_and_a_small_one_the_same_but_for_the_rates() {
        let llama_2_7b = 6_738_415_616;
        assert_eq!(Recipe::for_base(llama_2_7b), Recipe::oppu());
        assert_eq!(Recipe::for_base(SMALL_BASE), Recipe::oppu());
        for small in [135_000_000, SMALL_BASE - 1] {
            let own = Recipe::for_base(small);
            assert_eq!((own.learning_rate, own.epochs, own.batch), (2e-3, 3, 4));
            let Recipe { learning_rate, epochs, batch, .. } = Recipe::oppu();
            assert_eq!(Recipe { learning_rate, epochs, batch, ..own }, Recipe::oppu());
        }
    }
}
