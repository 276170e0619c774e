//! Hyper-parameters of a training run that a tenant or a request may choose, and their limits.

use serde::{Deserialize, Serialize};

use crate::Site;

/// A recipe by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecipeName {
    /// The server's own numbers.
    Default,
    /// The numbers of OPPU's released code (Tan et al. 2024), made for a base of 7 billion parameters.
    Oppu,
}

/// What an adapter is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterKind {
    /// LoRA (Hu et al. 2021).
    Lora,
    /// LoRA scaled by alpha / sqrt(rank) (Kalajdzievski 2023).
    Rslora,
    /// LoRA with magnitudes of their own (Liu et al. 2024).
    Dora,
    /// Learnt scales of activations (Liu et al. 2022).
    Ia3,
    /// Learnt embeddings before the prompt (Lester et al. 2021).
    Prompt,
}

/// In what numbers training multiplies activations with the frozen weights; all else is float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainPrecision {
    /// IEEE single precision.
    F32,
    /// Rounded to bfloat16, with sums in single precision.
    Bf16,
}

/// What differs from the defaults; what is absent does not.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingOptions {
    /// The numbers that the others are laid over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<RecipeName>,
    /// What the adapter is made of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<AdapterKind>,
    /// Rank of a LoRA adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Alpha of a LoRA adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Dropout on the adapter's input, from 0 to below 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// The linear layers of a block that a LoRA or IA3 adapter acts on, each once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<Vec<Site>>,
    /// The blocks that a LoRA adapter acts in, counted from 0, each once; all if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Embeddings of a prompt-tuning adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_tokens: Option<usize>,
    /// Passes over the items.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u32>,
    /// Items per optimiser step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Peak learning rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Decoupled weight decay, from 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// AdamW's decay of the gradients' mean, from 0 to below 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adam_beta1: Option<f64>,
    /// AdamW's decay of the mean of their squares, from 0 to below 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adam_beta2: Option<f64>,
    /// AdamW's epsilon, from 1e-16 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adam_epsilon: Option<f64>,
    /// Share of the steps in which the rate rises, from 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_ratio: Option<f64>,
    /// Largest norm of the gradient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// Tokens of an item; the rest is cut off on the right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    /// Numbers of the products with the frozen weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<TrainPrecision>,
    /// Seed of initial weights, order and dropout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// Largest rank of an adapter, unless a server is set to another.
pub const DEFAULT_MAX_RANK: usize = 64;

/// The most that may be asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingLimits {
    /// Largest rank, also of adapters that are made elsewhere.
    pub rank: usize,
    /// Most virtual tokens.
    pub virtual_tokens: usize,
    /// Most epochs.
    pub epochs: u32,
    /// Most items per step.
    pub batch: usize,
    /// Largest learning rate.
    pub learning_rate: f64,
    /// Most tokens of an item.
    pub max_tokens: usize,
    /// Blocks of the base.
    pub layers: usize,
}

impl Default for TrainingLimits {
    fn default() -> Self {
        Self {
            rank: DEFAULT_MAX_RANK,
            virtual_tokens: 128,
            epochs: 20,
            batch: 64,
            learning_rate: 0.1,
            max_tokens: 8192,
            layers: usize::MAX,
        }
    }
}

/// A hyper-parameter outside its limits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} must be {limits}")]
pub struct OptionError {
    /// Which.
    pub field: &'static str,
    /// What it must be.
    pub limits: String,
}

impl TrainingOptions {
    /// Checks every number that is there.
    ///
    /// # Errors
    /// Names the first that is outside.
    pub fn check(&self, limits: &TrainingLimits) -> Result<(), OptionError> {
        use AdapterKind::{Dora, Ia3, Lora, Prompt, Rslora};
        let must = |field, ok: bool, limits: String| match ok {
            true => Ok(()),
            false => Err(OptionError { field, limits }),
        };
        let count = |field, value: Option<usize>, least: usize, most: usize| {
            let ok = value.is_none_or(|value| (least..=most).contains(&value));
            must(field, ok, format!("from {least} to {most}"))
        };
        let positive = |field, value: Option<f64>, most: f64| {
            let ok = value.is_none_or(|value| value > 0.0 && value <= most);
            must(field, ok, format!("above 0, at most {most}"))
        };
        let share = |field, value: Option<f64>| {
            must(field, value.is_none_or(|value| (0.0..=1.0).contains(&value)), "from 0 to 1".into())
        };
        count("rank", self.rank, 1, limits.rank)?;
        count("virtual_tokens", self.virtual_tokens, 1, limits.virtual_tokens)?;
        count("epochs", self.epochs.map(|epochs| epochs as usize), 1, limits.epochs as usize)?;
        count("batch", self.batch, 1, limits.batch)?;
        count("max_tokens", self.max_tokens, 2, limits.max_tokens)?;
        positive("alpha", self.alpha, 1e4)?;
        positive("learning_rate", self.learning_rate, limits.learning_rate)?;
        positive("clip", self.clip, 1e6)?;
        share("weight_decay", self.weight_decay)?;
        share("warmup_ratio", self.warmup_ratio)?;
        for (field, value) in
            [("dropout", self.dropout), ("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)]
        {
            let ok = value.is_none_or(|value| (0.0..1.0).contains(&value));
            must(field, ok, "from 0 to below 1".into())?;
        }
        let epsilon = self.adam_epsilon.is_none_or(|value| (1e-16..=1.0).contains(&value));
        must("adam_epsilon", epsilon, "from 1e-16 to 1".into())?;
        let modules = self.target_modules.as_deref().is_none_or(are_different);
        must("target_modules", modules, "a list of modules, not empty, each once".into())?;
        let within = |layers: &[usize]| are_different(layers) && layers.iter().all(|at| *at < limits.layers);
        let layers = self.layers_to_transform.as_deref().is_none_or(within);
        let last = limits.layers.saturating_sub(1);
        must(
            "layers_to_transform",
            layers,
            format!("a list of blocks from 0 to {last}, not empty, each once"),
        )?;
        // A number that the kind has no use for is a mistake.
        let lora = self.kind.is_none_or(|kind| matches!(kind, Lora | Rslora | Dora));
        for (field, given) in [
            ("rank", self.rank.is_some()),
            ("alpha", self.alpha.is_some()),
            ("dropout", self.dropout.is_some()),
            ("layers_to_transform", self.layers_to_transform.is_some()),
        ] {
            must(field, lora || !given, "left out: only kinds of LoRA have it".into())?;
        }
        let sites = lora || self.kind == Some(Ia3);
        must(
            "target_modules",
            sites || self.target_modules.is_none(),
            "left out: only kinds of LoRA and the kind ia3 have it".into(),
        )?;
        let prompt = self.kind == Some(Prompt);
        must(
            "virtual_tokens",
            prompt || self.virtual_tokens.is_none(),
            "left out: only the kind prompt has it".into(),
        )
    }

    /// These, with what they leave open taken from `defaults`.
    #[must_use]
    pub fn over(&self, defaults: &Self) -> Self {
        // Numbers of another kind do not carry over.
        let same = self.kind.is_none() || self.kind == defaults.kind;
        Self {
            recipe: self.recipe.or(defaults.recipe),
            kind: self.kind.or(defaults.kind),
            rank: self.rank.or(defaults.rank.filter(|_| same)),
            alpha: self.alpha.or(defaults.alpha.filter(|_| same)),
            dropout: self.dropout.or(defaults.dropout.filter(|_| same)),
            target_modules: self
                .target_modules
                .clone()
                .or_else(|| defaults.target_modules.clone().filter(|_| same)),
            layers_to_transform: self
                .layers_to_transform
                .clone()
                .or_else(|| defaults.layers_to_transform.clone().filter(|_| same)),
            virtual_tokens: self.virtual_tokens.or(defaults.virtual_tokens.filter(|_| same)),
            epochs: self.epochs.or(defaults.epochs),
            batch: self.batch.or(defaults.batch),
            learning_rate: self.learning_rate.or(defaults.learning_rate),
            weight_decay: self.weight_decay.or(defaults.weight_decay),
            adam_beta1: self.adam_beta1.or(defaults.adam_beta1),
            adam_beta2: self.adam_beta2.or(defaults.adam_beta2),
            adam_epsilon: self.adam_epsilon.or(defaults.adam_epsilon),
            warmup_ratio: self.warmup_ratio.or(defaults.warmup_ratio),
            clip: self.clip.or(defaults.clip),
            max_tokens: self.max_tokens.or(defaults.max_tokens),
            precision: self.precision.or(defaults.precision),
            seed: self.seed.or(defaults.seed),
        }
    }
}

/// Whether there is one at least, and none twice.
fn are_different<T: PartialEq>(values: &[T]) -> bool {
    let is_first = |(at, value): (usize, &T)| !values[..at].contains(value);
    !values.is_empty() && values.iter().enumerate().all(is_first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(options: TrainingOptions) -> Option<&'static str> {
        options.check(&TrainingLimits::default()).err().map(|error| error.field)
    }

    #[test]
    fn what_is_outside_is_named() {
        let none = TrainingOptions::default;
        assert_eq!(field(none()), None);
        assert_eq!(field(TrainingOptions { rank: Some(0), ..none() }), Some("rank"));
        assert_eq!(field(TrainingOptions { rank: Some(65), ..none() }), Some("rank"));
        assert_eq!(field(TrainingOptions { learning_rate: Some(f64::NAN), ..none() }), Some("learning_rate"));
        assert_eq!(field(TrainingOptions { learning_rate: Some(0.0), ..none() }), Some("learning_rate"));
        assert_eq!(field(TrainingOptions { dropout: Some(1.0), ..none() }), Some("dropout"));
        assert_eq!(field(TrainingOptions { weight_decay: Some(-0.1), ..none() }), Some("weight_decay"));
        assert_eq!(field(TrainingOptions { epochs: Some(u32::MAX), ..none() }), Some("epochs"));
        assert_eq!(field(TrainingOptions { virtual_tokens: Some(8), ..none() }), Some("virtual_tokens"));
        let ia3 = TrainingOptions { kind: Some(AdapterKind::Ia3), rank: Some(8), ..none() };
        assert_eq!(field(ia3), Some("rank"));
        for (beta, ok) in [(0.0, true), (0.999, true), (1.0, false), (-0.1, false), (f64::NAN, false)] {
            let expected = |name| (!ok).then_some(name);
            let first = TrainingOptions { adam_beta1: Some(beta), ..none() };
            assert_eq!(field(first), expected("adam_beta1"), "{beta}");
            let second = TrainingOptions { adam_beta2: Some(beta), ..none() };
            assert_eq!(field(second), expected("adam_beta2"), "{beta}");
        }
        for (epsilon, ok) in [(1e-16, true), (1.0, true), (0.0, false), (1.1, false), (f64::NAN, false)] {
            let options = TrainingOptions { adam_epsilon: Some(epsilon), ..none() };
            assert_eq!(field(options), (!ok).then_some("adam_epsilon"), "{epsilon}");
        }
        let fine =
            TrainingOptions { kind: Some(AdapterKind::Dora), rank: Some(64), epochs: Some(1), ..none() };
        assert_eq!(field(fine), None);
    }

    #[test]
    fn sites_and_blocks_are_those_of_the_base() {
        use AdapterKind::{Dora, Ia3, Lora, Prompt, Rslora};
        let limits = TrainingLimits { layers: 3, ..TrainingLimits::default() };
        let named = |kind, modules: Option<&[Site]>, layers: Option<&[usize]>| {
            let options = TrainingOptions {
                kind,
                target_modules: modules.map(<[_]>::to_vec),
                layers_to_transform: layers.map(<[_]>::to_vec),
                ..TrainingOptions::default()
            };
            options.check(&limits).err().map(|error| error.field)
        };
        for kind in [None, Some(Lora), Some(Rslora), Some(Dora)] {
            assert_eq!(named(kind, Some(&Site::ALL), Some(&[2, 0])), None);
            assert_eq!(named(kind, Some(&[]), None), Some("target_modules"));
            assert_eq!(named(kind, Some(&[Site::Q, Site::Up, Site::Q]), None), Some("target_modules"));
            assert_eq!(named(kind, None, Some(&[])), Some("layers_to_transform"));
            assert_eq!(named(kind, None, Some(&[3])), Some("layers_to_transform"));
            assert_eq!(named(kind, None, Some(&[1, 1])), Some("layers_to_transform"));
        }
        assert_eq!(named(Some(Ia3), Some(&[Site::Down]), None), None);
        assert_eq!(named(Some(Ia3), None, Some(&[1])), Some("layers_to_transform"));
        assert_eq!(named(Some(Prompt), Some(&[Site::Q]), None), Some("target_modules"));
    }

    #[test]
    fn what_was_stored_before_is_read() -> Result<(), serde_json::Error> {
        let before = r#"{"kind":"lora","rank":4,"learning_rate":0.001}"#;
        let read: TrainingOptions = serde_json::from_str(before)?;
        assert_eq!((read.rank, &read.target_modules, read.adam_beta1), (Some(4), &None, None));
        assert_eq!(serde_json::to_string(&read)?, before);
        let now = r#"{"target_modules":["q_proj","down_proj"],"layers_to_transform":[1],"adam_beta1":0.8,"adam_beta2":0.95,"adam_epsilon":1e-6}"#;
        let read: TrainingOptions = serde_json::from_str(now)?;
        assert_eq!(read.target_modules, Some(vec![Site::Q, Site::Down]));
        assert_eq!(serde_json::to_string(&read)?, now);
        for site in Site::ALL {
            assert_eq!(serde_json::to_string(&site)?, format!("{:?}", site.module()));
        }
        assert!(serde_json::from_str::<TrainingOptions>(r#"{"target_modules":["lm_head"]}"#).is_err());
        Ok(())
    }

    #[test]
    fn what_is_open_comes_from_the_defaults() {
        let defaults = TrainingOptions { rank: Some(4), epochs: Some(9), ..TrainingOptions::default() };
        let job = TrainingOptions { epochs: Some(2), ..TrainingOptions::default() };
        let both = job.over(&defaults);
        assert_eq!((both.rank, both.epochs), (Some(4), Some(2)));
        let ia3 = TrainingOptions { kind: Some(AdapterKind::Ia3), ..TrainingOptions::default() };
        assert_eq!(ia3.over(&defaults).rank, None, "another kind has no rank");
        let defaults = TrainingOptions {
            target_modules: Some(vec![Site::O]),
            layers_to_transform: Some(vec![1]),
            adam_beta1: Some(0.8),
            ..defaults
        };
        let both = job.over(&defaults);
        assert_eq!((both.target_modules, both.layers_to_transform), (Some(vec![Site::O]), Some(vec![1])));
        assert_eq!(ia3.over(&defaults).target_modules, None, "another kind has other sites");
        assert_eq!(ia3.over(&defaults).adam_beta1, Some(0.8));
        assert_eq!(ia3.over(&defaults).check(&TrainingLimits::default()), Ok(()));
    }
}
